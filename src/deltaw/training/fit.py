"""One whole run: from settings to a folder with an adapter.

The order of a run stands in :func:`fit`; each step is somebody else's work.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from deltaw.config import RunConfig
from deltaw.data import Prepared, prepare
from deltaw.errors import UserError
from deltaw.methods import LoRA, Method
from deltaw.models.forest import flat_rows
from deltaw.models.loading import LoadedModel, load
from deltaw.models.machine import Choice, peak_resident_bytes, release_free_memory
from deltaw.models.quiet import quiet
from deltaw.reports.card import model_card
from deltaw.training.evaluate import loss_and_perplexity
from deltaw.training.loop import Outcome, Step, count_steps, seeded, train
from deltaw.training.objective import CausalObjective
from deltaw.training.portions import Portions, choose_portions
from deltaw.training.progress import TrainingProgress
from deltaw.training.run_folder import RunFolder, check_output


@dataclass(frozen=True)
class Result:
    """What a run came to; ``as_dict`` is what ``train --json`` prints."""

    output: Path
    outcome: Outcome
    evaluation: dict[str, float]
    peak_memory_bytes: int

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
            "eval": self.evaluation or None,
            "peak_memory_bytes": self.peak_memory_bytes,
            "planned_memory_bytes": None,
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
    method = LoRA(config.lora)
    output = Path(os.path.expanduser(config.output))
    check_output(output)
    loaded, tokenizer = _load(config, console)
    data = prepare(config.data, tokenizer, seed=config.train.seed)
    for line in data.report.lines():
        console.print(line, highlight=False)
    seeded(config.train.seed)
    portions, chosen = choose_portions(
        loaded.model,
        [*data.train, *data.held_out],
        device=str(loaded.choices["device"].value),
        tokens_per_pass=config.train.tokens_per_pass,
        share=config.train.share_prefixes,
        method_shares=method.can_share_prefixes(),
    )
    console.print(method.prepare(loaded.model, seed=config.train.seed), highlight=False)
    if config.train.checkpointing:
        recompute_blocks(loaded.model)

    folder = RunFolder(output)
    if folder.moved is not None:
        console.print(f"{output} held an earlier run: it is now {folder.moved}", highlight=False)
    folder.write_settings(config, {**_said(loaded.choices), **_said(chosen)})
    folder.write_tokenizer(tokenizer)
    try:
        outcome, evaluation = _train(config, loaded, method, data, portions, folder, console)
    except UserError:
        console.print(f"the adapter as it was before is in {folder.path}", highlight=False)
        raise
    finally:
        folder.close()
    result = Result(folder.path, outcome, evaluation, _peak_bytes(portions.device))
    _write_card(result, config, loaded, data)
    return result


def _load(config: RunConfig, console: Console) -> tuple[LoadedModel, PreTrainedTokenizerBase]:
    loaded = load(
        config.model,
        precision=config.precision,
        device=config.device,
        threads=config.threads,
        task=config.task,
        trust_remote_code=config.trust_remote_code,
        say=lambda line: console.print(line, highlight=False),
    )
    for name, choice in loaded.choices.items():
        console.print(f"{name}: {choice}", highlight=False)
    if loaded.tokenizer is None:
        raise UserError(
            "the model has no tokenizer", where=config.model, mend="copy its tokenizer.json there"
        )
    return loaded, loaded.tokenizer


def _train(
    config: RunConfig,
    loaded: LoadedModel,
    method: Method,
    data: Prepared,
    portions: Portions,
    folder: RunFolder,
    console: Console,
) -> tuple[Outcome, dict[str, float]]:
    """The training and its evaluations; the adapter is saved however it ends."""
    settings = config.train
    model = loaded.model
    with method.evaluating(model):
        objective = CausalObjective(model)
    total = count_steps(len(data.train), settings.batch_size, settings.epochs, settings.max_steps)
    _say_how(console, portions, objective, total, settings.batch_size)
    release_free_memory()

    def evaluate(step: int) -> dict[str, float]:
        if not data.held_out:
            return {}
        with method.evaluating(model):
            measured = loss_and_perplexity(objective, data.held_out, portions)
        folder.write_metrics({"step": step, "eval": measured})
        return measured

    evaluation: dict[str, float] = {}
    attention = contextlib.nullcontext() if portions.padded else flat_rows(model)
    with attention, TrainingProgress(console, total) as progress:

        def on_step(step: Step) -> None:
            folder.write_metrics(step.as_dict())
            progress.update(step)
            if settings.eval_every and step.step % settings.eval_every == 0 and step.step < total:
                evaluate(step.step)

        try:
            outcome = train(
                objective,
                [parameter for _, parameter in method.parameters(model)],
                data.train,
                portions,
                learning_rate=settings.learning_rate,
                total_steps=total,
                batch_size=settings.batch_size,
                seed=settings.seed,
                schedule=settings.schedule,
                warmup=settings.warmup,
                weight_decay=settings.weight_decay,
                betas=settings.betas,
                max_grad_norm=settings.max_grad_norm,
                on_step=on_step,
            )
        finally:
            method.save(model, folder.path, base_model=config.model)
        if not outcome.interrupted:
            evaluation = evaluate(outcome.steps)
    return outcome, evaluation


def recompute_blocks(model: PreTrainedModel) -> None:
    """Keep only each block's input for the backward, and compute the rest of the block again.

    The model stays in eval mode, so that its own dropout stays off; only the blocks that know how to be
    recomputed are told that they train.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"{type(model).__name__} cannot recompute its blocks",
            where="train.checkpointing",
            mend="set train.checkpointing to false, or lower train.tokens_per_pass",
        )
    with quiet():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _say_how(
    console: Console, portions: Portions, objective: CausalObjective, total: int, batch_size: int
) -> None:
    rows = "padded rows" if portions.padded else "flat rows without padding"
    shared = ", common beginnings computed once" if portions.share else ""
    head = "" if objective.chunked else ", all logits at once (the model's head is not known here)"
    console.print(
        f"{total} step{'s' if total != 1 else ''} of {batch_size} rows, "
        f"in passes of up to {portions.tokens_per_pass} tokens: {rows}{shared}{head}",
        highlight=False,
    )


def _said(choices: Mapping[str, Choice]) -> dict[str, tuple[object, str]]:
    return {key: (choice.value, choice.why) for key, choice in choices.items()}


def _peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def _write_card(result: Result, config: RunConfig, loaded: LoadedModel, data: Prepared) -> None:
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    facts = {
        "base model": config.model,
        "training data": config.data.train,
        "rows": str(result.outcome.rows),
        "optimizer steps": str(result.outcome.steps),
        "trained parameters": f"{trained:,}",
        "rank / alpha": f"{config.lora.rank} / {config.lora.alpha:g}",
        "learning rate": f"{config.train.learning_rate:g}",
        "training loss": f"{result.outcome.loss:.4f}" if result.outcome.steps else "none",
        **{f"held-out {k}": f"{v:.4f}" for k, v in result.evaluation.items() if math.isfinite(v)},
    }
    model_card(result.output, config.model, facts, data.report.lines(), interrupted=result.interrupted)
