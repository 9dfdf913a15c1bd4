"""Queue of API requests: validates and tokenizes them, submits them to the engine, and follows their completions."""

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
from deltaw.data.image_files import BROKEN, decode_error, open_image
from deltaw.data.messages import read_messages
from deltaw.data.row_images import RowImage, take_images, without_markers
from deltaw.data.rows import NO_FOLDER, Row
from deltaw.data.templates import Encoder
from deltaw.decoding.request import Constraint, GenerationHandle, Request, TextChunk, TextEngine
from deltaw.errors import UserError
from deltaw.serving.http.errors import ApiError, blame_field
from deltaw.serving.http.requests import ChatRequest, CompletionRequest, json_constraint
from deltaw.serving.http.served import Served, TokenizedPrompts
from deltaw.serving.http.settings import Limits
from deltaw.serving.http.tool_calls import CallForm, forced_schema, form_of
from deltaw.settings.data import DataSettings, TemplateName
from deltaw.training.answers import Prompting
from deltaw.training.features.images import RowImages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Seconds after a request's time limit until the server stops waiting for the engine.
GRACE = 10.0


class RequestGroup:
    """The completions of one API request.

    The engine's thread adds chunks and the event loop reads them. Neither blocks the other.

    Args:
        count: Number of completions.
        on_finish: Called from any thread with the number of completions that have finished.
        seconds: Time limit.
    """

    def __init__(self, count: int, on_finish: Callable[[int], None], seconds: float) -> None:
        self._handles: list[GenerationHandle] = []
        self._num_unfinished, self._on_finish = count, on_finish
        self._cancelled = self._timed_out = False
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._received: deque[tuple[int, TextChunk]] = deque()
        self._wakeup = asyncio.Event()
        self._seconds = seconds

    def submit(self, engine: TextEngine, requests: Sequence[Request]) -> None:
        """Submit the requests to the engine. Call it on a worker thread, because compiling a constraint takes time."""
        for index, request in enumerate(requests):
            handle = engine.submit(request, functools.partial(self._on_chunk, index))
            self._handles.append(handle)
            if self._cancelled:
                handle.cancel()

    async def chunks(self) -> AsyncIterator[tuple[int, TextChunk]]:
        """Yield the chunks of all completions with the index of their completion, until all have finished.

        Raises:
            Exception: if the engine failed.
            ApiError: 504 if the engine does not finish in time.
        """
        num_running = len(self._handles)
        timer = self._loop.call_later(self._seconds + GRACE, self._time_out)
        try:
            while num_running:
                await self._wakeup.wait()
                self._wakeup.clear()
                while self._received:
                    index, chunk = self._received.popleft()
                    if chunk.finish == "error":
                        self._handles[index].result()  # raises the engine's error
                    num_running -= chunk.finish is not None
                    yield index, chunk
                if self._timed_out:
                    raise ApiError(504, "the engine did not finish in time", code="timeout")
        finally:
            timer.cancel()
            self.cancel()

    def cancel(self) -> None:
        """Cancel all unfinished completions."""
        self._cancelled = True
        for handle in list(self._handles):
            handle.cancel()

    def abandon(self) -> None:
        """Cancel the group after the engine rejected one of its requests."""
        self.cancel()
        self._finish(self._num_unfinished)

    def _time_out(self) -> None:
        self._timed_out = True
        self.cancel()
        self._wakeup.set()

    def _on_chunk(self, index: int, chunk: TextChunk) -> None:
        """Receive a chunk. Called on the engine's thread."""
        self._received.append((index, chunk))
        # One wakeup is enough for all chunks until the event loop reads them.
        if not self._wakeup.is_set():
            # If the event loop is closed, no reader is waiting.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wakeup.set)
        if chunk.finish is not None:
            self._finish(1)

    def _finish(self, count: int) -> None:
        with self._lock:
            count = min(count, self._num_unfinished)
            self._num_unfinished -= count
        self._on_finish(count)


