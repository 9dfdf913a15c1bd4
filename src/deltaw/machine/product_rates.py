"""Measure the speed of matrix products on this processor with each kernel variant and arithmetic, and with torch.

Two products with a model's sizes are timed, each with a low-rank update: an MLP layer forward and an attention
projection backward.

Weights rotate through a set larger than the L2 cache. Candidates are timed in alternation. The fastest time of each
counts, because other load only adds time. A measurement takes about 0.3 s.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deltaw.cache.results import load_result, result_digest, store_result
from deltaw.kernels import linear, loader, quantize
from deltaw.kernels.arithmetic import TORCH, WEIGHT_TYPES, Arithmetic, supported_arithmetics
from deltaw.kernels.processor import second_level_cache
from deltaw.kernels.torch_private import without_dispatch
from deltaw.kernels.variants import MEASURED, best_of_each_family, kernel_overrides
from deltaw.progress import track_progress

# Rates are cached on disk and passed between parent and child processes, so that all processes of an experiment choose
# the same kernels even if the cache folder is not writable.


KIND = "products"
# Wildcard key: rates stored under it in the environment variable apply to every cache key.
ANY_KEY = "*"

# Cache key and value that this process uses, and values measured by other processes. Both by hash of the cache key.
_used: dict[str, tuple[object, object]] = {}
_imported_rates: dict[str, object] = {}


def forced_rates() -> object:
    """Return the rates that the environment variable sets for every cache key, or None."""
    return _environment_rates().get(ANY_KEY)


def lookup(key: object, usable: Callable[[object], bool]) -> object | None:
    """Return the first usable value for ``key``.

    Sources in order: values that this process already uses, the environment variable, other processes, the disk cache.

    Args:
        key: Cache key, JSON-serializable.
        usable: Returns False for a value that must be ignored.

    Returns:
        The value, or None if no usable value exists.
    """
    name = _name(key)
    if name not in _used or not usable(_used[name][1]):
        shared = (v for v in (_environment_rates().get(name), _imported_rates.get(name)) if v is not None and usable(v))
        value = next(shared, None) or load_result(KIND, key)
        if value is None or not usable(value):
            return None
        _used[name] = (key, value)
    return _used[name][1]


def store(key: object, value: object, persistent: bool) -> None:
    """Use a value for ``key`` in this process and its children.

    Args:
        key: Cache key, JSON-serializable.
        value: JSON-serializable value.
        persistent: Also cache the value on disk for later processes.
    """
    _used[_name(key)] = (key, value)
    if persistent:
        store_result(KIND, key, value)


def used_rates() -> dict[str, object]:
    """Return the JSON-serializable rates that this process uses, for :func:`import_rates` in another process."""
    return {name: value for name, (_, value) in _used.items()}


def import_rates(rates: object) -> None:
    """Add rates of another process. They are passed to child processes that start later."""
    if isinstance(rates, Mapping):
        _imported_rates.update(rates)


def child_environment() -> dict[str, str]:
    """Return environment variables that cause a child process to make the same choices as this process."""
    rates = {**_environment_rates(), **_imported_rates, **used_rates()}
    return {MEASURED: json.dumps(rates)} if rates else {}


def provenance() -> list[list[object]]:
    """Return [kind, key, digest] of each cached result that the choices of this process are based on. The digest is
    None if the result is not stored on disk.
    """
    return [[KIND, key, result_digest(KIND, key)] for key, _ in _used.values()]


def _environment_rates() -> Mapping[str, object]:
    """Return the rates in this process's environment."""
    text = os.environ.get(MEASURED, "")
    try:
        rates = json.loads(text) if text else {}
    except ValueError:
        return {}
    return rates if isinstance(rates, Mapping) else {}


def _name(key: object) -> str:
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()


# Rank of the low-rank update, rows of a full product, and rows of a probe that rules out slow candidates.
RANK = 16
ROWS = 512
PROBE_ROWS = 16
# Time limit of a measurement, and target time of one product.
SECONDS = 0.28
SECONDS_PER_PRODUCT = 1e-3
# Rounds before slow candidates are dropped, and maximum number of rounds.
MIN_ROUNDS = 3
MAX_ROUNDS = 8
# A candidate slower than the best of its type by this factor is dropped, after the probe or after full products.
PROBE_SLOW_FACTOR = 8.0
SLOW_FACTOR = 1.8
# Maximum ratio of the second fastest to the fastest time in an undisturbed measurement.
STEADY_RATIO = 1.15
# Size of the L2 cache in bytes if the system does not report it.
_CACHE = 2 << 20
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}

