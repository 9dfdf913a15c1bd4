"""Checkpoint files round-trip, and damage is detected."""

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

TENSORS = {"a scalar": torch.tensor(3.5), "bf16": torch.randn(3, 5, dtype=torch.bfloat16)}
TENSORS |= {"fp32, transposed": torch.randn(4, 6).t(), "bytes": torch.arange(7, dtype=torch.uint8)}
TENSORS |= {"none": torch.zeros(0, 4), "whole numbers": torch.tensor([[1, -(2**40)]])}
TENSORS |= {"truths": torch.tensor([True, False])}


def write_test_checkpoint(parent, step=7, tensors=TENSORS, **values):
    return files.write_checkpoint(parent, step, values or {"list": [1, {"deep": None}], "text": "ü"}, tensors).publish()


def test_checkpoint_round_trip(tmp_path):
    path = write_test_checkpoint(tmp_path)
    assert path == tmp_path / "step-000007" and [p.name for p in tmp_path.iterdir()] == [path.name]
    checkpoint = files.read_checkpoint(path)
    assert checkpoint.step == 7 and checkpoint.values == {"step": 7, "list": [1, {"deep": None}], "text": "ü"}
    for tensors in (checkpoint.tensors, load_file(path / files.TENSORS)):  # safetensors can read them too
        assert tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(list(CODES)), st.lists(st.integers(0, 5), max_size=3))))
def test_tensors_of_any_type_and_shape_round_trip(tmp_path_factory, specs):
    tensors = {str(n): torch.ones(tuple(shape)).to(dtype) for n, (dtype, shape) in enumerate(specs)}
    path = write_test_checkpoint(tmp_path_factory.mktemp("any"), tensors=tensors)
    checkpoint = files.read_checkpoint(path).tensors
    assert all(torch.equal(checkpoint[name], tensor) for name, tensor in tensors.items())
    assert load_file(path / files.TENSORS).keys() == tensors.keys()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    **{f"{name} is {damage.__name__}": (name, damage)
       for name in (files.VALUES, files.TENSORS)
       for damage in (truncate, os.remove)},
    "no manifest": (files.MANIFEST, os.remove),
    "half a manifest": (files.MANIFEST, lambda p: p.write_text(p.read_text()[:40])),
    "an empty manifest": (files.MANIFEST, lambda p: p.write_text("")),
    "a manifest of something else": (files.MANIFEST, lambda p: p.write_text("[1, 2]")),
    "a manifest that is no text": (files.MANIFEST, lambda p: p.write_bytes(b"\xff\xfe\x00")),
    "another version": (files.MANIFEST, lambda p: p.write_text(p.read_text().replace("1,", "9,", 1))),
    "a file that is a folder": (files.TENSORS, lambda p: (os.remove(p), p.mkdir())),
}  # fmt: skip


def test_damage_is_detected(tmp_path):
    for number, (name, damage) in enumerate(DAMAGES.values()):
        path = write_test_checkpoint(tmp_path / str(number))
        damage(path / name)
        with pytest.raises(DamagedCheckpoint) as checkpoint:
            files.read_checkpoint(path)
        assert str(checkpoint.value)
    moved = shutil.copytree(write_test_checkpoint(tmp_path), tmp_path / "step-000009")
    with pytest.raises(DamagedCheckpoint, match="step 7"):
        files.read_checkpoint(moved)


def test_single_byte_damage_is_detected(tmp_path):
    """Changing a single byte of a file makes the checkpoint unreadable or leaves its content equal."""
    path = write_test_checkpoint(tmp_path, tensors={"one": torch.ones(3)})
    original = files.read_checkpoint(path)
    for name in (files.VALUES, files.TENSORS, files.MANIFEST):
        content = (path / name).read_bytes()
        for index in range(0, len(content), max(1, len(content) // 40)):
            damaged = bytearray(content)
            damaged[index] ^= 0x10
            (path / name).write_bytes(damaged)
            try:
                checkpoint = files.read_checkpoint(path)
            except DamagedCheckpoint:
                continue
            # For example another kind of white space in the manifest.
            assert checkpoint.values == original.values and torch.equal(checkpoint.tensors["one"], torch.ones(3))
        (path / name).write_bytes(content)


def test_full_disk_keeps_earlier_checkpoints(tmp_path, monkeypatch):
    before = write_test_checkpoint(tmp_path, step=1)
    for num_writes in range(4):
        errors = [None] * num_writes + [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", mock.Mock(side_effect=errors))
            with pytest.raises(OSError, match="No space"):
                write_test_checkpoint(tmp_path, step=2)
        assert [p.name for p in tmp_path.iterdir()] == [before.name] and files.read_checkpoint(before).step == 1
    assert files.read_checkpoint(write_test_checkpoint(tmp_path, step=2)).step == 2


def test_leftovers_are_deleted_and_checkpoints_kept(tmp_path, monkeypatch):
    path = write_test_checkpoint(tmp_path)
    files.write_checkpoint(tmp_path, 8, {}, TENSORS)  # never published
    hidden = tmp_path / f"{files.DELETED}step-000003-1"
    hidden.mkdir()
    (hidden / files.VALUES).write_text("{}")
    files.clear_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and files.read_checkpoint(path).step == 7
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)  # killed before the files are deleted
    files.delete_checkpoint(path)  # renames the folder first
    assert not path.exists() and all(p.name.startswith(files.DELETED) for p in tmp_path.iterdir())


def test_non_json_values_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_checkpoint(tmp_path, 1, {"loss": float("nan")}, {})
    assert not list(tmp_path.iterdir())


def test_step_is_parsed_from_folder_name():
    assert all(files.parse_step(files.folder_name(step)) == step for step in (12, 12_345_678))
    assert [files.parse_step(n) for n in ("step-", "step-x", "other", ".partial-step-000001-a", "step-٣")] == [None] * 5
