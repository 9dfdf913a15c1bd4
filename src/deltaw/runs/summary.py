"""What a run's folder says of the run besides its settings and metrics: the model card, and facts for ``run.json``.

The facts are the account of the rows, a few rows with their loss masks, the plan, what was chosen and why, versions,
the processor, and commands to go on with. It knows nothing of how any of this is shown.
"""

from __future__ import annotations

import functools
import html
import itertools
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from deltaw.data.example import Example, rows_of
from deltaw.data.mixture import references, shown
from deltaw.data.pieces import pieces
from deltaw.data.settings import eval_sets
from deltaw.data.sources import commit_of
from deltaw.durable import write_text
from deltaw.errors import escape_control_characters
from deltaw.hub.folders import already_here, resolve_hub_id
from deltaw.machine.processor import processor_name, usable_processors
from deltaw.platforms import shell_word
from deltaw.runs.folder import FINISHED, FOLDER
from deltaw.settings import RunConfig
from deltaw.training.drift import Drift
from deltaw.training.evaluation.base import Evaluation, metric_format
from deltaw.training.session import Session
from deltaw.training.state import Outcome
from deltaw.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltaw.machine.choices import Choice
    from deltaw.memory.plan import Plan


# Methods whose files PEFT reads.
OF_PEFT = ("lora", "prompt")
# Tasks that do not write text and can be served.
_SERVED = ("sequence-classification", "embedding", "reranking")


