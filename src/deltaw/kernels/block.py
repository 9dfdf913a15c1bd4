"""A transformer block in one kernel call forward and one backward, if the compiled kernels support all of it.

    x₁ = x  + output(attention(rotate(queries, keys), values))    all of norm(x)
    y  = x₁ + down(f(gate) · up), or down(f(gate))                 of norm(x₁); in parallel blocks of norm(x)

Optional norms apply to queries and keys per head, after the last layer of each half, and to the sum with the residual
stream. The result is bitwise equal to that of the individual kernels. A single call is faster for short rows, for which
the overhead of about thirty calls per block and direction equals their compute time. All data that the backward needs,
except the input, is in one tensor.

The caller must check :func:`deltaw.kernels.operators.can_call_directly` first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.linear import LinearProduct, can_multiply
from deltaw.kernels.loader import BlockData, BlockParts, Layer
from deltaw.kernels.operators import check_positions
from deltaw.kernels.rows import ACTIVATIONS, HalfNorms, Norm, norm_struct

SEPARATE, STACKED, GROUPED = range(3)  # see csrc/block.h


class LinearTensors(Protocol):
    """A frozen layer and its low-rank update."""

    @property
    def product(self) -> LinearProduct: ...


class AttentionTensors(Protocol):
    """Tensors of the attention half.

    Attributes:
        norms: Norms of the half.
        heads: Number of query heads.
        key_heads: Number of key heads.
        head_size: Numbers per head.
        grouped: True if the outputs of a joint layer are grouped by key head instead of stacked.
        query_norm: Norm of each query head, or None.
        key_norm: Norm of each key head, or None.
        options: Attention options: scaling, window, softcap, causal; see :func:`deltaw.kernels.attention.attend`.
        inputs: Layers of queries, keys and values, or one joint layer.
        output: Output layer.
    """

    norms: HalfNorms
    heads: int
    key_heads: int
    head_size: int
    grouped: bool
    query_norm: Norm | None
    key_norm: Norm | None
    options: dict[str, Any]

    @property
    def inputs(self) -> Sequence[LinearTensors]: ...
    @property
    def output(self) -> LinearTensors: ...


class MLPTensors(Protocol):
    """Tensors of the MLP half.

    Attributes:
        norms: Norms of the half.
        gated: True if the MLP has a gate.
        kind: Activation, a name from :data:`deltaw.kernels.rows.ACTIVATIONS`.
        inputs: Gate and up layers, or one layer. With ``gated``, one layer computes both.
        output: Down layer.
    """

    norms: HalfNorms
    gated: bool
    kind: str

    @property
    def inputs(self) -> Sequence[LinearTensors]: ...
    @property
    def output(self) -> LinearTensors: ...


_P = ctypes.c_void_p
_L = ctypes.c_int64


class Block:
    """Addresses of a block's tensors. It must be recreated if a tensor is replaced or moves.

    Args:
        attention: Attention half.
        mlp: MLP half.
        parallel: True if both halves read the block's input.
        dtype: Type of the block's inputs.
        rotary_dims: Numbers per head that rotary positions rotate, or 0.
    """

    def __init__(
        self, attention: AttentionTensors, mlp: MLPTensors, *, dtype: torch.dtype, parallel: bool, rotary_dims: int
    ) -> None:
        self._arguments = attention, mlp, dtype, parallel, rotary_dims
        self._addresses = _tensor_addresses(attention, mlp)
        layers = _layers(attention, mlp)
        norms = _norms(attention, mlp)
        # Tensors and structs that the C structs point to.
        self._alive = (
            layers,
            structs := [None if layer is None else layer.as_struct() for layer in layers],
            [(norm.weight, norm.bias) for norm in norms if norm is not None],
        )
        self._factors = [f for item in layers for f in ((None, None) if item is None else (item.lora_A, item.lora_B))]
        split = SEPARATE if len(attention.inputs) == 3 else GROUPED if attention.grouped else STACKED
        options = attention.options
        self._parts = BlockParts(
            *(loader.dtype_code(dtype), attention.heads, attention.key_heads, attention.head_size),
            *(ACTIVATIONS.index(mlp.kind), options.get("window") or 0, rotary_dims, options.get("causal", True)),
            *(split, mlp.gated, parallel, False, options["scaling"], options.get("softcap") or 0.0),
            *(attention.norms.as_struct(), mlp.norms.as_struct()),
            *map(norm_struct, (attention.query_norm, attention.key_norm)),
            *(Layer() if layer is None else _struct(layer, data) for layer, data in zip(layers, structs, strict=True)),
        )
        self._parts_address = ctypes.addressof(self._parts)
        self._sizes = (_L * 3)()
        self._sizes_key = (-1, -1, False)

    def refreshed(self) -> Block:
        """Return this block, or a new one if its tensors have moved.

        Sharded weights, for example, are freed after the forward pass and gathered again for the backward pass.
        """
        attention, mlp, dtype, parallel, rotary_dims = self._arguments
        if _tensor_addresses(attention, mlp) == self._addresses:
            return self
        return Block(attention, mlp, dtype=dtype, parallel=parallel, rotary_dims=rotary_dims)

    def forward(
        self, x: Tensor, segments: Tensor, cosine: Tensor | None, sine: Tensor | None, output_rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            x: (T, hidden) input.
            segments: (4, S); see :meth:`deltaw.kernels.layout.Layout.segments`.
            cosine: (T, rotary_dims) fp32, or None without rotary positions.
            sine: (T, rotary_dims) fp32, or None.
            output_rows: (P) ascending positions whose outputs are computed, P ≥ 1, or None for all.

        Returns:
            (T or P, hidden) output, and a tensor to pass to :meth:`backward`.

        Raises:
            ValueError: if ``output_rows`` is not ascending.
            IndexError: if a position in it is out of bounds.
        """
        length = len(x)
        num_outputs = 0 if output_rows is None else len(output_rows)
        if output_rows is not None:
            check_positions(output_rows, length)
        saved_bytes, scratch_bytes, _ = self._buffer_sizes(length, num_outputs)
        saved, scratch = (torch.empty(n, dtype=torch.uint8) for n in (saved_bytes, scratch_bytes))
        y = x.new_empty(num_outputs or length, x.shape[1])
        loader.kernels().dw_block(
            self._parts_address, length, x.data_ptr(), segments.data_ptr(), segments.shape[1],
            loader.address(output_rows), num_outputs, loader.address(cosine), loader.address(sine), saved.data_ptr(),
            scratch.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return y, saved

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        saved: Tensor,
        segments: Tensor,
        cosine: Tensor | None,
        sine: Tensor | None,
        output_rows: Tensor | None,
        need_x: bool,
        need_factors: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return ∂L/∂x if ``need_x``, and the fp32 gradients of A and B of each layer with an update if
        ``need_factors``.
        """
        length = len(x)
        num_outputs = 0 if output_rows is None else len(output_rows)
        scratch = torch.empty(self._buffer_sizes(length, num_outputs)[2], dtype=torch.uint8)
        dx = torch.empty_like(x) if need_x else None
        grads = [torch.empty(f.shape) if need_factors and f is not None else None for f in self._factors]
        loader.kernels().dw_block_backward(
            self._parts_address, length, x.data_ptr(), segments.data_ptr(), segments.shape[1],
            loader.address(output_rows), num_outputs, loader.address(cosine), loader.address(sine), saved.data_ptr(),
            scratch.data_ptr(), grad.data_ptr(), loader.address(dx), (_P * len(grads))(*map(loader.address, grads)),
        )  # fmt: skip
        return dx, [factor for factor in grads if factor is not None]

    def _buffer_sizes(self, length: int, num_outputs: int) -> tuple[int, int, int]:
        """Return the sizes in bytes of the saved tensor, forward scratch and backward scratch."""
        int8_gradients = loader.arithmetic().int8_gradients
        if (length, num_outputs, int8_gradients) != self._sizes_key:
            self._parts.int8_gradients = int8_gradients
            loader.kernels().dw_block_sizes(self._parts_address, length, num_outputs, self._sizes)
            self._sizes_key = length, num_outputs, int8_gradients
        return tuple(self._sizes)  # type: ignore[return-value]


def supports(x: Tensor, attention: AttentionTensors, mlp: MLPTensors, parallel: bool) -> bool:
    """True if the kernels support the block for rows like x (T, hidden)."""
    norms = [norm for norm in _norms(attention, mlp) if norm is not None]
    if not loader.supports(x, *(t for norm in norms for t in (norm.weight, norm.bias))):
        return False
    if any(t is not None and not t.is_contiguous() for norm in norms for t in (norm.weight, norm.bias)):
        return False
    if not all(_supports_layer(x, layer) for layer in _layers(attention, mlp) if layer is not None):
        return False
    output_norms = [half.norms.after or half.norms.post for half in (attention, mlp)]
    return not (parallel and any(output_norms)) and _shapes_match(attention, mlp)


def _supports_layer(x: Tensor, product: LinearProduct) -> bool:
    if not can_multiply(x.new_empty(0, product.sizes[0]), product):
        return False
    tensors = (product.bias, product.scale, product.smooth_scales, product.lora_A, product.lora_B)
    if any(t is not None and not t.is_contiguous() for t in tensors):
        return False
    return product.bias is None or product.bias.dtype in (torch.float32, x.dtype)


def _shapes_match(attention: AttentionTensors, mlp: MLPTensors) -> bool:
    """True if layer outputs match the sizes of the halves, and head sizes are even."""
    size = attention.head_size
    heads = attention.heads
    key_heads = attention.key_heads
    if size % 2 or not key_heads or heads % key_heads:
        return False
    sizes = [heads * size, key_heads * size, key_heads * size]
    expected = sizes if len(attention.inputs) == 3 else [sum(sizes)]
    if [layer.product.sizes[1] for layer in attention.inputs] != expected:
        return False
    inner = mlp.output.product.sizes[0]
    expected_widths = [inner] * len(mlp.inputs) if len(mlp.inputs) == 1 + mlp.gated else [2 * inner]
    return [layer.product.sizes[1] for layer in mlp.inputs] == expected_widths and mlp.kind in ACTIVATIONS


def _layers(attention: AttentionTensors, mlp: MLPTensors) -> list[LinearProduct | None]:
    """Return the layers in the kernels' order: query, key, value, output, gate, up, down. Missing layers are None."""
    layers: list[LinearProduct | None] = []
    for half, inputs in ((attention, 3), (mlp, 2)):
        layers += [layer.product for layer in half.inputs]
        layers += [*[None] * (inputs - len(half.inputs)), half.output.product]
    return layers


def _norms(attention: AttentionTensors, mlp: MLPTensors) -> list[Norm | None]:
    """Return before, after and post of each half, then the norms of queries and keys."""
    halves = [norm for half in (attention.norms, mlp.norms) for norm in (half.before, half.after, half.post)]
    return [*halves, attention.query_norm, attention.key_norm]


def _tensor_addresses(attention: AttentionTensors, mlp: MLPTensors) -> list[int]:
    """Return the addresses of the block's frozen tensors."""
    tensors = [t for part in _layers(attention, mlp) if part is not None for t in (part.weight, part.bias)]
    tensors += [t for part in _norms(attention, mlp) if part is not None for t in (part.weight, part.bias)]
    return [t.data_ptr() for t in tensors if t is not None]


def _struct(product: LinearProduct, block_data: BlockData | None) -> Layer:
    return Layer(
        product.address(block_data),
        *map(loader.address, (product.scale, product.smooth_scales, product.bias, product.lora_A, product.lora_B)),
        *product.sizes,
        *(0 if product.lora_A is None else product.lora_A.shape[1], product.number, product.by_column),
        *(product.bias is not None and product.bias.dtype == torch.float32, product.in_blocks, product.scaling),
    )
