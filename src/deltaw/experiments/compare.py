"""Compare methods on the same rows: find a learning rate for each method, then train it with each seed.

The work is a sequence of jobs, done here or on a cluster. Here, one worker process tries the rates, with the first
seed, and keeps the model between them; on a cluster, methods are tuned side by side. Each final training has a
process of its own, so that its peak memory is measured alone. All methods are trained with one seed before any is
trained with the next. Every result is stored at once, and an interrupted comparison resumes from what is stored. The
parent process loads no model.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from deltaw import tasks
from deltaw.durable import replacing, write_text
from deltaw.errors import UserError, did_you_mean
from deltaw.experiments.comparison import BASE, Comparison, as_json, comparison_markdown, gathered
from deltaw.experiments.entry import Entry
from deltaw.experiments.folder import ExperimentFolder, changed, require_held_out, settings_of
from deltaw.experiments.jobs import Child, Cluster, Found, Job, WorkerEnded, check_cluster, elsewhere, here
from deltaw.experiments.until_flat import Pace
from deltaw.methods import registry
from deltaw.runs.folder import remember_settings
from deltaw.settings import RunConfig
from deltaw.training.callbacks import Say, silent

# The share of the budget for which a learning rate is tried.
SHARE = 0.3
SEEDS = 1
# Of the way in which methods are trained and scored; another number where older results are not comparable.
PROCEDURE = 2
PAGE, FIGURE, NUMBERS = "comparison.md", "comparison.png", "comparison.json"
# Settings that a comparison sets itself; results of another rate are told by the rate.
OWN = ("train.learning_rate", "train.schedule")
# Cost of evaluating the untrained model, in trainings; used for the remaining time only.
BASE_WORK = 0.2


@dataclasses.dataclass
class ComparisonJobs:
    """What is left to do of a comparison, as jobs: the base model, learning rates, and final trainings.

    Each rate is tried after the one that it follows from; a method's final trainings begin once its rate is known.
    Every answer is stored in its method's entry and reported in a line.

    Args:
        base: the untrained model; None where it is not scored, or has been handed out.
        share: of the budget, for which a rate is tried. seeds: that each method is trained with.
        written: called after each final training.
    """

    entries: Sequence[Entry]
    base: Entry | None
    place: ExperimentFolder
    pace: Pace
    share: float
    seeds: Sequence[int]
    written: Callable[[], object]
    _ends: dict[str, Callable[[Found], None]] = dataclasses.field(default_factory=dict)

    def know_rates(self, child: Child) -> None:
        """Ask for the usual rates of the methods that are tuned, which follow from the model's shape."""
        for entry in self.entries:
            if entry.planned is not None:
                continue
            try:
                found = child.ask("usual", config=entry.config.model_dump(mode="json"))
                entry.piece["usual_rate"] = found["usual_rate"]
            except (UserError, WorkerEnded) as error:
                self._no_rate(entry, error)

    def next(self) -> Job | None:
        base, self.base = self.base, None
        if base is not None and "score" not in base.piece:
            return self._job(BASE, "base", partial(self._base_scored, base), base.config)
        for entry in self.entries:
            rate = None if entry.error is not None else entry.next_rate()
            if rate is not None and entry.method not in self._ends:
                ends = partial(self._rate_tried, entry, rate)
                job = self._job(entry.method, "rate", ends, entry.config, rate=rate, share=self.share)
                return dataclasses.replace(job, log=self.place.log(f"tuning-{entry.method}"))
        for seed in self.seeds:
            for entry in self.entries:
                if (run := self._run(entry, seed)) is not None:
                    return run
        return None

    def report(self, key: str, report: Mapping[str, object]) -> bool:
        """These jobs report nothing on the way."""
        return True

    def ended(self, key: str, found: Found) -> None:
        self._ends.pop(key)(found)

    def _job(self, key: str, do: str, ends: Callable[[Found], None], config: RunConfig, **request: object) -> Job:
        self._ends[key] = ends
        return Job(key, do, self.place.log(key), {"config": config.model_dump(mode="json"), **request})

    def _run(self, entry: Entry, seed: int) -> Job | None:
        """The final training with a seed, where it is left to do and can begin; what an interrupted one left is
        removed."""
        key, rate = f"{entry.method}-seed-{seed}", entry.chosen()
        if entry.error is not None or rate is None or key in self._ends:
            return None
        if entry.next_rate() is not None or entry.run(seed) is not None:
            return None
        folder = Path(entry.config.output) / f"seed-{seed}"
        if str(seed) not in (entry.piece.get("runs") or {}):
            self.place.remove(folder)
        entry.store(seed, None)
        self.place.write_piece(entry.method, entry.piece)
        config = entry.config.with_train(learning_rate=rate, seed=seed).model_copy(update={"output": str(folder)})
        # The plan is the same for every seed. The peak of memory is measured in a process that does nothing else.
        job = self._job(key, "run", partial(self._trained, entry, seed, rate), config, plan=seed == self.seeds[0])
        return dataclasses.replace(job, alone=True)

    def _base_scored(self, base: Entry, found: Found) -> None:
        if isinstance(found, UserError | WorkerEnded):
            self.pace.did(f"{BASE}: {found}", BASE_WORK)
            return
        base.piece |= found
        self.place.write_piece(BASE, base.piece)
        self.pace.did(f"{BASE}: {_score_text(base.piece)}", BASE_WORK)

    def _rate_tried(self, entry: Entry, rate: float, found: Found) -> None:
        if isinstance(found, UserError | WorkerEnded):
            self._no_rate(entry, found)
            return
        loss = math.inf if found["loss"] is None else float(str(found["loss"]))
        if rate not in (entry.planned or ()):
            self.pace.more(self.share)
        tried = sorted((entry.losses | {rate: loss}).items())
        entry.piece["rates"] = [[r, x if math.isfinite(x) else None] for r, x in tried]
        self.place.write_piece(entry.method, entry.piece)
        said = f"validation loss {loss:.4f}" if math.isfinite(loss) else "diverged"
        self.pace.did(f"{entry.method}: learning rate {rate:g}: {said}", self.share)
        if entry.next_rate() is None and entry.chosen() is None:
            lowest = min(entry.losses)
            what = f"training diverged at every learning rate tried, down to {lowest:g}"
            self._no_rate(entry, UserError(what, hint=f"try lower ones: --rates {entry.method}={lowest / 10:.1g}"))

    def _no_rate(self, entry: Entry, error: UserError | WorkerEnded) -> None:
        untried = 0 if entry.fixed else max(0, 3 - len(entry.losses))
        self._failed(entry, error, len(self.seeds) + untried * self.share)

    def _trained(self, entry: Entry, seed: int, rate: float, found: Found) -> None:
        which = "" if len(self.seeds) == 1 else f"seed {seed}"
        if isinstance(found, UserError | WorkerEnded):
            left = [other for other in self.seeds if other >= seed]
            self._failed(entry, found, float(len(left)), which and f"{which}: ")
        else:
            entry.store(seed, {"learning_rate": rate, **found})
            remember_settings(entry.config)  # the run may have been made on another machine
            self.place.write_piece(entry.method, entry.piece)
            self.pace.did(f"{entry.method}: trained at {rate:g}{which and f', {which}'}: {_run_text(found)}", 1.0)
        self.written()

    def _failed(self, entry: Entry, error: UserError | WorkerEnded, work: float, which: str = "") -> None:
        """Store why a method has no result; the other methods continue.

        Args:
            work: that need not be done now.
            which: what it failed with.
        """
        told = error if isinstance(error, UserError) else UserError(str(error))
        entry.error = UserError(f"{which}{told.what}", where=told.where, hint=told.hint)
        self.pace.more(-work)
        self.pace.did(f"{entry.method}: not possible: {entry.error.what}", 0.0)


