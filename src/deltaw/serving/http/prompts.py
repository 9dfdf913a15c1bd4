"""Conversion of requested prompts to tokens, with checks of their length before work is done."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence, Sized
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.chat_template import todays_date
from deltaw.data.image_files import BROKEN, decode_error, open_image
from deltaw.data.messages import read_messages
from deltaw.data.row_images import RowImage, take_images, without_markers
from deltaw.data.rows import NO_FOLDER, Row
from deltaw.data.templates import Encoder
from deltaw.errors import UserError
from deltaw.inference.prompting import Prompting
from deltaw.serving.http.tool_calls import CallForm, form_of
from deltaw.settings.data import DataSettings, TemplateName
from deltaw.training.features.images import RowImages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A text with at most this number of characters per allowed token is tokenized without a check of its length. A text
# with this multiple of the allowed tokens is too long, even if a template shortens it.
_LENGTH_RATIO = 4
# Maximum number of pixels of the images of a request.
MAX_PIXELS = 1 << 25


class TokenizerPrompts:
    """Renders and tokenizes prompts in the same way as the training rows of an adapter.

    Args:
        tokenizer: Tokenizer of the adapter or the base model, with its chat template.
        data: Data settings of the adapter's run, or None if unknown.
        images: Images in prompts of a vision-language model, or None if the model reads text only.
        prompting: Prompt format of the training rows, whose system prompt is added to conversations without one.

    Attributes:
        call_form: Tool call format of the chat template, or None.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: DataSettings | None = None,
        images: RowImages | None = None,
        prompting: Prompting | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._images = images
        self._prompting = prompting or Prompting()
        self._template: TemplateName = "auto"
        self._date: str | None = None
        if data is not None:
            self._template = "plain" if data.form == "text" else data.template
            self._date = data.date
        # Tokenizers are not thread-safe.
        self._lock = threading.Lock()
        self._plain = Encoder(tokenizer, "plain")
        self._day = todays_date()
        self._chat = self._encoder(self._day)
        self.call_form = self._find_call_form() if self._chat.chat else None
        self._bytes: dict[int, bytes] = {}

    def chat(
        self, messages: Sequence[dict[str, object]], tools: Sequence[dict[str, object]], *, add_system: bool = True
    ) -> np.ndarray:
        """Return the (length,) int32 token ids of a conversation, up to the start of the assistant's turn.

        Args:
            add_system: Add the system prompt of the training rows to a conversation without one.

        Raises:
            UserError: if the chat template rejects the messages or does not support tools, or an image is unusable.
            BusyError: if too many images are in use.
        """
        row: Row = {"messages": list(messages)}
        images: list[RowImage] = []
        if self._images is not None:
            row = without_markers(row, self._images)
            tools = without_markers(tools, self._images)
            row, row_images = take_images(row, NO_FOLDER, "messages")
            images = decoded_images(row_images)
        turns = read_messages(row["messages"], "messages", "messages")
        system = self._prompting.system
        if system and add_system and all(turn["role"] != "system" for turn in turns):
            turns = [{"role": "system", "content": system}, *turns]
        with self._lock:
            if (today := todays_date()) != self._day:
                # The template contains the current date.
                self._day, self._chat = today, self._encoder(today)
            if tools and not (self._chat.chat and "tools" in self._template_text()):
                raise UserError("the model's chat template does not support tools", location="tools")
            if images and self._images is not None:
                self._images.discard_unused()
            prompt = turns if self._chat.chat else self._prompting.join(turns)
            tokens = np.asarray(self._chat.prompt(prompt, list(tools), images), dtype=np.int32)
            if images and self._images is not None:
                self._images.retain(tokens)
            return tokens

    def text(self, text: str) -> np.ndarray:
        """Return the (length,) int32 token ids of a text, with initial special tokens such as BOS."""
        with self._lock:
            return np.asarray(self._plain.prompt(text), dtype=np.int32)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token in a text. For a special token, its name."""
        cached = self._bytes.get(token)
        if cached is None:
            # No lock: the event loop must not wait for a long prompt, and this only reads.
            cached = self._bytes[token] = bytes_of_token(self._tokenizer, token)
        return cached

    def _encoder(self, today: str) -> Encoder:
        return Encoder(self._tokenizer, self._template, date=self._date or today, images=self._images)

    def _find_call_form(self) -> CallForm | None:
        form = form_of(self._template_text())
        if form is None or not form.opening:
            return form
        for token, added in self._tokenizer.added_tokens_decoder.items():
            if added.special and added.content == form.opening:
                return replace(form, mark=token)
        return form

    def _template_text(self) -> str:
        template = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else str(template or "")


def decoded_images(images: Sequence[RowImage]) -> list[RowImage]:
    """Decode the images of a request.

    Raises:
        BadRowError: if an image cannot be decoded.
        UserError: if they have too many pixels.
    """
    decoded = []
    num_pixels = 0
    for image in images:
        assert isinstance(image.content, bytes)
        try:
            with open_image(image.content) as opened:
                num_pixels += opened.width * opened.height
        except BROKEN as error:
            raise decode_error(error, image.location) from error
        if num_pixels > MAX_PIXELS:
            message = f"the images have more than {MAX_PIXELS:,} pixels"
            raise UserError(message, location=image.location, hint="send fewer or smaller images")
        decoded.append(RowImage(image.decoded(), image.location))
    return decoded


def far_exceeds(text: str, max_tokens: int, tokens: Callable[[str], Sized]) -> bool:
    """Return True if a text certainly has far more than ``max_tokens`` tokens, by tokenizing only as much as necessary.

    Args:
        text: The text.
        max_tokens: Maximum number of tokens.
        tokens: Tokenizes a text.
    """
    size = _LENGTH_RATIO * max_tokens
    count = 0
    for start in range(0, len(text), size) if len(text) > size else ():
        count += len(tokens(text[start : start + size]))
        if count > _LENGTH_RATIO * max_tokens:
            return True
    return False


def bytes_of_token(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """Return the bytes of a token. A character can be spread over several tokens.

    Byte-level vocabularies represent each byte by a character (GPT-2). Other vocabularies have byte tokens such as
    ``<0x0A>``.
    """
    name = tokenizer.convert_ids_to_tokens(int(token))
    if not isinstance(name, str):
        return b""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    text = str(tokenizer.decode([int(token)], clean_up_tokenization_spaces=False))
    byte_of = _byte_alphabet()
    if "\ufffd" in text and all(letter in byte_of for letter in name):
        return bytes(byte_of[letter] for letter in name)
    if name.startswith("\u2581") and not text.startswith(" "):
        text = " " + text  # the decoder strips the leading space of a text
    return text.encode("utf-8", "replace")


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character in the alphabet of byte-level vocabularies."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
