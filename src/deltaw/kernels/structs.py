"""The structs of ``csrc/block.h``, ``decode.h`` and ``blocks.h`` as ctypes sees them, held to the library's.

Knows names and types of fields; what they mean is said there.
"""

from __future__ import annotations

import ctypes

_P, _L, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    """The fields of a struct, from names of one type at a time."""
    return [(name, kind) for kind, names in groups for name in names.split()]


class Layer(ctypes.Structure):
    """A linear layer with its update."""

    _fields_ = _fields(
        (_P, "weight scale smooth bias A B"),
        (_L, "inputs outputs rank weight_type by_column bias_f32 in_blocks"),
        (_F, "scaling"),
    )


class RowNorm(ctypes.Structure):
    """A norm over the last dimension, or none."""

    _fields_ = _fields((_P, "weight bias"), (_F, "eps offset"), (_L, "centered used"))


class HalfNorms(ctypes.Structure):
    """The norms of a half of a block."""

    _fields_ = _fields((RowNorm, "before after post"))


class BlockParts(ctypes.Structure):
    """A transformer's block."""

    _fields_ = _fields(
        (_L, "type heads key_heads head_size activation window turned causal split gated parallel int8_gradients"),
        (_F, "scaling softcap"),
        (HalfNorms, "first second"),
        (RowNorm, "of_query of_key"),
        (Layer, "query key value output gate up down"),
    )


class DecodeLinear(ctypes.Structure):
    """A linear layer of a decoder."""

    _fields_ = _fields((_P, "weight scale columns bias sums"), (_L, "inputs outputs type"))


class DecodeBlock(ctypes.Structure):
    """A decoder's block."""

    _fields_ = _fields(
        (_L, "heads key_heads head_size activation window turned table split gated parallel cache_offset"),
        (_F, "scaling softcap"),
        (HalfNorms, "first second"),
        (RowNorm, "of_query of_key"),
        (DecodeLinear, "query key value output gate up down"),
    )


class DecodeModel(ctypes.Structure):
    """A decoder."""

    _fields_ = _fields(
        (_P, "blocks cosines sines"),
        (_L, "count tables positions hidden cache_type page_tokens page_numbers"),
        (_F, "logits_scale logits_softcap"),
        (RowNorm, "final_norm"),
        (DecodeLinear, "head"),
    )


class DecodeFactors(ctypes.Structure):
    """The update of one layer, or none."""

    _fields_ = _fields((_P, "A B"), (_L, "rank"))


class DecodeStep(ctypes.Structure):
    """One step of a decoder."""

    _fields_ = _fields(
        (_P, "hidden positions sequence adapter page_table wanted adapters pages out logits"),
        (_L, "rows sequences most wanted_count adapter_count page_count"),
    )


class BlockData(ctypes.Structure):
    """A weight in blocks."""

    _fields_ = _fields((_P, "data absmax group_scale codes offset"))


# In the order of the library's own numbers.
MIRRORED: tuple[type[ctypes.Structure], ...] = (
    *(Layer, RowNorm, HalfNorms, BlockParts),
    *(DecodeLinear, DecodeBlock, DecodeModel, DecodeFactors, DecodeStep),
    BlockData,
)


def differing(library: ctypes.CDLL) -> str | None:
    """The name of the first struct that the library lays out otherwise; None where all agree."""
    most = 64
    found = (_L * most)()
    for which, struct in enumerate(MIRRORED):
        ours = [ctypes.sizeof(struct), *(getattr(struct, name).offset for name, *_ in struct._fields_)]
        count = library.dw_layout_of(which, found, most)
        if list(found[: min(count, most)]) != ours:
            return struct.__name__
    return None
