"""A run's plan: the run itself, run on tensors on fake tensors for the largest of its steps.

The same code assembles and trains here and in the run, so that what is planned is what is run: a change to
the loop, a method or the packing changes the plan with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from deltaw.config import RunConfig
from deltaw.errors import UserError
from deltaw.host.machine import choose_device, choose_precision, choose_threads, resident_bytes
from deltaw.hub.skeleton import converted_bytes, new_modules, skeleton
from deltaw.kernels.layout import Layout
from deltaw.memory.plan import Plan, resident_parts
from deltaw.memory.simulation import fake_tensors, simulate
from deltaw.memory.work import WorkCounter, kernel_bytes
from deltaw.methods import registry
from deltaw.runtime.int8_weights import quantize_int8
from deltaw.training.callbacks import Say, silent
from deltaw.training.loop import rows_of_step
from deltaw.training.process import guest
from deltaw.training.session import Session, assemble, read_data
from deltaw.training.tasks.base import RunData, Task
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher

# Tiles of one shape: how many, queries, keys.
TileShape: TypeAlias = tuple[int, int, int]
# Steps that are looked at for the largest pass; of a longer run, so many of them, spread evenly.
STEPS_SEARCHED = 400
# Two steps: from the second on, the optimizer's state is there while a forward and a backward run.
DRY_RUN_STEPS = 2
# Steps whose passes are laid out, to see in how many shapes attention comes.
STEPS_LAID_OUT = 100
# Vectors of the model's width that a token keeps in each block, roughly; one where blocks are computed again.
# Bytes for each entry of the logits beside the entry itself: two fp32 copies. Both only choose a step.
KEPT_VECTORS, LOGIT_COPIES = 20, 8


@dataclass(frozen=True)
class Heaviest:
    """The step with the largest pass.

    Attributes:
        rows: of that step. shapes: (rows, length) of its passes.
        every: the shapes of all steps that were looked at. judged: those of evaluations.
        labelled: rows of another step, which has a shorter pass with so many labels that it may take more;
            none where there is no such step.
        tiles, judged_tiles: as ``every`` and ``judged``, of attention's tiles.
    """

    rows: Sequence[Any]
    shapes: list[tuple[int, int]]
    every: set[tuple[int, int]]
    evaluated: set[tuple[int, int]]
    labelled: Sequence[Any] = ()
    tiles: set[TileShape] = field(default_factory=set)
    evaluated_tiles: set[TileShape] = field(default_factory=set)

    @property
    def token_counts(self) -> float:
        """Different numbers of tokens that kernels are built for; an evaluation's, which has no backward,
        counts a third."""
        return _kinds(_tokens(self.every), _tokens(self.evaluated))

    @property
    def row_counts(self) -> float:
        """The same of numbers of rows, which a classifier's head is applied to."""
        return _kinds({rows for rows, _ in self.every}, {rows for rows, _ in self.evaluated})

    @property
    def tile_shapes(self) -> float:
        """The same of the shapes of attention's tiles."""
        return _kinds(self.tiles, self.evaluated_tiles)


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
    model = _fake_model(config, task, data, dtype)
    total = sum(p.numel() for p in model.parameters())
    if config.precision == "int8":
        with fake_tensors():
            quantize_int8(model.base_model)
    new: list[str] = []
    if task.has_labels:
        new = new_modules(model, config.model, dtype=dtype, trust_remote_code=config.trust_remote_code)
    vocabularies = [model.config.get_text_config().vocab_size] if task.tokenizer is not None else []
    made: list[_DryRun] = []

    def run() -> None:
        made.append(_dry_run(assemble(config, task, data, model, device="cpu", new_modules=new)))

    footprint = simulate(run, models=[model], vocabularies=vocabularies)
    (done,) = made
    heaviest, telling = done.heaviest, done.telling
    with fake_tensors():
        trained = sum(p.numel() for _, p in done.session.method.parameters(model))
    resident = resident_parts(
        footprint,
        process_bytes=process_bytes or max(before, resident_bytes()),
        kernel_bytes=kernel_bytes(
            done.work,
            varying=[(telling.sizes, heaviest.token_counts), (telling.rows, heaviest.row_counts)],
            lengths=len({length for _, length in heaviest.every}),
            tiles=max(1.0, heaviest.tile_shapes / max(1, len(telling.tiles))),
        ),
        feature_bytes=0 if done.session.prefix is None else done.session.prefix.store.shape.bytes,
        threads=threads,
    )
    # Weights of another type are made from files that are mapped meanwhile: of a small run that is the most.
    mapped = converted_bytes(model, config.model, dtype=dtype, trust_remote_code=config.trust_remote_code)
    if mapped:
        loading = resident["process"] + footprint.parts["weights"] + mapped
        resident["loading"] = max(0, loading - sum(resident.values()))
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
        operations=done.operations,
        operators=done.operators,
    )


