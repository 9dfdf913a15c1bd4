"""Tests that a merged folder is written atomically and with bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from deltaw.errors import UserError
from deltaw.export import output_folder
from deltaw.export.merge import merge_run
from deltaw.export.merge_plan import MergeOptions
from deltaw.export.output_folder import atomic_folder
from tests.export.merge_cases import adapter_folder, assert_merged, base_folder, load_model, text_base


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("case")
    base = base_folder(folder / "base")
    return base, adapter_folder(base, folder / "adapter")


def test_nonempty_folder_is_replaced_only_with_overwrite(case: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    merge_run(case[1], out)  # an empty folder is accepted
    (out / "mine.txt").write_text("content")
    with pytest.raises(UserError, match="already contains files"):
        merge_run(case[1], out)
    assert (out / "mine.txt").read_text() == "content"
    merge_run(case[1], out, MergeOptions(overwrite=True))
    assert not (out / "mine.txt").exists() and (out / "model.safetensors").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        merge_run(case[1], tmp_path / "file")


@pytest.fixture(scope="module")
def dead_pid() -> int:
    """Return the id of a process that has exited."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_leftovers_of_dead_processes_are_removed_and_logged(dead_pid: int, tmp_path: Path) -> None:
    stale = tmp_path / f".out.partial-{dead_pid}-abc"
    other = tmp_path / f".other.partial-{dead_pid}-abc"
    alive = tmp_path / f".out.partial-{os.getppid()}-abc"
    lines = []
    for folder in (stale, other, alive):
        folder.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    with atomic_folder(tmp_path / "out", log=lines.append) as folder:
        (folder / "complete").write_text("yes")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "complete").read_text() == "yes"
    assert not stale.exists() and other.exists() and alive.exists()
    assert any("interrupted process" in line for line in lines) and any("another process" in line for line in lines)


def test_folder_moved_by_dead_process_is_restored(dead_pid: int, tmp_path: Path) -> None:
    before = tmp_path / f".out.before-{dead_pid}"
    before.mkdir()
    (before / "model").write_text("old")
    with pytest.raises(UserError, match="already contains files"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "model").read_text() == "old"


def test_error_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("no")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_insufficient_disk_space_is_rejected_before_writing(case, tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(UserError, match="are free"):
        merge_run(case[1], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_malicious_weight_files_are_rejected(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", max_shard_size="20KB")
    adapter = adapter_folder(base, tmp_path / "adapter")
    index = base / "model.safetensors.index.json"
    shard = next(iter(base.glob("model-*.safetensors")))
    index_content = index.read_bytes()
    weights = shard.read_bytes()
    name = next(iter(json.loads(index_content)["weight_map"]))
    save_file({name: torch.zeros(1)}, tmp_path / "secret.safetensors")
    outside = json.dumps({**json.loads(index_content), "weight_map": {name: "../secret.safetensors"}}).encode()
    cases = [(index, outside, "not in the model's folder"), (shard, weights[:-10], "damaged")]
    for file, content, message in (*cases, (shard, b"\xff" * 16, "damaged")):
        index.write_bytes(index_content)
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            merge_run(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


_MEASURED = """
import sys
from deltaw.export.merge import merge_run
from deltaw.machine.memory import peak_resident_bytes, resident_bytes
tiny, adapter, out = sys.argv[1:]
merge_run(tiny, out + "-tiny")  # loads all lazy imports
before = resident_bytes()
open("/proc/self/clear_refs", "w").write("5")
merge_run(adapter, out)
print(peak_resident_bytes() - before)
"""


def program_output(program: str, *arguments: object) -> list[str]:
    """Run a program in a single-threaded process and return its output lines."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    command += map(str, arguments)
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return process.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a peak is reset through Linux's /proc")
def test_peak_memory_of_merge_is_one_shard_plus_200_mb(case: tuple[Path, Path], tmp_path: Path) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "max_position_embeddings": 64}
    base = text_base(tmp_path / "base", **wide)
    load_model(base).save_pretrained(base, max_shard_size="70MB")
    (base / "model.safetensors").unlink()
    shards = [file.stat().st_size for file in base.glob("model-*.safetensors")]
    adapter = adapter_folder(base, tmp_path / "adapter", rank=8)
    bound = max(shards) + (adapter / "adapter_model.safetensors").stat().st_size + 200e6
    assert len(shards) >= 10 and sum(shards) > 2 * bound, "the bound must be smaller than the model"
    peak = int(program_output(_MEASURED, case[1], adapter, tmp_path / "out")[-1])
    assert peak < bound, f"{peak / 1e6:.0f} MB of {bound / 1e6:.0f} MB"
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == len(shards)
    # Tolerance for sums of 4,096 products in ten layers.
    assert_merged(base, adapter, tmp_path / "out", 1e-4)


_KILLED = """
import os, random, signal, sys, time
from deltaw.export.base import MergeOptions
from deltaw.export.merge import merge_run
adapter, out = sys.argv[1:]

def child():
    number = os.fork()
    if number == 0:
        try:
            merge_run(adapter, out, MergeOptions(overwrite=True))
        finally:
            os._exit(0)
    return number

started = time.perf_counter()
os.waitpid(child(), 0)
seconds = time.perf_counter() - started
random.seed(0)
for moment in range(20):
    number = child()
    time.sleep(random.uniform(0, seconds))
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    names = sorted(os.listdir(out)) if os.path.isdir(out) else []
    print(",".join(names), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed by a signal")
def test_killed_merge_never_leaves_partial_folder(case, tmp_path):
    base, adapter = case
    out = tmp_path / "out"
    merge_run(adapter, tmp_path / "full")
    listings = program_output(_KILLED, adapter, out)
    # Between two renames the folder may be missing, but it never exists partially.
    assert len(listings) == 20 and set(listings) <= {",".join(sorted(os.listdir(tmp_path / "full"))), ""}
    merge_run(adapter, out, MergeOptions(overwrite=True))
    assert not list(tmp_path.glob(".*"))
    assert_merged(base, adapter, out)
