"""Weights of linear layers kept in blocks of a few bits: those of GGUF files, as they lie there, and NF4.

A row of a matrix is a row of blocks, each with a scale of its own. A weight's value is what its block says in
fp32, rounded to bf16: that is what products (``linear.py``) multiply with. Rows keep their bytes, so some of them, or
all in another order, are a weight again.

The formats of GGUF are llama.cpp's (ggml-quants). NF4 is QLoRA's (arXiv 2305.14314, appendix E) with double
quantization, to the values that bitsandbytes gives; only the order of the codes within a block is another:
the first 32 in the lower halves of its bytes, the last 32 in the upper ones, as GGUF has them.

Knows tensors; not files, modules or products. Each format has a reference implementation in torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.operators import unwatched
from deltaw.kernels.structs import BlockData
from deltaw.kernels.torch_private import without_dispatch

# Numbers of a matrix, row by row, whose scale in 8 bits has a common scale: 256 blocks of NF4.
NF4_GROUP = 256
NF4_BLOCK = 64
# Blocks that are rounded at a time: what they take in wide numbers on the way is some 16 times their bytes.
NF4_AT_ONCE = 1 << 14
_NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class BlockFormat:
    """A way to write numbers in blocks.

    Attributes:
        block: numbers in a block. bytes: what a block takes.
        number: the kernels' own number for it.
    """

    name: str
    block: int
    bytes: int
    number: int

    def bytes_of_row(self, columns: int) -> int:
        """Bytes of a row of so many numbers.

        Raises:
            ValueError: they are no whole number of blocks.
        """
        if columns % self.block:
            raise ValueError(f"{columns} numbers are not a whole number of {self.name} blocks of {self.block}")
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
    """A matrix (rows, columns) in blocks.

    Attributes:
        data: uint8 (rows, bytes of a row), contiguous.
        format: a name of :data:`FORMATS`.
        absmax: of NF4, uint8 (rows, columns / 64): which of :func:`dynamic_codes` a block's scale is, times
            its group's scale, plus ``offset``.
        group_scale: of NF4, fp32, one for each :data:`NF4_GROUP` blocks, row after row.
        offset: of NF4, fp32 (1).

    Raises:
        ValueError: the tensors are not those of such a matrix.
    """

    data: Tensor
    format: str
    columns: int
    absmax: Tensor | None = None
    group_scale: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"no block format '{self.format}'; there are {', '.join(FORMATS)}")
        _check(self.data, "a weight's blocks", torch.uint8, len(self.data), self.of.bytes_of_row(self.columns))
        if self.format != "NF4":
            return
        blocks = len(self.data) * (self.columns // NF4_BLOCK)
        _check(self.absmax, "NF4's scales", torch.uint8, len(self.data), self.columns // NF4_BLOCK)
        _check(self.group_scale, "the scales of NF4's groups", torch.float32, -(-blocks // NF4_GROUP))
        _check(self.offset, "the offset of NF4's scales", torch.float32, 1)

    @property
    def of(self) -> BlockFormat:
        """The format."""
        return FORMATS[self.format]

    @property
    def shape(self) -> torch.Size:
        """(rows, columns)."""
        return torch.Size((len(self.data), self.columns))

    @property
    def number(self) -> int:
        """The kernels' own number for the format."""
        return self.of.number

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """All that it is made of, the blocks first."""
        return self.data, self.absmax, self.group_scale, self.offset

    def described(self) -> BlockData:
        """The kernels' struct of it, which is good as long as its tensors are alive and lie where they do."""
        data, *others = self.tensors
        absmax, group_scale, offset = (None if t is None else t.data_ptr() for t in others)
        codes = dynamic_codes().data_ptr() if self.format == "NF4" else None
        return BlockData(data.data_ptr(), absmax, group_scale, codes, offset)

    def dequantized(self, dtype: torch.dtype, first_row: int = 0, last_row: int | None = None) -> Tensor:
        """Rows ``first_row`` up to but without ``last_row``, (n, columns): in fp32 as the blocks say, in
        other types rounded."""
        first_row, last_row, _ = slice(first_row, last_row).indices(len(self.data))
        if not self._serves(dtype):
            return reference_dequantize(self, dtype, first_row, last_row)
        return self._compiled(dtype, max(0, last_row - first_row), first_row, None)

    def rows_at(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows (…, columns) at these places (…), int64, as an embedding looks them up.

        Raises:
            IndexError: there is no such row.
        """
        flat = places.reshape(-1)
        if self._serves(dtype) and unwatched(places):
            rows = self._compiled(dtype, len(flat), 0, flat.contiguous())
        else:
            rows = _read(self, self.data.index_select(0, flat), flat, dtype)
        return rows.view(*places.shape, self.columns)

    def _serves(self, dtype: torch.dtype) -> bool:
        """Whether the compiled kernels read it."""
        if dtype not in (torch.float32, torch.bfloat16) or loader.library() is None:
            return False
        return unwatched(*(t for t in self.tensors if t is not None))

    def _compiled(self, dtype: torch.dtype, count: int, first: int, places: Tensor | None) -> Tensor:
        out, described = torch.empty(count, self.columns, dtype=dtype), self.described()
        loader.kernels().dw_dequantize(
            loader.number(dtype), self.number, ctypes.addressof(described), len(self.data), self.columns,
            first, loader.address(places), count, out.data_ptr(),
        )  # fmt: skip
        return out


def reference_dequantize(
    weight: BlockWeight, dtype: torch.dtype, first_row: int = 0, last_row: int | None = None
) -> Tensor:
    """The reference implementation of :meth:`BlockWeight.dequantized`."""
    rows = slice(first_row, last_row)
    return _read(weight, weight.data[rows], rows, dtype)


def _read(weight: BlockWeight, data: Tensor, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """The values of some rows, whose bytes are ``data``."""
    if weight.format == "NF4":
        return _nf4(_nf4_scales(weight)[rows], data).to(dtype)
    blocks = data.reshape(-1, weight.of.bytes)
    return _READERS[weight.format](blocks).reshape(len(data), weight.columns).to(dtype)


def _check(tensor: Tensor | None, what: str, dtype: torch.dtype, *sizes: int) -> None:
    if tensor is None or tensor.dtype != dtype or tensor.shape != sizes or not tensor.is_contiguous():
        found = "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{what} are {dtype} {sizes}, contiguous, not {found}")


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at a byte of each block, in fp32 (blocks, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _halves(codes: Tensor) -> Tensor:
    """The lower and then the upper four bits of bytes (…, n), as (…, 2, n)."""
    return torch.stack((codes & 15, codes >> 4), -2)


def _q4_0(blocks: Tensor) -> Tensor:
    return (_halves(blocks[:, 2:]).flatten(1).float() - 8) * _half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _halves(blocks[:, 4:]).flatten(1).float() * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _scales_of_8(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and what is subtracted, of 6 bits each, for the eight parts of a block of Q4_K or Q5_K, in
    fp32 (blocks, 8, 1); they stand in bytes 4 to 15."""
    low, high, joint = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((low & 63, (joint & 15) | ((low >> 6) << 4)), 1)
    below = torch.cat((high & 63, (joint >> 4) | ((high >> 6) << 4)), 1)
    return (scale * _half(blocks, 0))[..., None], (below * _half(blocks, 2))[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scale, below = _scales_of_8(blocks)
    codes = _halves(blocks[:, 16:].unflatten(1, (4, 32))).flatten(1, 2)
    return (codes.float() * scale - below).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scale, below = _scales_of_8(blocks)
    codes = _halves(blocks[:, 48:].unflatten(1, (4, 32))).flatten(1, 2)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    codes = codes | (((blocks[:, None, 16:48] >> shifts) & 1) << 4)
    return (codes.float() * scale - below).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    # Of each half of a block: 64 bytes of lower bits, 32 of upper ones, for four lines of 32 numbers.
    low = _halves(blocks[:, :128].unflatten(1, (2, 64))).reshape(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts) & 3
    scale = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks, 208)
    return (((low | (high << 4)).float() - 32).reshape(-1, 16, 16) * scale[..., None]).flatten(1)


_READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


@cache
def nf4_values() -> Tensor:
    """(16) in fp32: quantiles of the normal distribution, from -1 to 1, with 0 among them."""
    with without_dispatch():  # it is kept, so it has values where a dry run asks first too
        return torch.tensor(_NF4_VALUES)


@cache
def dynamic_codes() -> Tensor:
    """(256) in fp32, ascending, from -0.993 to 1: 8-bit numbers whose exponent takes as many bits as it needs
    (Dettmers, arXiv 1511.04561): for each of 7 powers of ten evenly spaced fractions, twice as many as for
    the one below; then 0 and 1."""
    values = [0.0, 1.0]
    with without_dispatch():  # as nf4_values
        for power in range(7):
            bounds = torch.linspace(0.1, 1, 2**power + 1)
            fractions = (10.0 ** (power - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
            values += [*fractions, *(-fraction for fraction in fractions)]
        return torch.tensor(sorted(values))


def quantize_nf4(weight: Tensor) -> BlockWeight:
    """A matrix (rows, columns), columns a multiple of 64, rounded to NF4: each number to the nearest of 16
    times its block's largest; these, less their mean, to the nearest of :func:`dynamic_codes` times the
    largest of their group.

    Raises:
        ValueError: its rows are not whole blocks.
    """
    rows, columns = weight.shape
    FORMATS["NF4"].bytes_of_row(columns)
    blocks = weight.detach().reshape(-1, NF4_BLOCK)
    largest = torch.empty(len(blocks), device=weight.device)
    data = torch.empty(len(blocks), NF4_BLOCK // 2, dtype=torch.uint8, device=weight.device)
    values = nf4_values().to(weight.device)
    for first in range(0, len(blocks), NF4_AT_ONCE):
        part = slice(first, first + NF4_AT_ONCE)
        wide = blocks[part].float()
        largest[part] = wide.abs().amax(1)
        low, high = _nearest(_over(wide, largest[part]), values).view(-1, 2, NF4_BLOCK // 2).unbind(1)
        data[part] = low | (high << 4)
    offset = largest.mean().reshape(1)
    absmax = torch.zeros(-(-len(largest) // NF4_GROUP) * NF4_GROUP, device=weight.device)
    absmax[: len(largest)] = largest - offset
    groups = absmax.view(-1, NF4_GROUP)
    group_scale = groups.abs().amax(1)
    eight_bits = _nearest(_over(groups, group_scale), dynamic_codes().to(weight.device)).flatten()
    of_blocks = eight_bits[: len(largest)].view(rows, -1).contiguous()
    return BlockWeight(data.view(rows, -1), "NF4", columns, of_blocks, group_scale, offset)


def _over(numbers: Tensor, largest: Tensor) -> Tensor:
    """Rows divided by their largest, as a product with its inverse; zeros where that is 0."""
    return numbers * torch.where(largest > 0, 1.0 / largest, torch.zeros_like(largest))[:, None]


def _nearest(numbers: Tensor, values: Tensor) -> Tensor:
    """Which of ascending values is nearest to each number, as uint8."""
    return torch.bucketize(numbers, (values[:-1] + values[1:]) / 2).to(torch.uint8)


def _nf4(scales: Tensor, data: Tensor) -> Tensor:
    values = nf4_values().to(data.device)[_halves(data.view(len(data), -1, NF4_BLOCK // 2)).int()]
    return (values.flatten(2) * scales[..., None]).flatten(1)


def _nf4_scales(weight: BlockWeight) -> Tensor:
    """The scale of each block of NF4 (rows, columns / 64), in fp32."""
    absmax, group_scale, offset = weight.absmax, weight.group_scale, weight.offset
    assert absmax is not None and group_scale is not None and offset is not None
    groups = group_scale.repeat_interleave(NF4_GROUP)[: absmax.numel()].view(absmax.shape)
    return dynamic_codes().to(absmax.device)[absmax.int()] * groups + offset


def rows_of(weight: BlockWeight, order: Tensor) -> BlockWeight:
    """The rows of these numbers, in this order, of a format of GGUF.

    Raises:
        ValueError: of NF4, whose groups are not of rows.
    """
    if weight.format == "NF4":
        raise ValueError("NF4's rows share scales, and cannot be put in another order")
    return replace(weight, data=weight.data.index_select(0, order))