class RequestQueue:
    """Admits requests up to a limit and submits them to the engine.

    Args:
        engine: Engine that generates the text.
        limits: Limits of the server.

    Attributes:
        pending: Number of completions that are being prepared, queued or running.
        closing: True if no new requests are accepted.
    """

    def __init__(self, engine: TextEngine, limits: Limits) -> None:
        self._engine, self._limits = engine, limits
        self._lock = threading.Lock()
        self._groups: set[RequestGroup] = set()
        self.pending, self.closing = 0, False
        self._tokenizer_pool = ThreadPoolExecutor(4, "deltaw-prepare")
        # One thread. With several threads, images could be removed before their prompt is complete.
        self._image_pool = ThreadPoolExecutor(1, "deltaw-images")
        # Each thread may wait for the compilation of a constraint.
        self._submitting = ThreadPoolExecutor(limits.queue, "deltaw-submit")
        self._submitted: set[asyncio.Future[None]] = set()

    def check_capacity(self, count: int) -> None:
        """Reject requests that would exceed the limit, before any work is done.

        Raises:
            ApiError: 429 if the queue is full, 503 during shutdown.
        """
        if self.closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        if self.pending + count > self._limits.queue:
            message = f"too many requests: {self.pending} pending, limit {self._limits.queue}; retry later"
            raise ApiError(429, message, code="queue_full", retry_after=1)

    async def prepare(self, count: int, has_images: bool, build: Callable[[], list[Request]]) -> list[Request]:
        """Build ``count`` requests on another thread. They are pending until they are submitted and have finished.

        Raises:
            ApiError: 429 if the queue is full, 503 during shutdown.
            Exception: of ``build``. The requests are no longer pending then.
        """
        with self._lock:
            self.check_capacity(count)
            self.pending += count
        pool = self._image_pool if has_images else self._tokenizer_pool
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, build)
        except BaseException:
            self._release_slots(count)
            raise

    async def submit(self, requests: Sequence[Request]) -> RequestGroup:
        """Submit prepared requests to the engine.

        Raises:
            ApiError: 503 during shutdown.
            UserError: if the engine rejects a request. All of them are cancelled then.
        """
        group = RequestGroup(len(requests), self._release_slots, self._limits.seconds)
        if self.closing:
            group.abandon()
            self.check_capacity(0)
        submission = asyncio.get_running_loop().run_in_executor(self._submitting, group.submit, self._engine, requests)
        self._submitted.add(submission)
        try:
            await submission
        except BaseException:
            group.abandon()
            if self.closing:
                self.check_capacity(0)
            raise
        finally:
            self._submitted.discard(submission)
        self._groups.add(group)
        return group

    def release(self, group: RequestGroup) -> None:
        """Cancel the unfinished completions of a group, and forget it."""
        group.cancel()
        self._groups.discard(group)

    def reject_new(self) -> None:
        """Stop accepting requests, and cancel those that wait for constraints."""
        self.closing = True
        self._engine.cancel_slow()
        for submission in self._submitted:
            submission.cancel()

    def cancel_all(self) -> None:
        """Cancel all completions. Their requests receive an error."""
        for group in list(self._groups):
            group.cancel()

    def close(self) -> None:
        """Stop the threads. The engine must be closed already."""
        for pool in (self._tokenizer_pool, self._image_pool):
            pool.shutdown(wait=True, cancel_futures=True)
        self._submitting.shutdown(wait=True)

    def _release_slots(self, count: int) -> None:
        with self._lock:
            self.pending -= count


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
        self._tokenizer, self._images = tokenizer, images
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
            row, tools = without_markers(row, self._images), without_markers(tools, self._images)
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
    decoded, num_pixels = [], 0
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
    size, count = _LENGTH_RATIO * max_tokens, 0
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


