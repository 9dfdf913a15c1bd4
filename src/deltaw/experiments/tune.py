"""Search settings: Optuna proposes values, and a worker trains with them and returns the validation loss.

Each finished trial is stored in an SQLite file, so an interrupted search can be resumed. A failed trial does not stop
the search. The run's held-out rows are not used.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from deltaw.atomic_files import write_text
from deltaw.errors import UserError
from deltaw.experiments.cluster import Cluster, check_cluster, run_on_cluster
from deltaw.experiments.comparison import duration
from deltaw.experiments.comparison_page import markdown_table
from deltaw.experiments.entry import Message
from deltaw.experiments.folder import ExperimentFolder, describe_changes, result_settings
from deltaw.experiments.jobs import Job, JobResult, WorkerExited, WorkerProcess, run_locally
from deltaw.experiments.progress_log import ProgressLog
from deltaw.experiments.search_space import (
    CategoricalValues,
    Range,
    Space,
    apply_values,
    check_space,
    current_values,
    default_space,
    nested_values,
    parse_space,
)
from deltaw.methods.start import resolve_start
from deltaw.progress import LogFunction, ignore_line
from deltaw.settings.config import RunConfig
from deltaw.training.evaluation.base import ranks
from deltaw.training.planning.plan_arguments import reject_memory_setting

if TYPE_CHECKING:
    import optuna


# Minimum number of trials for estimating the importance of settings.
MIN_TRIALS = 6


def setting_importance(values: Sequence[object], losses: Sequence[float]) -> float | None:
    """Return the fraction of the variation between trials that a setting explains.

    This is the adjusted R² of a regression of the loss ranks on the setting: for n trials and p terms,
    R² − (1 − R²)·p / (n − p − 1) (Theil 1961).

    Ranks reduce the influence of outliers. A numeric setting contributes a linear and a quadratic term, because the
    best value is often in the middle of its range. It is log-transformed if all values are positive. Other settings are
    one-hot encoded.

    Args:
        values: Value of the setting in each trial.
        losses: Loss of each trial, in the same order.

    Returns:
        A fraction between 0 and 1. None if there are too few trials, or the values or losses do not vary.
    """
    count = len(losses)
    if count < MIN_TRIALS or len(set(map(str, values))) < 2:
        return None
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == count and len(set(numbers)) > 2:
        x = np.asarray(numbers)
        x = np.log(x) if (x > 0).all() else x
        x = (x - x.mean()) / x.std()
        design = np.stack([np.ones(count), x, x * x], axis=1)
    else:
        names = sorted(set(map(str, values)))
        design = np.array([[float(str(v) == name) for name in names] for v in values])
    terms = design.shape[1] - 1
    if count - terms - 1 < 2:
        return None
    y = ranks(np.asarray(losses))
    total_squares = float(((y - y.mean()) ** 2).sum())
    if total_squares == 0:
        return None
    residuals = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    r_square = 1 - float((residuals**2).sum()) / total_squares
    return max(0.0, r_square - (1 - r_square) * terms / (count - terms - 1))


# Trials with a loss that exceeds the best by at most this fraction are considered equivalent.
SIMILAR_LOSS = 0.01


@dataclass(frozen=True)
class TrialResult:
    """Result of a trial.

    Attributes:
        number: Number of the trial, from 0.
        values: Values by dotted key.
        loss: Validation loss. None unless ``end`` is ``done``.
        end: ``done``, ``ended early`` (pruned), ``diverged`` or ``failed``.
        note: Error message of a failed trial.
        seconds: Duration in seconds.
    """

    number: int
    values: Mapping[str, object]
    loss: float | None
    end: str
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Tuning:
    """Result of a search.

    Attributes:
        folder: Folder of the search.
        method: Tuned method.
        space: Search space as text, by dotted key.
        trials: Trials in order.
        first: Number of the trial with the original settings, or None if they are outside the search space.
        weights: :func:`setting_importance` by key, or None if there are too few trials.
        edges: ``low`` or ``high`` by key if the best value is at that end of the search space.
        best_settings: Values of the best trial as nested settings.
        training_rows: Number of training rows of a trial.
        validation_rows: Number of validation rows.
        steps: Number of steps of a trial.
    """

    folder: str
    method: str
    space: Mapping[str, str]
    trials: Sequence[TrialResult]
    first: int | None
    weights: Mapping[str, float | None]
    edges: Mapping[str, str]
    best_settings: Mapping[str, object] = field(default_factory=dict)
    training_rows: int = 0
    validation_rows: int = 0
    steps: int = 0

    @property
    def ranked(self) -> list[TrialResult]:
        """Completed trials, best first."""
        done = [trial for trial in self.trials if trial.end == "done"]
        return sorted(done, key=lambda trial: (trial.loss or 0.0, trial.number))

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        best = self.ranked[0].number if self.ranked else None
        return {**asdict(self), "best": best, "lessons": tuning_findings(self)}


def best_yaml(tuning: Tuning) -> str:
    """Return the best settings as YAML, for merging into a settings file."""
    return yaml.safe_dump(dict(tuning.best_settings), sort_keys=False).rstrip()


def tuning_findings(tuning: Tuning) -> list[str]:
    """Return the conclusions of a search as sentences."""
    if not tuning.ranked:
        return []
    best, *other_trials = tuning.ranked
    assert best.loss is not None
    text = ", ".join(f"{key} {_value(value)}" for key, value in best.values.items())
    lines = [f"Trial {best.number} is best: loss {best.loss:.4f} with {text}."]
    original = next((trial.loss for trial in other_trials if trial.number == tuning.first), None)
    if best.number == tuning.first:
        lines.append("These are the original settings: no other trial is better.")
    elif original:
        lines.append(f"The original settings: {original:.4f}. The best loss is {1 - best.loss / original:.1%} lower.")
    similar = [t for t in other_trials if t.loss is not None and t.loss <= best.loss * (1 + SIMILAR_LOSS)]
    if similar:
        clause = f"{len(similar)} of the other {len(other_trials)} finished trials are within {SIMILAR_LOSS:.0%} of it"
        lines.append(f"{clause}; their order is not meaningful.")
    weights = {key: weight for key, weight in tuning.weights.items() if weight is not None}
    text = ", ".join(f"{key} {weights[key]:.0%}" for key in sorted(weights, key=lambda key: -weights[key]))
    importance = f"Share of the differences between trials that each setting explains: {text}."
    lines.append(importance if weights else "There are too few finished trials to rank the settings by importance.")
    for key, end in tuning.edges.items():
        position = f"is at the {end} end of the search space ({tuning.space[key]})"
        lines.append(f"The best {key}, {_value(best.values[key])}, {position}: widen it with --search.")
    counts = {end: sum(t.end == end for t in tuning.trials) for end in ("ended early", "diverged", "failed")}
    texts = [f"{count} {end}" for end, count in counts.items() if count]
    lines += [f"Of {len(tuning.trials)} trials, {', '.join(texts)}."] if texts else []
    notes = dict.fromkeys(t.note for t in tuning.trials if t.end == "failed" and t.note)
    lines += [f"Failed: {note}" for note in list(notes)[:3]]
    rows = f"The loss is measured on {tuning.validation_rows} rows split off the training rows"
    return [*lines, f"{rows}. Evaluate the best settings on the held-out rows (unused)."]


def tuning_markdown(tuning: Tuning) -> str:
    """Return the search as a Markdown page."""
    titles = ["trial", "loss", *tuning.space, "time", "end"]
    other_trials = [trial for trial in tuning.trials if trial.end != "done"]
    rows = [[*trial_cells(tuning, trial), trial.end] for trial in [*tuning.ranked, *other_trials]]
    head = f"# Settings search: {tuning.method}"
    findings = "\n".join(f"- {line}" for line in tuning_findings(tuning))
    table = "\n".join(markdown_table(titles, rows, num_left=0))
    return f"{head}\n\n{findings}\n\n```yaml\n{best_yaml(tuning)}\n```\n\n{table}"


def trial_cells(tuning: Tuning, trial: TrialResult) -> list[str]:
    """Return the cells of a trial: number, loss, values and time."""
    mark = " (original)" if trial.number == tuning.first else ""
    loss = "" if trial.loss is None else f"{trial.loss:.4f}"
    values = [_value(trial.values.get(key, "")) for key in tuning.space]
    return [f"{trial.number}{mark}", loss, *values, duration(trial.seconds)]


def _value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# Evaluations per trial. The last one is at the end; the trial may be pruned at all others.
EVALUATIONS = 5
# The first trials are never pruned, because pruning needs other trials for comparison.
NUM_STARTUP_TRIALS = 5
# The search stops if this number of trials fail before any succeeds.
MAX_INITIAL_FAILURES = 3
PAGE = "tuning.md"
NUMBERS = "tuning.json"
BEST = "best.yaml"
STORAGE = "trials.db"
_SETTINGS = "settings"


def tune(
    config: RunConfig,
    *,
    trials: int,
    folder: str | os.PathLike[str],
    search: Sequence[str] = (),
    storage: str | os.PathLike[str] | None = None,
    share: float = 1.0,
    cluster: Cluster | None = None,
    log: LogFunction = ignore_line,
) -> Tuning:
    """Search the settings of one method for the lowest validation loss.

    Args:
        config: Current settings. They are the first trial if they are inside the search space.
        trials: Total number of trials, including those of an earlier call.
        folder: Output folder. An existing search is resumed.
        search: Search space, for example ``["lora.rank=[4,8]"]``. By default, the search space of the method.
        storage: SQLite file of the trials. By default, ``trials.db`` in ``folder``.
        share: Fraction of a run's steps that each trial trains for.
        cluster: Cluster for parallel trials. By default, trials run locally, one after another.
        log: Receives messages for the user.

    Raises:
        UserError: If the input cannot be used, Optuna is not installed, or no trial succeeded.
    """
    _require_optuna()
    if cluster is not None:
        check_cluster(cluster)
    reject_memory_setting(config.memory, "tune")
    config = resolve_start(config, log)
    requested_space = parse_space(search)
    check_space(config, requested_space)
    with ExperimentFolder(Path(os.path.expanduser(folder)), "tuning") as experiment, contextlib.ExitStack() as stack:
        log_file = experiment.log("trials")
        with WorkerProcess(log_file) as child:
            usual = child.ask("usual", config=config.model_dump(mode="json"))
            default_rate = float(str(usual["usual_rate"]))
            planned = usual.get("seconds")
            space = requested_space or default_space(config, default_rate)
            file = experiment.path / STORAGE if storage is None else Path(os.path.expanduser(storage))
            study = _open_study(config, space, share, experiment, file, log, stack)
            first = _enqueue_first(study, current_values(config, space, default_rate), trials, log)
            pace = ProgressLog(log, max(0, trials - len(_finished_trials(study))))
            pace.report_plan([share * float(str(planned))] if planned else [])
            jobs = _OptunaJobs(study, config, space, share, trials, log_file, pace)
            try:
                if cluster is None:
                    run_locally(jobs, child)
                else:
                    run_on_cluster(jobs, cluster, experiment.path, gpu=config.device != "cpu")
            finally:
                experiment.has_results = any(trial.user_attrs["end"] != "failed" for trial in _finished_trials(study))
        tuning = _collect_results(study, config, space, first, experiment.path)
        if not tuning.ranked:
            cause = next((trial.note for trial in tuning.trials if trial.note), "all diverged")
            message = f"none of {len(tuning.trials)} trials finished: {cause}"
            raise UserError(message, hint="search other values (--search), or correct the settings")
        experiment.write_json(NUMBERS, tuning.as_dict())
        write_text(experiment.path / PAGE, tuning_markdown(tuning))
        best = apply_values(config, tuning.ranked[0].values).model_dump(mode="json")
        write_text(experiment.path / BEST, yaml.safe_dump(best, sort_keys=False, allow_unicode=True))
        return tuning


def _require_optuna() -> None:
    try:
        import optuna
    except ImportError as error:
        raise UserError("the search needs Optuna, which is not installed", hint='pip install "deltaw[tune]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _open_study(
    config: RunConfig,
    space: Space,
    share: float,
    experiment: ExperimentFolder,
    file: Path,
    log: LogFunction,
    exit_stack: contextlib.ExitStack,
) -> optuna.Study:
    """Open the Optuna study for these settings and this space, or create one if the settings or the space changed.

    ``exit_stack`` closes the SQLite file, because Windows cannot delete open files.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    settings = result_settings(config, without=tuple(space))
    settings |= {"what is searched": {key: str(domain) for key, domain in space.items()}, "share of steps": share}
    stored_settings = experiment.piece(_SETTINGS)
    if stored_settings and (lines := describe_changes(stored_settings, settings)):
        log(f"the settings changed, so the search starts over (earlier trials are kept): {'; '.join(lines[:4])}")
    name = f"{config.method}-{sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.RDBStorage(f"sqlite:///{file.resolve()}")
        exit_stack.callback(storage.engine.dispose)
        exit_stack.callback(storage.remove_session)
        study = optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)
    except (SQLAlchemyError, OSError, RuntimeError) as error:
        message = f"cannot store the trials in this file: {str(error).splitlines()[0]}"
        hint = "use an existing SQLite file or a new file for --storage"
        raise UserError(message, location=str(file), hint=hint) from error
    experiment.write_piece(_SETTINGS, settings)
    # The seed depends on the number of trials. Otherwise a resumed search would repeat its samples.
    seed = (config.train.seed + len(study.trials)) % 2**32
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=2 * NUM_STARTUP_TRIALS)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=NUM_STARTUP_TRIALS, n_warmup_steps=1)
    return study


