"""Choose the kernels that compute a model's products from rates measured on this machine.

``precision`` sets the storage type of the weights. This module chooses, for each storage type, a kernel variant and one
of its arithmetics, or torch's product. Rates are cached with everything that they depend on. ``DELTAW_KERNELS``
restricts the candidates.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import torch

from deltaw.cache.keys import versions
from deltaw.cache.results import load_result, store_result
from deltaw.kernels import loader, variants
from deltaw.kernels.arithmetic import APPROXIMATIONS, TORCH, WEIGHT_TYPES, Arithmetic
from deltaw.kernels.processor import processor_flags, processor_name, second_level_cache
from deltaw.machine import product_rates
from deltaw.machine.product_rates import GENERIC, Candidate, ProductRates, Rates, Sizes, sizes_of, valid_rates

# TORCH_MARGIN: minimum speedup of torch's product over a kernel, since it cannot be fused with other operations.
# VARIANT_MARGIN: minimum speedup of a variant over one of higher rank, which has all of its instructions.
TORCH_MARGIN = 1.05
VARIANT_MARGIN = 1.1
# Minimum speedup over bf16 at which logits and gradients in int8 are offered, to cover the cost of quantizing.
INT8_MARGIN = 1.1
# Another precision is suggested if its products take at most this share of the time.
FASTER_PRECISION_RATIO = 0.7
# Prefixes of the environment variables that configure the math libraries of torch.
LIBRARY_VARIABLES = ("ATEN_", "DNNL_", "KMP_", "MKL_", "OMP_", "ONEDNN_")
# Storage type of the weights by precision.
WEIGHT_TYPE_BY_PRECISION = {"fp32": "fp32", "bf16": "bf16", "int8": "int8", "gguf": "bf16", "nf4": "bf16"}


@dataclass(frozen=True)
class KernelChoice:
    """The kernels chosen for a model's products, and the rates that the choice is based on.

    Attributes:
        arithmetic: Chosen arithmetic by storage type. It is never approximate.
        sizes: Product sizes that were timed.
        threads: Number of threads that the products were timed with.
        rates: GFLOP/s (GOP/s for int8) by storage type and candidate. A candidate is ``torch`` or
            ``variant:arithmetic``.
        disturbed: True if other programs used the machine during the measurement.
    """

    arithmetic: Arithmetic
    sizes: Sizes
    threads: int
    rates: Rates
    disturbed: bool = False

    @property
    def approximations(self) -> tuple[str, ...]:
        """Names of the approximations that would speed up training, subject to verification of their error.

        int8 replaces bf16 in gradients and logits if it is clearly faster, and a head's gradient is computed from sums.
        Approximations disabled in the environment are left out.
        """
        arithmetic = self.arithmetic
        if arithmetic.kernels is None:
            return ()
        int8 = arithmetic.int8 != TORCH and self.rate("int8") > INT8_MARGIN * self.rate("bf16")
        faster = {"int8_gradients": int8 and arithmetic.bf16 != TORCH, "int8_logits": int8, "summed_classes": True}
        return tuple(name for name in APPROXIMATIONS if faster[name] and variants.is_approximation_enabled(name))

    def rate(self, weight_type: str) -> float:
        """Return the GFLOP/s of the chosen arithmetic for weights with this storage type."""
        arithmetic = self.arithmetic.for_type(weight_type)
        return self.rates[weight_type][TORCH if arithmetic == TORCH else f"{self.arithmetic.kernels}:{arithmetic}"]

    def value(self, precision: str) -> str:
        """Describe briefly the choice for a run in ``precision``."""
        weight_type = WEIGHT_TYPE_BY_PRECISION.get(precision, "fp32")
        return f"{self.arithmetic.kernels or 'none'}, {weight_type} products {self.arithmetic.for_type(weight_type)}"

    def why(self, precision: str) -> str:
        """Describe the rates that the choice for ``precision`` is based on, the chosen rate first."""
        weight_type = WEIGHT_TYPE_BY_PRECISION.get(precision, "fp32")
        unit = "GOP/s" if weight_type == "int8" else "GFLOP/s"
        ordered = sorted(self.rates[weight_type].items(), key=lambda pair: -pair[1])
        labeled = [(name.removeprefix(f"{self.arithmetic.kernels}:"), rate) for name, rate in ordered]
        others = ", ".join(f"{n} {rate:.0f}" for n, rate in labeled if n != self.arithmetic.for_type(weight_type))
        busy = "measured while the machine was busy" if self.disturbed else ""
        parts = [f"{self.rate(weight_type):.0f} {unit}", others, busy, variants.kernel_overrides().source]
        return "; ".join(filter(None, parts))

    def faster_precision(self, precision: str) -> str | None:
        """Return a suggestion to change the precision, or None if no other precision is much faster."""
        weight_type = WEIGHT_TYPE_BY_PRECISION.get(precision)
        if weight_type is None:
            return None
        shares = {other: self.rate(weight_type) / self.rate(other) for other in WEIGHT_TYPES if other != weight_type}
        best = min(shares, key=lambda other: shares[other])
        if shares[best] > FASTER_PRECISION_RATIO:
            return None
        instead = f"{self.rate(best):.0f} instead of {self.rate(weight_type):.0f} GOP/s"
        return f"precision: {best} would take about {100 * shares[best]:.0f} % of the time of products ({instead})"


def activate_kernels(config: object, threads: int | None = None) -> KernelChoice:
    """Choose kernels for a model and activate them in this process.

    Args:
        config: transformers' ``PretrainedConfig`` of the model.
        threads: Number of compute threads. None uses torch's current number.

    Raises:
        UserError: if ``DELTAW_KERNELS`` requests kernels that cannot run on this machine.
    """
    choice = choose_kernels(sizes_of(config), threads)
    loader.use_arithmetic(choice.arithmetic)
    return choice


def choose_kernels(sizes: Sizes = GENERIC, threads: int | None = None) -> KernelChoice:
    """Choose kernels for products of these sizes. Measures the candidates if their rates are not cached.

    Args:
        sizes: Product sizes of the model.
        threads: Number of compute threads. None uses torch's current number.

    Raises:
        UserError: if ``DELTAW_KERNELS`` requests kernels that cannot run on this machine.
    """
    threads = torch.get_num_threads() if threads is None else threads
    candidates = product_rates.candidates()
    measured = _measured_rates(sizes, threads, candidates)
    arithmetic = choose_arithmetic(measured.rates, candidates)
    return KernelChoice(arithmetic, sizes, threads, measured.rates, measured.disturbed)


def numerics_key(device: torch.device) -> dict[str, str]:
    """Return a cache key of everything, except versions, that affects how a forward pass on the device is rounded."""
    if device.type == "cuda" and torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(device)}
    return loader.arithmetic().as_dict() if device.type == "cpu" else {"device": device.type}


def choose_arithmetic(rates: Rates, candidates: Sequence[Candidate]) -> Arithmetic:
    """Return the fastest arithmetic of each storage type within the fastest variant.

    Args:
        rates: GFLOP/s by storage type and candidate.
        candidates: Candidates, variants of higher rank first.
    """
    names = list(dict.fromkeys(c.kernels for c in candidates if c.kernels is not None))
    if not names:
        return Arithmetic()
    best = names[0]
    for name in names[1:]:
        if _overall(rates, name) > VARIANT_MARGIN * _overall(rates, best):
            best = name
    arithmetics: dict[str, str] = {}
    for weight_type in WEIGHT_TYPES:
        compiled = _variant_rates(rates[weight_type], best)
        fastest = max(compiled, key=lambda name: compiled[name], default=TORCH)
        torch_rate = rates[weight_type].get(TORCH, 0.0)
        arithmetics[weight_type] = TORCH if torch_rate > TORCH_MARGIN * compiled.get(fastest, 0.0) else fastest
    return Arithmetic(best).replace(arithmetics)


def _measured_rates(sizes: Sizes, threads: int, candidates: Sequence[Candidate]) -> ProductRates:
    """Return the rates of the candidates from the environment, the cache, or a new measurement."""
    forced = _as_candidate_rates(product_rates.forced_rates(), candidates)
    if forced is not None:
        return forced
    key = _key(sizes, threads, candidates)
    measured = _parse(product_rates.lookup(key, lambda values: _parse(values, candidates) is not None), candidates)
    if measured is None:
        measured = product_rates.measure(sizes, threads)
        # Rates measured on a busy machine are used by this process and its children, but not cached on disk.
        values = {"rates": measured.rates, "disturbed": measured.disturbed}
        product_rates.store(key, values, persistent=not measured.disturbed)
    return measured


def _key(sizes: Sizes, threads: int, candidates: Sequence[Candidate]) -> list[object]:
    """Return the cache key: everything that the rates depend on."""
    names = sorted({c.kernels for c in candidates if c.kernels is not None})
    machine = processor_name(), sorted(processor_flags()), second_level_cache(), threads
    code = versions(("torch", "deltaw.machine.product_rates")), _libraries(tuple(names))
    # Settings of torch's math libraries.
    variables = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(LIBRARY_VARIABLES))
    return [*machine, *code, [f"{c.weight_type} {c.name}" for c in candidates], list(astuple(sizes)), variables]


@functools.cache
def _libraries(names: tuple[str, ...]) -> list[list[str]]:
    """Return the variants with a hash of their compiled library."""
    files = {v.name: variants.file_of(v) for v in variants.all_variants() if v.name in names}
    return [[n, hashlib.blake2b(files[n].read_bytes(), digest_size=16).hexdigest()] for n in names]


def _parse(values: object, candidates: Sequence[Candidate]) -> ProductRates | None:
    """Parse cached measurements. Returns None if they are malformed or of other candidates."""
    if not isinstance(values, Mapping):
        return None
    rates = valid_rates(values.get("rates"), candidates)
    return None if rates is None else ProductRates(rates, values.get("disturbed") is True)


def _as_candidate_rates(values: object, candidates: Sequence[Candidate]) -> ProductRates | None:
    """Convert rates by storage type and arithmetic to rates of the candidates. Returns None if they are malformed."""
    if not isinstance(values, Mapping) or not all(isinstance(values.get(key), Mapping) for key in WEIGHT_TYPES):
        return None
    rates: dict[str, dict[str, object]] = {weight_type: {} for weight_type in WEIGHT_TYPES}
    for candidate in candidates:
        rates[candidate.weight_type][candidate.name] = values[candidate.weight_type].get(candidate.arithmetic_name, 0.1)
    return _parse({"rates": rates}, candidates)


def _variant_rates(rates: Mapping[str, float], kernels: str) -> dict[str, float]:
    """Return the rates of one variant by arithmetic."""
    prefix = f"{kernels}:"
    return {name.removeprefix(prefix): rate for name, rate in rates.items() if name.startswith(prefix)}


def _overall(rates: Rates, kernels: str) -> float:
    """Return the geometric mean of a variant's best rates over the storage types."""
    best = [max(_variant_rates(rates[weight_type], kernels).values(), default=1e-3) for weight_type in WEIGHT_TYPES]
    return math.exp(sum(map(math.log, best)) / len(best))


