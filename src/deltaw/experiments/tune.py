"""A search for settings: Optuna proposes values, a worker trains with them and returns a validation loss.

Each finished trial is stored in an SQLite file, and an interrupted search resumes from it. A trial that fails
does not end the search. The run's held-out rows are not used.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from deltaw.durable import write_text
from deltaw.errors import UserError, did_you_mean
from deltaw.experiments.comparison import duration, markdown_table
from deltaw.experiments.folder import ExperimentFolder, changed, settings_of
from deltaw.experiments.jobs import Child, Cluster, Found, Job, WorkerEnded, check_cluster, elsewhere, here
from deltaw.experiments.until_flat import Pace
from deltaw.methods import registry
from deltaw.settings import RunConfig, parse_yaml, settings
from deltaw.training.callbacks import Say, silent
from deltaw.training.evaluation.base import ranks
from deltaw.training.planning.asked import refuse_memory

if TYPE_CHECKING:
    import optuna


# How much each setting matters: the share of the variation between trials that it explains alone.
#
# With fewer trials no estimate is made.
FEWEST = 6


def weight(values: Sequence[object], losses: Sequence[float]) -> float | None:
    """Adjusted R² of a regression of the losses' ranks on one setting.

    Ranks are used so that one bad trial does not dominate. A numeric setting enters with its square, since
    the best value is often in the middle, and on a logarithmic scale if all values are positive. Any other
    setting enters as the mean rank of each value. For n trials and p terms the adjusted R² is
    R² − (1 − R²)·p / (n − p − 1) (Theil 1961).

    Args:
        values: the setting's value in each trial.
        losses: the loss of each trial, in the same order.

    Returns:
        A share between 0 (explains nothing) and 1; None if there are too few trials to tell.
    """
    count = len(losses)
    if count < FEWEST or len(set(map(str, values))) < 2:
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
    spread = float(((y - y.mean()) ** 2).sum())
    if spread == 0:
        return None
    left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    r_square = 1 - float((left**2).sum()) / spread
    return max(0.0, r_square - (1 - r_square) * terms / (count - terms - 1))


# What a search may change: settings by dotted key, each with a range or a list of values.
#
# ``train.learning_rate=1e-5..1e-2:log`` is a range on a logarithmic scale, ``lora.rank=[4,8,16]`` a list. It
# knows the settings and nothing of how the search goes.


# Alpha as a multiple of the rank: the strength of the update in one number.
ALPHA_PER_RANK = "lora.alpha/rank"
# Trials that differ in one of these do not have comparable losses.
_FIXED = ("model", "task", "output", "force", "train.seed", "device", "threads", "trust_remote_code")
_EXAMPLE = "write KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=[VALUE, VALUE], as in lora.rank=[4,8,16]"


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; evenly on a logarithmic scale if ``log``."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}{':log' if self.log else ''}"

    def ends(self) -> tuple[object, object]:
        kind = int if self.whole else float
        return kind(self.low), kind(self.high)

    def holds(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def at_end(self, value: object) -> str:
        """``low`` or ``high`` if the value is within a twentieth of that end, else empty."""
        scale = math.log if self.log else float
        low, high, at = scale(self.low), scale(self.high), scale(float(str(value)))
        place = (at - low) / (high - low)
        return "low" if place < 0.05 else "high" if place > 0.95 else ""


@dataclass(frozen=True)
class Values:
    """One of these."""

    values: tuple[object, ...]

    def __str__(self) -> str:
        return f"[{', '.join(str(value) for value in self.values)}]"

    def ends(self) -> tuple[object, ...]:
        return self.values

    def holds(self, value: object) -> bool:
        return value in self.values

    def at_end(self, value: object) -> str:
        """As for a range, if all values are numbers; other values have no end."""
        numbers = [v for v in self.values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) < max(2, len(self.values)) or not isinstance(value, int | float):
            return ""
        return "low" if value == min(numbers) else "high" if value == max(numbers) else ""


Space = Mapping[str, Range | Values]


def default_space(config: RunConfig, usual_rate: float) -> dict[str, Range | Values]:
    """What is searched by default: the learning rate, and the settings that the method registered.

    Args:
        usual_rate: the method's usual learning rate, the middle of the range.
    """
    rate = Range(float(f"{usual_rate / 10:.2g}"), float(f"{usual_rate * 10:.2g}"), log=True)
    return {"train.learning_rate": rate, **parse_space(registry.entry_of(config.method).search)}


def parse_space(given: Iterable[str]) -> dict[str, Range | Values]:
    """``--search`` flags as a space.

    Raises:
        UserError: no such form, an unknown key, or one that trials cannot differ in.
    """
    known = [setting.key for setting in settings()] + [ALPHA_PER_RANK]
    space: dict[str, Range | Values] = {}
    for text in given:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not value:
            raise _refused(f"'{text}' names no setting to search")
        if key not in known:
            raise _refused(f"there is no setting '{key}'", did_you_mean(key, known))
        if key in _FIXED or key.startswith("data."):
            what = f"'{key}' cannot be searched: trials are compared on the same rows, model and machine"
            raise _refused(what, "set it in the settings")
        space[key] = _domain(key, value, text)
    if {"lora.alpha", ALPHA_PER_RANK} <= set(space):
        raise _refused(f"lora.alpha and {ALPHA_PER_RANK} exclude each other", "leave one of them out")
    return space


def _refused(what: str, hint: str = _EXAMPLE) -> UserError:
    return UserError(what, where="--search", hint=hint)


def _domain(key: str, value: str, text: str) -> Range | Values:
    if value.startswith("["):
        values = _parsed(value)
        if not isinstance(values, list) or not values:
            raise _refused(f"'{text}' is not a list of values")
        if any(isinstance(v, list | dict) for v in values) or len(set(map(str, values))) < len(values):
            raise _refused(f"'{text}' holds a list, or a value twice", "list plain values, once each")
        return Values(tuple(values))
    log = value.endswith(":log")
    lower, dots, higher = value.removesuffix(":log").partition("..")
    low, high = _number(lower), _number(higher)
    if not dots or low is None or high is None:
        raise _refused(f"'{text}' is neither a range nor a list")
    if not low < high or (log and low <= 0):
        what = "is an empty range" if low >= high else "has no logarithm at its low end"
        raise _refused(f"'{text}' {what}", "give the lower end first, above 0 with :log")
    fractions = [ALPHA_PER_RANK, *(setting.key for setting in settings() if "float" in str(setting.annotation))]
    return Range(low, high, log, whole=isinstance(low, int) and isinstance(high, int) and key not in fractions)


def _number(text: str) -> float | int | None:
    value = _parsed(text.strip())
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None  # type: ignore[return-value]


def _parsed(text: str) -> object:
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return None


def check_space(config: RunConfig, space: Space) -> None:
    """Put the ends of each range and all values of a list into the settings.

    Raises:
        UserError: a value does not fit its setting.
    """
    for key, domain in space.items():
        for value in domain.ends():
            applied(config, {key: value})


def applied(config: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """The settings with these values, by dotted key, in them.

    Raises:
        UserError: a value does not fit.
    """
    return RunConfig.read(config.model_dump(mode="json"), nested_values(config, values))


def nested_values(config: RunConfig, values: Mapping[str, object]) -> dict[str, object]:
    """Values by dotted key as nested settings; alpha per rank becomes alpha."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key == ALPHA_PER_RANK:
            rank = float(str(values.get("lora.rank", config.lora.rank)))
            key, value = "lora.alpha", float(str(value)) * rank
        section, dot, leaf = key.partition(".")
        result[section] = {**result.get(section, {}), leaf: value} if dot else value
    return result