# GFLOP/s (GOP/s for int8) by storage type and candidate.
Rates = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model's products.

    Attributes:
        hidden: Size of the hidden state.
        mlp: Size of the MLP's intermediate activations.
        attention: Output size of the query projection.
    """

    hidden: int
    mlp: int
    attention: int


@dataclass(frozen=True)
class Candidate:
    """A way to compute products with weights of one storage type.

    Attributes:
        weight_type: Storage type of the weights.
        kernels: Name of the kernel variant, or None without compiled kernels.
        arithmetic_name: Name of the arithmetic.
    """

    weight_type: str
    kernels: str | None
    arithmetic_name: str

    @property
    def name(self) -> str:
        return TORCH if self.arithmetic_name == TORCH else f"{self.kernels}:{self.arithmetic_name}"

    def arithmetic(self) -> Arithmetic:
        """Return the process's arithmetic while this candidate is timed."""
        changes = {self.weight_type: self.arithmetic_name}
        return Arithmetic() if self.kernels is None else Arithmetic(self.kernels).replace(changes)


def candidates() -> list[Candidate]:
    """Return all candidates on this machine that ``DELTAW_KERNELS`` permits.

    Raises:
        UserError: if ``DELTAW_KERNELS`` forces kernels that cannot run on this machine.
    """
    result: list[Candidate] = []
    forced = kernel_overrides()
    names = candidate_variants()
    for weight_type in WEIGHT_TYPES:
        by_variant = {n: supported_arithmetics(loader.open_variant(n).library, weight_type) for n in names}
        options = [Candidate(weight_type, name, kind) for name, kinds in by_variant.items() for kind in kinds]
        if forced.kernels is None or forced.arithmetic == TORCH or not names:
            # If kernels are requested by name, torch is not a candidate unless its arithmetic is requested too.
            options.append(Candidate(weight_type, names[0] if names else None, TORCH))
        result += [c for c in options if c.arithmetic_name == forced.arithmetic] or options
    return result


def candidate_variants() -> list[str]:
    """Return the kernel variants to time: the best of each family, or the generic one if no other can run."""
    forced = loader.variant()  # raises UserError for kernels that cannot run
    if forced is None:
        return []
    if kernel_overrides().kernels is not None:
        return [forced]
    return [variant.name for variant in best_of_each_family(loader.usable_variants())]


@dataclass(frozen=True)
class ProductRates:
    """Result of a measurement.

    Attributes:
        rates: GFLOP/s by storage type and candidate.
        disturbed: True if other programs used the machine.
    """

    rates: Rates
    disturbed: bool


class _Disturbed(Exception):
    """Other programs keep the machine too busy to finish a measurement in time."""


@track_progress("measuring matrix product rates")
def measure(sizes: Sizes, threads: int) -> ProductRates:
    """Measure the rates of all candidates with this number of threads.

    A candidate that is dropped after the probe gets the rate measured in the probe. If other programs delay the
    threads, one thread's CPU time is measured instead, and its rate is multiplied by the number of threads.
    """
    try:
        with _measurement_context(threads), loader.temporary_arithmetic():
            trials = _time_candidates(sizes, time.thread_time if threads == 1 else time.perf_counter)
            # The result counts as undisturbed if the best candidate of each type was.
            return ProductRates(_rates(trials), disturbed=not all(t.is_steady() for t in _best(trials).values()))
    except _Disturbed:
        with _measurement_context(1), loader.temporary_arithmetic():
            trials = _time_candidates(sizes, time.thread_time)
            return ProductRates(_rates(trials, threads), disturbed=True)
    finally:
        loader.release_scratch()


def _time_candidates(sizes: Sizes, clock: Callable[[], float]) -> list[_Trial]:
    """Time all candidates in alternation.

    Raises:
        _Disturbed: if the time limit is far exceeded before each candidate was timed a few times. Never with one
            thread.
    """
    deadline = time.perf_counter() + SECONDS
    single_threaded = torch.get_num_threads() == 1

    def time_round(timed: list[_Trial], num_rows: int) -> None:
        for trial in timed:
            if not single_threaded and time.perf_counter() > deadline + SECONDS / 2:
                raise _Disturbed
            trial.time(num_rows, clock)

    rows, trials = _trials(sizes, candidates())
    for _ in range(MIN_ROUNDS):
        time_round(trials, PROBE_ROWS)
    remaining = _competitive(trials, PROBE_ROWS, PROBE_SLOW_FACTOR)
    time_round(remaining, rows)  # warm-up: libraries build code for a shape at its first use
    for trial in remaining:
        trial.timings[rows].clear()
    for count in range(1, MAX_ROUNDS + 1):
        time_round(remaining[::-1] if count % 2 else remaining, rows)
        if count == MIN_ROUNDS:
            remaining = _competitive(remaining, rows, SLOW_FACTOR)
        if count >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
    return trials


