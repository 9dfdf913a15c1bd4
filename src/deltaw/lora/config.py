"""The settings of an adapter: one dataclass, checked when it is made.

It knows no model: whether a name matches a module is decided in ``select``. PEFT's names for the same
settings are accepted by :meth:`LoRAConfig.from_dict`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import ClassVar

from deltaw.errors import UserError, did_you_mean
from deltaw.lora.expressions import check_expressions

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


@dataclass
class LoRAConfig:
    """What is adapted, and how.

    Raises:
        UserError: a value cannot be used; the message names the key.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rank: int = field(
        default=16, metadata={"description": "rank r of ΔW = scaling · A·B", "json_schema_extra": {"minimum": 1}}
    )
    alpha: float = field(
        default=32.0,
        metadata={
            "description": "scaling is alpha / rank, or alpha / √rank with rslora",
            "json_schema_extra": {"exclusiveMinimum": 0},
        },
    )
    dropout: float = field(
        default=0.0,
        metadata={
            "description": "share of the adapter's inputs set to zero while training, 0 ≤ p < 1",
            "json_schema_extra": {"minimum": 0, "exclusiveMaximum": 1},
        },
    )
    target_modules: str | list[str] = field(
        default="all-linear",
        metadata={
            "description": "'all-linear', 'attention', 'mlp', a list of name endings, or a regular "
            "expression for full names"
        },
    )
    exclude_modules: str | list[str] | None = field(
        default=None,
        metadata={"description": "name endings (with all below them) or a regular expression, not adapted"},
    )
    layers: str | list[int] | None = field(
        default=None,
        metadata={
            "description": "layers to adapt, such as '16-', '0-7', '3' or [1, 2]",
            "json_schema_extra": {
                "anyOf": [{"type": "string"}, _NUMBER, {"type": "array", "items": _NUMBER}, {"type": "null"}]
            },
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"description": "other ranks, by an expression for the ending of a module's name"},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"description": "other alphas, by an expression for the ending of a module's name"},
    )
    init: str = field(
        default="uniform",
        metadata={
            "description": "initialization of A and B: uniform, gaussian, orthogonal, pissa, olora or eva",
            "json_schema_extra": {"enum": list(INITS)},
        },
    )
    rslora: bool = field(default=False, metadata={"description": "scale by alpha / √rank instead of alpha / rank"})
    dora: bool = field(
        default=False, metadata={"description": "train the norm of every output's weights apart from their direction"}
    )
    bias: str = field(
        default="none",
        metadata={
            "description": "biases trained as well: none, all, or lora_only",
            "json_schema_extra": {"enum": list(BIASES)},
        },
    )
    lora_bias: bool = field(
        default=False, metadata={"description": "train a bias on B as well, added to each adapted layer's output"}
    )
    target_parameters: list[str] = field(
        default_factory=list,
        metadata={
            "description": "parameters of two or three dimensions to adapt, by the ending of their full "
            "name, such as 'experts.gate_up_proj'",
            "json_schema_extra": _ONE_OR_MORE,
        },
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "description": "ids of tokens whose embeddings are trained, or such lists by the ending of a module's name"
        },
    )
    train_modules: list[str] = field(
        default_factory=list,
        metadata={
            "description": "extra trainable modules, trained in full, by the ending of their name",
            "json_schema_extra": _ONE_OR_MORE,
        },
    )
    activation: str = field(
        default="always",
        metadata={
            "description": "tokens on which the adapter acts: always (all), or completion (from the "
            "invocation sequence on, the start of the answer; Activated LoRA)",
            "json_schema_extra": {"enum": list(ACTIVATIONS)},
        },
    )
    invocation_tokens: list[int] | str | None = field(
        default=None,
        metadata={
            "description": "the sequence that switches an activated adapter on, as token ids or text; null: "
            "what opens the answer in the chat template, or ends all prompts"
        },
    )

    def __post_init__(self) -> None:
        self.rank = _whole_number("rank", self.rank)
        self.alpha = _positive("alpha", self.alpha)
        self.dropout = _number("dropout", self.dropout)
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout cannot be {self.dropout}", where="dropout", hint="give a share from 0 to below 1")
        self.target_modules = _names("target_modules", self.target_modules)
        if self.exclude_modules is not None:
            self.exclude_modules = _names("exclude_modules", self.exclude_modules) or None
        self.target_parameters = _entries("target_parameters", self.target_parameters)
        self.trainable_token_indices = _tokens(self.trainable_token_indices)
        if not (self.target_modules or self.target_parameters or self.trainable_token_indices):
            raise UserError(
                "target_modules names nothing",
                where="target_modules",
                hint="write 'all-linear', 'attention', 'mlp', or a list of module names",
            )
        self.layers = _layers(self.layers)
        self.rank_pattern = {
            _text("rank_pattern", key): _whole_number(f"rank_pattern['{key}']", value)
            for key, value in _mapping("rank_pattern", self.rank_pattern).items()
        }
        self.alpha_pattern = {
            _text("alpha_pattern", key): _positive(f"alpha_pattern['{key}']", value)
            for key, value in _mapping("alpha_pattern", self.alpha_pattern).items()
        }
        self._check_expressions()
        _one_of("init", self.init, INITS)
        _one_of("bias", self.bias, BIASES)
        for key in ("rslora", "dora", "lora_bias"):
            if not isinstance(getattr(self, key), bool):
                raise UserError(f"{key} cannot be {getattr(self, key)!r}", where=key, hint="give true or false")
        odd = [r for r in (self.rank, *self.rank_pattern.values()) if r % 2]
        if self.init == "orthogonal" and odd:
            raise UserError(
                f"init 'orthogonal' needs an even rank, not {odd[0]}", where="rank", hint=f"use {odd[0] + 1}"
            )
        self.train_modules = _entries("train_modules", self.train_modules)
        _one_of("activation", self.activation, ACTIVATIONS)
        self.invocation_tokens = _invocation(self.invocation_tokens)
        self._refuse_combinations()
        if self.activation == "completion":
            self._refuse_beside_activation()
        elif self.invocation_tokens is not None:
            raise UserError(
                "invocation_tokens are for an adapter that is not always active",
                where="invocation_tokens",
                hint="set activation: completion, or leave them out",
            )

    def _check_expressions(self) -> None:
        for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            value = getattr(self, key)
            if isinstance(value, Mapping):
                check_expressions(key, list(value))
            elif isinstance(value, str) and value not in KEYWORDS:
                check_expressions(key, [value])

    def _refuse_beside_activation(self) -> None:
        """What would change the base model's own part of a row, and so is not activated LoRA."""
        changing = "init" if self.init in CHANGING_INITS else ""
        for key, value in (
            ("dora", self.dora),
            ("lora_bias", self.lora_bias),
            ("bias", self.bias != "none"),
            (changing, changing),
            ("target_parameters", self.target_parameters),
            ("trainable_token_indices", self.trainable_token_indices),
            ("train_modules", self.train_modules),
        ):
            if value:
                told = f"{key} '{getattr(self, key)}'" if isinstance(getattr(self, key), str) else key
                raise UserError(
                    f"activation 'completion' and {told} do not go together: only plain updates of linear "
                    "layers can act from a token on",
                    where=key,
                    hint=f"leave {key} out, or set activation: always",
                )

    def _refuse_combinations(self) -> None:
        """Settings that have no meaning together, in PEFT's files either."""
        if self.lora_bias and (self.dora or self.init != "uniform"):
            other = "dora" if self.dora else f"init '{self.init}'"
            raise UserError(
                f"lora_bias and {other} do not go together", where="lora_bias", hint="leave one of the two out"
            )
        for key in ("dropout", "dora", "lora_bias"):
            if self.target_parameters and getattr(self, key):
                raise UserError(
                    f"target_parameters and {key} do not go together: the inputs of the update are not known",
                    where=key,
                    hint=f"leave {key} out, or name modules in target_modules instead",
                )

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
                raise UserError(
                    f"LoRA has no setting '{key}'",
                    where=str(key),
                    hint=did_you_mean(str(key), sorted(known | set(PEFT_NAMES))),
                )
            if name in values:
                raise UserError(
                    f"'{name}' is given twice, also under PEFT's name", where=str(key), hint="leave one of the two out"
                )
            if name == "init" and isinstance(value, bool):
                value = "uniform"
            if name == "layers" and isinstance(value, int) and not isinstance(value, bool):
                value = [value]
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
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:(-)\s*(\d{0,9}))?\s*", part)
        if not match:
            raise UserError(
                f"'{layers}' is no list of layers", where="layers", hint="write '16-', '0-7', '3', '0-3,8' or [1, 2]"
            )
        first = int(match[1])
        last = first if match[2] is None else (int(match[3]) if match[3] else None)
        if last is not None and last < first:
            raise UserError(
                f"layers '{part.strip()}' ends before it begins", where="layers", hint=f"write '{last}-{first}'"
            )
        ranges.append((first, last))
    return ranges


