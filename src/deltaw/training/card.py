"""The model card of a run's folder: what the adapter is, what it was trained on, how to use it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from deltaw.data.mixture import shown
from deltaw.durable import write_text
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.drift import Drift
from deltaw.training.session import Session
from deltaw.training.state import Outcome

# Methods whose files PEFT reads.
OF_PEFT = ("lora", "prompt")


def write_card(
    folder: Path,
    session: Session,
    outcome: Outcome,
    evaluation: Evaluation,
    trained_parameters: int,
    drift: Drift | None = None,
) -> None:
    """Write the card of a run into its folder."""
    config = session.config
    facts = {
        "base model": config.model,
        "task": config.task,
        "method": config.method,
        "training data": shown(config.data.train),
        "rows": str(outcome.rows),
        "optimizer steps": str(outcome.steps),
        "trained parameters": f"{trained_parameters:,}",
        "learning rate": f"{session.learning_rate:g}",
        "training loss": f"{outcome.loss:.4f}" if outcome.steps else "none",
        **{f"held-out {k}": f"{v:.4f}" for k, v in evaluation.named_metrics().items() if math.isfinite(v)},
    }
    if drift is not None:
        facts["drift"] = drift.lines()[0].removeprefix("drift: ")
    if config.method == "lora":
        facts["rank / alpha"] = f"{config.lora.rank} / {config.lora.alpha:g}"
    if session.data.classes is not None:
        facts["classes"] = ", ".join(session.data.classes)
    model_card(
        folder,
        config.model,
        facts,
        session.data.report.lines(),
        method=config.method,
        task=config.task,
        writes_text=not session.task.has_labels,
        interrupted=outcome.interrupted,
    )


def model_card(
    folder: Path,
    base_model: str,
    facts: Mapping[str, str],
    data_lines: Sequence[str],
    *,
    method: str = "lora",
    task: str = "causal-lm",
    writes_text: bool = True,
    interrupted: bool,
) -> None:
    """Write ``README.md`` into ``folder``.

    Args:
        facts: name and value of each line of the table.
        method, task: what was trained, for what. writes_text: whether the model answers in text.
        data_lines: what became of the rows, in sentences.
        interrupted: whether the training was stopped before its end.
    """
    lines = [
        "---",
        f"base_model: {base_model!r}",
        *(["library_name: peft"] if method in OF_PEFT else []),
        f"tags: [{method}, {task}, deltaw]",
        "---",
        "",
        f"# {folder.name}",
        "",
        f"An adapter ({method}, {task}) for `{base_model}`, trained with deltaw.",
        "",
    ]
    if interrupted:
        lines += ["**The training was interrupted before its last step.**", ""]
    lines += ["| | |", "| --- | --- |", *[f"| {name} | {value} |" for name, value in facts.items()], ""]
    lines += ["## Data", "", *[f"- {line}" for line in data_lines], ""]
    lines += [
        "## Use",
        "",
        "```bash",
        *([f"deltaw chat {folder}", f'deltaw generate {folder} --prompt "..."'] if writes_text else []),
        f"deltaw eval {folder}",
        *([f"deltaw serve {folder}"] if writes_text else []),
        "```",
        "",
    ]
    if method in OF_PEFT:
        lines += [
            "The adapter is in PEFT's format: `PeftModel.from_pretrained(model, folder)` loads it too.",
            "",
        ]
    write_text(folder / "README.md", "\n".join(lines))
