"""How fast each way of computing a product is on this processor, measured.

Two products of a model's sizes are timed, a wide one of its MLP forward and one of its attention's
projections backward, each with a low-rank update, by every variant of the kernels, every arithmetic that it
has, and torch. Weights come from a set larger than the second-level cache, candidates take turns, and the
fastest of a candidate's turns counts: what else the machine does only slows it down. The whole takes about
0.3 s.

Knows sizes and candidates; nothing of what is chosen from the rates.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from deltaw.cache import recall, remember, stamp
from deltaw.kernels import linear, loader, quantize
from deltaw.kernels.arithmetic import STORED, TORCH, Arithmetic, offered
from deltaw.kernels.processor import second_level_cache
from deltaw.kernels.torch_private import without_dispatch
from deltaw.kernels.variants import MEASURED, asked, best_of_families
from deltaw.working import working

# What was measured is remembered in the cache folder, and handed from process to process. A process that starts others
# tells them what it knows, and learns from them, so that all of an experiment choose alike, also where the cache folder
# cannot be written to.


KIND = "products"
# Among what a process is told, an entry that stands for every key.
ANY = "*"

# By a hash of the key: the key and what this process uses of it; and what other processes measured.
_used: dict[str, tuple[object, object]] = {}
_learned: dict[str, object] = {}


def for_any() -> object:
    """What the process was told to use for every key; None where it was told nothing of the kind."""
    return _told().get(ANY)


def known(key: object, usable: Callable[[object], bool]) -> object | None:
    """What is known for ``key``: used before in this process, told, learned, or remembered; None where
    nothing of it is ``usable``."""
    name = _name(key)
    if name not in _used or not usable(_used[name][1]):
        found = (value for value in (_told().get(name), _learned.get(name)) if value is not None and usable(value))
        value = next(found, None) or recall(KIND, key)
        if value is None or not usable(value):
            return None
        _used[name] = (key, value)
    return _used[name][1]


def keep(key: object, value: object, lasting: bool) -> None:
    """Use ``value``, which JSON can hold, for ``key`` in this process and its children; where ``lasting``, in
    later ones too."""
    _used[_name(key)] = (key, value)
    if lasting:
        remember(KIND, key, value)


def used() -> dict[str, object]:
    """What this process uses, ready for JSON; :func:`learn` takes it in another process."""
    return {name: value for name, (_, value) in _used.items()}


def learn(told: object) -> None:
    """Take what another process uses: what it starts later is told of it."""
    if isinstance(told, Mapping):
        _learned.update(told)


def for_children() -> dict[str, str]:
    """Variables of the environment with which a new process makes the same choices as this one."""
    told = {**_told(), **_learned, **used()}
    return {MEASURED: json.dumps(told)} if told else {}


def basis() -> list[list[object]]:
    """What the choices of this process rest on: kind and key of each remembered result, and its state."""
    return [[KIND, key, stamp(KIND, key)] for key, _ in _used.values()]


def _told() -> Mapping[str, object]:
    """What the process was started with."""
    text = os.environ.get(MEASURED, "")
    try:
        told = json.loads(text) if text else {}
    except ValueError:
        return {}
    return told if isinstance(told, Mapping) else {}


def _name(key: object) -> str:
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()


# Of a low-rank update, a microbatch of rows, and the few rows that show which candidates are hopeless.
RANK, ROWS, FEW_ROWS = 16, 512, 16
# Seconds that all of it may take, and that one product should take.
SECONDS, SECONDS_OF_PRODUCT = 0.28, 1e-3
# Rounds before any candidate is left out, and rounds that are enough.
LEAST_ROUNDS, MOST_ROUNDS = 3, 8
# A candidate so many times slower than the best of its type is not timed any further.
HOPELESS_WITH_FEW_ROWS, HOPELESS = 8.0, 1.8
# The fastest two turns of an undisturbed candidate are nearer to each other than that.
STEADY = 1.15
# Of a second-level cache where the system does not say.
_CACHE = 2 << 20
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}

# GFLOP/s (GOP/s of int8) by type of the stored weights and by candidate.
Rates = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model's products: of its hidden vectors, of an MLP's, and of an attention projection."""

    hidden: int
    mlp: int
    attention: int


@dataclass(frozen=True)
class Candidate:
    """A way to compute products with weights of one stored type."""

    stored: str
    kernels: str | None
    way: str

    @property
    def name(self) -> str:
        return TORCH if self.way == TORCH else f"{self.kernels}:{self.way}"

    def arithmetic(self) -> Arithmetic:
        """The process's arithmetic while this one is timed."""
        return Arithmetic() if self.kernels is None else Arithmetic(self.kernels).but({self.stored: self.way})


def candidates() -> list[Candidate]:
    """All that this machine can choose from, and that the user leaves open (``DELTAW_KERNELS``).

    Raises:
        UserError: what the user forces cannot run here.
    """
    found: list[Candidate] = []
    forced = asked()
    names = contenders()
    for stored in STORED:
        ways = {name: offered(loader.open_variant(name).library, stored) for name in names}
        of_type = [Candidate(stored, name, way) for name, own in ways.items() for way in own]
        if forced.kernels is None or forced.arithmetic == TORCH or not names:
            # Kernels that were asked for by name compute products too, unless these were left to torch by
            # name.
            of_type.append(Candidate(stored, names[0] if names else None, TORCH))
        found += [c for c in of_type if c.way == forced.arithmetic] or of_type
    return found


