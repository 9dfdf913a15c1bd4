"""A GGUF file written tensor by tensor, in any order, complete or not at all.

The ``gguf`` package writes the header; the places of the tensors' bytes follow from their shapes, so that one
tensor at a time is in memory. Knows the file format and no models.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType

from deltaw.durable import replacing
from deltaw.errors import UserError, did_you_mean
from deltaw.working import working

# How numbers are stored: the ``gguf`` package packs the plain types; K-quants it only reads, so ggml's own routine
# packs those, through the library that the optional package ``xllamacpp`` carries. Knows arrays, no models.


Q = GGMLQuantizationType
Mark = LlamaFileType
# By what a user writes: the type of matrices, of the token embedding and the head, and the file's own mark.
KINDS: dict[str, tuple[Q, Q, Mark]] = {
    "f32": (Q.F32, Q.F32, Mark.ALL_F32),
    "f16": (Q.F16, Q.F16, Mark.MOSTLY_F16),
    "bf16": (Q.BF16, Q.BF16, Mark.MOSTLY_BF16),
    "q8_0": (Q.Q8_0, Q.Q8_0, Mark.MOSTLY_Q8_0),
    "q5_0": (Q.Q5_0, Q.Q8_0, Mark.MOSTLY_Q5_0),
    "q5_1": (Q.Q5_1, Q.Q8_0, Mark.MOSTLY_Q5_1),
    "q4_0": (Q.Q4_0, Q.Q8_0, Mark.MOSTLY_Q4_0),
    "q4_1": (Q.Q4_1, Q.Q8_0, Mark.MOSTLY_Q4_1),
    "q6_k": (Q.Q6_K, Q.Q6_K, Mark.MOSTLY_Q6_K),
    "q5_k": (Q.Q5_K, Q.Q6_K, Mark.MOSTLY_Q5_K_S),
    "q4_k": (Q.Q4_K, Q.Q6_K, Mark.MOSTLY_Q4_K_S),
}
ADAPTER_KINDS = ("f32", "f16", "bf16")
_K_QUANTS = (Q.Q4_K, Q.Q5_K, Q.Q6_K)
# llama.cpp reads these in fp32 alone, however the rest is stored.
_ALWAYS_F32 = ("position_embd.weight", "rope_freqs.weight")
_OUTER = ("token_embd.weight", "output.weight")
_BLOCK_ROWS = 1 << 22  # numbers that are packed at a time


def require_kind(kind: str) -> None:
    """Raise a UserError unless matrices can be stored as ``kind`` here."""
    if kind not in KINDS:
        raise UserError(f"matrices cannot be stored as '{kind}'", where="--type", hint=did_you_mean(kind, KINDS))
    if KINDS[kind][0] in _K_QUANTS:
        _ggml()


def type_of(name: str, shape: tuple[int, ...], kind: str) -> Q:
    """The type that tensor ``name`` is stored as, where matrices are stored as ``kind``.

    Norms, biases and positions stay in fp32. A row that does not divide into a type's blocks gets the nearest
    type that it does divide into: Q8_0 where a K-quant was asked for, else F16.
    """
    if len(shape) < 2 or name in _ALWAYS_F32 or name.endswith("_norm.weight"):
        return Q.F32
    matrices, outer, _ = KINDS[kind]
    wanted = outer if name in _OUTER else matrices
    for candidate in (wanted, Q.Q8_0):
        if shape[-1] % gguf.GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
        if candidate not in _K_QUANTS:
            break
    return Q.F16


def packed_shape(shape: tuple[int, ...], kind: Q) -> tuple[int, ...]:
    """The shape of the bytes that hold ``shape`` numbers."""
    return tuple(gguf.quant_shape_to_byte_shape(shape, kind))


def pack(numbers: np.ndarray, kind: Q) -> np.ndarray:
    """fp32 numbers (…, row) as bytes (…, bytes of a row), some rows at a time."""
    if kind == Q.F32:
        return np.ascontiguousarray(numbers, np.float32)
    rows = numbers.reshape(-1, numbers.shape[-1])
    one = _pack_k if kind in _K_QUANTS else gguf.quants.quantize
    step = max(1, _BLOCK_ROWS // rows.shape[1])
    first = one(rows[:step], kind)
    packed = np.empty((rows.shape[0], *first.shape[1:]), first.dtype)
    packed[: len(first)] = first
    for start in range(step, len(rows), step):
        packed[start : start + step] = one(rows[start : start + step], kind)
    return packed.reshape(*numbers.shape[:-1], packed.shape[-1])


def _pack_k(rows: np.ndarray, kind: Q) -> np.ndarray:
    rows = np.ascontiguousarray(rows, np.float32)
    packed = np.empty(packed_shape(rows.shape, kind), np.uint8)
    _ggml()(int(kind), rows.ctypes.data, packed.ctypes.data, 0, rows.shape[0], rows.shape[1], None)
    return packed


@functools.cache
def _ggml() -> Callable[..., int]:
    """``ggml_quantize_chunk``, once it has packed Q8_0 to the byte as the ``gguf`` package does.

    Raises:
        UserError: no library with it is installed, or it does something else.
    """
    hint = "pip install xllamacpp; or export --type f16 and run llama.cpp's llama-quantize on the file"
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError("K-quants need the package 'xllamacpp'", where="--type", hint=hint)
    module = importlib.import_module("xllamacpp.xllamacpp")
    try:
        routine = ctypes.CDLL(str(module.__file__)).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise UserError("this xllamacpp does not export ggml's quantization", where="--type", hint=hint) from error
    routine.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    routine.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    probe = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    expected = gguf.quants.quantize(probe, Q.Q8_0)
    found = np.empty_like(expected)
    routine(int(Q.Q8_0), probe.ctypes.data, found.ctypes.data, 0, 4, 64, None)
    if not np.array_equal(found, expected):
        raise UserError("xllamacpp's quantization does not work as expected", where="--type", hint=hint)
    return routine


Shapes = Mapping[str, tuple[tuple[int, ...], GGMLQuantizationType]]
"""By a tensor's name: its shape, slowest dimension first, and how it is stored."""

