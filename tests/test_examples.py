"""The examples run as they stand."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from deltaw.config import RunConfig
from deltaw.training.fit import fit

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_own_loop_trains_merges_and_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_loop.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "base outputs unchanged: True" in printed
    assert "every bit as before: True" in printed
    losses = [float(line.rpartition(" ")[2]) for line in printed.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.05 * losses[0]


def test_train_yaml_runs_on_a_tiny_model(model_folder: Path, tmp_path: Path) -> None:
    config = RunConfig.read(
        EXAMPLES / "train.yaml",
        {
            "model": str(model_folder),
            "data": {"train": str(EXAMPLES / "capitals.jsonl")},
            "output": str(tmp_path / "run"),
        },
    )
    result = fit(config)
    assert result.outcome.rows == 3 * 36
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_demo_settings_are_valid() -> None:
    assert RunConfig.read(EXAMPLES / "demo.yaml").train.learning_rate == 1e-3