def _rates(trials: list[_Trial], num_threads: int = 1) -> Rates:
    """Return the rates of trials, multiplied by ``num_threads`` if one thread was timed."""
    rates: Rates = {weight_type: {} for weight_type in WEIGHT_TYPES}
    for trial in trials:
        rates[trial.candidate.weight_type][trial.candidate.name] = round(num_threads * trial.rate(), 1)
    return rates


class _Operands:
    """Inputs and several copies of a weight. Together, the copies are larger than a core's L2 cache."""

    def __init__(self, weight_type: str, outputs: int, inputs: int, generator: torch.Generator) -> None:
        dtype = _DTYPES[weight_type]
        self.outputs = outputs
        self.inputs = inputs
        self.dtype = dtype
        weight = torch.rand(outputs, inputs, generator=generator).sub_(0.5)
        self.scale = None
        if weight_type == "int8":
            weight, self.scale = quantize.quantize_rows(weight)
        else:
            weight = weight.to(dtype)
        copies = max(2, -(-2 * (second_level_cache() or _CACHE) // (weight.numel() * weight.element_size())))
        self.weights = weight.repeat(copies, 1, 1)
        self.lora_A = torch.zeros(inputs, RANK)
        self.lora_B = torch.zeros(RANK, outputs)
        self.operands = {width: torch.rand(ROWS, width, generator=generator).to(dtype) for width in (inputs, outputs)}
        self._next = 0

    def product(self) -> linear.LinearProduct:
        self._next = (self._next + 1) % len(self.weights)
        return linear.LinearProduct(self.weights[self._next], scale=self.scale, lora_A=self.lora_A, lora_B=self.lora_B)

    def forward(self, rows: int) -> None:
        linear.linear(self.operands[self.inputs][:rows], self.product())

    def backward(self, rows: int) -> None:
        linear.linear_backward(self.operands[self.outputs][:rows], self.product())


class _Trial:
    """A candidate with its products and their measured times.

    Attributes:
        candidate: Candidate that is timed.
        products: For each product, a function that computes it for a number of rows, and its number of weights.
        timings: Seconds of each product in each round, by number of rows.
    """

    def __init__(self, candidate: Candidate, products: list[tuple[Callable[[int], None], int]]) -> None:
        self.candidate = candidate
        self.products = products
        self.timings: dict[int, list[list[float]]] = {}

    def time(self, rows: int, clock: Callable[[], float]) -> None:
        loader.use_arithmetic(self.candidate.arithmetic())
        seconds = []
        for product, _ in self.products:
            start = clock()
            product(rows)
            seconds.append(clock() - start)
        self.timings.setdefault(rows, []).append(seconds)

    def rate(self, rows: int | None = None) -> float:
        """Return the GFLOP/s of the fastest times with this number of rows, by default the largest that was timed."""
        rows = max(self.timings) if rows is None else rows
        work = sum(2 * rows * size for _, size in self.products)
        return work / max(sum(map(min, zip(*self.timings[rows], strict=True))), 1e-9) / 1e9

    def is_steady(self) -> bool:
        """True if the two fastest times of each product are close to each other."""
        rounds = self.timings[max(self.timings)]
        two_fastest = [sorted(seconds)[:2] for seconds in zip(*rounds, strict=True)]
        return len(rounds) > 1 and all(second <= first * STEADY_RATIO for first, second in two_fastest)


def _best(trials: Iterable[_Trial], rows: int | None = None) -> dict[str, _Trial]:
    """Return the fastest trial of each storage type."""
    return {trial.candidate.weight_type: trial for trial in sorted(trials, key=lambda trial: trial.rate(rows))}


def _competitive(trials: list[_Trial], rows: int, factor: float) -> list[_Trial]:
    """Return the trials that are at most ``factor`` times slower than the best of their type."""
    best = _best(trials, rows)
    return [t for t in trials if t.rate(rows) * factor >= best[t.candidate.weight_type].rate(rows)]


def _trials(sizes: Sizes, all_candidates: list[Candidate]) -> tuple[int, list[_Trial]]:
    """Return the number of rows, and a trial per candidate with products that take about ``SECONDS_PER_PRODUCT``."""
    generator = torch.Generator().manual_seed(0)
    operand = torch.ones(256, 256)
    max_multiply_adds = 256**3 / fastest_time(lambda: operand @ operand, MIN_ROUNDS) * SECONDS_PER_PRODUCT
    # Reduce the outputs first if a product would take too long, then the rows.
    outputs = int(min(max(max_multiply_adds / ROWS / sizes.hidden // 64 * 64, 256), 1 << 16))
    rows = int(min(max(max_multiply_adds / outputs / sizes.hidden // 64 * 64, 64), ROWS))
    by_type: dict[str, list[tuple[Callable[[int], None], int]]] = {}
    for weight_type in WEIGHT_TYPES:
        widths = (min(_padded_size(size), outputs) for size in (sizes.mlp, sizes.attention))
        mlp, attention = (_Operands(weight_type, width, _padded_size(sizes.hidden), generator) for width in widths)
        weight_counts = (mlp.outputs * mlp.inputs, attention.outputs * attention.inputs)
        by_type[weight_type] = list(zip((mlp.forward, attention.backward), weight_counts, strict=True))
    return rows, [_Trial(candidate, by_type[candidate.weight_type]) for candidate in all_candidates]


def fastest_time(call: Callable[[], object], trials: int, repeats: int = 1) -> float:
    """Return the fastest measured time of one call, in seconds, after one warm-up call.

    The minimum is used because other load only adds time.

    Args:
        call: Function to time.
        trials: Number of measurements.
        repeats: Number of calls per measurement.
    """
    call()
    seconds = []
    for _ in range(trials):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        seconds.append(time.perf_counter() - start)
    return min(seconds) / repeats


def _padded_size(size: int) -> int:
    """Round a size up to a multiple of 32, which every kernel supports, and to at least 64."""
    return max(64, -(-size // 32) * 32)


@contextlib.contextmanager
def _measurement_context(threads: int) -> Iterator[None]:
    """Disable dispatch modes (such as fake tensors) and gradients, and set the number of threads, for a measurement."""
    original_threads = torch.get_num_threads()
    with without_dispatch(), torch.no_grad(), contextlib.ExitStack() as stack:
        if threads != original_threads:
            stack.callback(torch.set_num_threads, original_threads)
            torch.set_num_threads(threads)
        yield


def sizes_of(config: object) -> Sizes:
    """Return the product sizes of a model with this configuration.

    Sizes that the configuration lacks get the usual value, for example an MLP of 4 times the hidden size.

    Args:
        config: transformers' ``PretrainedConfig``.
    """
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "is_heterogeneous", False):
        text = text.per_layer_config[-1]  # layers have different heads
    hidden = _number(text, "hidden_size", "d_model", "n_embd") or GENERIC.hidden
    mlp = _number(text, "intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size") or 4 * hidden
    heads = _number(text, "num_attention_heads")
    size = _number(text, "head_dim")
    return Sizes(hidden, mlp, heads * size if heads and size else hidden)


# Sizes of a small language model, used if no model is given.
GENERIC = Sizes(hidden=1024, mlp=4096, attention=1024)


def _number(config: object, *names: str) -> int | None:
    """Return the first of these attributes that is a positive integer. A list with a value per layer counts as its
    maximum.
    """
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
            value = max(value)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def valid_rates(rates: object, candidate_list: Iterable[Candidate]) -> Rates | None:
    """Return ``rates`` as floats if they belong to exactly these candidates and are plausible, else None."""
    candidate_list = list(candidate_list)
    names = {w: {candidate.name for candidate in candidate_list if candidate.weight_type == w} for w in WEIGHT_TYPES}
    if not isinstance(rates, Mapping) or set(rates) != set(names):
        return None
    for weight_type, expected in names.items():
        measured = rates[weight_type]
        valid = isinstance(measured, Mapping) and set(measured) == expected
        if not valid or not all(isinstance(rate, int | float) and 0 < rate < 1e7 for rate in measured.values()):
            return None
    return {key: {name: float(rate) for name, rate in measured.items()} for key, measured in rates.items()}
