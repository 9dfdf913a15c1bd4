"""Settings of the built-in methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from deltaw.errors import UserError
from deltaw.settings.dataclass_fields import dataclass_setting as setting


class _Section:
    """Base class of the methods' sections, which reject unknown keys."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True)
class HeadSettings(_Section):
    """The ``head:`` section."""

    modules: list[str] | None = setting(
        None,
        "modules trained by method head; null: the model's output layer",
        when="Set it if the model has several output layers.",
    )


@dataclass(frozen=True)
class InputSettings(_Section):
    """The ``input:`` section."""

    modules: list[str] | None = setting(None, "modules trained by method input; null: the model's input layer")
    tokens: list[str] | None = setting(
        None,
        "tokens whose embeddings are trained; null: all",
        when="Set it to train a few new tokens, such as role names.",
    )

    def __post_init__(self) -> None:
        if self.modules and self.tokens:
            raise UserError("input.modules and input.tokens cannot be combined", hint="remove one of them")


@dataclass(frozen=True)
class PromptSettings(_Section):
    """The ``prompt:`` section.

    Raises:
        UserError: if a value is out of range, or ``init`` and ``text`` contradict each other.
    """

    length: int = setting(
        20,
        "number of virtual tokens prepended to every row",
        when="Use 50 to 100 for harder tasks; each virtual token lengthens every row.",
        minimum=1,
    )
    init: Literal["random", "text"] = setting(
        "random",
        "initialization with the embeddings of random tokens, or of the tokens of prompt.text",
        when="Use text with an instruction: it learns faster than random tokens.",
    )
    text: str | None = setting(None, "text for init: text; repeated or truncated to prompt.length tokens")

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"prompt.length is {self.length}", hint="use at least 1, for example 20")
        if self.init not in ("random", "text"):
            raise UserError(f"prompt.init is '{self.init}'", hint="use random or text")
        if (self.init == "text") != bool(self.text):
            message = "prompt.init: text and prompt.text must be set together"
            raise UserError(message, location="prompt.text", hint="set both, or neither")


@dataclass(frozen=True)
class RandomSettings(_Section):
    """The ``random:`` section."""

    weights: float = setting(
        0.01,
        "weights to train: a fraction (below 1), or a number of weights (from 1)",
        when="Raise it toward 0.05 if the loss stays high; the adapter stores an index and a value per weight.",
        exclusiveMinimum=0,
    )

    def __post_init__(self) -> None:
        if not self.weights > 0 or (self.weights > 1 and self.weights != int(self.weights)):
            hint = "use a share below 1, or an integer number of weights"
            raise UserError(f"random.weights is {self.weights}", hint=hint)


@dataclass(frozen=True)
class LastSettings(_Section):
    """The ``last:`` section."""

    blocks: int = setting(
        2,
        "number of blocks to train, from the top",
        when="Raise it if the loss stays high; memory and time grow with the number of blocks.",
        minimum=1,
    )

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise UserError(f"last.blocks is {self.blocks}", hint="use at least 1")
