"""Result of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.kernels.busy_machine import Load
from deltaw.runs.checkpoints import list_checkpoints
from deltaw.runs.folder import CHECKPOINT_FOLDER, Run, mapping
from deltaw.training.drift import Drift
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.state import Outcome

if TYPE_CHECKING:
    from deltaw.memory.plan import Plan

SUM_FIELDS = ("rows", "tokens", "computed_tokens", "label_tokens", "steps", "seconds")


@dataclass(frozen=True)
class Result:
    """Result of a run. ``as_dict`` is the output of ``train --json``.

    Attributes:
        seconds_by_part: Time of this process by part, such as ``training``, ``loading`` or ``evaluating``.
        generation: Verdict on greedy answers before and after training
            (:func:`deltaw.training.monitoring.generation.verdict_of`), empty if they were not compared.
        rewards_differed: False if the rewards never differed, so that they had no effect. None without rewards.
        load: Effect of other programs on this process during the run.
        earlier: Stored result of a run that was already finished, else None.
    """

    output: Path
    outcome: Outcome
    evaluation: Evaluation
    peak_memory_bytes: int
    plan: Plan | None = None
    trained_parameters: int = 0
    method: str = ""
    task: str = ""
    generates_text: bool = True
    drift: Drift | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    arithmetic: Mapping[str, str] = field(default_factory=dict)
    approximations: Mapping[str, object] = field(default_factory=dict)
    best: Mapping[str, object] | None = None
    stopped_early: str | None = None
    rewards_differed: bool | None = None
    resumed_from_step: int | None = None
    checkpoints: Sequence[Path] = ()
    seconds_by_part: Mapping[str, float] = field(default_factory=dict)
    load: Load = field(default_factory=Load)
    earlier: Mapping[str, Any] | None = None

    @classmethod
    def of_finished(cls, run: Run) -> Result:
        """Return the stored result of a finished run, without plan and per-row values."""
        stored = run.result
        score = mapping(run.result.get("score"))
        outcome = Outcome(**{name: stored[name] for name in SUM_FIELDS if name in stored})
        outcome.loss_sum = (stored.get("train_loss") or 0.0) * outcome.label_tokens
        metrics = mapping(stored.get("eval"))
        sets = metrics if any(isinstance(value, Mapping) for value in metrics.values()) else {"": metrics}
        main = str(score.get("metric", ""))
        results = [Evaluation(_numbers(values), main, name=name) for name, values in sets.items()]
        other_sets = {result.name: result for result in results[1:]}
        evaluation = replace(results[0], interval=tuple(score.get("interval") or ()) or None, other_sets=other_sets)
        drift: dict[str, Any] = {k: value for k, value in _numbers(stored.get("drift")).items() if k != "change"}
        names = ("trained_parameters", "best", "stopped_early", "resumed_from_step", "arithmetic", "approximations")
        fields = {n: stored[n] for n in (*names, "generation", "seconds_by_part") if stored.get(n) is not None}
        fields |= {"drift": Drift(**drift) if drift else None, "earlier": stored, "method": run.method}
        fields |= {"task": run.task, "generates_text": run.values.get("writes_text", True)}
        fields["checkpoints"] = list_checkpoints(run.path / CHECKPOINT_FOLDER)
        return cls(run.path, outcome, evaluation, run.peak_bytes or 0, **fields)

    @property
    def planned_memory_bytes(self) -> int | None:
        return None if self.plan is None else self.plan.peak_resident_bytes

    @property
    def planned_seconds(self) -> float | None:
        """Predicted duration of the run, including the measured time of planning. None if it was not predicted."""
        if self.plan is None or self.plan.seconds is None:
            return None
        return self.plan.seconds + self.seconds_by_part.get("planning", 0.0)

    @property
    def interrupted(self) -> bool:
        return self.outcome.interrupted

    def as_dict(self) -> dict[str, object]:
        outcome = self.outcome
        seconds = self.outcome.seconds or math.inf
        values = {
            **{name: getattr(outcome, name) for name in SUM_FIELDS},
            "rows_per_second": outcome.rows / seconds,
            "tokens_per_second": outcome.tokens / seconds,
            "train_loss": outcome.loss if outcome.steps else None,
            "trained_parameters": self.trained_parameters,
            "eval": self.evaluation.as_dict() or None,
            "score": self.evaluation.score(),
            "best_step": None if self.best is None else self.best["step"],
            "best": self.best,
            "stopped_early": self.stopped_early,
            "rewards_differed": self.rewards_differed,
            "drift": None if self.drift is None else self.drift.as_dict(),
            "generation": dict(self.generation) or None,
            "peak_memory_bytes": self.peak_memory_bytes,
            "planned_memory_bytes": self.planned_memory_bytes,
            "arithmetic": dict(self.arithmetic) or None,
            "approximations": dict(self.approximations),
            "interrupted": outcome.interrupted,
            "skipped_steps": outcome.skipped,
            "resumed_from_step": self.resumed_from_step,
            "seconds_by_part": dict(self.seconds_by_part),
            "total_seconds": sum(self.seconds_by_part.values()),
            "planned_seconds": self.planned_seconds,
            "busy_seconds": self.load.busy_seconds,
            "waited_seconds": self.load.waited_seconds,
            **(self.earlier or {}),
        }
        files = [os.fspath(path) for path in self.checkpoints]
        return {"output": os.fspath(self.output), **values, "checkpoints": files}


def _numbers(values: object) -> dict[str, float]:
    """Return numbers by name from JSON, with null as NaN."""
    return {name: math.nan if value is None else value for name, value in mapping(values).items()}
