"""Compare methods on the same rows: find a learning rate for each method, then train each once.

One worker process tries the rates and keeps the model between them. Each final run has a process of its own,
so that its peak memory is measured alone. Every result is stored at once, and an interrupted comparison
resumes from what is stored. The parent process loads no model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from deltaw import tasks
from deltaw.config import RunConfig
from deltaw.durable import replacing, write_text
from deltaw.errors import UserError
from deltaw.experiments.child import Child, WorkerEnded
from deltaw.experiments.comparison import BASE, Comparison, MethodResult, comparison_markdown
from deltaw.experiments.folder import ExperimentFolder, changed, require_held_out, settings_of
from deltaw.experiments.pace import Pace
from deltaw.experiments.rates import best_rate, grid, next_rate
from deltaw.methods import registry
from deltaw.training.callbacks import Say, silent
from deltaw.training.evaluation.metrics import bootstrap_interval

# The share of a run's steps for which a learning rate is tried.
SHARE = 0.3
# Cost of evaluating the untrained model, in trainings; used for the remaining time only.
BASE_WORK = 0.2
PAGE, FIGURE, NUMBERS = "comparison.md", "comparison.png", "comparison.json"
RATE_KEY = "train.learning_rate"


@dataclass
class _Entry:
    """One method of the comparison.

    Attributes:
        piece: what is stored on disk: ``settings``, ``usual_rate``, ``rates`` (pairs of rate and loss) and
            ``run``.
        asked: the rates to try; None for the grid around the usual one.
    """

    method: str
    config: RunConfig
    asked: list[float] | None
    piece: dict[str, object] = field(default_factory=dict)
    error: UserError | None = None

    @property
    def losses(self) -> dict[float, float]:
        pairs = self.piece.get("rates")
        return {
            float(rate): math.inf if loss is None else float(loss)
            for rate, loss in (pairs if isinstance(pairs, list) else [])
        }

    @property
    def planned(self) -> list[float] | None:
        """The rates to try; None until the usual one is known."""
        usual = self.piece.get("usual_rate")
        return self.asked or (grid(float(str(usual))) if usual is not None else None)

    @property
    def fixed(self) -> bool:
        """Whether the learning rate is given."""
        return self.asked is not None and len(self.asked) == 1

    def next_rate(self) -> float | None:
        if self.fixed or self.planned is None:
            return None
        return next_rate(self.planned, self._counted(), extend=self.asked is None)

    def chosen(self) -> float | None:
        if self.fixed and self.asked is not None:
            return self.asked[0]
        return best_rate(self._counted())

    def _counted(self) -> dict[float, float]:
        """Losses of the rates in this comparison; rates that only an earlier one was given are ignored."""
        if self.asked is None:
            return self.losses
        return {rate: loss for rate, loss in self.losses.items() if rate in self.asked}

    @property
    def run(self) -> dict[str, object] | None:
        """The results of the final run, if it used the chosen rate."""
        run = self.piece.get("run")
        return run if isinstance(run, dict) and run.get("learning_rate") == self.chosen() else None


def check_methods(methods: Sequence[str]) -> list[str]:
    """The methods without repetitions.

    Raises:
        UserError: no method is named, or one is unknown.
    """
    for method in methods:
        registry.entry_of(method, where="--methods")
    if not methods:
        raise UserError("no method is named", where="--methods", hint="name some, as in --methods lora,head")
    return list(dict.fromkeys(methods))


def compare(
    config: RunConfig,
    methods: Sequence[str],
    *,
    folder: str | os.PathLike[str],
    rates: Mapping[str, Sequence[float]] | None = None,
    share: float = SHARE,
    say: Say = silent,
    draw: Callable[[Comparison, Path], None] | None = None,
) -> Comparison:
    """Train each method on the same rows and score all of them on the same held-out rows.

    Args:
        config: the settings of every run; its ``method`` and ``output`` are ignored.
        methods: names of the methods.
        folder: where everything is written; a comparison that exists there is resumed.
        rates: learning rates to try, by method; a single rate is used without a trial. The default is
            ``train.learning_rate`` if that is a number, else a grid around the method's usual rate.
        share: the share of a run's steps for which a rate is tried.
        say: told lines that a person may want to read.
        draw: writes the finished comparison's figure to a path; None writes no figure.

    Raises:
        UserError: the input cannot be used, or no method could run. If only some methods cannot run, the
            result gives the reason for each instead.
    """
    methods = check_methods(methods)
    require_held_out(config)
    place = ExperimentFolder(Path(os.path.expanduser(folder)), "comparison")
    nothing = True
    try:
        entries = [_entry(config, method, rates or {}, share, place, say) for method in methods]
        base = _base_entry(config, place)
        pace = Pace(say, _work(entries, base, share))
        with Child(place.log("tuning")) as child:
            if base is not None:
                _evaluate_base(base, child, place, pace)
            for entry in entries:
                _tune(entry, child, place, pace, share)
        for entry in entries:
            _run(entry, place, pace)
            nothing = nothing and entry.run is None
            _write(_gathered(config, entries, base, place), place)
        if nothing:
            raise next(entry.error for entry in entries if entry.error is not None)
        comparison = _gathered(config, entries, base, place)
        _write(comparison, place, draw)
        return comparison
    except KeyboardInterrupt:
        nothing = False
        raise
    finally:
        place.close(discard=nothing)


def _entry(
    config: RunConfig,
    method: str,
    rates: Mapping[str, Sequence[float]],
    share: float,
    place: ExperimentFolder,
    say: Say,
) -> _Entry:
    """A method with its stored results, unless those were made with other settings."""
    asked = list(rates[method]) if method in rates else None
    fixed = config.train.learning_rate
    if asked is None and not isinstance(fixed, str):
        asked = [float(fixed)]
    config = config.model_copy(update={"method": method, "output": str(place.path / method)})
    settings = settings_of(config, without=(RATE_KEY,)) | {"share of steps for tuning": share}
    piece = place.piece(method)
    if piece and (lines := changed(piece.get("settings"), settings)):
        say(f"{method} starts anew: {'; '.join(lines[:4])}")
        piece = {}
    entry = _Entry(method, config, asked, {**piece, "settings": settings})
    if entry.run is not None:
        say(f"{method}: done before")
    elif entry.losses:
        say(f"{method}: {len(entry.losses)} learning rates tried before")
    return entry


def _base_entry(config: RunConfig, place: ExperimentFolder) -> _Entry | None:
    """The untrained model; it can be scored only if it has its own output head."""
    if tasks.entry_of(config.task).new_head:
        return None
    settings = {
        key: value
        for key, value in settings_of(config).items()
        if not key.startswith(("train.", "method", "lora."))
    } | {"train.seed": config.train.seed}
    piece = place.piece(BASE)
    if changed(piece.get("settings"), settings):
        piece = {"settings": settings}
    return _Entry(BASE, config, [0.0], piece)


def _work(entries: Sequence[_Entry], base: _Entry | None, share: float) -> float:
    """Number of trainings that remain, not counting rates beyond the grid."""
    work = 0.0 if base is None or "score" in base.piece else BASE_WORK
    for entry in entries:
        if not entry.fixed:
            work += share * (3 if entry.planned is None else len(set(entry.planned) - set(entry.losses)))
        work += 0 if entry.run is not None else 1
    return work


def _evaluate_base(base: _Entry, child: Child, place: ExperimentFolder, pace: Pace) -> None:
    if "score" in base.piece:
        return
    try:
        base.piece |= child.ask("base", config=base.config.model_dump(mode="json"))
    except (UserError, WorkerEnded) as error:
        pace.did(f"{BASE}: {error}", BASE_WORK)
        return
    place.write_piece(BASE, base.piece)
    pace.did(f"{BASE}: {_score_text(base.piece)}", BASE_WORK)


def _tune(entry: _Entry, child: Child, place: ExperimentFolder, pace: Pace, share: float) -> None:
    """Try learning rates until the best is known; an error is stored in the entry."""
    if entry.fixed or (entry.planned is not None and entry.next_rate() is None and entry.losses):
        return
    try:
        opened = child.ask("open", config=entry.config.model_dump(mode="json"))
        entry.piece["usual_rate"] = opened["usual_rate"]
        while (rate := entry.next_rate()) is not None:
            if rate not in (entry.planned or ()):
                pace.more(share)
            loss = child.ask("rate", rate=rate, share=share)["loss"]
            tried = entry.losses | {rate: math.inf if loss is None else float(str(loss))}
            entry.piece["rates"] = [[r, x if math.isfinite(x) else None] for r, x in sorted(tried.items())]
            place.write_piece(entry.method, entry.piece)
            said = "diverged" if loss is None else f"validation loss {float(str(loss)):.4f}"
            pace.did(f"{entry.method}: learning rate {rate:g}: {said}", share)
        if entry.chosen() is None:
            raise UserError(
                f"training diverged at every learning rate tried, down to {min(entry.losses):g}",
                hint=f"try lower ones: --rates {entry.method}={min(entry.losses) / 10:.1g}",
            )
    except (UserError, WorkerEnded) as error:
        _failed(entry, error, pace, share)


def _run(entry: _Entry, place: ExperimentFolder, pace: Pace) -> None:
    """Make the final run in a process of its own."""
    rate = entry.chosen()
    if entry.error is not None or entry.run is not None or rate is None:
        return
    train = entry.config.train.model_copy(update={"learning_rate": rate})
    config = entry.config.model_copy(update={"train": train})
    if "run" not in entry.piece:
        place.remove_unfinished(Path(config.output))
    entry.piece.pop("run", None)
    place.write_piece(entry.method, entry.piece)
    try:
        with Child(place.log(entry.method)) as child:
            found = child.ask("run", config=config.model_dump(mode="json"))
    except (UserError, WorkerEnded) as error:
        _failed(entry, error, pace, 0.0)
        return
    entry.piece["run"] = {"learning_rate": rate, **found}
    place.write_piece(entry.method, entry.piece)
    pace.did(f"{entry.method}: trained at {rate:g}: {_score_text(found)}", 1.0)


def _failed(entry: _Entry, error: UserError | WorkerEnded, pace: Pace, share: float) -> None:
    """Store why a method has no result; the other methods continue."""
    entry.error = error if isinstance(error, UserError) else UserError(str(error))
    untried = 0 if entry.fixed else 3 - len(entry.losses)
    pace.more(-1.0 - max(0, untried) * share)
    pace.did(f"{entry.method}: not possible: {entry.error.what}", 0.0)


def _score_text(found: Mapping[str, object]) -> str:
    score = found.get("score")
    return f"{score['metric']} {score['value']:.4f}" if isinstance(score, dict) else "no score"


def _gathered(
    config: RunConfig, entries: Sequence[_Entry], base: _Entry | None, place: ExperimentFolder
) -> Comparison:
    """Everything known so far, the best first, with each method's distance to it."""
    pairs = [(_result(entry, entry.run), entry.run or {}) for entry in entries]
    scored = [found for result, found in pairs if result.score is not None]
    metric, higher = "", True
    if scored:
        metric = str(scored[0]["score"]["metric"])  # type: ignore[index]
        higher = bool(scored[0]["higher_is_better"])
    pairs.sort(key=lambda pair: _order(pair[0].score, higher))
    lines = [_with_difference(result, found, pairs[0][1]) for result, found in pairs]
    untrained = None
    if base is not None and "score" in base.piece:
        untrained = _with_difference(_result(base, base.piece), base.piece, pairs[0][1])
    rows = pairs[0][1].get("per_row")
    return Comparison(
        folder=str(place.path),
        model=config.model,
        task=config.task,
        metric=metric,
        higher_is_better=higher,
        held_out_rows=len(rows) if isinstance(rows, list) else 0,
        results=tuple(lines),
        base=untrained,
    )


