"""Settings and registration of the built-in methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from deltaw.errors import UserError
from deltaw.lora.config import LoRAConfig, setting
from deltaw.methods.registry import MethodEntry, register

register(
    MethodEntry(
        "lora",
        "deltaw.methods.lora:LoRA",
        LoRAConfig,
        "rank, alpha and targets of the low-rank update",
        peft_type="LORA",
        search=("lora.rank=[4, 8, 16, 32]", "lora.alpha/rank=[1, 2, 4]"),
        compared_by_default=True,
    )
)


@dataclass(frozen=True)
class HeadSettings:
    """The ``head:`` section."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    modules: list[str] | None = setting(None, "modules trained by method head; null: the model's output layer")


register(
    MethodEntry("head", "deltaw.methods.in_place:Head", HeadSettings, "only the output layer", compared_by_default=True)
)


@dataclass(frozen=True)
class InputSettings:
    """The ``input:`` section."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    modules: list[str] | None = setting(None, "modules trained by method input; null: the model's input layer")
    tokens: list[str] | None = setting(None, "train the embeddings of these tokens only, and no other rows")

    def __post_init__(self) -> None:
        if self.modules and self.tokens:
            raise UserError("input.modules and input.tokens cannot be combined", hint="remove one of them")


register(MethodEntry("input", "deltaw.methods.in_place:Input", InputSettings, "the input layer"))


@dataclass(frozen=True)
class PromptSettings:
    """The ``prompt:`` section.

    Raises:
        UserError: if a value is out of range, or ``init`` and ``text`` contradict each other.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    length: int = setting(20, "virtual tokens prepended to every row", minimum=1)
    init: Literal["random", "text"] = setting(
        "random", "the vectors are initialized with token embeddings: of random tokens, or of prompt.text"
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


register(
    MethodEntry(
        "prompt",
        "deltaw.methods.prompt:SoftPrompt",
        PromptSettings,
        "a soft prompt",
        peft_type="PROMPT_TUNING",
        search=("prompt.length=[5, 10, 20, 50]",),
        compared_by_default=True,
    )
)

register(MethodEntry("bias", "deltaw.methods.in_place:Bias", compared_by_default=True))


@dataclass(frozen=True)
class RandomSettings:
    """The ``random:`` section."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    weights: float = setting(
        0.01, "weights trained by method random: a share (below 1), or a number of them", exclusiveMinimum=0
    )

    def __post_init__(self) -> None:
        if not self.weights > 0 or (self.weights > 1 and self.weights != int(self.weights)):
            hint = "use a share below 1, or an integer number of weights"
            raise UserError(f"random.weights is {self.weights}", hint=hint)


register(
    MethodEntry(
        "random",
        "deltaw.methods.in_place:Random",
        RandomSettings,
        "a random subset of weights",
        search=("random.weights=0.001..0.05:log",),
        compared_by_default=True,
    )
)


@dataclass(frozen=True)
class LastSettings:
    """The ``last:`` section."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    blocks: int = setting(2, "blocks trained by method last, from the top", minimum=1)

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise UserError(f"last.blocks is {self.blocks}", hint="use at least 1")


register(
    MethodEntry(
        "last", "deltaw.methods.in_place:Last", LastSettings, "the last blocks", search=("last.blocks=[1, 2, 4]",)
    )
)

register(MethodEntry("full", "deltaw.methods.in_place:Full", compared_by_default=True))
