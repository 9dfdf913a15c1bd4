"""The method that settings ask for, or that a folder was made by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from deltaw.errors import UserError
from deltaw.lora import LoRAConfig
from deltaw.methods.base import Method
from deltaw.methods.bias import Bias
from deltaw.methods.files import read_config
from deltaw.methods.full import Full
from deltaw.methods.head import Head
from deltaw.methods.input import Input
from deltaw.methods.last import Last
from deltaw.methods.lora import LoRA
from deltaw.methods.prompt import Prompt
from deltaw.methods.random import Random
from deltaw.methods.settings import (
    HeadSettings,
    InputSettings,
    LastSettings,
    PromptSettings,
    RandomSettings,
)

NAMES = ("lora", "head", "input", "prompt", "bias", "random", "last", "full")


class _Train(Protocol):
    @property
    def b_rate(self) -> float: ...


class Sections(Protocol):
    """The settings that methods are made from."""

    lora: LoRAConfig
    head: HeadSettings
    input: InputSettings
    prompt: PromptSettings
    random: RandomSettings
    last: LastSettings

    @property
    def method(self) -> str: ...

    @property
    def train(self) -> _Train: ...


def choose_method(settings: Sections, tokenizer: PreTrainedTokenizerBase | None) -> Method:
    """The method that ``settings.method`` names, with its section."""
    made: dict[str, Callable[[], Method]] = {
        "lora": lambda: LoRA(settings.lora, settings.train.b_rate),
        "head": lambda: Head(settings.head),
        "input": lambda: Input(settings.input, tokenizer),
        "prompt": lambda: Prompt(settings.prompt, tokenizer),
        "bias": Bias,
        "random": lambda: Random(settings.random),
        "last": lambda: Last(settings.last),
        "full": Full,
    }
    return made[settings.method]()


def method_of_folder(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> Method:
    """The method that an adapter's folder was made by, with no settings: to load it.

    Raises:
        UserError: the folder's config cannot be read, or names a method that is not known here.
    """
    config = read_config(folder)
    kind = config.get("peft_type") or config.get("method")
    if kind == "LORA":
        return LoRA(LoRAConfig())
    if kind == "PROMPT_TUNING":
        return Prompt(PromptSettings(), tokenizer)
    made: dict[str, Callable[[], Method]] = {
        "head": lambda: Head(HeadSettings()),
        "input": lambda: Input(InputSettings()),
        "bias": Bias,
        "random": lambda: Random(RandomSettings()),
        "last": lambda: Last(LastSettings()),
        "full": Full,
    }
    if kind not in made:
        raise UserError(
            f"the adapter is of kind {kind!r}, which is not known",
            where=str(folder),
            hint="give a LoRA, a prompt-tuning or one of deltaw's own adapters",
        )
    return made[str(kind)]()
