"""The settings of an adapter: one dataclass, checked when it is made.

It knows no model: whether a name matches a module is decided in ``select``. PEFT's names for the same
settings are accepted by :meth:`LoRAConfig.from_dict`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from deltaw.errors import UserError, did_you_mean
from deltaw.lora.expressions import check_expressions

Number = TypeVar("Number", int, float)

CHANGING_INITS = ("pissa", "olora")
"""Initializations that take a share out of W."""

INITS = ("uniform", "gaussian", "orthogonal", *CHANGING_INITS, "eva")
BIASES = ("none", "all", "lora_only")
KEYWORDS = ("all-linear", "attention", "mlp")
ACTIVATIONS = ("always", "completion")

# Of the settings' JSON schema: what a type does not say.
_NUMBER = {"type": "integer", "minimum": 0}
_ONE_OR_MORE = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}

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
"""PEFT's name of a setting, and ours."""


def scaling(rank: int, alpha: float, rslora: bool = False) -> float:
    """The factor of A·B in ΔW: alpha / rank, or alpha / √rank (rsLoRA, arXiv 2312.03732, eq. 4)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def setting(default: Any, description: str, **schema: Any) -> Any:
    """A field of a settings class.

    Args:
        default: its value, or ``dict`` or ``list`` for an empty one.
        description: for ``--help``.
        schema: what the type does not say, for the JSON schema.
    """
    metadata = {"description": description, **({"json_schema_extra": schema} if schema else {})}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class LoRAConfig:
    """What is adapted, and how.

    Raises:
        UserError: a value cannot be used; the message names the key.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rank: int = setting(16, "rank r of ΔW = scaling · A·B", minimum=1)
    alpha: float = setting(32.0, "scaling is alpha / rank, or alpha / √rank with rslora", exclusiveMinimum=0)
    dropout: float = setting(
        0.0, "share of the adapter's inputs set to zero while training, 0 ≤ p < 1", minimum=0, exclusiveMaximum=1
    )
    target_modules: str | list[str] = setting(
        "all-linear", "'all-linear', 'attention', 'mlp', a list of name endings, or a regular expression for full names"
    )
    exclude_modules: str | list[str] | None = setting(
        None, "name endings (with all below them) or a regular expression, not adapted"
    )
    layers: str | list[int] | None = setting(
        None,
        "layers to adapt, such as '16-', '0-7', '3' or [1, 2]",
        anyOf=[{"type": "string"}, _NUMBER, {"type": "array", "items": _NUMBER}, {"type": "null"}],
    )
    rank_pattern: dict[str, int] = setting(dict, "other ranks, by an expression for the ending of a module's name")
    alpha_pattern: dict[str, float] = setting(dict, "other alphas, by an expression for the ending of a module's name")
    init: str = setting(
        "uniform", "initialization of A and B: uniform, gaussian, orthogonal, pissa, olora or eva", enum=list(INITS)
    )
    rslora: bool = setting(False, "scale by alpha / √rank instead of alpha / rank")
    dora: bool = setting(False, "train the norm of every output's weights apart from their direction")
    bias: str = setting("none", "biases trained as well: none, all, or lora_only", enum=list(BIASES))
    lora_bias: bool = setting(False, "train a bias on B as well, added to each adapted layer's output")
    target_parameters: list[str] = setting(
        list,
        "parameters of two or three dimensions to adapt, by the ending of their full name, such as "
        "'experts.gate_up_proj'",
        **_ONE_OR_MORE,
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = setting(
        None, "ids of tokens whose embeddings are trained, or such lists by the ending of a module's name"
    )
    train_modules: list[str] = setting(
        list, "extra trainable modules, trained in full, by the ending of their name", **_ONE_OR_MORE
    )
    activation: str = setting(
        "always",
        "tokens on which the adapter acts: always (all), or completion (from the invocation sequence on, the "
        "start of the answer; Activated LoRA)",
        enum=list(ACTIVATIONS),
    )
    invocation_tokens: list[int] | str | None = setting(
        None,
        "the sequence that switches an activated adapter on, as token ids or text; null: what opens the answer "
        "in the chat template, or ends all prompts",
    )

    def __post_init__(self) -> None:
        self.rank = _whole_number("rank", self.rank)
        self.alpha = _positive("alpha", self.alpha)
        self.dropout = _number("dropout", self.dropout)
        if not 0.0 <= self.dropout < 1.0:
            raise _cannot_be("dropout", self.dropout, "give a share from 0 to below 1")
        self.target_modules = _names("target_modules", self.target_modules)
        if self.exclude_modules is not None:
            self.exclude_modules = _names("exclude_modules", self.exclude_modules) or None
        self.target_parameters = _entries("target_parameters", self.target_parameters)
        self.trainable_token_indices = _tokens(self.trainable_token_indices)
        if not (self.target_modules or self.target_parameters or self.trainable_token_indices):
            hint = "write 'all-linear', 'attention', 'mlp', or a list of module names"
            raise UserError("target_modules names nothing", where="target_modules", hint=hint)
        self.layers = _layers(self.layers)
        self.rank_pattern = _pattern("rank_pattern", self.rank_pattern, _whole_number)
        self.alpha_pattern = _pattern("alpha_pattern", self.alpha_pattern, _positive)
        for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            value = getattr(self, key)
            if isinstance(value, Mapping):
                check_expressions(key, list(value))
            elif isinstance(value, str) and value not in KEYWORDS:
                check_expressions(key, [value])
        _one_of("init", self.init, INITS)
        _one_of("bias", self.bias, BIASES)
        for key in ("rslora", "dora", "lora_bias"):
            if not isinstance(getattr(self, key), bool):
                raise _cannot_be(key, getattr(self, key), "give true or false")
        odd = [r for r in (self.rank, *self.rank_pattern.values()) if r % 2]
        if self.init == "orthogonal" and odd:
            what = f"init 'orthogonal' needs an even rank, not {odd[0]}"
            raise UserError(what, where="rank", hint=f"use {odd[0] + 1}")
        self.train_modules = _entries("train_modules", self.train_modules)
        _one_of("activation", self.activation, ACTIVATIONS)
        self.invocation_tokens = _invocation(self.invocation_tokens)
        self._refuse_combinations()
        if self.activation == "completion":
            self._refuse_beside_activation()
        elif self.invocation_tokens is not None:
            what = "invocation_tokens are for an adapter that is not always active"
            raise UserError(what, where="invocation_tokens", hint="set activation: completion, or leave them out")

    def _refuse_beside_activation(self) -> None:
        """What would change the base model's own part of a row, and so is not activated LoRA."""
        harmless = {"none", *INITS} - {*CHANGING_INITS}
        others = ("target_parameters", "trainable_token_indices", "train_modules")
        for key in ("dora", "lora_bias", "bias", "init", *others):
            value = getattr(self, key)
            if value and not (isinstance(value, str) and value in harmless):
                told = f"{key} '{value}'" if isinstance(value, str) else key
                why = "it is for plain updates of linear layers"
                what = f"activation 'completion' and {told} do not go together: {why}"
                raise UserError(what, where=key, hint=f"leave {key} out, or set activation: always")

    def _refuse_combinations(self) -> None:
        """Settings that have no meaning together, in PEFT's files either."""
        if self.lora_bias and (self.dora or self.init != "uniform"):
            other = "dora" if self.dora else f"init '{self.init}'"
            what = f"lora_bias and {other} do not go together"
            raise UserError(what, where="lora_bias", hint="leave one of the two out")
        for key in ("dropout", "dora", "lora_bias"):
            if self.target_parameters and getattr(self, key):
                what = f"target_parameters and {key} do not go together: the inputs of the update are not known"
                raise UserError(what, where=key, hint=f"leave {key} out, or name modules in target_modules instead")

    @classmethod
    def from_dict(cls, mapping: Mapping[str, object]) -> LoRAConfig:
        """Make a config from our names or PEFT's (``r``, ``lora_alpha``, ``modules_to_save``, …).

        ``init_lora_weights: true`` or ``false`` becomes ``uniform``: an adapter always begins
        with ΔW = 0 here. ``null`` stands for the default.

        Raises:
            UserError: a key is unknown (the nearest is named), is given twice under both names, or its
                value cannot be used.
        """
        known = {f.name for f in fields(cls)}
        values: dict[str, object] = {}
        for key, value in mapping.items():
            name = PEFT_NAMES.get(key, key)
            if name not in known:
                hint = did_you_mean(str(key), sorted(known | set(PEFT_NAMES)))
                raise UserError(f"LoRA has no setting '{key}'", where=str(key), hint=hint)
            if name in values:
                what = f"'{name}' is given twice, also under PEFT's name"
                raise UserError(what, where=str(key), hint="leave one of the two out")
            if name == "init" and isinstance(value, bool):
                value = "uniform"
            if value is not None:
                values[name] = value
                if key == "alora_invocation_tokens":
                    values.setdefault("activation", "completion")
        return cls(**values)  # type: ignore[arg-type]


def parse_layers(layers: str | list[int]) -> list[tuple[int, int | None]]:
    """Turn ``'0-3,8,16-'`` or ``[1, 2]`` into closed ranges (first, last); last None means "to the end".

    Raises:
        UserError: the text is no list of layers.
    """
    if isinstance(layers, list):
        return [(index, index) for index in layers]
    ranges: list[tuple[int, int | None]] = []
    for part in layers.split(","):
        if not (match := re.fullmatch(r"\s*(\d{1,9})\s*(?:(-)\s*(\d{0,9}))?\s*", part)):
            hint = "write '16-', '0-7', '3', '0-3,8' or [1, 2]"
            raise UserError(f"'{layers}' is no list of layers", where="layers", hint=hint)
        first = int(match[1])
        last = first if match[2] is None else (int(match[3]) if match[3] else None)
        if last is not None and last < first:
            what = f"layers '{part.strip()}' ends before it begins"
            raise UserError(what, where="layers", hint=f"write '{last}-{first}'")
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
    raise _cannot_be("layers", value, "write '16-', '0-7', '3', or a list of numbers from 0")


def _names(key: str, value: object) -> str | list[str]:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | set | frozenset) and all(isinstance(entry, str) for entry in value):
        ordered = sorted(value) if isinstance(value, set | frozenset) else list(value)
        if any(not entry for entry in ordered):
            raise UserError(f"{key} holds an empty name", where=key, hint="leave it out")
        return list(dict.fromkeys(ordered))
    raise _cannot_be(key, value, "give a text or a list of texts")


