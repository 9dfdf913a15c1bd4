"""A table of custom models: an adapter that PEFT saves gives equal outputs, or is refused by name."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.errors import UserError
from deltaw.lora import load_adapter


class _MLP(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(20)
        self.lin1 = nn.Linear(20, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.norm(self.drop(torch.relu(self.lin0(x)))))


class _Deep(nn.Module):
    """Layers in a list with numbers, of which the first is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(10, 10) for _ in range(3)])
        self.lin0 = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.layers[0]):
            x = torch.tanh(layer(x))
        return self.lin0(x)


class _Embedding(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 6)
        self.conv1d = Conv1D(6, 6)
        self.head = nn.Linear(6, 20, bias=not tied)
        if tied:
            self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv1d(self.emb(x))))


class _Conv(nn.Module):
    def __init__(self, dimensions: int, **settings: object) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        self.conv = kind(4, 8, 3, **settings)
        self.lin = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.conv(x).flatten(2).mean(2))


class _Attention(nn.Module):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 12)
        self.mha = nn.MultiheadAttention(12, 2, **settings)
        self.lin1 = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.lin0(x))
        return self.lin1(self.mha(x, x, x)[0])


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 10) * 0.3)
        self.flat = nn.Parameter(torch.randn(4, 5) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("bi,eoi->bo", x, self.weight)) @ self.flat.t()


class _Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = _Experts()
        self.lin1 = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.experts(x))


def _numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def _tokens() -> Tensor:
    return torch.arange(20).view(2, 10)


