"""A model's fingerprint by its files: every value counts, and files are read again only after a change."""

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

from deltaw import cache
from deltaw.hub import checkpoint
from deltaw.hub.loading import load
from deltaw.lora.fingerprint import Values, base_fingerprint, noted_values, same_base, values_of
from deltaw.runtime.quantized_weights import quantize_int8, quantize_nf4
from tests.byte_models import saved, tiny_llama
from tests.data.conftest import refusal
from tests.tiny_models import causal_model

FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    return saved(tiny_llama(hidden_size=64, intermediate_size=128), tmp_path / "model")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a file's tensors were hashed; what changed just now counts as unchanged for long."""
    calls: list[int] = []
    real = checkpoint.in_threads
    monkeypatch.setattr(checkpoint, "in_threads", lambda *of: calls.append(1) or real(*of))
    monkeypatch.setattr(cache, "SETTLED", -1.0)
    return calls


def loaded(folder: Path, precision: str = "bf16") -> PreTrainedModel:
    return load(str(folder), precision=precision, device="cpu", threads=1).model


def change_one_value(file: Path, name: str, place: int) -> None:
    """Change a value in a file whose size, inode and time of change of content stay."""
    before = file.stat()
    tensors = load_file(file)
    flat = tensors[name].view(-1)
    flat[place] = torch.nextafter(flat[place], flat[place] + 1)
    save_file(tensors, file.with_suffix(".new"), {"format": "pt"})
    with file.open("r+b") as out:
        out.write(file.with_suffix(".new").read_bytes())
    file.with_suffix(".new").unlink()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert all(getattr(after, what) == getattr(before, what) for what in ("st_size", "st_ino", "st_mtime_ns"))


def in_memory(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def assert_same_in_memory(model: PreTrainedModel, folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert same_base(base_fingerprint(model), base_fingerprint(in_memory(folder, dtype))) is True


@pytest.mark.parametrize(
    ("precision", "stored"), [("bf16", torch.float32), ("fp32", torch.float32), ("fp32", torch.bfloat16)]
)
def test_files_and_memory_give_one_fingerprint_in_any_type(folder: Path, stored, precision: str) -> None:
    in_memory(folder, stored).save_pretrained(folder)
    model = loaded(folder, precision)
    assert all(noted_values(p) is not None for p in model.parameters())
    assert_same_in_memory(model, folder)
    other = in_memory(folder, torch.bfloat16)
    with torch.no_grad():
        other.model.norm.weight[-1] += 0.1
    assert same_base(base_fingerprint(model), base_fingerprint(other)) is False


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma3"])
def test_renamed_tied_and_fused_tensors_are_those_in_memory(family: str, tmp_path: Path) -> None:
    """Experts are fused while they are loaded, so that no tensor of the files is theirs."""
    causal_model(family).save_pretrained(tmp_path)
    models = {precision: loaded(tmp_path, precision) for precision in ("fp32", "bf16")}
    for model in models.values():
        assert_same_in_memory(model, tmp_path)
    change_one_value(tmp_path / FILE, next(iter(load_file(tmp_path / FILE))), 3)
    assert base_fingerprint(loaded(tmp_path, "fp32")) != base_fingerprint(models["fp32"])


def test_a_file_is_read_once_until_it_changes_in_whatever_way(folder: Path, hashed: list[int]) -> None:
    own = base_fingerprint(loaded(folder))
    assert base_fingerprint(loaded(folder, "fp32")) == own and len(hashed) == 1
    names = list(load_file(folder / FILE))
    for place, name in ((0, names[0]), (-1, names[-1]), (5, names[len(names) // 2])):
        time.sleep(0.02)  # file systems tell times in steps of some milliseconds
        change_one_value(folder / FILE, name, place)
        changed = base_fingerprint(loaded(folder))
        assert same_base(changed, own) is False
        own = changed
    assert len(hashed) == 4


def test_a_file_that_is_swapped_while_a_model_is_loaded_is_refused(folder: Path) -> None:
    with checkpoint.reading_values(folder) as note:
        model = in_memory(folder)
        time.sleep(0.02)
        change_one_value(folder / FILE, "model.norm.weight", 0)
        assert "changes while it is read" in refusal(note, model).what


def test_how_files_are_divided_does_not_matter_and_one_that_was_just_written_is_not_remembered(
    folder: Path, tmp_path: Path
) -> None:
    """It might change again within the same tick of the file system's clock."""
    in_memory(folder).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert base_fingerprint(loaded(tmp_path / "shards")) == base_fingerprint(loaded(folder))
    assert not (cache.root() / "remembered" / "weights").exists()


def test_quantized_weights_count_with_the_values_that_they_were_made_of(folder: Path, monkeypatch) -> None:
    own = base_fingerprint(loaded(folder))
    int8, nf4 = loaded(folder), loaded(folder)
    monkeypatch.setattr("deltaw.lora.fingerprint.values_in_memory", lambda tensor: pytest.fail("it was read"))
    quantize_int8(int8.base_model)
    quantize_nf4(nf4.base_model)
    assert base_fingerprint(int8) == base_fingerprint(nf4) == own


def test_reading_ends_when_the_values_are_not_needed_any_more(folder: Path) -> None:
    over = threading.Event()
    over.set()
    with pytest.raises(CancelledError):
        checkpoint.values_in_folder(folder, over)
    assert not list(cache.root().rglob("remembered/**/*.json"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_files_are_not_mapped_while_they_are_hashed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mapped and read counts as memory of the process, and a plan does not have it."""
    maps: list[str] = []

    def spy(shape: object, pieces: Iterable[torch.Tensor]) -> Values:
        found = values_of(tuple(shape), pieces)  # type: ignore[arg-type]
        maps.append(Path("/proc/self/maps").read_text())
        return found

    monkeypatch.setattr(checkpoint, "values_of", spy)
    checkpoint.values_in_folder(folder)
    assert maps and not any(str(folder) in mapped for mapped in maps)
