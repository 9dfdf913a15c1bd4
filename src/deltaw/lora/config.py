"""Settings of an adapter, validated on construction.

Names of modules are checked against a model in ``select``. PEFT's names of the settings are accepted, too.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from deltaw.errors import UserError, did_you_mean
from deltaw.lora.expressions import check_expressions
from deltaw.settings.dataclass_fields import dataclass_setting as setting

Number = TypeVar("Number", int, float)
Config = TypeVar("Config")

CHANGING_INITS = ("pissa", "olora")
"""Initializations that change W."""

INITS = ("uniform", "gaussian", "orthogonal", *CHANGING_INITS, "eva")
BIASES = ("none", "all", "lora_only")
KEYWORDS = ("all-linear", "attention", "mlp")
ACTIVATIONS = ("always", "completion")

# Additions to the JSON schema of the settings.
_NUMBER = {"type": "integer", "minimum": 0}
_TEXT_OR_LIST = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}

PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "layers_to_transform": "layers",
    "modules_to_save": "train_modules",
    "alora_invocation_tokens": "invocation_tokens",
}
"""Names of settings by their names in PEFT."""


def scaling(rank: int, alpha: float, rslora: bool = False) -> float:
    """Return the factor of A·B in ΔW: alpha / rank, or alpha / √rank with rsLoRA (arXiv 2312.03732, eq. 4)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _accept_peft_names(cls: type[Config]) -> type[Config]:
    """Class decorator for a dataclass whose constructor also accepts PEFT's names of its fields."""
    initialize = cls.__init__
    valid_names = {f.name for f in fields(cls)}  # type: ignore[arg-type]

    @functools.wraps(initialize)
    def __init__(self: Config, *args: object, **settings: object) -> None:
        values: dict[str, object] = {}
        for key, value in settings.items():
            name = PEFT_NAMES.get(key, key)
            if name not in valid_names:
                hint = did_you_mean(key, sorted(valid_names | set(PEFT_NAMES)))
                if key == "task_type":
                    hint = "remove it: the model determines the task"
                raise UserError(f"LoRA has no setting '{key}'", location=key, hint=hint)
            if name in values:
                message = f"'{name}' is given twice, also under PEFT's name"
                raise UserError(message, location=key, hint="remove one of them")
            values[name] = "uniform" if name == "init" and isinstance(value, bool) else value
            if key == "alora_invocation_tokens":
                values.setdefault("active", "completion")
        initialize(self, *args, **values)

    cls.__init__ = __init__  # type: ignore[assignment]
    return cls


