"""Tiny random models of the families under test, and PEFT adapters on the same weights."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.lora import LoRAConfig, LoRALayer, adapter_parameters, attach
from tests.tiny_models import causal_model

_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
OTHERS = {
    "bert": (transformers.BertForSequenceClassification, {"vocab_size": 97, **_SHAPE}),
    "albert": (transformers.AlbertForSequenceClassification, {"vocab_size": 97, "embedding_size": 16, **_SHAPE}),
    "t5": (transformers.T5ForConditionalGeneration, {"vocab_size": 97, **_T5}),
    "vit": (transformers.ViTForImageClassification, {"image_size": 16, "patch_size": 8, **_SHAPE}),
}
VOCABULARY = 31
"""Vocabulary size of :func:`mixture`."""


def mixture(kind: str, dtype: torch.dtype = torch.float32, **overrides: object) -> nn.Module:
    """Create a decoder of two blocks with fused experts."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": 2}
    if kind == "qwen3_moe":
        experts |= {"num_local_experts": 5, "moe_intermediate_size": 16, "norm_topk_prob": True}
    config = transformers.AutoConfig.for_model(kind, **sizes, **heads, **experts, **overrides)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=dtype) * 0.05)
    return model


CAUSAL = ("llama", "gemma2", "gemma3", "qwen3", "gpt2", "neox", "phi3")
FAMILIES = (*CAUSAL, *OTHERS)


def tiny(family: str, seed: int = 0) -> nn.Module:
    """Create a two-layer fp32 model of ``family`` in eval mode. Equal seeds give equal models."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if family in OTHERS:
        torch.manual_seed(seed)
        kind, sizes = OTHERS[family]
        return kind(kind.config_class(**sizes)).eval()
    return causal_model(family, seed=seed)


def inputs(family: str, seed: int = 0) -> dict[str, Tensor]:
    """Create a small batch for :func:`tiny`."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 97, (2, 9), generator=generator)
    if family == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


def logits(model: nn.Module, family: str) -> Tensor:
    """Return the logits of :func:`inputs`, without gradients."""
    with torch.no_grad():
        return model(**inputs(family)).logits


def with_peft(model: nn.Module, **settings: object) -> nn.Module:
    """Attach a PEFT adapter to a copy of ``model``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(copy.deepcopy(model), LoraConfig(**settings))


def randomise(model: nn.Module, seed: int = 5) -> None:
    """Fill every factor with random values, so that ΔW is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALayer):
                for factor in (module.lora_A, module.lora_B):
                    factor.copy_(torch.randn(factor.shape, generator=generator) * 0.1)


@torch.no_grad()
def perturb(model: nn.Module, size: float = 0.05) -> nn.Module:
    """Add random numbers to the trainable parameters and return the model."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def peft_factors(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Return PEFT's A and B by module name in the base model."""
    factors = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = name.removeprefix("base_model.model.")
            if "default" in module.lora_A:
                factors[name] = (module.lora_A["default"].weight, module.lora_B["default"].weight)
            else:
                factors[name] = (module.lora_embedding_A["default"], module.lora_embedding_B["default"])
    return factors


def ours_as_peft(factor: Tensor) -> Tensor:
    """Transpose a factor to PEFT's orientation."""
    return factor.t() if factor.dim() == 2 else factor


def factor_pairs(ours: nn.Module, theirs: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Iterate over module name, our factor and PEFT's factor. Both must adapt the same modules."""
    reference = peft_factors(theirs)
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, LoRALayer)}
    assert layers.keys() == reference.keys()
    for name, layer in layers.items():
        for factor, their_factor in zip((layer.lora_A, layer.lora_B), reference[name], strict=True):
            yield name, factor, their_factor


@torch.no_grad()
def copy_to_peft(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy our factors into PEFT's adapter."""
    for _, factor, their_factor in factor_pairs(ours, theirs):
        their_factor.copy_(ours_as_peft(factor))


def ours_and_peft(base: nn.Module, config: LoRAConfig) -> tuple[nn.Module, nn.Module]:
    """Attach our adapter and PEFT's with the same values to copies of ``base``, in eval mode."""
    kind = {"use_rslora": config.rslora, "use_dora": config.dora, "lora_dropout": config.dropout}
    theirs = with_peft(base, r=config.rank, lora_alpha=config.alpha, target_modules=config.target_modules, **kind)
    attach(ours := copy.deepcopy(base), config)
    randomise(ours)
    copy_to_peft(ours, theirs)
    return ours.eval(), theirs.eval()


@torch.no_grad()
def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference relative to the norm of ``theirs``."""
    return float((ours - theirs.view(ours.shape)).norm() / theirs.norm().clamp_min(1e-12))


def check_ten_steps(
    ours: nn.Module, theirs: nn.Module, loss: Callable[[nn.Module], Tensor], rate: float = 1e-3
) -> None:
    """Train both models with the same steps and check that the factors agree.

    Epsilon is larger than usual. Otherwise Adam would divide rounding errors by rounding errors.
    """
    trained = [p for _, p in adapter_parameters(ours)], [p for p in theirs.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(parameters, lr=rate, eps=1e-4) for parameters in trained]
    for step in range(10):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    for name, factor, their_factor in factor_pairs(ours, theirs):
        assert relative_error(ours_as_peft(factor), their_factor) <= 1e-5, name


class EveryKind(nn.Module):
    """One layer of each kind that PEFT supports. DoRA does not support grouped convolutions."""

    def __init__(self, grouped: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.wide = Conv1D(12, 8)
        self.conv1 = nn.Conv1d(12, 8, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(1, 6, (3, 2), padding=(1, 0))
        self.grouped = nn.Conv2d(6, 4, 3, padding=1, groups=2) if grouped else nn.Identity()
        self.conv3 = nn.Conv3d(1, 2, 3, padding=1)
        self.out = nn.Linear(7, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.wide(self.embed(ids)))
        x = torch.tanh(self.conv1(x.transpose(1, 2)))
        x = self.grouped(torch.tanh(self.conv2(x[:, None].transpose(2, 3))))
        return self.out(self.conv3(x[:, None])[:, 0])


KINDS = ["embed", "wide", "conv1", "conv2", "conv3", "out"]


def all_kinds_and_peft(dora: bool = False, dropout: float = 0.0) -> tuple[nn.Module, nn.Module, Tensor]:
    """Attach our adapter and PEFT's with the same values to all kinds of layers, and return them with token ids."""
    torch.manual_seed(0)
    base = EveryKind(not dora)
    names = KINDS if dora else [*KINDS, "grouped"]
    ids = torch.randint(0, 11, (3, 9))
    ours, theirs = ours_and_peft(base, LoRAConfig(rank=4, alpha=6, target_modules=names, dora=dora, dropout=dropout))
    with torch.no_grad():
        ours.embed.lora_A[0] = 0
    copy_to_peft(ours, theirs)
    return ours, theirs, ids
