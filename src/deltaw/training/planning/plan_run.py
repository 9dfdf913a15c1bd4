"""A run's plan: the run itself, on fake tensors, for the largest of its steps.

The same code assembles and trains here and in the run, so that what is planned is what is run: a change to
the loop, a method or the packing changes the plan with it. A plan that was made before, from the same
settings, files, rows, versions and machine, is remembered (:mod:`deltaw.training.planning.remembered`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from deltaw.config import RunConfig
from deltaw.errors import UserError
from deltaw.host.choices import choose_device, choose_precision, choose_threads, dtype_of
from deltaw.host.kernel_choice import settle_kernels
from deltaw.host.measurements import basis
from deltaw.host.memory import resident_bytes, trim_memory
from deltaw.hub.folders import config_folder
from deltaw.hub.skeleton import converted_bytes, new_modules, skeleton
from deltaw.hub.tokenizers import saving_bytes
from deltaw.kernels import loader
from deltaw.lora.stored import count_numbers
from deltaw.memory.libraries import warm_up
from deltaw.memory.plan import Plan, resident_parts
from deltaw.memory.simulation import fake_tensors, simulate
from deltaw.memory.work import WorkCounter, kernel_bytes
from deltaw.runtime.blocks import blocks_of
from deltaw.runtime.int8_weights import quantize_int8
from deltaw.runtime.nf4_weights import quantize_nf4
from deltaw.training.callbacks import Say, silent
from deltaw.training.drift_meter import DriftMeter
from deltaw.training.evaluation.general import NoGeneralAnswers
from deltaw.training.monitoring.rate_search import as_it_was
from deltaw.training.planning.asked import of_each
from deltaw.training.planning.heaviest import (
    DRY_RUN_STEPS,
    Heaviest,
    TellingBatcher,
    heaviest_step,
    longest_rows,
    token_counts,
)
from deltaw.training.planning.remembered import Remembered
from deltaw.training.planning.unread import unread_bytes
from deltaw.training.process import guest
from deltaw.training.session import Session, assemble, read_data
from deltaw.training.tasks.base import RunData, Task
from deltaw.working import listening, working


def plan(config: RunConfig | Mapping | str | os.PathLike[str], *, say: Say = silent) -> Plan:
    """What a run will need, from the model's configuration and the rows alone.

    Args:
        config: settings, a dictionary of them, or the path of a YAML file.
        say: told what becomes of the rows, in lines.

    Raises:
        UserError: something the user gave cannot be used.
    """
    settings = RunConfig.read(config)
    with guest():
        task, data = read_data(settings, say)
        return plan_run(settings, task, data)


def plan_run(
    config: RunConfig, task: Task, data: RunData, *, process_bytes: int | None = None, processes: int = 1
) -> Plan:
    """What a run of ``config`` on these rows will need; remembered where it was planned before.

    Args:
        process_bytes: what the process holds before the model is loaded; None is what it holds now.
        processes: that train together; the plan is that of each of them.

    Raises:
        UserError: the method does not fit the model, or a row is too long for it.
    """
    remembered = Remembered.of(config, processes=processes)
    known = None if remembered is None else remembered.plan(data.every)
    if known is not None:
        return of_each(known, config.train.sharding, processes)
    try:
        # The steps of the dry run are not told one by one: nothing is measured or evaluated.
        with working(f"planning the memory of method {config.method}"), listening(None):
            made = _planned(config, task, data, process_bytes, processes)
    except UserError as error:
        if remembered is not None:
            remembered.keep_refusal(error, data.every)
        raise
    if remembered is not None:
        remembered.keep(made, data.every, data.report.lines(), basis())
    return of_each(made, config.train.sharding, processes)


def _planned(config: RunConfig, task: Task, data: RunData, process_bytes: int | None, processes: int) -> Plan:
    """The plan of a process with its rows, made by a dry run."""
    threads = choose_threads(config.threads).value
    torch.set_num_threads(threads)  # what some operators take besides their results depends on it
    dtype = choose_precision(choose_device(config.device).value, config.precision).value
    model = _fake_model(config, task, data, dtype)
    kernels = settle_kernels(model.config, threads)
    warm_up(dtype_of(dtype))
    before = resident_bytes()
    total = count_numbers(model)
    if config.precision == "int8":
        with fake_tensors():
            quantize_int8(model.base_model)
    if config.precision == "nf4":
        with fake_tensors():
            quantize_nf4(model.base_model)
    with fake_tensors():
        block_bytes = _block_bytes(model)
    new: list[str] = []
    if task.has_labels:
        new = new_modules(model, config.model, dtype=dtype, trust_remote_code=config.trust_remote_code)
    vocabularies = [model.config.get_text_config().vocab_size] if task.tokenizer is not None else []
    made: list[_DryRun] = []

    def run() -> None:
        session = assemble(
            config, task, data, model, device="cpu", new_modules=new, offered=kernels.approximations
        )
        made.append(_dry_run(session, processes))

    footprint = simulate(run, models=[model], vocabularies=vocabularies)
    (done,) = made
    with fake_tensors():
        trained = sum(p.numel() for _, p in done.session.method.parameters(model))
    converted = converted_bytes(model, config.model, dtype=dtype, trust_remote_code=config.trust_remote_code)
    trim_memory()
    resident, phases = resident_parts(
        footprint,
        process_bytes=process_bytes or max(before, resident_bytes()),
        kernel_bytes=done.kernel_bytes(),
        feature_bytes=0 if done.session.prefix is None else done.session.prefix.store.resident_bytes,
        reading_bytes=data.read_peak_bytes,
        mapped_bytes=converted,
        saving_bytes=_saving_bytes(config, task, dtype),
        unread_bytes=unread_bytes(done.session, dtype=dtype, converted=converted),
    )
    return Plan(
        method=config.method,
        total_parameters=total,
        trained_parameters=trained,
        peak_bytes=footprint.peak_bytes,
        peak_resident_bytes=sum(resident.values()),
        parts=footprint.parts,
        resident=resident,
        phase=footprint.phase,
        module=footprint.module,
        activations=footprint.activations_by_module,
        tokens=max(token_counts(done.heaviest.shapes), default=0),
        rows=len(done.heaviest.rows),
        timeline=footprint.timeline,
        precision=dtype,
        operations=done.operations,
        operators=done.operators,
        phases=phases,
        arithmetic=loader.arithmetic().as_dict(),
        disk_bytes=0 if done.session.prefix is None else done.session.prefix.store.shape.bytes,
        block_bytes=block_bytes,
    )


def _block_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Of the weights of all blocks, and of the largest; 0 where the model has no list of blocks."""
    found = blocks_of(model)
    if found is None:
        return 0, 0
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in found[1]]
    return sum(sizes), max(sizes)


