"""The model card of a run's folder: what the adapter is, what it was trained on, how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deltaw.durable import write_text

# Methods whose files PEFT reads.
OF_PEFT = ("lora", "prompt")


def model_card(
    folder: Path,
    base_model: str,
    facts: Mapping[str, str],
    data_lines: Sequence[str],
    *,
    method: str = "lora",
    task: str = "causal-lm",
    interrupted: bool,
) -> None:
    """Write ``README.md`` into ``folder``.

    Args:
        facts: name and value of each line of the table.
        method, task: what was trained, for what.
        data_lines: what became of the rows, in sentences.
        interrupted: whether the training was stopped before its end.
    """
    writes = task == "causal-lm"
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
        *([f"deltaw chat {folder}", f'deltaw generate {folder} --prompt "..."'] if writes else []),
        f"deltaw eval {folder}",
        "```",
        "",
    ]
    if method in OF_PEFT:
        lines += [
            "The adapter is in PEFT's format: `PeftModel.from_pretrained(model, folder)` loads it too.",
            "",
        ]
    write_text(folder / "README.md", "\n".join(lines))