def _run_text(found: Mapping[str, object]) -> str:
    """A final training in a few words."""
    flat = f"{'flattened' if found['flattened'] else 'not flattened'} in {found['steps']} steps"
    if found.get("one_answer") is not None:
        return f"one answer to every row ('{found['one_answer']}'), {flat}"
    return f"{_score_text(found)}, {flat}"


def _score_text(found: Mapping[str, object]) -> str:
    score = found.get("score")
    return f"{score['metric']} {score['value']:.4f}" if isinstance(score, dict) else "no score"


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
    seeds: int = SEEDS,
    reference: str | None = None,
    cluster: Cluster | None = None,
    say: Say = silent,
    draw: Callable[[Comparison, Path], None] | None = None,
) -> Comparison:
    """Train each method on the same rows and score all of them on the same held-out rows.

    Each training goes on until its validation loss flattens or its budget ends: ``train.time``, or else the
    steps of ``train.max_steps`` or ``train.epochs``.

    Args:
        config: the settings of every run; its ``method`` and ``output`` are ignored.
        methods: names of the methods.
        folder: where everything is written; a comparison that exists there is resumed.
        rates: learning rates to try, by method; a single rate is used without a trial. The default is
            ``train.learning_rate`` if that is a number, else a grid around the method's usual rate.
        share: the share of the budget for which a rate is tried.
        seeds: with how many seeds each method is trained: ``train.seed`` and those after it.
        reference: the method that all others are compared with; the best by default.
        cluster: the machines that trainings run on, several at once; by default one after another on this
            one.
        say: told lines that a person may want to read.
        draw: writes the finished comparison's figure to a path; None writes no figure.

    Raises:
        UserError: the input cannot be used, or no method could run. If only some methods cannot run, the
            result gives the reason for each instead.
    """
    methods = check_methods(methods)
    _check(config, methods, seeds, reference)
    if cluster is not None:
        check_cluster(cluster)
    # The same rows for all seeds.
    config = config.model_copy(update={"data": dataclasses.replace(config.data, seed=config.data_seed)})
    numbers = [config.train.seed + number for number in range(seeds)]
    with ExperimentFolder(Path(os.path.expanduser(folder)), "comparison") as place:
        entries = [_entry(config, method, rates or {}, share, numbers, place, say) for method in methods]
        base = _base_entry(config, place)
        pace = Pace(say, _work(entries, base, share, numbers))

        def written(draw: Callable[[Comparison, Path], None] | None = None) -> Comparison:
            place.kept = any(entry.runs(numbers) for entry in entries)
            done = _done(entries, numbers)
            known = gathered(config, entries, base, seeds=done, reference=reference, folder=str(place.path))
            _write(known, place, draw)
            return known

        jobs = ComparisonJobs(entries, base, place, pace, share=share, seeds=numbers, written=written)
        with Child(place.log("tuning")) as child:
            jobs.know_rates(child)
            if cluster is None:
                here(jobs, child)
        if cluster is not None:
            elsewhere(jobs, cluster, place.path, gpu=config.device != "cpu")
        written()
        if not place.kept:
            raise next(entry.error for entry in entries if entry.error is not None)
        return written(draw)


