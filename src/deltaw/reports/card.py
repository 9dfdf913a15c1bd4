"""The model card of a run's folder: what the adapter is, what it was trained on, how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deltaw.durable import write_text


def model_card(
    folder: Path,
    base_model: str,
    facts: Mapping[str, str],
    data_lines: Sequence[str],
    *,
    interrupted: bool,
) -> None:
    """Write ``README.md`` into ``folder``.

    Args:
        facts: name and value of each line of the table.
        data_lines: what became of the rows, in sentences.
        interrupted: whether the training was stopped before its end.
    """
    lines = [
        "---",
        f"base_model: {base_model!r}",
        "library_name: peft",
        "tags: [lora, deltaw]",
        "---",
        "",
        f"# {folder.name}",
        "",
        f"A LoRA adapter for `{base_model}`, trained with deltaw.",
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
        f"deltaw chat {folder}",
        f'deltaw generate {folder} --prompt "..."',
        "```",
        "",
        "The adapter is in PEFT's format: `PeftModel.from_pretrained(model, folder)` loads it too.",
        "",
    ]
    write_text(folder / "README.md", "\n".join(lines))
