"""Forward and backward of y = x·Wᵀ + b + s·(x·A)·B in closed form, and of an embedding alike.

W and b are frozen, so a backward needs no gradient of W, and what must be kept for it is the input x,
h = x·A (r wide) and the factors: no full-width intermediate, and no copy of x in another precision. With
adapter dropout a mask of one byte for each element of x is kept too. Where a compiled kernel serves
(``kernels/linear.py``) product and update are one, and W may be stored in int8 or in blocks of few bits. The
derivation stands in ``docs/method.md``. Each function has a reference implementation (``*_reference``)
composed of torch's operations. Tests hold the two together, and the reference is used where a closed form
cannot be: when W itself is trained, and under ``torch.func`` transforms.

It knows no modules; shapes only. Convolutions are composed under plain autograd in ``layers``: their
A·x is itself a convolution, whose backward torch already has in closed form.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.errors import UserError
from deltaw.kernels import linear as kernels
from deltaw.kernels.torch_private import functorch_is_active, unrecorded_view
from deltaw.lora.stored import Stored, multiply_backward, product


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    weight_is_in_out: bool = False,
    stored: Stored | None = None,
) -> Tensor:
    """y = x·Wᵀ + b + scaling · dropout(x)·A·B.

    Under ``torch.autocast`` all of it is computed in the autocast type, as ``nn.Linear`` does; else in the
    type of ``x``, which must be that of ``weight``. The factors are cast, their gradients are not.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) with ``weight_is_in_out``; frozen.
        bias: (out) or None; gets a gradient if it asks for one.
        lora_A: (in, r).
        lora_B: (r, out).
        scaling: alpha / r, or alpha / √r.
        dropout: share p of the adapter's inputs set to 0, the rest scaled by 1 / (1 − p).
        stored: how a weight is stored that is no plain matrix.

    Returns:
        (..., out).
    """
    x = autocasted(x)
    mask = None
    if dropout > 0.0:
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout)
        scaling = scaling / (1.0 - dropout)
    if needs_reference(weight):
        return linear_reference(x, weight, bias, lora_A, lora_B, scaling, mask, weight_is_in_out)
    return _Linear.apply(x, weight, bias, lora_A, lora_B, scaling, mask, weight_is_in_out, stored)


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
    """Reference implementation of :func:`linear`; ``mask`` (like x, bool): inputs that the adapter sees."""
    base = F.linear(x, weight.t() if weight_is_in_out else weight, bias)
    seen = x if mask is None else x * mask
    return base + (seen @ lora_A.to(x.dtype)) @ (lora_B * scaling).to(x.dtype)


def update_at(
    x: Tensor, places: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """scaling · dropout(x)·A·B at some tokens, and 0 at the others; by autograd.

    Args:
        x: (..., in). places: bool, as many as there are rows of x, in the order of these.

    Raises:
        UserError: x has other rows than there are tokens.
    """
    if places.numel() != rows_of(x):
        what = f"a layer was given {rows_of(x)} rows for {places.numel()} tokens: where the adapter acts is unknown"
        hint = "leave such layers (experts, for instance) out of lora.target_modules"
        raise UserError(what, where="lora.activation", hint=hint)
    seen = F.dropout(x, dropout) if dropout > 0.0 else x
    narrow = (seen @ lora_A.to(x.dtype)) * places.reshape(*x.shape[:-1], 1).to(x.dtype)
    return narrow @ (lora_B * scaling).to(x.dtype)


def with_update(
    update: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, weight_is_in_out: bool = False
) -> Tensor:
    """x·Wᵀ + b + update, with the update (..., out) in the sums of the product; by autograd."""
    matrix = weight if weight_is_in_out else weight.t()
    y = torch.addmm(update.reshape(-1, update.shape[-1]), x.reshape(-1, x.shape[-1]), matrix)
    return shaped(y if bias is None else y + bias, x.shape[:-1])


class _Linear(torch.autograd.Function):
    """The closed form behind :func:`linear`."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, mask, weight_is_in_out, stored):  # type: ignore
        # A type that does not fit W is an error of torch's own, as in nn.Linear, unless autocast casts W too.
        autocast = autocast_is_on(x.device.type) and stored is None
        base_weight = weight.to(x.dtype) if autocast else weight
        base_bias = bias.to(x.dtype) if autocast and bias is not None else bias
        flat = x.reshape(rows_of(x), x.shape[-1])
        # A compiler has kernels of its own.
        fused = mask is None and not torch.compiler.is_compiling()
        of = product(base_weight, stored, not weight_is_in_out, base_bias, lora_A, lora_B, scaling)
        fused = fused and (stored is not None or kernels.can_multiply(flat, of))
        if fused:
            y, h = kernels.linear(flat, of)
        else:
            h = (flat if mask is None else flat * mask.reshape(flat.shape)) @ lora_A.to(x.dtype)
            # The scaling goes into the small (r, out) factor, so that no wide tensor is skipped for it.
            y = h @ scaled(lora_B, scaling, x.dtype)
            if stored is not None:
                y, _ = kernels.linear(flat, product(weight, stored, bias=base_bias), y)
            else:
                y = kernels.plus_product(y, flat, base_weight if weight_is_in_out else base_weight.t())
                y = y if base_bias is None else y.add_(base_bias)
        needs = ctx.needs_input_grad
        inputs = (x, h) if needs[3] or needs[4] else (None, None)
        ctx.save_for_backward(*inputs, lora_A, lora_B, weight if needs[0] or fused else None, mask)
        ctx.fused, ctx.scaling, ctx.stored, ctx.weight_is_in_out = fused, scaling, stored, weight_is_in_out
        ctx.bias_dtype = bias.dtype if bias is not None else None
        return shaped(y, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, lora_A, lora_B, weight, mask = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        grad = grads[0]
        dtype = grad.dtype
        rows = rows_of(grad)
        grad_y = grad.reshape(rows, grad.shape[-1])
        grad_x = grad_bias = grad_A = grad_B = None
        stored = ctx.stored
        narrow: Tensor | None
        if ctx.fused and not torch.is_grad_enabled():
            if needs_bias:
                grad_bias = grad_y.sum(0).to(ctx.bias_dtype)
            base_weight = weight if weight is None or stored is not None else weight.to(dtype)
            of = product(base_weight, stored, not ctx.weight_is_in_out, None, lora_A, lora_B, ctx.scaling)
            grad_x, narrow = multiply_backward(grad_y, of, None, needs_x)
            if needs_A or needs_B:
                flat = x.reshape(rows, x.shape[-1])
                grad_A, grad_B = kernels.factors_backward(flat, h, grad_y, narrow, ctx.scaling)
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1]) if needs_x else None
            return grad_x, None, grad_bias, grad_A, grad_B, None, None, None, None
        narrow = grad_y @ scaled(lora_B, ctx.scaling, dtype).t() if needs_x or needs_A else None
        if needs_A or (needs_B and torch.is_grad_enabled()):
            seen = x if mask is None else x * mask
            seen = seen.reshape(rows, seen.shape[-1])
            if torch.is_grad_enabled():
                # A gradient of this gradient is asked for: h must be a function of x and A again.
                h = seen @ lora_A.to(dtype)
        if needs_A and narrow is not None:
            grad_A = (seen.t() @ narrow).to(lora_A.dtype)
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
    """How an embedding looks its rows up.

    Attributes:
        scale: what the base layer multiplies its rows with (Gemma's √dim).
        padding_idx: the row that gets no gradient.
        by_frequency: divide the gradient of a row by how often it stands in the ids.
    """

    scale: float | Tensor | None = None
    padding_idx: int | None = None
    by_frequency: bool = False

    def __call__(self, ids: Tensor, table: Tensor) -> Tensor:
        """table[ids], without the scale."""
        return F.embedding(ids, table, self.padding_idx, scale_grad_by_freq=self.by_frequency)

    def scaled(self, values: Tensor) -> Tensor:
        """``values`` times the base layer's own scale, in the type of ``values``."""
        # A tensor is cast to that type and a plain number is not: so do the layers that have one.
        scale = self.scale.to(values.dtype) if isinstance(self.scale, Tensor) else self.scale
        return values if scale is None else values * scale