def _fake_model(config: RunConfig, task: Task, data: RunData, dtype: str) -> PreTrainedModel:
    """The run's model before anything is done to it."""
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
    telling: _Telling
    operations: int
    operators: int


def _dry_run(session: Session) -> _DryRun:
    """A few of the heaviest steps, and the longest rows judged."""
    heaviest = heaviest_step(session)
    telling, marks = _Telling(session, heaviest.labelled), [(0, 0)]
    with session.running(), WorkCounter() as work:
        session.train(
            rows=heaviest.rows,
            batch_size=len(heaviest.rows),
            total_steps=DRY_RUN_STEPS + (1 if heaviest.labelled else 0),
            batcher=telling,
            on_step=lambda step: marks.append((work.operations, work.operators)),
        )
    if session.data.held_out:
        with session.running():
            evaluate_rows(session, longest_rows(session))
    share = sum(c * n for c, n in heaviest.shapes) / max(1, telling.tokens)
    operations, operators = (int((b - a) * share) for a, b in zip(*marks[1:3], strict=True))
    return _DryRun(session, heaviest, work, telling, operations, operators)


def chosen_methods(text: str, own: str) -> list[str]:
    """The methods of a list such as ``lora,head``, or ``all`` of them; the run's ``own`` comes first.

    Raises:
        UserError: a name is no method.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if text == "all":
        names = list(registry.names())
    for name in names:
        registry.entry_of(name, where="--methods")
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
        except Exception as error:  # whatever a foreign model raises when it is run on fake tensors
            if method == config.method:
                raise _no_dry_run(error) from error
            refused(method, _no_dry_run(error))
    return plans


def _no_dry_run(error: Exception) -> UserError:
    return UserError(
        f"no plan: the model cannot be run without values ({type(error).__name__}: {str(error)[:100]})",
        where="the plan",
        hint="train it all the same: deltaw train goes without a plan then",
    )


def heaviest_step(session: Session) -> Heaviest:
    """Find the step with the largest pass, among equals the one with the most labels; and another one where
    labels may outweigh tokens."""
    settings, batcher = session.config.train, session.batcher
    total = session.total_steps
    if session.prefix is not None:
        # What is kept is computed in the first epoch alone.
        total = min(total, -(-len(session.data.train) // settings.batch_size))
    steps = range(0, total, max(1, -(-total // STEPS_SEARCHED)))
    laid_out = set(steps[:: max(1, -(-len(steps) // STEPS_LAID_OUT))])
    every: set[tuple[int, int]] = set()
    tiles: set[TileShape] = set()
    passes: list[tuple[int, int, int]] = []
    for step in steps:
        rows = rows_of_step(session.data.train, step, settings.batch_size, settings.seed)
        shapes = batcher.shapes(rows)
        every.update(shapes)
        labels = batcher.labels(rows) if isinstance(batcher, CausalMicroBatcher) else [0] * len(shapes)
        passes += [(c * n, many, step) for (c, n), many in zip(shapes, labels, strict=True)]
        if step in laid_out:
            tiles |= _tile_shapes(session, rows)

    def rows_of(step: int) -> Sequence[Any]:
        return rows_of_step(session.data.train, step, settings.batch_size, settings.seed)

    largest = max(passes)
    labelled: Sequence[Any] = ()
    if isinstance(batcher, CausalMicroBatcher) and session.prefix is None:
        weigh = _weigher(session)
        heavy = max(passes, key=weigh)
        if weigh(heavy) > 1.01 * weigh(largest):
            labelled = rows_of(heavy[2])
    held_out = session.data.held_out
    return Heaviest(
        rows_of(largest[2]),
        batcher.shapes(rows_of(largest[2])),
        every,
        set(batcher.shapes(held_out)) if held_out else set(),
        labelled,
        tiles,
        _tile_shapes(session, held_out) if held_out else set(),
    )


def _weigher(session: Session) -> Callable[[tuple[int, int, int]], float]:
    """Roughly the bytes that come with the tokens and the labels of a pass."""
    config = session.model.config.get_text_config()
    size = session.model.dtype.itemsize
    vectors = 1 if session.config.train.checkpointing else KEPT_VECTORS
    blocks, width = (getattr(config, name, 0) or 0 for name in ("num_hidden_layers", "hidden_size"))
    token, label = vectors * blocks * width * size, config.vocab_size * (LOGIT_COPIES + size)
    most = getattr(session.objective, "chunk", 1)

    def weigh(one: tuple[int, int, int]) -> float:
        return one[0] * token + min(one[1], most) * label

    return weigh


def _tile_shapes(session: Session, rows: Sequence[Any]) -> set[TileShape]:
    """Shapes of attention's tiles in the passes of these rows."""
    if not isinstance(session.batcher, CausalMicroBatcher):
        return set()
    return {shape for layout in session.batcher.layouts(rows) for shape in _tiles_of(session, layout)}


