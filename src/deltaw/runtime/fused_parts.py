"""Fused norms and MLPs inside blocks that are not recognized as a whole.

A block with a recurrent layer, experts or an unusual attention runs the model's code. Its norms and its dense MLPs are
replaced one by one. The form of an MLP is verified against the module's own code in fp32, with small random layers in
place of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaw.kernels.rows import ACTIVATIONS, HalfNorms, activation_reference
from deltaw.kernels.torch_modules import are_hooked, direct_modules, with_modules
from deltaw.kernels.torch_private import without_dispatch
from deltaw.lora.layers import LoRALayer
from deltaw.runtime.block_roles import norm_form, sizes, stores_in_out
from deltaw.runtime.fused import FusedNorm, has_dropout, is_on_supported_device
from deltaw.runtime.halves import MLPHalf, run_mlp
from deltaw.runtime.projections import Projection, can_project
from deltaw.runtime.recognition import GATED_NAMES, Signature, signature

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


class FusedMLP:
    """Replaces the forward of an MLP module while only low-rank factors are trained in it."""

    def __init__(self, module: nn.Module, form: MLPForm) -> None:
        self.module = module
        self.form = form
        self.original_forward = module.forward

    def __call__(self, hidden_states: Tensor) -> Tensor:
        half = self._half(hidden_states)
        if half is None:
            return self.original_forward(hidden_states)
        return run_mlp(hidden_states.flatten(0, -2), None, half).view(*hidden_states.shape[:-1], -1)

    def _half(self, hidden: Tensor) -> MLPHalf | None:
        """Return the MLP of the current layers, or None to run the model's code."""
        children = direct_modules(self.module)
        layers = [children.get(name) for name in (*self.form.inputs, self.form.output)]
        present = [layer for layer in layers if layer is not None]
        if len(present) < len(layers) or not is_on_supported_device(hidden):
            return None
        tables = [vars(module) for module in self.module.modules()]
        if are_hooked(tables[1:]) or any("forward" in table for table in tables[1:]):
            return None
        if any(table["training"] and has_dropout(table) for table in tables):
            return None
        if not all(can_project(layer) and _is_adapted_alone(layer) for layer in present):
            return None
        projections = [Projection(layer) for layer in present]
        return MLPHalf(
            norms=HalfNorms(),
            inputs=projections[:-1],
            output=projections[-1],
            gated=self.form.gated,
            kind=self.form.kind,
            residual=False,
        )


def fused_parts(blocks: nn.ModuleList) -> Iterator[FusedNorm | FusedMLP]:
    """Yield the norms and MLPs inside ``blocks`` that can run fused."""
    for block in blocks:
        for module in block.modules():
            if module is block or isinstance(module, nn.Linear):
                continue
            form = mlp_form(module)
            if form is not None:
                yield FusedMLP(module, form)
            elif norm_form(module) is not None:
                yield FusedNorm(module)


_FORMS: dict[Signature, MLPForm | None] = {}


def mlp_form(module: nn.Module) -> MLPForm | None:
    """Return the formula of an MLP module, or None if it has another one. Verified once per kind of module."""
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
    wide = 2 * SAMPLE_INNER if gated and len(inputs) == 1 else SAMPLE_INNER
    small = {name: nn.Linear(SAMPLE_SIZE, wide) for name in inputs} | {output: nn.Linear(SAMPLE_INNER, SAMPLE_SIZE)}
    sample = with_modules(module, small)
    x = torch.randn(2, 3, SAMPLE_SIZE) * 2
    try:
        expected = type(module).forward(sample, x)
    except Exception:  # code that needs other arguments or sizes is not an MLP of this form
        return None
    inner = [small[name](x) for name in inputs]
    gate, up = inner[0].chunk(2, -1) if len(inner) == 1 and gated else (inner[0], inner[-1])
    for kind in ACTIVATIONS:
        value = activation_reference(gate, up if gated else None, kind)
        if isinstance(expected, Tensor) and torch.allclose(small[output](value), expected, TOLERANCE, TOLERANCE):
            return MLPForm(inputs, output, gated, kind)
    return None


def _roles(layers: dict[str, nn.Module]) -> tuple[tuple[str, ...], str, bool] | None:
    """Return the names of the inputs and of the output, and if the MLP is gated, from names and sizes."""
    if len(layers) == 3:
        names = next((names for names in GATED_NAMES if set(names) == set(layers)), None)
        return None if names is None else (names[:2], names[2], True)
    first, second = layers
    inner = sizes(layers[first])[1]
    outer = sizes(layers[second])[0]
    return ((first,), second, inner != outer) if inner in (outer, 2 * outer) else None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or stores_in_out(module)


def _is_adapted_alone(layer: nn.Module) -> bool:
    """True if no parameters other than low-rank factors are trained."""
    factors = {id(layer.lora_A), id(layer.lora_B)} if isinstance(layer, LoRALayer) else set()
    return all(id(p) in factors for p in layer.parameters() if p.requires_grad)
