"""Generated invalid inputs (:mod:`tests.cli.bad_inputs`) exit with status 2 and a message that names the location.

Files and finished runs are unchanged. By default two cases per family run. ``-m slow`` runs all of them.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.cli import bad_inputs
from tests.cli.bad_inputs import Bench
from tests.cli.conftest import Call, tree

FAST_CASES = 2  # per family
CASES = [pytest.param(*case, marks=[pytest.mark.slow] * (case[1] >= FAST_CASES)) for case in bad_inputs.every_case()]
assert len(CASES) >= 300


@pytest.fixture
def bench(tmp_path: Path, model_folder: Path, rows_file: Path, finished_run: Path) -> Bench:
    (tmp_path / "case").mkdir()
    return Bench(tmp_path / "case", model_folder, rows_file, finished_run)


@pytest.fixture
def earlier_run(tmp_path: Path, finished_run: Path) -> Path:
    """Return a finished run in the output folder of the invalid commands."""
    return Path(shutil.copytree(finished_run, tmp_path / "earlier"))


def tree_of(folder: Path) -> dict[str, bytes | None]:
    """Return the content of files, and None for folders and links, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_generated_input_is_rejected_without_writing_files(
    name: str, seed: int, bench: Bench, earlier_run: Path, call: Call, monkeypatch
) -> None:
    bad = bad_inputs.make(name, seed, bench)
    arguments = list(bad.arguments)
    is_training = arguments[0] in ("train", "compare", "tune") and "--resume" not in arguments
    is_training = is_training and name != "an_output_that_cannot_be_written"
    if is_training:  # into a new folder or one with an earlier run
        arguments += ["--output", bench.folder.parent / "new" / "run" if seed % 2 else earlier_run]
        arguments += ["--fresh"] if arguments[0] == "train" else []
    case_before, before, run = tree_of(bench.folder), tree(earlier_run), tree(bench.run)
    monkeypatch.chdir(bench.folder)
    result = call(*arguments, stdin=bad.stdin)
    context = f"{arguments}\n{result.out[-2000:]}\n{result.err[-3000:]}"
    assert result.status == 2, context
    assert "Traceback" not in result.err, context
    assert len(re.findall(r"^error: ", result.err.lower(), re.MULTILINE)) == 1, context
    assert len(result.err) < 4000, context
    for word in bad.words:
        alternatives = word if isinstance(word, tuple) else (word,)
        assert any(w in result.err or w in result.unwrapped for w in alternatives), f"{alternatives}: {context}"
    assert tree(earlier_run) == before and tree(bench.run) == run
    assert tree_of(bench.folder) == case_before
    assert sorted(p.name for p in bench.folder.parent.iterdir()) == ["case", "earlier"]
