"""Verbs where files are refused as Windows refuses them, and where the names that only POSIX has are missing.

Two of these are real faults of trainers on Windows: a folder cannot be renamed while a lock in it is open, and a
file cannot be replaced while its tensors are mapped.
"""

from __future__ import annotations

import json
import sys

import pytest

from tests.cli.conftest import assert_refused
from tests.conftest import write_rows

pytest_plugins = ["tests.other_systems"]
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="what is open or mapped is found in /proc"),
    pytest.mark.usefixtures("like_windows"),
]


def test_a_run_is_trained_resumed_and_moved_away(call, flags, tmp_path):
    run = tmp_path / "run"
    given = flags(run, train__epochs=4, train__checkpoint_every=1, train__eval_every=1, train__keep_checkpoints=1)
    first = json.loads(call("train", *given, "--json", status=0).out)
    assert first["steps"] == 8
    further = call("train", "--resume", run, "--train.epochs", 6, "--json", status=0)
    assert json.loads(further.out)["resumed_from_step"] == 8
    call("train", *given, "--fresh", status=0)
    assert (tmp_path / "run.1" / "adapter_config.json").is_file() and (run / "adapter_config.json").is_file()
    assert not [path.name for path in run.rglob(".*") if path.name != ".lock"]


def test_a_prompt_method_goes_on_in_its_own_folder(call, flags, tmp_path):
    given = flags(tmp_path / "run", method="prompt", train__epochs=2, train__checkpoint_every=1)
    call("train", *given, status=0)
    call("train", "--resume", tmp_path / "run", "--train.epochs", 3, status=0)


def test_a_merged_model_replaces_an_earlier_one(call, finished_run, tmp_path):
    call("merge", finished_run, "--output", tmp_path / "model", status=0)
    (tmp_path / "empty").mkdir()
    call("merge", finished_run, "--output", tmp_path / "empty", status=0)
    call("merge", finished_run, "--output", tmp_path / "model", "--overwrite", status=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "model"]
    call("export", finished_run, "--format", "gguf-adapter", "--output", tmp_path / "a.gguf", status=0)
    call("eval", finished_run, "--json", status=0)


def test_rows_and_features_are_kept_and_used_again(call, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"count {n}", "completion": str(n)} for n in range(40)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    given = {"data": data, "data.cache": True, "train.keep_features": True, "train__epochs": 2}
    for name in ("one", "two"):
        call("train", *flags(tmp_path / name, **given), status=0)


@pytest.mark.parametrize("name", ["NUL", "a:b", "run.", "what?"])
def test_a_name_that_windows_cannot_have_is_refused_at_once(call, flags, finished_run, tmp_path, name):
    before = sorted(tmp_path.iterdir())
    assert_refused(call("train", *flags(tmp_path / name)), f"folder named '{name}'")
    assert_refused(call("merge", finished_run, "--output", tmp_path / name / "model"), f"folder named '{name}'")
    assert sorted(tmp_path.iterdir()) == before
