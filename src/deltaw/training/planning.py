"""A run's plan: the run itself, carried out on tensors without values for the largest of its steps.

The same code assembles and trains here and in the run, so that what is planned is what is run: a change to
the loop, a method or the packing changes the plan with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from deltaw.config import RunConfig
from deltaw.errors import UserError, did_you_mean
from deltaw.memory.plan import Plan, resident_parts
from deltaw.memory.simulation import simulate, without_values
from deltaw.memory.work import WorkCounter, kernel_bytes
from deltaw.methods.choose import NAMES
from deltaw.models.byte_weights import keep_in_bytes
from deltaw.models.machine import choose_device, choose_precision, choose_threads, resident_bytes
from deltaw.models.skeleton import new_modules, skeleton
from deltaw.training.loop import rows_of_step
from deltaw.training.session import Session, assemble, read_data
from deltaw.training.tasks import RunData, Task

# Steps that are looked at for the largest pass; of a longer run, so many of them, spread evenly.
STEPS_LOOKED_AT = 400
# Two steps: from the second on, the optimizer's state is there while a forward and a backward run.
STEPS_CARRIED_OUT = 2


@dataclass(frozen=True)
class Heaviest:
    """The step with the largest pass.

    Attributes:
        rows: of that step. shapes: (rows, length) of its passes.
        every: the shapes of all steps that were looked at. judged: those of evaluations.
    """

    rows: Sequence[Any]
    shapes: list[tuple[int, int]]
    every: set[tuple[int, int]]
    judged: set[tuple[int, int]]

    @property
    def kernel_shapes(self) -> float:
        """Different numbers of tokens that kernels are built for; an evaluation's, which has no backward,
        counts a third."""
        trained = _tokens(self.every)
        return len(trained) + len(_tokens(self.judged) - trained) / 3


def plan(config: RunConfig | Mapping | str | os.PathLike[str], *, console: Console | None = None) -> Plan:
    """What a run will need, from the model's configuration and the rows alone.

    Args:
        config: settings, a dictionary of them, or the path of a YAML file.
        console: where a person reads along; nothing is printed without one.

    Raises:
        UserError: something the user gave cannot be used.
    """
    settings = RunConfig.read(config)
    task, data = read_data(settings, console or Console(quiet=True))
    return plan_run(settings, task, data)


def plan_run(config: RunConfig, task: Task, data: RunData, *, process_bytes: int | None = None) -> Plan:
    """What a run of ``config`` on these rows will need.

    Args:
        process_bytes: what the process holds before the model is loaded; None is what it holds now.

    Raises:
        UserError: the method does not fit the model, or a row is too long for it.
    """
    threads = choose_threads(config.threads).value
    torch.set_num_threads(threads)  # what some operators take beside their results goes by it
    before = resident_bytes()
    dtype = choose_precision(choose_device(config.device).value, config.precision).value
    with without_values():
        model = skeleton(
            config.model,
            dtype=dtype,
            task=config.task,
            num_labels=task.outputs(data),
            trust_remote_code=config.trust_remote_code,
        )
        total = sum(p.numel() for p in model.parameters())
        if config.precision == "int8":
            keep_in_bytes(model.base_model)
    new: list[str] = []
    if task.has_labels:
        new = new_modules(model, config.model, dtype=dtype, trust_remote_code=config.trust_remote_code)
    vocabularies = [model.config.get_text_config().vocab_size] if task.tokenizer is not None else []
    made: list[tuple[Session, Heaviest, WorkCounter, _Telling, int, int]] = []

    def run() -> None:
        session = assemble(config, task, data, model, device="cpu", new_modules=new)
        heaviest = heaviest_step(session)
        telling, marks = _Telling(session), [(0, 0)]
        with session.running(), WorkCounter() as work:
            session.train(
                rows=heaviest.rows,
                batch_size=len(heaviest.rows),
                total_steps=STEPS_CARRIED_OUT,
                portions=telling,
                on_step=lambda step: marks.append((work.operations, work.operators)),
            )
        if session.data.held_out:
            with session.running():
                judge(session, longest_rows(session))
        share = sum(c * n for c, n in heaviest.shapes) / max(1, telling.tokens)
        operations, operators = (int((b - a) * share) for a, b in zip(*marks[-2:], strict=True))
        made.append((session, heaviest, work, telling, operations, operators))

    footprint = simulate(run, models=[model], vocabularies=vocabularies)
    ((session, heaviest, work, telling, operations, operators),) = made
    with without_values():
        trained = sum(p.numel() for _, p in session.method.parameters(model))
    resident = resident_parts(
        footprint,
        process_bytes=process_bytes or max(before, resident_bytes()),
        kernel_bytes=kernel_bytes(
            work,
            seen=telling.sizes,
            tokens=heaviest.kernel_shapes,
            lengths=len({length for _, length in heaviest.every}),
        ),
        feature_bytes=0 if session.prefix is None else session.prefix.store.shape.bytes,
        threads=threads,
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
        tokens=max(_tokens(heaviest.shapes), default=0),
        rows=len(heaviest.rows),
        timeline=footprint.timeline,
        precision=dtype,
        operations=operations,
        operators=operators,
    )


def chosen_methods(text: str, own: str) -> list[str]:
    """The methods of a list such as ``lora,head``, or ``all`` of them; the run's ``own`` comes first.

    Raises:
        UserError: a name is no method.
    """
    names = list(NAMES) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in NAMES:
            raise UserError(f"'{name}' is no method", where="--methods", mend=did_you_mean(name, NAMES))
    return list(dict.fromkeys([own, *names]))


def plan_each(
    config: RunConfig,
    task: Task,
    data: RunData,
    methods: Sequence[str],
    *,
    refused: Callable[[str, UserError], None],
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
            )
        except UserError as error:
            if method == config.method:
                raise
            refused(method, error)
        except Exception as error:  # whatever a foreign model raises when it is run without values
            if method == config.method:
                raise _not_without_values(error) from error
            refused(method, _not_without_values(error))
    return plans


def _not_without_values(error: Exception) -> UserError:
    return UserError(
        f"no plan: the model cannot be run without values ({type(error).__name__}: {str(error)[:100]})",
        where="the plan",
        mend="train it all the same: deltaw train goes without a plan then",
    )


def heaviest_step(session: Session) -> Heaviest:
    """Find the step with the largest pass; among equals, the one with the most labels."""
    settings = session.config.train
    total = session.total_steps
    best: tuple[int, int] = (-1, -1)
    found: Sequence[Any] = ()
    shapes: list[tuple[int, int]] = []
    every: set[tuple[int, int]] = set()
    if session.prefix is not None:
        # What is kept is computed in the first epoch alone.
        total = min(total, -(-len(session.data.train) // settings.batch_size))
    for step in range(0, total, max(1, -(-total // STEPS_LOOKED_AT))):
        rows = rows_of_step(session.data.train, step, settings.batch_size, settings.seed)
        passes = session.portions.shapes(rows)
        every.update(passes)
        rank = (max(_tokens(passes)), sum(row.label_count for row in rows))
        if rank > best:
            best, found, shapes = rank, rows, passes
    judged: set[tuple[int, int]] = set()
    if session.data.held_out:
        judged.update(session.portions.shapes(session.data.held_out))
    return Heaviest(found, shapes, every, judged)


class _Telling:
    """Of a step's passes those that tell its peak: the smallest, which leaves gradients behind, and then the
    largest. The first step, which is there for the optimizer's state alone, has the smallest only.

    Attributes:
        tokens: of the passes of the last step. sizes: the different ones of all of them.
    """

    def __init__(self, session: Session) -> None:
        self._inner = (session.prefix or session).portions
        self._steps = 0
        self.tokens = 0
        self.sizes: set[int] = set()

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        return self._inner.shapes(rows)

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        self._steps += 1
        sizes = [count * length for count, length in self._inner.shapes(rows)]
        smallest, largest = sizes.index(min(sizes)), len(sizes) - 1 - sizes[::-1].index(max(sizes))
        if self._steps == 1:
            largest = smallest
        self.tokens = sum(sizes[number] for number in {smallest, largest})
        self.sizes.update(sizes[number] for number in (smallest, largest))
        kept = None
        for number, batch in enumerate(self._inner.batches(rows)):
            if number == largest and number != smallest and smallest > largest:
                kept = batch  # it comes last, when gradients are there
            elif number in (smallest, largest) or number >= len(sizes):
                yield batch
        if kept is not None:
            yield kept


def judge(session: Session, rows: Sequence[Any]) -> None:
    """What an evaluation of these rows computes, without the metrics, which need values."""
    way: Any = session.prefix or session
    outputs = way.objective.predictions if session.task.has_labels else way.objective.judge
    with session.method.evaluating(session.model), torch.no_grad():
        for batch in way.portions.batches(rows):
            outputs(batch)


def longest_rows(session: Session) -> Sequence[Any]:
    """Held-out rows that make up the largest pass of an evaluation."""
    ordered = sorted(session.data.held_out, key=len, reverse=True)
    most = getattr(session.portions, "tokens_per_pass", 0)
    total, count = 0, 0
    for row in ordered:
        count += 1
        total += sum(_tokens(session.portions.shapes([row])))
        if total >= 2 * most:
            break
    return ordered[:count]


def _tokens(shapes: Iterable[tuple[int, int]]) -> set[int]:
    """Tokens of each pass: what matrix products have as their one size that changes."""
    return {rows * length for rows, length in shapes}
