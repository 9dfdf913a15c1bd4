"""Compare methods on the same rows: find a learning rate for each method, then train it with each seed.

One worker process tries the rates, with the first seed, and keeps the model between them. Each final training
has a process of its own, so that its peak memory is measured alone. All methods are trained with one seed
before any is trained with the next. Every result is stored at once, and an interrupted comparison resumes
from what is stored. The parent process loads no model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deltaw import tasks
from deltaw.config import RunConfig
from deltaw.durable import replacing, write_text
from deltaw.errors import UserError, did_you_mean
from deltaw.experiments.child import Child, WorkerEnded
from deltaw.experiments.cluster import Cluster, check_cluster, elsewhere
from deltaw.experiments.compare_jobs import ComparisonJobs
from deltaw.experiments.comparison import BASE, Comparison
from deltaw.experiments.entry import Entry
from deltaw.experiments.findings import as_json, comparison_markdown
from deltaw.experiments.folder import ExperimentFolder, changed, require_held_out, settings_of
from deltaw.experiments.gathering import gathered
from deltaw.experiments.pace import Pace
from deltaw.experiments.stored import BASE_WORK, Stored
from deltaw.methods import registry
from deltaw.training.callbacks import Say, silent

# The share of the budget for which a learning rate is tried.
SHARE = 0.3
SEEDS = 1
# Of the way in which methods are trained and scored; another number where older results are not comparable.
PROCEDURE = 2
PAGE, FIGURE, NUMBERS = "comparison.md", "comparison.png", "comparison.json"
# Settings that a comparison sets itself; results of another rate are told by the rate.
OWN = ("train.learning_rate", "train.schedule")


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
    place = ExperimentFolder(Path(os.path.expanduser(folder)), "comparison")
    nothing = True
    try:
        entries = [_entry(config, method, rates or {}, share, numbers, place, say) for method in methods]
        base = _base_entry(config, place)
        pace = Pace(say, _work(entries, base, share, numbers))

        def known() -> Comparison:
            seeds = _done(entries, numbers)
            return gathered(config, entries, base, seeds=seeds, reference=reference, folder=str(place.path))

        stored = Stored(place, pace, share, numbers)

        def written() -> None:
            nonlocal nothing
            nothing = not any(entry.runs(numbers) for entry in entries)
            _write(known(), place)

        if cluster is None:
            _here(entries, base, stored, written)
        else:
            jobs = ComparisonJobs(entries, base, stored, written)
            with Child(place.log("tuning")) as child:
                jobs.know_rates(child)
            elsewhere(jobs, cluster, place.path, gpu=config.device != "cpu")
            written()
        if nothing:
            raise next(entry.error for entry in entries if entry.error is not None)
        comparison = known()
        _write(comparison, place, draw)
        return comparison
    except KeyboardInterrupt:
        nothing = False
        raise
    finally:
        place.close(discard=nothing)


def _here(entries: Sequence[Entry], base: Entry | None, stored: Stored, written: Callable[[], None]) -> None:
    """All of a comparison on this machine."""
    with Child(stored.place.log("tuning")) as child:
        if base is not None:
            _evaluate_base(base, child, stored)
        for entry in entries:
            _tune(entry, child, stored)
    for seed in stored.seeds:
        for entry in entries:
            _run(entry, seed, stored)
            written()


def _check(config: RunConfig, methods: Sequence[str], seeds: int, reference: str | None) -> None:
    """Refuse what cannot be compared, before anything is written."""
    require_held_out(config)
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}", where="--seeds", hint="train with at least one seed")
    if reference is not None and reference not in methods:
        raise UserError(
            f"'{reference}' is not one of the methods that are compared",
            where="--reference",
            hint=did_you_mean(reference, methods),
        )


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
    settings = settings_of(config, without=OWN) | {
        "share of the budget for tuning": share,
        "procedure": PROCEDURE,
    }
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
    settings = {
        key: value
        for key, value in settings_of(config).items()
        if not key.startswith(("train.", "method", "lora."))
    } | {"train.seed": config.train.seed, "procedure": PROCEDURE}
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


def _evaluate_base(base: Entry, child: Child, stored: Stored) -> None:
    if "score" in base.piece:
        return
    try:
        stored.base(base, child.ask("base", config=base.config.model_dump(mode="json")))
    except (UserError, WorkerEnded) as error:
        stored.base(base, error)


def _tune(entry: Entry, child: Child, stored: Stored) -> None:
    """Try learning rates until the best is known; an error is stored in the entry."""
    if entry.fixed or (entry.planned is not None and entry.next_rate() is None and entry.losses):
        return
    try:
        opened = child.ask("open", config=entry.config.model_dump(mode="json"))
        entry.piece["usual_rate"] = opened["usual_rate"]
        while (rate := entry.next_rate()) is not None:
            stored.rate(entry, rate, child.ask("rate", rate=rate, share=stored.share)["loss"])
    except (UserError, WorkerEnded) as error:
        stored.no_rate(entry, error)


def _run(entry: Entry, seed: int, stored: Stored) -> None:
    """Make the final training with one seed in a process of its own."""
    rate = entry.chosen()
    if entry.error is not None or entry.run(seed) is not None or rate is None:
        return
    config = stored.run_begins(entry, seed, rate)
    try:
        with Child(stored.place.log(f"{entry.method}-seed-{seed}")) as child:
            # The plan is the same for every seed.
            found = child.ask("run", config=config.model_dump(mode="json"), plan=seed == stored.seeds[0])
    except (UserError, WorkerEnded) as error:
        stored.run(entry, seed, rate, error)
        return
    stored.run(entry, seed, rate, found)


def _write(
    comparison: Comparison,
    place: ExperimentFolder,
    draw: Callable[[Comparison, Path], None] | None = None,
) -> None:
    place.write_json(NUMBERS, as_json(comparison))
    if draw is not None:
        with replacing(place.path / FIGURE) as temporary:
            draw(comparison, temporary)
    write_text(place.path / PAGE, comparison_markdown(comparison, None if draw is None else FIGURE))