@_accept_peft_names
@dataclass
class LoRAConfig:
    """Settings of a LoRA adapter.

    PEFT's names of the settings (``r``, ``lora_alpha``, ``modules_to_save``, …) are accepted, too.
    ``init_lora_weights=True`` or ``False`` becomes ``uniform``, since an adapter always starts with ΔW = 0.

    Raises:
        UserError: if a key is unknown (the hint suggests a similar key) or set under both names, or a value is invalid.
            The message names the key.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rank: int = setting(
        16,
        "rank r of ΔW = scaling · A·B",
        when=(
            "Raise it to 32 or 64 for many thousand rows of new content, and alpha with it; the adapter "
            "and its memory grow in proportion."
        ),
        minimum=1,
    )
    alpha: float = setting(
        32.0,
        "scaling numerator: the update is scaled by alpha / rank, or alpha / √rank with rslora",
        when="Change it by the same factor as the rank; a higher ratio acts like a higher learning rate.",
        exclusiveMinimum=0,
    )
    dropout: float = setting(
        0.0,
        "dropout probability of the adapter's inputs, 0 ≤ p < 1",
        when=(
            "Try 0.05 to 0.1 if the evaluation loss rises on few rows; prefixes are then no longer "
            "shared, so steps can be slower."
        ),
        minimum=0,
        exclusiveMaximum=1,
    )
    target_modules: str | list[str] = setting(
        "all-linear",
        "modules to adapt: 'all-linear', 'attention', 'mlp', a list of name suffixes, or a regular expression",
        when="Use attention to halve the adapter; all-linear learns more per step.",
    )
    exclude_modules: str | list[str] | None = setting(
        None,
        "modules to exclude: name suffixes (including their submodules) or a regular expression",
        when="Set it to leave modules to the base model, such as a router.",
    )
    layers: str | list[int] | None = setting(
        None,
        "layers to adapt, such as '16-', '0-7', '3' or [1, 2]",
        when=(
            "Use the upper half, such as '16-', if the plan exceeds the memory or time: lower blocks then "
            "need no backward pass."
        ),
        anyOf=[{"type": "string"}, _NUMBER, {"type": "array", "items": _NUMBER}, {"type": "null"}],
    )
    rank_pattern: dict[str, int] = setting(
        dict,
        "ranks of individual modules, by a regular expression for a name suffix",
        when="Use it if some modules need a higher rank than the others; vLLM and llama.cpp may not read it.",
    )
    alpha_pattern: dict[str, float] = setting(
        dict,
        "alphas of individual modules, by a regular expression for a name suffix",
        when="Use it to imitate another tool's adapter; leave it empty otherwise.",
    )
    init: str = setting(
        "uniform",
        "initialization of A and B: uniform, gaussian, orthogonal, pissa, olora or eva",
        when=(
            "The values pissa and olora can lower the loss of the first steps; they take minutes for large models "
            "and change the frozen weights during training."
        ),
        enum=list(INITS),
    )
    rslora: bool = setting(
        False,
        "scale by alpha / √rank instead of alpha / rank",
        when="Use it from rank 64 on, where alpha / rank becomes small.",
    )
    dora: bool = setting(
        False,
        "train magnitude and direction of the weights separately (DoRA)",
        when="Can help at ranks below 8; steps are slower, and some servers reject it.",
    )
    bias: str = setting(
        "none",
        "biases to train: none, all, or lora_only (adapted layers)",
        when="Leave none: the effect is small, and adapters with biases are not portable.",
        enum=list(BIASES),
    )
    lora_bias: bool = setting(
        False,
        "train a bias of B, which is added to the output of each adapted layer",
        when="Leave false unless you compare with an adapter that has it.",
    )
    target_parameters: list[str] = setting(
        list,
        "2-D or 3-D parameters to adapt, by name suffix, such as 'experts.gate_up_proj'",
        when="Needed for experts that are stored as one parameter.",
        **_TEXT_OR_LIST,
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = setting(
        None,
        "ids of tokens whose embeddings are trained, or such lists by module name suffix",
        when="Use it for tokens that you added, instead of training the whole embedding.",
    )
    train_modules: list[str] = setting(
        list,
        "additional modules to train in full, by name suffix",
        when="Use it for a new head or embedding; such modules are saved in full size.",
        **_TEXT_OR_LIST,
    )
    vision_tower: bool = setting(
        False,
        "apply these settings also to the vision tower and the connector of a vision-language model",
        when="Use it if images differ from photos, such as scans; features are then computed in each step.",
    )
    active: str = setting(
        "always",
        "tokens that the adapter changes: always (all), or completion (from the invocation sequence on; Activated "
        "LoRA)",
        when="Use completion for one of several adapters over one long prompt: its keys and values are shared.",
        enum=list(ACTIVATIONS),
    )
    invocation_tokens: list[int] | str | None = setting(
        None,
        "token ids or text that activate an activated adapter; null: the start of an assistant turn in the chat "
        "template, or the common end of all prompts",
        when="Set it if completions begin with a text of your own.",
    )

    def __post_init__(self) -> None:
        self.rank = _positive_int("rank", self.rank)
        self.alpha = _positive("alpha", self.alpha)
        self.dropout = _number("dropout", self.dropout)
        if not 0.0 <= self.dropout < 1.0:
            raise _invalid_value("dropout", self.dropout, "use a number from 0 to below 1")
        self.target_modules = _names("target_modules", self.target_modules)
        if self.exclude_modules is not None:
            self.exclude_modules = _names("exclude_modules", self.exclude_modules) or None
        self.target_parameters = _entries("target_parameters", self.target_parameters)
        self.trainable_token_indices = _tokens(self.trainable_token_indices)
        if not (self.target_modules or self.target_parameters or self.trainable_token_indices):
            hint = "use 'all-linear', 'attention', 'mlp', or a list of module names"
            raise UserError("target_modules is empty", location="target_modules", hint=hint)
        self.layers = _layers(self.layers)
        self.rank_pattern = _pattern("rank_pattern", self.rank_pattern, _positive_int)
        self.alpha_pattern = _pattern("alpha_pattern", self.alpha_pattern, _positive)
        for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            value = getattr(self, key)
            if isinstance(value, Mapping):
                check_expressions(key, list(value))
            elif isinstance(value, str) and value not in KEYWORDS:
                check_expressions(key, [value])
        _check_choice("init", self.init, INITS)
        _check_choice("bias", self.bias, BIASES)
        for key in ("rslora", "dora", "lora_bias", "vision_tower"):
            if not isinstance(getattr(self, key), bool):
                raise _invalid_value(key, getattr(self, key), "use true or false")
        odd = [r for r in (self.rank, *self.rank_pattern.values()) if r % 2]
        if self.init == "orthogonal" and odd:
            message = f"init 'orthogonal' requires an even rank, not {odd[0]}"
            raise UserError(message, location="rank", hint=f"use {odd[0] + 1}")
        self.train_modules = _entries("train_modules", self.train_modules)
        _check_choice("active", self.active, ACTIVATIONS)
        self.invocation_tokens = _invocation(self.invocation_tokens)
        self._check_combinations()
        if self.active == "completion":
            self._check_activation()
        elif self.invocation_tokens is not None:
            message = "invocation_tokens are only for an activated adapter"
            raise UserError(message, location="invocation_tokens", hint="set active: completion, or remove them")

    def _check_activation(self) -> None:
        """Reject settings that would change the base model's part of a row, which activated LoRA must not do."""
        unsupported = ("target_parameters", "trainable_token_indices", "train_modules", "vision_tower")
        for key in ("dora", "lora_bias", "bias", "init", *unsupported):
            value = getattr(self, key)
            if value and not (isinstance(value, str) and value in {"none", *INITS} - {*CHANGING_INITS}):
                description = f"{key} '{value}'" if isinstance(value, str) else key
                reason = "it supports only plain updates of linear layers"
                message = f"active: completion and {description} cannot be combined: {reason}"
                raise UserError(message, location=key, hint=f"remove {key}, or set active: always")

    def _check_combinations(self) -> None:
        """Reject settings that cannot be combined, as in PEFT."""
        if self.lora_bias and (self.dora or self.init != "uniform"):
            conflict = "dora" if self.dora else f"init '{self.init}'"
            message = f"lora_bias and {conflict} cannot be combined"
            raise UserError(message, location="lora_bias", hint="remove one of them")
        for key in ("dropout", "dora", "lora_bias"):
            if self.target_parameters and getattr(self, key):
                message = f"target_parameters and {key} cannot be combined: the inputs of the update are not known"
                raise UserError(message, location=key, hint=f"remove {key}, or name modules in target_modules instead")

    @classmethod
    def from_dict(cls, mapping: Mapping[str, object]) -> LoRAConfig:
        """Create a config from deltaw's or PEFT's names. ``null`` selects the default.

        Raises:
            UserError: as the constructor.
        """
        return cls(**{str(key): value for key, value in mapping.items() if value is not None})  # type: ignore[arg-type]


