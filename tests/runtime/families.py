"""Tiny random models of every family with recognized blocks, for packed and padded rows."""

from __future__ import annotations

import functools

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltaw.lora import LoRAConfig, adapter_parameters, attach
from deltaw.runtime.recognition import blocks_of

VOCABULARY = 120
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PACKED = {"Llama": {}, "Mistral": {"sliding_window": 8}, "Qwen2": {}, "Qwen3": {"head_dim": 32}}
PACKED |= {"Gemma": {"head_dim": 16}, "Gemma2": {"head_dim": 16, "sliding_window": 8}}
PACKED |= {"Gemma3": {"head_dim": 16, "sliding_window": 8}, "SmolLM3": {"no_rope_layers": [1, 0, 1]}}
PACKED |= {"Phi": {"partial_rotary_factor": 0.5}, "Phi3": {}, "GPTNeoX": {"rotary_pct": 0.25}}
PACKED |= {"GPTNeoX, halves in turn": {"use_parallel_residual": False}, "GPT2": {}}
FALCON = {"Falcon": {}, "Falcon, grouped": {"new_decoder_architecture": True, "num_kv_heads": 2}}
FALCON |= {"Falcon, halves in turn": {"parallel_attn": False, "multi_query": False, "bias": True}}
ENCODERS = ("Bert", "Roberta", "DistilBert", "ViT")


def model_of(family: str, dtype: torch.dtype = torch.float32, **changes: object) -> nn.Module:
    """Create a frozen, deterministic causal model of the family. Biases are random, so that errors in them show."""
    name = family.partition(",")[0]
    settings = {**SIZES, **{**PACKED, **FALCON}.get(family, {}), **changes}
    if name in ("GPTNeoX", "GPT2", "Falcon"):
        del settings["num_key_value_heads"]
    if name == "Falcon":
        settings["ffn_hidden_size"] = settings.pop("intermediate_size")
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**settings)
    torch.manual_seed(0)
    model_class = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    return _frozen(model_class(config), dtype)


def encoder_of(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Create a frozen bidirectional backbone."""
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    if family == "DistilBert":
        settings = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    if family == "ViT":
        settings |= {"image_size": 16, "patch_size": 4}
    else:
        settings["vocab_size"] = VOCABULARY
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    pooler = {} if family == "DistilBert" else {"add_pooling_layer": False}
    return _frozen(getattr(transformers, f"{family}Model")(config, **pooler), dtype)


def _frozen(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.dim() > 1 and "embed" not in name and "head" not in name:
                parameter.mul_(3.0)  # with the usual initialization attention has little effect
    return model.to(dtype).eval().requires_grad_(False)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the model's blocks."""
    blocks = blocks_of(model.base_model)
    assert blocks is not None
    return list(blocks[1])


def checkpoint_blocks(model: nn.Module) -> None:
    """Enable activation checkpointing in every block."""
    for block in layers_of(model):
        block.gradient_checkpointing = block.training = True
        block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


def attach_adapter(model: nn.Module, seed: int = 0, **settings: object) -> nn.Module:
    """Attach an adapter with nonzero factors, so that their gradients are nonzero too."""
    attach(model, LoRAConfig(rank=4, alpha=8, **settings), seed=0)
    generator = torch.Generator().manual_seed(seed)
    for _, factor in adapter_parameters(model):
        factor.data.normal_(0, 0.1, generator=generator)
    return model


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the relative difference of norms."""
    ours = ours.detach().double()
    theirs = theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


BlockResult = tuple[torch.Tensor, list[torch.Tensor]]


def assert_near(actual: BlockResult, expected: BlockResult, output: float = 1e-5, gradient: float = 2e-4) -> None:
    """Assert that outputs and gradients are close to the expected ones, by relative differences."""
    assert relative_error(actual[0], expected[0]) < output
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        assert relative_error(ours, theirs) < gradient


def assert_same(actual: BlockResult, expected: BlockResult) -> None:
    """Assert that outputs and gradients are bit-identical to the expected ones."""
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual[1], expected[1], strict=True))


def assert_as_accurate(samples: list[tuple[BlockResult, BlockResult, BlockResult]]) -> None:
    """Assert that fused blocks are about as close to the exact result as the model's own code.

    Errors are summed over the samples, because rounding in a single sample varies by a quarter.

    Args:
        samples: Tuples of the fused, the model's own, and the exact result.
    """
    pairs = [[_distances(result, exact) for result in (actual, reference)] for actual, reference, exact in samples]
    distances = torch.tensor(pairs)
    ours, reference = distances.sum(0)
    assert (ours < 1.2 * reference).all(), distances


def _distances(actual: BlockResult, exact: BlockResult) -> tuple[float, float]:
    pairs = zip(actual[1], exact[1], strict=True)
    return relative_error(actual[0], exact[0]), sum(relative_error(ours, theirs) for ours, theirs in pairs)
