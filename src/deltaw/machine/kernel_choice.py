"""Which kernels compute the products of a model, and how: chosen by what was measured on this machine.

How weights are stored is the user's choice (``precision``); how they are multiplied is chosen here, for each
stored type: a variant of the kernels, one of its arithmetics, or torch's own product. Rates are remembered by
all that they depend on. ``DELTAW_KERNELS`` narrows what is chosen from.

Knows rates; nothing of models beyond the sizes of their products, and nothing of runs.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import torch

from deltaw.cache import recall, remember, versions
from deltaw.kernels import loader, variants
from deltaw.kernels.arithmetic import APPROXIMATIONS, STORED, TORCH, Arithmetic
from deltaw.kernels.processor import second_level_cache
from deltaw.machine import product_rates
from deltaw.machine.processor import processor_flags, processor_name
from deltaw.machine.product_rates import GENERIC, Candidate, Measured, Rates, Sizes, believable, sizes_of

# Torch's product must be so much faster, since what surrounds it is not computed in one call then; and a
# variant of lower rank so much faster than one that has all of its instructions.
MARGIN_OF_TORCH, MARGIN_OF_VARIANT = 1.05, 1.1
# Logits and gradients in int8 must be so much faster than in bf16: what surrounds them takes a while, too.
MARGIN_OF_INT8 = 1.1
# Another precision is mentioned where its products would take at most this share of the time.
WORTH_MENTIONING = 0.7
# The variables that steer the libraries that torch computes with.
STEERING = ("ATEN_", "DNNL_", "KMP_", "MKL_", "OMP_", "ONEDNN_")
# What products of a precision are stored in.
STORED_BY_PRECISION = {"fp32": "fp32", "bf16": "bf16", "int8": "int8", "gguf": "bf16", "nf4": "bf16"}


@dataclass(frozen=True)
class KernelChoice:
    """How the products of a model are computed on this machine, and the rates that decided it.

    Attributes:
        arithmetic: what was chosen; nothing in it is approximate. sizes, threads: what was timed, and on how
            many threads.
        rates: GFLOP/s (of int8 GOP/s) by stored type and candidate; a candidate is ``torch`` or
            ``variant:arithmetic``.
        disturbed: whether other programs kept the machine busy meanwhile.
    """

    arithmetic: Arithmetic
    sizes: Sizes
    threads: int
    rates: Rates
    disturbed: bool = False

    @property
    def approximations(self) -> tuple[str, ...]:
        """What a training would compute faster approximately, once it verified that: in int8 instead of bf16
        where that is clearly faster, and a head's gradient from sums; without what the environment leaves
        out."""
        ways = self.arithmetic
        if ways.kernels is None:
            return ()
        int8 = ways.int8 != TORCH and self.rate("int8") > MARGIN_OF_INT8 * self.rate("bf16")
        faster = {"int8_gradients": int8 and ways.bf16 != TORCH, "int8_logits": int8, "summed_classes": True}
        return tuple(name for name in APPROXIMATIONS if faster[name] and variants.is_left_in(name))

    def rate(self, stored: str) -> float:
        """GFLOP/s of products with weights stored so, as they are computed."""
        way = self.arithmetic.of(stored)
        name = TORCH if way == TORCH else f"{self.arithmetic.kernels}:{way}"
        return self.rates[stored][name]

    def value(self, precision: str) -> str:
        """What was chosen for a run in ``precision``, in a few words."""
        stored = STORED_BY_PRECISION.get(precision, "fp32")
        return f"{self.arithmetic.kernels or 'none'}, {stored} products {self.arithmetic.of(stored)}"

    def why(self, precision: str) -> str:
        """The rates that decided it, the chosen first."""
        stored = STORED_BY_PRECISION.get(precision, "fp32")
        unit = "GOP/s" if stored == "int8" else "GFLOP/s"
        ordered = sorted(self.rates[stored].items(), key=lambda pair: -pair[1])
        named = [(name.removeprefix(f"{self.arithmetic.kernels}:"), rate) for name, rate in ordered]
        others = ", ".join(f"{name} {rate:.0f}" for name, rate in named if name != self.arithmetic.of(stored))
        busy = "measured while the machine was busy" if self.disturbed else ""
        return "; ".join(filter(None, [f"{self.rate(stored):.0f} {unit}", others, busy, variants.asked().said]))

    def faster_precision(self, precision: str) -> str | None:
        """What to tell a user whose products would be much faster in another precision; None where none
        is."""
        stored = STORED_BY_PRECISION.get(precision)
        if stored is None:
            return None
        shares = {other: self.rate(stored) / self.rate(other) for other in STORED if other != stored}
        best = min(shares, key=lambda other: shares[other])
        if shares[best] > WORTH_MENTIONING:
            return None
        instead = f"{self.rate(best):.0f} instead of {self.rate(stored):.0f} G operations a second"
        return f"precision: {best} would take about {100 * shares[best]:.0f} % of the time of products ({instead})"


def settle_kernels(config: object, threads: int | None = None) -> KernelChoice:
    """Choose for a model with this configuration, and compute so in this process from now on.

    Args:
        config: transformers' ``PretrainedConfig``.

    Raises:
        UserError: ``DELTAW_KERNELS`` asks for what cannot run here.
    """
    choice = choose_kernels(sizes_of(config), threads)
    loader.compute_with(choice.arithmetic)
    return choice


def choose_kernels(sizes: Sizes = GENERIC, threads: int | None = None) -> KernelChoice:
    """How to compute products of these sizes; measured where it is not remembered.

    Args:
        threads: that compute; None is torch's present number.

    Raises:
        UserError: ``DELTAW_KERNELS`` asks for what cannot run here.
    """
    threads = torch.get_num_threads() if threads is None else threads
    candidates = product_rates.candidates()
    measured = _measured(sizes, threads, candidates)
    chosen = chosen_of(measured.rates, candidates)
    return KernelChoice(chosen, sizes, threads, measured.rates, measured.disturbed)


def computed_on(device: torch.device) -> dict[str, str]:
    """What decides how the numbers of a forward on a device are rounded, besides versions: stored results of
    it are found again by this."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return loader.arithmetic().as_dict() if device.type == "cpu" else {"device": device.type}


