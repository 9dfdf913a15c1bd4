"""Fused norms, MLPs and experts inside blocks that are not recognized.

A block with a recurrent layer, experts or an unusual attention runs the model's code. Its norms, dense MLPs and routed
experts are replaced one by one. The formula of an MLP is verified against the module's own code in fp32, on a copy with
small random layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeAlias

from torch import Tensor, nn

from deltaw.kernels.rows import HalfNorms
from deltaw.kernels.torch_modules import are_hooked, direct_modules
from deltaw.lora.layers import LoRALayer
from deltaw.runtime.block_roles import has_dropout, norm_form
from deltaw.runtime.experts import FusedExperts, experts_form
from deltaw.runtime.fused import FusedNorm, is_on_supported_device
from deltaw.runtime.halves import MLPHalf, run_mlp
from deltaw.runtime.mlp_forms import MLPForm, mlp_form
from deltaw.runtime.projections import Projection, can_project


class FusedMLP:
    """Replaces the forward of an MLP module. If more than low-rank factors is trained in it, the model's code runs."""

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
        unadapted = [module for module in self.module.modules() if not isinstance(module, LoRALayer)]
        if any(module.training and has_dropout(vars(module)) for module in unadapted):
            return None
        if not all(can_project(layer) and _trains_only_factors(layer) for layer in present):
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


FusedPart: TypeAlias = FusedNorm | FusedMLP | FusedExperts


def fused_parts(block: nn.Module, fused: Collection[nn.Module] = ()) -> Iterator[FusedPart]:
    """Yield the parts inside ``block`` that can run fused, except those inside ``fused`` modules."""
    covered = {id(inner) for module in fused for inner in module.modules()}
    for module in block.modules():
        if module is block or id(module) in covered or isinstance(module, nn.Linear):
            continue
        form = mlp_form(module)
        experts = experts_form(module)
        if form is not None:
            yield FusedMLP(module, form)
        elif experts is not None:
            yield FusedExperts(module, experts)
        elif norm_form(module) is not None:
            yield FusedNorm(module)


def _trains_only_factors(layer: nn.Module) -> bool:
    """True if no parameters other than low-rank factors are trained."""
    factors = {id(layer.lora_A), id(layer.lora_B)} if isinstance(layer, LoRALayer) else set()
    return all(id(p) in factors for p in layer.parameters() if p.requires_grad)
