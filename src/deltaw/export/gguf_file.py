"""Writer of GGUF files, one tensor at a time and in any order. Files appear only when they are complete.

The ``gguf`` package writes the header. Offsets of tensors are computed from their shapes.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType

from deltaw.atomic_files import atomic_path
from deltaw.errors import UserError, did_you_mean
from deltaw.progress import track_progress

# The ``gguf`` package quantizes simple types but can only read K-quants. K-quants use the routine of ggml, from the
# library in the optional package ``xllamacpp``.


Q = GGMLQuantizationType
Mark = LlamaFileType
# Value of --type: type of matrices, type of the token embedding and the head, and file type in the metadata.
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
# llama.cpp reads these tensors only in fp32.
_ALWAYS_F32 = ("position_embd.weight", "v.position_embd.weight", "rope_freqs.weight")
# Norms, routers and convolutions.
_F32_ENDINGS = ("_norm.weight", ".ffn_gate_inp.weight", ".shortconv.conv.weight", ".ssm_conv1d.weight")
_OUTER = ("token_embd.weight", "output.weight")
_BLOCK_ROWS = 1 << 22  # elements that are packed at once


def require_kind(kind: str) -> None:
    """Raise a UserError if matrices cannot be stored as ``kind``."""
    if kind not in KINDS:
        raise UserError(f"matrices cannot be stored as '{kind}'", location="--type", hint=did_you_mean(kind, KINDS))
    if KINDS[kind][0] in _K_QUANTS:
        _ggml()


def storage_type(name: str, shape: tuple[int, ...], kind: str) -> Q:
    """Return the storage type of a tensor if matrices are stored as ``kind``.

    Norms, biases, positions, convolutions, routers and decays are stored in fp32. If rows are not divisible into blocks
    of the type, the fallback is Q8_0 for K-quants, otherwise F16.
    """
    if len(shape) < 2 or name in _ALWAYS_F32 or name.endswith(_F32_ENDINGS) or not name.endswith(".weight"):
        return Q.F32
    matrices, outer, _ = KINDS[kind]
    for candidate in (outer if name in _OUTER else matrices, Q.Q8_0):
        if shape[-1] % gguf.GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
        if candidate not in _K_QUANTS:
            break
    return Q.F16


def packed_shape(shape: tuple[int, ...], kind: Q) -> tuple[int, ...]:
    """Return the shape of the packed bytes of ``shape`` elements."""
    return tuple(gguf.quant_shape_to_byte_shape(shape, kind))


def pack(values: np.ndarray, kind: Q) -> np.ndarray:
    """Pack fp32 values (…, row) into bytes (…, bytes per row), some rows at a time."""
    if kind == Q.F32:
        return np.ascontiguousarray(values, np.float32)
    rows = values.reshape(-1, values.shape[-1])
    quantize = _pack_k if kind in _K_QUANTS else gguf.quants.quantize
    step = max(1, _BLOCK_ROWS // rows.shape[1])
    first = quantize(rows[:step], kind)
    packed = np.empty((rows.shape[0], *first.shape[1:]), first.dtype)
    packed[: len(first)] = first
    for start in range(step, len(rows), step):
        packed[start : start + step] = quantize(rows[start : start + step], kind)
    return packed.reshape(*values.shape[:-1], packed.shape[-1])


def _pack_k(rows: np.ndarray, kind: Q) -> np.ndarray:
    rows = np.ascontiguousarray(rows, np.float32)
    packed = np.empty(packed_shape(rows.shape, kind), np.uint8)
    _ggml()(int(kind), rows.ctypes.data, packed.ctypes.data, 0, rows.shape[0], rows.shape[1], None)
    return packed


@functools.cache
def _ggml() -> Callable[..., int]:
    """Return ``ggml_quantize_chunk``, after a check that its Q8_0 output equals that of the ``gguf`` package.

    Raises:
        UserError: if no library with the routine is installed, or its output differs.
    """
    hint = "pip install xllamacpp; or export --type f16 and run llama.cpp's llama-quantize on the file"
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError("K-quants need the package 'xllamacpp'", location="--type", hint=hint)
    module = importlib.import_module("xllamacpp.xllamacpp")
    try:
        routine = ctypes.CDLL(str(module.__file__)).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise UserError("this xllamacpp does not export ggml's quantization", location="--type", hint=hint) from error
    routine.restype = ctypes.c_size_t
    pointer = ctypes.c_void_p
    number = ctypes.c_int64
    routine.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    probe = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    expected = gguf.quants.quantize(probe, Q.Q8_0)
    actual = np.empty_like(expected)
    routine(int(Q.Q8_0), probe.ctypes.data, actual.ctypes.data, 0, 4, 64, None)
    if not np.array_equal(actual, expected):
        raise UserError("xllamacpp's quantization does not work as expected", location="--type", hint=hint)
    return routine


Shapes = Mapping[str, tuple[tuple[int, ...], GGMLQuantizationType]]
"""Shape (slowest dimension first) and storage type by tensor name."""

Tensors = Iterable[tuple[str, np.ndarray]]
"""(name, fp32 values) in any order, each name once."""


def write_gguf(path: Path, arch: str, metadata: Callable[[GGUFWriter], None], shapes: Shapes, tensors: Tensors) -> None:
    """Write a GGUF file atomically.

    Args:
        path: Path of the file.
        arch: Value of ``general.arch``.
        metadata: Function that adds the other metadata.
        shapes: Shapes of all tensors, in file order.
        tensors: Values of the tensors.

    Raises:
        UserError: if the folder is not writable.
        RuntimeError: if the tensors do not match ``shapes``.
    """
    with atomic_path(path) as temporary:
        out = GGUFWriter(temporary, arch)
        try:
            metadata(out)
            offsets: dict[str, int] = {}
            end = 0
            for name, (shape, kind) in shapes.items():
                size = int(np.prod(packed_shape(shape, kind)))
                out.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
                offsets[name] = end
                end += GGUFWriter.ggml_pad(size, out.data_alignment)
            out.write_header_to_file()
            out.write_kv_data_to_file()
            out.write_ti_data_to_file()
            assert out.fout is not None
            file = out.fout[0]
            data = GGUFWriter.ggml_pad(file.tell(), out.data_alignment)
            missing = set(shapes)
            with track_progress(f"writing {path.name}", len(shapes)) as advance:
                for name, values in tensors:
                    if name not in missing or values.shape != shapes[name][0]:
                        raise RuntimeError(f"unexpected tensor '{name}' {values.shape}")
                    missing.remove(name)
                    file.seek(data + offsets[name])
                    pack(values, shapes[name][1]).tofile(file)
                    advance(len(shapes) - len(missing))
            if missing:
                raise RuntimeError(f"{len(missing)} tensors were not written: {min(missing)}")
            file.truncate(data + end)
        finally:
            out.close()


def add_optional(add: Callable[[Any], object], value: object) -> None:
    """Write a value that is not None."""
    if value is not None:
        add(value)


def open_gguf(path: Path) -> GGUFReader:
    """Memory-map a GGUF file.

    Raises:
        UserError: if the file is damaged.
    """
    try:
        return GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        message = f"the .gguf file cannot be read: {error}"
        raise UserError(message, location=str(path), hint="download the file again") from error


def copy_metadata(reader: GGUFReader, out: GGUFWriter, *, include: Callable[[str], bool]) -> None:
    """Copy the metadata of another file for which ``include`` returns True, with unchanged types."""
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == gguf.Keys.General.ARCHITECTURE or not include(key):
            continue
        value = field.contents()
        is_array = field.types[0] == GGUFValueType.ARRAY
        if value or not is_array:  # GGUF does not support empty arrays
            out.add_key_value(key, value, field.types[0], field.types[-1] if is_array else None)
