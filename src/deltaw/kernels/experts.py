"""Routed experts with frozen weights as products grouped by expert, forward and backward.

Token t chooses k of E experts with router weights w:

    y_t = Σ_e w_te · (W₂_e·a_te + c_e),   a_te = f(gate)·up,   (gate, up) = W₁_e·x_t + b_e

There is one row for each chosen expert of a token. Rows are sorted by expert, so that an expert computes up to
``MAX_ROWS`` rows in one product. The activation is multiplied by the router weight before the second product:
a' = w·a. The results of the rows are added up per token in fp32.

The forward pass saves x and the outputs of the first product. The backward pass recomputes the activation:

    ∂L/∂a' = W₂ᵀ·∂L/∂y,       ∂L/∂w = ∂L/∂a'·a + ∂L/∂y·c,       ∂L/∂a = w·∂L/∂a'

Both products can have low-rank updates per expert. Their gradients are computed as in :mod:`deltaw.kernels.linear`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.linear import LinearProduct, factors_backward, linear, linear_backward
from deltaw.kernels.operators import accumulation_dtype, check_shape, define
from deltaw.kernels.rows import activation, activation_backward, activation_reference

# Maximum number of rows of a product. It limits the temporary memory.
MAX_ROWS = 512


class ExpertProducts(NamedTuple):
    """Weights of one linear layer of all experts.

    Attributes:
        weight: (E, out, in) if ``by_column``, else (E, in, out).
        by_column: True if ``weight`` is stored as (E, out, in).
        bias: (E, out) or None.
        lora_A: (E, in, r) fp32 or None.
        lora_B: (E, r, out) fp32 or None.
        scaling: Factor applied to the low-rank update.
    """

    weight: Tensor
    by_column: bool = True
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of inputs and outputs."""
        _, first, second = self.weight.shape
        return (second, first) if self.by_column else (first, second)

    @property
    def rank(self) -> int:
        """Rank of the low-rank update, or 0 if there is none."""
        return 0 if self.lora_A is None else self.lora_A.shape[-1]

    def product(self, expert: int, with_bias: bool = True) -> LinearProduct:
        """Return the product of one expert."""
        bias = self.bias if with_bias else None
        bias, lora_A, lora_B = (None if t is None else t[expert] for t in (bias, self.lora_A, self.lora_B))
        weight = self.weight[expert]
        return LinearProduct(weight, self.by_column, None, None, bias, lora_A, lora_B, self.scaling)

    def operations(self, rows: int) -> int:
        """Return the operations of a product of ``rows`` rows. A multiply-add counts as two."""
        return 2 * rows * (math.prod(self.sizes) + self.rank * sum(self.sizes))


