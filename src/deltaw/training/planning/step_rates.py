"""Measure the time of a training step on a few blocks of the model with random weights.

A session on fake tensors has the model with its method, rows and batches as in the run. One block of each kind, and all
modules outside of the blocks, get random weights. The other blocks are skipped. Then microbatches of the run are
computed, and the times of the blocks are multiplied by their numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, replace
from typing import Any, TypeAlias

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from deltaw.data.example import Example, rows_of
from deltaw.kernels import loader
from deltaw.kernels.processor import processor_flags, processor_name
from deltaw.kernels.torch_modules import direct_buffers, direct_parameters
from deltaw.kernels.torch_private import in_backward
from deltaw.machine.kernel_choice import planning_rates
from deltaw.runtime.block_roles import forward_replaced
from deltaw.runtime.layer_entry import frozen_level
from deltaw.runtime.recognition import blocks_of
from deltaw.runtime.signatures import signature
from deltaw.tensor_files import has_values
from deltaw.training.approximations import Approximations, applicable
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.evaluation.general import MAX_ANSWER_TOKENS, NoGeneralAnswers, check_size
from deltaw.training.evaluation.general_prompts import DRIFT_PROMPTS
from deltaw.training.feed import Feed
from deltaw.training.monitoring.best import PROMPT_TOKENS, default_eval_every, evaluated_rows
from deltaw.training.monitoring.generation import answer_limit, is_checked, prompts_of
from deltaw.training.monitoring.monitor import evaluates_base
from deltaw.training.monitoring.samples import MAX_SAMPLE_TOKENS, MIN_SAMPLE_TOKENS, SAMPLES
from deltaw.training.optimizer import clipped_norm
from deltaw.training.planning.run_time import BUSY_REASON, Generation, Microbatches, MicrobatchTime, StepRates, Workload
from deltaw.training.reducer import SINGLE_PROCESS
from deltaw.training.session import Session
from deltaw.training.state import TrainOptions, TrainState
from deltaw.training.task import Rows

# Maximum number of steps whose microbatches are counted, evenly spaced over the run.
MAX_COUNTED_STEPS = 50
# Sizes of the measured microbatches, relative to the largest one of the first steps, and the number of these steps.
MEASURED_SHARES = (0.25, 0.6, 1.0)
MEASURED_STEPS = 4
# Maximum number of rows that these microbatches are selected from.
MAX_CANDIDATE_ROWS = 128
# Time limit of all measurements in seconds, and of the products of one head.
SECONDS = 2.8
HEAD_SECONDS = 0.3
# Number of measurements of each microbatch. It increases until the time limit.
NUM_TRIALS = 2
MAX_TRIALS = 4
# Maximum ratio of the two fastest times in an undisturbed measurement, and maximum number of CPUs in use elsewhere.
STEADY_RATIO = 1.25
MAX_OTHER_CPUS = 0.25
# Weights are filled with copies of this number of random values. An embedding is filled up to this number of values.
NUM_RANDOM = 1 << 20
MAX_FILLED = 1 << 24
# Time of starting this process and importing libraries, limited because a notebook computes before it imports deltaw.
START_SECONDS = min(15.0, time.process_time())
# Tokens of the measured decoding step, and bytes that are larger than the caches of a CPU.
DECODED_TOKENS = 64
CACHE_BYTES = 64 << 20


# Time, CPU seconds of all processes, and CPU seconds of this process.
CpuUsage: TypeAlias = tuple[float, float, float]


def workload_of(session: Session, read_seconds: float) -> Workload:
    """Return the work of a run from a session on fake tensors.

    Args:
        session: Session on fake tensors.
        read_seconds: Measured time of reading the rows.
    """
    feed = session.feed
    train = session.config.train
    total = session.total_steps
    steps = range(0, total, max(1, -(-total // MAX_COUNTED_STEPS)))
    evaluations = _num_evaluations(session)
    general = len(DRIFT_PROMPTS) * _is_enabled(session, train.drift)
    has_reference = getattr(getattr(session.task, "settings", None), "has_reference", False)
    models = 2 if session.start is None else 4  # the base model and the adapter, also before training with start_from
    drift_tokens = models * general * (PROMPT_TOKENS + MAX_ANSWER_TOKENS)
    per_pass = session.batcher.tokens_per_pass
    full_steps = total if feed.store is None else min(total, -(-len(session.data.train) // train.batch_size))
    return Workload(
        key=_rates_key(session),
        steps=tuple(_batches_of(session, session.planned_rows(step), is_step=True) for step in steps),
        total_steps=total,
        full_steps=full_steps,
        evaluated=_batches_of(session, *([] if feed.generates_rows else evaluated_rows(session))),
        evaluations=evaluations,
        reference=_batches_of(session, session.data.all_rows) if has_reference else Microbatches(),
        drift=Microbatches((per_pass,) * -(-drift_tokens // per_pass), models * general * MAX_ANSWER_TOKENS),
        has_check=bool(applicable(session.model, session.objective, session.approximations.names)),
        general_tokens=PROMPT_TOKENS + MAX_ANSWER_TOKENS if train.keep_general else 0,
        generations=tuple(_generations(session, evaluations, general)),
        read_seconds=read_seconds,
        start_seconds=START_SECONDS,
        uncertain="the lengths of generated texts are unknown" if feed.generates_rows else "",
    )


def num_labels(rows: Rows) -> int:
    """Return the number of labels of rows. Rows without token labels count as one label."""
    return sum(int(getattr(row, "label_count", 1)) for row in rows)


def _batches_of(session: Session, *parts: Rows, is_step: bool = False) -> Microbatches:
    shapes = [shape for rows in parts if len(rows) for shape in session.feed.shapes(rows)]
    sizes = tuple(int(count * length) for count, length in shapes)
    cached = session.objective.cached_passes(shapes) if is_step else None
    return Microbatches(sizes, sum(map(num_labels, parts)), () if cached is None else sizes[cached:])


def _num_evaluations(session: Session) -> int:
    """Return the number of evaluations, including those of the base model and of the last step."""
    train = session.config.train
    total = session.total_steps
    if not session.data.held_out:
        return 0
    every = train.eval_every
    if every is None and (train.early_stopping is not None or train.saved_adapter == "best"):
        every = default_eval_every(total, train.batch_size, sum(map(len, evaluated_rows(session)))).value
    return ((total - 1) // every if every else 0) + 1 + evaluates_base(session) + (train.saved_adapter == "best")


def _is_enabled(session: Session, setting: bool | int | str) -> bool:
    """Return True if texts are generated with this value of ``train.drift`` or ``train.samples``."""
    if setting is False or not session.task.generates_text:
        return False
    with contextlib.suppress(NoGeneralAnswers):
        if setting == "auto":
            check_size(session.model)
        return True
    return False


def _generations(session: Session, evaluations: int, general: int) -> Iterator[Generation]:
    """Yield the texts that a run generates: rollouts, scored answers, samples, and general answers."""
    train = session.config.train
    limits = session.generation_limits
    num_rows = len(session.data.held_out)
    count = SAMPLES if train.samples == "auto" else int(train.samples)
    max_new_tokens = limits.max_new_tokens
    first_rows = (rows_of(row)[0] for row in session.data.held_out[: max(count, train.eval_answers)])
    longest = max((len(row) - getattr(row, "prompt_length", 0) for row in first_rows), default=0)
    rounds = -(-session.total_steps // session.feed.steps_per_round)
    completions = limits.completions_per_row
    samples = min(count, num_rows) * _is_enabled(session, train.samples)
    prompts = prompts_of(session) if is_checked(session) and _is_enabled(session, "auto") else []
    for texts, tokens, times, phase in (
        (train.batch_size * completions, max_new_tokens, rounds, "training"),
        (-(-limits.evaluation_tokens // max(1, max_new_tokens)), max_new_tokens, evaluations, "evaluating"),
        (min(train.eval_answers, num_rows), longest, evaluations, "evaluating"),
        (samples, min(MAX_SAMPLE_TOKENS, max(MIN_SAMPLE_TOKENS, 2 * longest)), max(1, evaluations), "evaluating"),
        (general, MAX_ANSWER_TOKENS, 1, "measuring"),
        (len(prompts), answer_limit(session, prompts), 2, "measuring"),
    ):
        if texts and tokens:
            yield Generation(texts, tokens, times, phase)


def _rates_key(session: Session) -> str:
    """Return the cache key of the rates: machine, blocks, trained parameters, objective, and length of the rows."""
    model = session.model
    config = session.config
    length = np.log2(np.mean([len(row) for row in session.planned_rows(0)] or [1]) + 1)
    machine = processor_name(), sorted(processor_flags()), torch.get_num_threads(), loader.arithmetic().as_dict()
    batching = type(session.objective), type(session.batcher), session.batcher.padded, session.feed.share, round(length)
    blocks = blocks_of(model)
    prefix = "" if blocks is None else f"{blocks[0]}."
    outside = [p for name, p in model.named_parameters() if not (prefix and prefix in name)]
    tensors = [(tuple(p.shape), p.dtype, p.requires_grad) for p in outside]
    run = config.task, config.precision, session.approximations.names, type(model), block_kinds(session), tensors
    return hashlib.blake2b(repr((machine, batching, run)).encode(), digest_size=16).hexdigest()


def _frozen_blocks(session: Session, count: int) -> int:
    """Return the number of lowest blocks without a backward pass."""
    level = frozen_level(session.model, [p for _, p in session.trainable_parameters])
    return 0 if level is None else count if level.kind == "head" else level.index


def block_kinds(session: Session) -> list[str]:
    """Return the kind of each block. Blocks of one kind take the same time.

    A kind consists of the code, the parameters, the layer type, and ``training``, which is True for checkpointed blocks
    only. The last block computes only labels. The lowest trained block needs no gradient of its input, and blocks below
    it have no backward pass.
    """
    block_list = blocks_of(session.model)
    blocks = [] if block_list is None else list(block_list[1])
    lowest = _frozen_blocks(session, len(blocks))
    types = [*(getattr(session.model.config.get_text_config(), "layer_types", None) or []), *[""] * len(blocks)]
    kinds = []
    for index, block in enumerate(blocks):
        parameters = [(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in block.named_parameters()]
        position = index == len(blocks) - 1, index == lowest, index < lowest
        text = repr((signature(block), parameters, position, types[index], block.training))
        kinds.append(hashlib.blake2b(text.encode(), digest_size=8).hexdigest())
    return kinds


class _Timer:
    """Times the forward and backward passes of blocks.

    Args:
        clock: Returns the time in seconds.
        cache: Tensor that is written before each measured block, so that the weights are read from memory. In a run
            they are evicted from the cache by those of other blocks.

    Attributes:
        forward: Seconds of the forward pass by block index.
        backward: Seconds of the backward pass by block index.
    """

    def __init__(self, clock: Callable[[], float], cache: Tensor) -> None:
        self.clock = clock
        self._cache = cache
        self._evicting = 0.0
        self._form: int | None = None  # length of the tuple that a block returns, if not a tensor
        self.clear()

    def clear(self) -> None:
        self.forward: dict[int, float] = {}
        self.backward: dict[int, float] = {}
        self._marks: list[tuple[float, int | None]] = []
        self._evicting = 0.0

    @property
    def total(self) -> float:
        """Seconds of all passes and of the evictions between them."""
        return sum(self.forward.values()) + sum(self.backward.values()) + self._evicting

    def _evict(self) -> None:
        start = self.clock()
        self._cache.add_(1)
        self._evicting += self.clock() - start

    def end_backward(self) -> None:
        """Add the times of a backward pass. A mark starts that of a block, or ends it if it has no index."""
        for (start, index), (end, _) in itertools.pairwise([*self._marks, (self.clock(), None)]):
            if index is not None:
                self.backward[index] = self.backward.get(index, 0.0) + end - start
        self._marks = []

    def timed(self, index: int, forward: Callable[..., Any], *, is_first: bool) -> Callable[..., Any]:
        """Return the forward function of a block with timing."""

        def mark(marked: int | None) -> None:
            self._marks.append((self.clock(), None))
            if marked is not None:
                self._evict()
                self._marks.append((self.clock(), marked))

        def run(*args: Any, **kwargs: Any) -> Any:
            if in_backward():  # recomputation counts as backward pass
                return forward(*args, **kwargs)
            self._evict()
            start = self.clock()
            output = forward(*args, **kwargs)
            self.forward[index] = self.forward.get(index, 0.0) + self.clock() - start
            self._form = len(output) if isinstance(output, tuple) else None
            hidden = _hidden(args, kwargs)
            first = output[0] if isinstance(output, tuple) else output
            if is_first and torch.is_grad_enabled() and hidden.requires_grad:
                hidden.register_hook(lambda _: mark(None))
            if torch.is_grad_enabled() and first.requires_grad:
                first.register_hook(lambda _: mark(index))
            return output

        return run

    def skip(self, *args: Any, **kwargs: Any) -> Any:
        """Return the input of a block in the form of its output."""
        hidden = _hidden(args, kwargs)
        return hidden if self._form is None else (hidden, *[None] * (self._form - 1))


def _hidden(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def fill_with_random_values(model: nn.Module, skipped: Sequence[nn.Module]) -> None:
    """Replace the fake tensors of a model by random ones, and those of skipped modules by empty ones."""
    noise = torch.randn(NUM_RANDOM, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    empty = {id(part) for module in skipped for part in module.modules()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {
        id(getattr(head, "weight", 0))
    }
    replaced: dict[int, tuple[Tensor, Tensor]] = {}  # fake and real tensors by id of the fake one

    def fill(value: Tensor, name: str, num_values: int | None) -> None:
        if value.dim() < 2 and value.is_floating_point():
            value.fill_(1.0 if name == "weight" else 0.001)
        elif value.dtype in (torch.uint8, torch.bool):
            value.fill_(0x11)  # a small scale in each format of blocks
        else:
            factor = 1.0 if value.is_floating_point() else 1000.0
            for part in value.view(-1)[:num_values].split(NUM_RANDOM):
                part.copy_(noise[: len(part)] * factor)

    def real(tensor: Tensor, name: str, is_empty: bool) -> Tensor:
        if id(tensor) not in replaced:
            value = torch.empty((0,) if is_empty else tensor.shape, dtype=tensor.dtype)
            fill(value, name, MAX_FILLED if id(tensor) in embeddings else None)
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, tensor.requires_grad)
            replaced[id(tensor)] = tensor, value
        return replaced[id(tensor)][1]

    for module in model.modules():
        for table in (direct_parameters(module), direct_buffers(module), vars(module)):
            for name, tensor in table.items():
                if isinstance(tensor, Tensor) and not has_values(tensor):
                    table[name] = real(tensor, name, id(module) in empty)  # type: ignore[assignment]


def _real_parameters(parameters: Iterable[nn.Parameter]) -> Iterator[nn.Parameter]:
    """Yield the parameters. Some methods train copies, which are fake here: they are replaced by zeros up to a size."""
    num_values = 0
    for parameter in parameters:
        if has_values(parameter):
            yield parameter
        elif num_values + parameter.numel() <= MAX_FILLED or not num_values:
            num_values += parameter.numel()
            yield nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype))


class _Measurement:
    """Computes microbatches with one block of each kind.

    Args:
        session: Session on fake tensors, whose model cannot be used for a dry run afterwards.
        clock: Returns the time in seconds.
    """

    def __init__(self, session: Session, clock: Callable[[], float]) -> None:
        self.session = session
        block_list = blocks_of(session.model)
        kinds = block_kinds(session)
        self.blocks = [] if block_list is None else list(block_list[1])
        self.representatives = [kinds.index(kind) for kind in kinds]
        self.upper = range(_frozen_blocks(session, len(kinds)), len(kinds))
        block_bytes = sum(p.numel() * p.element_size() for block in self.blocks for p in block.parameters())
        self.timer = _Timer(clock, torch.zeros(min(block_bytes, CACHE_BYTES), dtype=torch.uint8))
        num_trained = sum(p.numel() for _, p in session.trainable_parameters)
        measured = set(self.representatives)
        fill_with_random_values(session.model, [b for index, b in enumerate(self.blocks) if index not in measured])
        self.trained = list(_real_parameters(p for _, p in session.trainable_parameters if p.numel()))
        self.update_factor = num_trained / max(1, sum(p.numel() for p in self.trained))
        # The check of the run can reject int8 gradients. Then blocks are slower, so both are measured.
        names = session.approximations.names
        rejected = [Approximations(set(names) - {"int8_gradients"})] if "int8_gradients" in names else []
        self.variants = [session.approximations, *rejected]
        self.update = 0.0
        self.elapsed = 0.0
        self.num_updates = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Context in which the model computes microbatches with the measured blocks."""
        session = self.session
        measured = sorted(set(self.representatives))
        with torch.random.fork_rng(devices=[]), session.running(), contextlib.ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                timed = self.timer.timed(index, block.forward, is_first=index == measured[0])
                stack.enter_context(forward_replaced(block, timed if index in measured else self.timer.skip))
            with session.method.evaluating(session.model):
                self.objective = session.task.objective(session.model)  # that of the session refers to fake values
            self.feed = session.feed if session.feed.generates_rows else Feed(self.objective, session.batcher)
            self.feed.objective = self.objective
            options = TrainOptions(learning_rate=1e-6, total_steps=1)
            self.state = stack.enter_context(TrainState(self.trained, 1, options))
            yield

    def block_seconds(self, times: dict[int, float], indices: Sequence[int] | None = None) -> float:
        """Return the seconds of these blocks, by default all, from the times of the measured blocks."""
        indices = range(len(self.blocks)) if indices is None else indices
        return sum(times.get(self.representatives[index], 0.0) for index in indices)

    def train(self, rows: Rows) -> MicrobatchTime:
        """Compute the gradients of rows with each variant of the approximations, and return the mean times."""
        start = self.timer.clock()
        points = []
        for variant in self.variants:
            with variant.on():
                points.append(self._train(rows))
        self.elapsed = self.timer.clock() - start
        return MicrobatchTime(*(statistics.fmean(values) for values in zip(*map(astuple, points), strict=True)))

    def _train(self, rows: Rows) -> MicrobatchTime:
        timer = self.timer
        objective = self.objective
        tokens = 0
        count = 0
        timer.clear()
        if objective.accumulator is not None:
            objective.accumulator.clear()
        start = timer.clock()
        units = max(1, objective.units(rows))
        objective.start_step(rows, self.feed, SINGLE_PROCESS)
        for batch in self.feed.batches(rows):
            (objective(batch) / units).backward()
            timer.end_backward()
            tokens = tokens + batch.tokens
            count = count + 1
        end = timer.clock()
        if self.num_updates < NUM_TRIALS:  # the first update allocates the optimizer's state
            for parameter in self.state.trained:  # methods that train copies lose their hooks on fake parameters
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            updating = timer.clock()
            clipped_norm(self.state.trained, 1.0)
            self.state.update()
            self.update = (timer.clock() - updating) * self.update_factor
            self.num_updates += 1
        self.state.abandon_step()
        forward = timer.forward
        backward = timer.backward
        blocks = self.block_seconds(forward) + self.block_seconds(backward)
        upper = self.block_seconds(forward, self.upper) + self.block_seconds(backward, self.upper)
        values = num_labels(rows), blocks, self.block_seconds(forward), upper, max(0.0, end - start - timer.total)
        return MicrobatchTime(tokens / count, *(value / count for value in values))

    @torch.no_grad()
    def evaluate(self, batches: Callable[[], Iterator[Any]], compute: Callable[[Any], object]) -> tuple[float, float]:
        """Return the minimum seconds of a microbatch without gradients: all blocks, and the rest."""
        seconds = []
        timer = self.timer
        with self.session.method.evaluating(self.session.model):
            for _ in range(NUM_TRIALS):
                timer.clear()
                start = timer.clock()
                count = 0
                for count, batch in enumerate(batches(), 1):  # noqa: B007 - the number of microbatches
                    compute(batch)
                rest = timer.clock() - start - timer.total
                seconds.append((self.block_seconds(timer.forward) / count, rest / count))
        return min(seconds, key=sum)


