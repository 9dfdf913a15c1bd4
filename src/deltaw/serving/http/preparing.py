"""A request of the API becomes requests to the engine (which adapter, how many tokens, which seeds), and its texts
are followed until they end.

Knows the fields of requests and the limits; not how answers are written.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.chat_template import todays_date
from deltaw.data.messages import read_messages
from deltaw.data.settings import DataSettings
from deltaw.data.templates import Encoder, TemplateName
from deltaw.errors import UserError
from deltaw.serving.http.errors import ApiError, refused
from deltaw.serving.http.requests import ChatRequest, CompletionRequest, json_constraint
from deltaw.serving.http.served import Prompts, Served
from deltaw.serving.http.settings import Limits
from deltaw.serving.http.tool_calls import CallForm, forced_schema, form_of
from deltaw.serving.request import Constraint, Piece, Request, TextEngine, UnknownAdapterError, Writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# ---- The texts of requests, between an engine's thread and the event loop: taken in, followed, and let go.
#
# The engine tells of each piece as it comes, and the event loop looks at what came; neither waits for the other.
# Knows neither HTTP nor what the texts are about.


# Seconds after a request's own time, in which the engine must have ended its texts.
GRACE = 10.0


class Texts:
    """The texts of one request, as they are written.

    Args:
        count: of texts. ended: told, from any thread, how many have ended.
        seconds: after which they are given up.
    """

    def __init__(self, count: int, ended: Callable[[int], None], seconds: float) -> None:
        self._writings: list[Writing] = []
        self._left, self._ended = count, ended
        self._cancelled = self._late = False
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._came: deque[tuple[int, Piece]] = deque()
        self._news = asyncio.Event()
        self._seconds = seconds

    def submit(self, engine: TextEngine, requests: Sequence[Request]) -> None:
        """Let an engine write them. Called in another thread, since a constraint takes time to compile."""
        for index, request in enumerate(requests):
            writing = engine.submit(request, functools.partial(self._tell, index))
            self._writings.append(writing)
            if self._cancelled:
                writing.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all texts as they come, each with its text's place; ends with the last text.

        Raises:
            Exception: what the engine failed with.
        """
        open_texts = len(self._writings)
        timer = self._loop.call_later(self._seconds + GRACE, self._give_up)
        try:
            while open_texts:
                await self._news.wait()
                self._news.clear()
                while self._came:
                    index, piece = self._came.popleft()
                    if piece.finish == "error":
                        self._writings[index].result()  # raises what the engine failed with
                    open_texts -= piece.finish is not None
                    yield index, piece
                if self._late:
                    raise ApiError(504, "the engine did not end the text in time", code="timeout")
        finally:
            timer.cancel()
            self.cancel()

    def cancel(self) -> None:
        """Let go of what is not yet written."""
        self._cancelled = True
        for writing in list(self._writings):
            writing.cancel()

    def abandon(self) -> None:
        """Let go of texts that were not all taken by the engine; nobody follows them."""
        self.cancel()
        self._end(self._left)

    def _give_up(self) -> None:
        self._late = True
        self.cancel()
        self._news.set()

    def _tell(self, index: int, piece: Piece) -> None:
        """A piece came; called on the engine's thread."""
        self._came.append((index, piece))
        # One call into the loop is enough for all that comes until it looks.
        if not self._news.is_set():
            # A loop that is closed has nobody left who waits.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._news.set)
        if piece.finish is not None:
            self._end(1)

    def _end(self, count: int) -> None:
        with self._lock:
            count = min(count, self._left)
            self._left -= count
        self._ended(count)


