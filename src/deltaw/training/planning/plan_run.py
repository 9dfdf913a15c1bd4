"""Plan a run: predict its memory by running its largest steps on fake tensors, and its time from its workload.

The plan uses the same code as the run, so that changes of the loop, a method or the packing are included. Plans are
cached (:mod:`deltaw.training.planning.plan_cache`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from deltaw.data.example import RowGroup, concat_rows, lengths_of, used_tokens
from deltaw.data.row_reader import RunData
from deltaw.decoding.generation import MAX_CONCURRENT_SAMPLES
from deltaw.errors import UserError
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import bitsandbytes_precision, converted_bytes, new_modules, require_head, skeleton
from deltaw.hub.tokenizers import saving_bytes
from deltaw.kernels import loader
from deltaw.kernels.decode import PAGE_TOKENS
from deltaw.kernels.layout import Layout
from deltaw.lora.layers_quantized import BlockEmbedding
from deltaw.lora.stored import count_logical_parameters
from deltaw.machine.choices import (
    QUANTIZED,
    assumed_cards,
    choose_device,
    choose_precision,
    choose_threads,
    dtype_of,
    loading_precision,
)
from deltaw.machine.kernel_choice import KernelChoice, activate_kernels
from deltaw.machine.memory import memory_limit_bytes, release_free_memory, resident_bytes, trim_memory
from deltaw.machine.product_rates import provenance
from deltaw.memory.plan import OtherBytes, Plan, memory_fields
from deltaw.memory.simulation import fake_tensors, simulate, with_index
from deltaw.memory.work import WorkCounter, kernel_bytes, warm_up
from deltaw.methods.start import resolve_start
from deltaw.progress import LogFunction, ignore_line, track_progress, use_listener
from deltaw.runtime.quantized_weights import MOVE_CHUNK_BYTES as MOVED_AT_ONCE
from deltaw.runtime.quantized_weights import SimulatedLinear, quantize_int8, quantize_nf4, quantize_with_bitsandbytes
from deltaw.runtime.recognition import blocks_of
from deltaw.settings.config import RunConfig
from deltaw.tensor_files import StoredTensor, read_header
from deltaw.training.approximations import applicable
from deltaw.training.batchers import MAX_BUFFERED_ROWS, CausalMicroBatcher, choose_tokens_per_pass
from deltaw.training.callbacks import FunctionCallback
from deltaw.training.drift import DriftMeter
from deltaw.training.evaluation.general import MAX_ANSWER_TOKENS, NoGeneralAnswers
from deltaw.training.evaluation.general_prompts import DRIFT_PROMPTS
from deltaw.training.features.prompts import StoredPrompts
from deltaw.training.microbatches import Batcher
from deltaw.training.monitoring.generation import MAX_DATA_ANSWER_TOKENS, PROMPTS, is_checked
from deltaw.training.monitoring.monitor import SAMPLES
from deltaw.training.monitoring.rates import restored_parameters
from deltaw.training.parallel.group import distribute_rows
from deltaw.training.planning.plan_cache import CachedPlan
from deltaw.training.planning.run_time import StepRates, Workload, plan_with_cached_time, store_rates, timed_plan
from deltaw.training.planning.step_rates import cpu_usage, measure, workload_of
from deltaw.training.process import preserved_process_state
from deltaw.training.session import Session, assemble, gradient_check, read_data
from deltaw.training.task import Task

# Rows of an embedding whose tokens do not occur are never read. Weights that are not converted are mapped from their
# file, and the system loads only touched pages. With a large vocabulary this is often a small part.

# Minimum number of bytes that Linux maps around a touched page of a cached file: 16 pages of 4 KiB.
MIN_REGION_BYTES = 64 * 1024
# Number of pages to touch in order to measure the mapped size, and their distance: twice the largest page.
NUM_TOUCHES, TOUCH_DISTANCE = 8, 4 << 20
# Approximate bytes of a parameter in a model with precision nf4: some weights remain in bf16.
NF4_BYTES = 0.6
# Upper bound of the number of tokens in general prompts and answers, and of the tokens in one batch of them.
GENERAL_TOKENS, GENERAL_BATCH = 2048, 1024


def unread_bytes(session: Session, *, dtype: str, converted: int) -> int:
    """Return the bytes of the input embedding that are never read from disk.

    Args:
        session: Session on fake tensors.
        dtype: Data type of the loaded weights.
        converted: Bytes of files with weights of another type. They are read completely.

    Returns:
        0 if the embedding is read completely: it is trained, tied to another layer, or not mapped.
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
    tokens = used_tokens(session.data.all_rows).astype(np.int64)
    tokens = tokens[tokens < len(weight)]  # without image tokens
    if not len(tokens):
        return 0
    row_bytes = weight.shape[1] * weight.element_size()
    region = _region(folder, weight)
    first, last = tokens * row_bytes // region, ((tokens + 1) * row_bytes - 1) // region
    touched = len(np.unique(np.concatenate([first, last]))) * max(region, row_bytes)
    if is_checked(session) or (session.task.generates_text and session.config.train.drift is not False):
        touched += GENERAL_TOKENS * max(region, row_bytes)
    # Generated answers and completions may contain any token.
    touched += _num_answers(session) * MAX_ANSWER_TOKENS * max(region, row_bytes)
    limits = session.generation_limits
    touched += session.total_steps * limits.num_concurrent * limits.max_length * max(region, row_bytes)
    return max(0, weight.numel() * weight.element_size() - touched)