def _tiles_of(session: Session, layout: Layout) -> set[TileShape]:
    window = getattr(session.model.config.get_text_config(), "sliding_window", None)
    return {
        (batch.count, batch.queries, batch.keys.shape[1])
        for width in {None, window}
        for batch in layout.tiles(width).batches
    }


class _Telling:
    """Of a step's passes those that tell its peak: the smallest, which leaves gradients behind, and then the
    largest. The first step, which is there for the optimizer's state alone, has the smallest only; a third is
    made of the passes of ``labelled`` rows, its largest being the one with the most labels.

    Attributes:
        tokens: of the passes of the second step.
        sizes, rows, tiles: different numbers of tokens, of rows, and shapes of attention's tiles in all of
            them.
    """

    def __init__(self, session: Session, labelled: Sequence[Any] = ()) -> None:
        self._session = session
        self._inner = (session.prefix or session).batcher
        self._labelled = labelled
        self._steps = 0
        self.tokens = 0
        self.sizes: set[int] = set()
        self.rows: set[int] = set()
        self.tiles: set[TileShape] = set()

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        return self._inner.shapes(rows)

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        self._steps += 1
        rows = self._labelled if self._steps > DRY_RUN_STEPS else rows
        shapes = self._inner.shapes(rows)
        sizes = [count * length for count, length in shapes]
        weights = sizes
        if self._steps > DRY_RUN_STEPS and isinstance(self._inner, CausalMicroBatcher):
            weigh = _weigher(self._session)
            weights = [
                int(weigh((size, labels, 0)))
                for size, labels in zip(sizes, self._inner.labels(rows), strict=True)
            ]
        smallest, largest = sizes.index(min(sizes)), len(sizes) - 1 - weights[::-1].index(max(weights))
        if self._steps == 1:
            largest = smallest
        if self._steps <= DRY_RUN_STEPS:
            self.tokens = sum(sizes[number] for number in {smallest, largest})
        self.sizes.update(sizes[number] for number in (smallest, largest))
        self.rows.update(shapes[number][0] for number in (smallest, largest))
        kept = None
        for number, batch in enumerate(self._inner.batches(rows)):
            if number == largest and number != smallest and smallest > largest:
                kept = batch  # it comes last, when gradients are there
            elif number in (smallest, largest) or number >= len(sizes):
                yield self._seen(batch)
        if kept is not None:
            yield self._seen(kept)

    def _seen(self, batch: Any) -> Any:
        layout = getattr(batch, "inputs", {}).get("packed_layout")
        if isinstance(layout, Layout):
            self.tiles |= _tiles_of(self._session, layout)
        return batch


def evaluate_rows(session: Session, rows: Sequence[Any]) -> None:
    """What an evaluation of these rows computes, without the metrics, which need values."""
    way: Any = session.prefix or session
    outputs = way.objective.predictions if session.task.has_labels else way.objective.evaluate_rows
    with session.method.evaluating(session.model), torch.no_grad():
        for batch in way.batcher.batches(rows):
            outputs(batch)


def longest_rows(session: Session) -> Sequence[Any]:
    """Held-out rows that make up the largest pass of an evaluation."""
    ordered = sorted(session.data.held_out, key=len, reverse=True)
    most = getattr(session.batcher, "tokens_per_pass", 0)
    total, count = 0, 0
    for row in ordered:
        count += 1
        total += sum(_tokens(session.batcher.shapes([row])))
        if total >= 2 * most:
            break
    return ordered[:count]


def _kinds(trained: set[Any], evaluated: set[Any]) -> float:
    return len(trained) + len(evaluated - trained) / 3


def _tokens(shapes: Iterable[tuple[int, int]]) -> set[int]:
    """Tokens of each pass: what matrix products have as their one size that changes."""
    return {rows * length for rows, length in shapes}
