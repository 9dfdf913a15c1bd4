"""A checkpoint's files: what is read is what was written, and anything else is noticed."""

from __future__ import annotations

import errno
import os
import shutil
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from deltaw.runs import checkpoints as files
from deltaw.runs.checkpoints import DamagedCheckpoint
from deltaw.tensor_files import CODES

TENSORS = {
    "a scalar": torch.tensor(3.5),
    "bf16": torch.randn(3, 5, dtype=torch.bfloat16),
    "fp32, transposed": torch.randn(4, 6).t(),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "none": torch.zeros(0, 4),
    "whole numbers": torch.tensor([[1, -(2**40)]]),
    "truths": torch.tensor([True, False]),
}


def written(parent, step=7, tensors=TENSORS, **values):
    return files.write(parent, step, values or {"list": [1, {"deep": None}], "text": "ü"}, tensors).publish()


def test_what_is_read_is_what_was_written(tmp_path):
    path = written(tmp_path)
    assert path == tmp_path / "step-000007" and [p.name for p in tmp_path.iterdir()] == [path.name]
    found = files.read(path)
    assert found.step == 7 and found.values == {"step": 7, "list": [1, {"deep": None}], "text": "ü"}
    for tensors in (found.tensors, load_file(path / files.TENSORS)):  # the library reads them too
        assert tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(list(CODES)), st.lists(st.integers(0, 5), max_size=3))))
def test_tensors_of_any_type_and_shape(tmp_path_factory, made):
    tensors = {str(n): torch.ones(tuple(shape)).to(dtype) for n, (dtype, shape) in enumerate(made)}
    path = written(tmp_path_factory.mktemp("any"), tensors=tensors)
    found = files.read(path).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert load_file(path / files.TENSORS).keys() == tensors.keys()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    **{f"{name} is {what.__name__}": (name, what)
       for name in (files.VALUES, files.TENSORS)
       for what in (cut, os.remove)},
    "no manifest": (files.MANIFEST, os.remove),
    "half a manifest": (files.MANIFEST, lambda p: p.write_text(p.read_text()[:40])),
    "an empty manifest": (files.MANIFEST, lambda p: p.write_text("")),
    "a manifest of something else": (files.MANIFEST, lambda p: p.write_text("[1, 2]")),
    "a manifest that is no text": (files.MANIFEST, lambda p: p.write_bytes(b"\xff\xfe\x00")),
    "another version": (files.MANIFEST, lambda p: p.write_text(p.read_text().replace("1,", "9,", 1))),
    "a file that is a folder": (files.TENSORS, lambda p: (os.remove(p), p.mkdir())),
}  # fmt: skip


def test_any_damage_is_noticed(tmp_path):
    for number, (name, spoil) in enumerate(DAMAGES.values()):
        path = written(tmp_path / str(number))
        spoil(path / name)
        with pytest.raises(DamagedCheckpoint) as found:
            files.read(path)
        assert str(found.value)
    moved = shutil.copytree(written(tmp_path), tmp_path / "step-000009")
    with pytest.raises(DamagedCheckpoint, match="step 7"):
        files.read(moved)


def test_every_byte_counts(tmp_path):
    """Any single byte of the three files that is changed makes another checkpoint, or none."""
    path = written(tmp_path, tensors={"one": torch.ones(3)})
    whole = files.read(path)
    for name in (files.VALUES, files.TENSORS, files.MANIFEST):
        content = (path / name).read_bytes()
        for place in range(0, len(content), max(1, len(content) // 40)):
            changed = bytearray(content)
            changed[place] ^= 0x10
            (path / name).write_bytes(changed)
            try:
                found = files.read(path)
            except DamagedCheckpoint:
                continue
            # Such as a blank of the manifest that became another one.
            assert found.values == whole.values and torch.equal(found.tensors["one"], torch.ones(3))
        (path / name).write_bytes(content)


def test_a_disk_that_fills_up_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    before = written(tmp_path, step=1)
    for at in range(4):
        full = [None] * at + [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", mock.Mock(side_effect=full))
            with pytest.raises(OSError, match="No space"):
                written(tmp_path, step=2)
        assert [p.name for p in tmp_path.iterdir()] == [before.name]
        assert files.read(before).step == 1
    assert files.read(written(tmp_path, step=2)).step == 2


def test_what_killed_processes_left_is_cleared_and_checkpoints_stay(tmp_path, monkeypatch):
    path = written(tmp_path)
    files.write(tmp_path, 8, {}, TENSORS)  # never published
    hidden = tmp_path / f"{files.DELETED}step-000003-1"
    hidden.mkdir()
    (hidden / files.VALUES).write_text("{}")
    files.clear_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert files.read(path).step == 7
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)  # killed before the files were gone
    files.delete(path)  # takes the name first
    assert not path.exists() and all(p.name.startswith(files.DELETED) for p in tmp_path.iterdir())


def test_values_that_json_does_not_have_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write(tmp_path, 1, {"loss": float("nan")}, {})
    assert not list(tmp_path.iterdir())


def test_names_tell_steps():
    assert files.step_of(files.name_of(12)) == 12 and files.step_of(files.name_of(12_345_678)) == 12_345_678
    assert [files.step_of(n) for n in ("step-", "step-x", "other", ".partial-step-000001-a", "step-٣")] == [None] * 5
