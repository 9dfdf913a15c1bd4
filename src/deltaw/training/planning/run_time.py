"""Predict the time of a run from its workload and from measured times of the model's blocks.

The module does not import torch, so that the time of a cached plan is available quickly. The measurement is in
:mod:`deltaw.training.planning.step_rates`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import Field, TypeAdapter

from deltaw.cache.results import load_result, store_result
from deltaw.memory.plan import Plan
from deltaw.settings.config import RunConfig, duration_seconds

KIND = "step rates"
CACHE_DEPENDENCIES = ("torch", "transformers", "deltaw.kernels", "deltaw.lora", "deltaw.runtime", "deltaw.training")
# Measured points are valid for microbatches of up to this multiple of the largest measured size.
MAX_EXTRAPOLATION = 4.0
# A product with a small number of rows takes as long as one with this number, because its weight is read once.
MIN_PRODUCT_ROWS = 30.0
# Time of phases that are not measured: constructing the model, reading weights, writing files and the report.
LOADING_SECONDS = 1.0
LOADED_BYTES_PER_SECOND = 1e9
SAVE_SECONDS = 1.0
# Gradients that the check of approximations computes. The first one, in fp32, counts several times.
CHECK_GRADIENTS = 8
# Assumed mean length of generated rows, relative to their maximum length.
EXPECTED_LENGTH = 0.6
# Time of a decoding step of one text, relative to that of ``StepRates.decode_tokens`` texts.
MIN_DECODE_SHARE = 0.4
BUSY_REASON = "the machine was busy during the measurement"


# Types of values that are read from a cache, which can be damaged.
Size: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Duration: TypeAlias = Size
Count: TypeAlias = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Microbatches:
    """Microbatches of a step or of an evaluation.

    Attributes:
        tokens: Computed tokens of each microbatch.
        labels: Number of labels (or rows of a head) of all microbatches.
        repeated: Tokens of the microbatches with two forward passes, first without gradients.
    """

    tokens: tuple[Count, ...] = ()
    labels: Count = 0
    repeated: tuple[Count, ...] = ()


# Usual microbatch of the check of approximations.
CHECK_MICROBATCHES = Microbatches((192,), 32)


@dataclass(frozen=True)
class Generation:
    """Texts that are generated together.

    Attributes:
        texts: Number of texts.
        tokens: Maximum number of new tokens of each text.
        times: Number of times in the run.
        phase: Phase of the run.
    """

    texts: Count
    tokens: Count
    times: Count
    phase: str


@dataclass(frozen=True)
class Workload:
    """Work of a run, from a session on fake tensors.

    Attributes:
        key: Cache key of the measured rates.
        steps: Microbatches of evenly spaced steps.
        total_steps: Number of optimizer steps.
        full_steps: Number of steps that compute the frozen layers. Later steps use stored features.
        evaluated: Microbatches of one evaluation.
        evaluations: Number of evaluations.
        reference: Microbatches of the reference model's pass over all rows.
        drift: Microbatches of the drift measurement.
        has_check: True if gradients are checked before approximations are used.
        general_tokens: Tokens of the general answers in each step.
        generations: Generated texts.
        read_seconds: Measured time of reading the rows.
        start_seconds: Measured time of starting the process and importing libraries.
        uncertain: Reason why the workload is uncertain, if any.
    """

    key: str
    steps: tuple[Microbatches, ...]
    total_steps: Count
    full_steps: Count
    evaluated: Microbatches = Microbatches()
    evaluations: Count = 0
    reference: Microbatches = Microbatches()
    drift: Microbatches = Microbatches()
    has_check: bool = False
    general_tokens: Count = 0
    generations: tuple[Generation, ...] = ()
    read_seconds: Duration = 0.0
    start_seconds: Duration = 0.0
    uncertain: str = ""

    @property
    def largest_microbatch(self) -> int:
        """Tokens of the largest microbatch of the sampled steps."""
        return max((tokens for step in self.steps for tokens in step.tokens), default=0)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: object) -> Workload:
        """Restore a workload from the result of :meth:`as_dict`.

        Raises:
            ValueError: if the values, which can be from a damaged file, are invalid.
        """
        return TypeAdapter(cls).validate_python(values)


@dataclass(frozen=True)
class MicrobatchTime:
    """Measured seconds of one microbatch, scaled to all blocks of the model.

    Attributes:
        tokens: Computed tokens.
        labels: Number of labels.
        blocks: Forward and backward pass of all blocks.
        forward: Forward pass of all blocks.
        upper: Forward and backward pass of the blocks above stored features.
        head: Everything else: embedding, head, loss, and building the microbatch.
    """

    tokens: Size
    labels: Size
    blocks: Duration
    forward: Duration
    upper: Duration
    head: Duration

    @property
    def seconds(self) -> float:
        """Seconds of the microbatch."""
        return self.blocks + self.head


@dataclass(frozen=True)
class StepRates:
    """Measured times of a model's parts.

    Attributes:
        points: Microbatches of increasing size.
        evaluation: Ratio of the forward pass without gradients to the one with gradients, for the blocks.
        evaluation_head: The same for ``MicrobatchTime.head``, relative to forward and backward pass.
        update: Seconds of an optimizer update of all trained parameters.
        decode: Seconds of a forward pass of ``decode_tokens`` tokens with their logits.
        decode_tokens: Number of tokens that ``decode`` was measured with.
        uncertain: Reason why the measurement is uncertain, if any.
    """

    points: Annotated[tuple[MicrobatchTime, ...], Field(min_length=1)]
    evaluation: Duration = 0.7
    evaluation_head: Duration = 0.5
    update: Duration = 0.0
    decode: Duration = 0.0
    decode_tokens: Annotated[int, Field(ge=1)] = 64
    uncertain: str = ""

    @classmethod
    def from_dict(cls, values: object) -> StepRates:
        """Restore rates from the result of ``asdict``, possibly read from JSON.

        Raises:
            ValueError: if the values, which can be from a damaged file, are invalid.
        """
        return TypeAdapter(cls).validate_python(values)

    def covers(self, tokens: int) -> bool:
        """Return True if microbatches of this size can be predicted."""
        return tokens <= MAX_EXTRAPOLATION * self.points[-1].tokens

    def block_seconds(self, tokens: float, name: str = "blocks") -> float:
        """Return the seconds of the blocks for a microbatch, by the name of an attribute of :class:`MicrobatchTime`."""
        return interpolate([p.tokens for p in self.points], [getattr(p, name) for p in self.points], tokens)

    def head_seconds(self, labels: float, tokens: float) -> float:
        """Return the seconds outside of the blocks for a microbatch."""
        ordered = sorted(self.points, key=lambda point: point.labels)
        if ordered[-1].labels < 1.2 * ordered[0].labels:  # the points differ in their tokens only
            by_tokens = self.block_seconds(tokens, "head")
            return by_tokens * max(1.0, (labels + MIN_PRODUCT_ROWS) / (ordered[-1].labels + MIN_PRODUCT_ROWS))
        return interpolate([p.labels for p in ordered], [p.head for p in ordered], labels)

    def training_seconds(self, batches: Microbatches, *, upper: bool = False) -> float:
        """Return the seconds of forward and backward passes of these microbatches.

        Args:
            batches: Microbatches.
            upper: The frozen layers are replaced by stored features.
        """
        count = max(1, len(batches.tokens))
        blocks = sum(self.block_seconds(tokens, "upper" if upper else "blocks") for tokens in batches.tokens)
        heads = sum(self.head_seconds(batches.labels / count, tokens) for tokens in batches.tokens)
        return blocks + heads + self.evaluation_seconds(Microbatches(batches.repeated))

    def evaluation_seconds(self, batches: Microbatches) -> float:
        """Return the seconds of forward passes of these microbatches without gradients."""
        count = max(1, len(batches.tokens))
        blocks = sum(self.block_seconds(tokens, "forward") for tokens in batches.tokens)
        heads = sum(self.head_seconds(batches.labels / count, tokens) for tokens in batches.tokens)
        return self.evaluation * blocks + self.evaluation_head * heads

    def generation_seconds(self, generation: Generation) -> float:
        """Return the seconds of generating texts once. For few texts, a step is bound by reading the weights."""
        return generation.tokens * self.decode * max(MIN_DECODE_SHARE, generation.texts / self.decode_tokens)


def interpolate(sizes: Sequence[float], values: Sequence[float], size: float) -> float:
    """Interpolate a time linearly between measured sizes in ascending order.

    Beyond the largest size, the time grows as between the last two sizes, and at most in proportion to the size. Below
    the smallest size, it shrinks as between the first two, and at most in proportion.
    """
    if len(sizes) == 1 or sizes[-1] <= sizes[0]:
        return values[-1] * (size + MIN_PRODUCT_ROWS) / (sizes[-1] + MIN_PRODUCT_ROWS)
    last = len(sizes) - 1
    high = min(max(next((i for i, s in enumerate(sizes) if s >= size), last), 1), last)
    low = high - 1
    slope = (values[high] - values[low]) / max(1e-9, sizes[high] - sizes[low])
    value = values[low] + slope * (size - sizes[low])
    if size > sizes[-1]:
        return min(max(value, values[-1]), values[-1] * size / max(1.0, sizes[-1]))
    if size < sizes[0]:
        return max(min(value, values[0]), values[0] * size / max(1.0, sizes[0]))
    return value


def seconds_of_step(workload: Workload, rates: StepRates) -> tuple[float, float]:
    """Return the mean seconds of a step that computes all layers, and of one that uses stored features."""
    general = rates.training_seconds(Microbatches((workload.general_tokens,))) if workload.general_tokens else 0.0
    rollouts = [generation for generation in workload.generations if generation.phase == "training"]
    generated = sum(g.times * rates.generation_seconds(g) for g in rollouts) / max(1, workload.total_steps)
    share = EXPECTED_LENGTH if rollouts else 1.0
    full, upper = (
        sum(rates.training_seconds(step, upper=is_upper) for step in workload.steps) / max(1, len(workload.steps))
        for is_upper in (False, True)
    )
    fixed = rates.update + general
    return share * (full + generated) + fixed, share * (upper + generated) + fixed


def seconds_by_phase(workload: Workload, rates: StepRates, weight_bytes: int = 0) -> dict[str, float]:
    """Return the predicted seconds of each phase. The time of loading depends on ``weight_bytes``."""
    full, upper = seconds_of_step(workload, rates)
    stored_steps = workload.total_steps - workload.full_steps
    check = CHECK_GRADIENTS * rates.training_seconds(CHECK_MICROBATCHES) if workload.has_check else 0.0
    phases = {
        "starting": workload.start_seconds,
        "reading": workload.read_seconds,
        "loading": LOADING_SECONDS + weight_bytes / LOADED_BYTES_PER_SECOND,
        "preparing": check + rates.evaluation_seconds(workload.reference),
        "training": full * workload.full_steps + upper * stored_steps,
        "evaluating": workload.evaluations * rates.evaluation_seconds(workload.evaluated),
        "measuring": rates.evaluation_seconds(workload.drift),
        "saving": SAVE_SECONDS,
    }
    for generation in workload.generations:
        if generation.phase != "training":  # rollouts are part of the steps
            phases[generation.phase] += generation.times * rates.generation_seconds(generation)
    return phases


def timed_plan(plan: Plan, workload: Workload, rates: StepRates, config: RunConfig) -> Plan:
    """Return the plan with the predicted time."""
    phases = seconds_by_phase(workload, rates, plan.parts["weights"])
    total = sum(phases.values())
    if config.train.time is not None:  # the run is as long as its time limit allows
        limit = duration_seconds(config.train.time)
        phases["training"] = max(0.0, phases["training"] - max(0.0, total - limit))
    full, upper = seconds_of_step(workload, rates)
    stored = workload.total_steps - workload.full_steps
    return dataclasses.replace(
        plan,
        seconds_per_step=(full * workload.full_steps + upper * stored) / max(1, workload.total_steps),
        seconds=sum(phases.values()),
        seconds_by_phase={name: seconds for name, seconds in phases.items() if seconds},
        time_uncertain="; ".join(filter(None, (rates.uncertain, workload.uncertain))),
    )


# Rates of this process that are not on disk, because the machine was busy.
_uncertain_rates: dict[str, StepRates] = {}


def load_rates(workload: Workload) -> StepRates | None:
    """Return the cached rates for a workload, or None if they must be measured."""
    values = load_result(KIND, workload.key, CACHE_DEPENDENCIES)
    try:
        rates = StepRates.from_dict(values) if isinstance(values, dict) else _uncertain_rates.get(workload.key)
    except ValueError:
        return None
    return rates if rates is not None and rates.points and rates.covers(workload.largest_microbatch) else None


def store_rates(workload: Workload, rates: StepRates) -> None:
    """Cache rates. Rates that were measured on a busy machine are used by this process only."""
    if rates.uncertain:
        _uncertain_rates[workload.key] = rates
    else:
        store_result(KIND, workload.key, asdict(rates), CACHE_DEPENDENCIES)


def plan_with_cached_time(plan: Plan, config: RunConfig) -> Plan | None:
    """Return the plan with its time if the rates are cached, else None. Does not import torch."""
    if not plan.workload:
        return plan  # the time of the run cannot be predicted
    try:
        workload = Workload.from_dict(plan.workload)
    except ValueError:
        return dataclasses.replace(plan, time_uncertain="unknown, because the cached plan is damaged")
    rates = load_rates(workload)
    return None if rates is None else timed_plan(plan, workload, rates, config)
