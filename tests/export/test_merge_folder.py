"""The merged folder appears whole or not at all, and takes no more memory than it must."""

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
from deltaw.export.base import MergeOptions
from deltaw.export.merge import merge_run
from deltaw.export.output_folder import appearing
from tests.export.merge_cases import adapter_folder, assert_merged, base_folder, loaded, text_base


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("case")
    base = base_folder(folder / "base")
    return base, adapter_folder(base, folder / "adapter")


def test_a_folder_with_files_is_refused_and_replaced_only_when_asked(case: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    merge_run(case[1], out)  # empty: taken
    (out / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="holds files already"):
        merge_run(case[1], out)
    assert (out / "mine.txt").read_text() == "kept"
    merge_run(case[1], out, MergeOptions(overwrite=True))
    assert not (out / "mine.txt").exists() and (out / "model.safetensors").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        merge_run(case[1], tmp_path / "file")


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_a_dead_process_left_is_removed_and_said(dead: int, tmp_path: Path) -> None:
    left, other = tmp_path / f".out.partial-{dead}-abc", tmp_path / f".other.partial-{dead}-abc"
    alive, said = tmp_path / f".out.partial-{os.getppid()}-abc", []
    for folder in (left, other, alive):
        folder.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    with appearing(tmp_path / "out", say=said.append) as folder:
        (folder / "whole").write_text("yes")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "whole").read_text() == "yes"
    assert not left.exists() and other.exists() and alive.exists()
    assert any("left behind" in line for line in said) and any("another process" in line for line in said)


def test_a_folder_that_was_moved_away_comes_back(dead: int, tmp_path: Path) -> None:
    before = tmp_path / f".out.before-{dead}"
    before.mkdir()
    (before / "model").write_text("old")
    with pytest.raises(UserError, match="holds files already"), appearing(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "model").read_text() == "old"


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), appearing(tmp_path / "out") as folder:
        (folder / "half").write_text("no")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_refused_before_anything_is_written(case, tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(UserError, match="are free"):
        merge_run(case[1], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_hostile_weight_files_are_refused(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", max_shard_size="20KB")
    adapter = adapter_folder(base, tmp_path / "adapter")
    index, shard = base / "model.safetensors.index.json", next(iter(base.glob("model-*.safetensors")))
    whole, weights = index.read_bytes(), shard.read_bytes()
    name = next(iter(json.loads(whole)["weight_map"]))
    save_file({name: torch.zeros(1)}, tmp_path / "secret.safetensors")
    elsewhere = json.dumps({**json.loads(whole), "weight_map": {name: "../secret.safetensors"}}).encode()
    cases = [(index, elsewhere, "not in the model's folder"), (shard, weights[:-10], "damaged")]
    for file, content, what in (*cases, (shard, b"\xff" * 16, "damaged")):
        index.write_bytes(whole)
        file.write_bytes(content)
        with pytest.raises(UserError, match=what):
            merge_run(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


_MEASURED = """
import sys
from deltaw.export.merge import merge_run
from deltaw.machine.memory import peak_resident_bytes, resident_bytes
tiny, adapter, out = sys.argv[1:]
merge_run(tiny, out + "-tiny")  # what is imported late is imported now
before = resident_bytes()
open("/proc/self/clear_refs", "w").write("5")
merge_run(adapter, out)
print(peak_resident_bytes() - before)
"""


def printed(program: str, *arguments: object) -> list[str]:
    """The lines that a program writes, in a process of one thread."""
    environment, command = {**os.environ, "OMP_NUM_THREADS": "1"}, [sys.executable, "-c", program]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a peak is reset through Linux's /proc")
def test_merging_ten_shards_holds_at_most_one_of_them_and_200_mb(case: tuple[Path, Path], tmp_path: Path) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "max_position_embeddings": 64}
    base = text_base(tmp_path / "base", **wide)
    loaded(base).save_pretrained(base, max_shard_size="70MB")
    (base / "model.safetensors").unlink()
    shards = [file.stat().st_size for file in base.glob("model-*.safetensors")]
    adapter = adapter_folder(base, tmp_path / "adapter", rank=8)
    bound = max(shards) + (adapter / "adapter_model.safetensors").stat().st_size + 200e6
    assert len(shards) >= 10 and sum(shards) > 2 * bound, "else the whole model would fit into the bound"
    peak = int(printed(_MEASURED, case[1], adapter, tmp_path / "out")[-1])
    assert peak < bound, f"{peak / 1e6:.0f} MB of {bound / 1e6:.0f} MB"
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == len(shards)
    # Sums over 4,096 products in ten layers.
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

began = time.perf_counter()
os.waitpid(child(), 0)
seconds = time.perf_counter() - began
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
def test_killed_at_any_moment_no_folder_is_there_that_loads_as_something_else(case, tmp_path):
    base, adapter = case
    out = tmp_path / "out"
    merge_run(adapter, tmp_path / "whole")
    seen = printed(_KILLED, adapter, out)
    # Between two renames the folder is not there at all, and then comes back; it is never there in part.
    assert len(seen) == 20 and set(seen) <= {",".join(sorted(os.listdir(tmp_path / "whole"))), ""}
    merge_run(adapter, out, MergeOptions(overwrite=True))
    assert not list(tmp_path.glob(".*"))
    assert_merged(base, adapter, out)
