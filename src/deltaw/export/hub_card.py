"""What a run says of itself where everybody may read it: the model card of a hub, and settings without local paths.

Of the rows there are counts and a hash, never a row. Knows the run's folder; not how anything is sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from deltaw.data.mixture import references
from deltaw.data.sources import is_on_hub
from deltaw.hub import packages
from deltaw.hub.folders import resolve_hub_id
from deltaw.local_names import Kind, replace_names
from deltaw.runs.folder import Run, mapping
from deltaw.runs.summary import OF_PEFT
from deltaw.settings import RunConfig
from deltaw.training.drift import Drift
from deltaw.training.evaluation.base import metric_format
from deltaw.training.origin import CHAT_TEMPLATE

_PIPELINES = {
    "causal-lm": "text-generation",
    "preference": "text-generation",
    "sequence-classification": "text-classification",
    "image-classification": "image-classification",
    "reranking": "text-ranking",
}
_LOST = {
    "not_chosen": "not used: fewer rows were asked for",
    "duplicates": "the same as an earlier row",
    "dropped_long": "dropped: too long",
    "other_classes": "dropped: of another class",
    "without_label": "dropped: without a label",
    "cut": "truncated",
}


@dataclass(frozen=True)
class PublicBase:
    """The base model as others find it.

    Attributes:
        name: a hub id; else what the run calls it, without a path.
        revision: the commit, branch or tag; None where it is not known.
        note: what to know of it; empty if nothing.
    """

    name: str
    revision: str | None = None
    note: str = ""

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def public_name(reference: str) -> str:
    """What names rows or a model elsewhere too; of a path, its last part alone."""
    return reference if packages.is_package_reference(reference) or is_on_hub(reference) else _last_part(reference)


def public_settings(config: RunConfig, base: PublicBase) -> RunConfig:
    """Return a run's settings without paths of its machine and without its tracker."""
    public = RunConfig.read(replace_names(config.model_dump(mode="json"), RunConfig, _public))
    template = None if config.data.chat_template is None else CHAT_TEMPLATE
    changed = {"model": base.reference, "data": replace(public.data, chat_template=template), "track": None}
    return public.model_copy(update=changed)


def local_paths(config: RunConfig) -> list[str]:
    """Return all texts of a run's settings that :func:`public_settings` shortens."""
    paths: list[str] = []

    def collect(text: str, kind: Kind, key: str) -> str:
        paths.extend([text] if _public(text, kind, key) != text else [])
        return text

    replace_names(config.model_dump(mode="json"), RunConfig, collect)
    return paths


def _public(text: str, kind: Kind, key: str) -> str:
    """Return what names the same elsewhere, or the last part of a path. The address of a server is not published."""
    if kind == "address":
        return f"{text.partition('://')[0]}://address.invalid"
    file, colon, name = text.rpartition(":") if kind == "code" else (text, "", "")
    return public_name(text) if kind == "reference" else f"{_last_part(file)}{colon}{name}"


def _last_part(path: str) -> str:
    """Return the last part of a path of this or another system."""
    return PurePosixPath(PureWindowsPath(path).as_posix()).name or path