def _enqueue_first(study: optuna.Study, values: dict[str, object] | None, trials: int, log: LogFunction) -> int | None:
    """Fail interrupted trials, enqueue the current settings as the first trial, and return its number."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    finished = _finished_trials(study)
    if finished:
        log(f"{len(finished)} of {trials} trials are already done")
        return next((trial.number for trial in finished if trial.params == values), None)
    if values is None:
        return None
    if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.enqueue_trial(values)
    return len(study.trials) - 1


def _finished_trials(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that have a result. Interrupted trials are excluded."""
    return [t for t in study.get_trials(deepcopy=False) if "end" in t.user_attrs]


@dataclass
class _OptunaJobs:
    """Trials as jobs. Optuna proposes their values and receives their losses.

    Attributes:
        share: Fraction of a run's steps that each trial trains for.
        trials: Total number of trials.
        log: Log file of the worker processes.
        pace: Reports finished trials and the remaining time.
        active: Running trials with their values, by trial number.
    """

    study: optuna.Study
    config: RunConfig
    space: Space
    share: float
    trials: int
    log: Path
    pace: ProgressLog
    active: dict[str, tuple[optuna.Trial, dict[str, object]]] = field(default_factory=dict)

    def next(self) -> Job | None:
        while len(_finished_trials(self.study)) + len(self.active) < self.trials:
            trial = self.study.ask()
            key = str(trial.number)
            values = {name: _suggest(trial, name, domain) for name, domain in self.space.items()}
            self.active[key] = trial, values
            try:
                config = apply_values(self.config, values).model_dump(mode="json")
            except UserError as error:
                self.complete(key, error)
            else:
                return Job(key, "trial", self.log, {"config": config, "share": self.share, "evaluations": EVALUATIONS})
        return None

    def report(self, key: str, report: Message) -> bool:
        trial, _ = self.active[key]
        trial.report(float(str(report["loss"])), int(str(report["evaluation"])))
        return not trial.should_prune()

    def complete(self, key: str, result: JobResult) -> None:
        from optuna.trial import TrialState

        trial, values = self.active.pop(key)
        loss = math.inf
        end = "done"
        note = ""
        if isinstance(result, UserError | WorkerExited):
            end = "failed"
            note = result.message if isinstance(result, UserError) else str(result)
            trial.set_user_attr("note", note)
            outcomes = [finished.user_attrs["end"] for finished in _finished_trials(self.study)]
            if len(outcomes) >= MAX_INITIAL_FAILURES - 1 and set(outcomes) == {"failed"}:
                raise result if isinstance(result, UserError) else UserError(note) from result
        else:
            for name in {"training_rows", "validation_rows", "steps"} & result.keys():
                trial.set_user_attr(name, result[name])
            if result.get("stopped"):
                end = "ended early"
            elif result["loss"] is None:
                end = "diverged"
            else:
                loss = float(str(result["loss"]))
        trial.set_user_attr("end", end)
        state = {"failed": TrialState.FAIL, "ended early": TrialState.PRUNED}.get(end)
        self.study.tell(trial, None if state else loss, state=state)
        text = ", ".join(f"{key} {_value(value)}" for key, value in values.items())
        outcome_text = f"loss {loss:.4f}" if end == "done" else f"{end}{f': {note}' if note else ''}"
        self.pace.report_done(f"trial {len(_finished_trials(self.study))}/{self.trials}: {text}: {outcome_text}", 1.0)