def present(config: RunConfig, space: Space, usual_rate: float) -> dict[str, object] | None:
    """The values that the settings have now; None if one of them is outside the space."""
    dumped = config.model_dump(mode="json")
    values: dict[str, object] = {}
    for key, domain in space.items():
        if key == ALPHA_PER_RANK:
            ratio = config.lora.alpha / config.lora.rank
            value: object = int(ratio) if ratio == int(ratio) else ratio
        else:
            section, dot, leaf = key.partition(".")
            value = dumped[section][leaf] if dot else dumped[section]
        if key == "train.learning_rate" and isinstance(value, str):
            value = usual_rate
        if not domain.holds(value):
            return None
        values[key] = value
    return values


# What a search for settings came to: its best trials, what matters, and what to do next.
#
# It knows numbers alone, and nothing of how trials are made or chosen.


# Trials whose loss is within this part of the best are about as good.
ALIKE = 0.01


@dataclass(frozen=True)
class TrialResult:
    """One trial.

    Attributes:
        number: from 0. values: by dotted key.
        loss: on the validation rows; None where there is none.
        end: ``done``, ``ended early``, ``diverged`` or ``failed``. note: why it failed.
        seconds: that it took.
    """

    number: int
    values: Mapping[str, object]
    loss: float | None
    end: str
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Tuning:
    """A whole search.

    Attributes:
        folder: where it is written. method: that was tuned.
        space: what was searched, by dotted key, as text.
        trials: in the order they were made.
        first: the number of the trial with the settings as they were, if there is one.
        weights: by key, the part of the differences that it accounts for; None where it cannot be told.
        edges: by key, ``low`` or ``high`` where the best lies at that end of what was searched.
        best_settings: the best trial's values as nested settings.
        training_rows, validation_rows, steps: of a trial.
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
        """The trials that came to their end, the best first."""
        done = [trial for trial in self.trials if trial.end == "done"]
        return sorted(done, key=lambda trial: (trial.loss or 0.0, trial.number))

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        best = self.ranked[0].number if self.ranked else None
        return {**asdict(self), "best": best, "lessons": lessons(self)}


def best_yaml(tuning: Tuning) -> str:
    """The best settings, to be laid into a file of settings."""
    return yaml.safe_dump(dict(tuning.best_settings), sort_keys=False).rstrip()


def lessons(tuning: Tuning) -> list[str]:
    """What the search says, in sentences."""
    if not tuning.ranked:
        return []
    best, *others = tuning.ranked
    assert best.loss is not None
    said = ", ".join(f"{key} {_value(value)}" for key, value in best.values.items())
    lines = [f"Trial {best.number} is best: loss {best.loss:.4f} with {said}."]
    before = next((trial.loss for trial in others if trial.number == tuning.first), None)
    if best.number == tuning.first:
        lines.append("These are the settings as they were: nothing that was tried is better.")
    elif before:
        lines.append(f"The settings as they were gave {before:.4f}: the best has {1 - best.loss / before:.1%} less.")
    alike = [t for t in others if t.loss is not None and t.loss <= best.loss * (1 + ALIKE)]
    if alike:
        within = f"{len(alike)} of the other {len(others)} finished trials come within {ALIKE:.0%} of it"
        lines.append(f"{within}; do not read much into their order.")
    known = {key: weight for key, weight in tuning.weights.items() if weight is not None}
    said = ", ".join(f"{key} {known[key]:.0%}" for key in sorted(known, key=lambda key: -known[key]))
    accounts = f"Of the differences between trials, each setting accounts alone for: {said}."
    lines.append(accounts if known else "There are too few finished trials to say which setting matters.")
    for key, end in tuning.edges.items():
        where = f"lies at the {end} end of what was searched ({tuning.space[key]})"
        lines.append(f"The best {key}, {_value(best.values[key])}, {where}: widen it with --search.")
    rows = f"The loss is that of {tuning.validation_rows} rows taken out of the training rows"
    return [*lines, *_ends(tuning), f"{rows}; the held-out rows took no part, and score the best settings later."]


def _ends(tuning: Tuning) -> list[str]:
    counts = {end: sum(t.end == end for t in tuning.trials) for end in ("ended early", "diverged", "failed")}
    said = [f"{count} {end}" for end, count in counts.items() if count]
    lines = [f"Of {len(tuning.trials)} trials, {', '.join(said)}."] if said else []
    notes = dict.fromkeys(t.note for t in tuning.trials if t.end == "failed" and t.note)
    return lines + [f"Failed: {note}" for note in list(notes)[:3]]


def tuning_markdown(tuning: Tuning) -> str:
    """The search as a page."""
    titles = ["trial", "loss", *tuning.space, "time", "end"]
    others = [trial for trial in tuning.trials if trial.end != "done"]
    rows = [[*trial_cells(tuning, trial), trial.end] for trial in [*tuning.ranked, *others]]
    head = f"# Settings searched: {tuning.method}"
    said = "\n".join(f"- {line}" for line in lessons(tuning))
    table = "\n".join(markdown_table(titles, rows, left=0))
    return f"{head}\n\n{said}\n\n```yaml\n{best_yaml(tuning)}\n```\n\n{table}"


def trial_cells(tuning: Tuning, trial: TrialResult) -> list[str]:
    """A trial's texts: number, loss, a value for each setting, time."""
    mark = " (as it was)" if trial.number == tuning.first else ""
    loss = "" if trial.loss is None else f"{trial.loss:.4f}"
    values = [_value(trial.values.get(key, "")) for key in tuning.space]
    return [f"{trial.number}{mark}", loss, *values, duration(trial.seconds)]