def model_card(run: Run, config: RunConfig, base: PublicBase, repo: str, *, merged: bool) -> str:
    """``README.md``: scores beside the base model's, drift, an account of the rows, and how to train it again.

    Args:
        config: the run's settings. repo: where the card will stand.
        merged: for the merged model instead of the adapter.
    """
    name, method, task = repo.rpartition("/")[2], config.method, config.task
    head: dict[str, object] = {}
    if resolve_hub_id(base.name) is not None:  # a hub refuses any other name
        head = {"base_model": base.name, "base_model_relation": "finetune" if merged else "adapter"}
    head |= {"library_name": "peft"} if method in OF_PEFT and not merged else {}
    head |= {"library_name": "transformers"} if merged else {}
    head |= {"pipeline_tag": _PIPELINES[task]} if task in _PIPELINES else {}
    at = f" at revision `{base.revision}`" if base.revision else ""
    what = "A model: the base model" if merged else "An adapter"
    kind = f"{method}, {task}" + (f", rank {config.lora.rank}, alpha {config.lora.alpha:g}" if method == "lora" else "")
    lines = ["---", yaml.safe_dump({**head, "tags": [method, task, "deltaw"]}, sort_keys=False).strip(), "---", ""]
    lines += [f"# {name}", "", f"{what} ({kind}) {'with its adapter merged, ' if merged else 'for '}`{base.name}`{at}."]
    lines[-1] += " Trained with deltaw."
    lines += ["", f"**{base.note}**"] if base.note else []
    warning = mapping(run.result.get("generation")).get("line")
    lines += ["", f"**{warning}**"] if warning else []
    lines += ["", "## Scores on held-out rows", "", *_scores(run), "", "## Data", "", *_data(run, config), ""]
    lines += ["## Use", "", "```bash", *_use(run, repo, base, merged), "```", ""]
    seed, steps = config.train.seed, run.result.get("steps")
    lines += ["## Train it again", "", "```bash", f"hf download {repo} run.yaml --local-dir .", "deltaw train run.yaml"]
    rows = ", ".join(_code(public_name(reference)) for reference in references(config.data.train))
    lines += ["```", "", f"`run.yaml` names the rows: {rows}."]
    versions = ", ".join(f"{key} {value}" for key, value in run.part("versions").items())
    lines += [f"Seed {seed}, {steps} optimizer steps, {run.part('machine').get('processor', 'unknown processor')}."]
    return "\n".join([*lines, f"Versions: {versions}.", ""])


def _scores(run: Run) -> Iterator[str]:
    """A table of every metric for the base model and after training, and the drift."""
    yield from ("| | base model | trained |", "| --- | --- | --- |")
    trained = dict(_flat(mapping(run.result.get("eval"))))
    for name, value in trained.items():
        yield f"| {name.replace('_', ' ')} | {_value(name, run.base.get(name))} | {_value(name, value)} |"
    score = mapping(run.result.get("score"))
    if isinstance(interval := score.get("interval"), list):
        bounds = " to ".join(_value(str(score.get("metric")), bound) for bound in interval)
        yield from ("", f"95 % interval of {str(score.get('metric')).replace('_', ' ')}: {bounds}.")
    drift = mapping(run.result.get("drift"))
    if drift:
        told = Drift(**{key: value for key, value in drift.items() if key != "change"}).lines()[0]
        yield from ("", told[:1].upper() + told[1:] + ".")


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Metrics by name; those of a named set as ``set/metric``."""
    for name, value in values.items():
        inner = value.items() if isinstance(value, Mapping) else None
        yield from [(name, value)] if inner is None else [(f"{name}/{key}", v) for key, v in inner]


def _value(name: str, value: object) -> str:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "not measured"
    return format(value, metric_format(name.rpartition("/")[2]))


def _data(run: Run, config: RunConfig) -> Iterator[str]:
    """Sources and counts of the rows, and hashes of what was trained and evaluated on."""
    counts = mapping(run.part("data").get("counts"))
    commits = run.part("revisions")
    for reference in references(config.data.train):
        at = f" at commit `{commits[reference]}`" if reference in commits else ""
        yield f"- source: {_code(public_name(reference))}{at}"
    kept, held_out = counts.get("rows_kept", 0), counts.get("held_out", 0)
    yield f"- rows: {counts.get('rows_read', 0):,} read, {kept:,} trained on, {held_out:,} held out"
    yield f"- tokens: {counts.get('tokens', 0):,}, {counts.get('label_tokens', 0):,} of them labels"
    for reason, count in mapping(counts.get("bad_rows")).items():
        yield f"- skipped: {count:,} ({_code(reason)})"
    for key, said in _LOST.items():
        if counts.get(key):
            yield f"- {counts[key]:,} {said}"
    rows = mapping(mapping(run.training).get("rows"))
    for key, what in (("train", "training rows"), ("eval", "held-out rows")):
        if digest := mapping(rows.get(key)).get("digest"):
            yield f"- content hash of the {what}: `{digest}`"


def _use(run: Run, repo: str, base: PublicBase, merged: bool) -> list[str]:
    model = "" if merged else f" --model {base.reference}"
    verbs = ("chat", "serve") if run.values.get("writes_text") else ("eval",)
    return [f"deltaw {verb} {repo}{model}" + (" --data FILE" if verb == "eval" else "") for verb in verbs]


def _code(text: str) -> str:
    """A text of somebody's choice as code, which no Markdown in it leaves."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"
