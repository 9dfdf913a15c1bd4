"""Summarize a run for its folder: the model card, and the description in ``run.json``.

The description contains data statistics, example rows with loss masks, the memory plan, automatic choices, versions,
the machine, and suggested commands.
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

from deltaw.atomic_files import write_text
from deltaw.data.example import Example, rows_of, token_spans
from deltaw.data.sources import commit_of
from deltaw.errors import escape_control_characters
from deltaw.hub.app_stores import find_stored_model, is_store_reference
from deltaw.hub.folders import find_cached, resolve_hub_id
from deltaw.hub.outside_references import read_json_object
from deltaw.kernels.processor import processor_name
from deltaw.machine.choices import usable_processors
from deltaw.methods.start import lineage_lines
from deltaw.platforms import shell_word
from deltaw.runs.folder import CHECKPOINT_FOLDER, FINISHED, Run
from deltaw.settings import method_registry, task_registry
from deltaw.settings.config import RunConfig
from deltaw.settings.data import eval_sets
from deltaw.settings.mixture import format_sources, references
from deltaw.training.drift import Drift
from deltaw.training.evaluation.base import Evaluation, metric_format
from deltaw.training.session import Session
from deltaw.training.state import Outcome
from deltaw.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltaw.machine.choices import Choice
    from deltaw.memory.plan import Plan


# Methods with PEFT-compatible files.
PEFT_METHODS = ("lora", "prompt")


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
    config = session.config
    generates_text = session.task.generates_text
    card_rows = {
        "base model": config.model,
        "task": config.task,
        "method": config.method,
        "training data": format_sources(config.data.train),
        "rows": f"{min(outcome.rows, session.data.report.rows_kept):,} used, {len(session.data.held_out):,} held out",
        "optimizer steps": str(outcome.steps),
        "trained parameters": f"{trained:,}",
        "learning rate": f"{session.learning_rate:g}",
        "training loss": f"{outcome.loss:.4f}" if outcome.steps else "none",
        **_scores(evaluation),
    }
    if drift is not None:
        card_rows["drift"] = drift.lines()[0].removeprefix("drift: ")
    if config.method == "lora":
        card_rows["rank / alpha"] = f"{config.lora.rank} / {config.lora.alpha:g}"
    if session.start is not None:
        card_rows["trained"] = "; ".join(lineage_lines(session.start.lineage(config)))
    if session.data.classes is not None:
        card_rows["classes"] = ", ".join(session.data.classes)
    is_peft = config.method in PEFT_METHODS
    lines = ["---", f"base_model: {config.model!r}", *(["library_name: peft"] if is_peft else [])]
    lines += [f"tags: [{config.method}, {config.task}, deltaw]", "---", "", f"# {folder.name}", ""]
    lines += [f"An adapter ({config.method}, {config.task}) for `{config.model}`, trained with deltaw.", ""]
    if generation.get("line"):
        lines += [f"**{generation['line']}**", ""]
    if outcome.interrupted:
        lines += ["**The training was interrupted before its last step.**", ""]
    lines += ["| | |", "| --- | --- |", *[f"| {name} | {_cell(value)} |" for name, value in card_rows.items()], ""]
    lines += ["## Data", "", *[f"- {_cell(line)}" for line in session.data.report.lines()], "", "## Use", "", "```bash"]
    lines += [f"deltaw chat {folder}", f'deltaw generate {folder} --prompt "..."'] if generates_text else []
    can_serve = generates_text and _can_serve(folder, config.method)
    served = [f"deltaw serve {folder}"] if can_serve or task_registry.entry_of(config.task).serves else []
    lines += [f"deltaw eval {folder}", *served, "```", ""]
    if is_peft:
        lines += ["The adapter is in PEFT's format: `PeftModel.from_pretrained(model, folder)` loads it too.", ""]
    write_text(folder / "README.md", "\n".join(lines))


def _cell(text: str) -> str:
    """Return a text for a Markdown table cell, without HTML, column separators and control characters."""
    return html.escape(escape_control_characters(text), quote=False).replace("|", "\\|").replace("\n", " ")


def _scores(evaluation: Evaluation) -> dict[str, str]:
    """Return the formatted metrics of the held-out rows with their intervals."""
    scores = {}
    intervals = evaluation.named_intervals()
    for name, value in evaluation.named_metrics().items():
        number_format = metric_format(name.rpartition(" ")[2])
        bounds = " to ".join(f"{bound:{number_format}}" for bound in intervals.get(name, ()))
        if math.isfinite(value):
            scores[f"held-out {name}"] = f"{value:{number_format}}" + (f" (95 % interval {bounds})" if bounds else "")
    return scores


# Maximum number of example rows.
MAX_ROWS = 6
# Maximum characters of a row and of a span. Longer spans are truncated in the middle.
MAX_TEXT = 2400
MAX_SPAN = 800
# Maximum number of rows, evenly spaced, for length statistics.
MAX_SAMPLED_ROWS = 20_000
MAX_BINS = 24


def example_rows(
    rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None, classes: Sequence[str] | None
) -> list[dict[str, object]]:
    """Return example rows: the first, the shortest, the longest, one of median length, and evenly spaced ones.

    Args:
        rows: Examples or groups of examples, possibly read lazily from a file.
        tokenizer: Tokenizer, or None for images.
        classes: Class names for numeric labels.

    Returns:
        For each row: its number in the file, the reason for its selection, its number of tokens and labels, its label
        if it has one, and its pieces ``{"text", "trained"}``, with ``"special"`` for special tokens.
    """
    if not len(rows):
        return []
    sample = _sample_indices(len(rows))
    lengths = np.array([len(rows[int(index)]) for index in sample])
    order = np.argsort(lengths, kind="stable")
    selected = {0: "the first row"}
    if lengths.min() < lengths.max():
        selected.setdefault(int(sample[order[-1]]), "the longest row")
        selected.setdefault(int(sample[order[0]]), "the shortest row")
        selected.setdefault(int(sample[order[len(order) // 2]]), "a row of median length")
    for index in np.linspace(0, len(rows) - 1, MAX_ROWS).round():
        if len(selected) < min(MAX_ROWS, len(rows)):
            selected.setdefault(int(index), "one more row")
    single = [(row, reason) for index, reason in selected.items() for row in rows_of(rows[index])]
    return [{"why": reason, **_describe(row, tokenizer, classes)} for row, reason in single[:MAX_ROWS]]


def length_counts(rows: Sequence[Any]) -> dict[str, object] | None:
    """Return a histogram of row lengths with the median numbers of tokens and labels.

    None for rows without a meaningful length (images).
    """
    if not len(rows):
        return None
    sampled = [rows[int(index)] for index in _sample_indices(len(rows))]
    lengths = np.array([len(row) for row in sampled])
    if lengths.max() <= 1:
        return None
    labels = np.array([row.label_count for row in sampled])
    bins = min(MAX_BINS, int(lengths.max() - lengths.min()) + 1)
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


def _sample_indices(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, MAX_SAMPLED_ROWS)).round().astype(int))


def _describe(row: Any, tokenizer: PreTrainedTokenizerBase | None, classes: Sequence[str] | None) -> dict[str, object]:
    tokens = getattr(row, "tokens", None)
    described: dict[str, object] = {"row": row.row, "tokens": 0 if tokens is None else len(tokens)}
    if not isinstance(row, Example):
        label = row.label
        has_class_name = classes is not None and isinstance(label, int) and 0 <= label < len(classes)
        described["label"] = classes[label] if has_class_name and classes is not None else label
    else:
        described["label_tokens"] = row.label_count
    if tokens is None or tokenizer is None:
        size = getattr(row, "size", None)
        text = f"an image of {size[0]}×{size[1]} pixels" if size else "no text"
        described["pieces"] = [{"text": text, "trained": False}]
        return described
    mask = row.is_label if isinstance(row, Example) else np.zeros(len(tokens), bool)
    described["pieces"] = _limit_length(_pieces(tokens, mask, tokenizer))
    return described


def _pieces(tokens: np.ndarray, mask: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, object]]:
    """Split tokens into text spans with the same mask. A special token is a separate span."""
    virtual = tokens >= len(tokenizer)  # virtual tokens of a method have no text
    cuts = [0, *(np.flatnonzero(np.diff(virtual)) + 1).tolist(), len(tokens)]
    pieces: list[dict[str, object]] = []
    for start, end in itertools.pairwise(cuts):
        if start < end and virtual[start]:
            text = f"[{end - start} virtual token{'s' if end - start > 1 else ''}]"
            pieces.append({"text": text, "trained": False, "special": True})
        elif start < end:
            for piece in token_spans(tokens[start:end], mask[start:end], tokenizer):
                entry: dict[str, object] = {"text": piece.text, "trained": piece.label}
                pieces.append({**entry, "special": True} if piece.special else entry)
    return pieces


def _limit_length(pieces: list[dict[str, object]]) -> list[dict[str, object]]:
    """Truncate pieces to :data:`MAX_TEXT` characters in total, with notes about omitted characters."""
    result: list[dict[str, object]] = []
    remaining = MAX_TEXT
    for number, piece in enumerate(pieces):
        text = str(piece["text"])
        limit = min(MAX_SPAN, remaining)
        if limit <= 0:
            omitted = sum(len(str(p["text"])) for p in pieces[number:])
            result.append({"text": f" … {omitted:,} more characters", "trained": False, "cut": True})
            break
        remaining -= min(len(text), limit)
        if len(text) > limit:
            half = limit // 2
            text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
        result.append({**piece, "text": text})
    return result


# Maximum number of entries of a dictionary or list, and of characters of a text.
MAX_ENTRIES = 64
MAX_CHARACTERS = 4000
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy")


def describe_run(session: Session, plan: Plan | None, chosen: Mapping[str, Choice[Any]], limit: int) -> dict[str, Any]:
    """Return the description of a run for ``run.json`` before its first step.

    Args:
        plan: Memory plan, or None.
        chosen: Automatic choices.
        limit: Available memory in bytes.
    """
    data = session.data
    config = session.config
    description: dict[str, Any] = to_plain(
        {
            "model": config.model,
            "task": config.task,
            "method": config.method,
            "revisions": revisions(config),
            "writes_text": session.task.generates_text,
            "total_steps": session.total_steps,
            "data": {
                "lines": data.report.lines(),
                "counts": data.report.as_dict(),
                "lengths": length_counts(data.train),
                "examples": example_rows(data.train, session.task.tokenizer, data.classes),
            },
            "chosen": choices_as_dict(chosen),
            "notes": list(session.notes),
            "start": None if session.start is None else session.start.lineage(config),
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
    return description


def revisions(config: RunConfig) -> dict[str, str]:
    """Return the commit of each hub reference in the settings, and the digest of a model of Ollama or LM Studio."""
    model = find_cached(config.model) if resolve_hub_id(config.model) else None
    rows = (*references(config.data.train), *eval_sets(config.data.eval).values())
    commits = {text: commit_of(text) for text in rows if isinstance(text, str)}
    commits[config.model] = None if model is None else model.rpartition("@")[2]
    if is_store_reference(config.model):
        commits[config.model] = find_stored_model(config.model).digest
    return {name: commit for name, commit in commits.items() if commit is not None}


def choices_as_dict(chosen: Mapping[str, Choice[Any]]) -> dict[str, object]:
    """Return choices as plain values."""
    return {key: {"value": choice.value, "why": choice.why} for key, choice in chosen.items()}


def _can_serve(folder: Path, method: str) -> bool:
    """Return True if ``deltaw serve`` accepts the adapter of a run that generates text."""
    adapter = read_json_object(folder / "adapter_config.json")
    changes_weights = adapter.get("modules_to_save") or Run(folder).setting("lora.vision_tower")
    return method == "prompt" or (method == "lora" and not changes_weights)


def next_commands(
    folder: Path, state: str, method: str, task: str, *, generates_text: bool, every: bool = False
) -> list[dict[str, str]]:
    """Return suggested commands with descriptions. ``every`` includes less common commands."""
    run = shell_word(folder)
    commands = []
    if state == FINISHED:
        if generates_text:
            commands.append((f"deltaw chat {run}", "chat with the model"))
            if every:
                commands.append((f'deltaw generate {run} --prompt "your question"', "answer one prompt"))
        commands.append((f"deltaw eval {run} --with-base", "compare it with the base model"))
        if method == "lora":
            commands.append((f"deltaw inspect {run}", "show the changes by layer"))
        can_serve = generates_text and _can_serve(folder, method)
        if can_serve or ((entry := task_registry.find(task)) is not None and entry.serves):
            commands.append((f"deltaw serve {run}", "serve it with the OpenAI API"))
        of_package = method in method_registry.names() and not method_registry.is_built_in(method)
        if method == "lora" or (generates_text and not can_serve and not of_package):
            merged, exported = (shell_word(f"{os.fspath(folder)}-{kind}") for kind in ("merged", "gguf"))
            commands.append((f"deltaw merge {run} --output {merged}", "merge base model and adapter"))
            if every and generates_text and method == "lora":
                file = f"deltaw export {run} --format gguf --type q8_0 --output {exported}"
                commands.append((file, "export to GGUF for Ollama and llama.cpp"))
    if any((folder / CHECKPOINT_FOLDER).glob("step-*")):
        resume = f"deltaw train --resume {run}"
        extend = (f"{resume} --train.epochs N", "train further, to N epochs in total")
        commands.append(extend if state == FINISHED else (resume, "resume"))
    if folder.parent != folder:
        commands.append((f"deltaw runs {shell_word(folder.parent)}", "list this and other runs"))
    return [{"command": command, "what": description} for command, description in commands]


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python, deltaw and the libraries that affect numerical results."""
    result = {"deltaw": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = "not installed"
    return result


def to_plain(value: Any) -> Any:
    """Convert a value for JSON with bounded size: NaN becomes None, and long texts and collections are truncated."""
    if isinstance(value, Mapping):
        result = {str(key): to_plain(entry) for key, entry in list(value.items())[:MAX_ENTRIES]}
        if len(value) > MAX_ENTRIES:
            result["…"] = f"and {len(value) - MAX_ENTRIES:,} more"
        return result
    if isinstance(value, str):
        return value if len(value) <= MAX_CHARACTERS else value[: MAX_CHARACTERS - 1] + "…"
    if isinstance(value, Sequence):
        suffix = [f"… and {len(value) - MAX_ENTRIES:,} more"] if len(value) > MAX_ENTRIES else []
        return [to_plain(entry) for entry in value[:MAX_ENTRIES]] + suffix
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    return str(value)
