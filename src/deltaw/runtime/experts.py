"""Fused routed experts: modules of transformers with the weights of all experts in stacked parameters.

A :class:`FusedExperts` replaces the forward of such a module by products grouped by expert
(:mod:`deltaw.kernels.experts`) while only low-rank updates of its weights are trained. The updates run inside the
products, so W + ΔW is not stored. The formula of a module is verified against its own code in fp32, on a copy with
small random weights.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.hub.transformers_private import has_split_experts
from deltaw.kernels.experts import ExpertActivation, ExpertProducts, run_experts, run_experts_backward
from deltaw.kernels.rows import ACTIVATIONS
from deltaw.kernels.torch_modules import direct_modules, direct_parameters, with_tensors
from deltaw.kernels.torch_private import without_dispatch
from deltaw.lora.layers_parts import LoRAParameter
from deltaw.runtime.fused import is_on_supported_device
from deltaw.runtime.signatures import Signature, signature

# Names of the parameters of the first and of the second product.
FIRST_NAMES = ("gate_up_proj", "up_proj")
SECOND_NAME = "down_proj"
# Names of the attributes with the limit of gate and up.
_LIMIT_NAMES = ("limit", "swiglu_limit")
# Sizes of the weights on which the formula is verified.
SAMPLE_EXPERTS = 4
SAMPLE_SIZE = 6
SAMPLE_INNER = 10
TOLERANCE = 1e-4


class _Experts(torch.autograd.Function):
    """Experts with frozen weights. ``factors`` repeats A and B of the products as arguments that autograd can track."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        index: Tensor,
        first: ExpertProducts,
        second: ExpertProducts,
        form: ExpertActivation,
        *factors: Tensor,
    ) -> Tensor:
        y, *saved = run_experts(x, index, weights, first, second, form)
        ctx.arguments = first, second, form
        ctx.save_for_backward(x, index, weights, *saved)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, index, weights, *saved = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0]
        arguments = x, index, weights, tuple(saved), *ctx.arguments, need_x
        d_x, d_weights, *factor_grads = run_experts_backward(grads[0].contiguous(), *arguments)
        first, second, _ = ctx.arguments
        factors = (first.lora_A, first.lora_B, second.lora_A, second.lora_B)
        pairs = zip(factors, factor_grads, strict=True)
        adapted = [grad.to(factor.dtype) for factor, grad in pairs if factor is not None]
        return d_x if need_x else None, d_weights, None, None, None, None, *adapted


class FusedExperts:
    """Replaces the forward of a module with routed experts.

    Attributes:
        applies_updates: True because the forward computes the updates. :class:`~deltaw.lora.layers_parts.LoRAParameter`
            then leaves the weights unchanged.
    """

    applies_updates = True

    def __init__(self, module: nn.Module, form: ExpertActivation) -> None:
        self.module = module
        self.form = form
        self.original_forward = module.forward
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        updates = [child for child in direct_modules(self.module).values() if isinstance(child, LoRAParameter)]
        if list(arguments) != self._names or not self._can_run(updates, *arguments.values()):
            for update in updates:
                update.apply_to_weight()
            return self.original_forward(*args, **kwargs)
        x, index, weights = arguments.values()
        by_name = {update.attribute: update for update in updates if update.adapting}
        first_name, second_name = weight_names(self.module)
        products = [self._products(name, by_name.get(name)) for name in (first_name, second_name)]
        factors = [t for product in products for t in (product.lora_A, product.lora_B) if t is not None]
        return _Experts.apply(x, weights, index, *products, self.form, *factors)

    def _can_run(self, updates: list[LoRAParameter], x: object, index: object, weights: object) -> bool:
        """True if the tensors of a call are supported and nothing but updates of the two weights is trained."""
        if not isinstance(x, Tensor) or not isinstance(index, Tensor) or not isinstance(weights, Tensor):
            return False
        if x.device.type != "cpu" or x.dim() != 2 or index.shape != weights.shape or not is_on_supported_device(x):
            return False
        parameters = [p for p in direct_parameters(self.module).values() if p is not None]
        if any(p.requires_grad or p.dtype != x.dtype for p in parameters):
            return False
        if has_split_experts(self.module):
            return False
        names = weight_names(self.module)
        if any(update.attribute not in names for update in updates):
            return False
        return index.dim() == 2 and index.dtype == torch.int64

    def _products(self, name: str, update: LoRAParameter | None) -> ExpertProducts:
        parameters = direct_parameters(self.module)
        weight = parameters[name]
        assert weight is not None
        factors = (None, None, 1.0) if update is None else (update.lora_A, update.lora_B, update.scaling)
        return ExpertProducts(weight, not self.module.is_transposed, parameters.get(f"{name}_bias"), *factors)


