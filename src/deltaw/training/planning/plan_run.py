"""A run's plan: the run itself, on fake tensors, for the largest of its steps.

The same code assembles and trains here and in the run, so that what is planned is what is run: a change to
the loop, a method or the packing changes the plan with it. A plan that was made before, from the same
settings, files, rows, versions and machine, is remembered (:mod:`deltaw.training.planning.remembered`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from deltaw.data.example import RowGroup
from deltaw.data.sequences import joined, lengths_of, used_tokens
from deltaw.errors import UserError
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import converted_bytes, new_modules, require_head, skeleton
from deltaw.hub.tokenizers import saving_bytes
from deltaw.kernels import loader
from deltaw.kernels.decode import PAGE_TOKENS
from deltaw.kernels.layout import Layout
from deltaw.lora.layers_quantized import BlockEmbedding
from deltaw.lora.stored import count_numbers
from deltaw.machine.choices import choose_device, choose_precision, choose_threads, dtype_of
from deltaw.machine.kernel_choice import settle_kernels
from deltaw.machine.memory import release_free_memory, resident_bytes, trim_memory
from deltaw.machine.product_rates import basis
from deltaw.memory.plan import Plan, resident_parts
from deltaw.memory.simulation import fake_tensors, simulate
from deltaw.memory.work import WorkCounter, kernel_bytes, warm_up
from deltaw.runtime.generation import DRAWN_AT_ONCE
from deltaw.runtime.quantized_weights import AT_ONCE as MOVED_AT_ONCE
from deltaw.runtime.quantized_weights import quantize_int8, quantize_nf4
from deltaw.runtime.recognition import blocks_of
from deltaw.settings import RunConfig
from deltaw.tensor_files import StoredTensor, read_header
from deltaw.training.approximations import applicable
from deltaw.training.callbacks import Say, silent
from deltaw.training.drift import DriftMeter
from deltaw.training.embedding.objective import EmbeddingObjective
from deltaw.training.evaluation.general import ANSWER_TOKENS, NoGeneralAnswers
from deltaw.training.evaluation.general_prompts import MEASURED
from deltaw.training.features.prompts import StoredPrompts
from deltaw.training.monitoring.generation import MOST_TOKENS, PROMPTS, is_checked
from deltaw.training.monitoring.monitor import SAMPLES
from deltaw.training.monitoring.rates import as_it_was
from deltaw.training.parallel.group import deal
from deltaw.training.planning.asked import of_each
from deltaw.training.planning.remembered import Remembered
from deltaw.training.process import guest
from deltaw.training.session import Session, assemble, gradient_check, read_data
from deltaw.training.state import rows_of_step
from deltaw.training.tasks.base import RunData, Task
from deltaw.training.tasks.causal_batcher import ROWS_AT_ONCE, CausalMicroBatcher, choose_tokens_per_pass
from deltaw.working import listening, working

# Weights that a run never reads: rows of an embedding whose tokens do not occur in the data.
#
# Weights of the type that they are stored in are mapped from their file, and the system brings in what is
# touched. Of a large vocabulary that is often little. Knows a session and its rows; not how much a run needs.

# What Linux maps around a touched page of a file that it holds in memory, at least: 16 pages of 4 KiB.
REGION = 64 * 1024
# Pages that are touched to see what comes with them, and how far they lie apart: twice the largest page.
TOUCHED, APART = 8, 4 << 20
# Tokens of general prompts and their answers, which drift is measured on: an upper bound. Tokens that run at once.
GENERAL_TOKENS, GENERAL_BATCH = 2048, 1024


def unread_bytes(session: Session, *, dtype: str, converted: int) -> int:
    """Bytes of the input embedding that stay on the disk.

    Args:
        session: put together on fake tensors.
        dtype: what the weights are loaded as.
        converted: bytes of files whose weights have another type; these are read as a whole.

    Returns:
        0 where the embedding is read as a whole: it is trained, tied to another layer, or not mapped.
    """
    embedding = session.model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.weight.requires_grad or converted:
        return 0
    if isinstance(embedding, BlockEmbedding):
        return 0  # it is read, not mapped
    weight = embedding.weight
    named = session.model.named_parameters(remove_duplicate=False)
    folder = config_folder(session.config.model, dtype, session.config.trust_remote_code)
    if sum(parameter is weight for _, parameter in named) != 1 or not any(folder.glob("*.safetensors")):
        return 0
    tokens = used_tokens(session.data.every).astype(np.int64)
    if not len(tokens):
        return 0
    row_bytes = weight.shape[1] * weight.element_size()
    region = _region(folder, weight)
    first, last = tokens * row_bytes // region, ((tokens + 1) * row_bytes - 1) // region
    touched = len(np.unique(np.concatenate([first, last]))) * max(region, row_bytes)
    if is_checked(session) or (session.task.writes_text and session.config.train.drift is not False):
        touched += GENERAL_TOKENS * max(region, row_bytes)
    # Generated answers and completions may contain any token.
    touched += _answer_count(session) * ANSWER_TOKENS * max(region, row_bytes)
    touched += session.total_steps * session.written.at_once * session.written.longest * max(region, row_bytes)
    return max(0, weight.numel() * weight.element_size() - touched)


def _region(folder: Path, weight: torch.Tensor) -> int:
    """Bytes that come into memory with a page of the file that holds a weight like this one."""
    for path in sorted(folder.glob("*.safetensors")):
        for stored in read_header(path).values():
            if stored.shape == tuple(weight.shape) and stored.is_float:
                return mapped_around(stored)
    return REGION


def mapped_around(stored: StoredTensor) -> int:
    """Bytes that the system maps, on average, for one page of a stored tensor that is touched.

    A system that holds files in pages of several sizes maps all of the one that it finds, up to 2 MiB; which
    they are depends on the file system, and on how the file was read before. So a few pages are touched.
    """
    begin, end = stored.start, stored.start + stored.bytes
    touches = min(TOUCHED, (end - begin) // APART)
    if sys.platform != "linux" or not touches:
        return REGION
    with (
        stored.file.open("rb") as file,
        mmap.mmap(file.fileno(), end, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped,
    ):
        view = torch.frombuffer(mapped, dtype=torch.uint8)
        address = view.data_ptr()
        del view
        for place in np.linspace(begin, end - 1, touches + 2, dtype=np.int64)[1:-1]:
            mapped[int(place)]
        return max(REGION, _resident_at(address) // touches)


def _resident_at(address: int) -> int:
    """Bytes in memory of the mapping that begins at an address; 0 where the system does not tell."""
    try:
        maps = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    found = re.search(rf"(?m)^{address:x}-[0-9a-f]+ (?:.*\n)(?:[A-Z].*\n)*?Rss:\s+(\d+) kB", maps)
    return 1024 * int(found[1]) if found else 0


# Bytes that a run adds to the process and keeps, beside tensors: code of libraries that is first used after the plan is
# made, and objects of the model, the method and the decoder: 17 to 40 MB on Linux. The upper
# end is taken, since a plan may be high and not low.
LASTING = 40 << 20
# Tokens on which a decoder's logits are compared with the model's own: the model's are computed in its data type, and
# half of them and of the decoder's are in fp32 at the same time.
COMPARED_TOKENS = 40


def decoding_bytes(session: Session, texts: int, longest: int, batch_tokens: int | None = None) -> tuple[int, int]:
    """Return the memory of generating texts with a session's model.

    Args:
        texts: number of texts that are generated together.
        longest: tokens of the longest text and its prompt.
        batch_tokens: most tokens of all texts that run at once. None for no limit.

    Returns:
        Bytes of weights that the decoder copies, and bytes of keys, values and logits.
    """
    if not texts:
        return 0, 0
    config = session.model.config.get_text_config()
    heads, width = config.num_attention_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or width // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    running = min(DRAWN_AT_ONCE, texts)
    pages = running * (-(-(longest + session.method.virtual_tokens) // PAGE_TOKENS) + 1)
    if batch_tokens is not None:
        pages = min(pages, max(batch_tokens, longest) // PAGE_TOKENS + 1)
    running = min(running, pages)
    number = 4 if session.model.dtype == torch.float32 else 2
    cache = pages * PAGE_TOKENS * 2 * key_heads * size * config.num_hidden_layers * number
    logits = max(LOGIT_COPIES * running, (number + 4) * COMPARED_TOKENS) * config.vocab_size
    has_int8 = any(parameter.dtype == torch.int8 for parameter in session.model.parameters())
    return config.vocab_size * width if has_int8 else 0, cache + logits


def _answer_count(session: Session) -> int:
    """Return the largest number of answers that a run generates at one time, besides completions to train on."""
    train, checked = session.config.train, is_checked(session)
    if not (session.task.writes_text or checked):
        return 0
    samples = SAMPLES if train.samples == "auto" else int(train.samples)
    general = len(MEASURED) if checked or train.drift is not False or train.keep_general else 0
    return max(min(samples, len(session.data.held_out)), train.eval_answers, general, PROMPTS if checked else 0)


def generation_bytes(session: Session) -> tuple[int, int]:
    """Return the bytes that a decoder keeps during training, and those that it takes while it generates.

    Texts are completions to train on, sample answers, scored answers, answers to general prompts, and the answers that
    are compared before and after training.
    """
    written = session.written
    kept, rollouts = decoding_bytes(session, written.at_once, written.longest)
    checked, texts = is_checked(session), _answer_count(session)
    if not texts:
        return kept, rollouts
    longest = max(map(_longest, session.data.every)) + (max(ANSWER_TOKENS, MOST_TOKENS) if checked else ANSWER_TOKENS)
    most = max(GENERAL_BATCH, getattr(session.batcher, "tokens_per_pass", GENERAL_BATCH))
    copied, answers = decoding_bytes(session, texts, longest, most)
    return kept, max(rollouts, answers if kept else copied + answers)


# Which step of a run is its heaviest, and which of its microbatches show its peak.
#
# Found by the batcher's own arithmetic, without running the model. Knows batchers and layouts; no memory.

# Tiles of one shape: how many, queries, keys.
TileShape: TypeAlias = tuple[int, int, int]
# Steps that are searched for the largest microbatch; of a longer run, so many of them, spread evenly.
STEPS_SEARCHED = 400
# The share of rows that are few.
FEW = 0.05
# Two steps: from the second on, the optimizer's state is there while a forward and a backward run.
DRY_RUN_STEPS = 2
# Steps whose microbatches are laid out, to see in how many shapes attention comes.
STEPS_LAID_OUT = 100
# Vectors of the model's width that a token keeps in each block, roughly; one with activation checkpointing.
# Bytes for each entry of the logits beside the entry itself: two fp32 copies. Both only choose a step.
KEPT_VECTORS, LOGIT_COPIES = 20, 8


@dataclass(frozen=True)
class Heaviest:
    """The step with the largest microbatch.

    Attributes:
        rows: of that step, or of one process in it. shapes: (rows, length) of its microbatches.
        every: the shapes of all steps that were searched. evaluated: those of evaluations.
        rows_of_heads: numbers of rows that a head is applied to, in these steps and in evaluations.
        labeled: rows of another step, which has a shorter microbatch with so many labels that it may take
            more; empty where there is no such step.
        tiles, evaluated_tiles: as ``every`` and ``evaluated``, of attention's tiles.
        long: a limit that few rows to train on exceed, how many, and the most tokens of a microbatch of the
            others; empty where there are no such rows.
    """

    rows: Sequence[Any]
    shapes: list[tuple[int, int]]
    every: set[tuple[int, int]]
    evaluated: set[tuple[int, int]]
    rows_of_heads: tuple[set[int], set[int]]
    labeled: Sequence[Any] = ()
    tiles: set[TileShape] = field(default_factory=set)
    evaluated_tiles: set[TileShape] = field(default_factory=set)
    long: tuple[int, ...] = ()

    @property
    def token_counts(self) -> float:
        """Different numbers of tokens that kernels are built for; an evaluation's, which has no backward,
        counts a third."""
        return _kinds(token_counts(self.every), token_counts(self.evaluated))

    @property
    def row_counts(self) -> float:
        """The same of numbers of rows, which a classifier's head is applied to."""
        return _kinds(*self.rows_of_heads)

    @property
    def tile_shapes(self) -> float:
        """The same of the shapes of attention's tiles."""
        return _kinds(self.tiles, self.evaluated_tiles)