def _check(config: RunConfig, methods: Sequence[str], seeds: int, reference: str | None) -> None:
    """Refuse what cannot be compared, before anything is written."""
    require_held_out(config)
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}", where="--seeds", hint="train with at least one seed")
    if reference is not None and reference not in methods:
        what = f"'{reference}' is not one of the methods that are compared"
        raise UserError(what, where="--reference", hint=did_you_mean(reference, methods))


def _entry(
    config: RunConfig,
    method: str,
    rates: Mapping[str, Sequence[float]],
    share: float,
    seeds: Sequence[int],
    place: ExperimentFolder,
    say: Say,
) -> Entry:
    """A method with its stored results, unless those were made with other settings."""
    asked = list(rates[method]) if method in rates else None
    fixed = config.train.learning_rate
    if asked is None and not isinstance(fixed, str):
        asked = [float(fixed)]
    config = config.model_copy(update={"method": method, "output": str(place.path / method)})
    settings = settings_of(config, without=OWN) | {"share of the budget for tuning": share, "procedure": PROCEDURE}
    piece = place.piece(method)
    if piece and (lines := changed(piece.get("settings"), settings)):
        say(f"{method} starts anew: {'; '.join(lines[:4])}")
        piece = {}
    entry = Entry(method, config, asked, {**piece, "settings": settings})
    done = len(entry.runs(seeds))
    if done == len(seeds):
        say(f"{method}: done before")
    elif done:
        say(f"{method}: {done} of {len(seeds)} seeds trained before")
    elif entry.losses:
        say(f"{method}: {len(entry.losses)} learning rates tried before")
    return entry


def _base_entry(config: RunConfig, place: ExperimentFolder) -> Entry | None:
    """The untrained model; it can be scored only if it has its own output head."""
    if tasks.entry_of(config.task).new_head:
        return None
    of_model = {k: v for k, v in settings_of(config).items() if not k.startswith(("train.", "method", "lora."))}
    settings = of_model | {"train.seed": config.train.seed, "procedure": PROCEDURE}
    piece = place.piece(BASE)
    if changed(piece.get("settings"), settings):
        piece = {"settings": settings}
    return Entry(BASE, config, [0.0], piece)


def _work(entries: Sequence[Entry], base: Entry | None, share: float, seeds: Sequence[int]) -> float:
    """Number of trainings that remain, not counting rates beyond the grid."""
    work = 0.0 if base is None or "score" in base.piece else BASE_WORK
    for entry in entries:
        if not entry.fixed:
            work += share * (3 if entry.planned is None else len(set(entry.planned) - set(entry.losses)))
        work += len(seeds) - len(entry.runs(seeds))
    return work


def _done(entries: Sequence[Entry], seeds: Sequence[int]) -> list[int]:
    """The seeds with which every method that can run is trained; at least the first."""
    able = [entry for entry in entries if entry.error is None]
    done = [seed for seed in seeds if all(entry.run(seed) is not None for entry in able)]
    return done or list(seeds[:1])


def _write(comparison: Comparison, place: ExperimentFolder, draw: Callable[[Comparison, Path], None] | None) -> None:
    place.write_json(NUMBERS, as_json(comparison))
    if draw is not None:
        with replacing(place.path / FIGURE) as temporary:
            draw(comparison, temporary)
    write_text(place.path / PAGE, comparison_markdown(comparison, None if draw is None else FIGURE))
