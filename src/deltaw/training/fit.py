"""One whole run: from settings to a folder with an adapter.

The order of a run stands in :func:`fit`; each step is somebody else's work.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from deltaw.config import RunConfig
from deltaw.errors import UserError
from deltaw.host.machine import (
    choose_device,
    choose_precision,
    memory_limit_bytes,
    peak_resident_bytes,
    release_free_memory,
)
from deltaw.hub.loading import LoadedModel, check_architecture, config_folder, load
from deltaw.memory.plan import Plan
from deltaw.methods.base import CLASSES_KEY
from deltaw.reports.card import model_card
from deltaw.reports.plan import plan_lines
from deltaw.reports.progress import TrainingProgress
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.drift import Drift
from deltaw.training.evaluation.general import NoGeneralAnswers
from deltaw.training.guarantee import UntrainedParameterError
from deltaw.training.loop import Outcome, Step, seeded
from deltaw.training.planning.budget import parse_bytes, within_memory
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.run_folder import RunFolder, check_output
from deltaw.training.session import Session, assemble, read_data
from deltaw.training.tasks.tasks import RunData, Task


@dataclass(frozen=True)
class Result:
    """What a run came to; ``as_dict`` is what ``train --json`` prints."""

    output: Path
    outcome: Outcome
    evaluation: Evaluation
    peak_memory_bytes: int
    plan: Plan | None = None
    trained_parameters: int = 0
    writes_text: bool = True
    drift: Drift | None = None

    @property
    def planned_memory_bytes(self) -> int | None:
        return None if self.plan is None else self.plan.peak_resident_bytes

    @property
    def interrupted(self) -> bool:
        return self.outcome.interrupted

    def as_dict(self) -> dict[str, object]:
        done = self.outcome
        seconds = done.seconds or math.inf
        return {
            "output": os.fspath(self.output),
            "rows": done.rows,
            "tokens": done.tokens,
            "computed_tokens": done.computed_tokens,
            "label_tokens": done.label_tokens,
            "steps": done.steps,
            "seconds": done.seconds,
            "rows_per_second": done.rows / seconds,
            "tokens_per_second": done.tokens / seconds,
            "train_loss": done.loss if done.steps else None,
            "trained_parameters": self.trained_parameters,
            "eval": self.evaluation.as_dict() or None,
            "score": self.evaluation.score(),
            "drift": None if self.drift is None else self.drift.as_dict(),
            "peak_memory_bytes": self.peak_memory_bytes,
            "planned_memory_bytes": self.planned_memory_bytes,
            "interrupted": done.interrupted,
        }


def fit(config: RunConfig | Mapping | str | os.PathLike[str], *, console: Console | None = None) -> Result:
    """Train as ``config`` says and write the run's folder.

    Args:
        config: settings, a dictionary of them, or the path of a YAML file.
        console: where a person reads along; nothing is printed without one.

    Raises:
        UserError: something the user gave cannot be used; nothing was written then, or the adapter as it was
            before a step that diverged.
    """
    config = RunConfig.read(config)
    console = console or Console(quiet=True)
    output = Path(os.path.expanduser(config.output))
    check_output(output)
    task, data = read_data(config, console)
    config, plan = planned(config, task, data, console)
    loaded = load_for(config, task, data, console)
    session = assemble(
        config,
        task,
        data,
        loaded.model,
        device=str(loaded.choices["device"].value),
        new_modules=loaded.new_modules,
    )
    for line in session.said:
        console.print(line, highlight=False)

    folder = RunFolder(output)
    if folder.moved is not None:
        console.print(f"{output} held an earlier run: it is now {folder.moved}", highlight=False)
    chosen = {key: (c.value, c.why) for key, c in {**loaded.choices, **session.chosen}.items()}
    folder.write_settings(config, chosen)
    if task.tokenizer is not None:
        folder.write_tokenizer(task.tokenizer)
    try:
        outcome, evaluation = _train(session, folder, console)
        drift = None if outcome.interrupted else _drift(session, folder, outcome.steps, console)
    except UntrainedParameterError:
        raise
    except UserError:
        console.print(f"the adapter as it was before is in {folder.path}", highlight=False)
        raise
    finally:
        folder.close()
        session.close()
    result = Result(
        folder.path,
        outcome,
        evaluation,
        _peak_bytes(str(loaded.choices["device"].value)),
        plan=plan,
        trained_parameters=sum(p.numel() for _, p in session.method.parameters(session.model)),
        writes_text=not task.has_labels,
        drift=drift,
    )
    _write_card(result, session)
    return result


def planned(config: RunConfig, task: Task, data: RunData, console: Console) -> tuple[RunConfig, Plan | None]:
    """The run's plan, said; None where the model cannot be run on fake tensors. With it the settings,
    which ``memory`` may have changed.

    Raises:
        UserError: the memory that the machine gives does not suffice, and ``force`` is not set.
    """
    budget = None if config.memory is None else parse_bytes(config.memory, where="memory")
    if choose_device(config.device).value != "cpu":
        return config, None
    limit = memory_limit_bytes().value
    try:
        plan = plan_run(config, task, data)
        if budget is not None:
            blocks = count_blocks(config, task)
            config, plan = within_memory(config, task, data, plan, budget, blocks)
            again = config.train.checkpointing
            if again:
                shown = f"all {blocks}" if again is True else f"{again} of {blocks}"
                console.print(f"memory {config.memory}: {shown} blocks are computed again", highlight=False)
    except UserError:
        raise
    except Exception as error:  # whatever a foreign model raises on fake tensors, it may well train
        brief = f"{type(error).__name__}: {str(error)[:100]}"
        console.print(f"no memory plan: the model cannot be run without values ({brief})", highlight=False)
        return config, None
    for line in plan_lines(plan, limit):
        console.print(line, highlight=False)
    if plan.peak_resident_bytes > limit and not config.force:
        raise UserError(
            f"the run needs {plan.peak_resident_bytes:,} bytes of memory, and the machine gives {limit:,}",
            where="the plan",
            hint="see what fits with 'deltaw plan --budget', lower train.tokens_per_pass, set "
            "train.checkpointing, or train all the same with --force true",
        )
    return config, plan


def count_blocks(config: RunConfig, task: Task) -> int:
    """How many blocks the run's model has, by its configuration."""
    dtype = choose_precision("cpu", config.precision).value
    folder = config_folder(config.model, dtype, config.trust_remote_code)
    text = check_architecture(folder, task.name, config.trust_remote_code).get_text_config()
    return int(getattr(text, "num_hidden_layers", 1))


