"""`deltaw compare` and `deltaw tune` on the command line: resuming, invalid arguments and interruption."""

from __future__ import annotations

import json
from unittest.mock import Mock

import pytest
import yaml

from tests.cli.conftest import assert_refused
from tests.experiments.conftest import use_synthetic_results


@pytest.fixture
def settings_file(settings, tmp_path):
    """Return a settings file in a temporary folder."""
    config = settings(tmp_path / "run", train={"learning_rate": "auto", "drift": False})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_ctrl_c_prints_resume_command(call, settings_file, monkeypatch):
    for verb in ("compare", "tune"):
        monkeypatch.setattr(f"deltaw.experiments.{verb}.{verb}", Mock(side_effect=KeyboardInterrupt))
        result = call(verb, settings_file)
        assert result.status == 130 and f"run-{verb}" in result.out and "to resume" in result.out


REFUSED = {
    "compare --methods ,": ["no method is given"],
    "compare --methods lora --rates head=1e-3": ["'head'", "'lora'"],
    "compare --data.eval null": ["no rows are held out", "data.eval"],
    "compare --seeds 0": ["--seeds"],
    "compare --methods lora,head --reference hed": ["'hed'", "did you mean 'head'"],
    "compare --max-time soon": ["train.time", "'soon'", "a duration such as 90s"],
    "tune --train.epoch 1": ["--train.epochs"],
}


def test_invalid_arguments_are_rejected_before_writing(call, settings_file, tmp_path):
    for command, words in REFUSED.items():
        verb, *flags = command.split()
        assert_refused(call(verb, settings_file, *flags), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_compare_accepts_seeds_reference_and_budget_flags(call, settings_file, tmp_path, monkeypatch):
    use_synthetic_results(monkeypatch)
    flags = ["--methods", "head,bias", "--rates", "head=1e-2", "--rates", "bias=1e-2", "--seeds", "2"]
    flags += ["--reference", "bias", "--max-time", "1s", "--json"]
    output = json.loads(call("compare", settings_file, *flags, status=0).out)
    assert output["seeds"] == [0, 1] and output["requested_reference"] == "bias"
    assert [len(method["seeds"]) for method in output["methods"]] == [2, 2]
    stored = json.loads((tmp_path / "run-compare" / "pieces" / "head.json").read_text())
    assert stored["settings"]["train.time"] == "1s"


def test_tune_accepts_search_flags(call, settings_file, tmp_path, monkeypatch):
    use_synthetic_results(monkeypatch)
    search = ("--search", "train.learning_rate=1e-4..1e-2:log")
    result = call("tune", settings_file, "--trials", "2", *search, "--json", status=0)
    output = json.loads(result.out)
    assert len(output["trials"]) == 2 and output["best"] in (0, 1)
    assert "best settings:" in result.err and "learning_rate:" in result.err
    assert (tmp_path / "run-tune" / "best.yaml").is_file()