def _layers(value: object) -> str | list[int] | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, str):
        parse_layers(value)
        return value
    numbers: list[int] = list(value) if isinstance(value, list | tuple | range) else [-1]
    if all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in numbers):
        return numbers or None
    raise UserError(
        f"layers cannot be {value!r}", where="layers", hint="write '16-', '0-7', '3', or a list of numbers from 0"
    )


def _names(key: str, value: object) -> str | list[str]:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | set | frozenset) and all(isinstance(entry, str) for entry in value):
        ordered = sorted(value) if isinstance(value, set | frozenset) else list(value)
        if any(not entry for entry in ordered):
            raise UserError(f"{key} holds an empty name", where=key, hint="leave it out")
        return list(dict.fromkeys(ordered))
    raise UserError(f"{key} cannot be {value!r}", where=key, hint="give a text or a list of texts")


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
    if numbers and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        return numbers
    raise UserError(
        f"invocation_tokens cannot be {value!r}",
        where="invocation_tokens",
        hint="give token ids, such as [1, 520, 198], or the text that opens an answer",
    )


def _ids(value: object) -> list[int]:
    numbers: list[object] = list(value) if isinstance(value, list | tuple | set | range) else [value]
    ids = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]
    if len(ids) < len(numbers) or any(number < 0 for number in ids):
        raise UserError(
            f"trainable_token_indices cannot be {value!r}",
            where="trainable_token_indices",
            hint="give a list of token ids, or one for each embedding: {embed_tokens: [5, 6]}",
        )
    twice = [number for number in ids if ids.count(number) > 1]
    if twice:
        raise UserError(
            f"trainable_token_indices holds {twice[0]} twice",
            where="trainable_token_indices",
            hint="name each token once",
        )
    return ids


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"{key} cannot hold {value!r}", where=key, hint="put a text in quotes")
    return value


def _mapping(key: str, value: object) -> Mapping[str, object]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{key} cannot be {value!r}", where=key, hint="give names with numbers: {q_proj: 8}")
    return value


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{key} cannot be {value!r}", where=key, hint="give a number")
    return float(value)


def _positive(key: str, value: object) -> float:
    number = _number(key, value)
    if number <= 0:
        raise UserError(f"{key} cannot be {value!r}", where=key, hint="give a number above 0")
    return number


def _whole_number(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{key} cannot be {value!r}", where=key, hint="give a whole number of at least 1")
    return value


def _one_of(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key} cannot be {value!r}", where=key, hint=did_you_mean(str(value), choices))
