"""Prompts through a tokenizer and its chat template, rendered as the rows of an adapter's training were.

Knows tokenizers and the settings of a run's data; not HTTP.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence, Sized
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.chat_template import todays_date
from deltaw.data.messages import read_messages
from deltaw.data.settings import DataSettings
from deltaw.data.templates import Encoder, TemplateName
from deltaw.errors import UserError
from deltaw.serving.http.tool_calls import CallForm, form_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Texts of so many times the characters that there may be tokens are tokenized without a second look; those of
# so many times the tokens are too long, however a template may shorten them.
_FEW = 4


class TokenizerPrompts:
    """Renders prompts with one tokenizer.

    Args:
        tokenizer: of the adapter or the base model, with its chat template.
        data: how the adapter's rows were read; None where that is not known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSettings | None = None) -> None:
        self._tokenizer = tokenizer
        self._template: TemplateName = "auto"
        self._date: str | None = None
        if data is not None:
            self._template = "plain" if data.form == "text" else data.template
            self._date = data.date
        # Tokenizers are not made for several threads at once.
        self._lock = threading.Lock()
        self._plain = Encoder(tokenizer, "plain")
        self._day = todays_date()
        self._chat = self._encoder(self._day)
        self._form = self._form_of_template() if self._chat.chat else None
        self._bytes: dict[int, bytes] = {}

    @property
    def call_form(self) -> CallForm | None:
        """How the chat template lets a model write calls of tools."""
        return self._form

    def chat(self, messages: Sequence[dict[str, object]], tools: Sequence[dict[str, object]]) -> np.ndarray:
        """A conversation through what opens the assistant's turn: int32 (length,).

        Raises:
            UserError: the template does not take it, or has no place for tools.
        """
        turns = read_messages(list(messages), "messages", "messages")
        with self._lock:
            if (today := todays_date()) != self._day:
                # A server outlives the date that a template writes.
                self._day, self._chat = today, self._encoder(today)
            if tools and not (self._chat.chat and "tools" in self._template_text()):
                raise UserError("the model's chat template has no place for tools", where="tools")
            return np.asarray(self._chat.prompt(turns, list(tools)), dtype=np.int32)

    def text(self, text: str) -> np.ndarray:
        """Plain text with the tokens that open every text, such as BOS: int32 (length,)."""
        with self._lock:
            return np.asarray(self._plain.prompt(text), dtype=np.int32)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for in a text; for a special token, its name."""
        known = self._bytes.get(token)
        if known is None:
            # Without the lock, since an event loop asks, and a long prompt may be under way: this only reads.
            known = self._bytes[token] = bytes_of_token(self._tokenizer, token)
        return known

    def _encoder(self, today: str) -> Encoder:
        return Encoder(self._tokenizer, self._template, date=self._date or today)

    def _form_of_template(self) -> CallForm | None:
        form = form_of(self._template_text())
        if form is None or not form.opening:
            return form
        for token, known in self._tokenizer.added_tokens_decoder.items():
            if known.special and known.content == form.opening:
                return replace(form, mark=token)
        return form

    def _template_text(self) -> str:
        template = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else str(template or "")


def surely_longer(text: str, most: int, tokens: Callable[[str], Sized]) -> bool:
    """Whether a text has many more than ``most`` tokens, told from no more of it than that takes.

    Args:
        tokens: of a text.
    """
    size, found = _FEW * most, 0
    for start in range(0, len(text), size) if len(text) > size else ():
        found += len(tokens(text[start : start + size]))
        if found > _FEW * most:
            return True
    return False


def bytes_of_token(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """What a token stands for: bytes, since a character may be spread over several tokens.

    Byte-level vocabularies write each byte as a character (GPT-2); others have tokens named ``<0x0A>``.
    """
    name = tokenizer.convert_ids_to_tokens(int(token))
    if not isinstance(name, str):
        return b""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    text = str(tokenizer.decode([int(token)], clean_up_tokenization_spaces=False))
    if "\ufffd" in text and all(letter in _BYTE_OF for letter in name):
        return bytes(_BYTE_OF[letter] for letter in name)
    if name.startswith("\u2581") and not text.startswith(" "):
        text = " " + text  # a decoder drops the space that begins a text
    return text.encode("utf-8", "replace")


def _byte_letters() -> dict[str, int]:
    """The character that byte-level vocabularies write for each byte, and the byte: the printable ones stand
    for themselves, the others for those from 256 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