def parse_layers(layers: str | list[int]) -> list[tuple[int, int | None]]:
    """Parse ``'0-3,8,16-'`` or ``[1, 2]`` into inclusive ranges (first, last). The last is None for an open range.

    Raises:
        UserError: if the text is not a list of layers.
    """
    if isinstance(layers, list):
        return [(index, index) for index in layers]
    ranges: list[tuple[int, int | None]] = []
    for part in layers.split(","):
        if not (match := re.fullmatch(r"\s*(\d{1,9})\s*(?:(-)\s*(\d{0,9}))?\s*", part)):
            hint = "use for example '16-', '0-7', '3', '0-3,8' or [1, 2]"
            raise UserError(f"'{layers}' is not a list of layers", location="layers", hint=hint)
        first = int(match[1])
        last = first if match[2] is None else (int(match[3]) if match[3] else None)
        if last is not None and last < first:
            message = f"layers '{part.strip()}' is not an ascending range"
            raise UserError(message, location="layers", hint=f"write '{last}-{first}'")
        ranges.append((first, last))
    return ranges


def _layers(value: object) -> str | list[int] | None:
    if isinstance(value, str):
        parse_layers(value)
    if value is None or isinstance(value, str):
        return value
    if _is_number(value):
        value = [value]
    numbers: list[int] = list(value) if isinstance(value, list | tuple | range) else [-1]
    if all(map(_is_number, numbers)):
        return numbers or None
    raise _invalid_value("layers", value, "use for example '16-', '0-7', '3', or a list of numbers from 0")


