"""Helpers for tests of complete runs: output, files, and the adapter loaded onto its model.

A copy of a run's folder, taken while the run is active, equals the state after the process is killed at that moment.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltaw.inference.open_run import open_run
from deltaw.inference.opened_run import OpenedRun
from deltaw.reports.progress import TerminalCallback
from deltaw.reports.tables import TerminalOutput
from deltaw.runs import checkpoints
from deltaw.runs.fit import fit
from deltaw.runs.load_model import load_model
from deltaw.runs.result import Result
from deltaw.settings.config import RunConfig
from deltaw.training.callbacks import Callback
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.session import Session, assemble, read_data
from deltaw.training.state import Step

ADAPTER = "adapter_model.safetensors"
# Eight training rows with a batch size of 3: three steps per epoch.
TRAIN = {"epochs": 4, "checkpoint_every": 2, "eval_every": 6, "checkpoint_minutes": None}
# Settings that select each method.
METHODS: dict[str, dict] = {
    **{method: {"method": method} for method in ("lora", "head", "input", "bias", "full")},
    "prompt": {"method": "prompt", "prompt": {"length": 3}},
    "random": {"method": "random", "random": {"weights": 0.05}},
    "last": {"method": "last", "last": {"blocks": 1}},
}


def slow_except(*quick: object, names: Iterable[object] = METHODS) -> list:
    """Return all names as parameters of a test, those not in ``quick`` marked slow. Tuples are several parameters."""
    slow = (name if isinstance(name, tuple) else (name,) for name in names)
    return [pytest.param(*n, marks=() if n in quick or n[0] in quick else pytest.mark.slow) for n in slow]


class RecordingCallback(Callback):
    """Records lines, steps, samples and evaluations of a run, and optionally stops it after some steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.lines: list[str] = []
        self.steps: list[int] = []
        self.samples: list[tuple[int, Sequence[Any]]] = []
        self.evaluations: list[tuple[int, Evaluation | Mapping[str, Evaluation]]] = []
        self._stop_after = stop_after

    def __contains__(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    def on_line(self, line: str) -> None:
        self.lines.append(line)

    def on_step(self, step: Step) -> None:
        self.steps.append(step.step)

    def on_samples(self, step: int, samples: Sequence[Any]) -> None:
        self.samples.append((step, samples))

    def on_evaluation(self, step: int, evaluation: Any) -> None:
        self.evaluations.append((step, evaluation))

    def should_stop(self) -> bool:
        return self._stop_after is not None and len(self.steps) >= self._stop_after


class Snapshots(RecordingCallback):
    """Copies the run's folder at moments such as "step 5" or "evaluation 6" (during the evaluation after step 6)."""

    def __init__(self, run: Path, into: Path, moments: Sequence[str], fail_at: int | None = None) -> None:
        super().__init__()
        self.run = run
        self.into = into
        self.fail_at = fail_at
        self.copies: dict[str, Path] = dict.fromkeys(moments, run)

    def on_step(self, step: Step) -> None:
        super().on_step(step)
        self._take(f"step {step.step}")
        if step.step == self.fail_at:
            raise RuntimeError("killed")

    def on_evaluation(self, step: int, evaluation: Any) -> None:
        super().on_evaluation(step, evaluation)
        self._take(f"evaluation {step}")

    def _take(self, moment: str) -> None:
        if moment in self.copies:
            self.copies[moment] = copy_run(self.run, self.into / moment.replace(" ", "-"))


def copy_run(run: Path, into: Path) -> Path:
    """Copy a run's folder while a thread renames and deletes checkpoints. Retries if the folder changed meanwhile."""
    ignore_partial = shutil.ignore_patterns(f"{checkpoints.PARTIAL}*", f"{checkpoints.DELETED}*")
    for _ in range(20):
        with contextlib.suppress(shutil.Error, FileNotFoundError):
            return Path(shutil.copytree(run, into, ignore=ignore_partial))
        shutil.rmtree(into, ignore_errors=True)
    raise AssertionError(f"{run} keeps changing")


def stopped_run(settings: Mapping[str, Any], after: int) -> Path:
    """Return the folder of a run that its caller stopped after ``after`` steps."""
    result = fit(settings, callback=RecordingCallback(stop_after=after))
    assert result.interrupted and result.outcome.steps == after
    return result.output


def metrics(run: Path, key: str | None = None) -> list[dict]:
    """Return the lines of a run's metrics, or only those with ``key``."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines if key is None else [line for line in lines if key in line]


def losses(run: Path) -> list[float]:
    """Return the training loss of each step."""
    return [line["loss"] for line in metrics(run, "learning_rate")]


def assert_learns(run: Path, factor: float = 1.0) -> None:
    """Check that the mean loss of a run's last steps is below ``factor`` times that of its first steps."""
    values = losses(run)
    assert sum(values[-4:]) < factor * sum(values[:4])


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / ADAPTER)


def outcome(run: Path) -> tuple[list[dict], bytes]:
    """Return the parts that equal runs have in common: metrics without times, and the bytes of the adapter."""
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in metrics(run)]
    return lines, (run / ADAPTER).read_bytes()


def assert_same_run(run: Path, other: Path) -> None:
    """Check that two runs are bit-identical."""
    assert outcome(run) == outcome(other)


def open_on_cpu(run: Path | str, **options: Any) -> OpenedRun:
    """Load a run's adapter onto its model, in fp32 on the CPU."""
    return open_run(str(run), **{"precision": "fp32", "device": "cpu", "log": lambda line: None, **options})


def fit_with_output(settings: Mapping[str, Any]) -> tuple[Result, str]:
    """Return the result of a run and its terminal output, one line per message."""
    terminal = TerminalOutput(file=io.StringIO(), verbose=True)
    return fit(settings, callback=TerminalCallback(terminal)), re.sub(r"\n +", " ", terminal.file.getvalue())


def build_session(settings: Mapping[str, Any], **options: Any) -> Session:
    """Assemble a run without training it."""
    config = RunConfig.read(settings)
    task, data = read_data(config)
    loaded = load_model(config, task, data)
    return assemble(config, task, data, loaded.model, device="cpu", new_modules=loaded.new_modules, **options)


def load_eval_rows(run: OpenedRun) -> Sequence[Any]:
    """Return the evaluation rows of an opened run's training."""
    assert run.config is not None
    return run.task.read(run.config.data, seed=run.config.data_seed).held_out
