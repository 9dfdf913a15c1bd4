"""A search for settings: Optuna proposes values, a worker trains with them and returns a validation loss.

Each finished trial is stored in an SQLite file, and an interrupted search resumes from it. A trial that fails
does not end the search. The run's held-out rows are not used.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from deltaw.config import RunConfig
from deltaw.durable import write_text
from deltaw.errors import UserError
from deltaw.experiments.child import Child, WorkerEnded
from deltaw.experiments.cluster import Cluster, check_cluster, elsewhere
from deltaw.experiments.folder import ExperimentFolder, changed, settings_of
from deltaw.experiments.jobs import Job, here
from deltaw.experiments.pace import Pace
from deltaw.experiments.space import (
    Range,
    Space,
    Values,
    applied,
    check_space,
    default_space,
    nested_values,
    parse_space,
    present,
)
from deltaw.experiments.tuning import TrialResult, Tuning, tuning_markdown
from deltaw.experiments.weight import weight
from deltaw.training.callbacks import Say, silent
from deltaw.training.planning.asked import refuse_memory

if TYPE_CHECKING:
    import optuna

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
    place = ExperimentFolder(Path(os.path.expanduser(folder)), "tuning")
    kept = False
    try:
        with Child(place.log("trials")) as child:
            usual = float(str(child.ask("usual", config=config.model_dump(mode="json"))["usual_rate"]))
            space = asked or default_space(config, usual)
            study = _open_store(config, space, share, place, storage, say)
            first = _begin(study, present(config, space, usual), trials, say)
            pace = Pace(say, max(0, trials - len(_ended(study))))
            log = place.log("trials")
            jobs = _Search(study, config, space, share=share, trials=trials, log=log, pace=pace)
            try:
                if cluster is None:
                    here(jobs, child)
                else:
                    elsewhere(jobs, cluster, place.path, gpu=config.device != "cpu")
            finally:
                kept = any(trial.user_attrs["end"] != "failed" for trial in _ended(study))
        tuning = _gathered(study, config, space, first, place)
        if not tuning.ranked:
            why = next((trial.note for trial in tuning.trials if trial.note), "all diverged")
            raise UserError(
                f"none of {len(tuning.trials)} trials finished: {why}",
                hint="search other values (--search), or correct the settings",
            )
        _write(tuning, config, place)
        kept = True
        return tuning
    except KeyboardInterrupt:
        kept = True
        raise
    finally:
        place.close(discard=not kept)


def _require_optuna() -> None:
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "the search needs Optuna, which is not installed", hint="pip install 'deltaw[tune]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _open_store(
    config: RunConfig,
    space: Space,
    share: float,
    place: ExperimentFolder,
    storage: str | os.PathLike[str] | None,
    say: Say,
) -> optuna.Study:
    """The Optuna study for these settings and this space; a new one if either has changed."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    settings = settings_of(config, without=tuple(space)) | {
        "what is searched": {key: str(domain) for key, domain in space.items()},
        "share of steps": share,
    }
    before = place.piece(_SETTINGS)
    if before and (lines := changed(before, settings)):
        say(f"the search starts over; earlier trials stay in the file: {'; '.join(lines[:4])}")
    name = f"{config.method}-{sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]}"
    file = Path(os.path.expanduser(storage)) if storage is not None else place.path / STORAGE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            storage=f"sqlite:///{file.resolve()}", study_name=name, direction="minimize", load_if_exists=True
        )
    except (SQLAlchemyError, OSError, RuntimeError) as error:
        raise UserError(
            f"the trials cannot be stored there: {str(error).splitlines()[0]}",
            where=str(file),
            hint="name an SQLite file, or one that does not exist yet, with --storage",
        ) from error
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
    for trial in ended:
        if now is not None and trial.params == dict(now):
            return trial.number
    if now is None or ended:
        return None
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    if not waiting:
        study.enqueue_trial(dict(now))
    return len(study.trials) - 1