_ROWS = _numbers(5, 10)
_TABLE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, object]]] = {
    "one layer": (_MLP, _ROWS, {"target_modules": ["lin0"]}),
    "two layers": (_MLP, _ROWS, {"target_modules": ["lin0", "lin1"]}),
    "expression": (_MLP, _ROWS, {"target_modules": r"lin\d"}),
    "all linear": (_Deep, _ROWS, {"target_modules": "all-linear"}),
    "shared layer": (_Deep, _ROWS, {"target_modules": ["layers.0"]}),
    "some layers": (_Deep, _ROWS, {"target_modules": r"layers\.[02]"}),
    "norm saved": (_MLP, _ROWS, {"target_modules": ["lin0"], "modules_to_save": ["norm"]}),
    "linear saved": (_MLP, _ROWS, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "no biases": (lambda: _MLP(False), _ROWS, {"target_modules": ["lin0", "lin1"]}),
    "bias all": (_MLP, _ROWS, {"target_modules": ["lin0"], "bias": "all"}),
    "bias lora_only": (_MLP, _ROWS, {"target_modules": ["lin0"], "bias": "lora_only"}),
    "bias all, saved": (_MLP, _ROWS, {"target_modules": ["lin0"], "bias": "all", "modules_to_save": ["lin1"]}),
    "rank pattern": (_MLP, _ROWS, {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin0": 2}}),
    "alpha pattern": (_MLP, _ROWS, {"target_modules": ["lin0", "lin1"], "alpha_pattern": {"lin1": 5}}),
    "pattern of a list": (_Deep, _ROWS, {"target_modules": ["0", "1"], "rank_pattern": {r"layers\.1": 6}}),
    "excluded": (_MLP, _ROWS, {"target_modules": r"lin\d", "exclude_modules": ["lin1"]}),
    "rslora": (_MLP, _ROWS, {"target_modules": ["lin0"], "use_rslora": True}),
    "dora": (_MLP, _ROWS, {"target_modules": ["lin0", "lin1"], "use_dora": True}),
    "lora_bias": (_MLP, _ROWS, {"target_modules": ["lin0", "lin1"], "lora_bias": True}),
    "lora_bias, no bias": (lambda: _MLP(False), _ROWS, {"target_modules": ["lin0"], "lora_bias": True}),
    "dropout": (_MLP, _ROWS, {"target_modules": ["lin0"], "lora_dropout": 0.3}),
    "embedding": (_Embedding, _tokens, {"target_modules": ["emb"]}),
    "embedding, Conv1D": (_Embedding, _tokens, {"target_modules": ["emb", "conv1d"]}),
    "Conv1D": (_Embedding, _tokens, {"target_modules": ["conv1d"], "fan_in_fan_out": True}),
    "Conv1D, lora_bias": (_Embedding, _tokens, {"target_modules": ["conv1d"], "lora_bias": True}),
    "Conv1D, dora": (_Embedding, _tokens, {"target_modules": ["conv1d"], "use_dora": True}),
    "embedding, dora": (_Embedding, _tokens, {"target_modules": ["emb"], "use_dora": True}),
    "embedding saved": (_Embedding, _tokens, {"target_modules": ["head"], "modules_to_save": ["emb"]}),
    "tied": (lambda: _Embedding(True), _tokens, {"target_modules": ["conv1d"]}),
    "tied, adapted": (lambda: _Embedding(True), _tokens, {"target_modules": ["emb", "head"]}),
    "tokens": (_Embedding, _tokens, {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [3, 1]}}),
    "tokens, tied outside the configuration": (
        lambda: _Embedding(True),
        _tokens,
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 19]}},
    ),
    "tokens of both": (
        lambda: _Embedding(True),
        _tokens,
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 19], "head": [4]}},
    ),
    "Conv1d": (lambda: _Conv(1), _numbers(2, 4, 9), {"target_modules": ["conv"]}),
    "Conv1d, strided": (lambda: _Conv(1, stride=2, padding=1), _numbers(2, 4, 9), {"target_modules": ["conv"]}),
    "Conv2d": (lambda: _Conv(2), _numbers(2, 4, 9, 5), {"target_modules": ["conv", "lin"]}),
    "Conv2d, grouped": (lambda: _Conv(2, groups=2), _numbers(2, 4, 9, 5), {"target_modules": ["conv"]}),
    "Conv2d, dora": (lambda: _Conv(2), _numbers(2, 4, 9, 5), {"target_modules": ["conv"], "use_dora": True}),
    "Conv2d, lora_bias": (lambda: _Conv(2), _numbers(2, 4, 9, 5), {"target_modules": ["conv"], "lora_bias": True}),
    "Conv2d, no bias": (lambda: _Conv(2, bias=False), _numbers(2, 4, 9, 5), {"target_modules": ["conv"]}),
    "Conv3d": (lambda: _Conv(3), _numbers(2, 4, 5, 5, 5), {"target_modules": ["conv"]}),
    "attention": (_Attention, _numbers(3, 2, 10), {"target_modules": ["mha"]}),
    "attention, linear": (_Attention, _numbers(3, 2, 10), {"target_modules": ["mha", "lin0"]}),
    "attention, biases": (_Attention, _numbers(3, 2, 10), {"target_modules": ["mha"], "bias": "all"}),
    "attention, no bias": (lambda: _Attention(bias=False), _numbers(3, 2, 10), {"target_modules": ["mha"]}),
    "attention, saved": (_Attention, _numbers(3, 2, 10), {"target_modules": ["mha"], "modules_to_save": ["lin1"]}),
    "experts": (_Outer, _ROWS, {"target_modules": [], "target_parameters": ["experts.weight"]}),
    "experts, two": (_Outer, _ROWS, {"target_modules": [], "target_parameters": ["weight", "experts.flat"]}),
    "experts, linear": (_Outer, _ROWS, {"target_modules": ["lin1"], "target_parameters": ["flat"]}),
    "a linear weight": (_MLP, _ROWS, {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]}),
    "a convolution's weight": (
        lambda: _Conv(1),
        _numbers(2, 4, 9),
        {"target_modules": ["lin"], "target_parameters": ["conv.weight"]},
    ),
    "pissa": (_MLP, _ROWS, {"target_modules": ["lin0"], "init_lora_weights": "pissa"}),
    "olora": (_MLP, _ROWS, {"target_modules": ["lin0"], "init_lora_weights": "olora"}),
}
_REFUSED = {
    "quantized": ({"use_qalora": True, "qalora_group_size": 2}, "use_qalora"),
    "replicated": ({"layer_replication": [[0, 1]]}, "layer_replication"),
}


def _saved(make: Callable[[], nn.Module], settings: dict[str, object], folder: Path) -> tuple:
    """The base model, and PEFT's adapter with values that matter on a copy of it, saved."""
    torch.manual_seed(0)
    base = make().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=6, **settings)).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        theirs.save_pretrained(str(folder))
    return base, theirs


@pytest.mark.parametrize(("make", "inputs", "settings"), _TABLE.values(), ids=_TABLE.keys())
@torch.no_grad()
def test_an_adapter_of_peft_gives_equal_outputs(make, inputs, settings, tmp_path):
    base, theirs = _saved(make, settings, tmp_path)
    x = inputs()
    plain, expected = base(x), theirs(x)
    assert (expected - plain).norm() > 1e-2 * plain.norm()
    load_adapter(base, tmp_path)
    assert (base(x) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("changed", "named"), _REFUSED.values(), ids=_REFUSED.keys())
def test_other_mathematics_is_refused_by_name(changed, named, tmp_path):
    base, _ = _saved(_MLP, {"target_modules": ["lin0"]}, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(UserError, match=named):
        load_adapter(base, tmp_path)