CACHE_DEPENDENCIES = ("torch", "deltaw.machine.kernel_choice")


@dataclass(frozen=True)
class PlanningRates:
    """Rates for ordering settings by their estimated time. They do not predict absolute durations.

    Attributes:
        operations_per_second: Floating-point operations per second in matrix products.
        seconds_per_operator: Overhead of calling one operator.
    """

    operations_per_second: float
    seconds_per_operator: float


def planning_rates(precision: str) -> PlanningRates:
    """Return the rates of this machine with torch's current number of threads and the chosen arithmetic.

    Args:
        precision: One of :data:`deltaw.machine.choices.PRECISIONS`, the storage type of the large weights.
    """
    weight_type = WEIGHT_TYPE_BY_PRECISION.get(precision, "fp32")
    return PlanningRates(choose_kernels().rate(weight_type) * 1e9, _seconds_per_operator())


def _seconds_per_operator() -> float:
    key = [processor_name(), sorted(processor_flags()), torch.get_num_threads()]
    cached = load_result("rates", key, CACHE_DEPENDENCIES)
    if isinstance(cached, float) and cached > 0:
        return cached
    operand = torch.ones(16)
    seconds = product_rates.fastest_time(lambda: operand.add(1.0), trials=5, repeats=20)
    store_result("rates", key, seconds, CACHE_DEPENDENCIES)
    return seconds