Tensors = Iterable[tuple[str, np.ndarray]]
"""(name, fp32 numbers) in any order; each name once."""


def write_gguf(
    path: Path, architecture: str, metadata: Callable[[GGUFWriter], None], shapes: Shapes, tensors: Tensors
) -> int:
    """Write a file; it appears under its name when it is complete.

    Args:
        path: of the file.
        architecture: as in ``general.architecture``.
        metadata: adds the rest of the metadata.
        shapes: of all tensors, in the order in which they lie in the file.
        tensors: their numbers.

    Returns:
        The size in bytes.

    Raises:
        UserError: the folder cannot be written to.
        RuntimeError: the tensors are not those that were announced.
    """
    with replacing(path) as temporary:
        out = GGUFWriter(temporary, architecture)
        try:
            metadata(out)
            places: dict[str, int] = {}
            end = 0
            for name, (shape, kind) in shapes.items():
                size = int(np.prod(packed_shape(shape, kind)))
                out.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
                places[name] = end
                end += GGUFWriter.ggml_pad(size, out.data_alignment)
            out.write_header_to_file()
            out.write_kv_data_to_file()
            out.write_ti_data_to_file()
            assert out.fout is not None
            file = out.fout[0]
            data = GGUFWriter.ggml_pad(file.tell(), out.data_alignment)
            missing = set(shapes)
            with working(f"writing {path.name}", len(shapes)) as advance:
                for name, numbers in tensors:
                    if name not in missing or numbers.shape != shapes[name][0]:
                        raise RuntimeError(f"tensor '{name}' {numbers.shape} was not announced")
                    missing.remove(name)
                    file.seek(data + places[name])
                    pack(numbers, shapes[name][1]).tofile(file)
                    advance(len(shapes) - len(missing))
            if missing:
                raise RuntimeError(f"{len(missing)} tensors were announced and not written: {min(missing)}")
            file.truncate(data + end)
        finally:
            out.close()
    return path.stat().st_size


def open_gguf(path: Path) -> GGUFReader:
    """Map a file.

    Raises:
        UserError: it is damaged.
    """
    try:
        return GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        what = f"the .gguf file cannot be read: {error}"
        raise UserError(what, where=str(path), hint="fetch the file again") from error


def copy_metadata(reader: GGUFReader, out: GGUFWriter, *, keep: Callable[[str], bool]) -> None:
    """Write the metadata of another file whose keys are to be kept, type for type."""
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == gguf.Keys.General.ARCHITECTURE or not keep(key):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        value = field.contents()
        if kind == GGUFValueType.ARRAY and not value:
            continue  # the format has no empty arrays
        out.add_key_value(key, value, kind, inner)