def measure(
    session: Session, usage: CpuUsage, *, clock: Callable[[], float] = time.perf_counter, limit: float = SECONDS
) -> StepRates:
    """Measure the rates of a session on fake tensors, whose model cannot be used for a dry run afterwards.

    Args:
        session: Session on fake tensors, outside of the context of fake tensors.
        usage: CPU usage before the session was created. If other processes use the CPU, one thread's CPU time is
            measured and divided by the number of threads.
        clock: Returns the time in seconds.
        limit: Time limit in seconds. Larger microbatches are not measured if they would exceed it.
    """
    threads = torch.get_num_threads()
    is_busy = other_cpus(usage) > MAX_OTHER_CPUS
    if is_busy and clock is time.perf_counter:
        limit /= threads

        def thread_share() -> float:
            return time.thread_time() / threads

        clock = thread_share
    measurement = _Measurement(session, clock)
    trials = list[tuple[Rows, list[MicrobatchTime]]]()
    usage = cpu_usage()
    deadline = clock() + limit
    with measurement.running(), contextlib.ExitStack() as stack:
        if is_busy:
            stack.callback(torch.set_num_threads, threads)
            torch.set_num_threads(1)
        for rows in measured_rows(session):
            growth = _tokens(session, rows) / max(1.0, _tokens(session, trials[-1][0])) if trials else 0.0
            if clock() + NUM_TRIALS * measurement.elapsed * growth > deadline:
                break
            trials.append((rows, [measurement.train(rows) for _ in range(NUM_TRIALS)]))
        for rows, points in trials[::-1] * (MAX_TRIALS - NUM_TRIALS):
            if clock() + measurement.elapsed < deadline:
                points.append(measurement.train(rows))
        ordered = [sorted(points, key=lambda point: point.seconds) for _, points in trials]
        feed = measurement.feed
        last_rows = trials[-1][0]
        evaluate_rows = measurement.objective.evaluate_rows
        blocks, head = measurement.evaluate(lambda: feed.batches(last_rows), evaluate_rows)
        decode = 0.0
        if session.task.generates_text:
            tokens = np.arange(DECODED_TOKENS, dtype=np.int32) % 16 + 1
            example = Example(1, tokens, np.arange(DECODED_TOKENS) > 0, 1, None)
            logits = CausalObjective(session.model).evaluate_rows
            decode = sum(measurement.evaluate(lambda: session.batcher.batches([example]), logits))
    steady = all(second.seconds <= STEADY_RATIO * first.seconds for first, second, *_ in ordered)
    is_busy = is_busy or not steady or other_cpus(usage) > MAX_OTHER_CPUS
    return StepRates(
        tuple(sorted((points[0] for points in ordered), key=lambda point: point.tokens)),
        evaluation=blocks / max(1e-9, ordered[-1][0].forward),
        evaluation_head=head / max(1e-9, ordered[-1][0].head),
        update=measurement.update,
        decode=decode,
        decode_tokens=DECODED_TOKENS,
        uncertain=BUSY_REASON if is_busy else "",
    )


