"""What tests ask of a whole run: what it said on its way, what it wrote, and its adapter on its model again.

A copy of a run's folder, made while the run goes on, is what a process leaves that is killed at that moment.
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

from deltaw.reports.progress import TerminalCallback
from deltaw.reports.tables import Output
from deltaw.runs import checkpoints
from deltaw.runs.fit import Result, fit, load_for
from deltaw.settings import RunConfig
from deltaw.training.callbacks import Callback
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.origin import InferenceSession, open_run
from deltaw.training.session import Session, assemble, read_data
from deltaw.training.state import Step

ADAPTER = "adapter_model.safetensors"
# Of the eight training rows in steps of three: three steps an epoch.
TRAIN = {"epochs": 4, "checkpoint_every": 2, "eval_every": 6, "checkpoint_minutes": None}
# What a run with each method differs in.
METHODS: dict[str, dict] = {
    **{method: {"method": method} for method in ("lora", "head", "input", "bias", "full")},
    "prompt": {"method": "prompt", "prompt": {"length": 3}},
    "random": {"method": "random", "random": {"weights": 0.05}},
    "last": {"method": "last", "last": {"blocks": 1}},
}


def often(*quick: str, of: Iterable[str] = METHODS) -> list:
    """All methods, for a test whose quick set has some of them."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in of]


class Told(Callback):
    """Every line, step, sample and evaluation of a run; it may ask to stop after some steps."""

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


class Snapshots(Told):
    """Copies the run's folder at moments such as "step 5", or "evaluation 6": within the one after step 6."""

    def __init__(self, run: Path, into: Path, moments: Sequence[str], dies_at: int | None = None) -> None:
        super().__init__()
        self.run, self.into, self.dies_at = run, into, dies_at
        self.taken: dict[str, Path] = dict.fromkeys(moments, run)

    def on_step(self, step: Step) -> None:
        super().on_step(step)
        self._take(f"step {step.step}")
        if step.step == self.dies_at:
            raise RuntimeError("killed")

    def on_evaluation(self, step: int, evaluation: Any) -> None:
        super().on_evaluation(step, evaluation)
        self._take(f"evaluation {step}")

    def _take(self, moment: str) -> None:
        if moment in self.taken:
            self.taken[moment] = copied(self.run, self.into / moment.replace(" ", "-"))


def copied(run: Path, into: Path) -> Path:
    """Copy a folder in which a thread renames and removes checkpoints; one that changed meanwhile is copied
    again."""
    half = shutil.ignore_patterns(f"{checkpoints.PARTIAL}*", f"{checkpoints.DELETED}*")
    for _ in range(20):
        with contextlib.suppress(shutil.Error, FileNotFoundError):
            return Path(shutil.copytree(run, into, ignore=half))
        shutil.rmtree(into, ignore_errors=True)
    raise AssertionError(f"{run} keeps changing")


def stopped_run(settings: Mapping[str, Any], after: int) -> Path:
    """The folder of a run that its caller stopped after so many steps."""
    result = fit(settings, callback=Told(stop_after=after))
    assert result.interrupted and result.outcome.steps == after
    return result.output


def metrics(run: Path, key: str | None = None) -> list[dict]:
    """The lines of a run's metrics; with ``key``, those that have it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines if key is None else [line for line in lines if key in line]


def losses(run: Path) -> list[float]:
    """The training loss of each step."""
    return [line["loss"] for line in metrics(run, "learning_rate")]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / ADAPTER)


def outcome(run: Path) -> tuple[list[dict], bytes]:
    """What must be equal in equal runs: the metrics without their times, and the adapter to the byte."""
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in metrics(run)]
    return lines, (run / ADAPTER).read_bytes()


def assert_same_run(run: Path, other: Path) -> None:
    """Equal to the bit."""
    assert outcome(run) == outcome(other)


def opened(run: Path | str, **how: Any) -> InferenceSession:
    """A run's adapter on its model, in fp32 on the CPU."""
    return open_run(str(run), **{"precision": "fp32", "device": "cpu", "say": lambda line: None, **how})


def fit_aloud(settings: Mapping[str, Any]) -> tuple[Result, str]:
    """A run's result, and all that it said to a terminal, a line each."""
    said = Output(file=io.StringIO(), verbose=True)
    return fit(settings, callback=TerminalCallback(said)), re.sub(r"\n +", " ", said.file.getvalue())


def session_of(settings: Mapping[str, Any], **how: Any) -> Session:
    """A run that is put together and not trained yet."""
    config = RunConfig.read(settings)
    task, data = read_data(config)
    loaded = load_for(config, task, data)
    return assemble(config, task, data, loaded.model, device="cpu", new_modules=loaded.new_modules, **how)


def held_out_rows(run: InferenceSession) -> Sequence[Any]:
    """The rows that an opened run's training held out."""
    assert run.config is not None
    return run.task.read(run.config.data, seed=run.config.data_seed).held_out
