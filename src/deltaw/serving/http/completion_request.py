"""The fields of a plain completion: prompts as texts or token ids, besides those of :mod:`fields`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from deltaw.serving.http.fields import TextFields, Tokens, wrong

MOST_PROMPTS = 1024


class CompletionRequest(TextFields):
    """The body of ``/v1/completions``."""

    unsupported: ClassVar[Mapping[str, tuple[tuple[object, ...], str]]] = {
        "suffix": (("",), "texts are written at the end of a prompt"),
    }

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
    )
    max_tokens: int | None = Field(16, ge=0, le=1 << 30)
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=128)

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.best_of not in (None, self.choices):
            raise wrong("'best_of' other than 'n' is not supported: ask for more texts with 'n', and choose")
        if self.max_tokens == 0 and not self.echo:
            raise wrong("'max_tokens' of 0 needs 'echo': true")
        if self.echo and self.constraint() is not None:
            raise wrong("'echo' and a format do not go together")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]
