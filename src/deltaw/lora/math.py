"""Closed-form forward and backward of y = x·Wᵀ + b + s·(x·A)·B, and of the corresponding embedding.

W and b are frozen, so the backward needs no gradient of W. It saves only the input x, h = x·A (r wide) and the factors:
no full-width intermediate, and no copy of x in another precision. Adapter dropout additionally saves a mask of one byte
per element of x. If a compiled kernel supports the shapes (``kernels/linear.py``), product and update are one
operation, and W may be stored in int8 or in blocks of few bits. See ``docs/method.md`` for the derivation.

Each function has a reference implementation (``*_reference``) composed of torch operations. Tests compare the two. The
reference is used if W is trained too and under ``torch.func`` transforms. Convolutions are composed under autograd in
``layers``, since A·x is a convolution whose backward torch has in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.errors import UserError
from deltaw.kernels import linear as kernels
from deltaw.kernels.torch_private import functorch_is_active, unrecorded_view
from deltaw.lora.stored import StoredWeight, multiply_backward, product


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    weight_is_in_out: bool = False,
    stored: StoredWeight | None = None,
) -> Tensor:
    """Return y = x·Wᵀ + b + scaling · dropout(x)·A·B.

    Under ``torch.autocast`` everything is computed in the autocast dtype, as in ``nn.Linear``. Otherwise the dtype of
    ``x`` is used, which must equal that of ``weight``. The factors are cast, but not their gradients.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) with ``weight_is_in_out``. Frozen.
        bias: (out) or None. Gets a gradient if it requires one.
        lora_A: (in, r).
        lora_B: (r, out).
        scaling: alpha / r, or alpha / √r.
        dropout: Share p of the adapter's inputs that is set to 0. The rest is scaled by 1 / (1 − p).
        weight_is_in_out: True if W is (in, out).
        stored: Storage of a quantized weight, or None for a plain matrix.

    Returns:
        (..., out).
    """
    x = autocast_input(x)
    mask = None
    if dropout > 0.0:
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout)
        scaling = scaling / (1.0 - dropout)
    if needs_reference(weight):
        return linear_reference(x, weight, bias, lora_A, lora_B, scaling, mask, weight_is_in_out)
    apply: Callable[..., Tensor] = _Linear.apply
    return apply(x, weight, bias, lora_A, lora_B, scaling, mask, weight_is_in_out, stored)


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    weight_is_in_out: bool = False,
) -> Tensor:
    """Reference implementation of :func:`linear`. ``mask`` (bool, shape of x) selects the inputs of the adapter."""
    base = F.linear(x, weight.t() if weight_is_in_out else weight, bias)
    adapter_input = x if mask is None else x * mask
    return base + (adapter_input @ lora_A.to(x.dtype)) @ (lora_B * scaling).to(x.dtype)


def masked_update(x: Tensor, mask: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float) -> Tensor:
    """Return scaling · dropout(x)·A·B at the active tokens, and 0 at all other tokens. Uses autograd.

    Args:
        x: (..., in).
        mask: Bool mask of active tokens with one element per row of x.
        lora_A: (in, r).
        lora_B: (r, out).
        scaling: Factor of A·B.
        dropout: Share of the inputs that is set to 0.

    Raises:
        UserError: if the numbers of rows of x and of tokens differ.
    """
    if mask.numel() != num_rows(x):
        message = f"a layer got {num_rows(x)} rows for {mask.numel()} tokens, so the active rows are unknown"
        hint = "remove such layers (for example, experts) from lora.target_modules"
        raise UserError(message, location="lora.active", hint=hint)
    adapter_input = F.dropout(x, dropout) if dropout > 0.0 else x
    narrow = (adapter_input @ lora_A.to(x.dtype)) * mask.reshape(*x.shape[:-1], 1).to(x.dtype)
    return narrow @ (lora_B * scaling).to(x.dtype)


def linear_with_update(update: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, is_in_out: bool) -> Tensor:
    """Return x·Wᵀ + b + update, with the update (..., out) added in the sums of the product. Uses autograd."""
    matrix = weight if is_in_out else weight.t()
    y = torch.addmm(update.reshape(-1, update.shape[-1]), x.reshape(-1, x.shape[-1]), matrix)
    return reshape_output(y if bias is None else y + bias, x.shape[:-1])


class _Linear(torch.autograd.Function):
    """Closed form of :func:`linear`."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, mask, weight_is_in_out, stored):  # type: ignore
        # As in nn.Linear, torch raises an error if the dtypes of x and W differ, unless autocast casts both.
        autocast = is_autocast_enabled(x.device.type) and stored is None
        base_weight = weight.to(x.dtype) if autocast else weight
        base_bias = bias.to(x.dtype) if autocast and bias is not None else bias
        flat = x.reshape(num_rows(x), x.shape[-1])
        # torch.compile generates kernels itself.
        fused = mask is None and not torch.compiler.is_compiling()
        linear_product = product(base_weight, stored, not weight_is_in_out, base_bias, lora_A, lora_B, scaling)
        fused = fused and (stored is not None or kernels.can_multiply(flat, linear_product))
        if fused:
            y, h = kernels.linear(flat, linear_product)
        else:
            h = (flat if mask is None else flat * mask.reshape(flat.shape)) @ lora_A.to(x.dtype)
            # Scale the small (r, out) factor instead of a wide tensor.
            y = h @ scaled(lora_B, scaling, x.dtype)
            if stored is not None:
                y, _ = kernels.linear(flat, product(weight, stored, bias=base_bias), y)
            else:
                y = kernels.plus_product(y, flat, base_weight if weight_is_in_out else base_weight.t())
                y = y if base_bias is None else y.add_(base_bias)
        needs = ctx.needs_input_grad
        inputs = (x, h) if needs[3] or needs[4] else (None, None)
        ctx.save_for_backward(*inputs, lora_A, lora_B, weight if needs[0] or fused else None, mask)
        ctx.fused = fused
        ctx.scaling = scaling
        ctx.stored = stored
        ctx.weight_is_in_out = weight_is_in_out
        ctx.bias_dtype = bias.dtype if bias is not None else None
        return reshape_output(y, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, lora_A, lora_B, weight, mask = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        grad = grads[0]
        dtype = grad.dtype
        rows = num_rows(grad)
        grad_y = grad.reshape(rows, grad.shape[-1])
        grad_x = grad_bias = grad_A = grad_B = None
        stored = ctx.stored
        narrow: Tensor | None
        if ctx.fused and not torch.is_grad_enabled():
            if needs_bias:
                grad_bias = grad_y.sum(0).to(ctx.bias_dtype)
            base_weight = weight if weight is None or stored is not None else weight.to(dtype)
            linear_product = product(base_weight, stored, not ctx.weight_is_in_out, None, lora_A, lora_B, ctx.scaling)
            grad_x, narrow = multiply_backward(grad_y, linear_product, None, needs_x)
            if needs_A or needs_B:
                grad_A, grad_B = kernels.factors_backward(x.reshape(rows, x.shape[-1]), h, grad_y, narrow, ctx.scaling)
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1]) if needs_x else None
            return grad_x, None, grad_bias, grad_A, grad_B, None, None, None, None
        narrow = grad_y @ scaled(lora_B, ctx.scaling, dtype).t() if needs_x or needs_A else None
        if needs_A or (needs_B and torch.is_grad_enabled()):
            adapter_input = x if mask is None else x * mask
            adapter_input = adapter_input.reshape(rows, adapter_input.shape[-1])
            if torch.is_grad_enabled():
                # For second-order gradients, h must be a function of x and A.
                h = adapter_input @ lora_A.to(dtype)
        if needs_A and narrow is not None:
            grad_A = (adapter_input.t() @ narrow).to(lora_A.dtype)
        if needs_B:
            grad_B = (h.t() @ grad_y).to(lora_B.dtype) * ctx.scaling
        if needs_bias:
            grad_bias = grad_y.sum(0).to(ctx.bias_dtype)
        if needs_x and narrow is not None:
            update = narrow @ lora_A.to(dtype).t()
            update = update if mask is None else update * mask.reshape(update.shape)
            if stored is not None:
                grad_x, _ = multiply_backward(grad_y, product(weight, stored), update)
            else:
                base_weight = weight.to(dtype)
                matrix = base_weight.t() if ctx.weight_is_in_out else base_weight
                grad_x = kernels.plus_product(update, grad_y, matrix)
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
        return grad_x, None, grad_bias, grad_A, grad_B, None, None, None, None