AS_IT_IS = Lookup()


def embedding(
    ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, lookup: Lookup = AS_IT_IS
) -> Tensor:
    """y = c · (W[ids] + scaling · A[ids]·B), with c the lookup's scale, or 1.

    Args:
        ids: (...) of integers below the vocabulary's size.
        weight: (vocabulary, dim); frozen.
        lora_A: (vocabulary, r).
        lora_B: (r, dim).

    Returns:
        (..., dim) in the type of ``weight``.
    """
    call = embedding_reference if needs_reference(weight) else _Embedding.apply
    return call(ids, weight, lora_A, lora_B, scaling, lookup)


def embedding_reference(
    ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, lookup: Lookup = AS_IT_IS
) -> Tensor:
    """The reference implementation of :func:`embedding`."""
    base = lookup.scaled(lookup(ids, weight))
    delta = lookup(ids, lora_A).to(base.dtype) @ (lora_B * scaling).to(base.dtype)
    return base + (delta if lookup.scale is None else delta * lookup.scale)


class _Embedding(torch.autograd.Function):
    """The closed form behind :func:`embedding`."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, lookup: Lookup
    ) -> Tensor:
        flat = ids.reshape(-1)
        y = lookup.scaled(F.embedding(flat, weight))
        h = F.embedding(flat, lora_A).to(y.dtype)
        y.addmm_(h, lookup.scaled(lora_B * scaling).to(y.dtype))
        ctx.save_for_backward(ids, h if ctx.needs_input_grad[3] else None, lora_A, lora_B)
        ctx.scaling, ctx.lookup = scaling, lookup
        return shaped(y, ids.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ids, h, lora_A, lora_B = ctx.saved_tensors
        lookup: Lookup = ctx.lookup
        grad_y = grads[0].reshape(ids.numel(), grads[0].shape[-1])
        grad_A = grad_B = None
        flat = ids.reshape(-1)
        if ctx.needs_input_grad[2]:
            factor = lookup.scaled(lora_B * ctx.scaling)
            narrow = (grad_y @ factor.to(grad_y.dtype).t()).to(lora_A.dtype)
            padding_idx = -1 if lookup.padding_idx is None else lookup.padding_idx
            grad_A = torch.ops.aten.embedding_dense_backward(
                narrow, flat, lora_A.shape[0], padding_idx, lookup.by_frequency
            )
        if ctx.needs_input_grad[3]:
            if torch.is_grad_enabled():
                # As in _Linear: a second gradient needs h as a function of A.
                h = F.embedding(flat, lora_A, lookup.padding_idx).to(grad_y.dtype)
            grad_B = lookup.scaled((h.t() @ grad_y).to(lora_B.dtype) * ctx.scaling)
        return None, None, grad_A, grad_B, None, None


def scaled(factor: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """``scaling`` · ``factor``, rounded once to ``dtype``."""
    return (factor * scaling).to(dtype)


def shaped(y: Tensor, leading: torch.Size) -> Tensor:
    """(rows, out) as (*leading, out). A plain view returned by a Function could not be changed in place by
    what follows (``ReLU(inplace=True)``), so this one is not recorded as a view."""
    return y if len(leading) == 1 else unrecorded_view(y, (*leading, y.shape[-1]))


def rows_of(x: Tensor) -> int:
    """Product of all sizes but the last; stated, since view(-1) is ambiguous for no rows at all."""
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


def autocast_is_on(device: str) -> bool:
    """Whether products on ``device`` are cast; torch cannot be asked for the meta device."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocasted(x: Tensor) -> Tensor:
    """``x`` in autocast's type where that is on, as ``nn.Linear`` takes it."""
    device = x.device.type
    if autocast_is_on(device) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return x.to(torch.get_autocast_dtype(device))
    return x


def needs_reference(weight: Tensor) -> bool:
    """Whether the reference is needed: W is trained too, or a torch.func transform is active."""
    if weight.requires_grad and torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    return functorch_is_active()
