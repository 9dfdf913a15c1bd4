"""A GGUF file written tensor by tensor, in any order, complete or not at all.

The ``gguf`` package writes the header; the places of the tensors' bytes follow from their shapes, so that one
tensor at a time is in memory. Knows the file format and no models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from deltaw.durable import replacing
from deltaw.errors import UserError
from deltaw.export.gguf_types import pack, packed_shape
from deltaw.working import working

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
        raise UserError(
            f"the .gguf file cannot be read: {error}", where=str(path), hint="fetch the file again"
        ) from error


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