def _tokens(session: Session, rows: Rows) -> float:
    """Return the mean number of tokens of the microbatches of rows."""
    shapes = session.feed.shapes(rows)
    return sum(count * length for count, length in shapes) / max(1, len(shapes))


def measured_rows(session: Session) -> Iterator[Rows]:
    """Yield rows of a step that form microbatches of representative sizes, the smallest first."""
    steps = range(min(MEASURED_STEPS, session.total_steps))
    largest = max((session.planned_rows(step) for step in steps), key=lambda rows: _tokens(session, rows))
    target = max(count * length for count, length in session.feed.shapes(largest))
    previous = 0.0
    for share in MEASURED_SHARES:
        rows: list[Any] = []
        for row in largest[:MAX_CANDIDATE_ROWS]:
            shapes = session.feed.shapes([*rows, row])
            if not rows or (len(shapes) == 1 and shapes[0][0] * shapes[0][1] <= share * target * 1.02):
                rows.append(row)
        if (tokens := _tokens(session, rows)) > 1.1 * previous:
            yield limit_labels(session, rows)
            previous = tokens


def limit_labels(session: Session, rows: Rows) -> Rows:
    """Return rows with fewer labels if the head would take too long. Only rows of a language model are changed."""
    config = session.model.config.get_text_config()
    products = 4 * getattr(config, "vocab_size", 1) * getattr(config, "hidden_size", 1)
    max_labels = max(64, int(HEAD_SECONDS * planning_rates("bf16").operations_per_second / products))
    if num_labels(rows) <= max_labels or any(type(row) is not Example for row in rows):
        return rows
    per_row = max(1, max_labels // len(rows))
    return [replace(row, is_label=row.is_label & (np.cumsum(row.is_label) <= per_row)) for row in rows]


def cpu_usage() -> CpuUsage:
    """Return the time, the CPU seconds of all processes, and those of this process."""
    times = psutil.cpu_times()
    busy = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
    return time.monotonic(), busy, time.process_time()


def other_cpus(start: CpuUsage) -> float:
    """Return the mean number of CPUs that other processes have taken from this one since ``start``."""
    wall, busy, own = (after - before for before, after in zip(start, cpu_usage(), strict=True))
    spare = (os.cpu_count() or 1) - torch.get_num_threads()
    return max(0.0, (busy - own) / max(1e-3, wall) - spare)
