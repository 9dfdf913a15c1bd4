"""The settings of the methods that have few: one small section each in a run's file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from deltaw.errors import UserError


@dataclass(frozen=True)
class HeadSettings:
    """The ``head:`` section."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    modules: list[str] | None = field(
        default=None,
        metadata={"description": "modules trained by method head; null: the model's output layer"},
    )


@dataclass(frozen=True)
class InputSettings:
    """The ``input:`` section."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    modules: list[str] | None = field(
        default=None,
        metadata={"description": "modules trained by method input; null: the model's input layer"},
    )
    tokens: list[str] | None = field(
        default=None,
        metadata={"description": "train the embeddings of these tokens only, and no other rows"},
    )

    def __post_init__(self) -> None:
        if self.modules and self.tokens:
            raise UserError(
                "input.modules and input.tokens exclude each other", hint="leave one of the two out"
            )


@dataclass(frozen=True)
class RandomSettings:
    """The ``random:`` section."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    weights: float = field(
        default=0.01,
        metadata={"description": "weights trained by method random: a share (below 1), or a number of them"},
    )

    def __post_init__(self) -> None:
        if not self.weights > 0 or (self.weights > 1 and self.weights != int(self.weights)):
            raise UserError(
                f"random.weights is {self.weights}", hint="give a share below 1, or a whole number of weights"
            )


@dataclass(frozen=True)
class LastSettings:
    """The ``last:`` section."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    blocks: int = field(default=2, metadata={"description": "blocks trained by method last, from the top"})

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise UserError(f"last.blocks is {self.blocks}", hint="give 1 at least")


@dataclass(frozen=True)
class PromptSettings:
    """The ``prompt:`` section.

    Raises:
        UserError: a value is out of its range, or the start and the text do not go together.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    length: int = field(default=20, metadata={"description": "virtual tokens in front of every row"})
    init: Literal["random", "text"] = field(
        default="random",
        metadata={
            "description": "the vectors start as the embeddings of tokens: drawn at random, or those of "
            "prompt.text"
        },
    )
    text: str | None = field(
        default=None,
        metadata={"description": "start of init text; repeated or cut until it has prompt.length tokens"},
    )

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"prompt.length is {self.length}", hint="give 1 at least; 20 is usual")
        if self.init not in ("random", "text"):
            raise UserError(f"prompt.init is '{self.init}'", hint="give random or text")
        if (self.init == "text") != bool(self.text):
            raise UserError(
                "prompt.init text and prompt.text belong together",
                where="prompt.text",
                hint="give both, or neither",
            )
