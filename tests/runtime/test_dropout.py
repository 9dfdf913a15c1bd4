"""Fused blocks with dropout: at the sites of the model's code, found by a constant factor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from deltaw.kernels import loader
from deltaw.kernels.dropout import constant_dropout
from deltaw.kernels.layout import Layout
from deltaw.lora import LoRAConfig, attach
from deltaw.lora.layers import LoRALayer
from deltaw.runtime.fused import FusedBlock
from deltaw.runtime.fused_blocks import fused_in_mode
from deltaw.runtime.packed import PACKED, PACKED_INDEPENDENT, first_position, packed_rows, without_cache

pytestmark = pytest.mark.skipif(loader.library() is None, reason=loader.unavailable_reason() or "")

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
BERT: dict[str, Any] = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
FAMILIES: dict[str, transformers.PretrainedConfig] = {
    "bert": transformers.BertConfig(**SHAPE, **BERT),
    "roberta": transformers.RobertaConfig(**SHAPE, **BERT),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64, attention_dropout=0.2
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.1, attn_pdrop=0.2, embd_pdrop=0.1
    ),
    "neox": transformers.GPTNeoXConfig(**SHAPE, attention_dropout=0.2, hidden_dropout=0.1),
    "phi": transformers.PhiConfig(**SHAPE, resid_pdrop=0.1, attention_dropout=0.2),
    "llama": transformers.LlamaConfig(**SHAPE, attention_dropout=0.2),
}


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModel.from_config(FAMILIES[family], attn_implementation="sdpa").float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def run_rows(model: PreTrainedModel, rows: list[Tensor]) -> Tensor:
    """Return the outputs of separate rows, concatenated."""
    return torch.cat([model(input_ids=row[None]).last_hidden_state[0] for row in rows])


def run_packed(model: PreTrainedModel, rows: list[Tensor], *, fused: bool = True) -> Tensor:
    layout = Layout.of_lengths([len(row) for row in rows])
    positions = torch.from_numpy(layout.positions())[None] + first_position(model)
    inputs = {"input_ids": torch.cat(rows)[None], "position_ids": positions, "packed_layout": layout}
    inputs |= without_cache(model)
    independent = model.config.model_type in ("bert", "roberta", "distilbert")
    with packed_rows(model, independent=independent, fused=fused):
        return model(**inputs).last_hidden_state[0]


def rows_of_tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 64, (length,), generator=generator) for length in (9, 5, 12)]


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_of_dropout_equal_those_of_the_model(family: str) -> None:
    model = model_of(family)
    attach(model, LoRAConfig(rank=2, alpha=4, target_modules="all-linear", init="gaussian"), seed=0)
    fill_factors(model)
    rows = rows_of_tokens()
    mode = PACKED_INDEPENDENT if family in ("bert", "roberta", "distilbert") else PACKED
    fused = fused_in_mode(model, mode)
    assert fused.choice.value, fused.choice.why
    model.train()
    # The model's own code of attention. That of torch has a dropout of its own.
    model.set_attn_implementation("eager")
    with constant_dropout():
        expected, expected_gradients = with_gradients(model, lambda: run_rows(model, rows))
    model.set_attn_implementation("sdpa")
    with constant_dropout(), only_fused(fused.blocks):
        computed, gradients = with_gradients(model, lambda: run_packed(model, rows))
    model.eval()
    plain = run_rows(model, rows).detach()
    assert float((plain - expected).norm() / expected.norm()) > 1e-2  # dropout has an effect
    torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        difference = float((gradient - expected_gradients[name]).norm())
        assert difference < 1e-4 * max(float(g.norm()) for g in expected_gradients.values()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_differs_in_each_call_and_repeats_with_the_seed(dtype: torch.dtype) -> None:
    model = model_of("bert").to(dtype)
    rows = rows_of_tokens()
    first_block = model.encoder.layer[0]
    fused = fused_in_mode(model, PACKED_INDEPENDENT)
    assert fused.choice.value
    model.train()
    torch.manual_seed(1)
    outputs = [run_packed(model, rows).float() for _ in range(3)]
    assert first_block.training
    assert not torch.equal(outputs[0], outputs[1])
    torch.manual_seed(1)
    assert torch.equal(run_packed(model, rows).float(), outputs[0])


def test_adapter_dropout_of_a_fused_block_is_that_of_the_layer() -> None:
    """Gradients of B are linear in the dropped input: their mean over many masks is that without dropout."""
    model = model_of("llama")
    model.config.attention_dropout = 0.0
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    attach(model, LoRAConfig(rank=2, alpha=4, target_modules="all-linear", dropout=0.3), seed=0)
    rows = rows_of_tokens()
    fused = fused_in_mode(model, PACKED)
    layer = model.layers[1].mlp.down_proj
    weights = torch.randn(26, 32, generator=torch.Generator().manual_seed(3))

    def gradient() -> Tensor:
        with only_fused(fused.blocks):
            return torch.autograd.grad((run_packed(model, rows) * weights).sum(), layer.lora_B)[0]

    model.eval()
    expected = gradient()
    model.train()
    torch.manual_seed(0)
    samples = torch.stack([gradient() for _ in range(300)])
    error = (samples.mean(0) - expected).abs()
    deviation = samples.std(0) / 300**0.5
    assert float(samples.std(0).min()) > 0
    assert float((error / deviation).max()) < 5


def test_dropout_at_an_unknown_site_runs_the_models_code() -> None:
    model = model_of("bert")
    block = model.encoder.layer[0]
    rows = rows_of_tokens()
    fused = fused_in_mode(model, PACKED_INDEPENDENT)
    vars(block)["other_dropout"] = 0.5
    model.train()
    with pytest.raises(AssertionError, match="model's code"), only_fused(fused.blocks):
        run_packed(model, rows)


def test_dropout_modules_in_another_mode_than_their_parents() -> None:
    model = model_of("bert").train()  # its attention applies the rate of a module if the parent is in training mode
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    rows = rows_of_tokens()
    with constant_dropout():
        out, expected = (run_packed(model, rows, fused=fused) for fused in (True, False))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def fill_factors(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, LoRALayer):
            layer.lora_B.data.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))


def with_gradients(model: nn.Module, run: Any) -> tuple[Tensor, dict[str, Tensor]]:
    output = run()
    slopes = torch.linspace(-1, 1, output.numel()).view(output.shape)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((output * slopes).sum(), list(named.values()), allow_unused=True)
    return output.detach(), {name: g for name, g in zip(named, gradients, strict=True) if g is not None}


class only_fused:
    """Context in which blocks that run the model's code fail."""

    def __init__(self, blocks: list[FusedBlock]) -> None:
        self.blocks = blocks

    def __enter__(self) -> None:
        self.before = [block.original_forward for block in self.blocks]
        for block in self.blocks:
            block.original_forward = self.fail

    def __exit__(self, *error: object) -> None:
        for block, forward in zip(self.blocks, self.before, strict=True):
            block.original_forward = forward

    @staticmethod
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a block runs the model's code")
