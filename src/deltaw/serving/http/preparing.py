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
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaw.data.chat_template import todays_date
from deltaw.data.messages import read_messages
from deltaw.data.settings import DataSettings
from deltaw.data.templates import Encoder, TemplateName
from deltaw.errors import UserError
from deltaw.serving.http.errors import ApiError, concerning
from deltaw.serving.http.requests import ChatRequest, CompletionRequest, json_constraint
from deltaw.serving.http.served import Prompts, Served
from deltaw.serving.http.settings import Limits
from deltaw.serving.http.tool_calls import CallForm, forced_schema, form_of
from deltaw.serving.request import Constraint, Piece, Request, TextEngine, Writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Seconds after a request's own time, in which the engine must have ended its texts.
GRACE = 10.0


class Texts:
    """The texts of one request, as they are written.

    The engine tells of each piece as it comes, and the event loop looks at what came; neither waits for the other.

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
        engine: that writes.

    Attributes:
        in_hand: texts that are waiting or being written. closing: whether no more are taken in.
        preparing: threads for rendering and tokenizing, which take time.
    """

    def __init__(self, engine: TextEngine, limits: Limits) -> None:
        self._engine, self._limits = engine, limits
        self._lock = threading.Lock()
        self._open: set[Texts] = set()
        self.in_hand, self.closing = 0, False
        self.preparing = ThreadPoolExecutor(4, "deltaw-prepare")
        # Each may wait for a constraint.
        self._submitting = ThreadPoolExecutor(limits.queue, "deltaw-submit")
        self._submitted: set[asyncio.Future[None]] = set()

    def check_room(self, count: int) -> None:
        """Refuse what would not be taken in, before work is spent on it.

        Raises:
            ApiError: 429 or 503.
        """
        if self.closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        if self.in_hand + count > self._limits.queue:
            message = f"{self.in_hand} texts are in hand, and {self._limits.queue} may be: ask again later"
            raise ApiError(429, message, code="queue_full", retry_after=1)

    async def write(self, requests: Sequence[Request]) -> Texts:
        """Let the engine write these texts.

        Raises:
            ApiError: 429 the queue is full; 503 the server is shutting down.
            UserError: the engine refuses a request; then none of them is written.
        """
        with self._lock:
            self.check_room(len(requests))
            self.in_hand += len(requests)
        texts = Texts(len(requests), self._release, self._limits.seconds)
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
        self.preparing.shutdown(wait=True, cancel_futures=True)
        self._submitting.shutdown(wait=True)

    def _release(self, count: int) -> None:
        with self._lock:
            self.in_hand -= count


# Texts of so many times the characters that there may be tokens are tokenized without a second look; those of
# so many times the tokens are too long, however a template may shorten them.
_FEW = 4


class TokenizerPrompts:
    """Renders prompts with one tokenizer, as the rows of an adapter's training were.

    Args:
        tokenizer: of the adapter or the base model, with its chat template.
        data: how the adapter's rows were read; None where that is not known.

    Attributes:
        call_form: how the chat template lets a model write calls of tools.
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
        self.call_form = self._form_of_template() if self._chat.chat else None
        self._bytes: dict[int, bytes] = {}

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
    byte_of = _byte_letters()
    if "\ufffd" in text and all(letter in byte_of for letter in name):
        return bytes(byte_of[letter] for letter in name)
    if name.startswith("\u2581") and not text.startswith(" "):
        text = " " + text  # a decoder drops the space that begins a text
    return text.encode("utf-8", "replace")


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The character that byte-level vocabularies write for each byte, and the byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def text_requests(
    asked: ChatRequest | CompletionRequest, adapter: str | None, served: Served, limits: Limits, owner: int = 0
) -> list[Request]:
    """The requests for the choices of a chat, or of a completion's prompts, prompt by prompt.

    Args:
        owner: who asks, as in :class:`deltaw.serving.request.Request`.

    Raises:
        ApiError: a prompt is empty or too long, or a conversation cannot be rendered.
    """
    prompts = served.prompts(adapter)
    longest = min(limits.prompt, served.positions or limits.prompt)
    if isinstance(asked, ChatRequest):
        given = [_chat_tokens(asked, prompts, longest)]
        constraint = _forced(asked) if asked.forced else asked.constraint()
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        scored = False  # a prompt's own tokens get no log-probabilities
    else:
        given = [_prompt_tokens(prompt, prompts, longest) for prompt in asked.prompts]
        constraint, logprobs, most = asked.constraint(), asked.logprobs, asked.max_tokens
        scored = asked.echo is True and logprobs is not None
    sampling = asked.sampling(logprobs)
    # Each choice draws with a seed of its own, which does not depend on what else is asked for.
    seeds: Sequence[int] = [(sampling.seed + number) % (1 << 63) for number in range(asked.choices)]
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    how: dict[str, Any] = {"stop": stop, "stop_ids": () if asked.ignore_eos else None, "seconds": limits.seconds}
    how |= {"constraint": constraint, "prompt_logprobs": scored, "owner": owner}
    requests = []
    for tokens in given:
        how["max_new_tokens"] = _new_tokens(most, tokens, served, limits)
        requests += [Request(tokens, adapter, replace(sampling, seed=seed), **how) for seed in seeds]
    return requests


def _chat_tokens(asked: ChatRequest, prompts: Prompts, longest: int) -> np.ndarray:
    tools = [tool.model_dump(exclude_none=True) for tool in asked.offered]
    turns = [message.as_turn() for message in asked.messages]
    _refuse_long(json.dumps([turns, tools], ensure_ascii=False), prompts, longest)
    with concerning("messages"):
        return prompts.chat(turns, tools)


def _prompt_tokens(prompt: str | list[int], prompts: Prompts, longest: int) -> np.ndarray:
    if not isinstance(prompt, str):
        return np.asarray(prompt, dtype=np.int32)
    _refuse_long(prompt, prompts, longest)
    tokens = prompts.text(prompt)
    if not len(tokens):
        raise ApiError(400, "a prompt is empty", param="prompt")
    return tokens


def _refuse_long(text: str, prompts: Prompts, most: int) -> None:
    """Refuse what is far too long before all of it is tokenized, which would take seconds."""
    if surely_longer(text, most, prompts.text):
        raise _too_long(f"the prompt has far more than {most:,} tokens")


def _new_tokens(most: int | None, tokens: np.ndarray, served: Served, limits: Limits) -> int:
    """How many tokens may be written behind a prompt."""
    if len(tokens) > limits.prompt:
        raise _too_long(f"the prompt has {len(tokens):,} tokens, and {limits.prompt:,} are allowed")
    most = limits.new_tokens if most is None else most
    if most > limits.new_tokens:
        message = f"{most:,} new tokens are asked for, and {limits.new_tokens:,} are allowed"
        raise ApiError(400, message, param="max_tokens")
    if served.positions is None:
        return most
    room = served.positions - len(tokens)
    if room < min(1, most):
        raise _too_long(f"the prompt has {len(tokens):,} tokens, and the model has {served.positions:,} positions")
    return min(most, room)


def _forced(asked: ChatRequest) -> Constraint:
    with concerning("tools"):
        schema = forced_schema([(function.name, function.parameters) for function in asked.forced])
    return json_constraint(schema, "tools")


def _too_long(message: str) -> ApiError:
    return ApiError(400, message, param="prompt", code="context_length_exceeded")