def build_requests(
    fields: ChatRequest | CompletionRequest, adapter: str | None, served: Served, limits: Limits, owner: int = 0
) -> list[Request]:
    """Build the engine requests of a chat or of a completion's prompts. All choices of a prompt are consecutive.

    Args:
        fields: Fields of the API request.
        adapter: Name of the adapter, or None for the base model.
        served: The served model.
        limits: Limits of the server.
        owner: Owner of the request (see :class:`deltaw.decoding.request.Request`).

    Raises:
        ApiError: if a prompt is empty or too long, or a conversation cannot be rendered.
    """
    prompts, images = served.prompts(adapter), served.images
    max_length = min(limits.prompt, served.positions or limits.prompt)
    if isinstance(fields, ChatRequest):
        prompt_tokens = [_chat_tokens(fields, prompts, max_length)]
        constraint = _forced_constraint(fields) if fields.forced_functions else fields.constraint()
        logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
        max_tokens = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
        score_prompt = False  # the chat API has no log-probabilities of the prompt
    else:
        prompt_tokens = [_prompt_tokens(prompt, prompts, max_length) for prompt in fields.prompts]
        if images is not None and any((tokens >= images.first_id).any() for tokens in prompt_tokens):
            raise ApiError(400, "a prompt has a token that does not exist", param="prompt")  # no images of others
        constraint, logprobs, max_tokens = fields.constraint(), fields.logprobs, fields.max_tokens
        score_prompt = fields.echo is True and logprobs is not None
    sampling = fields.sampling(logprobs)
    # The seed of a choice depends only on the request's seed and the choice's index.
    seeds: Sequence[int] = [(sampling.seed + index) % (1 << 63) for index in range(fields.choices)]
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    options: dict[str, Any] = {"stop": stop, "stop_ids": () if fields.ignore_eos else None, "seconds": limits.seconds}
    options |= {"constraint": constraint, "prompt_logprobs": score_prompt, "owner": owner}
    requests = []
    for tokens in prompt_tokens:
        options["max_new_tokens"] = _new_tokens(max_tokens, tokens, served, limits)
        requests += [Request(tokens, adapter, replace(sampling, seed=seed), **options) for seed in seeds]
        if images is not None:
            images.compute_prompt(tokens)
    return requests


def _chat_tokens(fields: ChatRequest, prompts: TokenizedPrompts, max_length: int) -> np.ndarray:
    tools = [tool.model_dump(exclude_none=True) for tool in fields.offered_tools]
    texts = [message.as_turn() for message in fields.messages]
    _check_not_too_long(json.dumps([texts, tools], ensure_ascii=False), prompts, max_length)
    with blame_field("messages"):
        turns = [message.as_turn(images=True) for message in fields.messages]
        return prompts.chat(turns, tools, add_system=fields.add_system_prompt)


def _prompt_tokens(prompt: str | list[int], prompts: TokenizedPrompts, max_length: int) -> np.ndarray:
    if not isinstance(prompt, str):
        return np.asarray(prompt, dtype=np.int32)
    _check_not_too_long(prompt, prompts, max_length)
    tokens = prompts.text(prompt)
    if not len(tokens):
        raise ApiError(400, "a prompt is empty", param="prompt")
    return tokens


def _check_not_too_long(text: str, prompts: TokenizedPrompts, max_tokens: int) -> None:
    """Reject texts that are far too long before they are tokenized, which would take seconds."""
    if far_exceeds(text, max_tokens, prompts.text):
        raise _too_long(f"the prompt has far more than {max_tokens:,} tokens")


def _new_tokens(max_tokens: int | None, tokens: np.ndarray, served: Served, limits: Limits) -> int:
    """Return the number of tokens to generate for a prompt."""
    if len(tokens) > limits.prompt:
        raise _too_long(f"the prompt has {len(tokens):,} tokens, and {limits.prompt:,} are allowed")
    max_tokens = limits.new_tokens if max_tokens is None else max_tokens
    if max_tokens > limits.new_tokens:
        message = f"{max_tokens:,} new tokens are requested, and {limits.new_tokens:,} are allowed"
        raise ApiError(400, message, param="max_tokens")
    if served.positions is None:
        return max_tokens
    available = served.positions - len(tokens)
    if available < min(1, max_tokens):
        raise _too_long(f"the prompt has {len(tokens):,} tokens, and the model has {served.positions:,} positions")
    return min(max_tokens, available)


def _forced_constraint(fields: ChatRequest) -> Constraint:
    with blame_field("tools"):
        schema = forced_schema([(function.name, function.parameters) for function in fields.forced_functions])
    return json_constraint(schema, "tools")


def _too_long(message: str) -> ApiError:
    return ApiError(400, message, param="prompt", code="context_length_exceeded")