class Desk:
    """Takes requests in, as many as there may be at once.

    Args:
        engine: that writes. most: texts in hand at once. seconds: for each.
    """

    def __init__(self, engine: TextEngine, *, most: int, seconds: float) -> None:
        self._engine = engine
        self._most = most
        self._seconds = seconds
        self._lock = threading.Lock()
        self._in_hand = 0
        self._open: set[Texts] = set()
        self.closing = False
        self._preparing = ThreadPoolExecutor(4, "deltaw-prepare")
        # Each may wait for a constraint.
        self._submitting = ThreadPoolExecutor(most, "deltaw-submit")
        self._submitted: set[asyncio.Future[None]] = set()

    @property
    def in_hand(self) -> int:
        """Texts that are waiting or being written."""
        return self._in_hand

    async def elsewhere(self, work: Callable[[], list[Request]]) -> list[Request]:
        """The requests that ``work`` makes, in another thread: rendering and tokenizing takes time."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work)

    def check_room(self, count: int) -> None:
        """Refuse what would not be taken in, before work is spent on it.

        Raises:
            ApiError: 429 or 503.
        """
        if self.closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        if self._in_hand + count > self._most:
            raise ApiError(
                429,
                f"{self._in_hand} texts are in hand, and {self._most} may be: ask again later",
                code="queue_full",
                retry_after=1,
            )

    async def write(self, requests: Sequence[Request]) -> Texts:
        """Let the engine write these texts.

        Raises:
            ApiError: 429 the queue is full; 503 the server is shutting down.
            UserError: the engine refuses a request; then none of them is written.
        """
        with self._lock:
            self.check_room(len(requests))
            self._in_hand += len(requests)
        texts = Texts(len(requests), self._release, self._seconds)
        loop = asyncio.get_running_loop()
        submitted = loop.run_in_executor(self._submitting, texts.submit, self._engine, requests)
        self._submitted.add(submitted)
        try:
            await submitted
        except BaseException:
            texts.abandon()
            if self.closing:
                self.check_room(0)
            raise
        finally:
            self._submitted.discard(submitted)
        self._open.add(texts)
        return texts

    def done(self, texts: Texts) -> None:
        """Nobody waits for these texts any more."""
        texts.cancel()
        self._open.discard(texts)

    def turn_away(self) -> None:
        """Take in no more, and let nobody wait for a constraint any longer."""
        self.closing = True
        self._engine.hurry()
        for submitted in self._submitted:
            submitted.cancel()

    def cancel_all(self) -> None:
        """Let go of all texts in hand; those who wait for them are told."""
        for texts in list(self._open):
            texts.cancel()

    def close(self) -> None:
        """End the threads; the engine must have been closed."""
        self._preparing.shutdown(wait=True, cancel_futures=True)
        self._submitting.shutdown(wait=True)

    def _release(self, count: int) -> None:
        with self._lock:
            self._in_hand -= count


# ---- Prompts through a tokenizer and its chat template, rendered as the rows of an adapter's training were.
#
# Knows tokenizers and the settings of a run's data; not HTTP.


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


# ---- From the fields of a request to requests to the engine.


def adapter_named(served: Served, model: str) -> str | None:
    """The adapter that a request asks for; None for the base model.

    Raises:
        ApiError: 404, there is no such model; 501, the model writes no text.
    """
    if model != served.name and model not in served.adapters():
        raise ApiError(
            404,
            f"there is no model '{model[:128]}': /v1/models lists those there are",
            param="model",
            code="model_not_found",
        )
    if served.engine is None:
        raise ApiError(400, f"'{model}' writes no text", param="model", code="model_not_supported")
    return None if model == served.name else model


def check_choices(count: int, limits: Limits) -> None:
    """Refuse more texts than one request may ask for."""
    if count > limits.choices:
        raise ApiError(
            400,
            f"{count} texts are asked for, and a request may have {limits.choices}",
            param="n",
            code="invalid_value",
        )


def text_requests(
    asked: ChatRequest | CompletionRequest, adapter: str | None, served: Served, limits: Limits, owner: int = 0
) -> list[Request]:
    """The requests for the choices of a chat, or of a completion's prompts, prompt by prompt.

    Args:
        owner: who asks, as in :class:`deltaw.serving.request.Request`.

    Raises:
        ApiError: a prompt is empty or too long, or a conversation cannot be rendered.
    """
    prompts = _prompts_of(served, adapter)
    if isinstance(asked, ChatRequest):
        given = [_chat_tokens(asked, prompts, served, limits)]
        constraint = _forced(asked) if asked.forced else asked.constraint()
    else:
        given = [_prompt_tokens(prompt, prompts, served, limits) for prompt in asked.prompts]
        constraint = asked.constraint()
    sampling = asked.sampling()
    # Each choice draws with a seed of its own, which does not depend on what else is asked for.
    seeds: Sequence[int] = [(sampling.seed + number) % (1 << 63) for number in range(asked.choices)]
    return [
        Request(
            tokens=tokens,
            adapter=adapter,
            sampling=replace(sampling, seed=seed),
            constraint=constraint,
            max_new_tokens=_new_tokens(asked.most_tokens, tokens, served, limits),
            stop=asked.stops,
            stop_ids=() if asked.ignore_eos else None,
            seconds=limits.seconds,
            prompt_logprobs=asked.prompt_logprobs,
            owner=owner,
        )
        for tokens in given
        for seed in seeds
    ]


def _chat_tokens(asked: ChatRequest, prompts: Prompts, served: Served, limits: Limits) -> np.ndarray:
    tools = [tool.model_dump(exclude_none=True) for tool in asked.offered]
    turns = [message.as_turn() for message in asked.messages]
    _refuse_long(json.dumps([turns, tools], ensure_ascii=False), prompts, served, limits)
    try:
        return prompts.chat(turns, tools)
    except UserError as error:
        raise refused(error, param="messages") from error


def _prompt_tokens(prompt: str | list[int], prompts: Prompts, served: Served, limits: Limits) -> np.ndarray:
    if isinstance(prompt, str):
        _refuse_long(prompt, prompts, served, limits)
    tokens = prompts.text(prompt) if isinstance(prompt, str) else np.asarray(prompt, dtype=np.int32)
    if not len(tokens):
        raise ApiError(400, "a prompt is empty", param="prompt", code="invalid_value")
    return tokens


def _prompts_of(served: Served, adapter: str | None) -> Prompts:
    try:
        return served.prompts(adapter)
    except UnknownAdapterError as error:
        raise refused(error) from error


def _refuse_long(text: str, prompts: Prompts, served: Served, limits: Limits) -> None:
    """Refuse what is far too long before all of it is tokenized, which would take seconds."""
    most = min(limits.prompt, served.positions or limits.prompt)
    if surely_longer(text, most, prompts.text):
        raise _too_long(f"the prompt has far more than {most:,} tokens")


def _new_tokens(most: int | None, tokens: np.ndarray, served: Served, limits: Limits) -> int:
    """How many tokens may be written behind a prompt."""
    if len(tokens) > limits.prompt:
        raise _too_long(f"the prompt has {len(tokens):,} tokens, and {limits.prompt:,} are allowed")
    if most is not None and most > limits.new_tokens:
        raise ApiError(
            400,
            f"{most:,} new tokens are asked for, and {limits.new_tokens:,} are allowed",
            param="max_tokens",
            code="invalid_value",
        )
    most = limits.new_tokens if most is None else most
    if served.positions is None:
        return most
    room = served.positions - len(tokens)
    if room < min(1, most):
        raise _too_long(f"the prompt has {len(tokens):,} tokens, and the model has {served.positions:,} positions")
    return min(most, room)


def _forced(asked: ChatRequest) -> Constraint:
    try:
        schema = forced_schema([(function.name, function.parameters) for function in asked.forced])
    except UserError as error:
        raise refused(error, param="tools") from error
    return json_constraint(schema, "tools")


def _too_long(message: str) -> ApiError:
    return ApiError(400, message, param="prompt", code="context_length_exceeded")
