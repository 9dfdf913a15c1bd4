"""Compare methods on the same rows: find a learning rate for each method, then train it with each seed.

The work is a sequence of jobs, which run locally or on a cluster. Locally, one worker process tries the rates with the
first seed and caches the model; on a cluster, methods are tuned in parallel. Each final training runs in a separate
process, so that its peak memory can be measured. All methods are trained with one seed before the next seed starts.
Every result is stored immediately, so an interrupted comparison can be resumed. The parent process loads no model.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from deltaw.atomic_files import write_text
from deltaw.errors import UserError, did_you_mean
from deltaw.experiments.build_comparison import build_comparison
from deltaw.experiments.cluster import Cluster, check_cluster, run_on_cluster
from deltaw.experiments.comparison import BASE, Comparison
from deltaw.experiments.comparison_page import comparison_markdown
from deltaw.experiments.entry import ComparedMethod, Message
from deltaw.experiments.folder import ExperimentFolder, describe_changes, require_held_out, result_settings
from deltaw.experiments.jobs import Job, JobResult, WorkerExited, WorkerProcess, run_locally
from deltaw.experiments.progress_log import ProgressLog
from deltaw.methods.start import resolve_start
from deltaw.progress import LogFunction, ignore_line
from deltaw.runs.folder import remember_settings
from deltaw.settings import method_registry, task_registry
from deltaw.settings.config import RunConfig

# Share of the budget for trying a learning rate.
RATE_BUDGET_SHARE = 0.3
SEEDS = 1
# Version of the training and scoring procedure. Increased if older results are not comparable.
PROCEDURE = 2
PAGE = "comparison.md"
FIGURE = "comparison.svg"
NUMBERS = "comparison.json"
# Settings controlled by the comparison. Results with a different learning rate are identified by the rate.
CONTROLLED_SETTINGS = ("train.learning_rate", "train.schedule")
# Cost of evaluating the untrained model in units of one training, for time estimates.
BASE_WORK = 0.2


@dataclasses.dataclass
class ComparisonJobs:
    """Remaining jobs of a comparison: the base model, learning rates, and final trainings.

    The next rate of a method depends on the results of the previous ones, and its final trainings start when its rate
    is known. Every answer is stored in its method's entry and logged.

    Args:
        entries: Methods of the comparison.
        base: The untrained model, or None if it is not scored or its job was already returned.
        experiment: Folder of the experiment.
        pace: Progress log.
        share: Share of the budget for trying a rate.
        seeds: Seeds of the final trainings.
        on_update: Called after each final training.
    """

    entries: Sequence[ComparedMethod]
    base: ComparedMethod | None
    experiment: ExperimentFolder
    pace: ProgressLog
    share: float
    seeds: Sequence[int]
    on_update: Callable[[], object]
    _handlers: dict[str, Callable[[JobResult], None]] = dataclasses.field(default_factory=dict)

    def request_default_rates(self, child: WorkerProcess) -> None:
        """Request the default rates of the tuned methods, which depend on the model's shape."""
        for entry in (entry for entry in self.entries if entry.planned is None):
            try:
                entry.piece |= child.ask("usual", config=entry.config.model_dump(mode="json"))
            except (UserError, WorkerExited) as error:
                self._no_rate(entry, error)

    def next(self) -> Job | None:
        base = self.base
        self.base = None
        if base is not None and "score" not in base.piece:
            return self._job(BASE, "base", partial(self._base_scored, base), base.config)
        for entry in self.entries:
            rate = None if entry.error is not None else entry.next_rate()
            if rate is not None and entry.method not in self._handlers:
                on_result = partial(self._rate_tried, entry, rate)
                job = self._job(entry.method, "rate", on_result, entry.config, rate=rate, share=self.share)
                return dataclasses.replace(job, log=self.experiment.log(f"tuning-{entry.method}"))
        for seed in self.seeds:
            for entry in self.entries:
                if (run := self._run(entry, seed)) is not None:
                    return run
        return None

    def report(self, key: str, report: Message) -> bool:
        """Continue: these jobs have no intermediate results."""
        return True

    def complete(self, key: str, result: JobResult) -> None:
        self._handlers.pop(key)(result)

    def _job(self, key: str, do: str, handle: Callable[[JobResult], None], config: RunConfig, **request: object) -> Job:
        self._handlers[key] = handle
        return Job(key, do, self.experiment.log(key), {"config": config.model_dump(mode="json"), **request})

    def _run(self, entry: ComparedMethod, seed: int) -> Job | None:
        """Return the final training with a seed if it is due. The folder of an interrupted one is removed."""
        key = f"{entry.method}-seed-{seed}"
        rate = entry.chosen()
        if entry.error is not None or rate is None or key in self._handlers:
            return None
        if entry.next_rate() is not None or entry.run(seed) is not None:
            return None
        folder = Path(entry.config.output) / f"seed-{seed}"
        if str(seed) not in (entry.piece.get("runs") or {}):
            self.experiment.remove(folder)
        entry.store(seed, None)
        self.experiment.write_piece(entry.method, entry.piece)
        config = entry.config.with_train(learning_rate=rate, seed=seed).model_copy(update={"output": str(folder)})
        # The plan is the same for every seed. A separate process is needed to measure the peak memory.
        job = self._job(key, "run", partial(self._trained, entry, seed, rate), config, plan=seed == self.seeds[0])
        return dataclasses.replace(job, separate_process=True)

    def _base_scored(self, base: ComparedMethod, result: JobResult) -> None:
        text = str(result)
        if not isinstance(result, UserError | WorkerExited):
            base.piece |= result
            self.experiment.write_piece(BASE, base.piece)
            text = _score_text(base.piece)
        self.pace.report_done(f"{BASE}: {text}", BASE_WORK)

    def _rate_tried(self, entry: ComparedMethod, rate: float, result: JobResult) -> None:
        if isinstance(result, UserError | WorkerExited):
            self._no_rate(entry, result)
            return
        loss = math.inf if result["loss"] is None else float(str(result["loss"]))
        if rate not in (entry.planned or ()):
            self.pace.add_work(self.share)
        tried = sorted((entry.losses | {rate: loss}).items())
        entry.piece["rates"] = [[r, x if math.isfinite(x) else None] for r, x in tried]
        self.experiment.write_piece(entry.method, entry.piece)
        outcome = f"validation loss {loss:.4f}" if math.isfinite(loss) else "diverged"
        self.pace.report_done(f"{entry.method}: learning rate {rate:g}: {outcome}", self.share)
        if entry.next_rate() is None and entry.chosen() is None:
            message = f"training diverged at every learning rate tried, down to {min(entry.losses):g}"
            hint = f"try lower ones: --rates {entry.method}={min(entry.losses) / 10:.1g}"
            self._no_rate(entry, UserError(message, hint=hint))

    def _no_rate(self, entry: ComparedMethod, error: UserError | WorkerExited) -> None:
        untried = 0 if entry.fixed else max(0, 3 - len(entry.losses))
        self._failed(entry, error, len(self.seeds) + untried * self.share)

    def _trained(self, entry: ComparedMethod, seed: int, rate: float, result: JobResult) -> None:
        seed_text = "" if len(self.seeds) == 1 else f"seed {seed}"
        if isinstance(result, UserError | WorkerExited):
            self._failed(entry, result, sum(number >= seed for number in self.seeds), seed_text and f"{seed_text}: ")
        else:
            entry.store(seed, {"learning_rate": rate, **result})
            remember_settings(entry.config)  # the run may have been trained on another machine
            self.experiment.write_piece(entry.method, entry.piece)
            text = f"{entry.method}: trained at {rate:g}{seed_text and f', {seed_text}'}: {_run_text(result)}"
            self.pace.report_done(text, 1.0)
        self.on_update()

    def _failed(self, entry: ComparedMethod, error: UserError | WorkerExited, work: float, seed_text: str = "") -> None:
        """Store the error of a method. The other methods continue.

        Args:
            work: Work to subtract from the remaining work.
            seed_text: Prefix of the message.
        """
        user_error = error if isinstance(error, UserError) else UserError(str(error))
        entry.error = UserError(f"{seed_text}{user_error.message}", location=user_error.location, hint=user_error.hint)
        self.pace.add_work(-work)
        self.pace.report_done(f"{entry.method}: not possible: {entry.error.message}", 0.0)