def _order(score: float | None, higher: bool) -> float:
    if score is None:
        return math.inf
    return -score if higher else score


def _result(entry: _Entry, found: Mapping[str, object] | None) -> MethodResult:
    if entry.error is not None or found is None:
        error = entry.error
        why = "not yet run" if error is None else f"{error.what}{f' ({error.where})' if error.where else ''}"
        return MethodResult(entry.method, error=why, rates=_pairs(entry))
    score = found["score"] if isinstance(found["score"], dict) else {}
    interval = score.get("interval")
    is_run = entry.method != BASE

    def number(key: str) -> int | None:
        value = found.get(key)
        return None if value is None else int(str(value))

    return MethodResult(
        entry.method,
        learning_rate=entry.chosen() if is_run else None,
        rates=_pairs(entry),
        trained_parameters=number("trained_parameters") if is_run else 0,
        total_parameters=number("total_parameters"),
        adapter_bytes=number("adapter_bytes"),
        planned_bytes=number("planned_memory_bytes"),
        peak_bytes=number("peak_memory_bytes"),
        seconds=float(str(found["seconds"])) if is_run else None,
        steps=number("steps"),
        score=score.get("value"),
        interval=(interval[0], interval[1]) if interval else None,
    )


def _pairs(entry: _Entry) -> tuple[tuple[float, float | None], ...]:
    tried = entry._counted() if not entry.fixed else {}
    return tuple((rate, loss if math.isfinite(loss) else None) for rate, loss in sorted(tried.items()))


def _with_difference(
    result: MethodResult, found: Mapping[str, object], best: Mapping[str, object]
) -> MethodResult:
    """Add the difference from the best method on the same rows, with a paired bootstrap interval."""
    ours, theirs = found.get("per_row"), best.get("per_row")
    if result.score is None or not isinstance(ours, list) or not isinstance(theirs, list):
        return result
    if len(ours) != len(theirs):
        return result
    differences = np.asarray(ours) - np.asarray(theirs)
    return replace(
        result,
        difference=float(differences.mean()),
        difference_interval=bootstrap_interval(differences),
    )


def _write(
    comparison: Comparison,
    place: ExperimentFolder,
    draw: Callable[[Comparison, Path], None] | None = None,
) -> None:
    place.write_json(NUMBERS, comparison.as_dict())
    if draw is not None:
        with replacing(place.path / FIGURE) as temporary:
            draw(comparison, temporary)
    write_text(place.path / PAGE, comparison_markdown(comparison, None if draw is None else FIGURE))
