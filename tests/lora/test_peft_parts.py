"""Adapted parameters, token rows, a bias on B and ``nn.MultiheadAttention`` match PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.lora import (
    LoRAConfig,
    adapter_parameters,
    attach,
    count_parameters,
    detach,
    disabled,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from tests.lora.models import VOCABULARY, mixture, perturb, tiny, with_peft

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about unknown model types


class _Attention(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.attn = nn.MultiheadAttention(12, 3, batch_first=batch_first)
        self.out = nn.Linear(12, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.out(torch.tanh(x + self.attn(x, x, x, need_weights=False)[0]))


class _Encoder(nn.Sequential):
    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        super().__init__(nn.Embedding(VOCABULARY, 8), encoder, nn.Linear(8, 3))

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids)


class _Stack(nn.Module):
    """A module with parameters of two and three dimensions and a child layer."""

    def __init__(self, is_transposed: bool = False, experts: int = 3) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        wide = (6, 10) if is_transposed else (10, 6)
        self.first = nn.Parameter(torch.randn(experts, *wide) * 0.3)
        self.second = nn.Parameter(torch.randn(7, 10) * 0.3)
        self.third = nn.Parameter(torch.randn(experts, 4, 10) * 0.3)
        self.some_bias = nn.Parameter(torch.zeros(7))
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first if self.is_transposed else self.first.transpose(1, 2)
        h = torch.tanh(torch.einsum("bi,eio->eo", self.inner(x), first) + 0.1)
        pooled = torch.tanh(self.third @ h.sum(0)).sum()
        return (h @ self.second.t() + self.some_bias).sum(0, keepdim=True) + pooled


class _Mixed(nn.Module):
    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.stack = _Stack(is_transposed)
        self.wide = Conv1D(5, 7)
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.nobias = nn.Linear(5, 3, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.wide(torch.tanh(self.stack(self.embed(input_ids).mean(1))))
        return self.nobias(torch.tanh(self.conv(x[:, None])))


class _Case(NamedTuple):
    """A model factory, our settings, and PEFT's settings if they have other names."""

    make: Callable[[], nn.Module]
    ours: dict[str, object]
    theirs: dict[str, object] = {}  # noqa: RUF012

    @property
    def config(self) -> LoRAConfig:
        return LoRAConfig(rank=4, alpha=6.0, **self.ours)


def _mixtral() -> nn.Module:
    return mixture("mixtral")


_UP = "experts.gate_up_proj"
_DOWN = "experts.down_proj"
_RANKS = {"rank_pattern": {r"layers\.1\..*down_proj": 2, "q_proj": 6}, "alpha_pattern": {_DOWN: 5.0}}
_THREE_PARAMETERS = {"target_parameters": ["first", "stack.second", "stack.third"], "bias": "all"}
_THREE_PARAMETERS |= {"train_modules": ["conv"]}
_QWEN = {"target_parameters": [_UP, _DOWN, "mlp.gate.weight"], "rslora": True}
_GAUSSIAN = {"init_lora_weights": "gaussian"}
_BIAS = {"lora_bias": True}
_CASES = {
    "mixtral with modules": _Case(
        _mixtral, {"target_modules": ["q_proj", "v_proj"], "target_parameters": [_DOWN], **_RANKS}
    ),
    "qwen3 moe": _Case(lambda: mixture("qwen3_moe"), {"target_modules": ["k_proj"], **_QWEN}, {"use_rslora": True}),
    "gpt oss": _Case(
        lambda: mixture("gpt_oss"), {"target_modules": ["o_proj"], "target_parameters": [f"mlp.{_UP}", f"mlp.{_DOWN}"]}
    ),
    "a linear layer's weight": _Case(
        lambda: tiny("llama"), {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]}
    ),
    "three parameters": _Case(
        _Mixed, {"target_modules": ["inner", "nobias"], **_THREE_PARAMETERS}, {"modules_to_save": ["conv"]}
    ),
    "experts in-out": _Case(
        lambda: _Mixed(True), {"target_modules": ["nobias"], "target_parameters": ["first", "second"]}
    ),
    "tokens tied": _Case(lambda: tiny("gemma3"), {"target_modules": ["q_proj"], "trainable_token_indices": [7, 4, 11]}),
    "tokens by name": _Case(
        lambda: tiny("gpt2"), {"target_modules": ["c_fc"], "trainable_token_indices": {"wte": [3, 8], "wpe": [2]}}
    ),
    "tokens and experts": _Case(
        lambda: mixture("mixtral", tie_word_embeddings=True),
        {"target_modules": [], "target_parameters": [_UP], "trainable_token_indices": [6, 12]},
    ),
    "bias on B of all kinds": _Case(_Mixed, {"target_modules": ["inner", "wide", "conv", "nobias"], **_BIAS}),
    "bias on B of Conv1D": _Case(lambda: tiny("gpt2"), {"target_modules": ["c_attn"], **_BIAS, "bias": "lora_only"}),
    "attention": _Case(_Attention, {"target_modules": ["attn", "out"]}),
    "attention of an encoder": _Case(_Encoder, {"target_modules": ["self_attn", "linear1"]}),
    "attention sequence first": _Case(lambda: _Attention(False), {"target_modules": ["attn"], "bias": "lora_only"}),
}
_EACH = pytest.mark.parametrize("case", _CASES.values(), ids=_CASES.keys())
_RENAMED = ("rslora", "init", "train_modules")


def _output(model: nn.Module, base: nn.Module, seed: int = 100) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if type(base).__name__.startswith("ViT"):
        return model(pixel_values=torch.randn(2, 3, 16, 16, generator=generator)).logits
    output = model(input_ids=torch.randint(3, 13, (2, 9), generator=generator))
    return output if isinstance(output, Tensor) else output.logits


