"""ctypes mirrors of the structs in ``csrc/block.h``, ``decode.h`` and ``blocks.h``.

The headers document the fields. The loader checks sizes and offsets against the compiled library.
"""

from __future__ import annotations

import ctypes

_P, _L, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    """Return ctypes field definitions from groups of space-separated names of one type."""
    return [(name, kind) for kind, names in groups for name in names.split()]


class Layer(ctypes.Structure):
    """A linear layer with its low-rank update."""

    _fields_ = _fields(
        (_P, "weight scale smooth bias A B"),
        (_L, "inputs outputs rank weight_type by_column bias_f32 in_blocks"),
        (_F, "scaling"),
    )


class RowNorm(ctypes.Structure):
    """A norm over the last dimension. ``used`` is 0 if the norm is absent."""

    _fields_ = _fields((_P, "weight bias"), (_F, "eps offset"), (_L, "centered used"))


class HalfNormsStruct(ctypes.Structure):
    """The norms of half a block."""

    _fields_ = _fields((RowNorm, "before after post"))


class BlockParts(ctypes.Structure):
    """A transformer block."""

    _fields_ = _fields(
        (_L, "type heads key_heads head_size activation window rotary_dims causal split gated parallel int8_gradients"),
        (_F, "scaling softcap"),
        (HalfNormsStruct, "first second"),
        (RowNorm, "query_norm key_norm"),
        (Layer, "query key value output gate up down"),
    )


class DecodeLinear(ctypes.Structure):
    """A linear layer of a decoder."""

    _fields_ = _fields((_P, "weight scale columns bias sums"), (_L, "inputs outputs type"))


class DecodeBlock(ctypes.Structure):
    """A block of a decoder."""

    _fields_ = _fields(
        (_L, "heads key_heads head_size activation window rotary_dims table split gated parallel cache_offset"),
        (_F, "scaling softcap"),
        (HalfNormsStruct, "first second"),
        (RowNorm, "query_norm key_norm"),
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
    """Low-rank factors of one layer."""

    _fields_ = _fields((_P, "A B"), (_L, "rank"))


class DecodeStep(ctypes.Structure):
    """Inputs and outputs of one decoding step."""

    _fields_ = _fields(
        (_P, "hidden positions sequence adapter page_table output_rows adapters pages out logits"),
        (_L, "rows sequences pages_per_sequence output_count adapter_count page_count"),
    )


class BlockData(ctypes.Structure):
    """A weight stored in blocks."""

    _fields_ = _fields((_P, "data absmax group_scale codes offset"))


# In the order of the struct numbers of dw_struct_layout.
MIRRORED_STRUCTS: tuple[type[ctypes.Structure], ...] = (
    *(Layer, RowNorm, HalfNormsStruct, BlockParts),
    *(DecodeLinear, DecodeBlock, DecodeModel, DecodeFactors, DecodeStep),
    BlockData,
)


def mismatched_struct(library: ctypes.CDLL) -> str | None:
    """Return the name of the first struct whose layout differs in the library, or None if all layouts agree."""
    max_fields = 64
    offsets = (_L * max_fields)()
    for struct_index, struct in enumerate(MIRRORED_STRUCTS):
        expected = [ctypes.sizeof(struct), *(getattr(struct, name).offset for name, *_ in struct._fields_)]
        count = library.dw_struct_layout(struct_index, offsets, max_fields)
        if list(offsets[: min(count, max_fields)]) != expected:
            return struct.__name__
    return None