def _value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# Evaluations in a trial. The last is at its end; at the others the trial may be pruned.
EVALUATIONS = 5
# The first trials are never pruned, since there is too little to compare them with.
STARTUP = 5
# If this many trials fail before any succeeds, the settings are wrong and the search ends.
HOPELESS = 3
PAGE, NUMBERS, BEST, STORAGE = "tuning.md", "tuning.json", "best.yaml", "trials.db"
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
    say: Say = silent,
) -> Tuning:
    """Search the settings of one method for the lowest validation loss.

    Args:
        config: the current settings; they are the first trial if they lie within the search space.
        trials: total number of trials, including those of an earlier call.
        folder: where everything is written; a search that exists there is resumed.
        search: the search space, as in ``lora.rank=[4,8]``; by default the method's own.
        storage: SQLite file of the trials; by default one in the folder.
        share: the share of a run's steps that a trial takes.
        cluster: the machines that trials run on, several at once; by default one after another on this one.
        say: told lines that a person may want to read.

    Raises:
        UserError: the input cannot be used, Optuna is not installed, or no trial succeeded.
    """
    _require_optuna()
    if cluster is not None:
        check_cluster(cluster)
    refuse_memory(config.memory, "tune")
    asked = parse_space(search)
    check_space(config, asked)
    with ExperimentFolder(Path(os.path.expanduser(folder)), "tuning") as place, contextlib.ExitStack() as opened:
        log = place.log("trials")
        with Child(log) as child:
            usual = float(str(child.ask("usual", config=config.model_dump(mode="json"))["usual_rate"]))
            space = asked or default_space(config, usual)
            file = place.path / STORAGE if storage is None else Path(os.path.expanduser(storage))
            study = _open_store(config, space, share, place, file, say, opened)
            first = _begin(study, present(config, space, usual), trials, say)
            pace = Pace(say, max(0, trials - len(_ended(study))))
            jobs = _Search(study, config, space, share, trials, log, pace)
            try:
                if cluster is None:
                    here(jobs, child)
                else:
                    elsewhere(jobs, cluster, place.path, gpu=config.device != "cpu")
            finally:
                place.kept = any(trial.user_attrs["end"] != "failed" for trial in _ended(study))
        tuning = _gathered(study, config, space, first, place)
        if not tuning.ranked:
            why = next((trial.note for trial in tuning.trials if trial.note), "all diverged")
            what = f"none of {len(tuning.trials)} trials finished: {why}"
            raise UserError(what, hint="search other values (--search), or correct the settings")
        _write(tuning, config, place)
        return tuning