def contenders() -> list[str]:
    """The variants that are worth timing: the best of each family, the generic one where there is no
    other."""
    forced = loader.variant()  # refuses what cannot run
    if forced is None:
        return []
    if asked().kernels is not None:
        return [forced]
    return [variant.name for variant in best_of_families(loader.usable())]


@dataclass(frozen=True)
class Measured:
    """What was measured: GFLOP/s by stored type and candidate, and whether something else kept the machine
    busy."""

    rates: Rates
    disturbed: bool


class _Disturbed(Exception):
    """Something else keeps the machine so busy that nothing can be measured in time."""


@working("measuring how fast this machine multiplies")
def measure(sizes: Sizes, threads: int) -> Measured:
    """The rates of all candidates with so many threads.

    Candidates that are far from the best are given the rate that a few rows showed. Where other programs keep
    threads waiting for each other, the rates are those of one thread's own time, as often as there are
    threads.
    """
    try:
        with _undisturbed(threads), loader.computing():
            clock = time.thread_time if threads == 1 else time.perf_counter
            trials = _timed(sizes, clock)
            # Whether the best of each type was timed without being disturbed.
            return Measured(_rates(trials), disturbed=not all(trial.steady() for trial in _best(trials).values()))
    except _Disturbed:
        with _undisturbed(1), loader.computing():
            trials = _timed(sizes, time.thread_time)
            return Measured(_rates(trials, threads), disturbed=True)
    finally:
        loader.release_scratch()


def _timed(sizes: Sizes, clock: Callable[[], float]) -> list[_Trial]:
    """All candidates, timed in turns.

    Raises:
        _Disturbed: the time is over, by far, before each had a few turns of what one thread would do in it.
    """
    ends = time.perf_counter() + SECONDS
    alone = torch.get_num_threads() == 1

    def turns(of: list[_Trial], on: int) -> None:
        for trial in of:
            if not alone and time.perf_counter() > ends + SECONDS / 2:
                raise _Disturbed
            trial.time(on, clock)

    rows, trials = _trials(sizes, candidates())
    for _ in range(LEAST_ROUNDS):
        turns(trials, FEW_ROWS)
    left = _near(trials, FEW_ROWS, HOPELESS_WITH_FEW_ROWS)
    turns(left, rows)  # what libraries build for a shape is built now
    for trial in left:
        trial.turns[rows].clear()
    for count in range(1, MOST_ROUNDS + 1):
        turns(left[::-1] if count % 2 else left, rows)
        if count == LEAST_ROUNDS:
            left = _near(left, rows, HOPELESS)
        if count >= LEAST_ROUNDS and time.perf_counter() > ends:
            break
    return trials


def _rates(trials: list[_Trial], times: int = 1) -> Rates:
    rates: Rates = {stored: {} for stored in STORED}
    for trial in trials:
        rates[trial.candidate.stored][trial.candidate.name] = round(times * trial.rate(), 1)
    return rates