def _run_text(result: Mapping[str, object]) -> str:
    """Return a summary of a final training."""
    length_text = f"{'flattened' if result['flattened'] else 'not flattened'} in {result['steps']} steps"
    if result.get("single_answer") is not None:
        return f"one answer to every row ('{result['single_answer']}'), {length_text}"
    return f"{_score_text(result)}, {length_text}"


def _score_text(result: Mapping[str, object]) -> str:
    score = result.get("score")
    return f"{score['metric']} {score['value']:.4f}" if isinstance(score, dict) else "no score"


def check_methods(methods: Sequence[str]) -> list[str]:
    """Return the methods without duplicates.

    Raises:
        UserError: If no method is given, or one is unknown.
    """
    for method in methods:
        method_registry.entry_of(method, location="--methods")
    if not methods:
        raise UserError("no method is given", location="--methods", hint="for example --methods lora,head")
    return list(dict.fromkeys(methods))


def compare(
    config: RunConfig,
    methods: Sequence[str],
    *,
    folder: str | os.PathLike[str],
    rates: Mapping[str, Sequence[float]] | None = None,
    share: float = RATE_BUDGET_SHARE,
    seeds: int = SEEDS,
    reference: str | None = None,
    cluster: Cluster | None = None,
    log: LogFunction = ignore_line,
    draw: Callable[[Comparison], str] | None = None,
) -> Comparison:
    """Train each method on the same rows and score all of them on the same held-out rows.

    Each training continues until its validation loss flattens or its budget ends: ``train.time``, or else the steps of
    ``train.max_steps`` or ``train.epochs``.

    Args:
        config: Settings of every run. ``method`` and ``output`` are ignored.
        methods: Names of the methods.
        folder: Output folder. An existing comparison is resumed.
        rates: Learning rates to try by method. A single rate is used without a trial. The default is
            ``train.learning_rate`` if it is a number, else a grid around the method's default rate.
        share: Share of the budget for trying a rate.
        seeds: Number of seeds: ``train.seed`` and the following ones.
        reference: Reference method of the differences, by default the best one.
        cluster: Cluster for parallel trainings. By default, trainings run locally, one after another.
        log: Receives messages for the user.
        draw: Returns the figure of the finished comparison as SVG. None writes no figure.

    Raises:
        UserError: If the input cannot be used, or no method could run. If only some methods cannot run, the result
            contains their errors instead.
    """
    methods = check_methods(methods)
    _check(config, methods, seeds, reference)
    if cluster is not None:
        check_cluster(cluster)
    if config.start_from is not None:
        config = resolve_start(config.model_copy(update={"method": methods[0]}), log)
    # Use the same rows for all seeds.
    config = config.model_copy(update={"data": dataclasses.replace(config.data, seed=config.data_seed)})
    numbers = [config.train.seed + number for number in range(seeds)]
    with ExperimentFolder(Path(os.path.expanduser(folder)), "comparison") as experiment:
        entries = [_entry(config, method, rates or {}, share, numbers, experiment, log) for method in methods]
        base = _base_entry(config, experiment)
        pace = ProgressLog(log, _work(entries, base, share, numbers))

        def update(draw: Callable[[Comparison], str] | None = None) -> Comparison:
            experiment.has_results = any(entry.runs(numbers) for entry in entries)
            # The seeds that are trained for every method that can run, at least the first one.
            runnable = [entry for entry in entries if entry.error is None]
            done = [seed for seed in numbers if all(entry.run(seed) for entry in runnable)] or numbers[:1]
            path = str(experiment.path)
            comparison = build_comparison(config, entries, base, seeds=done, reference=reference, folder=path)
            experiment.write_json(NUMBERS, comparison.as_dict())
            if draw is not None:
                write_text(experiment.path / FIGURE, draw(comparison))
            write_text(experiment.path / PAGE, comparison_markdown(comparison, None if draw is None else FIGURE))
            return comparison

        jobs = ComparisonJobs(entries, base, experiment, pace, share=share, seeds=numbers, on_update=update)
        with WorkerProcess(experiment.log("tuning")) as child:
            jobs.request_default_rates(child)
            pace.report_plan([float(e.piece["seconds"]) for e in entries if e.piece.get("seconds")])
            if cluster is None:
                run_locally(jobs, child)
        if cluster is not None:
            run_on_cluster(jobs, cluster, experiment.path, gpu=config.device != "cpu")
        update()
        if not experiment.has_results:
            raise next(entry.error for entry in entries if entry.error is not None)
        return update(draw)