def _require_optuna() -> None:
    try:
        import optuna
    except ImportError as error:
        raise UserError("the search needs Optuna, which is not installed", hint='pip install "deltaw[tune]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _open_store(
    config: RunConfig,
    space: Space,
    share: float,
    place: ExperimentFolder,
    file: Path,
    say: Say,
    opened: contextlib.ExitStack,
) -> optuna.Study:
    """The Optuna study for these settings and this space; a new one if either has changed. ``opened`` closes its
    file: Windows removes none that is open."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    searched = {key: str(domain) for key, domain in space.items()}
    settings = settings_of(config, without=tuple(space)) | {"what is searched": searched, "share of steps": share}
    before = place.piece(_SETTINGS)
    if before and (lines := changed(before, settings)):
        say(f"the search starts over; earlier trials stay in the file: {'; '.join(lines[:4])}")
    name = f"{config.method}-{sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.RDBStorage(f"sqlite:///{file.resolve()}")
        opened.callback(storage.engine.dispose)
        opened.callback(storage.remove_session)
        study = optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)
    except (SQLAlchemyError, OSError, RuntimeError) as error:
        what = f"the trials cannot be stored there: {str(error).splitlines()[0]}"
        hint = "name an SQLite file, or one that does not exist yet, with --storage"
        raise UserError(what, where=str(file), hint=hint) from error
    place.write_piece(_SETTINGS, settings)
    # The seed changes with the number of trials; otherwise a resumed search would repeat its draws.
    seed = (config.train.seed + len(study.trials)) % 2**32
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=2 * STARTUP)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=1)
    return study


def _begin(study: optuna.Study, now: Mapping[str, object] | None, trials: int, say: Say) -> int | None:
    """Fail interrupted trials and queue the current settings as the first trial; returns its number."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    ended = _ended(study)
    if ended:
        say(f"{len(ended)} of {trials} trials were made before")
        return next((trial.number for trial in ended if trial.params == now), None)
    if now is None:
        return None
    if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.enqueue_trial(dict(now))
    return len(study.trials) - 1


