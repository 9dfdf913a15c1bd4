"""Hundreds of generated bad inputs (:mod:`tests.cli.bad_inputs`): each ends with status 2 and a message that
names the place; nothing is written, and a finished run is not touched.

A few of every family are always tested, all of them with ``-m slow``.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.cli import bad_inputs
from tests.cli.bad_inputs import Bench
from tests.cli.conftest import Call, tree

FEW = 2  # of each family
CASES = [pytest.param(*case, marks=[pytest.mark.slow] * (case[1] >= FEW)) for case in bad_inputs.every_case()]
assert len(CASES) >= 300


@pytest.fixture
def bench(tmp_path: Path, model_folder: Path, rows_file: Path, finished_run: Path) -> Bench:
    (tmp_path / "case").mkdir()
    return Bench(tmp_path / "case", model_folder, rows_file, finished_run)


@pytest.fixture
def earlier(tmp_path: Path, finished_run: Path) -> Path:
    """A finished run in the folder that bad runs are to be written to."""
    return Path(shutil.copytree(finished_run, tmp_path / "earlier"))


def tree_of(folder: Path) -> dict[str, bytes | None]:
    """Files with their content, and folders and links by name."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_bad_inputs(name: str, seed: int, bench: Bench, earlier: Path, call: Call, monkeypatch) -> None:
    bad = bad_inputs.make(name, seed, bench)
    given = list(bad.arguments)
    trains = given[0] in ("train", "compare", "tune") and "--resume" not in given
    trains = trains and name != "an_output_that_cannot_be_written"
    if trains:  # into a new folder, or one that holds an earlier run
        given += ["--output", bench.folder.parent / "new" / "run" if seed % 2 else earlier]
        given += ["--fresh"] if given[0] == "train" else []
    inside, before, run = tree_of(bench.folder), tree(earlier), tree(bench.run)
    monkeypatch.chdir(bench.folder)
    ended = call(*given, stdin=bad.stdin)
    about = f"{given}\n{ended.out[-2000:]}\n{ended.err[-3000:]}"
    assert ended.status == 2, about
    assert "Traceback" not in ended.err, about
    assert len(re.findall(r"^error: ", ended.err.lower(), re.MULTILINE)) == 1, about
    assert len(ended.err) < 4000, about
    for word in bad.words:
        known = word if isinstance(word, tuple) else (word,)
        assert any(w in ended.err or w in ended.unwrapped for w in known), f"{known}: {about}"
    assert tree(earlier) == before and tree(bench.run) == run
    assert tree_of(bench.folder) == inside
    assert sorted(p.name for p in bench.folder.parent.iterdir()) == ["case", "earlier"]
