"""Formulas of MLP modules, verified against the module's own code."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaw.kernels.rows import ACTIVATIONS, activation_reference
from deltaw.kernels.torch_modules import direct_modules, with_modules
from deltaw.kernels.torch_private import without_dispatch
from deltaw.runtime.block_roles import sizes, stores_in_out
from deltaw.runtime.signatures import Signature, signature

GATED_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate", "up", "down"))
# Sizes of the layers on which the form of an MLP is verified.
SAMPLE_SIZE = 6
SAMPLE_INNER = 10
TOLERANCE = 1e-4


@dataclass(frozen=True)
class MLPForm:
    """Formula of an MLP module: output(f(gate)·up), or output(f(inner)).

    Attributes:
        inputs: Names of gate and up, of one layer that computes both, or of the inner layer.
        output: Name of the output layer.
        gated: True for f(gate)·up.
        kind: Activation function, a name of :data:`deltaw.kernels.rows.ACTIVATIONS`.
    """

    inputs: tuple[str, ...]
    output: str
    gated: bool
    kind: str


_FORMS: dict[Signature, MLPForm | None] = {}


def mlp_form(module: nn.Module) -> MLPForm | None:
    """Return the formula of an MLP module, or None if it has a different one. The result is cached by signature."""
    layers = {name: child for name, child in direct_modules(module).items() if child is not None and _is_linear(child)}
    others = [child for name, child in direct_modules(module).items() if name not in layers and child is not None]
    if len(layers) not in (2, 3) or any(True for child in others for _ in child.parameters()):
        return None
    key = signature(module)
    if key not in _FORMS:
        with torch.no_grad(), without_dispatch(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _FORMS[key] = _verified_form(module, layers)
    return _FORMS[key]


def _verified_form(module: nn.Module, layers: dict[str, nn.Module]) -> MLPForm | None:
    names = _roles(layers)
    if names is None:
        return None
    inputs, output, gated = names
    width = 2 * SAMPLE_INNER if gated and len(inputs) == 1 else SAMPLE_INNER
    small = {name: nn.Linear(SAMPLE_SIZE, width) for name in inputs} | {output: nn.Linear(SAMPLE_INNER, SAMPLE_SIZE)}
    sample = with_modules(module, small)
    x = torch.randn(2, 3, SAMPLE_SIZE) * 2
    try:
        expected = type(module).forward(sample, x)
    except Exception:  # code that needs other arguments or sizes is not an MLP of this form
        return None
    inner = [small[name](x) for name in inputs]
    gate, up = inner[0].chunk(2, -1) if len(inner) == 1 and gated else (inner[0], inner[-1])
    if not isinstance(expected, Tensor):
        return None
    errors = {}
    for kind in ACTIVATIONS:
        computed = small[output](activation_reference(gate, up if gated else None, kind))
        errors[kind] = float((computed - expected).abs().max()) if computed.shape == expected.shape else math.inf
    kind = min(errors, key=errors.__getitem__)
    return MLPForm(inputs, output, gated, kind) if errors[kind] < TOLERANCE else None


def _roles(layers: dict[str, nn.Module]) -> tuple[tuple[str, ...], str, bool] | None:
    """Guess the names of the inputs, the name of the output, and True if the MLP is gated, from names and sizes."""
    if len(layers) == 3:
        names = next((names for names in GATED_NAMES if set(names) == set(layers)), None)
        return None if names is None else (names[:2], names[2], True)
    first, second = layers
    inner = sizes(layers[first])[1]
    outer = sizes(layers[second])[0]
    return ((first,), second, inner != outer) if inner in (outer, 2 * outer) else None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or stores_in_out(module)