def _pair(case: _Case) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return the base model, and our adapter and PEFT's on copies of it, initialized with one seed."""
    torch.manual_seed(0)
    base = case.make().eval()
    attach(ours := copy.deepcopy(base), case.config, seed=3)
    shared = {key: value for key, value in case.ours.items() if key not in _RENAMED}
    torch.manual_seed(3)
    theirs = with_peft(base, r=4, lora_alpha=6, **shared, **case.theirs)
    return base, ours, _no_fast_path(theirs, base)


def _no_fast_path(theirs: nn.Module, base: nn.Module) -> nn.Module:
    """Put an encoder in train mode, because torch's fast path ignores PEFT's adapter. The model has no dropout."""
    return theirs.train(isinstance(base, _Encoder))


def _fix_peft_output_projection(theirs: nn.Module) -> None:
    """Make PEFT apply the update of an attention's output projection only once (PEFT pull request 3774)."""
    for module in theirs.modules():
        if type(module).__name__ == "MultiheadAttention" and hasattr(module, "lora_A"):
            inner = module.get_base_layer().out_proj
            inner.merge = inner.unmerge = lambda *arguments, **named: None


def _file(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def _check_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert (ours - theirs).norm() <= tolerance * theirs.norm(), float((ours - theirs).norm() / theirs.norm())


def _check_same(ours: Tensor, theirs: Tensor, base: nn.Module) -> None:
    """Check for bit-identical tensors, or close ones if torch fuses an attention that has no adapter."""
    if any(isinstance(module, nn.MultiheadAttention) for module in base.modules()):
        _check_close(ours, theirs, 1e-6)
    else:
        assert torch.equal(ours, theirs)


@_EACH
def test_ten_steps_and_saved_tensors_match_peft(case, tmp_path):
    base, ours, theirs = _pair(case)
    _fix_peft_output_projection(theirs)
    save_adapter(ours, tmp_path / "initial")
    count = count_parameters(ours)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    numbers = [sum(p.numel() for p in name) for name in (trained, base.parameters())]
    assert [count.trained, count.total] == numbers
    for model, parameters in ((ours, [p for _, p in adapter_parameters(ours)]), (theirs, trained)):
        assert sum(p.numel() for p in parameters) == count.trained
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)
        for step in range(10):
            optimizer.zero_grad()
            _output(model, base, step).pow(2).mean().backward()
            optimizer.step()
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    before, our_tensors, their_tensors = (_file(tmp_path / name) for name in ("initial", "ours", "theirs"))
    # With bias 'all' PEFT also saves untrained biases, and saves biases of extra modules twice.
    untrained = ("original_module", "modules_to_save", "some_bias", "in_proj_bias")
    their_tensors = {k: v for k, v in their_tensors.items() if not any(part in k for part in untrained)}
    assert our_tensors.keys() == their_tensors.keys()
    for key, tensor in their_tensors.items():
        moved = (our_tensors[key] - before[key]).norm()
        assert our_tensors[key].shape == tensor.shape and moved > 1e-3 * before[key].norm() and moved > 0, key
        halved = "out_proj.lora_B" in key and isinstance(base, _Attention | _Encoder)  # in our files
        _check_close(our_tensors[key] * 2 if halved else our_tensors[key], tensor)
    _check_close(_output(ours, base), _output(theirs, base))


@_EACH
@torch.no_grad()
def test_files_round_trip_through_peft(case, tmp_path):
    base, ours, theirs = _pair(case)
    expected = _output(perturb(ours, 0.1), base)
    plain = _output(base, base)
    assert (expected - plain).norm() > 1e-3 * plain.norm()
    save_adapter(ours, tmp_path / "ours")
    in_peft = _no_fast_path(PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")), base)
    in_peft.save_pretrained(str(tmp_path / "again"))
    perturb(theirs, 0.1).save_pretrained(str(tmp_path / "theirs"))
    _check_close(_output(in_peft, base), expected)
    for folder, output in (("ours", expected), ("again", expected), ("theirs", _output(theirs, base))):
        load_adapter(loaded := copy.deepcopy(base), tmp_path / folder)
        _check_close(_output(loaded, base), output)


@_EACH
@torch.no_grad()
def test_disable_merge_and_detach_restore_outputs(case):
    torch.manual_seed(0)
    base = case.make().eval()
    ours = copy.deepcopy(base)
    module_ids = {name: id(module) for name, module in ours.named_modules()}
    bits = base.state_dict()
    attach(ours, case.config, seed=3)
    plain = _output(base, base)
    expected = _output(perturb(ours, 0.1), base)
    assert (expected - plain).norm() > 1e-3 * plain.norm()
    with disabled(ours):
        _check_same(_output(ours, base), plain, base)
    assert torch.equal(_output(ours, base), expected)
    if "nobias" not in case.ours["target_modules"] or not case.ours.get("lora_bias"):
        trained = [p.clone() for _, p in adapter_parameters(ours)]
        merge(ours)
        _check_close(_output(ours, base), expected)
        with disabled(ours):
            _check_same(_output(ours, base), plain, base)
        unmerge(ours)
        assert torch.equal(_output(ours, base), expected)
        assert all(torch.equal(a, b) for a, (_, b) in zip(trained, adapter_parameters(ours), strict=True))
    copied = copy.deepcopy(ours)
    detach(ours)
    assert {name: id(module) for name, module in ours.named_modules()} == module_ids
    assert all(torch.equal(value, bits[key]) for key, value in ours.state_dict().items())
    assert torch.equal(_output(ours, base), plain)
    assert torch.equal(_output(copied, base), expected)
