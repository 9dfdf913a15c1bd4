"""What tests ask of a whole run: what it said on its way, what it wrote, and its adapter on its model again."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from deltaw.reports.progress import TerminalCallback
from deltaw.settings import RunConfig
from deltaw.training.callbacks import Callback
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.fit import Result, fit, load_for
from deltaw.training.origin import InferenceSession, open_run
from deltaw.training.session import Session, assemble, read_data
from deltaw.training.state import Step

ADAPTER = "adapter_model.safetensors"


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
    lines = metrics(run)
    for line in lines:
        line.pop("seconds", None)
    return lines, (run / ADAPTER).read_bytes()


def opened(run: Path | str, **how: Any) -> InferenceSession:
    """A run's adapter on its model, in fp32 on the CPU."""
    return open_run(str(run), **{"precision": "fp32", "device": "cpu", "say": lambda line: None, **how})


def fit_aloud(settings: Mapping[str, Any]) -> tuple[Result, str]:
    """A run's result, and what it said to a terminal."""
    said = Console(file=io.StringIO(), width=500)
    return fit(settings, callback=TerminalCallback(said)), said.file.getvalue()


def session_of(settings: Mapping[str, Any], **how: Any) -> Session:
    """A run that is put together and not trained yet."""
    config = RunConfig.read(settings)
    task, data = read_data(config)
    loaded = load_for(config, task, data)
    return assemble(config, task, data, loaded.model, device="cpu", new_modules=loaded.new_modules, **how)
