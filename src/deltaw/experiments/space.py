"""What a search may change: settings by dotted key, each with a range or a list of values.

``train.learning_rate=1e-5..1e-2:log`` is a range on a logarithmic scale, ``lora.rank=[4,8,16]`` a list. It
knows the settings and nothing of how the search goes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import yaml

from deltaw.config import RunConfig, parse_yaml, settings
from deltaw.errors import UserError, did_you_mean
from deltaw.methods import registry

# Alpha as a multiple of the rank: the strength of the update in one number.
ALPHA_PER_RANK = "lora.alpha/rank"
# Trials that differ in one of these do not have comparable losses.
_FIXED = ("model", "task", "output", "force", "train.seed", "device", "threads", "trust_remote_code")
_EXAMPLE = "write KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=[VALUE, VALUE], as in lora.rank=[4,8,16]"


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; evenly on a logarithmic scale if ``log``."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}{':log' if self.log else ''}"

    def ends(self) -> tuple[object, object]:
        kind = int if self.whole else float
        return kind(self.low), kind(self.high)

    def holds(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def at_end(self, value: object) -> str:
        """``low`` or ``high`` if the value is within a twentieth of that end, else empty."""
        scale = math.log if self.log else float
        low, high, at = scale(self.low), scale(self.high), scale(float(str(value)))
        place = (at - low) / (high - low)
        return "low" if place < 0.05 else "high" if place > 0.95 else ""


@dataclass(frozen=True)
class Values:
    """One of these."""

    values: tuple[object, ...]

    def __str__(self) -> str:
        return f"[{', '.join(str(value) for value in self.values)}]"

    def ends(self) -> tuple[object, ...]:
        return self.values

    def holds(self, value: object) -> bool:
        return value in self.values

    def at_end(self, value: object) -> str:
        """As for a range, if all values are numbers; other values have no end."""
        numbers = [v for v in self.values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) < 2 or len(numbers) < len(self.values) or not isinstance(value, int | float):
            return ""
        return "low" if value == min(numbers) else "high" if value == max(numbers) else ""


Space = Mapping[str, Range | Values]


def default_space(config: RunConfig, usual_rate: float) -> dict[str, Range | Values]:
    """What is searched by default: the learning rate, and the settings that the method registered.

    Args:
        usual_rate: the method's usual learning rate, the middle of the range.
    """
    rate = Range(float(f"{usual_rate / 10:.2g}"), float(f"{usual_rate * 10:.2g}"), log=True)
    return {"train.learning_rate": rate, **parse_space(registry.entry_of(config.method).search)}


def parse_space(given: Iterable[str]) -> dict[str, Range | Values]:
    """``--search`` flags as a space.

    Raises:
        UserError: no such form, an unknown key, or one that trials cannot differ in.
    """
    known = [setting.key for setting in settings()] + [ALPHA_PER_RANK]
    space: dict[str, Range | Values] = {}
    for text in given:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not value:
            raise UserError(f"'{text}' names no setting to search", where="--search", hint=_EXAMPLE)
        if key not in known:
            raise UserError(f"there is no setting '{key}'", where="--search", hint=did_you_mean(key, known))
        if key in _FIXED or key.startswith("data."):
            raise UserError(
                f"'{key}' cannot be searched: trials are compared on the same rows, model and machine",
                where="--search",
                hint="set it in the settings",
            )
        space[key] = _domain(key, value, text)
    if {"lora.alpha", ALPHA_PER_RANK} <= set(space):
        raise UserError(
            f"lora.alpha and {ALPHA_PER_RANK} exclude each other",
            where="--search",
            hint="leave one of them out",
        )
    return space


def _domain(key: str, value: str, text: str) -> Range | Values:
    if value.startswith("["):
        try:
            values = parse_yaml(value)
        except yaml.YAMLError:
            values = None
        if not isinstance(values, list) or not values:
            raise UserError(f"'{text}' is not a list of values", where="--search", hint=_EXAMPLE)
        if any(isinstance(v, list | dict) for v in values) or len(set(map(str, values))) < len(values):
            raise UserError(
                f"'{text}' holds a list, or a value twice",
                where="--search",
                hint="list plain values, once each",
            )
        return Values(tuple(values))
    log = value.endswith(":log")
    lower, dots, higher = value.removesuffix(":log").partition("..")
    low, high = _number(lower), _number(higher)
    if not dots or low is None or high is None:
        raise UserError(f"'{text}' is neither a range nor a list", where="--search", hint=_EXAMPLE)
    if not low < high or (log and low <= 0):
        raise UserError(
            f"'{text}' is an empty range" if low >= high else f"'{text}' has no logarithm at its low end",
            where="--search",
            hint="give the lower end first, above 0 where :log",
        )
    whole = isinstance(low, int) and isinstance(high, int) and not _takes_fractions(key)
    return Range(low, high, log, whole)


def _number(text: str) -> float | int | None:
    try:
        value = parse_yaml(text.strip())
    except yaml.YAMLError:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None  # type: ignore[return-value]


def _takes_fractions(key: str) -> bool:
    if key == ALPHA_PER_RANK:
        return True
    return any("float" in str(setting.annotation) for setting in settings() if setting.key == key)


def check_space(config: RunConfig, space: Space) -> None:
    """Put the ends of each range and all values of a list into the settings.

    Raises:
        UserError: a value does not fit its setting.
    """
    for key, domain in space.items():
        for value in domain.ends():
            applied(config, {key: value})


def applied(config: RunConfig, values: Mapping[str, object]) -> RunConfig:
    """The settings with these values, by dotted key, in them.

    Raises:
        UserError: a value does not fit.
    """
    return RunConfig.read(config.model_dump(mode="json"), nested_values(config, values))


def nested_values(config: RunConfig, values: Mapping[str, object]) -> dict[str, object]:
    """Values by dotted key as nested settings; alpha per rank becomes alpha."""
    result: dict[str, object] = {}
    for key, value in values.items():
        if key == ALPHA_PER_RANK:
            rank = float(str(values.get("lora.rank", config.lora.rank)))
            key, value = "lora.alpha", float(str(value)) * rank
        section, dot, leaf = key.partition(".")
        if not dot:
            result[key] = value
            continue
        inner = result.setdefault(section, {})
        if isinstance(inner, dict):
            inner[leaf] = value
    return result


def present(config: RunConfig, space: Space, usual_rate: float) -> dict[str, object] | None:
    """The values that the settings have now; None if one of them is outside the space."""
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
            value = usual_rate
        if not domain.holds(value):
            return None
        values[key] = value
    return values