class Lookup(NamedTuple):
    """Options of an embedding lookup.

    Attributes:
        scale: Factor that the base layer applies to its rows (Gemma's √dim), or None.
        padding_idx: Row that gets no gradient, or None.
        by_frequency: Divide the gradient of a row by its number of occurrences in the ids.
    """

    scale: float | Tensor | None = None
    padding_idx: int | None = None
    by_frequency: bool = False

    def __call__(self, ids: Tensor, table: Tensor) -> Tensor:
        """Return table[ids], without the scale."""
        return F.embedding(ids, table, self.padding_idx, scale_grad_by_freq=self.by_frequency)

    def scaled(self, values: Tensor) -> Tensor:
        """Return ``values`` times the base layer's scale, in the dtype of ``values``."""
        # A tensor scale is cast to the dtype and a Python number is not, as in the base layers.
        scale = self.scale.to(values.dtype) if isinstance(self.scale, Tensor) else self.scale
        return values if scale is None else values * scale


def embedding(ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, lookup: Lookup) -> Tensor:
    """Return y = c · (W[ids] + scaling · A[ids]·B), with c the scale of the lookup or 1.

    Args:
        ids: (...) of integers below the vocabulary size.
        weight: (vocabulary, dim). Frozen.
        lora_A: (vocabulary, r).
        lora_B: (r, dim).
        scaling: Factor of A·B.
        lookup: Options of the lookup.

    Returns:
        (..., dim) in the dtype of ``weight``.
    """
    call = embedding_reference if needs_reference(weight) else _Embedding.apply
    return call(ids, weight, lora_A, lora_B, scaling, lookup)