def heaviest_step(session: Session, processes: int = 1) -> Heaviest:
    """Find the step with the largest microbatch, among equals the one with the most labels; and another step
    where labels may outweigh tokens.

    Args:
        processes: that share the rows of a step; its rows are then those of one of them.
    """
    settings, feed = session.config.train, session.feed
    cut = feed.batcher if isinstance(feed.batcher, CausalMicroBatcher) and not isinstance(feed, StoredPrompts) else None
    total = session.total_steps
    if feed.store is not None:
        # What is kept is computed in the first epoch alone.
        total = min(total, -(-len(session.data.train) // settings.batch_size))
    steps = range(0, total, max(1, -(-total // STEPS_SEARCHED)))
    laid_out = set(steps[:: max(1, -(-len(steps) // STEPS_LAID_OUT))])
    every: set[tuple[int, int]] = set()
    headed: set[int] = set()
    tiles: set[TileShape] = set()
    found: list[tuple[int, int, tuple[int, int]]] = []
    limit, long, others = *_few_long(session), 0

    def shares_of(step: int) -> list[Sequence[Any]]:
        rows = feed.longest(rows_of_step(session.data.train, step, settings.batch_size, settings.seed))
        if processes == 1:
            return [rows]
        dealt = deal(rows, processes, share=feed.share)
        return [[rows[place] for place in places] for places in dealt]

    def rows_of(place: tuple[int, int]) -> Sequence[Any]:
        return shares_of(place[0])[place[1]]

    for step in steps:
        for process, rows in enumerate(shares_of(step)):
            if not rows:
                continue
            shapes = feed.shapes(rows)
            every.update(shapes)
            headed.update(_head_rows(feed.batcher, rows, shapes))
            if long:
                short = [length for length in map(_longest, rows) if length <= limit]
                others = max(others, min(limit, len(short) * max(short, default=0)))
            labels = [0] * len(shapes) if cut is None else cut.labels(rows)
            if isinstance(objective := session.objective, EmbeddingObjective):
                kept = shapes[: objective.kept_passes(shapes)]
                found.append((sum(c * n for c, n in kept) + max(c * n for c, n in shapes), 0, (step, process)))
                continue
            found += [(c * n, many, (step, process)) for (c, n), many in zip(shapes, labels, strict=True)]
            if step in laid_out:
                tiles |= _tile_shapes(session, rows)
    largest = max(found)
    labeled: Sequence[Any] = ()
    if cut is not None and feed.store is None:
        weigh = _weigher(session)
        heavy = max(found, key=weigh)
        if weigh(heavy) > 1.01 * weigh(largest):
            labeled = rows_of(heavy[2])
    # Of a large evaluation, the first rows show what shapes there are.
    sets = () if session.task.rolls_out else session.data.sets.values()
    held_out = [row for rows in sets for row in rows[:ROWS_AT_ONCE]]
    evaluated = (set(feed.shapes(held_out)), _tile_shapes(session, held_out)) if held_out else (set(), set())
    heads = headed, set(_head_rows(feed.batcher, held_out, list(evaluated[0]))) if held_out else set()
    heaviest = rows_of(largest[2])
    if session.task.rolls_out and not labeled:
        labeled = _fullest(session, heaviest)
    limit -= session.method.virtual_tokens
    told = (limit, long, others) if long else ()
    return Heaviest(heaviest, feed.shapes(heaviest), every, evaluated[0], heads, labeled, tiles, evaluated[1], told)


def _fullest(session: Session, rows: Sequence[Any]) -> Sequence[Any]:
    """Of completions at their longest, so many that a microbatch is as full as can be; empty where all of them are.

    Shorter ones, or fewer, may come to any number of tokens, and so to microbatches that are fuller than those of all.
    """

    def largest(count: int) -> int:
        return max(token_counts(session.feed.shapes(rows[:count])))

    best = max(range(1, len(rows) + 1), key=lambda count: (largest(count), count))
    return () if best == len(rows) else rows[:best]


def _head_rows(batcher: Any, rows: Sequence[Any], shapes: Sequence[tuple[int, int]]) -> list[int]:
    """How many rows a head is applied to in each microbatch of these rows, which have these shapes."""
    told = getattr(batcher, "head_rows", None)
    return [count for count, _ in shapes] if told is None else told(rows)


def _few_long(session: Session) -> tuple[int, int]:
    """A limit on the tokens of a row that only :data:`FEW` of the training rows exceed, and how many; no row
    counts as long that goes into a usual microbatch."""
    rows = session.data.train
    few = int(FEW * len(rows))
    if not few or session.task.tokenizer is None:
        return 0, 0
    is_group = isinstance(rows[0], RowGroup)
    lengths = np.array([_longest(row) for row in rows]) if is_group else lengths_of(rows)
    limit = -(-int(np.partition(lengths, -few - 1)[-few - 1]) // 64) * 64
    limit = max(limit, choose_tokens_per_pass(session.config.train.tokens_per_pass, limit, "cpu").value)
    return limit, int((lengths > limit).sum())


def _longest(row: Any) -> int:
    """Tokens of a row, or of the longest of a group."""
    return max(map(len, row.rows)) if isinstance(row, RowGroup) else len(row)


def _weigher(session: Session) -> Callable[[tuple[int, int, Any]], float]:
    """Roughly the bytes that come with the tokens and the labels of a microbatch."""
    config = session.model.config.get_text_config()
    size = session.model.dtype.itemsize
    vectors = 1 if session.config.train.checkpointing else KEPT_VECTORS
    blocks, width = (getattr(config, name, 0) or 0 for name in ("num_hidden_layers", "hidden_size"))
    token, label = vectors * blocks * width * size, config.vocab_size * (LOGIT_COPIES + size)
    most = getattr(session.objective, "chunk", 1)

    def weigh(one: tuple[int, int, Any]) -> float:
        return one[0] * token + min(one[1], most) * label

    return weigh


def _tile_shapes(session: Session, rows: Sequence[Any]) -> set[TileShape]:
    """Shapes of attention's tiles in the microbatches of these rows."""
    if not isinstance(session.batcher, CausalMicroBatcher):
        return set()
    return {shape for layout in session.batcher.layouts(rows) for shape in _tiles_of(session, layout)}


def _tiles_of(session: Session, layout: Layout) -> set[TileShape]:
    window = getattr(session.model.config.get_text_config(), "sliding_window", None)
    found = (batch for width in {None, window} for batch in layout.tiles(width).batches)
    return {(batch.count, batch.queries, batch.keys.shape[1]) for batch in found}


class TellingBatcher:
    """Of a step's microbatches those that show its peak: the smallest, which leaves gradients behind, and
    then the largest. The first step, which is there for the optimizer's state alone, has the smallest only; a
    third is made of the microbatches of ``labeled`` rows, its largest being the one with the most labels.

    Attributes:
        tokens: of the microbatches of the second step.
        sizes, rows, tiles: different numbers of tokens, of rows, and shapes of attention's tiles in all of
            them.
        made: how many microbatches there were.
    """

    def __init__(self, session: Session, labeled: Sequence[Any] = ()) -> None:
        self._session = session
        self._inner = session.feed
        self._labeled = labeled
        self._steps = 0
        self.tokens = self.made = 0
        self.sizes: set[int] = set()
        self.rows: set[int] = set()
        self.tiles: set[TileShape] = set()

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        return self._inner.shapes(rows)

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        self._steps += 1
        rows = self._labeled if self._steps > DRY_RUN_STEPS else rows
        shapes = self._inner.shapes(rows)
        sizes = [count * length for count, length in shapes]
        weights = sizes
        cut = self._inner.batcher
        if self._steps > DRY_RUN_STEPS and isinstance(cut, CausalMicroBatcher):
            weigh = _weigher(self._session)
            weights = [int(weigh((size, labels, 0))) for size, labels in zip(sizes, cut.labels(rows), strict=True)]
        smallest, largest = sizes.index(min(sizes)), len(sizes) - 1 - weights[::-1].index(max(weights))
        if self._steps == 1:
            largest = smallest
        wanted = {smallest, largest}
        if isinstance(objective := self._session.objective, EmbeddingObjective):
            # Its step computes these before its first microbatch, so that each is there for its backward.
            wanted |= set(range(objective.kept_passes(shapes)))
        if self._steps <= DRY_RUN_STEPS:
            self.tokens = sum(sizes[number] for number in wanted)
        self.sizes.update(sizes[number] for number in (smallest, largest))
        headed = _head_rows(cut, rows, shapes)
        self.rows.update(headed[number] for number in (smallest, largest))
        self.made += len(wanted)
        kept = None
        for number, batch in enumerate(self._inner.batches(rows)):
            if number == largest and number != smallest and smallest > largest:
                kept = batch  # it comes last, when gradients are there
            elif number in wanted or number >= len(sizes):
                yield self._seen(batch)
        if kept is not None:
            yield self._seen(kept)

    def _seen(self, batch: Any) -> Any:
        layout = getattr(batch, "inputs", {}).get("packed_layout")
        if isinstance(layout, Layout):
            self.tiles |= _tiles_of(self._session, layout)
        return batch


def longest_rows(session: Session) -> Sequence[Any]:
    """Return the longest rows that are computed without a gradient, as many as fill two microbatches.

    These are the held-out rows. The base model also computes the training rows if the loss has a reference model.
    """
    has_reference = getattr(getattr(session.task, "settings", None), "has_reference", False)
    computed = session.data.every if has_reference else joined(*session.data.sets.values())
    ordered = np.argsort(-lengths_of(computed), kind="stable")
    most = getattr(session.batcher, "tokens_per_pass", 0)
    total, rows = 0, []
    for place in ordered.tolist():
        rows.append(computed[place])
        total += sum(token_counts(session.batcher.shapes(rows[-1:])))
        if total >= 2 * most:
            break
    return rows


def _kinds(trained: set[Any], evaluated: set[Any]) -> float:
    return len(trained) + len(evaluated - trained) / 3


def token_counts(shapes: Iterable[tuple[int, int]]) -> set[int]:
    """Tokens of each microbatch: the one size of matrix products that changes."""
    return {rows * length for rows, length in shapes}


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
    how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
    with fake_tensors():  # the run's model, before the method is applied
        model = skeleton(config.model, task=config.task, num_labels=task.outputs(data), **how)
    require_head(model, config.model, config.task, **how)
    kernels = settle_kernels(model.config, threads)
    warm_up(dtype_of(dtype))
    total = count_numbers(model)
    with fake_tensors():
        if config.precision == "int8":
            quantize_int8(model.base_model)
        if config.precision == "nf4":
            quantize_nf4(model.base_model)
    new = new_modules(model, config.model, **how) if task.has_labels else []
    vocabularies = [model.config.get_text_config().vocab_size] if task.tokenizer is not None else []
    made: list[_DryRun] = []
    models = [model]

    def run() -> None:
        session = assemble(config, task, data, models[0], device="cpu", new_modules=new, offered=kernels.approximations)
        made.append(_dry_run(session, processes))

    footprint = simulate(run, models=models, vocabularies=vocabularies)
    (done,) = made
    store = done.session.feed.store
    with fake_tensors():
        trained = sum(p.numel() for _, p in done.session.method.parameters(model))
    converted = converted_bytes(model, config.model, **how)
    folder = config_folder(config.model, dtype, config.trust_remote_code)
    decoder_bytes, rollout_bytes = generation_bytes(done.session)
    parts = {
        "kernel_bytes": done.kernel_bytes(),
        "feature_bytes": 0 if store is None else store.resident_bytes,
        "reading_bytes": data.read_peak_bytes,
        "mapped_bytes": converted + MOVED_AT_ONCE,
        "saving_bytes": 0 if task.tokenizer is None else saving_bytes(folder),
        "unread_bytes": unread_bytes(done.session, dtype=dtype, converted=converted),
        "decoder_bytes": decoder_bytes,
        "rollout_bytes": rollout_bytes,
    }
    block_bytes, disk_bytes = _block_bytes(model), 0 if store is None else store.shape.bytes
    heaviest, operations, operators = done.heaviest, done.operations, done.operators
    del model, store, done
    made.clear()
    models.clear()
    release_free_memory()  # the run has none of the objects of its simulation
    resident, phases = resident_parts(footprint, process_bytes=process_bytes or resident_bytes() + LASTING, **parts)
    found = Plan(
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
        tokens=max(token_counts(heaviest.shapes), default=0),
        rows=len(heaviest.rows),
        timeline=footprint.timeline,
        precision=dtype,
        operations=operations,
        operators=operators,
        phases=phases,
        arithmetic=loader.arithmetic().as_dict(),
        disk_bytes=disk_bytes,
        block_bytes=block_bytes,
    )
    if not heaviest.long:
        return found
    limit, long, tokens = heaviest.long
    return found.without_long_rows(limit, long, len(data.train), tokens)


def _block_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Of the weights of all blocks, and of the largest; 0 where the model has no list of blocks."""
    found = blocks_of(model)
    if found is None:
        return 0, 0
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in found[1]]
    return sum(sizes), max(sizes)


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
    trim_memory()  # as before the first step of a run
    telling, marks = TellingBatcher(session, heaviest.labeled), [(0, 0)]
    meter = DriftMeter(session)
    # A search for the learning rate trains as the run does, beside a copy of what is trained.
    searches = session.config.train.learning_rate == "search"
    copied = as_it_was(session) if searches else contextlib.nullcontext()
    offered = applicable(session.model, session.objective, session.approximations.names)
    if offered and session.config.train.approximate == "auto":
        # The run also continues if a model's own code fails in fp32.
        with contextlib.suppress(Exception), session.running(), session.method.evaluating(session.model):
            gradient_check(session).choose(offered)
        session.model.zero_grad()
    with session.running(), copied, WorkCounter() as work:
        session.train(
            rows=heaviest.rows,
            batch_size=len(heaviest.rows),
            total_steps=DRY_RUN_STEPS + (1 if heaviest.labeled else 0),
            batcher=telling,
            on_step=lambda step: marks.append((work.operations, work.operators)),
        )
    if not session.task.rolls_out and (rows := longest_rows(session)):
        with session.running():
            evaluate_rows(session, rows)
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
            # Each plan leaves something behind, which a run that makes one plan does not have.
            before = next((plan.resident["process"] for plan in plans.values()), None)
            settings = config.model_copy(update={"method": method})
            plans[method] = plan_run(settings, task, data, process_bytes=before, processes=processes)
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
    what = f"no plan: the model cannot be run on fake tensors ({type(error).__name__}: {str(error)[:100]})"
    return UserError(what, where="the plan", hint="train it anyway: deltaw train then runs without a plan")


def evaluate_rows(session: Session, rows: Sequence[Any]) -> None:
    """What an evaluation of these rows computes, without the metrics, which need values."""
    objective: Any = session.objective
    outputs = objective.predictions if session.task.has_labels else objective.evaluate_rows
    with session.method.evaluating(session.model), torch.no_grad():
        for batch in session.feed.batches(rows):
            outputs(batch)