def _check(config: RunConfig, methods: Sequence[str], seeds: int, reference: str | None) -> None:
    """Reject settings that cannot be compared, before anything is written."""
    require_held_out(config)
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}", location="--seeds", hint="train with at least one seed")
    if reference is not None and reference not in methods:
        message = f"'{reference}' is not one of the compared methods"
        raise UserError(message, location="--reference", hint=did_you_mean(reference, methods))


def _entry(
    config: RunConfig,
    method: str,
    rates: Mapping[str, Sequence[float]],
    share: float,
    seeds: Sequence[int],
    experiment: ExperimentFolder,
    log: LogFunction,
) -> ComparedMethod:
    """Return a method with its stored results, unless they were created with other settings."""
    fixed = config.train.learning_rate
    user_rates = list(rates[method]) if method in rates else None if isinstance(fixed, str) else [float(fixed)]
    config = config.model_copy(update={"method": method, "output": str(experiment.path / method)})
    settings = result_settings(config, without=CONTROLLED_SETTINGS)
    settings |= {"share of the budget for tuning": share, "procedure": PROCEDURE}
    piece = experiment.piece(method)
    if piece and (lines := describe_changes(piece.get("settings"), settings)):
        log(f"{method} starts over: {'; '.join(lines[:4])}")
        piece = {}
    entry = ComparedMethod(method, config, user_rates, {**piece, "settings": settings})
    done = len(entry.runs(seeds))
    if done == len(seeds):
        log(f"{method}: done before")
    elif done:
        log(f"{method}: {done} of {len(seeds)} seeds trained before")
    elif entry.losses:
        log(f"{method}: {len(entry.losses)} learning rates tried before")
    return entry


def _base_entry(config: RunConfig, experiment: ExperimentFolder) -> ComparedMethod | None:
    """Return the untrained model if it can be scored, that is, if it needs no new head."""
    if task_registry.entry_of(config.task).new_head:
        return None
    settings = {k: v for k, v in result_settings(config).items() if not k.startswith(("train.", "method", "lora."))}
    settings |= {"train.seed": config.train.seed, "procedure": PROCEDURE}
    piece = experiment.piece(BASE)
    if describe_changes(piece.get("settings"), settings):
        piece = {"settings": settings}
    return ComparedMethod(BASE, config, [0.0], piece)


def _work(entries: Sequence[ComparedMethod], base: ComparedMethod | None, share: float, seeds: Sequence[int]) -> float:
    """Return the remaining work in units of one training, without rates beyond the grid."""
    work = 0.0 if base is None or "score" in base.piece else BASE_WORK
    for entry in entries:
        if not entry.fixed:
            work += share * (3 if entry.planned is None else len(set(entry.planned) - set(entry.losses)))
        work += len(seeds) - len(entry.runs(seeds))
    return work