class ExpertActivation(NamedTuple):
    """Activation of experts: a = f(slope·min(gate, limit)) · (clip(up, ±limit) + offset) / slope, or a = f(gate).

    Attributes:
        kind: f, a name of :data:`deltaw.kernels.rows.ACTIVATIONS`.
        gated: True if the first product computes gate and up, False if it computes only the gate.
        interleaved: True if gates and ups alternate, False if all gates come first.
        limit: Limit of gate and up, infinity for none.
        slope: Factor in f, usually 1. With silu, f(slope·gate) / slope is gate·sigmoid(slope·gate).
        offset: Added to up.
    """

    kind: str = "silu"
    gated: bool = True
    interleaved: bool = False
    limit: float = math.inf
    slope: float = 1.0
    offset: float = 0.0

    @property
    def is_standard(self) -> bool:
        """True if a = f(gate)·up or f(gate)."""
        return not self.gated or (self.limit, self.slope, self.offset) == (math.inf, 1.0, 0.0)

    def __call__(self, inner: Tensor) -> Tensor:
        """Return a (M, I) from the outputs of the first product."""
        return activation(*self.inputs(inner), self.kind).to(inner.dtype)

    def backward(self, grad: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of the first product's outputs from the gradient of a, and the recomputed a."""
        limited, limited_up = self.inputs(inner)
        d_gate, d_up, value = activation_backward(grad.to(limited.dtype), limited, limited_up, self.kind)
        if not self.is_standard:
            gate, up = self._split(inner)
            d_gate.mul_(self.slope).masked_fill_(gate > self.limit, 0.0)
            d_up.div_(self.slope).masked_fill_(up.abs() > self.limit, 0.0)
        if not self.gated:
            return d_gate, value
        merged = torch.stack([d_gate, d_up], -1).flatten(1) if self.interleaved else torch.cat([d_gate, d_up], 1)
        return merged.to(inner.dtype), value.to(inner.dtype)

    def inputs(self, inner: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gate and up with which the standard activation f(gate)·up equals a. Without up, it is f(gate)."""
        if not self.gated:
            return inner, None
        gate, up = self._split(inner)
        if self.is_standard:
            return gate, up
        dtype = accumulation_dtype(inner)
        limited_up = up.to(dtype).clamp(-self.limit, self.limit)
        return gate.to(dtype).clamp(max=self.limit) * self.slope, (limited_up + self.offset) / self.slope

    def _split(self, inner: Tensor) -> tuple[Tensor, Tensor]:
        if self.interleaved:
            return inner[:, ::2], inner[:, 1::2]
        gate, up = inner.chunk(2, 1)
        return gate, up


_FIELDS = len(ExpertProducts._fields)


def split_arguments(args: tuple[Any, ...]) -> tuple[ExpertProducts, ExpertProducts, ExpertActivation]:
    """Return both products and the activation from the arguments of an operator, which end with their fields."""
    count = 2 * _FIELDS + len(ExpertActivation._fields)
    first, second, last = (args[len(args) - count :][start:] for start in (0, _FIELDS, 2 * _FIELDS))
    return ExpertProducts(*first[:_FIELDS]), ExpertProducts(*second[:_FIELDS]), ExpertActivation(*last)


def run_experts(
    x: Tensor, index: Tensor, weights: Tensor, first: ExpertProducts, second: ExpertProducts, form: ExpertActivation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the experts.

    Args:
        x: (T, in).
        index: (T, k) int64 chosen experts of each token, without duplicates.
        weights: (T, k) router weights.
        first: First product, which computes gate and up, or only the gate.
        second: Second product.
        form: Activation between the products.

    Returns:
        y (T, in), the outputs of the first product (T·k, n), and the inputs of both products times A (T·k, r). The last
        three are sorted by expert.

    Raises:
        ValueError: if shapes do not match.
    """
    _check_shapes(x, index, weights, first, second, form)
    return _experts(x, index, weights, *first, *second, *form)


def run_experts_backward(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    first: ExpertProducts,
    second: ExpertProducts,
    form: ExpertActivation,
    need_x: bool = True,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, of the router weights, and of A and B of both products. Those of A and B are in fp32.

    Args:
        grad: (T, in) gradient of y.
        saved: The results of :func:`run_experts` after y.
        need_x: True to compute the gradient of x. Gradients that are not computed are empty tensors.

    Raises:
        ValueError: if shapes do not match.
    """
    _check_shapes(x, index, weights, first, second, form)
    check_shape("the gradient", grad, *x.shape)
    return _experts_backward(grad, x, index, weights, *saved, need_x, *first, *second, *form)


def run_experts_reference(
    x: Tensor, index: Tensor, weights: Tensor, first: ExpertProducts, second: ExpertProducts, form: ExpertActivation
) -> Tensor:
    """Reference implementation of y of :func:`run_experts`. Supports autograd."""

    def multiply(rows: Tensor, products: ExpertProducts, expert: int) -> Tensor:
        y = rows @ (products.weight[expert].t() if products.by_column else products.weight[expert])
        if products.lora_A is not None and products.lora_B is not None:
            y = y + products.scaling * (rows @ products.lora_A[expert] @ products.lora_B[expert])
        return y if products.bias is None else y + products.bias[expert]

    total = torch.zeros_like(x)
    for expert in range(len(first.weight)):
        factor = (weights * (index == expert)).sum(1, keepdim=True)
        gate, up = form.inputs(multiply(x, first, expert))
        total = total + factor * multiply(activation_reference(gate, up, form.kind), second, expert)
    return total


def _check_shapes(
    x: Tensor, index: Tensor, weights: Tensor, first: ExpertProducts, second: ExpertProducts, form: ExpertActivation
) -> None:
    tokens, width = x.shape
    check_shape("the experts of tokens", index, tokens, index.shape[-1])
    check_shape("the router weights", weights, *index.shape)
    for products in (first, second):
        experts = len(products.weight)
        check_shape("the biases", products.bias, experts, products.sizes[1])
        check_shape("the factors", products.lora_A, experts, products.sizes[0], products.rank)
        check_shape("the factors", products.lora_B, experts, products.rank, products.sizes[1])
    inner = first.sizes[1] // (2 if form.gated else 1)
    if (first.sizes[0], *second.sizes, len(second.weight)) != (width, inner, width, len(first.weight)):
        shapes = f"{tuple(first.weight.shape)} and {tuple(second.weight.shape)}"
        raise ValueError(f"the products {shapes} do not match each other or the input {tuple(x.shape)}")


def _groups(index: Tensor, experts: int) -> Iterator[tuple[int, slice, Tensor]]:
    """Yield groups of rows: the expert, positions in the sorted rows, and indices in the flattened ``index``."""
    chosen = index.flatten()
    order = chosen.argsort(stable=True)
    end = 0
    for expert, count in enumerate(torch.bincount(chosen, minlength=experts).tolist()):
        first = end
        end = first + count
        for start in range(first, end, MAX_ROWS):
            rows = slice(start, min(end, start + MAX_ROWS))
            yield expert, rows, order[rows]


def _empty_results(x: Tensor, index: Tensor, first: ExpertProducts, second: ExpertProducts) -> tuple[Tensor, ...]:
    rows = index.numel()
    return tuple(x.new_empty(rows, columns) for columns in (first.sizes[1], first.rank, second.rank))


def _factor_gradients(first: ExpertProducts, second: ExpertProducts) -> list[Tensor]:
    """Return zeros for the gradients of A and B of both products, or empty tensors for products without an update."""
    factors = (first.lora_A, first.lora_B, second.lora_A, second.lora_B)
    empty = first.weight.new_empty(0)
    return [empty if t is None else torch.zeros_like(t, dtype=accumulation_dtype(t)) for t in factors]


def _shapes(x: Tensor, index: Tensor, weights: Tensor, *args: Any) -> tuple[Tensor, ...]:
    first, second, _ = split_arguments(args)
    return x.new_empty(x.shape), *_empty_results(x, index, first, second)


def _shapes_backward(grad: Tensor, x: Tensor, index: Tensor, weights: Tensor, *args: Any) -> tuple[Tensor, ...]:
    first, second, _ = split_arguments(args)
    need_x = args[3]
    return x.new_empty(x.shape if need_x else 0), weights.new_empty(weights.shape), *_factor_gradients(first, second)


def _operations(x: Tensor, index: Tensor, weights: Tensor, *args: Any) -> int:
    first, second, _ = split_arguments(args)
    return first.operations(index.numel()) + second.operations(index.numel())


def _operations_backward(grad: Tensor, x: Tensor, index: Tensor, weights: Tensor, *args: Any) -> int:
    first, second, _ = split_arguments(args)
    rows = index.numel()
    factors = sum(2 * rows * products.rank * sum(products.sizes) for products in (first, second))
    return first.operations(rows) * args[3] + second.operations(rows) + factors


def _product_schema(prefix: str) -> str:
    factors = f"Tensor? {prefix}_A, Tensor? {prefix}_B, float {prefix}_scaling"
    return f"Tensor {prefix}_weight, bool {prefix}_by_column, Tensor? {prefix}_bias, {factors}"


_FORM = "str kind, bool gated, bool interleaved, float limit, float slope, float offset"
_ARGUMENTS = f"{_product_schema('first')}, {_product_schema('second')}, {_FORM}"


@define(
    f"experts(Tensor x, Tensor index, Tensor weights, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _shapes,
    _operations,
)
def _experts(x: Tensor, index: Tensor, weights: Tensor, *args: Any) -> tuple[Tensor, ...]:
    first, second, form = split_arguments(args)
    inner, first_h, second_h = _empty_results(x, index, first, second)
    wide = accumulation_dtype(x)
    total = torch.zeros(x.shape, dtype=wide, device=x.device)
    router = weights.reshape(-1, 1).to(wide)

    def add_group(expert: int, rows: slice, indices: Tensor) -> None:
        tokens = indices // index.shape[1]
        outputs, h = linear(x[tokens], first.product(expert))
        inner[rows] = outputs
        if first.rank:
            first_h[rows] = h
        weighted = (form(outputs) * router[indices]).to(x.dtype)
        y, h = linear(weighted, second.product(expert, with_bias=False))
        if second.rank:
            second_h[rows] = h
        y = y.to(wide)
        if second.bias is not None:
            y.addcmul_(router[indices], second.bias[expert].to(wide))
        total.index_add_(0, tokens, y)

    for group in _groups(index, len(first.weight)):
        add_group(*group)
    return total.to(x.dtype), inner, first_h, second_h


@define(
    "experts_backward(Tensor grad, Tensor x, Tensor index, Tensor weights, Tensor inner, Tensor first_h, "
    f"Tensor second_h, bool need_x, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _shapes_backward,
    _operations_backward,
)
def _experts_backward(grad: Tensor, x: Tensor, index: Tensor, weights: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inner, first_h, second_h, need_x = args[:4]
    first, second, form = split_arguments(args)
    wide = accumulation_dtype(x)
    total = torch.zeros(x.shape if need_x else 0, dtype=wide, device=x.device)
    router = weights.reshape(-1, 1).to(wide)
    d_router = torch.zeros_like(router)
    d_first_A, d_first_B, d_second_A, d_second_B = factor_grads = _factor_gradients(first, second)

    def add_group(expert: int, rows: slice, indices: Tensor) -> None:
        tokens = indices // index.shape[1]
        factor = router[indices]
        g = grad[tokens]
        d_weighted, narrow = linear_backward(g, second.product(expert))
        d_inner, value = form.backward((d_weighted * factor).to(x.dtype), inner[rows])
        d_factor = (d_weighted.to(wide) * value).sum(1, keepdim=True)
        if second.bias is not None:
            d_factor += g.to(wide) @ second.bias[expert].to(wide)[:, None]
        d_router[indices] = d_factor
        if second.rank:
            weighted = (value * factor).to(x.dtype)
            grads = factors_backward(weighted, second_h[rows], g, narrow, second.scaling)
            d_second_A[expert] += grads[0]
            d_second_B[expert] += grads[1]
        d_x, narrow = linear_backward(d_inner, first.product(expert), need_x=need_x)
        if need_x:
            total.index_add_(0, tokens, d_x.to(wide))
        if first.rank:
            grads = factors_backward(x[tokens], first_h[rows], d_inner, narrow, first.scaling)
            d_first_A[expert] += grads[0]
            d_first_B[expert] += grads[1]

    for group in _groups(index, len(first.weight)):
        add_group(*group)
    return total.to(x.dtype), d_router.view(weights.shape).to(weights.dtype), *factor_grads
