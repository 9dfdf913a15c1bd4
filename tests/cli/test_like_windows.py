"""Commands run with the file semantics of Windows and without POSIX-only names.

Two known failures of training programs on Windows are covered: renaming a folder that contains an open lock, and
replacing a file whose tensors are memory-mapped.
"""

from __future__ import annotations

import json
import sys

import pytest

from tests.cli.conftest import assert_refused
from tests.conftest import write_rows

pytest_plugins = ["tests.other_systems"]
pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="open and mapped files are read from /proc")]
pytestmark += [pytest.mark.usefixtures("like_windows")]


def test_train_resume_and_fresh_work(call, flags, tmp_path):
    run = tmp_path / "run"
    arguments = flags(run, train__epochs=4, train__checkpoint_every=1, train__eval_every=1, train__keep_checkpoints=1)
    first = json.loads(call("train", *arguments, "--json", status=0).out)
    assert first["steps"] == 8
    resumed = call("train", "--resume", run, "--train.epochs", 6, "--json", status=0)
    assert json.loads(resumed.out)["resumed_from_step"] == 8
    call("train", *arguments, "--fresh", status=0)
    assert (tmp_path / "run.1" / "adapter_config.json").is_file() and (run / "adapter_config.json").is_file()
    assert not [path.name for path in run.rglob(".*") if path.name != ".lock"]


def test_prompt_run_resumes_in_same_folder(call, flags, tmp_path):
    arguments = flags(tmp_path / "run", method="prompt", train__epochs=2, train__checkpoint_every=1)
    call("train", *arguments, status=0)
    call("train", "--resume", tmp_path / "run", "--train.epochs", 3, status=0)


def test_merge_overwrites_earlier_model(call, finished_run, tmp_path):
    call("merge", finished_run, "--output", tmp_path / "model", status=0)
    (tmp_path / "empty").mkdir()
    call("merge", finished_run, "--output", tmp_path / "empty", status=0)
    call("merge", finished_run, "--output", tmp_path / "model", "--overwrite", status=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model"]
    call("export", finished_run, "--format", "gguf-adapter", "--output", tmp_path / "a.gguf", status=0)
    call("eval", finished_run, "--json", status=0)


def test_cached_rows_and_features_are_reused(call, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"count {n}", "completion": str(n)} for n in range(40)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = {"data": data, "data.cache": True, "train.keep_features": True, "train__epochs": 2}
    for name in ("one", "two"):
        call("train", *flags(tmp_path / name, **arguments), status=0)


@pytest.mark.parametrize("name", ["NUL", "a:b", "run.", "what?"])
def test_invalid_windows_name_is_rejected_early(call, flags, finished_run, tmp_path, name):
    before = sorted(tmp_path.iterdir())
    assert_refused(call("train", *flags(tmp_path / name)), f"folder named '{name}'")
    assert_refused(call("merge", finished_run, "--output", tmp_path / name / "model"), f"folder named '{name}'")
    assert sorted(tmp_path.iterdir()) == before
