"""One final training of a comparison: one method with one seed, scored on the held-out rows.

It writes a run's folder as ``deltaw train`` does. What differs: the validation rows are not trained on, and
the training ends by itself (:mod:`deltaw.experiments.until_flat`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltaw.config import RunConfig
from deltaw.data.packing import rows_of
from deltaw.errors import UserError
from deltaw.experiments.answers import constant_scores, one_answer
from deltaw.experiments.budget import budget_of
from deltaw.experiments.trial import Stopped, Trial, with_features
from deltaw.experiments.until_flat import Curve
from deltaw.host.choices import choose_device
from deltaw.host.memory import peak_resident_bytes, release_free_memory
from deltaw.memory.plan import Plan
from deltaw.training.callbacks import Lines, Say
from deltaw.training.card import write_card
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.fit import planned, save_adapter
from deltaw.training.process import guest
from deltaw.training.run_folder import RunFolder, check_output
from deltaw.training.session import read_data
from deltaw.training.state import Step
from deltaw.training.tasks.base import Task

ADAPTER_FILES = "adapter_*"


def final_run(config: RunConfig, say: Say, *, plan: bool) -> dict[str, object]:
    """Train until the validation loss flattens, write the run's folder, and score the held-out rows.

    Args:
        plan: whether to plan the memory first; other seeds of a method need what the first one needs.

    Returns:
        What a comparison stores of the training, ready for JSON.

    Raises:
        UserError: the input cannot be used, training diverged, or a signal stopped it.
    """
    with guest():
        return _final_run(config, say, plan)


def _final_run(config: RunConfig, say: Say, plan: bool) -> dict[str, object]:
    check_output(Path(os.path.expanduser(config.output)))
    config = with_features(config)
    task, data = read_data(config, say)
    made: Plan | None = None
    if plan:
        config, made = planned(config, task, data, Lines(say))
    trial = Trial(config, say, (task, data), once=True)
    session = trial.session
    folder = RunFolder(Path(os.path.expanduser(config.output)))
    try:
        folder.write_settings(trial.config, {key: (c.value, c.why) for key, c in trial.chosen.items()})
        if task.tokenizer is not None:
            folder.write_tokenizer(task.tokenizer)
        curve = _trained(trial, folder)
        save_adapter(session, folder.path)
        with session.running():
            evaluation = session.evaluate()
        folder.write_metrics({"step": curve.best_step, "eval": evaluation.as_dict()})
        trained = sum(p.numel() for _, p in session.method.parameters(session.model))
        write_card(folder.path, session, curve.outcome, evaluation, trained)
    finally:
        folder.close()
        trial.close()
    outcome = curve.outcome
    return {
        "output": str(folder.path),
        "steps": outcome.steps,
        "best_step": curve.best_step,
        "flattened": curve.flattened,
        "validation": [[step, loss] for step, loss in curve.points],
        "validation_loss": curve.best_loss,
        "training_rows": len(trial.training),
        "rows": outcome.rows,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "train_loss": outcome.loss,
        "trained_parameters": trained,
        "adapter_bytes": sum(file.stat().st_size for file in folder.path.glob(ADAPTER_FILES)),
        "planned_memory_bytes": None if made is None else made.peak_resident_bytes,
        "peak_memory_bytes": _peak_bytes(choose_device(config.device).value),
        **scores(task, session.data.held_out, evaluation),
    }


def _trained(trial: Trial, folder: RunFolder) -> Curve:
    release_free_memory()

    def on_step(step: Step) -> None:
        folder.write_metrics(step.as_dict())

    def on_validation(step: int, loss: float) -> None:
        folder.write_metrics({"step": step, "validation": {"loss": loss}})

    budget = budget_of(trial.config.train, len(trial.training))
    try:
        return trial.until_flat(
            trial.session.learning_rate, budget, on_step=on_step, on_validation=on_validation
        )
    except Stopped as error:
        raise UserError("the training was stopped by a signal", hint="start the comparison again") from error


def scores(task: Task, held_out: Sequence[Any], evaluation: Evaluation) -> dict[str, object]:
    """An evaluation of the held-out rows, ready for JSON: with what each row scores, the answer that every
    row was given, if there was only one, and what the best such answer would score."""
    per_row = evaluation.per_row
    tokenizer = task.tokenizer
    rows = [row for item in held_out for row in rows_of(item)]

    def decode(tokens: np.ndarray) -> str:
        return "" if tokenizer is None else str(tokenizer.decode(tokens, skip_special_tokens=True))

    constant = constant_scores(evaluation, rows)
    return {
        "eval": evaluation.as_dict() or None,
        "score": evaluation.score(),
        "higher_is_better": evaluation.higher_is_better,
        "per_row": None if per_row is None else [float(value) for value in per_row],
        "one_answer": one_answer(evaluation, rows, decode),
        "constant": None if constant is None else {"answer": constant[0], "per_row": constant[1].tolist()},
    }


def _peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()