def _entries(key: str, value: object) -> list[str]:
    """A list of names; one name may stand without a list."""
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
    hint = "give token ids, such as [1, 520, 198], or the text that opens an answer"
    raise _cannot_be("invocation_tokens", value, hint)


def _ids(value: object) -> list[int]:
    ids: list[int] = list(value) if isinstance(value, list | tuple | set | range) else [value]  # type: ignore[list-item]
    key = "trainable_token_indices"
    if not all(map(_is_number, ids)):
        raise _cannot_be(key, value, "give a list of token ids, or one for each embedding: {embed_tokens: [5, 6]}")
    if twice := [number for number in ids if ids.count(number) > 1]:
        raise UserError(f"{key} holds {twice[0]} twice", where=key, hint="name each token once")
    return ids


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"{key} cannot hold {value!r}", where=key, hint="put a text in quotes")
    return value


def _pattern(key: str, value: object, check: Callable[[str, object], Number]) -> dict[str, Number]:
    """Values by expressions, each of them checked."""
    if value is not None and not isinstance(value, Mapping):
        raise _cannot_be(key, value, "give names with numbers: {q_proj: 8}")
    return {_text(key, name): check(f"{key}['{name}']", number) for name, number in (value or {}).items()}


def _is_number(value: object) -> bool:
    """Whether it is a whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _cannot_be(key, value, "give a number")
    return float(value)


def _positive(key: str, value: object) -> float:
    number = _number(key, value)
    if number <= 0:
        raise _cannot_be(key, value, "give a number above 0")
    return number


def _whole_number(key: str, value: object) -> int:
    if not isinstance(value, int) or not _is_number(value) or value < 1:
        raise _cannot_be(key, value, "give a whole number of at least 1")
    return value


def _one_of(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise _cannot_be(key, value, did_you_mean(str(value), choices))


def _cannot_be(key: str, value: object, hint: str) -> UserError:
    return UserError(f"{key} cannot be {value!r}", where=key, hint=hint)