_FORMS: dict[tuple[Signature, float], ExpertActivation | None] = {}


def experts_form(module: nn.Module) -> ExpertActivation | None:
    """Return the formula of a module with routed experts, verified once per kind, or None for other modules."""
    if not isinstance(getattr(module, "is_transposed", None), bool) or not weight_names(module):
        return None
    key = (signature(module), _limit(module))
    if key not in _FORMS:
        with without_dispatch(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _FORMS[key] = _verified_form(module)
    return _FORMS[key]


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the stacked weights of the first and second product, or an empty tuple."""
    parameters = direct_parameters(module)
    stacked = {name for name, parameter in parameters.items() if parameter is not None and parameter.dim() == 3}
    first = next((name for name in FIRST_NAMES if name in stacked), None)
    return (first, SECOND_NAME) if first is not None and stacked == {first, SECOND_NAME} else ()


def _limit(module: nn.Module) -> float:
    values = (getattr(module, name, None) for name in _LIMIT_NAMES)
    return next((float(value) for value in values if isinstance(value, int | float)), math.inf)


def _verified_form(module: nn.Module) -> ExpertActivation | None:
    """Return the formula whose outputs and gradients equal those of the module's code."""
    gated = bool(getattr(module, "has_gate", True))
    sample, products = _small_module(module, gated)
    # Small and large values, below and above a limit.
    tokens = torch.cat([torch.randn(8, SAMPLE_SIZE) / 2, torch.randn(8, SAMPLE_SIZE) * 4])
    index = torch.rand(len(tokens), SAMPLE_EXPERTS).argsort(1)[:, :2]
    inputs = tokens, torch.rand(index.shape)
    forward = inspect.unwrap(type(module).forward)
    try:
        expected = _with_gradients(lambda x, weights: forward(sample, x, index, weights), *inputs)
    except Exception:  # code that needs other arguments or sizes has another form
        return None
    for form in _candidates(module, gated):

        def run(x: Tensor, weights: Tensor, form: ExpertActivation = form) -> Tensor:
            return _Experts.apply(x, weights, index, *products, form)

        results = _with_gradients(run, *inputs)
        if all(torch.allclose(*pair, TOLERANCE, TOLERANCE) for pair in zip(results, expected, strict=True)):
            return form
    return None


def _small_module(module: nn.Module, gated: bool) -> tuple[nn.Module, list[ExpertProducts]]:
    """Return a copy of the module with small random weights, and its products."""
    by_column = not module.is_transposed
    widths = ((SAMPLE_SIZE, SAMPLE_INNER * (2 if gated else 1)), (SAMPLE_INNER, SAMPLE_SIZE))
    products = []
    tensors: dict[str, Tensor] = {}
    for name, width in zip(weight_names(module), widths, strict=True):
        weight = torch.randn(SAMPLE_EXPERTS, *(reversed(width) if by_column else width))
        has_bias = direct_parameters(module).get(f"{name}_bias") is not None
        bias = torch.randn(SAMPLE_EXPERTS, width[1]) if has_bias else None
        products.append(ExpertProducts(weight, by_column, bias))
        tensors |= {name: weight} if bias is None else {name: weight, f"{name}_bias": bias}
    sample = with_tensors(module, {name: nn.Parameter(t, requires_grad=False) for name, t in tensors.items()})
    sizes = {"num_experts": SAMPLE_EXPERTS, "hidden_dim": SAMPLE_SIZE, "hidden_size": SAMPLE_SIZE}
    sizes |= {"intermediate_dim": SAMPLE_INNER, "intermediate_size": SAMPLE_INNER}
    vars(sample).update({name: value for name, value in sizes.items() if name in vars(sample)})
    return sample, products


def _candidates(module: nn.Module, gated: bool) -> Iterator[ExpertActivation]:
    slope = getattr(module, "alpha", None)
    limits = {math.inf, _limit(module)}
    slopes = {1.0, float(slope)} if isinstance(slope, int | float) and slope else {1.0}
    interleaved = not getattr(module, "is_concatenated", True)
    for values in itertools.product(ACTIVATIONS, sorted(limits), sorted(slopes), (0.0, 1.0)):
        yield ExpertActivation(values[0], gated, interleaved, *values[1:])


def _with_gradients(function: Callable[[Tensor, Tensor], Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return an output and the gradients of both inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))