class _Operands:
    """Weights of one type in several copies, larger together than a core's second-level cache."""

    def __init__(self, stored: str, outputs: int, inputs: int, generator: torch.Generator) -> None:
        dtype = _DTYPES[stored]
        self.outputs, self.inputs, self.dtype = outputs, inputs, dtype
        weight = torch.rand(outputs, inputs, generator=generator).sub_(0.5)
        self.scale = None
        if stored == "int8":
            weight, self.scale = quantize.quantized_rows(weight)
        else:
            weight = weight.to(dtype)
        cache = second_level_cache() or _CACHE
        copies = max(2, -(-2 * cache // (weight.numel() * weight.element_size())))
        self.weights = weight.repeat(copies, 1, 1)
        self.lora_A, self.lora_B = torch.zeros(inputs, RANK), torch.zeros(RANK, outputs)
        self.left = {width: torch.rand(ROWS, width, generator=generator).to(dtype) for width in (inputs, outputs)}
        self._next = 0

    def product(self) -> linear.Product:
        self._next = (self._next + 1) % len(self.weights)
        return linear.Product(self.weights[self._next], scale=self.scale, lora_A=self.lora_A, lora_B=self.lora_B)

    def forward(self, rows: int) -> None:
        linear.linear(self.left[self.inputs][:rows], self.product())

    def backward(self, rows: int) -> None:
        linear.linear_backward(self.left[self.outputs][:rows], self.product())


class _Trial:
    """A candidate, the products that it is timed on, and the seconds of each product in each of its turns, by
    the number of rows."""

    def __init__(self, candidate: Candidate, products: list[tuple[Callable[[int], None], int]]) -> None:
        self.candidate, self.products = candidate, products
        self.turns: dict[int, list[list[float]]] = {}

    def time(self, rows: int, clock: Callable[[], float]) -> None:
        loader.compute_with(self.candidate.arithmetic())
        seconds = []
        for product, _ in self.products:
            began = clock()
            product(rows)
            seconds.append(clock() - began)
        self.turns.setdefault(rows, []).append(seconds)

    def rate(self, rows: int | None = None) -> float:
        """GFLOP/s in the fastest turns on so many rows, or on the most that it was timed on."""
        rows = max(self.turns) if rows is None else rows
        work = sum(2 * rows * size for _, size in self.products)
        return work / max(sum(map(min, zip(*self.turns[rows], strict=True))), 1e-9) / 1e9

    def steady(self) -> bool:
        """Whether the fastest two turns of each product are alike."""
        turns = self.turns[max(self.turns)]
        fastest = [sorted(seconds)[:2] for seconds in zip(*turns, strict=True)]
        return len(turns) > 1 and all(second <= first * STEADY for first, second in fastest)


def _best(trials: Iterable[_Trial], rows: int | None = None) -> dict[str, _Trial]:
    """The fastest of each stored type."""
    by_rate = sorted(trials, key=lambda trial: trial.rate(rows))
    return {trial.candidate.stored: trial for trial in by_rate}


def _near(trials: list[_Trial], rows: int, factor: float) -> list[_Trial]:
    """Those that are not ``factor`` times slower on so many rows than the best of their type."""
    best = _best(trials, rows)
    return [t for t in trials if t.rate(rows) * factor >= best[t.candidate.stored].rate(rows)]


def _trials(sizes: Sizes, of: list[Candidate]) -> tuple[int, list[_Trial]]:
    """How many rows a product gets, and all candidates with products that are short enough."""
    generator = torch.Generator().manual_seed(0)
    left = torch.ones(256, 256)
    numbers = 256**3 / fastest(lambda: left @ left, LEAST_ROUNDS) * SECONDS_OF_PRODUCT
    # Rows as they are, and fewer outputs where that would take too long; then fewer rows.
    outputs = int(min(max(numbers / ROWS / sizes.hidden // 64 * 64, 256), 1 << 16))
    rows = int(min(max(numbers / outputs / sizes.hidden // 64 * 64, 64), ROWS))
    by_type: dict[str, list[tuple[Callable[[int], None], int]]] = {}
    for stored in STORED:
        widths = (min(_whole(size), outputs) for size in (sizes.mlp, sizes.attention))
        mlp, attention = (_Operands(stored, width, _whole(sizes.hidden), generator) for width in widths)
        sizes_of_both = (mlp.outputs * mlp.inputs, attention.outputs * attention.inputs)
        by_type[stored] = list(zip((mlp.forward, attention.backward), sizes_of_both, strict=True))
    return rows, [_Trial(candidate, by_type[candidate.stored]) for candidate in of]


def fastest(use: Callable[[], object], trials: int, repeats: int = 1) -> float:
    """Seconds of one use, in the fastest of some trials: what else the machine does only slows it down."""
    use()
    seconds = []
    for _ in range(trials):
        began = time.perf_counter()
        for _ in range(repeats):
            use()
        seconds.append(time.perf_counter() - began)
    return min(seconds) / repeats


def _whole(size: int) -> int:
    """A size that every kernel takes, of a product that is more than a call."""
    return max(64, -(-size // 32) * 32)


@contextlib.contextmanager
def _undisturbed(threads: int) -> Iterator[None]:
    """Real tensors, no gradients, and so many threads, whatever the caller is in the middle of."""
    before = torch.get_num_threads()
    with without_dispatch(), torch.no_grad(), contextlib.ExitStack() as stack:
        if threads != before:
            stack.callback(torch.set_num_threads, before)
            torch.set_num_threads(threads)
        yield


def sizes_of(config: object) -> Sizes:
    """The sizes of the products of a model with this configuration (transformers' ``PretrainedConfig``).

    A size that it does not name is the usual one: an MLP of 4 times the hidden size.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = _number(text, "hidden_size", "d_model", "n_embd") or GENERIC.hidden
    mlp = _number(text, "intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size") or 4 * hidden
    heads, size = _number(text, "num_attention_heads"), _number(text, "head_dim")
    return Sizes(hidden, mlp, heads * size if heads and size else hidden)


# Of a small language model, where no model is at hand.
GENERIC = Sizes(hidden=1024, mlp=4096, attention=1024)


def _number(config: object, *names: str) -> int | None:
    """The first of these attributes that is a size; of one for each layer the largest."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
            value = max(value)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def believable(rates: object, of: Iterable[Candidate]) -> Rates | None:
    """``rates`` if they are those of just these candidates, and numbers that a processor can reach."""
    of = list(of)
    names = {stored: {candidate.name for candidate in of if candidate.stored == stored} for stored in STORED}
    if not isinstance(rates, Mapping) or set(rates) != set(names):
        return None
    for stored, expected in names.items():
        found = rates[stored]
        right = isinstance(found, Mapping) and set(found) == expected
        if not right or not all(isinstance(rate, int | float) and 0 < rate < 1e7 for rate in found.values()):
            return None
    return {stored: {name: float(rate) for name, rate in found.items()} for stored, found in rates.items()}
