"""Train the stages of a chain in order, and score the adapter of each stage on the same held-out rows.

Each stage is a run in a separate folder (:func:`deltaw.runs.fit.fit`), so a finished stage is skipped and an
interrupted one is resumed. Afterwards, the base model and the adapter of each stage are scored on the
held-out rows of every stage. Scores are stored immediately, and computed again only if an adapter, the rows or the
settings change.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field, FiniteFloat, StringConstraints, TypeAdapter, ValidationError

from deltaw.data.row_reader import RunData
from deltaw.errors import UserError
from deltaw.experiments.chain_checks import check_stages, located, require_adapter
from deltaw.experiments.folder import ExperimentFolder, content_hash, result_settings
from deltaw.machine.memory import release_free_memory, reset_peak_memory
from deltaw.memory.plan import Plan
from deltaw.methods.start import open_start, resolve_start
from deltaw.progress import LogFunction, ignore_line, track_progress
from deltaw.runs.checks import check_rows
from deltaw.runs.fit import fit
from deltaw.runs.load_model import load_model
from deltaw.runs.process_agreement import send_settings
from deltaw.runs.result import Result
from deltaw.settings.config import RunConfig
from deltaw.settings.stages import Chain, Stage
from deltaw.training.callbacks import Callback
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.planning.plan_run import plan_run, with_time
from deltaw.training.process import preserved_process_state
from deltaw.training.reducer import SINGLE_PROCESS, Reducer
from deltaw.training.session import assemble, read_data
from deltaw.training.task import Task

# Name of a metric in a file, which is printed.
MetricName: TypeAlias = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
# Names of the models in the table of scores that are not stages.
BASE = "base model"
START = "start_from"
# File with the results.
RESULTS_FILE = "chain.json"
# Settings of an evaluated stage that scoring replaces.
_REPLACED_KEYS = ("method", "start_from", "start_mode", "stack", "reference_model", "output")


@dataclass(frozen=True)
class StageScore:
    """Score of a model on the held-out rows of a stage.

    Attributes:
        metric: Primary metric of the evaluated task.
        metrics: All metrics. Undefined ones are None.
        interval: 95% interval of the primary metric, or None.
        per_row: Primary metric of each row, or None if it is not a mean over rows.
        higher_is_better: Direction of the primary metric.
    """

    metric: MetricName
    metrics: dict[MetricName, FiniteFloat | None]
    interval: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)] | None
    per_row: list[FiniteFloat] | None
    higher_is_better: bool = True

    @classmethod
    def of(cls, result: Evaluation) -> StageScore:
        """Return the score of an evaluation."""
        metrics = {name: value if math.isfinite(value) else None for name, value in result.named_metrics().items()}
        rows = None if result.per_row is None else [float(value) for value in result.per_row]
        if rows is not None and not all(map(math.isfinite, rows)):
            rows = None
        main = f"{result.name} {result.main}".strip()
        interval = None if result.interval is None or rows is None else [float(bound) for bound in result.interval]
        return cls(main, metrics, interval, rows, result.higher_is_better)

    @classmethod
    def read(cls, values: object, rows: object) -> StageScore | None:
        """Restore a score of a number of rows from a file, or return None if the file is damaged."""
        try:
            score = TypeAdapter(cls).validate_python(values)
        except ValidationError:
            return None
        is_complete = score.per_row is None or len(score.per_row) == rows
        return score if is_complete and score.metric in score.metrics else None

    @property
    def value(self) -> float | None:
        """Primary metric."""
        return self.metrics.get(self.metric)


@dataclass
class HeldOutScores:
    """Scores on the held-out rows of a stage.

    Attributes:
        stage: Name of the stage.
        task: Its task.
        rows: Number of held-out rows.
        is_relative: True if the scores are relative to the base model, as for preferences.
        scores: Score by model: :data:`BASE`, or the name of the stage with the adapter.
        errors: Reasons for missing scores by model.
    """

    stage: str
    task: str
    rows: int = 0
    is_relative: bool = False
    scores: dict[str, StageScore] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def add(self, model: str, values: Mapping[str, Any]) -> None:
        """Add a stored score, or the reason why there is none."""
        if (score := StageScore.read(values.get("score"), values.get("rows"))) is not None:
            self.rows = int(values["rows"])
            self.scores[model] = score
        elif "error" in values:
            self.errors[model] = str(values["error"])


@dataclass(frozen=True)
class ChainResult:
    """Result of a chain.

    Attributes:
        chain: The chain.
        results: Result of each stage.
        held_out: Scores on the held-out rows of each stage that has any.
    """

    chain: Chain
    results: Mapping[str, Result]
    held_out: Sequence[HeldOutScores]

    def as_dict(self) -> dict[str, object]:
        """Return JSON values."""
        stages = [
            {"name": s.name, "task": s.config.task, "start_from": s.config.start_from, **self.results[s.name].as_dict()}
            for s in self.chain.stages
            if s.name in self.results
        ]
        scores = {
            entry.stage: {**vars(entry), "scores": {name: vars(score) for name, score in entry.scores.items()}}
            for entry in self.held_out
        }
        return {"output": str(self.chain.folder), "stages": stages, "held_out": scores}


def train_stages(
    chain: Chain,
    callback_for: Callable[[Stage], Callback] = lambda _: Callback(),
    *,
    fresh: bool = False,
    processes: Reducer = SINGLE_PROCESS,
    log: LogFunction = ignore_line,
) -> Iterator[tuple[Stage, Result]]:
    """Train the stages in order, and yield the result of each. Stops after an interrupted stage.

    Args:
        chain: The chain.
        callback_for: Returns the callback that receives the events of a stage.
        fresh: Start all stages over. Existing runs are moved.
        processes: Communication with the other processes of a distributed run.
        log: Receives messages of the checks.

    Raises:
        UserError: If a stage is invalid, in which case nothing is written, or if it fails.
    """
    with preserved_process_state():
        check_stages(chain, log, skip_finished=not fresh, call_functions=True)
    remaining = len(chain.stages)
    with ExperimentFolder(chain.folder, "chain") as experiment:
        experiment.has_results = True  # keep finished stages if a later one fails
        for stage in chain.stages:
            with located(chain, stage):
                if (chain.folder / stage.name).is_symlink():
                    raise UserError("the folder of the stage is a link", location=stage.config.output, hint="remove it")
                release_free_memory()
                reset_peak_memory()
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                result = fit(stage.config, callback=callback_for(stage), fresh=fresh, processes=processes)
                if not result.interrupted:
                    require_adapter(result.output)
            remaining -= 1
            yield stage, result
            if result.interrupted:
                break
        for _ in range(remaining):
            send_settings(None, processes)  # the other processes skip the remaining stages


def planned_stages(chain: Chain, *, processes: int = 1) -> dict[str, Plan]:
    """Return the plan of each stage by name. A stage is planned with a new adapter if its parent is not trained yet
    of the same rank.

    Raises:
        UserError: If a stage is invalid.
    """
    plans: dict[str, Plan] = {}
    with preserved_process_state():
        checked = check_stages(chain)
        for stage in chain.stages:
            with located(chain, stage):
                config = checked[stage.name].planned
                task, data = read_data(config, ignore_line)
                plan = plan_run(config, task, data, processes=processes)
                if plans and plan.workload:  # the process of the first stage trains the others too
                    plan = replace(plan, workload={**plan.workload, "start_seconds": 0.0})
                plans[stage.name] = with_time(plan, config, task, data) if processes == 1 else plan
    return plans


def score_stages(chain: Chain) -> list[HeldOutScores]:
    """Score the base model and the adapter of each stage on the held-out rows of every stage.

    Args:
        chain: A chain of which all stages are finished.

    Raises:
        UserError: If the folder is in use, or rows have changed so that they cannot be read.
    """
    held_out: list[HeldOutScores] = []
    with ExperimentFolder(chain.folder, "chain") as experiment, preserved_process_state():
        for stage in chain.stages:
            config = stage.config.model_copy(update={"start_from": None})
            read_rows = functools.cache(functools.partial(read_data, config, ignore_line))
            is_relative = bool(getattr(stage.config.section, "has_reference", False))
            entry = HeldOutScores(stage.name, stage.config.task, is_relative=is_relative)
            for name, model in scored_models(chain).items():
                entry.add(name, _load_or_compute_score(experiment, chain, stage, name, model, read_rows))
            if entry.scores or entry.errors:
                held_out.append(entry)
    return held_out


def scored_models(chain: Chain) -> dict[str, Mapping[str, Any]]:
    """Return the settings of each scored model by name: the base model, the adapter of the first stage's
    ``start_from``, and the adapter of each stage.
    """
    first = chain.stages[0].config
    models: dict[str, Mapping[str, Any]] = {BASE: {"method": "lora"}}
    if first.start_from is not None:
        models[START] = {"method": first.method, "start_from": first.start_from}
    for stage in chain.stages:
        models[stage.name] = {"method": stage.config.method, "start_from": str(chain.folder / stage.name)}
    return models


def _load_or_compute_score(
    experiment: ExperimentFolder,
    chain: Chain,
    stage: Stage,
    name: str,
    model: Mapping[str, Any],
    read_rows: Callable[[], tuple[Task[Any], RunData]],
) -> Mapping[str, Any]:
    """Return a score for JSON with the number of rows, or the reason why there is none."""
    file = f"{stage.name}.{name}".replace(" ", "-")  # names of stages contain no dot
    try:
        config = evaluated_config(chain, stage, model)
    except UserError as error:
        return {"error": error.message}
    key = score_key(config)
    stored = experiment.piece(file)
    if stored.get("key") == key and StageScore.read(stored.get("score"), stored.get("rows")) is not None:
        return stored
    values: dict[str, Any] = {"key": key, "rows": len(read_rows()[1].held_out)}
    if values["rows"]:
        with track_progress(f"scoring on the held-out rows of '{stage.name}'"):
            try:
                values["score"] = vars(StageScore.of(_evaluate(config, *read_rows())))
            except UserError as error:
                values["error"] = error.message
    experiment.write_piece(file, values)
    return values


def evaluated_config(chain: Chain, stage: Stage, model: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a session that scores a model on the rows of a stage.

    Args:
        chain: The chain.
        stage: Stage with the held-out rows.
        model: Settings of the model (:func:`scored_models`).

    Raises:
        UserError: If the adapter cannot be used for the task of ``stage``.
    """
    dropped = {*_REPLACED_KEYS, stage.config.method, model["method"]}
    values = {key: value for key, value in stage.config.model_dump(mode="json").items() if key not in dropped}
    # Preferences and rewards of all models refer to the base model, so that they can be compared.
    values |= {"reference_model": "base", "output": str(chain.folder / "scores")}
    return resolve_start(RunConfig.read({**values, **model}))


def score_key(config: RunConfig) -> str:
    """Return a digest of the settings, the local files and the adapter of a score. Versions are not included."""
    start = open_start(config)
    digest = None if start is None else start.fingerprint
    settings = result_settings(config, without=("start_from", "train.drift", "train.samples"))
    files = [content_hash(text) for text in _texts(config.external_references()) if Path(text).is_file()]
    return hashlib.blake2b(repr((digest, files, sorted(settings.items()))).encode(), digest_size=16).hexdigest()


def _texts(value: object) -> Iterator[str]:
    """Yield the texts in a setting, and their parts before a colon, such as the file of ``rewards.py:function``."""
    if isinstance(value, str):
        yield value
        yield value.rpartition(":")[0]
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _texts(key)
            yield from _texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)


def _evaluate(config: RunConfig, task: Task[Any], data: RunData) -> Evaluation:
    """Evaluate the adapter of ``start_from``, or the base model."""
    check_rows(config, task, data)
    loaded = load_model(config, task, data)
    device = str(loaded.choices["device"].value)
    session = assemble(config, task, data, loaded.model, device=device, new_modules=loaded.new_modules)
    try:
        with session.running():
            return session.evaluate()
    finally:
        session.close()
        release_free_memory()