def _saving_bytes(config: RunConfig, task: Task, dtype: str) -> int:
    """What writing the tokenizer into the run's folder takes."""
    if task.tokenizer is None:
        return 0
    return saving_bytes(config_folder(config.model, dtype, config.trust_remote_code))


def _fake_model(config: RunConfig, task: Task, data: RunData, dtype: str) -> PreTrainedModel:
    """The run's model on fake tensors, before the method is applied."""
    with fake_tensors():
        return skeleton(
            config.model,
            dtype=dtype,
            task=config.task,
            num_labels=task.outputs(data),
            trust_remote_code=config.trust_remote_code,
        )


@dataclass(frozen=True)
class _DryRun:
    """What a run on fake tensors shows; ``operations`` and ``operators`` are those of its heaviest step."""

    session: Session
    heaviest: Heaviest
    work: WorkCounter
    telling: TellingBatcher
    operations: int
    operators: int

    def kernel_bytes(self) -> int:
        """What the matrix library keeps over the run."""
        heaviest, telling = self.heaviest, self.telling
        return kernel_bytes(
            self.work,
            varying=[(telling.sizes, heaviest.token_counts), (telling.rows, heaviest.row_counts)],
            lengths=len({length for _, length in heaviest.every}),
            tiles=max(1.0, heaviest.tile_shapes / max(1, len(telling.tiles))),
            repeats=self.session.total_steps * len(heaviest.shapes) / max(1, telling.made),
        )


def _dry_run(session: Session, processes: int) -> _DryRun:
    """A few of the heaviest steps of the process with most to do, an evaluation of the longest rows, and the
    measurement of drift."""
    heaviest = heaviest_step(session, processes)
    telling, marks = TellingBatcher(session, heaviest.labeled), [(0, 0)]
    meter = DriftMeter(session)
    # A search for the learning rate trains as the run does, beside a copy of what is trained.
    searches = session.config.train.learning_rate == "search"
    copied = as_it_was(session) if searches else contextlib.nullcontext()
    with session.running(), copied, WorkCounter() as work:
        session.train(
            rows=heaviest.rows,
            batch_size=len(heaviest.rows),
            total_steps=DRY_RUN_STEPS + (1 if heaviest.labeled else 0),
            batcher=telling,
            on_step=lambda step: marks.append((work.operations, work.operators)),
        )
    if session.data.held_out:
        with session.running():
            evaluate_rows(session, longest_rows(session))
    with contextlib.suppress(NoGeneralAnswers):  # nor does the run measure its drift then
        meter.measure()
    share = sum(c * n for c, n in heaviest.shapes) / max(1, telling.tokens)
    operations, operators = (int((b - a) * share) for a, b in zip(*marks[1:3], strict=True))
    return _DryRun(session, heaviest, work, telling, operations, operators)


def plan_each(
    config: RunConfig,
    task: Task,
    data: RunData,
    methods: Sequence[str],
    *,
    refused: Callable[[str, UserError], None],
    processes: int = 1,
) -> dict[str, Plan]:
    """The plan of each method on the same model and rows; ``refused`` is told of those that do not fit."""
    plans: dict[str, Plan] = {}
    for method in methods:
        try:
            first = next(iter(plans.values()), None)
            plans[method] = plan_run(
                config.model_copy(update={"method": method}),
                task,
                data,
                # Each plan leaves something behind, which a run that makes one plan does not have.
                process_bytes=None if first is None else first.resident["process"],
                processes=processes,
            )
        except UserError as error:
            if method == config.method:
                raise
            refused(method, error)
        except Exception as error:  # whatever a foreign model raises when it is run on fake tensors
            if method == config.method:
                raise _no_dry_run(error) from error
            refused(method, _no_dry_run(error))
    return plans


def _no_dry_run(error: Exception) -> UserError:
    return UserError(
        f"no plan: the model cannot be run on fake tensors ({type(error).__name__}: {str(error)[:100]})",
        where="the plan",
        hint="train it all the same: deltaw train goes without a plan then",
    )


def evaluate_rows(session: Session, rows: Sequence[Any]) -> None:
    """What an evaluation of these rows computes, without the metrics, which need values."""
    way: Any = session.prefix or session
    outputs = way.objective.predictions if session.task.has_labels else way.objective.evaluate_rows
    with session.method.evaluating(session.model), torch.no_grad():
        for batch in way.batcher.batches(rows):
            outputs(batch)
