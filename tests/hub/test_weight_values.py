"""A model's fingerprint covers every value in its files, and files are hashed again only after a change."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltaw.cache import keys, results
from deltaw.hub import weight_digests
from deltaw.hub.loading import load
from deltaw.lora.fingerprint import TensorDigest, base_fingerprint, digest_pieces, recorded_digest, same_base
from deltaw.runtime.nf4 import quantize_nf4
from deltaw.runtime.quantized_weights import quantize_int8
from tests.byte_models import save_model, tiny_llama
from tests.data.conftest import refusal
from tests.tiny_models import causal_model

FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    return save_model(tiny_llama(hidden_size=64, intermediate_size=128), tmp_path / "model")


@pytest.fixture
def hash_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of times that tensors of a file were hashed. Recent changes are treated as old."""
    calls: list[int] = []
    real = weight_digests.map_in_threads
    monkeypatch.setattr(weight_digests, "map_in_threads", lambda *args: calls.append(1) or real(*args))
    monkeypatch.setattr(results, "MIN_FILE_AGE", -1.0)
    return calls


def load_model(folder: Path, precision: str = "bf16") -> PreTrainedModel:
    return load(str(folder), precision=precision, device="cpu", threads=1).model


def change_one_value(file: Path, name: str, index: int) -> None:
    """Change a value in a file without changing size, inode and modification time."""
    before = file.stat()
    tensors = load_file(file)
    flat = tensors[name].view(-1)
    flat[index] = torch.nextafter(flat[index], flat[index] + 1)
    save_file(tensors, file.with_suffix(".new"), {"format": "pt"})
    with file.open("r+b") as out:
        out.write(file.with_suffix(".new").read_bytes())
    file.with_suffix(".new").unlink()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert all(getattr(after, field) == getattr(before, field) for field in ("st_size", "st_ino", "st_mtime_ns"))


def load_reference(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def assert_matches_reference(model: PreTrainedModel, folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert same_base(base_fingerprint(model), base_fingerprint(load_reference(folder, dtype))) is True


@pytest.mark.parametrize(
    ("precision", "stored"), [("bf16", torch.float32), ("fp32", torch.float32), ("fp32", torch.bfloat16)]
)
def test_file_and_memory_fingerprints_match_in_any_dtype(folder: Path, stored, precision: str) -> None:
    load_reference(folder, stored).save_pretrained(folder)
    model = load_model(folder, precision)
    assert all(recorded_digest(p) is not None for p in model.parameters())
    assert_matches_reference(model, folder)
    other = load_reference(folder, torch.bfloat16)
    with torch.no_grad():
        other.model.norm.weight[-1] += 0.1
    assert same_base(base_fingerprint(model), base_fingerprint(other)) is False


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3"])
def test_renamed_tied_and_fused_tensors_match_memory(family: str, tmp_path: Path) -> None:
    """Experts are fused during loading, so their tensors are not in the files."""
    causal_model(family).save_pretrained(tmp_path)
    models = {precision: load_model(tmp_path, precision) for precision in ("fp32", "bf16")}
    for model in models.values():
        assert_matches_reference(model, tmp_path)
    change_one_value(tmp_path / FILE, next(iter(load_file(tmp_path / FILE))), 3)
    assert base_fingerprint(load_model(tmp_path, "fp32")) != base_fingerprint(models["fp32"])


def test_file_is_hashed_once_until_it_changes(folder: Path, hash_calls: list[int]) -> None:
    previous = base_fingerprint(load_model(folder))
    assert base_fingerprint(load_model(folder, "fp32")) == previous and len(hash_calls) == 1
    names = list(load_file(folder / FILE))
    for index, name in ((0, names[0]), (-1, names[-1]), (5, names[len(names) // 2])):
        time.sleep(0.02)  # timestamps of file systems have a resolution of milliseconds
        change_one_value(folder / FILE, name, index)
        changed = base_fingerprint(load_model(folder))
        assert same_base(changed, previous) is False
        previous = changed
    assert len(hash_calls) == 4


def test_file_change_during_loading_is_rejected(folder: Path) -> None:
    with weight_digests.hash_in_background(folder) as note:
        model = load_reference(folder)
        time.sleep(0.02)
        change_one_value(folder / FILE, "model.norm.weight", 0)
        assert "changes while it is read" in refusal(note, model).message


def test_sharding_does_not_matter_and_new_files_are_not_cached(folder: Path, tmp_path: Path) -> None:
    """A recently written file could change again within the same tick of the file system clock."""
    load_reference(folder).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert base_fingerprint(load_model(tmp_path / "shards")) == base_fingerprint(load_model(folder))
    assert not (keys.root() / "remembered" / "weights").exists()


def test_quantized_weights_have_the_original_fingerprint(folder: Path, monkeypatch) -> None:
    expected = base_fingerprint(load_model(folder))
    int8 = load_model(folder)
    nf4 = load_model(folder)
    monkeypatch.setattr("deltaw.lora.fingerprint.digest_tensor", lambda tensor: pytest.fail("it was read"))
    quantize_int8(int8.base_model)
    quantize_nf4(nf4.base_model)
    assert base_fingerprint(int8) == base_fingerprint(nf4) == expected


def test_hashing_stops_when_cancelled(folder: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(CancelledError):
        weight_digests.folder_digests(folder, stop)
    assert not list(keys.root().rglob("remembered/**/*.json"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_files_are_not_mapped_during_hashing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped pages count as memory of the process, but are not part of the plan."""
    maps: list[str] = []

    def spy(shape: object, pieces: Iterable[torch.Tensor]) -> TensorDigest:
        digest = digest_pieces(tuple(shape), pieces)  # type: ignore[arg-type]
        maps.append(Path("/proc/self/maps").read_text())
        return digest

    monkeypatch.setattr(weight_digests, "digest_pieces", spy)
    weight_digests.folder_digests(folder)
    assert maps and not any(str(folder) in mapped for mapped in maps)
