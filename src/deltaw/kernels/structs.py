"""The structs of ``csrc/block.h``, ``decode.h`` and ``blocks.h`` as ctypes sees them, held to the library's.

Knows names and types of fields; what they mean is said there.
"""

from __future__ import annotations

import ctypes

_P, _L, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Layer(ctypes.Structure):
    """A linear layer with its update."""

    _fields_ = [
        *((name, _P) for name in ("weight", "scale", "smooth", "bias", "A", "B")),
        *((name, _L) for name in ("inputs", "outputs", "rank", "weight_type", "by_column")),
        *((name, _L) for name in ("bias_f32", "in_blocks")),
        ("scaling", _F),
    ]


class RowNorm(ctypes.Structure):
    """A norm over the last dimension, or none."""

    _fields_ = [
        *((name, _P) for name in ("weight", "bias")),
        *((name, _F) for name in ("eps", "offset")),
        *((name, _L) for name in ("centered", "used")),
    ]


class HalfNorms(ctypes.Structure):
    """The norms of a half of a block."""

    _fields_ = [(name, RowNorm) for name in ("before", "after", "post")]


class BlockParts(ctypes.Structure):
    """A transformer's block."""

    _fields_ = [
        *(
            (name, _L)
            for name in (
                *("type", "heads", "key_heads", "head_size", "activation", "window", "turned"),
                *("causal", "split", "gated", "parallel", "int8_gradients"),
            )
        ),
        *((name, _F) for name in ("scaling", "softcap")),
        *((name, HalfNorms) for name in ("first", "second")),
        *((name, RowNorm) for name in ("of_query", "of_key")),
        *((name, Layer) for name in ("query", "key", "value", "output", "gate", "up", "down")),
    ]


class DecodeLinear(ctypes.Structure):
    """A linear layer of a decoder."""

    _fields_ = [
        *((name, _P) for name in ("weight", "scale", "columns", "bias", "sums")),
        *((name, _L) for name in ("inputs", "outputs", "type")),
    ]


class DecodeBlock(ctypes.Structure):
    """A decoder's block."""

    _fields_ = [
        *(
            (name, _L)
            for name in (
                *("heads", "key_heads", "head_size", "activation", "window", "turned", "table"),
                *("split", "gated", "parallel", "cache_offset"),
            )
        ),
        *((name, _F) for name in ("scaling", "softcap")),
        *((name, HalfNorms) for name in ("first", "second")),
        *((name, RowNorm) for name in ("of_query", "of_key")),
        *((name, DecodeLinear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
    ]


class DecodeModel(ctypes.Structure):
    """A decoder."""

    _fields_ = [
        *((name, _P) for name in ("blocks", "cosines", "sines")),
        *(
            (name, _L)
            for name in (*("count", "tables", "positions", "hidden", "cache_type", "page_tokens", "page_numbers"),)
        ),
        *((name, _F) for name in ("logits_scale", "logits_softcap")),
        ("final_norm", RowNorm),
        ("head", DecodeLinear),
    ]


class DecodeFactors(ctypes.Structure):
    """The update of one layer, or none."""

    _fields_ = [("A", _P), ("B", _P), ("rank", _L)]


class DecodeStep(ctypes.Structure):
    """One step of a decoder."""

    _fields_ = [
        *(
            (name, _P)
            for name in (
                *("hidden", "positions", "sequence", "adapter", "page_table", "wanted", "adapters"),
                *("pages", "out", "logits"),
            )
        ),
        *((name, _L) for name in ("rows", "sequences", "most", "wanted_count", "adapter_count", "page_count")),
    ]


class BlockData(ctypes.Structure):
    """A weight in blocks."""

    _fields_ = [(name, _P) for name in ("data", "absmax", "group_scale", "codes", "offset")]


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