def _region(folder: Path, weight: torch.Tensor) -> int:
    """Return the bytes that are mapped with a page of the file that contains a weight of this shape."""
    for path in sorted(folder.glob("*.safetensors")):
        for stored in read_header(path).values():
            if stored.shape == tuple(weight.shape) and stored.is_float:
                return mapped_page_bytes(stored)
    return MIN_REGION_BYTES


def mapped_page_bytes(stored: StoredTensor) -> int:
    """Return the average number of bytes that the system maps for one touched page of a stored tensor.

    A system with page cache folios of several sizes maps an entire folio, up to 2 MiB. Their size depends on the file
    system and on previous reads, so it is measured on a few pages.
    """
    start, end = stored.start, stored.start + stored.bytes
    touches = min(NUM_TOUCHES, (end - start) // TOUCH_DISTANCE)
    if sys.platform != "linux" or not touches:
        return MIN_REGION_BYTES
    access = mmap.PROT_READ | mmap.PROT_WRITE
    with stored.file.open("rb") as file, mmap.mmap(file.fileno(), end, flags=mmap.MAP_PRIVATE, prot=access) as mapped:
        view = torch.frombuffer(mapped, dtype=torch.uint8)
        address = view.data_ptr()
        del view
        for offset in np.linspace(start, end - 1, touches + 2, dtype=np.int64)[1:-1]:
            mapped[int(offset)]
        return max(MIN_REGION_BYTES, _resident_at(address) // touches)


def _resident_at(address: int) -> int:
    """Return the resident bytes of the mapping at an address, or 0 if the system does not report it."""
    try:
        maps = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    match = re.search(rf"(?m)^{address:x}-[0-9a-f]+ (?:.*\n)(?:[A-Z].*\n)*?Rss:\s+(\d+) kB", maps)
    return 1024 * int(match[1]) if match else 0


# Memory that a run adds to the process except tensors: library code that is loaded after the plan, and objects of the
# model, the method and the decoder. It is 17 to 40 MB on Linux. The maximum is used, because a plan must not be low.
LASTING_BYTES = 40 << 20
# Number of tokens on which a decoder's logits are compared with the model's. The model's logits are in its data type.
# Half of them and of the decoder's are in fp32 at the same time.
COMPARED_TOKENS = 40


def decoding_bytes(session: Session, texts: int, max_length: int, batch_tokens: int | None = None) -> tuple[int, int]:
    """Return the memory of generating texts with a session's model.

    Args:
        session: Session on fake tensors.
        texts: Number of texts that are generated together.
        max_length: Maximum number of tokens in a text with its prompt.
        batch_tokens: Maximum number of tokens of all running texts. None for no limit.

    Returns:
        Bytes of weights that the decoder copies, and bytes of keys, values and logits.
    """
    if not texts:
        return 0, 0
    config = session.model.config.get_text_config()
    heads, width = config.num_attention_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or width // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    running = min(MAX_CONCURRENT_SAMPLES, texts)
    pages = running * (-(-(max_length + session.method.virtual_tokens) // PAGE_TOKENS) + 1)
    if batch_tokens is not None:
        pages = min(pages, max(batch_tokens, max_length) // PAGE_TOKENS + 1)
    running = min(running, pages)
    number = 4 if session.model.dtype == torch.float32 else 2
    cache = pages * PAGE_TOKENS * 2 * key_heads * size * config.num_hidden_layers * number
    logits = max(LOGIT_COPIES * running, (number + 4) * COMPARED_TOKENS) * config.vocab_size
    has_int8 = any(parameter.dtype == torch.int8 for parameter in session.model.parameters())
    return config.vocab_size * width if has_int8 else 0, cache + logits


def _num_answers(session: Session) -> int:
    """Return the largest number of answers that a run generates at one time, besides completions to train on."""
    train, checked = session.config.train, is_checked(session)
    if not (session.task.generates_text or checked):
        return 0
    samples = SAMPLES if train.samples == "auto" else int(train.samples)
    num_general = len(DRIFT_PROMPTS) if checked or train.drift is not False or train.keep_general else 0
    return max(min(samples, len(session.data.held_out)), train.eval_answers, num_general, PROMPTS if checked else 0)


def generation_bytes(session: Session) -> tuple[int, int]:
    """Return the persistent bytes of a decoder during training, and the additional bytes while it generates.

    Texts are completions to train on, sample answers, scored answers, answers to general prompts, and the answers that
    are compared before and after training.
    """
    limits = session.generation_limits
    decoder_bytes, rollout_bytes = decoding_bytes(session, limits.num_concurrent, limits.max_length)
    checked, texts = is_checked(session), _num_answers(session)
    if not texts:
        return decoder_bytes, rollout_bytes
    max_answer = max(MAX_ANSWER_TOKENS, MAX_DATA_ANSWER_TOKENS) if checked else MAX_ANSWER_TOKENS
    max_length = max(map(_row_length, session.data.all_rows)) + max_answer
    batch_tokens = max(GENERAL_BATCH, session.batcher.tokens_per_pass)
    copied_bytes, answer_bytes = decoding_bytes(session, texts, max_length, batch_tokens)
    return decoder_bytes, max(rollout_bytes, answer_bytes if decoder_bytes else copied_bytes + answer_bytes)


# Selection of the step and the microbatches with the largest memory, from the sizes that the batcher computes, without
# running the model.

# Attention tiles of one shape: count, queries, keys.
TileShape: TypeAlias = tuple[int, int, int]
# Maximum number of steps that are searched for the largest microbatch, evenly spaced over the run.
MAX_SEARCHED_STEPS = 400
# Maximum share of rows that count as exceptionally long.
LONG_ROW_SHARE = 0.05
# The second step runs with an allocated optimizer state.
DRY_RUN_STEPS = 2
# Maximum number of steps whose layouts are built in order to count attention tile shapes.
MAX_LAID_OUT_STEPS = 100
# Approximate number of hidden-size vectors that each block stores per token, without activation checkpointing.
# Additional bytes per logit: two fp32 copies. Both are used only to select a step.
STORED_VECTORS, LOGIT_COPIES = 20, 8


@dataclass(frozen=True)
class HeaviestStep:
    """Step with the largest microbatch.

    Attributes:
        rows: Rows of the step, or of one process in it.
        shapes: (rows, length) of its microbatches.
        all_shapes: Shapes of all steps that were searched.
        evaluated: Shapes of evaluations.
        rows_of_heads: Numbers of rows that a head is applied to, in these steps and in evaluations.
        labeled: Rows of another step with a shorter microbatch whose labels may need more memory. Empty if there is
            none.
        tiles: Attention tile shapes of the steps.
        evaluated_tiles: Attention tile shapes of evaluations.
        long: Length limit that a few training rows exceed, number of these rows, and maximum microbatch tokens of the
            remaining rows. Empty if there are none.
    """

    rows: Sequence[Any]
    shapes: list[tuple[int, int]]
    all_shapes: set[tuple[int, int]]
    evaluated: set[tuple[int, int]]
    rows_of_heads: tuple[set[int], set[int]]
    labeled: Sequence[Any] = ()
    tiles: set[TileShape] = field(default_factory=set)
    evaluated_tiles: set[TileShape] = field(default_factory=set)
    long: tuple[int, ...] = ()

    @property
    def token_counts(self) -> float:
        """Number of different microbatch sizes in tokens, for which kernels are prepared.

        Sizes of evaluations count a third, because they have no backward pass.
        """
        return _weighted_count(token_counts(self.all_shapes), token_counts(self.evaluated))

    @property
    def row_counts(self) -> float:
        """Number of different row counts of a classifier's head, weighted in the same way."""
        return _weighted_count(*self.rows_of_heads)

    @property
    def tile_shapes(self) -> float:
        """Number of different attention tile shapes, weighted in the same way."""
        return _weighted_count(self.tiles, self.evaluated_tiles)


def heaviest_step(session: Session, processes: int = 1) -> HeaviestStep:
    """Find the step with the largest microbatch, and another step if its labels may outweigh tokens.

    Args:
        session: Session on fake tensors.
        processes: Number of processes that share the rows of a step. The result is for one process.
    """
    settings, feed = session.config.train, session.feed
    causal_batcher = feed.batcher if isinstance(feed.batcher, CausalMicroBatcher) else None
    causal_batcher = None if isinstance(feed, StoredPrompts) else causal_batcher
    total = session.total_steps
    if feed.store is not None:
        # Stored features are computed only in the first epoch.
        total = min(total, -(-len(session.data.train) // settings.batch_size))
    steps = range(0, total, max(1, -(-total // MAX_SEARCHED_STEPS)))
    laid_out_steps = set(steps[:: max(1, -(-len(steps) // MAX_LAID_OUT_STEPS))])
    all_shapes, head_row_counts, tiles = set[tuple[int, int]](), set[int](), set[TileShape]()
    microbatches: list[tuple[int, int, tuple[int, int]]] = []
    limit, long, other_tokens = *_long_row_limit(session), 0

    def shares_of(step: int) -> list[Sequence[Any]]:
        rows = session.planned_rows(step)
        if processes == 1:
            return [rows]
        return [[rows[index] for index in indices] for indices in distribute_rows(rows, processes, share=feed.share)]

    def rows_of(location: tuple[int, int]) -> Sequence[Any]:
        return shares_of(location[0])[location[1]]

    for step in steps:
        for process, rows in enumerate(shares_of(step)):
            if not rows:
                continue
            shapes = feed.shapes(rows)
            all_shapes.update(shapes)
            head_row_counts.update(feed.batcher.head_rows(rows, shapes))
            if long:
                short = [length for length in map(_row_length, rows) if length <= limit]
                other_tokens = max(other_tokens, min(limit, len(short) * max(short, default=0)))
            labels = [0] * len(shapes) if causal_batcher is None else causal_batcher.labels(rows)
            if (cached := session.objective.cached_passes(shapes)) is not None:
                tokens = sum(c * n for c, n in shapes[:cached]) + max(c * n for c, n in shapes)
                microbatches.append((tokens, 0, (step, process)))
                continue
            counts = zip(shapes, labels, strict=True)
            microbatches += [(c * n, num_labels, (step, process)) for (c, n), num_labels in counts]
            if step in laid_out_steps:
                tiles |= _tile_shapes(session, rows)
    largest = max(microbatches)
    labeled: Sequence[Any] = ()
    if causal_batcher is not None and feed.store is None:
        weight = _weight_function(session)
        heavy = max(microbatches, key=weight)
        if weight(heavy) > 1.01 * weight(largest):
            labeled = rows_of(heavy[2])
    # The first rows of a large evaluation contain its typical shapes.
    sets = () if session.feed.generates_rows else session.data.sets.values()
    held_out = [row for rows in sets for row in rows[:MAX_BUFFERED_ROWS]]
    evaluated = (set(feed.shapes(held_out)), _tile_shapes(session, held_out)) if held_out else (set(), set())
    heads = head_row_counts, set(feed.batcher.head_rows(held_out, list(evaluated[0]))) if held_out else set()
    heaviest = rows_of(largest[2])
    if session.feed.generates_rows and not labeled:
        labeled = _fullest_batch(session, heaviest)
    limit -= session.method.virtual_tokens
    long_rows = (limit, long, other_tokens) if long else ()
    sizes, held_out_sizes = feed.shapes(heaviest), evaluated[0]
    return HeaviestStep(heaviest, sizes, all_shapes, held_out_sizes, heads, labeled, tiles, evaluated[1], long_rows)


def _fullest_batch(session: Session, rows: Sequence[Any]) -> Sequence[Any]:
    """Return the maximum-length completions that fill a microbatch best, or an empty sequence if these are all rows.

    Shorter or fewer completions can have any number of tokens, and so fill a microbatch better than all rows.
    """

    def largest(count: int) -> int:
        return max(token_counts(session.feed.shapes(rows[:count])))

    best = max(range(1, len(rows) + 1), key=lambda count: (largest(count), count))
    return () if best == len(rows) else rows[:best]


def _long_row_limit(session: Session) -> tuple[int, int]:
    """Return a length limit that only exceptionally long training rows exceed, and the number of these rows.

    At most a share of :data:`LONG_ROW_SHARE` of the rows exceeds it. A row that fits into a default microbatch does not
    count.
    """
    rows = session.data.train
    max_long_rows = int(LONG_ROW_SHARE * len(rows))
    if not max_long_rows or session.task.tokenizer is None:
        return 0, 0
    lengths = np.array([_row_length(row) for row in rows]) if isinstance(rows[0], RowGroup) else lengths_of(rows)
    limit = -(-int(np.partition(lengths, -max_long_rows - 1)[-max_long_rows - 1]) // 64) * 64
    device = str(session.model.device)
    limit = max(limit, choose_tokens_per_pass(session.config.train.tokens_per_pass, limit, device).value)
    return limit, int((lengths > limit).sum())


def _row_length(row: Any) -> int:
    """Return the number of tokens of a row, or of the longest row of a group."""
    return max(map(len, row.rows)) if isinstance(row, RowGroup) else len(row)


def _weight_function(session: Session) -> Callable[[tuple[int, int, Any]], float]:
    """Return a function that estimates the bytes for the tokens and labels of a microbatch."""
    config = session.model.config.get_text_config()
    size = session.model.dtype.itemsize
    vectors = 1 if session.config.train.checkpointing else STORED_VECTORS
    blocks, width = (getattr(config, name, 0) or 0 for name in ("num_hidden_layers", "hidden_size"))
    token, label = vectors * blocks * width * size, config.vocab_size * (LOGIT_COPIES + size)
    max_labels = session.objective.chunk
    return lambda candidate: float(candidate[0] * token + min(candidate[1], max_labels) * label)


def _tile_shapes(session: Session, rows: Sequence[Any]) -> set[TileShape]:
    """Shapes of attention's tiles in the microbatches of these rows."""
    if not isinstance(session.batcher, CausalMicroBatcher):
        return set()
    return {shape for layout in session.batcher.layouts(rows) for shape in _tiles_of(session, layout)}


def _tiles_of(session: Session, layout: Layout) -> set[TileShape]:
    window = getattr(session.model.config.get_text_config(), "sliding_window", None)
    tile_batches = (batch for width in {None, window} for batch in layout.tiles(width).batches)
    return {(batch.count, batch.queries, batch.keys.shape[1]) for batch in tile_batches}


class PeakBatcher(Batcher):
    """Batcher that yields only the microbatches of a step that determine its peak memory.

    These are the smallest, which leaves gradients behind, and then the largest. The first step only allocates the
    optimizer state and has the smallest microbatch only. A third step has the microbatches of ``labeled`` rows, with
    the one with the most labels as the largest.

    Attributes:
        tokens: Tokens of the microbatches in the second step.
        num_batches: Number of microbatches in all steps.
        sizes: Different microbatch sizes in tokens.
        rows: Different row counts of a head.
        tiles: Different attention tile shapes.
    """

    def __init__(self, session: Session, labeled: Sequence[Any] = ()) -> None:
        self._session, self._inner, self._labeled = session, session.feed, labeled
        self._steps = self.tokens = self.num_batches = 0
        self.sizes, self.rows, self.tiles = set[int](), set[int](), set[TileShape]()

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        return self._inner.shapes(rows)

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        self._steps += 1
        rows, batcher = self._labeled if self._steps > DRY_RUN_STEPS else rows, self._inner.batcher
        shapes = self._inner.shapes(rows)
        weights = sizes = [count * length for count, length in shapes]
        if self._steps > DRY_RUN_STEPS and isinstance(batcher, CausalMicroBatcher):
            weight, labels = _weight_function(self._session), batcher.labels(rows)
            weights = [int(weight((size, count, 0))) for size, count in zip(sizes, labels, strict=True)]
        smallest, largest = sizes.index(min(sizes)), len(sizes) - 1 - weights[::-1].index(max(weights))
        if self._steps == 1:
            largest = smallest
        selected = {smallest, largest}
        # The step computes these before its first microbatch and stores them for the backward pass.
        selected |= set(range(self._session.objective.cached_passes(shapes) or 0))
        if self._steps <= DRY_RUN_STEPS:
            self.tokens = sum(sizes[number] for number in selected)
        self.sizes.update(sizes[number] for number in (smallest, largest))
        head_rows = batcher.head_rows(rows, shapes)
        self.rows.update(head_rows[number] for number in (smallest, largest))
        self.num_batches += len(selected)
        last_batch = None
        for number, batch in enumerate(self._inner.batches(rows)):
            if number == largest and number != smallest and smallest > largest:
                last_batch = batch  # run it last, when gradients are allocated
            elif number in selected or number >= len(sizes):
                yield self._record(batch)
        if last_batch is not None:
            yield self._record(last_batch)

    def _record(self, batch: Any) -> Any:
        layout = getattr(batch, "inputs", {}).get("packed_layout")
        if isinstance(layout, Layout):
            self.tiles |= _tiles_of(self._session, layout)
        return batch


def longest_rows(session: Session) -> Sequence[Any]:
    """Return the longest rows that are computed without a gradient, enough to fill two microbatches.

    These are the held-out rows. The base model also computes the training rows if the loss has a reference model.
    """
    has_reference = getattr(getattr(session.task, "settings", None), "has_reference", False)
    computed = session.data.all_rows if has_reference else concat_rows(*session.data.sets.values())
    batch_tokens = session.batcher.tokens_per_pass
    total, rows = 0, []
    for index in np.argsort(-lengths_of(computed), kind="stable").tolist():
        rows.append(computed[index])
        total += sum(token_counts(session.batcher.shapes(rows[-1:])))
        if total >= 2 * batch_tokens:
            break
    return rows


def _weighted_count(trained: set[Any], evaluated: set[Any]) -> float:
    return len(trained) + len(evaluated - trained) / 3


def token_counts(shapes: Iterable[tuple[int, int]]) -> set[int]:
    """Return the number of tokens of each microbatch, which determines the shapes of matrix products."""
    return {rows * length for rows, length in shapes}


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


class WeightsTooLargeError(UserError):
    """The weights of a model exceed the memory of this machine."""


@dataclass
class FakeModel:
    """Model of a run on fake tensors, before its method is applied.

    Attributes:
        model: Model, quantized if the precision requires it.
        dtype: Data type of the loaded weights.
        kernels: Chosen kernels, or None on another device than the CPU.
        new_modules: Names of modules that the model's files do not contain.
        total_parameters: Number of parameters.
        device: Device of the run.
    """

    model: PreTrainedModel
    dtype: str
    kernels: KernelChoice | None
    new_modules: Sequence[str]
    total_parameters: int
    device: str

    @classmethod
    def of(cls, config: RunConfig, task: Task[Any], data: RunData) -> FakeModel:
        """Build the model. Sets the number of threads and activates the kernels of the run.

        Raises:
            UserError: if the model's files lack a head that the task needs.
        """
        threads = choose_threads(config.threads).value
        torch.set_num_threads(threads)  # workspace sizes of some operators depend on it
        device = choose_device(config.device).value
        dtype = choose_precision(device, config.precision).value
        name, code, outputs = config.model, config.trust_remote_code, task.num_outputs(data)
        stored = loading_precision(device, dtype)
        with fake_tensors():
            model = skeleton(name, dtype=stored, task=config.task, num_labels=outputs, trust_remote_code=code)
        require_head(model, name, config.task, dtype=dtype, trust_remote_code=code)
        kernels = activate_kernels(model.config, threads) if device == "cpu" else None
        total = count_logical_parameters(model)
        with fake_tensors():
            library = bitsandbytes_precision(model.config) or (config.precision if device != "cpu" else None)
            if library in QUANTIZED:
                quantize_with_bitsandbytes(model.base_model, library, device, SimulatedLinear)
            elif config.precision == "int8":
                quantize_int8(model.base_model)
            elif config.precision == "nf4":
                quantize_nf4(model.base_model)
        added = new_modules(model, name, dtype=dtype, trust_remote_code=code) if task.trains_head else []
        return cls(model, dtype, kernels, added, total, device)

    def require_memory(self, config: RunConfig, processes: int) -> None:
        """Reject weights that exceed the memory of this machine, because a dry run of a large model takes minutes.

        ``force`` and runs whose weights are elsewhere, on a device or sharded over processes, are not checked.

        Raises:
            WeightsTooLargeError: if the weights alone exceed the memory.
        """
        is_sharded = processes > 1 and config.train.sharding == "base"
        size, limit = sum(weight.nbytes for weight in self.model.parameters()), memory_limit_bytes().value
        if size <= limit or config.force or is_sharded or self.device != "cpu":
            return
        message = f"the model does not fit: its {self.total_parameters / 1e9:,.1f} billion parameters need"
        message += f" {size / 1e9:,.1f} GB in {self.dtype}, and this machine has {limit / 1e9:,.1f} GB of memory"
        hint = "choose a smaller model"
        if self.dtype not in QUANTIZED and self.total_parameters * NF4_BYTES < limit:
            hint += f", or set precision: nf4, which needs about {self.total_parameters * NF4_BYTES / 1e9:,.1f} GB"
        raise WeightsTooLargeError(message, location="model", hint=f"{hint}; see docs/goals/little-memory.md")

    def assemble(self, config: RunConfig, task: Task[Any], data: RunData) -> Session:
        """Return the run's session. Call it inside :func:`fake_tensors`."""
        candidates = () if self.kernels is None else self.kernels.approximations
        options = {"device": with_index(self.device), "new_modules": self.new_modules, "candidates": candidates}
        return assemble(config, task, data, self.model, **options)  # type: ignore[arg-type]


def with_time(plan: Plan, config: RunConfig, task: Task[Any], data: RunData) -> Plan:
    """Return the plan with the predicted time of the run.

    The times of the model's blocks are measured if they are not cached. This takes a few seconds. Times are only
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
    usage, fake = cpu_usage(), FakeModel.of(config, task, data)
    with fake_tensors():
        session = fake.assemble(config, task, data)
        with session.running():  # fused blocks are recognized on the complete model
            pass
    return measure(session, usage)


def _compute_plan(config: RunConfig, task: Task[Any], data: RunData, process_bytes: int | None, processes: int) -> Plan:
    """Compute the plan of a process with a dry run."""
    name, code = config.model, config.trust_remote_code
    fakes = [FakeModel.of(config, task, data)]
    fakes[0].require_memory(config, processes)
    model, dtype, total, device = fakes[0].model, fakes[0].dtype, fakes[0].total_parameters, fakes[0].device
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
    with fake_tensors():
        trained = sum(p.numel() for _, p in dry_run.session.method.parameters(model))
    converted = converted_bytes(model, name, dtype=dtype, trust_remote_code=code)
    folder = config_folder(name, dtype, code)
    decoder_bytes, rollout_bytes = generation_bytes(dry_run.session)
    workload, time_uncertain = dict[str, object](), ""
    try:
        workload = workload_of(dry_run.session, data.read_seconds).as_dict() if is_cpu else {}
    except Exception as error:  # a third-party task can raise any error
        time_uncertain = _unknown_time(error)
    parts = OtherBytes(
        kernels=dry_run.kernel_bytes() if is_cpu else 0,
        features=(0 if store is None else store.resident_bytes) + task.input_bytes(),
        reading=data.read_peak_bytes + task.prepare_bytes(),
        mapped=converted + MOVED_AT_ONCE,
        saving=0 if task.tokenizer is None else saving_bytes(folder),
        unread=unread_bytes(dry_run.session, dtype=dtype, converted=converted),
        decoder=decoder_bytes,
        rollouts=rollout_bytes,
    )
    block_bytes, disk_bytes = _block_bytes(model), 0 if store is None else store.shape.bytes
    heaviest, operations, operators = dry_run.heaviest, dry_run.operations, dry_run.operators
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
        block_bytes=block_bytes,
        workload=workload,
        time_uncertain=time_uncertain if is_cpu else f"not predicted on {device}",
    )
    if not heaviest.long:
        return plan
    limit, long, tokens = heaviest.long
    return plan.without_long_rows(limit, long, len(data.train), tokens)


def _block_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Return the weight bytes of all blocks and of the largest block, or 0 if the model has no list of blocks."""
    blocks = blocks_of(model)
    if blocks is None:
        return 0, 0
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks[1]]
    return sum(sizes), max(sizes)


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
        heaviest, batcher = self.heaviest, self.batcher
        varying = [(batcher.sizes, heaviest.token_counts), (batcher.rows, heaviest.row_counts)]
        lengths = len({length for _, length in heaviest.all_shapes})
        tiles = max(1.0, heaviest.tile_shapes / max(1, len(batcher.tiles)))
        repeats = self.session.total_steps * len(heaviest.shapes) / max(1, batcher.num_batches)
        return kernel_bytes(self.work, varying=varying, lengths=lengths, tiles=tiles, repeats=repeats)


def _dry_run(session: Session, processes: int) -> _DryRun:
    """Run the heaviest steps of the most loaded process, an evaluation of the longest rows, and a drift measurement."""
    heaviest = heaviest_step(session, processes)
    trim_memory()  # as before the first step of a run
    batcher, marks = PeakBatcher(session, heaviest.labeled), [(0, 0)]
    meter = DriftMeter(session)
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
        rows, steps = heaviest.rows, DRY_RUN_STEPS + bool(heaviest.labeled)
        session.train(callback, rows=rows, batcher=batcher, batch_size=len(rows), total_steps=steps)
    if not session.feed.generates_rows and (longest := longest_rows(session)):
        with session.running():
            evaluate_rows(session, longest)
    with contextlib.suppress(NoGeneralAnswers):  # the run does not measure drift in this case
        meter.measure()
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
) -> dict[str, Plan]:
    """Return the plan of each method on the same model and rows.

    Args:
        config: Settings of the run.
        task: Training task.
        data: Rows.
        methods: Methods to plan.
        on_error: Receives methods that do not fit, with the error.
        processes: Number of processes.
    """
    plans: dict[str, Plan] = {}
    for method in methods:
        try:
            # A plan increases the memory of the process. Use the value before the first one.
            process_bytes = next((plan.resident["process"] for plan in plans.values()), None)
            settings = config.model_copy(update={"method": method})
            new_plan = plan_run(settings, task, data, process_bytes=process_bytes, processes=processes)
            plans[method] = with_time(new_plan, settings, task, data) if method == config.method else new_plan
        except UserError as error:
            if method == config.method:
                raise
            on_error(method, error)
        except Exception as error:  # a third-party model can raise any error on fake tensors
            if method == config.method:
                raise _dry_run_error(error) from error
            on_error(method, _dry_run_error(error))
    return plans


def _dry_run_error(error: Exception) -> UserError:
    message = f"no plan: the model cannot be run on fake tensors ({type(error).__name__}: {str(error)[:100]})"
    return UserError(message, location="the plan", hint="train it anyway: deltaw train then runs without a plan")


def evaluate_rows(session: Session, rows: Sequence[Any]) -> None:
    """Compute an evaluation of these rows without the metrics, which need values."""
    task, objective = session.task, session.objective
    with session.method.evaluating(session.model), torch.no_grad():
        for batch in session.feed.batches(rows):
            task.evaluate_batch(objective, batch)