def load_for(config: RunConfig, task: Task, data: RunData, console: Console) -> LoadedModel:
    """The model of a run, with a head for the data's classes, which starts at random by the run's seed."""
    seeded(config.train.seed)
    loaded = load(
        config.model,
        precision=config.precision,
        device=config.device,
        threads=config.threads,
        task=config.task,
        num_labels=task.outputs(data),
        trust_remote_code=config.trust_remote_code,
        say=lambda line: console.print(line, highlight=False),
    )
    for name, choice in loaded.choices.items():
        console.print(f"{name}: {choice}", highlight=False)
    return loaded


def _train(session: Session, folder: RunFolder, console: Console) -> tuple[Outcome, Evaluation]:
    """The training and its evaluations; the adapter is saved however it ends."""
    total = session.total_steps
    every = session.config.train.eval_every
    for line in session.lines():
        console.print(line, highlight=False)
    release_free_memory()

    def evaluate(step: int) -> Evaluation:
        measured = session.evaluate()
        if measured.metrics:
            folder.write_metrics({"step": step, "eval": measured.as_dict()})
        return measured

    evaluation = Evaluation()
    with session.running(), TrainingProgress(console, total) as progress:

        def on_step(step: Step) -> None:
            folder.write_metrics(step.as_dict())
            progress.update(step)
            if every and step.step % every == 0 and step.step < total:
                evaluate(step.step)

        keep = True
        try:
            outcome = session.train(on_step=on_step)
        except UntrainedParameterError:
            keep = False  # nothing is saved as trained that is not
            raise
        finally:
            if keep:
                session.method.save(
                    session.model,
                    folder.path,
                    base_model=session.config.model,
                    metadata=_metadata(session.data),
                )
        if not outcome.interrupted:
            evaluation = evaluate(outcome.steps)
    return outcome, evaluation


def _drift(session: Session, folder: RunFolder, step: int, console: Console) -> Drift | None:
    """How far general answers moved, written down; said why not where a language model gives none."""
    try:
        drift = session.drift()
    except NoGeneralAnswers as reason:
        console.print(f"drift: not measured ({reason})", highlight=False)
        return None
    if drift is not None:
        folder.write_metrics({"step": step, "drift": drift.as_dict()})
    return drift


def _metadata(data: RunData) -> dict[str, str]:
    """What goes into the weights file beside the weights: the names of the classes."""
    return {} if data.classes is None else {CLASSES_KEY: json.dumps(list(data.classes))}


def _peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def _write_card(result: Result, session: Session) -> None:
    config = session.config
    evaluation = result.evaluation
    facts = {
        "base model": config.model,
        "task": config.task,
        "method": config.method,
        "training data": config.data.train,
        "rows": str(result.outcome.rows),
        "optimizer steps": str(result.outcome.steps),
        "trained parameters": f"{result.trained_parameters:,}",
        "learning rate": f"{session.learning_rate:g}",
        "training loss": f"{result.outcome.loss:.4f}" if result.outcome.steps else "none",
        **{f"held-out {k}": f"{v:.4f}" for k, v in evaluation.metrics.items() if math.isfinite(v)},
    }
    if result.drift is not None:
        before, after = result.drift.base_loss, result.drift.loss
        facts["drift (loss of general answers)"] = f"{before:.3f} → {after:.3f} nats/token"
    if config.method == "lora":
        facts["rank / alpha"] = f"{config.lora.rank} / {config.lora.alpha:g}"
    if session.data.classes is not None:
        facts["classes"] = ", ".join(session.data.classes)
    lines = session.data.report.lines()
    model_card(
        result.output,
        config.model,
        facts,
        lines,
        method=config.method,
        task=config.task,
        interrupted=result.interrupted,
    )
