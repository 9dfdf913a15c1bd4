"""Comparison of methods, computed from the stored results only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from deltaw.experiments.comparison import BASE, Comparison, MethodResult, SeedResult
from deltaw.experiments.entry import ComparedMethod
from deltaw.experiments.intervals import difference_interval, random_effects_interval
from deltaw.runs.folder import mapping
from deltaw.settings.config import RunConfig
from deltaw.training.evaluation.base import SHARE_METRICS, Interval
from deltaw.training.monitoring.generation import WORSE

StoredRun = Mapping[str, Any]
Scores: TypeAlias = np.ndarray | None


def build_comparison(
    config: RunConfig,
    entries: Sequence[ComparedMethod],
    base: ComparedMethod | None,
    *,
    seeds: Sequence[int],
    reference: str | None,
    folder: str,
) -> Comparison:
    """Build the comparison from the results so far.

    Args:
        seeds: Requested seeds. A method counts when it has a result for each seed.
        reference: Method that the differences refer to, or None for the best one.
    """
    runs = {entry.method: entry.runs(seeds) for entry in entries}
    results = [_result(entry, runs[entry.method], seeds) for entry in entries]
    scored = next((runs[r.method][0] for r in results if r.score is not None), None)
    metric = "" if scored is None else str(scored["score"]["metric"])
    higher = scored is None or bool(scored["higher_is_better"])
    results.sort(key=lambda result: _sort_key(result, higher))
    ranked = [result.method for result in results if result.ranked]
    chosen = reference if reference in ranked else next(iter(ranked), None)
    target = score_matrix(runs[chosen]) if chosen is not None else None
    constant = {} if scored is None else scored.get("constant") or {}
    baseline = np.asarray(constant["per_row"])[None] if constant else None
    share = metric in SHARE_METRICS
    results = [_compare(r, score_matrix(runs[r.method]), target, baseline, chosen, share=share) for r in results]
    untrained = None
    if base is not None and "score" in base.piece:
        base_result = _result(base, [base.piece], [0])
        untrained = _compare(base_result, score_matrix([base.piece]), target, None, chosen, share=share)
    return Comparison(
        folder=folder,
        model=config.model,
        task=config.task,
        metric=metric,
        higher_is_better=higher,
        held_out_rows=0 if scored is None or scored["per_row"] is None else len(scored["per_row"]),
        training_rows=None if scored is None else scored.get("training_rows"),
        seeds=tuple(seeds),
        reference=chosen,
        requested_reference=reference,
        constant_answer=constant.get("answer"),
        constant_score=None if baseline is None else float(baseline.mean()),
        results=tuple(results),
        base=untrained,
    )


def score_matrix(runs: Sequence[StoredRun]) -> Scores:
    """Return the scores (seeds, rows) of the held-out rows, or None if the metric has no score per row."""
    rows = [run.get("per_row") for run in runs]
    lengths = {len(row) if isinstance(row, list) else None for row in rows}
    return None if len(lengths) != 1 or None in lengths else np.asarray(rows, dtype=np.float64)


def _sort_key(result: MethodResult, higher: bool) -> tuple[int, float]:
    if result.score is None:
        return 2, 0.0
    return 0 if result.ranked else 1, -result.score if higher else result.score


def _result(entry: ComparedMethod, runs: Sequence[StoredRun], seeds: Sequence[int]) -> MethodResult:
    """Summarize the results of a method over its seeds."""
    tried_losses = entry.comparable_losses() if not entry.fixed else {}
    rates = tuple((rate, loss if math.isfinite(loss) else None) for rate, loss in sorted(tried_losses.items()))
    error = entry.error
    if error is not None or len(runs) < len(seeds):
        reason = f"{len(runs)} of {len(seeds)} seeds trained" if runs else "not yet trained"
        if error is not None:
            reason = f"{error.message} ({error.location})" if error.location else error.message
        return MethodResult(entry.method, error=reason, rates=rates)
    first = runs[0]
    is_run = entry.method != BASE
    values = [run["score"]["value"] for run in runs if run["score"] is not None]
    score = float(np.mean(values)) if len(values) == len(runs) and None not in values else None
    return MethodResult(
        entry.method,
        learning_rate=entry.chosen() if is_run else None,
        rates=rates,
        trained_parameters=first.get("trained_parameters") if is_run else 0,
        total_parameters=first.get("total_parameters"),
        adapter_bytes=first.get("adapter_bytes"),
        planned_bytes=next((n for run in runs if (n := run.get("planned_memory_bytes"))), None),
        peak_bytes=max(run.get("peak_memory_bytes") or 0 for run in runs) or None,
        seconds=float(np.mean([run["seconds"] for run in runs])) if is_run else None,
        steps=round(float(np.mean([run["steps"] for run in runs]))) if is_run else None,
        score=score,
        interval=_interval(runs, score, str(first["score"]["metric"])) if score is not None else None,
        seeds=tuple(_seed(seed, run) for seed, run in zip(seeds, runs, strict=True)) if is_run else (),
        single_answer=None if is_run else first.get("single_answer"),
    )


def _seed(seed: int, run: StoredRun) -> SeedResult:
    rest = {name: run[name] for name in ("steps", "best_step", "flattened", "seconds", "validation_loss")}
    score = run["score"]["value"] if run["score"] is not None else None
    losses = tuple((int(step), float(loss)) for step, loss in run["validation"])
    generation = mapping(run.get("generation"))
    worse = str(generation["line"]) if generation.get("verdict") == WORSE else None
    return SeedResult(seed, score=score, validation=losses, single_answer=run.get("single_answer"), worse=worse, **rest)


def _interval(runs: Sequence[StoredRun], score: float, metric: str) -> Interval | None:
    """Return the interval of the score over seeds and rows, shifted to the score, which may differ from the mean over
    rows.
    """
    scores = score_matrix(runs)
    bounds = None if scores is None else random_effects_interval(scores, share=metric in SHARE_METRICS)
    if scores is None or bounds is None:
        return None
    shift = score - float(scores.mean())
    return bounds[0] + shift, bounds[1] + shift


def _compare(
    result: MethodResult, scores: Scores, target: Scores, baseline: Scores, reference: str | None, *, share: bool
) -> MethodResult:
    """Add the differences per seed and row from the reference and from the best constant answer."""
    if result.score is None or scores is None:
        return result
    if baseline is not None and baseline.shape[1] == scores.shape[1]:
        differences = scores - baseline
        bounds = difference_interval(differences, share=share)
        result = replace(result, above_constant_answer=float(differences.mean()), over_constant_interval=bounds)
    if target is None or target.shape[1] != scores.shape[1]:
        return result
    if result.method == reference:
        return replace(result, difference=0.0, difference_interval=(0.0, 0.0))
    if len(scores) not in (1, len(target)):
        return result
    differences = scores - target
    bounds = difference_interval(differences, share=share)
    return replace(result, difference=float(differences.mean()), difference_interval=bounds)
