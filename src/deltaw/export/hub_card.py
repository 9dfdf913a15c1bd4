"""Public description of a run: the model card, and settings without local paths.

Only counts and hashes of the rows are published, never rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from deltaw.data.sources import is_on_hub
from deltaw.hub import packages
from deltaw.hub.app_stores import is_store_reference
from deltaw.hub.folders import resolve_hub_id
from deltaw.methods.trust import CHAT_TEMPLATE
from deltaw.runs.folder import Run, mapping
from deltaw.runs.summary import PEFT_METHODS
from deltaw.settings import task_registry
from deltaw.settings.config import RunConfig
from deltaw.settings.local_names import Kind, replace_names
from deltaw.settings.mixture import references
from deltaw.settings.model_parts import parse_parts
from deltaw.training.drift import Drift
from deltaw.training.evaluation.base import metric_format

_DROP_REASONS = {
    "not_selected": "not used: more than the requested number of rows",
    "duplicates": "dropped: duplicate of an earlier row",
    "dropped_long": "dropped: too long",
    "other_classes": "dropped: other class",
    "without_label": "dropped: without a label",
    "cut": "truncated",
}


@dataclass(frozen=True)
class PublicBase:
    """Public identity of the base model.

    Attributes:
        name: Hub id, or the name in the run without its path.
        revision: Commit, branch or tag, or None if unknown.
        note: Note for users, or empty.
    """

    name: str
    revision: str | None = None
    note: str = ""

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def public_name(reference: str) -> str:
    """Return the public name of rows or a model. Of a local path, only the last part is returned."""
    if (parts := parse_parts(reference)) is not None:
        return parts.replace_references(public_name).reference
    is_public = packages.is_package_reference(reference) or is_store_reference(reference) or is_on_hub(reference)
    return reference if is_public else _last_part(reference)


def public_settings(config: RunConfig, base: PublicBase) -> RunConfig:
    """Return a run's settings without local paths and without its tracker."""
    public = RunConfig.read(replace_names(config.model_dump(mode="json"), RunConfig, _public))
    template = None if config.data.chat_template is None else CHAT_TEMPLATE
    changed = {"model": base.reference, "data": replace(public.data, chat_template=template), "track": None}
    return public.model_copy(update=changed)


def local_paths(config: RunConfig) -> list[str]:
    """Return all values of a run's settings that :func:`public_settings` shortens."""
    paths: list[str] = []

    def collect(text: str, kind: Kind, key: str) -> str:
        paths.extend([text] if _public(text, kind, key) != text else [])
        return text

    replace_names(config.model_dump(mode="json"), RunConfig, collect)
    return paths


def _public(text: str, kind: Kind, key: str) -> str:
    """Return a public reference unchanged, and the last part of a path. Server addresses are replaced."""
    if kind == "address":
        return f"{text.partition('://')[0]}://address.invalid"
    file, colon, name = text.rpartition(":") if kind == "code" else (text, "", "")
    return public_name(text) if kind == "reference" else f"{_last_part(file)}{colon}{name}"


def _last_part(path: str) -> str:
    """Return the last part of a POSIX or Windows path."""
    return PurePosixPath(PureWindowsPath(path).as_posix()).name or path


