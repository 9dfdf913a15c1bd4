"""Tensors in safetensors files are compatible with the safetensors library in both directions."""

from __future__ import annotations

import io
import os
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deltaw.errors import UserError
from deltaw.tensor_files import CODES, TensorEntry, TensorFile, TensorWriter, read_header, save_tensors, write_tensors

TENSORS = {"wide": torch.randn(5, 3), "scalar": torch.tensor(2.5), "narrow": torch.randn(7, 2).bfloat16()}
TENSORS |= {"empty": torch.zeros(0, 4, dtype=torch.bfloat16), "numbers": torch.arange(3, dtype=torch.int8)}
TENSORS |= {"trained": torch.nn.Parameter(torch.randn(2, 2)), "transposed": torch.randn(4, 6).t()}


def test_library_reads_saved_files(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "made.safetensors"
    save_tensors(path, TENSORS, {"format": "pt", "key": "ü"})
    read = load_file(path)
    opened = TensorFile(path)
    assert read.keys() == opened.keys() == TENSORS.keys() and opened.metadata == {"format": "pt", "key": "ü"}
    for name, tensor in TENSORS.items():
        assert read[name].dtype == opened[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor) and torch.equal(opened[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == opened.metadata
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    path = tmp_path / "made.safetensors"
    tensors = {name: tensor.detach().contiguous() for name, tensor in TENSORS.items()}
    save_file(tensors, path, {"format": "pt"})
    file = TensorFile(path)
    stored = read_header(path)
    for name, tensor in tensors.items():
        assert torch.equal(file[name], tensor) and torch.equal(stored[name].load(), tensor), name
    assert torch.equal(stored["wide"].rows(1, 3), tensors["wide"][1:3])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(CODES)), st.lists(st.integers(0, 5), max_size=3))))
def test_every_tensor_is_aligned_to_its_item_size(tmp_path_factory, entries) -> None:
    path = tmp_path_factory.mktemp("any") / "made.safetensors"
    save_tensors(path, {str(n): torch.ones(shape).to(dtype) for n, (dtype, shape) in enumerate(entries)}, {})
    for tensor in read_header(path).values():
        assert tensor.start % tensor.dtype.itemsize == 0


def test_equal_content_produces_equal_files(tmp_path: Path) -> None:
    """The order of metadata in files of the library varies between calls."""
    metadata = {f"key {number}": "ü" * number for number in range(9)}
    first = tmp_path / "one"
    second = tmp_path / "other"
    save_tensors(first, TENSORS, metadata)
    save_tensors(second, dict(reversed(TENSORS.items())), dict(reversed(metadata.items())))
    assert first.read_bytes() == second.read_bytes()


def test_writing_does_not_copy_the_tensors() -> None:
    """A full copy would be 64 MB. Buffers of NumPy and Python are traced, and torch allocates none."""

    tensors = {str(n): torch.ones(1 << 20) for n in range(16)}
    with open(os.devnull, "wb") as file:
        tracemalloc.start()
        write_tensors(file, tensors, {})
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1 << 20


def test_all_declared_tensors_must_be_written() -> None:
    entries = [TensorEntry("a", torch.float32, (5, 3)), TensorEntry("b", torch.int8, (2,))]
    with pytest.raises(ValueError, match="were not written"), TensorWriter(io.BytesIO(), entries, {}) as writer:
        writer.write(torch.ones(5, 3))
    with pytest.raises(ValueError, match="wider types"):
        TensorWriter(io.BytesIO(), entries[::-1], {})


def test_truncated_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "made.safetensors"
    save_tensors(path, TENSORS, {})
    for size in (path.stat().st_size - 1, 40, 5, 0):
        os.truncate(path, size)
        with pytest.raises(UserError, match="damaged"):
            read_header(path)
        with pytest.raises(ValueError):
            TensorFile(path)


def test_nested_header_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "made.safetensors"
    header = b"[" * 200_000
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="nested too deeply"):
        read_header(path)


def test_failed_write_keeps_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "made.safetensors"
    save_tensors(path, {"old": torch.ones(2)}, {})
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(TensorWriter, "write", full)
    with pytest.raises(OSError, match="No space"):
        save_tensors(path, TENSORS, {})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert set(TensorFile(path)) == {"old"}
