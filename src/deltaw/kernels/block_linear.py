"""Weights of linear layers in block formats of a few bits: those of GGUF files, byte for byte, and NF4.

A row of a matrix is a sequence of blocks, each with a scale. Blocks are decoded in fp32 and rounded to bf16 before they
are multiplied (``linear.py``). Rows are independent byte sequences, so a subset or permutation of rows is a valid
weight.

The GGUF formats are llama.cpp's (ggml-quants). NF4 is QLoRA's (arXiv 2305.14314, appendix E) with double quantization
and decodes to the same values as in bitsandbytes. Only the order of codes within a block differs: the first 32 are in
the low nibbles of the bytes and the last 32 in the high nibbles, as in GGUF.

Each format has a reference implementation in torch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.loader import BlockData
from deltaw.kernels.operators import can_call_directly, define
from deltaw.kernels.torch_private import without_dispatch

# Consecutive NF4 blocks of a matrix, row by row, whose 8-bit scales share a group scale.
NF4_GROUP = 256
NF4_BLOCK = 64
# Blocks quantized per chunk. The fp32 intermediates take about 16 times the bytes of the blocks.
NF4_CHUNK_BLOCKS = 1 << 14
_NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class BlockFormat:
    """A block format.

    Attributes:
        name: Name of the format.
        block: Numbers per block.
        bytes: Bytes per block.
        number: The kernels' code of the format.
    """

    name: str
    block: int
    bytes: int
    number: int

    def bytes_of_row(self, columns: int) -> int:
        """Return the bytes of a row with ``columns`` numbers.

        Raises:
            ValueError: if ``columns`` is not a multiple of the block size.
        """
        if columns % self.block:
            raise ValueError(f"{columns} columns are not a multiple of the {self.name} block size {self.block}")
        return columns // self.block * self.bytes


FORMATS: dict[str, BlockFormat] = {
    name: BlockFormat(name, block, size, number)
    for number, (name, block, size) in enumerate(
        [
            *(("Q4_0", 32, 18), ("Q4_1", 32, 20), ("Q8_0", 32, 34)),
            *(("Q4_K", 256, 144), ("Q5_K", 256, 176), ("Q6_K", 256, 210), ("NF4", NF4_BLOCK, 32)),
        ],
        start=3,
    )
}


@dataclass(frozen=True, eq=False)
class BlockWeight:
    """A matrix (rows, columns) in a block format.

    Attributes:
        data: Contiguous uint8 (rows, bytes per row).
        format: Name from :data:`FORMATS`.
        columns: Number of columns.
        absmax: NF4 only: uint8 (rows, columns / 64). A block's scale is the :func:`dynamic_codes` entry of this index,
            times the group's scale, plus ``offset``.
        group_scale: NF4 only: fp32, one per :data:`NF4_GROUP` blocks, row by row.
        offset: NF4 only: fp32 (1).

    Raises:
        ValueError: if types, shapes or contiguity of the tensors do not match the format.
    """

    data: Tensor
    format: str
    columns: int
    absmax: Tensor | None = None
    group_scale: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"unknown block format '{self.format}', expected one of {', '.join(FORMATS)}")
        width = self.block_format.bytes_of_row(self.columns)
        _check_tensor(self.data, "a weight's blocks", torch.uint8, len(self.data), width)
        if self.format != "NF4":
            return
        blocks = len(self.data) * (self.columns // NF4_BLOCK)
        _check_tensor(self.absmax, "NF4's scales", torch.uint8, len(self.data), self.columns // NF4_BLOCK)
        _check_tensor(self.group_scale, "the scales of NF4's groups", torch.float32, -(-blocks // NF4_GROUP))
        _check_tensor(self.offset, "the offset of NF4's scales", torch.float32, 1)

    @property
    def block_format(self) -> BlockFormat:
        """The block format."""
        return FORMATS[self.format]

    @property
    def shape(self) -> torch.Size:
        """Shape (rows, columns) of the matrix."""
        return torch.Size((len(self.data), self.columns))

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """All tensors of the weight, the blocks first."""
        return self.data, self.absmax, self.group_scale, self.offset

    def as_struct(self) -> BlockData:
        """Return the kernels' struct. It is valid while the tensors are alive and do not move."""
        data, *scales = self.tensors
        absmax, group_scale, offset = (None if t is None else t.data_ptr() for t in scales)
        codes = dynamic_codes().data_ptr() if self.format == "NF4" else None
        return BlockData(data.data_ptr(), absmax, group_scale, codes, offset)

    def dequantized(self, dtype: torch.dtype, first_row: int = 0, last_row: int | None = None) -> Tensor:
        """Return rows ``first_row`` to ``last_row`` (exclusive), (n, columns). Types other than fp32 are rounded."""
        first_row, last_row, _ = slice(first_row, last_row).indices(len(self.data))
        if not self._is_supported(dtype):
            return reference_dequantize(self, dtype, first_row, last_row)
        return self._compiled(dtype, max(0, last_row - first_row), first_row, None)

    def rows_at(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows (…, columns) at int64 indices (…), as an embedding lookup.

        Raises:
            IndexError: if an index is out of bounds.
        """
        flat_indices = indices.reshape(-1)
        if self._is_supported(dtype) and can_call_directly(indices):
            rows = self._compiled(dtype, len(flat_indices), 0, flat_indices.contiguous())
        else:
            rows = _dequantize_rows(self, self.data.index_select(0, flat_indices), flat_indices, dtype)
        return rows.view(*indices.shape, self.columns)

    def _is_supported(self, dtype: torch.dtype) -> bool:
        """True if the compiled kernels can dequantize this weight."""
        if dtype not in (torch.float32, torch.bfloat16) or loader.library() is None:
            return False
        return can_call_directly(*(t for t in self.tensors if t is not None))

    def _compiled(self, dtype: torch.dtype, count: int, first: int, indices: Tensor | None) -> Tensor:
        out = torch.empty(count, self.columns, dtype=dtype)
        block_data = self.as_struct()
        loader.kernels().dw_dequantize(
            loader.dtype_code(dtype), self.block_format.number, ctypes.addressof(block_data), len(self.data),
            self.columns, first, loader.address(indices), count, out.data_ptr(),
        )  # fmt: skip
        return out


def reference_dequantize(weight: BlockWeight, dtype: torch.dtype, first: int = 0, last: int | None = None) -> Tensor:
    """Reference implementation of :meth:`BlockWeight.dequantized`."""
    rows = slice(first, last)
    return _dequantize_rows(weight, weight.data[rows], rows, dtype)


def _dequantize_rows(weight: BlockWeight, data: Tensor, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """Decode rows whose bytes are ``data``."""
    if weight.format == "NF4":
        return _nf4(_nf4_scales(weight)[rows], data).to(dtype)
    blocks = data.reshape(-1, weight.block_format.bytes)
    return _READERS[weight.format](blocks).reshape(len(data), weight.columns).to(dtype)


def _check_tensor(tensor: Tensor | None, name: str, dtype: torch.dtype, *sizes: int) -> None:
    if tensor is None or tensor.dtype != dtype or tensor.shape != sizes or not tensor.is_contiguous():
        actual = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name} must be contiguous {dtype} {sizes}, not {actual}")


def _fp16_at(blocks: Tensor, offset: int) -> Tensor:
    """Read the fp16 number at a byte offset of each block as fp32 (blocks, 1)."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _split_nibbles(codes: Tensor) -> Tensor:
    """Return the low and the high nibbles of bytes (…, n) as (…, 2, n)."""
    return torch.stack((codes & 15, codes >> 4), -2)


def _q4_0(blocks: Tensor) -> Tensor:
    return (_split_nibbles(blocks[:, 2:]).flatten(1).float() - 8) * _fp16_at(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _split_nibbles(blocks[:, 4:]).flatten(1).float() * _fp16_at(blocks, 0) + _fp16_at(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _fp16_at(blocks, 0)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and minimums of the eight sub-blocks of Q4_K or Q5_K blocks, in fp32 (blocks, 8, 1).

    Both have 6 bits and are packed into bytes 4 to 15 of a block.
    """
    low = blocks[:, 4:8]
    high = blocks[:, 8:12]
    joint = blocks[:, 12:16]
    scale = torch.cat((low & 63, (joint & 15) | ((low >> 6) << 4)), 1)
    minimum = torch.cat((high & 63, (joint >> 4) | ((high >> 6) << 4)), 1)
    return (scale * _fp16_at(blocks, 0))[..., None], (minimum * _fp16_at(blocks, 2))[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scale, minimum = _k_scales(blocks)
    return (_split_nibbles(blocks[:, 16:].unflatten(1, (4, 32))).flatten(1, 2).float() * scale - minimum).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scale, minimum = _k_scales(blocks)
    codes = _split_nibbles(blocks[:, 48:].unflatten(1, (4, 32))).flatten(1, 2)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    codes = codes | (((blocks[:, None, 16:48] >> shifts) & 1) << 4)
    return (codes.float() * scale - minimum).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    # Each half of a block has 64 bytes of low bits and 32 bytes of high bits for four groups of 32 numbers.
    low = _split_nibbles(blocks[:, :128].unflatten(1, (2, 64))).reshape(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts) & 3
    scale = blocks[:, 192:208].contiguous().view(torch.int8).float() * _fp16_at(blocks, 208)
    return (((low | (high << 4)).float() - 32).reshape(-1, 16, 16) * scale[..., None]).flatten(1)


_READERS = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}


@cache
def nf4_levels() -> Tensor:
    """Return the 16 NF4 levels in fp32: quantiles of the normal distribution, scaled to [-1, 1], including 0."""
    with without_dispatch():  # the result is cached, so it needs real values even if a dry run calls first
        return torch.tensor(_NF4_VALUES)


@cache
def dynamic_codes() -> Tensor:
    """Return the 256 ascending 8-bit dynamic codes in fp32, from -0.993 to 1.

    The exponent takes a variable number of bits (Dettmers, arXiv 1511.04561). Each of 7 powers of ten has evenly spaced
    fractions, twice as many as the next lower power. 0 and 1 complete the codes.
    """
    values = [0.0, 1.0]
    with without_dispatch():  # see nf4_levels
        for power in range(7):
            bounds = torch.linspace(0.1, 1, 2**power + 1)
            fractions = (10.0 ** (power - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
            values += [*fractions, *(-fraction for fraction in fractions)]
        return torch.tensor(sorted(values))


def quantize_nf4(weight: Tensor) -> BlockWeight:
    """Quantize a matrix (rows, columns) to NF4. ``columns`` must be a multiple of 64.

    Each number is rounded to the nearest of 16 levels times its block's absolute maximum. The maxima, less their mean,
    are rounded to the nearest of :func:`dynamic_codes` times the largest of their group.

    Raises:
        ValueError: if ``columns`` is not a multiple of 64.
    """
    rows, columns = weight.shape
    FORMATS["NF4"].bytes_of_row(columns)
    data, block_maxima = nf4_blocks(weight.detach())
    maxima = block_maxima.flatten()
    offset = maxima.mean().reshape(1)
    absmax = torch.zeros(-(-len(maxima) // NF4_GROUP) * NF4_GROUP, device=weight.device)
    absmax[: len(maxima)] = maxima - offset
    groups = absmax.view(-1, NF4_GROUP)
    group_scale = groups.abs().amax(1)
    codes = _nearest_index(_divide_by_max(groups, group_scale), dynamic_codes().to(weight.device)).flatten()
    absmax_codes = codes[: len(maxima)].view(rows, -1).contiguous()
    return BlockWeight(data, "NF4", columns, absmax_codes, group_scale, offset)


@define(
    "nf4_blocks(Tensor weight) -> (Tensor, Tensor)",
    lambda weight: (
        weight.new_empty(len(weight), weight.shape[1] // 2, dtype=torch.uint8),
        weight.new_empty(len(weight), weight.shape[1] // NF4_BLOCK, dtype=torch.float32),
    ),
)
def nf4_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize the blocks of a matrix (rows, columns).

    Returns:
        Bytes (rows, columns / 2), and the fp32 absolute maximum of each block (rows, columns / 64).
    """
    rows, columns = weight.shape
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    maxima = torch.empty(rows, columns // NF4_BLOCK, device=weight.device)
    levels = nf4_levels()
    bounds = (levels[:-1] + levels[1:]) / 2
    if loader.supports(weight):
        weight = weight.contiguous()
        code = loader.dtype_code(weight.dtype)
        pointers = (weight.data_ptr(), bounds.data_ptr(), codes.data_ptr(), maxima.data_ptr())
        loader.kernels().dw_quantize_nf4(code, *maxima.shape, *pointers)
        return codes, maxima
    chunk_rows = max(1, NF4_CHUNK_BLOCKS * NF4_BLOCK // columns)
    for first in range(0, rows, chunk_rows):
        part = slice(first, first + chunk_rows)
        codes[part], maxima[part] = nf4_blocks_reference(weight[part])
    return codes, maxima


def nf4_blocks_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Reference implementation of :func:`nf4_blocks`, with fp32 copies of the weight."""
    blocks = weight.float().view(-1, NF4_BLOCK)
    maxima = blocks.abs().amax(1)
    levels = nf4_levels().to(weight.device)
    low, high = _nearest_index(_divide_by_max(blocks, maxima), levels).view(-1, 2, NF4_BLOCK // 2).unbind(1)
    return (low | (high << 4)).view(len(weight), -1), maxima.view(len(weight), -1)


def _divide_by_max(numbers: Tensor, maxima: Tensor) -> Tensor:
    """Multiply rows by the inverse of their maximum. Rows with maximum 0 become 0."""
    return numbers * torch.where(maxima > 0, 1.0 / maxima, torch.zeros_like(maxima))[:, None]


def _nearest_index(numbers: Tensor, values: Tensor) -> Tensor:
    """Return the index of the nearest of ascending ``values`` for each number, as uint8."""
    return torch.bucketize(numbers, (values[:-1] + values[1:]) / 2).to(torch.uint8)


def _nf4(scales: Tensor, data: Tensor) -> Tensor:
    values = nf4_levels().to(data.device)[_split_nibbles(data.view(len(data), -1, NF4_BLOCK // 2)).int()]
    return (values.flatten(2) * scales[..., None]).flatten(1)


def _nf4_scales(weight: BlockWeight) -> Tensor:
    """Return the fp32 scale of each NF4 block (rows, columns / 64)."""
    absmax = weight.absmax
    group_scale = weight.group_scale
    offset = weight.offset
    assert absmax is not None and group_scale is not None and offset is not None
    groups = group_scale.repeat_interleave(NF4_GROUP)[: absmax.numel()].view(absmax.shape)
    return dynamic_codes().to(absmax.device)[absmax.int()] * groups + offset