def write_card(
    folder: Path,
    session: Session,
    outcome: Outcome,
    evaluation: Evaluation,
    trained: int,
    drift: Drift | None = None,
    generation: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the model card of a run, ``README.md``, into its folder."""
    config, writes_text = session.config, session.task.writes_text
    facts = {
        "base model": config.model,
        "task": config.task,
        "method": config.method,
        "training data": shown(config.data.train),
        "rows": f"{min(outcome.rows, session.data.report.rows_kept):,} used, {len(session.data.held_out):,} held out",
        "optimizer steps": str(outcome.steps),
        "trained parameters": f"{trained:,}",
        "learning rate": f"{session.learning_rate:g}",
        "training loss": f"{outcome.loss:.4f}" if outcome.steps else "none",
        **_scores(evaluation),
    }
    if drift is not None:
        facts["drift"] = drift.lines()[0].removeprefix("drift: ")
    if config.method == "lora":
        facts["rank / alpha"] = f"{config.lora.rank} / {config.lora.alpha:g}"
    if session.data.classes is not None:
        facts["classes"] = ", ".join(session.data.classes)
    of_peft = config.method in OF_PEFT
    lines = ["---", f"base_model: {config.model!r}", *(["library_name: peft"] if of_peft else [])]
    lines += [f"tags: [{config.method}, {config.task}, deltaw]", "---", "", f"# {folder.name}", ""]
    lines += [f"An adapter ({config.method}, {config.task}) for `{config.model}`, trained with deltaw.", ""]
    if generation.get("line"):
        lines += [f"**{generation['line']}**", ""]
    if outcome.interrupted:
        lines += ["**The training was interrupted before its last step.**", ""]
    lines += ["| | |", "| --- | --- |", *[f"| {name} | {_cell(value)} |" for name, value in facts.items()], ""]
    lines += ["## Data", "", *[f"- {_cell(line)}" for line in session.data.report.lines()], "", "## Use", "", "```bash"]
    lines += [f"deltaw chat {folder}", f'deltaw generate {folder} --prompt "..."'] if writes_text else []
    lines += [
        f"deltaw eval {folder}",
        *([f"deltaw serve {folder}"] if writes_text or config.task in _SERVED else []),
        "```",
        "",
    ]
    if of_peft:
        lines += ["The adapter is in PEFT's format: `PeftModel.from_pretrained(model, folder)` loads it too.", ""]
    write_text(folder / "README.md", "\n".join(lines))


def _cell(text: str) -> str:
    """Return a text as it appears in a Markdown table: without HTML, column marks and control characters."""
    return html.escape(escape_control_characters(text), quote=False).replace("|", "\\|").replace("\n", " ")


def _scores(evaluation: Evaluation) -> dict[str, str]:
    """Each metric of held-out rows, a share in percent, with its interval where it has one."""
    found, intervals = {}, evaluation.named_intervals()
    for name, value in evaluation.named_metrics().items():
        form = metric_format(name.rpartition(" ")[2])
        bounds = " to ".join(f"{bound:{form}}" for bound in intervals.get(name, ()))
        if math.isfinite(value):
            found[f"held-out {name}"] = f"{value:{form}}" + (f" (95 % interval {bounds})" if bounds else "")
    return found


# Rows that are shown.
ROWS = 6
# Characters of a row that are kept; of a longer piece, the beginning and the end.
TEXT = 2400
PIECE = 800
# Rows whose lengths are looked at, evenly spread, where there are more.
SAMPLED = 20_000
BINS = 24


def example_rows(
    rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None, classes: Sequence[str] | None
) -> list[dict[str, object]]:
    """Some rows: the first, the shortest, the longest, one of median length, and others spread evenly.

    Args:
        rows: examples or groups of them; may be read from a file one by one.
        tokenizer: None for images, which have no text.
        classes: names of labels that are numbers of classes.

    Returns:
        for each row its number in the file, why it is shown, its tokens, how many of them are labels, its
        pieces ``{"text", "trained"}``, special tokens with
        ``"special"``, and its label where it has one.
    """
    if not len(rows):
        return []
    places = _places(len(rows))
    lengths = np.array([len(rows[int(place)]) for place in places])
    order = np.argsort(lengths, kind="stable")
    wanted = {0: "the first row"}
    if lengths.min() < lengths.max():
        wanted.setdefault(int(places[order[-1]]), "the longest row")
        wanted.setdefault(int(places[order[0]]), "the shortest row")
        wanted.setdefault(int(places[order[len(order) // 2]]), "a row of median length")
    for place in np.linspace(0, len(rows) - 1, ROWS).round():
        if len(wanted) < min(ROWS, len(rows)):
            wanted.setdefault(int(place), "one more row")
    single = [(row, why) for place, why in wanted.items() for row in rows_of(rows[place])]
    return [{"why": why, **_described(row, tokenizer, classes)} for row, why in single[:ROWS]]


def length_counts(rows: Sequence[Any]) -> dict[str, object] | None:
    """How many rows have how many tokens: edges of bins, and rows and label tokens in each.

    None where rows have no length that says anything (images).
    """
    if not len(rows):
        return None
    places = _places(len(rows))
    sampled = [rows[int(place)] for place in places]
    lengths = np.array([len(row) for row in sampled])
    if lengths.max() <= 1:
        return None
    labels = np.array([row.label_count for row in sampled])
    bins = min(BINS, int(lengths.max() - lengths.min()) + 1)
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, bins + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    return {
        "edges": edges.tolist(),
        "rows": counts.tolist(),
        "sampled": len(sampled),
        "of": len(rows),
        "median": float(np.median(lengths)),
        "labels_median": float(np.median(labels)),
    }


def _places(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLED)).round().astype(int))


def _described(row: Any, tokenizer: PreTrainedTokenizerBase | None, classes: Sequence[str] | None) -> dict[str, object]:
    tokens = getattr(row, "tokens", None)
    described: dict[str, object] = {"row": row.row, "tokens": 0 if tokens is None else len(tokens)}
    if not isinstance(row, Example):
        label = row.label
        named = classes is not None and isinstance(label, int) and 0 <= label < len(classes)
        described["label"] = classes[label] if named and classes is not None else label
    else:
        described["label_tokens"] = row.label_count
    if tokens is None or tokenizer is None:
        size = getattr(row, "size", None)
        text = f"an image of {size[0]}×{size[1]} pixels" if size else "no text"
        described["pieces"] = [{"text": text, "trained": False}]
        return described
    mask = row.is_label if isinstance(row, Example) else np.zeros(len(tokens), bool)
    described["pieces"] = _bounded(_pieces(tokens, mask, tokenizer))
    return described


def _pieces(tokens: np.ndarray, mask: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, object]]:
    """Runs of tokens with the same mask, as text; a special token is a piece of its own."""
    known = len(tokenizer)
    virtual = tokens >= known  # of a method; they have no text
    cuts = [0, *(np.flatnonzero(np.diff(virtual)) + 1).tolist(), len(tokens)]
    found: list[dict[str, object]] = []
    for start, end in itertools.pairwise(cuts):
        if start < end and virtual[start]:
            text = f"[{end - start} virtual token{'s' if end - start > 1 else ''}]"
            found.append({"text": text, "trained": False, "special": True})
        elif start < end:
            for piece in pieces(tokens[start:end], mask[start:end], tokenizer):
                told: dict[str, object] = {"text": piece.text, "trained": piece.label}
                found.append({**told, "special": True} if piece.special else told)
    return found


def _bounded(given: list[dict[str, object]]) -> list[dict[str, object]]:
    """Pieces of at most :data:`TEXT` characters together: what is left out is counted in its place."""
    kept: list[dict[str, object]] = []
    left = TEXT
    for number, piece in enumerate(given):
        text = str(piece["text"])
        most = min(PIECE, left)
        if most <= 0:
            rest = sum(len(str(p["text"])) for p in given[number:])
            kept.append({"text": f" … {rest:,} more characters", "trained": False, "cut": True})
            break
        left -= min(len(text), most)
        if len(text) > most:
            half = most // 2
            text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
        kept.append({**piece, "text": text})
    return kept


# The most entries of one dictionary or list, and characters of one text.
ENTRIES, CHARACTERS = 64, 4000
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy")


def facts(session: Session, plan: Plan | None, chosen: Mapping[str, Choice], limit: int) -> dict[str, Any]:
    """What ``run.json`` holds of a run before its first step.

    Args:
        plan: of its memory; None where there is none. limit: bytes that the machine gives.
        chosen: what the run chose itself.
    """
    data, config = session.data, session.config
    found: dict[str, Any] = plain(
        {
            "model": config.model,
            "task": config.task,
            "method": config.method,
            "revisions": revisions(config),
            "writes_text": session.task.writes_text,
            "total_steps": session.total_steps,
            "data": {
                "lines": data.report.lines(),
                "counts": data.report.as_dict(),
                "lengths": length_counts(data.train),
                "examples": example_rows(data.train, session.task.tokenizer, data.classes),
            },
            "chosen": told_choices(chosen),
            "notes": list(session.said),
            "plan": None if plan is None else {**plan.as_dict(), "limit_bytes": limit},
            "versions": versions(),
            "machine": {
                "processor": processor_name(),
                "processors": len(usable_processors()),
                "memory_bytes": psutil.virtual_memory().total,
                "system": platform.platform(terse=True),
            },
        }
    )
    return found


def revisions(config: RunConfig) -> dict[str, str]:
    """What the settings name on a hub, each with the commit that its revision stands for."""
    model = already_here(config.model) if resolve_hub_id(config.model) else None
    rows = (*references(config.data.train), *eval_sets(config.data.eval).values())
    found = {text: commit_of(text) for text in rows if isinstance(text, str)}
    found[config.model] = None if model is None else model.rpartition("@")[2]
    return {name: commit for name, commit in found.items() if commit is not None}


def told_choices(chosen: Mapping[str, Choice]) -> dict[str, object]:
    """Choices as plain values."""
    return {key: {"value": choice.value, "why": choice.why} for key, choice in chosen.items()}


def next_commands(
    folder: Path, state: str, method: str, task: str, *, writes_text: bool, every: bool = False
) -> list[dict[str, str]]:
    """Commands to go on with, each with what it does; with ``every`` also those that are needed less often."""
    run = shell_word(folder)
    commands = []
    if state == FINISHED:
        if writes_text:
            commands.append((f"deltaw chat {run}", "talk with it"))
            if every:
                commands.append((f'deltaw generate {run} --prompt "your question"', "answer one prompt"))
        commands.append((f"deltaw eval {run} --base", "compare it with the base model"))
        if method == "lora":
            commands.append((f"deltaw inspect {run}", "where and how much it changed"))
        if writes_text or task in _SERVED:
            commands.append((f"deltaw serve {run}", "serve it with the OpenAI API"))
        if method == "lora":
            merged, exported = (shell_word(f"{os.fspath(folder)}-{kind}") for kind in ("merged", "gguf"))
            commands.append((f"deltaw merge {run} --output {merged}", "make one model of base and adapter"))
            if every and writes_text:
                file = f"deltaw export {run} --format gguf --type q8_0 --output {exported}"
                commands.append((file, "make a file for Ollama and llama.cpp"))
    if any((folder / FOLDER).glob("step-*")):
        resume = f"deltaw train --resume {run}"
        further = (f"{resume} --train.epochs N", "train further, to N epochs in all")
        commands.append(further if state == FINISHED else (resume, "continue"))
    if folder.parent != folder:
        commands.append((f"deltaw runs {shell_word(folder.parent)}", "list this and other runs"))
    return [{"command": command, "what": what} for command, what in commands]


@functools.cache
def versions() -> dict[str, str]:
    """Of Python, deltaw and the libraries that numbers depend on."""
    found = {"deltaw": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def plain(value: Any) -> Any:
    """A value for JSON, of bounded size: no nan, long texts and long collections shortened."""
    if isinstance(value, Mapping):
        kept = {str(key): plain(entry) for key, entry in list(value.items())[:ENTRIES]}
        if len(value) > ENTRIES:
            kept["…"] = f"and {len(value) - ENTRIES:,} more"
        return kept
    if isinstance(value, str):
        return value if len(value) <= CHARACTERS else value[: CHARACTERS - 1] + "…"
    if isinstance(value, Sequence):
        more = [f"… and {len(value) - ENTRIES:,} more"] if len(value) > ENTRIES else []
        return [plain(entry) for entry in value[:ENTRIES]] + more
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    return str(value)
