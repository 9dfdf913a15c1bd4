"""Final training of a method with a seed, scored on the held-out rows.

It writes a run folder like ``deltaw train``, but does not train on the validation rows, and its length is automatic
(:mod:`deltaw.experiments.until_flat`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltaw.data.example import rows_of
from deltaw.errors import UserError
from deltaw.experiments.constant_answers import best_constant_answer, single_answer
from deltaw.experiments.folder import budget_from_settings
from deltaw.experiments.trial import TrainingStopped, Trial
from deltaw.experiments.until_flat import loss_of
from deltaw.machine.choices import choose_device
from deltaw.machine.memory import peak_resident_bytes, release_free_memory
from deltaw.memory.plan import Plan
from deltaw.progress import LogFunction
from deltaw.runs.folder import RunFolder, check_output
from deltaw.runs.memory_check import plan_memory
from deltaw.runs.save_adapter import save_adapter
from deltaw.runs.summary import write_card
from deltaw.settings.config import RunConfig
from deltaw.training.callbacks import Callback, LineCallback
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.monitoring.generation import GenerationProbe
from deltaw.training.process import preserved_process_state
from deltaw.training.session import read_data
from deltaw.training.state import Step
from deltaw.training.task import Task

ADAPTER_FILES = "adapter_*"


class MetricsCallback(Callback):
    """Writes the metrics of steps and the validation losses to a run's folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def on_step(self, step: Step) -> None:
        self._folder.write_metrics(step.as_dict())

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self._folder.write_metrics({"step": step, "validation": {"loss": loss_of(evaluation)}})


@preserved_process_state()
def final_run(config: RunConfig, log: LogFunction, *, plan: bool) -> dict[str, object]:
    """Train until the validation loss flattens, write the run's folder, and score the held-out rows.

    Args:
        plan: Plan the memory first. Only needed for the first seed of a method.

    Returns:
        Values for the comparison, ready for JSON.

    Raises:
        UserError: If the input cannot be used, training diverged, or a signal stopped it.
    """
    check_output(Path(os.path.expanduser(config.output)))
    config = config.with_train(keep_features=True)
    task, data = read_data(config, log)
    memory_plan: Plan | None = None
    if plan:
        config, memory_plan = plan_memory(config, task, data, LineCallback(log))
    trial = Trial(config, log, (task, data), once=True)
    session = trial.session
    folder = RunFolder(Path(os.path.expanduser(config.output)))
    try:
        folder.write_settings(trial.config, {key: (c.value, c.why) for key, c in trial.chosen.items()})
        if task.tokenizer is not None:
            folder.write_tokenizer(task.tokenizer)
        probe = GenerationProbe(session)
        probe.before()
        release_free_memory()
        try:
            curve = trial.until_flat(
                session.learning_rate,
                budget_from_settings(trial.config.train, len(trial.training)),
                MetricsCallback(folder),
            )
        except TrainingStopped as error:
            raise UserError("the training was stopped by a signal", hint="start the comparison again") from error
        save_adapter(session, folder.path)
        generation = probe.measure()
        with session.running():
            evaluation = session.evaluate()
        folder.write_metrics({"step": curve.best_step, "eval": evaluation.as_dict()})
        trained = sum(p.numel() for _, p in session.method.parameters(session.model))
        write_card(folder.path, session, curve.outcome, evaluation, trained, generation=generation)
    finally:
        folder.close()
        trial.close()
    outcome = curve.outcome
    on_gpu = choose_device(config.device).value.startswith("cuda")
    return {
        "output": str(folder.path),
        **{name: getattr(outcome, name) for name in ("steps", "rows", "tokens", "seconds")},
        "best_step": curve.best_step,
        "flattened": curve.flattened,
        "generation": generation or None,
        "validation": [[step, loss] for step, loss in curve.points],
        "validation_loss": curve.best_loss,
        "training_rows": len(trial.training),
        "train_loss": outcome.loss,
        "trained_parameters": trained,
        "adapter_bytes": sum(file.stat().st_size for file in folder.path.glob(ADAPTER_FILES)),
        "planned_memory_bytes": None if memory_plan is None else memory_plan.peak_resident_bytes,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes(),
        **scores(task, session.data.held_out, evaluation),
    }


def scores(task: Task, held_out: Sequence[Any], evaluation: Evaluation) -> dict[str, object]:
    """Return an evaluation of the held-out rows for JSON, with scores per row and constant answers."""
    per_row = evaluation.per_row
    tokenizer = task.tokenizer
    rows = [row for item in held_out for row in rows_of(item)]

    def decode(tokens: np.ndarray) -> str:
        return "" if tokenizer is None else str(tokenizer.decode(tokens, skip_special_tokens=True))

    constant = best_constant_answer(evaluation, rows)
    return {
        "eval": evaluation.as_dict() or None,
        "score": evaluation.score(),
        "higher_is_better": evaluation.higher_is_better,
        "per_row": None if per_row is None else [float(value) for value in per_row],
        "single_answer": single_answer(evaluation, rows, decode),
        "constant": None if constant is None else {"answer": constant[0], "per_row": constant[1].tolist()},
    }
