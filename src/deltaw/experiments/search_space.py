"""Search spaces of ``deltaw tune``.

A space maps a setting by its dotted key to a range (``train.learning_rate=1e-5..1e-2:log``) or a list of values
(``lora.rank=[4,8,16]``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from deltaw.errors import UserError, did_you_mean
from deltaw.settings import method_registry
from deltaw.settings.config import RunConfig, parse_yaml, settings

# Alpha as a multiple of the rank, which is the scaling of the update.
ALPHA_PER_RANK = "lora.alpha/rank"
# Trials with different values of these settings do not have comparable losses.
_UNSEARCHABLE = ("model", "task", "output", "force", "train.seed", "device", "sampler", "threads", "trust_remote_code")
_EXAMPLE = "write KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=[VALUE, VALUE], as in lora.rank=[4,8,16]"


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, inclusive, on a logarithmic scale if ``log``."""

    low: float
    high: float
    log: bool = False
    integers: bool = False

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}{':log' if self.log else ''}"

    def values_to_check(self) -> tuple[object, ...]:
        """Return the ends of the range."""
        kind = int if self.integers else float
        return kind(self.low), kind(self.high)

    def contains(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def edge(self, value: object) -> str:
        """Return ``low`` or ``high`` if the value is within 5% of that end of the range, else ''."""
        scale = math.log if self.log else float
        low = scale(self.low)
        high = scale(self.high)
        scaled = scale(float(str(value)))
        position = (scaled - low) / (high - low)
        if position < 0.05:
            return "low"
        return "high" if position > 0.95 else ""


@dataclass(frozen=True)
class CategoricalValues:
    """List of values to choose from."""

    values: tuple[object, ...]

    def __str__(self) -> str:
        return f"[{', '.join(str(value) for value in self.values)}]"

    def values_to_check(self) -> tuple[object, ...]:
        """Return all values."""
        return self.values

    def contains(self, value: object) -> bool:
        return value in self.values

    def edge(self, value: object) -> str:
        """Return ``low`` or ``high`` if the value is the smallest or largest of several numbers, else ''."""
        numbers = [v for v in self.values if isinstance(v, int | float) and not isinstance(v, bool)]
        are_numeric = len(numbers) == len(self.values)
        if not are_numeric or len(numbers) < 2 or not isinstance(value, int | float):
            return ""
        if value == min(numbers):
            return "low"
        return "high" if value == max(numbers) else ""


Space = Mapping[str, Range | CategoricalValues]


def default_space(config: RunConfig, default_learning_rate: float) -> dict[str, Range | CategoricalValues]:
    """Return the default search space: the learning rate, and the settings that the method registered.

    Args:
        default_learning_rate: The method's default learning rate, the middle of the range.
    """
    rate = Range(float(f"{default_learning_rate / 10:.2g}"), float(f"{default_learning_rate * 10:.2g}"), log=True)
    # The settings of a method that continues an adapter are those of the adapter.
    search = () if config.start_from is not None else method_registry.entry_of(config.method).search
    return {"train.learning_rate": rate, **parse_space(search)}


def parse_space(texts: Iterable[str]) -> dict[str, Range | CategoricalValues]:
    """Parse ``--search`` flags.

    Raises:
        UserError: If the format is invalid, or a key is unknown or cannot be searched.
    """
    keys = [setting.key for setting in settings()] + [ALPHA_PER_RANK]
    space: dict[str, Range | CategoricalValues] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not value:
            raise _search_error(f"'{text}' has no value: write KEY=LOW..HIGH or KEY=[VALUE, VALUE]")
        if key not in keys:
            raise _search_error(f"unknown setting '{key}'", did_you_mean(key, keys))
        if key in _UNSEARCHABLE or key.startswith("data."):
            message = f"'{key}' cannot be searched: trials are compared on the same rows, model and machine"
            raise _search_error(message, "set it in the settings file")
        space[key] = _domain(key, value, text)
    if {"lora.alpha", ALPHA_PER_RANK} <= set(space):
        raise _search_error(f"lora.alpha and {ALPHA_PER_RANK} cannot be searched together", "remove one of them")
    return space


def _search_error(message: str, hint: str = _EXAMPLE) -> UserError:
    return UserError(message, location="--search", hint=hint)


def _domain(key: str, value: str, text: str) -> Range | CategoricalValues:
    if value.startswith("["):
        values = _parse_value(value)
        if not isinstance(values, list) or not values:
            raise _search_error(f"'{text}' is not a list of values")
        if any(isinstance(v, list | dict) for v in values) or len(set(map(str, values))) < len(values):
            raise _search_error(f"'{text}' contains a nested list or a duplicate value", "use distinct scalar values")
        return CategoricalValues(tuple(values))
    log = value.endswith(":log")
    lower, dots, higher = value.removesuffix(":log").partition("..")
    low = _number(lower)
    high = _number(higher)
    if not dots or low is None or high is None:
        raise _search_error(f"'{text}' is neither a range nor a list")
    if not low < high or (log and low <= 0):
        problem = "is an empty range" if low >= high else "needs a low end above 0 for a logarithmic scale"
        raise _search_error(f"'{text}' {problem}", "write KEY=LOW..HIGH with LOW < HIGH, and LOW > 0 for :log")
    fractions = [ALPHA_PER_RANK, *(setting.key for setting in settings() if "float" in str(setting.annotation))]
    return Range(low, high, log, integers=isinstance(low, int) and isinstance(high, int) and key not in fractions)


def _number(text: str) -> float | int | None:
    value = _parse_value(text.strip())
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None  # type: ignore[return-value]


def _parse_value(text: str) -> object:
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return None


def check_space(config: RunConfig, space: Space) -> None:
    """Check that the ends of each range and all values of a list are valid for their settings.

    Raises:
        UserError: If a value is invalid.
    """
    for key, domain in space.items():
        for value in domain.values_to_check():
            apply_values(config, {key: value})


def apply_values(config: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """Return the settings with values by dotted key.

    Raises:
        UserError: If a value is invalid.
    """
    return RunConfig.read(config.model_dump(mode="json"), nested_values(config, values))


def nested_values(config: RunConfig, values: Mapping[str, object]) -> dict[str, object]:
    """Convert values by dotted key to nested settings. Alpha per rank is converted to alpha."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key == ALPHA_PER_RANK:
            rank = float(str(values.get("lora.rank", config.lora.rank)))
            key = "lora.alpha"
            value = float(str(value)) * rank
        section, dot, leaf = key.partition(".")
        result[section] = {**result.get(section, {}), leaf: value} if dot else value
    return result


def current_values(config: RunConfig, space: Space, default_learning_rate: float) -> dict[str, object] | None:
    """Return the current values of the searched settings, or None if one of them is outside the search space."""
    dumped = config.model_dump(mode="json")
    values: dict[str, object] = {}
    for key, domain in space.items():
        if key == ALPHA_PER_RANK:
            ratio = config.lora.alpha / config.lora.rank
            value: object = int(ratio) if ratio == int(ratio) else ratio
        else:
            section, dot, leaf = key.partition(".")
            value = dumped[section][leaf] if dot else dumped[section]
        if key == "train.learning_rate" and isinstance(value, str):
            value = default_learning_rate
        if not domain.contains(value):
            return None
        values[key] = value
    return values
