"""A model with an optional adapter, as the decoder uses it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.chat_template import last_occurrence
from deltaw.errors import UserError
from deltaw.methods.base import Method


@dataclass
class AdaptedModel:
    """A model with or without an adapter, and a switch to compute as the base model.

    Attributes:
        model: The loaded model.
        method: Method of the adapter, or None for a base model.
        text_tokenizer: Tokenizer of the model, or None if the model reads images.
        reference: Reference of the model, for messages.
        task_name: Task of the model, for messages.
        generates_text: True if the model generates text.
        sampler: Library that generates on a GPU: "vllm", "transformers", or "auto" for vLLM if possible.
        is_base: True inside :meth:`base`, while the adapter is disabled.
    """

    model: PreTrainedModel
    method: Method | None
    text_tokenizer: PreTrainedTokenizerBase | None
    reference: str
    task_name: str
    generates_text: bool
    sampler: str = field(default="auto", kw_only=True)
    is_base: bool = field(default=False, repr=False, init=False)

    @property
    def adapter(self) -> bool:
        """True if the model has an adapter."""
        return self.method is not None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model.

        Raises:
            UserError: if the model reads images.
        """
        if self.text_tokenizer is None:
            raise UserError("the model reads images, not text", location=self.reference, hint="use eval")
        return self.text_tokenizer

    @property
    def virtual_tokens(self) -> int:
        """Number of positions that the adapter prepends to each row."""
        return 0 if self.method is None or self.is_base else self.method.virtual_tokens

    def prompt(self, tokens: np.ndarray) -> np.ndarray:
        """Prepend the adapter's virtual tokens to a prompt."""
        return tokens if self.method is None or self.is_base else self.method.with_virtual_tokens(tokens)

    def invocation_warning(self, prompts: Sequence[np.ndarray]) -> str | None:
        """Return a warning about prompts that lack the adapter's invocation sequence, or None."""
        invocation = None if self.method is None else self.method.invocation
        if invocation is None:
            return None
        count = sum(last_occurrence(prompt, invocation) is None for prompt in prompts)
        if not count:
            return None
        text = self.tokenizer.decode(list(invocation))
        subject = f"{count:,} of {len(prompts):,} prompts do" if len(prompts) > 1 else "the prompt does"
        return f"{subject} not have {text!r}, which activates the adapter: the base model alone answers"

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Disable the adapter inside this context. Contexts can be nested."""
        if self.method is None or self.is_base:
            yield
            return
        with self.method.base_model_active(self.model):
            self.is_base = True
            try:
                yield
            finally:
                self.is_base = False

    def require_generation(self) -> None:
        """Raise a UserError if the model does not generate text."""
        if not self.generates_text:
            message = f"the model is for {self.task_name} and does not generate text"
            raise UserError(message, location=self.reference, hint="use deltaw eval")