def model_card(run: Run, config: RunConfig, base: PublicBase, repo: str, *, merged: bool) -> str:
    """Return the ``README.md``: scores, drift, statistics of the rows, and instructions to reproduce the run.

    Args:
        run: Run to describe.
        config: Settings of the run.
        base: Base model.
        repo: Repository of the card.
        merged: Describe the merged model instead of the adapter.
    """
    name = repo.rpartition("/")[2]
    method = config.method
    task = config.task
    header: dict[str, object] = {}
    if resolve_hub_id(base.name) is not None:  # the hub rejects other names
        header = {"base_model": base.name, "base_model_relation": "finetune" if merged else "adapter"}
    library = "transformers" if merged else "peft" if method in PEFT_METHODS else None
    optional = {"library_name": library, "pipeline_tag": task_registry.entry_of(task).pipeline}
    header |= {key: value for key, value in optional.items() if value is not None}
    revision = f" at revision `{base.revision}`" if base.revision else ""
    subject, relation = ("A model: the base model", "with its adapter merged, ") if merged else ("An adapter", "for ")
    kind = f"{method}, {task}" + (f", rank {config.lora.rank}, alpha {config.lora.alpha:g}" if method == "lora" else "")
    lines = ["---", yaml.safe_dump({**header, "tags": [method, task, "deltaw"]}, sort_keys=False).strip(), "---", ""]
    lines += [f"# {name}", "", f"{subject} ({kind}) {relation}`{base.name}`{revision}. Trained with deltaw."]
    lines += ["", f"**{base.note}**"] if base.note else []
    warning = mapping(run.result.get("generation")).get("line")
    lines += ["", f"**{warning}**"] if warning else []
    lines += ["", "## Scores on held-out rows", "", *_scores(run), "", "## Data", "", *_data(run, config), ""]
    reference = repo if merged else f"{repo} --model {base.reference}"
    commands = [f"deltaw chat {reference}", f"deltaw serve {reference}"]
    commands = commands if run.values.get("writes_text") else [f"deltaw eval {reference} --data FILE"]
    lines += ["## Use", "", "```bash", *commands, "```", ""]
    seed = config.train.seed
    steps = run.result.get("steps")
    lines += ["## Reproduce the training", "", "```bash", f"hf download {repo} run.yaml --local-dir ."]
    rows = ", ".join(_code(public_name(reference)) for reference in references(config.data.train))
    lines += ["deltaw train run.yaml", "```", "", f"Training rows: {rows}, as configured in `run.yaml`."]
    versions = ", ".join(f"{key} {value}" for key, value in run.part("versions").items())
    lines += [f"Seed {seed}, {steps} optimizer steps, {run.part('machine').get('processor', 'unknown processor')}."]
    return "\n".join([*lines, f"Versions: {versions}.", ""])


def _scores(run: Run) -> Iterator[str]:
    """Yield a table of every metric before and after training, and the drift."""
    yield from ("| | base model | trained |", "| --- | --- | --- |")
    for name, value in _flat(mapping(run.result.get("eval"))):
        yield f"| {name.replace('_', ' ')} | {_value(name, run.base.get(name))} | {_value(name, value)} |"
    score = mapping(run.result.get("score"))
    if isinstance(interval := score.get("interval"), list):
        bounds = " to ".join(_value(str(score.get("metric")), bound) for bound in interval)
        yield from ("", f"95 % interval of {str(score.get('metric')).replace('_', ' ')}: {bounds}.")
    drift = mapping(run.result.get("drift"))
    if drift:
        summary = Drift(**{key: value for key, value in drift.items() if key != "change"}).lines()[0]
        yield from ("", summary[:1].upper() + summary[1:] + ".")


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield metrics by name. Metrics of a named set are prefixed by ``set/``."""
    for name, value in values.items():
        items = value.items() if isinstance(value, Mapping) else None
        yield from [(name, value)] if items is None else [(f"{name}/{key}", v) for key, v in items]


def _value(name: str, value: object) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "not measured"
    return format(value, metric_format(name.rpartition("/")[2]))


def _data(run: Run, config: RunConfig) -> Iterator[str]:
    """Yield the sources and counts of the rows, and hashes of the training and held-out rows."""
    counts = mapping(run.part("data").get("counts"))
    commits = run.part("revisions")
    for reference in references(config.data.train):
        revision = f" at commit `{commits[reference]}`" if reference in commits else ""
        yield f"- source: {_code(public_name(reference))}{revision}"
    num_used = counts.get("rows_kept", 0)
    held_out = counts.get("held_out", 0)
    yield f"- rows: {counts.get('rows_read', 0):,} read, {num_used:,} trained on, {held_out:,} held out"
    yield f"- tokens: {counts.get('tokens', 0):,}, {counts.get('label_tokens', 0):,} of them labels"
    for reason, count in mapping(counts.get("bad_rows")).items():
        yield f"- skipped: {count:,} ({_code(reason)})"
    for key, reason_text in _DROP_REASONS.items():
        if counts.get(key):
            yield f"- {counts[key]:,} {reason_text}"
    rows = mapping(mapping(run.training).get("rows"))
    for key, description in (("train", "training rows"), ("eval", "held-out rows")):
        if digest := mapping(rows.get(key)).get("digest"):
            yield f"- content hash of the {description}: `{digest}`"


def _code(text: str) -> str:
    """Format untrusted text as inline code that cannot be escaped by Markdown."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"