def _ended(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The finished trials, without interrupted ones."""
    return [t for t in study.get_trials(deepcopy=False) if "end" in t.user_attrs]


@dataclass
class _Search:
    """The trials as jobs: Optuna proposes values, sees reports and results, and stores them.

    Attributes:
        trials: how many there shall be in the end. asked: those under way, with their values, by key.
    """

    study: optuna.Study
    config: RunConfig
    space: Space
    share: float
    trials: int
    log: Path
    pace: Pace
    asked: dict[str, tuple[optuna.Trial, dict[str, object]]] = field(default_factory=dict)

    def next(self) -> Job | None:
        while len(_ended(self.study)) + len(self.asked) < self.trials:
            trial = self.study.ask()
            key = str(trial.number)
            values = {name: _suggested(trial, name, domain) for name, domain in self.space.items()}
            self.asked[key] = trial, values
            try:
                config = applied(self.config, values).model_dump(mode="json")
            except UserError as error:
                self.ended(key, error)
                continue
            request = {"config": config, "share": self.share, "evaluations": EVALUATIONS}
            return Job(key, "trial", self.log, request)
        return None

    def report(self, key: str, report: Mapping[str, object]) -> bool:
        trial, _ = self.asked[key]
        trial.report(float(str(report["loss"])), int(str(report["evaluation"])))
        return not trial.should_prune()

    def ended(self, key: str, found: Found) -> None:
        from optuna.trial import TrialState

        trial, values = self.asked.pop(key)
        loss, end, note = math.inf, "done", ""
        if isinstance(found, UserError | WorkerEnded):
            end, note = "failed", found.what if isinstance(found, UserError) else str(found)
            trial.set_user_attr("note", note)
            ends = [before.user_attrs["end"] for before in _ended(self.study)]
            if len(ends) >= HOPELESS - 1 and set(ends) == {"failed"}:
                raise found if isinstance(found, UserError) else UserError(note) from found
        else:
            for name in {"training_rows", "validation_rows", "steps"} & found.keys():
                trial.set_user_attr(name, found[name])
            if found.get("stopped"):
                end = "ended early"
            elif found["loss"] is None:
                end = "diverged"
            else:
                loss = float(str(found["loss"]))
        trial.set_user_attr("end", end)
        state = {"failed": TrialState.FAIL, "ended early": TrialState.PRUNED}.get(end)
        self.study.tell(trial, None if state else loss, state=state)
        said = ", ".join(f"{key} {_value(value)}" for key, value in values.items())
        result = f"loss {loss:.4f}" if end == "done" else f"{end}{f': {note}' if note else ''}"
        self.pace.did(f"trial {len(_ended(self.study))}/{self.trials}: {said}: {result}", 1.0)


def _suggested(trial: optuna.Trial, key: str, domain: Range | Values) -> object:
    if isinstance(domain, Values):
        return trial.suggest_categorical(key, list(domain.values))  # type: ignore[arg-type]
    if domain.whole:
        return trial.suggest_int(key, int(domain.low), int(domain.high), log=domain.log)
    return _short(trial.suggest_float(key, domain.low, domain.high, log=domain.log))


def _short(value: object) -> object:
    """Round a float to three significant digits, which is as precise as a trial is."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _gathered(
    study: optuna.Study, config: RunConfig, space: Space, first: int | None, place: ExperimentFolder
) -> Tuning:
    ended, results = _ended(study), []
    for trial in ended:
        end, took = trial.user_attrs["end"], trial.duration
        values = {key: _short(trial.params.get(key)) for key in space}
        note, seconds = trial.user_attrs.get("note", ""), 0.0 if took is None else took.total_seconds()
        results.append(TrialResult(trial.number, values, trial.value if end == "done" else None, end, note, seconds))
    # A diverged trial counts with the worst rank.
    told = [r for r in results if r.end in ("done", "diverged")]
    losses = [math.inf if r.loss is None else r.loss for r in told]
    weights = {key: weight([r.values[key] for r in told], losses) for key in space}
    facts = next((t.user_attrs for t in reversed(ended) if "steps" in t.user_attrs), {})
    counts = {name: facts.get(name, 0) for name in ("training_rows", "validation_rows", "steps")}
    searched = {key: str(domain) for key, domain in space.items()}
    tuning = Tuning(str(place.path), config.method, searched, results, first, weights, {}, **counts)
    if not tuning.ranked:
        return tuning
    best = tuning.ranked[0].values
    edges = {key: end for key, domain in space.items() if (end := domain.at_end(best[key]))}
    return replace(tuning, edges=edges, best_settings=nested_values(config, best))


def _write(tuning: Tuning, config: RunConfig, place: ExperimentFolder) -> None:
    place.write_json(NUMBERS, tuning.as_dict())
    write_text(place.path / PAGE, tuning_markdown(tuning))
    best = applied(config, tuning.ranked[0].values)
    write_text(place.path / BEST, yaml.safe_dump(best.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
