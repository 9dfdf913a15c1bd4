"""From what is stored of each method to the comparison: scores over seeds, differences, intervals, ranks.

It knows what is stored, and starts no training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from deltaw.config import RunConfig
from deltaw.experiments.comparison import BASE, SHARES, Comparison, MethodResult, SeedResult
from deltaw.experiments.entry import Entry
from deltaw.experiments.intervals import interval_of
from deltaw.training.evaluation.metrics import Interval

Found = Mapping[str, Any]


def gathered(
    config: RunConfig,
    entries: Sequence[Entry],
    base: Entry | None,
    *,
    seeds: Sequence[int],
    reference: str | None,
    folder: str,
) -> Comparison:
    """Everything known so far. The best comes first; methods that learned nothing come after all others, and
    those without a result last.

    Args:
        seeds: that are asked for; a method counts once it has a result for each.
        reference: the method that the others are compared with; None for the best.
    """
    runs = {entry.method: entry.runs(seeds) for entry in entries}
    results = [_result(entry, runs[entry.method], seeds) for entry in entries]
    scored = next((runs[r.method][0] for r in results if r.score is not None), None)
    metric = "" if scored is None else str(scored["score"]["metric"])
    higher = scored is None or bool(scored["higher_is_better"])
    results.sort(key=lambda result: _order(result, higher))
    ranked = [result.method for result in results if result.ranked]
    chosen = reference if reference in ranked else next(iter(ranked), None)
    constant = None if scored is None else scored.get("constant")
    against = matrix(runs[chosen]) if chosen is not None else None
    baseline = None if constant is None else np.asarray(constant["per_row"])[None]
    results = [_compared(r, matrix(runs[r.method]), against, baseline, chosen) for r in results]
    untrained = None
    if base is not None and "score" in base.piece:
        untrained = _compared(_result(base, [base.piece], [0]), matrix([base.piece]), against, None, chosen)
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
        asked_reference=reference,
        constant_answer=None if constant is None else constant["answer"],
        constant_score=None if baseline is None else float(baseline.mean()),
        results=tuple(results),
        base=untrained,
    )


def matrix(runs: Sequence[Found]) -> np.ndarray | None:
    """(seeds, rows): what each held-out row scores; None where the metric has no such form."""
    rows = [run.get("per_row") for run in runs]
    lengths = {len(row) if isinstance(row, list) else None for row in rows}
    if len(lengths) != 1 or None in lengths:
        return None
    return np.asarray(rows, dtype=np.float64)


def _order(result: MethodResult, higher: bool) -> tuple[int, float]:
    if result.score is None:
        return 2, 0.0
    return 0 if result.ranked else 1, -result.score if higher else result.score


def _result(entry: Entry, runs: Sequence[Found], seeds: Sequence[int]) -> MethodResult:
    """A method's numbers over its seeds."""
    tried = entry.counted() if not entry.fixed else {}
    rates = tuple((rate, loss if math.isfinite(loss) else None) for rate, loss in sorted(tried.items()))
    if entry.error is not None or len(runs) < len(seeds):
        error = entry.error
        why = f"{len(runs)} of {len(seeds)} seeds trained" if runs else "not yet trained"
        if error is not None:
            why = f"{error.what}{f' ({error.where})' if error.where else ''}"
        return MethodResult(entry.method, error=why, rates=rates)
    first, is_run = runs[0], entry.method != BASE
    values = [run["score"]["value"] for run in runs if run["score"] is not None]
    score = float(np.mean(values)) if len(values) == len(runs) and None not in values else None
    return MethodResult(
        entry.method,
        learning_rate=entry.chosen() if is_run else None,
        rates=rates,
        trained_parameters=_number(first, "trained_parameters") if is_run else 0,
        total_parameters=_number(first, "total_parameters"),
        adapter_bytes=_number(first, "adapter_bytes"),
        planned_bytes=next((n for run in runs if (n := _number(run, "planned_memory_bytes"))), None),
        peak_bytes=max((_number(run, "peak_memory_bytes") or 0 for run in runs), default=0) or None,
        seconds=float(np.mean([run["seconds"] for run in runs])) if is_run else None,
        steps=round(float(np.mean([run["steps"] for run in runs]))) if is_run else None,
        score=score,
        interval=_interval(runs, score, str(first["score"]["metric"])) if score is not None else None,
        seeds=tuple(_seed(seed, run) for seed, run in zip(seeds, runs, strict=True)) if is_run else (),
        one_answer=None if is_run else first.get("one_answer"),
    )


def _seed(seed: int, run: Found) -> SeedResult:
    return SeedResult(
        seed,
        score=run["score"]["value"] if run["score"] is not None else None,
        steps=run["steps"],
        best_step=run["best_step"],
        flattened=bool(run["flattened"]),
        seconds=float(run["seconds"]),
        validation_loss=run["validation_loss"],
        validation=tuple((int(step), float(loss)) for step, loss in run["validation"]),
        one_answer=run.get("one_answer"),
    )


def _interval(runs: Sequence[Found], score: float, metric: str) -> Interval | None:
    """Of the score over seeds and rows; around the score, which of a loss is not the mean over rows."""
    scores = matrix(runs)
    if scores is None:
        stored = runs[0]["score"].get("interval") if len(runs) == 1 else None
        return (stored[0], stored[1]) if stored else None
    if len(runs) == 1 and runs[0]["score"].get("interval"):
        low, high = runs[0]["score"]["interval"]
        return low, high
    low, high = (bound + score - float(scores.mean()) for bound in interval_of(scores))
    return (max(0.0, low), min(1.0, high)) if metric in SHARES else (low, high)


def _compared(
    result: MethodResult,
    ours: np.ndarray | None,
    theirs: np.ndarray | None,
    baseline: np.ndarray | None,
    reference: str | None,
) -> MethodResult:
    """Add the difference from the reference, seed by seed and row by row, and that from the best constant
    answer."""
    if result.score is None or ours is None:
        return result
    if baseline is not None and baseline.shape[1] == ours.shape[1]:
        result = replace(
            result,
            over_constant=float((ours - baseline).mean()),
            over_constant_interval=interval_of(ours - baseline),
        )
    if theirs is None or theirs.shape[1] != ours.shape[1]:
        return result
    if result.method == reference:
        return replace(result, difference=0.0, difference_interval=(0.0, 0.0))
    if len(ours) not in (1, len(theirs)):
        return result
    difference = ours - theirs
    return replace(result, difference=float(difference.mean()), difference_interval=interval_of(difference))


def _number(found: Found, key: str) -> int | None:
    value = found.get(key)
    return None if value is None else int(str(value))
