"""Plan a run: predict its memory by running its largest steps on fake tensors, and its time from its workload.

The plan uses the same code as the run, so that changes of the loop, a method or the packing are included. Plans are
cached (:mod:`deltaw.training.planning.plan_cache`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from deltaw.data.row_reader import RunData
from deltaw.errors import UserError
from deltaw.hub.folders import config_folder
from deltaw.hub.skeletons import converted_bytes
from deltaw.hub.tokenizers import saving_bytes
from deltaw.kernels import loader
from deltaw.machine.choices import assumed_cards, dtype_of
from deltaw.machine.memory import release_free_memory, resident_bytes, trim_memory
from deltaw.machine.product_rates import provenance
from deltaw.memory.plan import OtherBytes, Plan, memory_fields
from deltaw.memory.simulation import fake_tensors, simulate
from deltaw.memory.work import WorkCounter, kernel_bytes, warm_up
from deltaw.methods.start import resolve_start
from deltaw.progress import LogFunction, ignore_line, track_progress, use_listener
from deltaw.runtime.weights_in_huge_pages import MOVE_CHUNK_BYTES as MOVED_AT_ONCE
from deltaw.settings.config import RunConfig
from deltaw.training.approximations import applicable
from deltaw.training.callbacks import FunctionCallback
from deltaw.training.evaluation.general import NoGeneralAnswers
from deltaw.training.monitoring.drift_probe import DriftProbe
from deltaw.training.monitoring.rates import restored_parameters
from deltaw.training.planning.fake_model import FakeModel, WeightsTooLargeError, block_bytes
from deltaw.training.planning.heaviest_step import (
    DRY_RUN_STEPS,
    HeaviestStep,
    PeakBatcher,
    heaviest_step,
    longest_rows,
    token_counts,
)
from deltaw.training.planning.lasting_bytes import LASTING_BYTES, generation_bytes
from deltaw.training.planning.plan_cache import CachedPlan
from deltaw.training.planning.run_time import StepRates, Workload, plan_with_cached_time, store_rates, timed_plan
from deltaw.training.planning.step_rates import cpu_usage, measure, workload_of
from deltaw.training.planning.unread_rows import unread_bytes
from deltaw.training.process import preserved_process_state
from deltaw.training.session import Session, gradient_check, read_data
from deltaw.training.task import Task


def plan(config: RunConfig | Mapping[str, Any] | str | os.PathLike[str], *, log: LogFunction = ignore_line) -> Plan:
    """Predict the resources of a run from the model's configuration and the rows.

    Args:
        config: Settings, a dictionary, or the path of a YAML file.
        log: Receives messages about the rows.

    Raises:
        UserError: if the settings, the model or the data cannot be used.
    """
    settings = resolve_start(RunConfig.read(config), log)
    with preserved_process_state(), assumed_cards():
        task, data = read_data(settings, log)
        return with_time(plan_run(settings, task, data), settings, task, data)


def plan_run(
    config: RunConfig, task: Task[Any], data: RunData, *, process_bytes: int | None = None, processes: int = 1
) -> Plan:
    """Predict the resources of a run on these rows, with caching.

    Args:
        config: Settings of the run.
        task: Training task.
        data: Rows.
        process_bytes: Memory of the process before the model is loaded. None for its current memory.
        processes: Number of processes. The plan is for one of them.

    Raises:
        UserError: if the method does not fit the model, or a row is too long.
    """
    cached = CachedPlan.of(config, processes=processes)
    cached_plan = None if cached is None else cached.plan(data.all_rows)
    if cached_plan is not None:
        return cached_plan.per_process(processes, config.train.sharding)
    try:
        # Progress of the steps in the dry run is not reported.
        with track_progress(f"planning the memory of method {config.method}"), use_listener(None):
            new_plan = _compute_plan(config, task, data, process_bytes, processes)
    except WeightsTooLargeError:
        raise  # not cached: the memory of this machine may change
    except UserError as error:
        if cached is not None:
            cached.store_refusal(error, data.all_rows)
        raise
    if cached is not None:
        cached.store(new_plan, data.all_rows, data.report.lines(), provenance())
    return new_plan.per_process(processes, config.train.sharding)


def with_time(plan: Plan, config: RunConfig, task: Task[Any], data: RunData) -> Plan:
    """Return the plan with the predicted time of the run.

    The times of the model's blocks are measured if they are not cached. This takes several seconds. Times are only
    predicted on the CPU.
    """
    if plan.device != "cpu":
        return plan
    timed = plan_with_cached_time(plan, config)
    if timed is not None:
        return timed
    workload = Workload.from_dict(plan.workload)
    try:
        with track_progress("measuring the time of a step"), use_listener(None), loader.temporary_arithmetic():
            rates = _measured_rates(config, task, data)
    except Exception as error:  # a third-party model can raise any error on random weights
        return replace(plan, time_uncertain=_unknown_time(error), workload={})
    finally:
        release_free_memory()
    store_rates(workload, rates)
    return timed_plan(plan, workload, rates, config)


def _unknown_time(error: Exception) -> str:
    return f"not predicted ({type(error).__name__}: {str(error)[:100]})"


def _measured_rates(config: RunConfig, task: Task[Any], data: RunData) -> StepRates:
    usage = cpu_usage()
    fake = FakeModel.of(config, task, data)
    with fake_tensors():
        session = fake.assemble(config, task, data)
        with session.running():  # fused blocks are recognized on the complete model
            pass
    return measure(session, usage)


def _compute_plan(config: RunConfig, task: Task[Any], data: RunData, process_bytes: int | None, processes: int) -> Plan:
    """Compute the plan of a process with a dry run."""
    name = config.model
    code = config.trust_remote_code
    fakes = [FakeModel.of(config, task, data)]
    fakes[0].require_memory(config, processes)
    model = fakes[0].model
    dtype = fakes[0].dtype
    total = fakes[0].total_parameters
    device = fakes[0].device
    is_cpu = device == "cpu"
    if is_cpu:
        warm_up(dtype_of(dtype))
    vocabularies = [model.config.get_text_config().vocab_size] if task.tokenizer is not None else []
    dry_runs: list[_DryRun] = []

    def run() -> None:
        dry_runs.append(_dry_run(fakes[0].assemble(config, task, data), processes))

    footprint = simulate(run, models=[model], vocabularies=vocabularies, device=device)
    (dry_run,) = dry_runs
    store = dry_run.session.feed.store
    inputs = task.inputs
    with fake_tensors():
        trained = sum(p.numel() for _, p in dry_run.session.method.parameters(model))
    converted = converted_bytes(model, name, dtype=dtype, trust_remote_code=code)
    folder = config_folder(name, dtype, code)
    decoder_bytes, rollout_bytes = generation_bytes(dry_run.session)
    workload = dict[str, object]()
    time_uncertain = ""
    try:
        workload = workload_of(dry_run.session, data.read_seconds).as_dict() if is_cpu else {}
    except Exception as error:  # a third-party task can raise any error
        time_uncertain = _unknown_time(error)
    parts = OtherBytes(
        kernels=dry_run.kernel_bytes() if is_cpu else 0,
        features=(0 if store is None else store.resident_bytes) + (0 if inputs is None else inputs.resident_bytes()),
        reading=data.read_peak_bytes + (0 if inputs is None else inputs.prepare_bytes()),
        mapped=converted + MOVED_AT_ONCE,
        saving=0 if task.tokenizer is None else saving_bytes(folder),
        unread=unread_bytes(dry_run.session, dtype=dtype, converted=converted),
        decoder=decoder_bytes,
        rollouts=rollout_bytes,
    )
    model_block_bytes = block_bytes(model)
    disk_bytes = 0 if store is None else store.shape.bytes
    heaviest = dry_run.heaviest
    operations = dry_run.operations
    operators = dry_run.operators
    del model, store, dry_run
    dry_runs.clear()
    fakes.clear()
    release_free_memory()  # a run does not hold the objects of its simulation
    plan = Plan(
        method=config.method,
        total_parameters=total,
        trained_parameters=trained,
        **memory_fields(footprint, process_bytes or resident_bytes() + LASTING_BYTES, parts, device),
        tokens=max(token_counts(heaviest.shapes), default=0),
        rows=len(heaviest.rows),
        precision=dtype,
        operations=operations,
        operators=operators,
        arithmetic=loader.arithmetic().as_dict(),
        disk_bytes=disk_bytes,
        block_bytes=model_block_bytes,
        workload=workload,
        time_uncertain=time_uncertain if is_cpu else f"not predicted on {device}",
    )
    if not heaviest.long:
        return plan
    limit, long, tokens = heaviest.long
    return plan.without_long_rows(limit, long, len(data.train), tokens)


@dataclass(frozen=True)
class _DryRun:
    """Result of a dry run. ``operations`` and ``operators`` are those of the heaviest step."""

    session: Session
    heaviest: HeaviestStep
    work: WorkCounter
    batcher: PeakBatcher
    operations: int
    operators: int

    def kernel_bytes(self) -> int:
        """Return the memory that the matrix library caches during the run."""
        heaviest = self.heaviest
        batcher = self.batcher
        varying = [(batcher.sizes, heaviest.token_counts), (batcher.rows, heaviest.row_counts)]
        lengths = len({length for _, length in heaviest.all_shapes})
        tiles = max(1.0, heaviest.tile_shapes / max(1, len(batcher.tiles)))
        repeats = self.session.total_steps * len(heaviest.shapes) / max(1, batcher.num_batches)
        return kernel_bytes(self.work, varying=varying, lengths=lengths, tiles=tiles, repeats=repeats)


def _dry_run(session: Session, processes: int) -> _DryRun:
    """Run the heaviest steps of the most loaded process, an evaluation of the longest rows, and a drift measurement."""
    heaviest = heaviest_step(session, processes)
    trim_memory()  # as before the first step of a run
    batcher = PeakBatcher(session, heaviest.labeled)
    marks = [(0, 0)]
    drift = DriftProbe(session)
    drift.before()
    # A learning rate search trains like the run, with an additional copy of the trained parameters.
    searches_rate = session.config.train.learning_rate == "search"
    parameter_copy = restored_parameters(session) if searches_rate else contextlib.nullcontext()
    candidates = applicable(session.model, session.objective, session.approximations.names)
    if candidates and session.config.train.approximate == "auto":
        # The run also continues if the model fails in fp32.
        with contextlib.suppress(Exception), session.running(), session.method.evaluating(session.model):
            gradient_check(session).choose(candidates)
        session.model.zero_grad()
    with session.running(), parameter_copy, WorkCounter() as work:
        callback = FunctionCallback(on_step=lambda step: marks.append((work.operations, work.operators)))
        rows = heaviest.rows
        steps = DRY_RUN_STEPS + bool(heaviest.labeled)
        session.train(callback, rows=rows, batcher=batcher, batch_size=len(rows), total_steps=steps)
    if not session.feed.generates_rows and (longest := longest_rows(session)):
        with session.running():
            evaluate_rows(session, longest)
    with contextlib.suppress(NoGeneralAnswers):  # the run does not measure drift in this case
        drift.measure()
    share = sum(c * n for c, n in heaviest.shapes) / max(1, batcher.tokens)
    operations, operators = (int((b - a) * share) for a, b in zip(*marks[1:3], strict=True))
    return _DryRun(session, heaviest, work, batcher, operations, operators)


def plan_methods(
    config: RunConfig,
    task: Task[Any],
    data: RunData,
    methods: Sequence[str],
    *,
    on_error: Callable[[str, UserError], None],
    processes: int = 1,
    planned: Plan | None = None,
) -> dict[str, Plan]:
    """Return the plan of each method on the same model and rows.

    Args:
        config: Settings of the run.
        task: Training task.
        data: Rows.
        methods: Methods to plan.
        on_error: Receives methods that do not fit, with the error.
        processes: Number of processes.
        planned: Plan of ``config``, if it is known.
    """
    plans: dict[str, Plan] = {}
    for method in methods:
        try:
            # A plan increases the memory of the process. Use the value before the first one.
            process_bytes = next((plan.resident["process"] for plan in plans.values()), None)
            settings = config.model_copy(update={"method": method})
            new_plan = planned if method == config.method else None
            with dry_run_errors():
                if new_plan is None:
                    new_plan = plan_run(settings, task, data, process_bytes=process_bytes, processes=processes)
                plans[method] = with_time(new_plan, settings, task, data) if method == config.method else new_plan
        except UserError as error:
            if method == config.method:
                raise
            on_error(method, error)
    return plans


@contextlib.contextmanager
def dry_run_errors() -> Iterator[None]:
    """Convert errors of the dry run to a UserError, because a third-party model can raise any error on fake tensors."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = f"no plan: the model cannot be run on fake tensors ({type(error).__name__}: {str(error)[:100]})"
        hint = "train it anyway: deltaw train then runs without a plan"
        raise UserError(message, location="the plan", hint=hint) from error


def evaluate_rows(session: Session, rows: Sequence[Any]) -> None:
    """Compute an evaluation of these rows without the metrics, which need values."""
    objective = session.objective
    with session.method.evaluating(session.model), torch.no_grad():
        for batch in session.feed.batches(rows):
            objective.evaluate_rows(batch)