def embedding_reference(
    ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, lookup: Lookup
) -> Tensor:
    """Reference implementation of :func:`embedding`."""
    base = lookup.scaled(lookup(ids, weight))
    delta = lookup(ids, lora_A).to(base.dtype) @ (lora_B * scaling).to(base.dtype)
    return base + (delta if lookup.scale is None else delta * lookup.scale)


class _Embedding(torch.autograd.Function):
    """Closed form of :func:`embedding`."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, lookup: Lookup) -> Tensor:
        flat = ids.reshape(-1)
        y = lookup.scaled(F.embedding(flat, weight))
        h = F.embedding(flat, A).to(y.dtype)
        y.addmm_(h, lookup.scaled(B * scaling).to(y.dtype))
        ctx.save_for_backward(ids, h if ctx.needs_input_grad[3] else None, A, B)
        ctx.scaling = scaling
        ctx.lookup = lookup
        return reshape_output(y, ids.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ids, h, A, B = ctx.saved_tensors
        lookup: Lookup = ctx.lookup
        grad_y = grads[0].reshape(ids.numel(), grads[0].shape[-1])
        grad_A = grad_B = None
        flat = ids.reshape(-1)
        if ctx.needs_input_grad[2]:
            narrow = (grad_y @ lookup.scaled(B * ctx.scaling).to(grad_y.dtype).t()).to(A.dtype)
            padding = -1 if lookup.padding_idx is None else lookup.padding_idx
            grad_A = torch.ops.aten.embedding_dense_backward(narrow, flat, A.shape[0], padding, lookup.by_frequency)
        if ctx.needs_input_grad[3]:
            if torch.is_grad_enabled():
                # As in _Linear, second-order gradients need h as a function of A.
                h = F.embedding(flat, A, lookup.padding_idx).to(grad_y.dtype)
            grad_B = lookup.scaled((h.t() @ grad_y).to(B.dtype) * ctx.scaling)
        return None, None, grad_A, grad_B, None, None


def scaled(factor: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return ``scaling`` · ``factor``, rounded once to ``dtype``."""
    return (factor * scaling).to(dtype)


def reshape_output(y: Tensor, leading: torch.Size) -> Tensor:
    """Reshape (rows, out) to (*leading, out), not recorded as a view.

    A view returned by a Function could not be modified in place by later operations such as ``ReLU(inplace=True)``.
    """
    return y if len(leading) == 1 else unrecorded_view(y, (*leading, y.shape[-1]))


def num_rows(x: Tensor) -> int:
    """Return the product of all sizes except the last. Computed explicitly because view(-1) is ambiguous for empty
    tensors.
    """
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


def is_autocast_enabled(device: str) -> bool:
    """True if autocast is enabled on ``device``. torch raises an error for the meta device."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast_input(x: Tensor) -> Tensor:
    """Cast ``x`` to the autocast dtype if autocast is enabled, as ``nn.Linear`` does."""
    device = x.device.type
    if is_autocast_enabled(device) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return x.to(torch.get_autocast_dtype(device))
    return x


def needs_reference(weight: Tensor) -> bool:
    """True if the reference implementation is needed: W is trained too, or a torch.func transform is active."""
    if weight.requires_grad and torch.is_grad_enabled():
        return True
    return not torch.compiler.is_compiling() and functorch_is_active()


def relative_errors(squares: Mapping[str, tuple[float, float]]) -> tuple[dict[str, float], float]:
    """Return the root of (squared error / squared norm) by parameter, and over all parameters together."""

    def ratio(error: float, norm: float) -> float:
        return (error / norm) ** 0.5 if norm > 0 else 0.0

    total = ratio(sum(error for error, _ in squares.values()), sum(norm for _, norm in squares.values()))
    return {name: ratio(*values) for name, values in squares.items()}, total