def chosen_of(rates: Rates, candidates: Sequence[Candidate]) -> Arithmetic:
    """The fastest arithmetic of each stored type within the fastest variant.

    Args:
        candidates: variants of higher rank first.
    """
    names = list(dict.fromkeys(c.kernels for c in candidates if c.kernels is not None))
    if not names:
        return Arithmetic()
    best = names[0]
    for name in names[1:]:
        if _overall(rates, name) > MARGIN_OF_VARIANT * _overall(rates, best):
            best = name
    ways: dict[str, str] = {}
    for stored in STORED:
        compiled = _of_variant(rates[stored], best)
        way = max(compiled, key=lambda way: compiled[way], default=TORCH)
        by_torch = rates[stored].get(TORCH, 0.0)
        ways[stored] = TORCH if by_torch > MARGIN_OF_TORCH * compiled.get(way, 0.0) else way
    return Arithmetic(best).but(ways)


def _measured(sizes: Sizes, threads: int, candidates: Sequence[Candidate]) -> Measured:
    """The candidates' rates: as they are known on this machine, or new."""
    told = _of_any(product_rates.for_any(), candidates)
    if told is not None:
        return told
    key = _key(sizes, threads, candidates)
    found = _read(product_rates.known(key, lambda kept: _read(kept, candidates) is not None), candidates)
    if found is None:
        found = product_rates.measure(sizes, threads)
        # What was measured beside other programs serves this process and its children.
        kept = {"rates": found.rates, "disturbed": found.disturbed}
        product_rates.keep(key, kept, lasting=not found.disturbed)
    return found


def _key(sizes: Sizes, threads: int, candidates: Sequence[Candidate]) -> list[object]:
    """All that the rates depend on."""
    names = sorted({c.kernels for c in candidates if c.kernels is not None})
    return [
        processor_name(),
        sorted(processor_flags()),
        second_level_cache(),
        threads,
        versions(("torch", "deltaw.machine.product_rates")),
        _libraries(tuple(names)),
        [f"{c.stored} {c.name}" for c in candidates],
        list(astuple(sizes)),
        # What steers torch's own products.
        sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(STEERING)),
    ]


@functools.cache
def _libraries(names: tuple[str, ...]) -> list[list[str]]:
    """The variants with a hash of what was built."""
    files = {v.name: variants.file_of(v) for v in variants.every_variant() if v.name in names}
    return [[n, hashlib.blake2b(files[n].read_bytes(), digest_size=16).hexdigest()] for n in names]


def _read(values: object, candidates: Sequence[Candidate]) -> Measured | None:
    """Measurements as they are kept; None where these are none, or not of these candidates."""
    if not isinstance(values, Mapping):
        return None
    rates = believable(values.get("rates"), candidates)
    return None if rates is None else Measured(rates, values.get("disturbed") is True)


def _of_any(values: object, candidates: Sequence[Candidate]) -> Measured | None:
    """Rates by stored type and arithmetic, as those of candidates; None where they are not that."""
    if not isinstance(values, Mapping) or not all(isinstance(values.get(stored), Mapping) for stored in STORED):
        return None
    rates: dict[str, dict[str, object]] = {stored: {} for stored in STORED}
    for candidate in candidates:
        rates[candidate.stored][candidate.name] = values[candidate.stored].get(candidate.way, 0.1)
    return _read({"rates": rates}, candidates)


def _of_variant(rates: Mapping[str, float], kernels: str) -> dict[str, float]:
    """The rates of a variant's own arithmetics."""
    own = f"{kernels}:"
    return {name.removeprefix(own): rate for name, rate in rates.items() if name.startswith(own)}


def _overall(rates: Rates, kernels: str) -> float:
    """The geometric mean of a variant's best rates over the stored types."""
    best = [max(_of_variant(rates[stored], kernels).values(), default=1e-3) for stored in STORED]
    return math.exp(sum(map(math.log, best)) / len(best))


# Rates for planning: matrix products, and an operator that hardly computes. Good for the order of settings by their
# time, and no promise of seconds.


MADE_BY = ("torch", "deltaw.machine.kernel_choice")


@dataclass(frozen=True)
class PlanningRates:
    """Floating-point operations a second in matrix products, and seconds that any operator takes."""

    operations_per_second: float
    seconds_per_operator: float


def measured_rates(precision: str) -> PlanningRates:
    """The rates of this machine with torch's present number of threads, and the arithmetic chosen for it.

    Args:
        precision: one of :data:`deltaw.machine.choices.PRECISIONS`; its weights are those of most products.
    """
    stored = STORED_BY_PRECISION.get(precision, "fp32")
    return PlanningRates(choose_kernels().rate(stored) * 1e9, _seconds_per_operator())


def _seconds_per_operator() -> float:
    key = [processor_name(), sorted(processor_flags()), torch.get_num_threads()]
    known = recall("rates", key, MADE_BY)
    if isinstance(known, float) and known > 0:
        return known
    few = torch.ones(16)
    seconds = product_rates.fastest(lambda: few.add(1.0), trials=5, repeats=20)
    remember("rates", key, seconds, MADE_BY)
    return seconds