def _names(key: str, value: object) -> str | list[str]:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | set | frozenset) and all(isinstance(entry, str) for entry in value):
        ordered = sorted(value) if isinstance(value, set | frozenset) else list(value)
        if any(not entry for entry in ordered):
            raise UserError(f"{key} contains an empty name", location=key, hint="remove it")
        return list(dict.fromkeys(ordered))
    raise _invalid_value(key, value, "use a string or a list of strings")


def _entries(key: str, value: object) -> list[str]:
    """Return a list of names. A single string counts as a list of one."""
    names = _names(key, [] if value is None else value)
    return [names] if isinstance(names, str) else names


def _tokens(value: object) -> list[int] | dict[str, list[int]] | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {_text("trainable_token_indices", key): _ids(ids) for key, ids in value.items()} or None
    return _ids(value) or None


def _invocation(value: object) -> list[int] | str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    numbers = list(value) if isinstance(value, list | tuple) else []
    if numbers and all(map(_is_number, numbers)):
        return numbers
    hint = "use token ids, for example [1, 520, 198], or the text that starts an answer"
    raise _invalid_value("invocation_tokens", value, hint)


def _ids(value: object) -> list[int]:
    ids: list[Any] = list(value) if isinstance(value, list | tuple | set | range) else [value]
    key = "trainable_token_indices"
    if not all(map(_is_number, ids)):
        raise _invalid_value(key, value, "use a list of token ids, or a list per embedding: {embed_tokens: [5, 6]}")
    if duplicates := [number for number in ids if ids.count(number) > 1]:
        raise UserError(f"{key} contains {duplicates[0]} twice", location=key, hint="name each token once")
    return ids


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"{key} cannot contain {value!r}", location=key, hint="put text in quotes")
    return value


def _pattern(key: str, value: object, check: Callable[[str, object], Number]) -> dict[str, Number]:
    """Validate values by expression."""
    if value is not None and not isinstance(value, Mapping):
        raise _invalid_value(key, value, "use numbers by name: {q_proj: 8}")
    return {_text(key, name): check(f"{key}['{name}']", number) for name, number in (value or {}).items()}


def _is_number(value: object) -> bool:
    """True if the value is a nonnegative integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _invalid_value(key, value, "use a number")
    return float(value)


def _positive(key: str, value: object) -> float:
    number = _number(key, value)
    if number <= 0:
        raise _invalid_value(key, value, "use a number above 0")
    return number


def _positive_int(key: str, value: object) -> int:
    if not isinstance(value, int) or not _is_number(value) or value < 1:
        raise _invalid_value(key, value, "use an integer of at least 1")
    return value


def _check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise _invalid_value(key, value, did_you_mean(str(value), choices))


def _invalid_value(key: str, value: object, hint: str) -> UserError:
    return UserError(f"{key} cannot be {value!r}", location=key, hint=hint)