def _ended(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The finished trials, without interrupted ones."""
    return [t for t in study.get_trials(deepcopy=False) if "end" in t.user_attrs]


class _Search:
    """The trials as jobs: Optuna proposes values, sees reports and results, and stores them.

    Args:
        trials: how many there shall be in the end.
    """

    def __init__(
        self,
        study: optuna.Study,
        config: RunConfig,
        space: Space,
        *,
        share: float,
        trials: int,
        log: Path,
        pace: Pace,
    ) -> None:
        self._study, self._config, self._space = study, config, space
        self._share, self._trials, self._log, self._pace = share, trials, log, pace
        self._asked: dict[str, tuple[optuna.Trial, dict[str, object]]] = {}

    def next(self) -> Job | None:
        while len(_ended(self._study)) + len(self._asked) < self._trials:
            trial = self._study.ask()
            key = str(trial.number)
            values = {name: _suggested(trial, name, domain) for name, domain in self._space.items()}
            self._asked[key] = trial, values
            try:
                config = applied(self._config, values).model_dump(mode="json")
            except UserError as error:
                self.ended(key, error)
                continue
            request = {"config": config, "share": self._share, "evaluations": EVALUATIONS}
            return Job(key, "trial", self._log, request)
        return None

    def report(self, key: str, report: Mapping[str, object]) -> bool:
        trial, _ = self._asked[key]
        trial.report(float(str(report["loss"])), int(str(report["evaluation"])))
        return not trial.should_prune()

    def ended(self, key: str, found: Mapping[str, object] | UserError | WorkerEnded) -> None:
        trial, values = self._asked.pop(key)
        loss, end, note = math.inf, "done", ""
        if isinstance(found, UserError | WorkerEnded):
            end, note = "failed", found.what if isinstance(found, UserError) else str(found)
            trial.set_user_attr("note", note)
            if _hopeless(self._study):
                raise found if isinstance(found, UserError) else UserError(note) from found
        else:
            for name in ("training_rows", "validation_rows", "steps"):
                if name in found:
                    trial.set_user_attr(name, found[name])
            if found.get("stopped"):
                end = "ended early"
            elif found["loss"] is None:
                end = "diverged"
            else:
                loss = float(str(found["loss"]))
        self._store(trial, loss, end)
        said = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        result = f"loss {loss:.4f}" if end == "done" else f"{end}{f': {note}' if note else ''}"
        self._pace.did(f"trial {len(_ended(self._study))}/{self._trials}: {said}: {result}", 1.0)

    def _store(self, trial: optuna.Trial, loss: float, end: str) -> None:
        from optuna.trial import TrialState

        trial.set_user_attr("end", end)
        if end == "failed":
            self._study.tell(trial, state=TrialState.FAIL)
        elif end == "ended early":
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, loss)


def _hopeless(study: optuna.Study) -> bool:
    ends = [trial.user_attrs["end"] for trial in _ended(study)]
    return len(ends) >= HOPELESS - 1 and all(end == "failed" for end in ends)


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
    ended = _ended(study)
    results = [
        TrialResult(
            number=trial.number,
            values={key: _short(trial.params.get(key)) for key in space},
            loss=trial.value if trial.user_attrs["end"] == "done" else None,
            end=trial.user_attrs["end"],
            note=trial.user_attrs.get("note", ""),
            seconds=trial.duration.total_seconds() if trial.duration is not None else 0.0,
        )
        for trial in ended
    ]
    # A diverged trial counts with the worst rank.
    told = [r for r in results if r.end in ("done", "diverged")]
    losses = [math.inf if r.loss is None else r.loss for r in told]
    done = [r for r in results if r.loss is not None]
    best = min(done, key=lambda r: (r.loss, r.number)) if done else None
    facts = next((t.user_attrs for t in reversed(ended) if "steps" in t.user_attrs), {})
    edges = {} if best is None else {k: d.at_end(best.values[k]) for k, d in space.items()}
    return Tuning(
        folder=str(place.path),
        method=config.method,
        space={key: str(domain) for key, domain in space.items()},
        trials=results,
        first=first,
        weights={key: weight([r.values[key] for r in told], losses) for key in space},
        edges={key: end for key, end in edges.items() if end},
        best_settings={} if best is None else nested_values(config, best.values),
        training_rows=int(facts.get("training_rows", 0)),
        validation_rows=int(facts.get("validation_rows", 0)),
        steps=int(facts.get("steps", 0)),
    )


def _write(tuning: Tuning, config: RunConfig, place: ExperimentFolder) -> None:
    place.write_json(NUMBERS, tuning.as_dict())
    write_text(place.path / PAGE, tuning_markdown(tuning))
    best = applied(config, tuning.ranked[0].values)
    text = yaml.safe_dump(best.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_text(place.path / BEST, text)
