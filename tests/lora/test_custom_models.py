"""Adapters that PEFT saves for models of several families and for custom models produce equal outputs here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.lora import count_parameters, load_adapter
from tests.lora.models import inputs, perturb, tiny, with_peft

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about unknown model types


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
    """Numbered layers in a list. The first is used twice."""

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
        self.conv = getattr(nn, f"Conv{dimensions}d")(4, 8, 3, **settings)
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


_ROWS = (5, 10)
_TOKENS = None
_SEQUENCES = (3, 2, 10)
_PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}
_PISSA = {"use_dora": True, "init_lora_weights": "pissa"}
_TIED_TOKENS = {"trainable_token_indices": {"emb": [0, 19], "head": [4]}}
# Model family or factory, input shape (None: token ids), target modules, other PEFT settings.
_TABLE: dict[str, tuple[str | Callable[[], nn.Module], tuple[int, ...] | None, list[str] | str, dict]] = {
    "all linear": ("llama", None, "all-linear", {}),
    "patterns": ("llama", None, ["q_proj", "up_proj"], _PATTERNS),
    "expression": ("qwen3", None, r".*\.(q|v)_proj", {"use_rslora": True}),
    "layers": ("llama", None, ["q_proj"], {"layers_to_transform": [1]}),
    "excluded": ("llama", None, "all-linear", {"exclude_modules": ["up_proj"]}),
    "more than there is": ("llama", None, ["q_proj", "no_such"], {}),
    "fan in, fan out": ("gpt2", None, ["c_attn", "c_fc"], {"fan_in_fan_out": True}),
    "scaled table": ("gemma3", None, ["embed_tokens"], {}),
    "pissa": ("llama", None, ["q_proj"], {"init_lora_weights": "pissa"}),
    "olora": ("llama", None, ["q_proj", "down_proj"], {"init_lora_weights": "olora"}),
    "dora of fan in, fan out": ("gpt2", None, ["c_attn", "wte"], {"use_dora": True, "fan_in_fan_out": True}),
    "dora pissa": ("llama", None, ["q_proj"], _PISSA),
    "classifier": ("bert", None, ["value", "dense"], {"task_type": "SEQ_CLS"}),
    "t5": ("t5", None, ["q", "wo"], {"task_type": "SEQ_2_SEQ_LM"}),
    "shared layer": (_Deep, _ROWS, "all-linear", {}),
    "pattern of a list": (_Deep, _ROWS, ["0", "1"], {"rank_pattern": {r"layers\.1": 6}}),
    "bias all, saved": (_MLP, _ROWS, ["lin0"], {"bias": "all", "modules_to_save": ["lin1"]}),
    "bias lora_only": (_MLP, _ROWS, ["lin0"], {"bias": "lora_only"}),
    "lora_bias": (_MLP, _ROWS, ["lin0", "lin1"], {"lora_bias": True}),
    "lora_bias, no bias": (lambda: _MLP(False), _ROWS, ["lin0"], {"lora_bias": True}),
    "dropout": (_MLP, _ROWS, ["lin0"], {"lora_dropout": 0.3}),
    "embedding, Conv1D": (_Embedding, _TOKENS, ["emb", "conv1d"], {}),
    "Conv1D, lora_bias": (_Embedding, _TOKENS, ["conv1d"], {"lora_bias": True}),
    "tied, adapted": (lambda: _Embedding(True), _TOKENS, ["emb", "head"], {}),
    "tokens": (_Embedding, _TOKENS, ["conv1d"], {"trainable_token_indices": {"emb": [3, 1]}}),
    "tokens, tied": (lambda: _Embedding(True), _TOKENS, ["conv1d"], {"trainable_token_indices": {"emb": [0, 19]}}),
    "tokens of both": (lambda: _Embedding(True), _TOKENS, ["conv1d"], _TIED_TOKENS),
    "Conv1d, strided": (lambda: _Conv(1, stride=2, padding=1), (2, 4, 9), ["conv"], {}),
    "Conv2d, grouped": (lambda: _Conv(2, groups=2), (2, 4, 9, 5), ["conv"], {}),
    "Conv2d, dora": (lambda: _Conv(2), (2, 4, 9, 5), ["conv"], {"use_dora": True}),
    "Conv2d, lora_bias": (lambda: _Conv(2), (2, 4, 9, 5), ["conv"], {"lora_bias": True}),
    "Conv3d, no bias": (lambda: _Conv(3, bias=False), (2, 4, 5, 5, 5), ["conv"], {}),
    "attention, biases": (_Attention, _SEQUENCES, ["mha"], {"bias": "all"}),
    "attention, no bias": (lambda: _Attention(bias=False), _SEQUENCES, ["mha"], {}),
    "attention, saved": (_Attention, _SEQUENCES, ["mha"], {"modules_to_save": ["lin1"]}),
    "experts": (lambda: nn.Sequential(_Experts()), _ROWS, [], {"target_parameters": ["weight", "0.flat"]}),
    "a linear weight": (_MLP, _ROWS, ["lin0"], {"target_parameters": ["lin1.weight"]}),
    "a convolution's weight": (lambda: _Conv(1), (2, 4, 9), ["lin"], {"target_parameters": ["conv.weight"]}),
}


@pytest.mark.parametrize(("source", "shape", "targets", "settings"), _TABLE.values(), ids=_TABLE.keys())
@torch.no_grad()
def test_loaded_peft_adapter_produces_equal_outputs(source, shape, targets, settings, tmp_path):
    def output(model: nn.Module) -> Tensor:
        if isinstance(source, str):
            return model(**inputs(source)).logits
        return model(torch.randn(*shape, generator=torch.manual_seed(1)) if shape else torch.arange(20).view(2, 10))

    torch.manual_seed(0)
    base = tiny(source) if isinstance(source, str) else source().eval()
    theirs = with_peft(base, r=4, lora_alpha=6, target_modules=targets, **settings).eval()
    perturb(theirs, 0.05 if isinstance(source, str) else 0.3).save_pretrained(str(tmp_path))
    plain = output(base)
    expected = output(theirs)
    assert (expected - plain).norm() > 1e-3 * plain.norm()
    load_adapter(base, tmp_path, trainable=True)
    assert (output(base) - expected).norm() <= 1e-5 * expected.norm()
    assert count_parameters(base).trained > 0