def _suggest(trial: optuna.Trial, key: str, domain: Range | CategoricalValues) -> object:
    if isinstance(domain, CategoricalValues):
        return trial.suggest_categorical(key, list(domain.values))  # type: ignore[arg-type]
    if domain.integers:
        return trial.suggest_int(key, int(domain.low), int(domain.high), log=domain.log)
    return _short(trial.suggest_float(key, domain.low, domain.high, log=domain.log))


def _short(value: object) -> object:
    """Round a float to three significant digits."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _collect_results(study: optuna.Study, config: RunConfig, space: Space, first: int | None, folder: Path) -> Tuning:
    finished = _finished_trials(study)
    results = []
    for trial in finished:
        end = trial.user_attrs["end"]
        note = trial.user_attrs.get("note", "")
        values = {key: _short(trial.params.get(key)) for key in space}
        seconds = 0.0 if trial.duration is None else trial.duration.total_seconds()
        results.append(TrialResult(trial.number, values, trial.value if end == "done" else None, end, note, seconds))
    # Diverged trials get the worst rank.
    ranked = [r for r in results if r.end in ("done", "diverged")]
    losses = [math.inf if r.loss is None else r.loss for r in ranked]
    weights = {key: setting_importance([r.values[key] for r in ranked], losses) for key in space}
    attributes = next((t.user_attrs for t in reversed(finished) if "steps" in t.user_attrs), {})
    counts = {name: attributes.get(name, 0) for name in ("training_rows", "validation_rows", "steps")}
    space_texts = {key: str(domain) for key, domain in space.items()}
    tuning = Tuning(str(folder), config.method, space_texts, results, first, weights, {}, **counts)
    if not tuning.ranked:
        return tuning
    best = tuning.ranked[0].values
    edges = {key: end for key, domain in space.items() if (end := domain.edge(best[key]))}
    return replace(tuning, edges=edges, best_settings=nested_values(config, best))
