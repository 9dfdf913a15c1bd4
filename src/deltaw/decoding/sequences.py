"""State of a request during generation, and the base class of schedulers.

A sequence that loses its pages resumes later from its tokens, so its state does not depend on page contents.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from deltaw.data.chat_template import last_occurrence
from deltaw.decoding.adapters import ActiveAdapter
from deltaw.decoding.constraints import Matcher
from deltaw.decoding.generation import IncrementalDetokenizer
from deltaw.decoding.pages import SequencePages, token_keys, virtual_keys
from deltaw.decoding.request import (
    EngineLoad,
    FinishReason,
    GenerationResult,
    Listener,
    Request,
    TextChunk,
    TokenLogprob,
)
from deltaw.decoding.sampling import NO_TOKEN, SamplingState, choose
from deltaw.errors import UserError
from deltaw.runtime.image_tokens import ImageTokens


class QueuedGeneration:
    """Handle to a running generation: a queue of text chunks, then the full result.

    Implements :class:`deltaw.decoding.request.GenerationHandle`. An engine fills it.

    Args:
        on_cancel: Called when the caller cancels, to wake an idle engine.
        listener: Receives the chunks instead of the iterator.

    Attributes:
        cancelled: True if the caller has cancelled.
    """

    def __init__(self, on_cancel: Callable[[], None] = lambda: None, listener: Listener | None = None) -> None:
        self.cancelled = False
        self._listener = listener
        self._on_cancel = on_cancel
        self._chunk_queue: queue.SimpleQueue[TextChunk] = queue.SimpleQueue()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._chunks: list[TextChunk] = []
        self._terminator: int | None = None
        self._exhausted = False

    @property
    def done(self) -> bool:
        """True if the generation has finished."""
        return self._done.is_set()

    def put(self, chunk: TextChunk, terminator: int | None = None) -> None:
        """Add a chunk. A chunk with a finish reason is the last one."""
        self._chunks.append(chunk)
        if chunk.finish is not None:
            self._terminator = terminator
            self._done.set()
        if self._listener is not None:
            self._listener(chunk)
        else:
            self._chunk_queue.put(chunk)

    def fail(self, error: BaseException) -> None:
        """Finish with an error, which :meth:`result` raises."""
        self._error = error
        self.put(TextChunk("", finish="error"))

    def __iter__(self) -> Iterator[TextChunk]:
        while not self._exhausted:
            chunk = self._chunk_queue.get()
            self._exhausted = chunk.finish is not None
            yield chunk

    def cancel(self) -> None:
        """Cancel the generation. The last chunk then has the finish reason "cancelled"."""
        if not self.done:
            self.cancelled = True
            self._on_cancel()

    def result(self) -> GenerationResult:
        """Wait for the complete result.

        Raises:
            Exception: if the engine failed.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        joined = TextChunk.join(self._chunks)
        tokens = np.asarray(joined.tokens, dtype=np.int64)
        return GenerationResult(joined.text, tokens, joined.finish or "error", joined.logprobs, self._terminator)


MAX_STOPS = 16
MAX_STOP_LENGTH = 1024


def validate_stops(stop: Sequence[str]) -> None:
    """Validate the stop strings of a request.

    Raises:
        UserError: if a string is empty or longer than 1,024 characters, or if there are more than 16.
    """
    if len(stop) > MAX_STOPS:
        raise UserError(f"there are {len(stop)} stop strings", location="stop", hint=f"at most {MAX_STOPS}")
    for text in stop:
        if not text:
            raise UserError("a stop string is empty", location="stop", hint="remove it, or add at least one character")
        if len(text) > MAX_STOP_LENGTH:
            raise UserError(f"a string has {len(text)} characters", location="stop", hint=f"at most {MAX_STOP_LENGTH}")


class OutputText:
    """Incremental detokenizer that stops at the first stop string.

    A stop string can span several tokens. Text that may be the start of a stop string is withheld until the next tokens
    decide. If several stop strings match, the one that is complete first wins, and the longest of those that are
    complete at the same character.

    Attributes:
        stopped: True if a stop string was matched.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stop = [_StopString(text) for text in stop]
        self._withheld = ""

    def add(self, token: int) -> str:
        """Add a token and return the text that can be emitted. Empty after a stop string."""
        return "" if self.stopped else self._release(self._detokenizer.add(token))

    def end(self) -> str:
        """Return the remaining text after the last token."""
        if self.stopped:
            return ""
        text = self._release(self._detokenizer.end())
        if not self.stopped:
            text = text + self._withheld
            self._withheld = ""
        return text

    def _release(self, text: str) -> str:
        """Add text and return the part that cannot belong to a stop string."""
        if not self._stop:
            return text
        start = len(self._withheld)
        self._withheld += text
        for end, character in enumerate(text, start + 1):
            complete = [len(stop.text) for stop in self._stop if stop.add(character)]
            if complete:
                emitted = self._withheld[: end - max(complete)]
                self._withheld = ""
                self.stopped = True
                return emitted
        emitted = self._withheld[: len(self._withheld) - max(stop.matched for stop in self._stop)]
        self._withheld = self._withheld[len(emitted) :]
        return emitted


class _StopString:
    """Streaming search for one string by the Knuth-Morris-Pratt algorithm. Amortized cost per character is constant.

    Attributes:
        matched: Length of the longest prefix of the string that the input ends with.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # By prefix length: length of the longest proper prefix that is also a suffix of the prefix.
        self._shorter = [0] * (len(text) + 1)
        for length in range(1, len(text)):
            self._shorter[length + 1] = self._advance(self._shorter[length], text[length])

    def add(self, character: str) -> bool:
        """Add a character. Return True if the string is complete, after which no more may be added."""
        self.matched = self._advance(self.matched, character)
        return self.matched == len(self.text)

    def _advance(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched]
        return matched + 1 if self.text[matched] == character else 0


_NEVER = 1 << 60


@dataclass(eq=False)
class SequenceState:
    """Generation state of one request.

    Attributes:
        text: Detokenizer of the completion.
        terminators: Tokens that end the completion.
        token_limit: Maximum number of tokens to generate.
        adapter: The adapter, after it was loaded.
        pages: Pages of the sequence while it is running.
        slot: Row of the page table, or -1 while the sequence is waiting.
        virtual: Number of virtual tokens before the prompt.
        adapter_start: Position of the first token that the adapter's update applies to.
        num_generated: Number of generated tokens.
        length: Number of tokens, including virtual tokens.
        tokens: (capacity,) token ids. Virtual tokens come first, with id 0.
        keys: (capacity,) cache keys of the tokens.
        prompt_logprobs: Log-probabilities of prompt tokens that no chunk contains yet.
        is_streamed: True if the caller reads chunks while the completion is generated.
    """

    request: Request
    handle: QueuedGeneration
    sampler: SamplingState
    matcher: Matcher | None
    text: OutputText
    terminators: frozenset[int]
    token_limit: int
    adapter: ActiveAdapter | None = None
    pages: SequencePages | None = None
    slot: int = -1
    virtual: int = 0
    adapter_start: int = _NEVER
    num_generated: int = 0
    length: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    is_streamed: bool = False
    _emitted_prompt: bool = False
    _reused: int = 0

    def __post_init__(self) -> None:
        seconds = self.request.seconds
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.tokens = self.keys = np.empty(0, np.int64)

    def prepare(self, adapter: ActiveAdapter | None) -> None:
        """Lay out the sequence for its adapter. Called once, before the sequence first runs."""
        self.adapter = adapter
        prompt = np.asarray(self.request.tokens, dtype=np.int64)
        self.virtual = 0 if adapter is None else adapter.info.virtual_tokens
        self.length = self.virtual + len(prompt)
        self.tokens = np.zeros(self.length + self.token_limit, np.int64)
        self.tokens[self.virtual : self.length] = prompt
        if adapter is not None and adapter.packed is not None:
            invocation = adapter.info.invocation
            offset = -self.virtual if invocation is None else last_occurrence(prompt, invocation)
            self.adapter_start = _NEVER if offset is None else self.virtual + offset
        number = 0 if adapter is None else adapter.number
        self.keys = token_keys(self.tokens)
        self.keys[self.adapter_start :] = token_keys(self.tokens[self.adapter_start :], number)
        self.keys[: self.virtual] = virtual_keys(self.virtual, number)

    @property
    def is_prepared(self) -> bool:
        """True if the sequence is laid out."""
        return self.length > 0

    @property
    def needs_prompt_logprobs(self) -> bool:
        """True if log-probabilities of the prompt are requested and not emitted yet."""
        return self.request.prompt_logprobs and not self._emitted_prompt

    @property
    def reusable(self) -> np.ndarray:
        """Cache keys of the tokens that may be reused from the cache."""
        return self.keys[: self.virtual if self.needs_prompt_logprobs else self.length - 1]

    def start(self, pages: SequencePages, slot: int) -> None:
        """Assign the pages and the slot of the sequence."""
        self.pages = pages
        self.slot = slot
        if not self._emitted_prompt:
            self._reused = max(0, pages.reused - self.virtual)
            self.prompt_logprobs = []  # a preempted sequence computes its prompt again

    @property
    def can_continue(self) -> bool:
        """True if the constraint, if any, has computed the allowed next tokens."""
        return self.matcher is None or self.matcher.ready

    def stop_reason(self, now: float) -> FinishReason | None:
        """Return the reason to finish without another token, or None."""
        if self.handle.cancelled:
            return "cancelled"
        if self.matcher is not None and self.num_generated and self.matcher.ready:
            if self.matcher.is_complete:
                return "stop"
            if self.num_generated >= self.token_limit:
                return "length"
        return "timeout" if self.deadline is not None and now > self.deadline else None

    def append_token(self, token: int, logprob: TokenLogprob | None) -> bool:
        """Append a sampled token. Return True if the completion has finished.

        Raises:
            UserError: if no token could be sampled.
        """
        if token == NO_TOKEN:
            failed = None if self.matcher is None else self.matcher.failed
            if failed is not None:
                message = f"the constraint can no longer be enforced: {failed}"
                raise UserError(message, location="constraint", hint="simplify the constraint")
            message = "no token can be chosen: the model's logits are not numbers, or the constraint allows no token"
            raise UserError(message, hint="check the model and its adapter for NaN or infinite values")
        if token in self.terminators:
            self._put(TextChunk("", finish="stop"), token)
            return True
        self.tokens[self.length] = token
        number = self.adapter.number if self.adapter is not None and self.length >= self.adapter_start else 0
        self.keys[self.length] = token + (number << 32)
        self.length += 1
        self.num_generated += 1
        text = self.text.add(token)
        finish: FinishReason | None = None
        if self.text.stopped:
            finish = "stop"
        elif self.matcher is not None:
            self.matcher.accept(token)  # stop_reason checks for the end before the next token
        elif self.num_generated >= self.token_limit:
            finish = "length"
        self._put(TextChunk(text, (token,), () if logprob is None else (logprob,), finish))
        return finish is not None

    def finish(self, reason: FinishReason) -> None:
        """Emit the last chunk."""
        self._put(TextChunk("", finish=reason))

    def _put(self, chunk: TextChunk, terminator: int | None = None) -> None:
        """Emit a chunk, with pending prompt log-probabilities and the remaining text of a finished completion."""
        text = chunk.text if chunk.finish is None else chunk.text + self.text.end()
        logprobs = (*self.prompt_logprobs, *chunk.logprobs)
        self.prompt_logprobs = []
        complete = TextChunk(text, chunk.tokens, logprobs, chunk.finish, 0 if self._emitted_prompt else self._reused)
        self._emitted_prompt = True
        self.handle.put(complete, terminator)


def next_tokens(
    sequences: Sequence[SequenceState], logits: np.ndarray
) -> Iterator[tuple[SequenceState, int, TokenLogprob | None]]:
    """Sample the next token of each sequence from its row of logits.

    Args:
        sequences: Sequences, one per row.
        logits: (k, vocabulary) logits.
    """
    allowed = {row: state.matcher.allowed() for row, state in enumerate(sequences) if state.matcher is not None}
    chosen = choose(logits, [sequence.sampler for sequence in sequences], allowed)
    return zip(sequences, chosen.tokens.tolist(), chosen.logprobs, strict=True)


class SequenceScheduler:
    """Pending requests and their computation. Not thread-safe, except for its counters.

    Args:
        num_tokens: Number of token ids that prompts may contain.
        vocabulary: Number of logits.
        max_length: Maximum number of tokens of a sequence.

    Attributes:
        num_tokens: Number of token ids that prompts may contain, besides image tokens.
        images: Embedding that maps image tokens, or None.
        waiting: Queued requests, in start order.
        running: Running requests, in the order in which they started.
        tokens: Number of tokens computed since the start.
        scores_prompts: True if log-probabilities of prompt tokens are supported.
    """

    scores_prompts = True

    def __init__(self, num_tokens: int, vocabulary: int, max_length: int) -> None:
        self.num_tokens = num_tokens
        self.vocabulary = vocabulary
        self.max_length = max_length
        self.images: ImageTokens | None = None
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []
        self.tokens = 0

    def accepts(self, tokens: np.ndarray) -> np.ndarray:
        """Return (n,) bool, True for tokens (n,) that prompts may contain."""
        accepted = (tokens >= 0) & (tokens < self.num_tokens)
        return accepted if self.images is None else accepted | self.images.features.contains(tokens)

    @property
    def idle(self) -> bool:
        """True if no requests are pending."""
        return not self.waiting and not self.running

    @property
    def load(self) -> EngineLoad:
        """Current load."""
        return EngineLoad(len(self.running), len(self.waiting), tokens=self.tokens)

    def step(self) -> None:
        """Run one step and emit its results."""
        raise NotImplementedError

    def cancel_slow(self) -> None:
        """Cancel requests with slow constraints."""

    def end(self, sequence: SequenceState, reason: FinishReason | BaseException | None) -> None:
        """Remove a request and finish it with a reason or an error. Has no effect if ``reason`` is None or it has
        finished.
        """
        if sequence.handle.done or reason is None:
            return
        if isinstance(reason, BaseException):
            sequence.handle.fail(reason)
        else:
            sequence.finish(reason)

    def append(self, sequence: SequenceState, token: int, logprob: TokenLogprob | None) -> None:
        """Append a token to a sequence unless it has finished. An error affects only this sequence."""
        if sequence.handle.done:
            return
        self.tokens += 1
        try:
            sequence.append_token(token, logprob)
        except Exception as error:
            self.end(sequence, error)

    def end_all(self, reason: FinishReason | BaseException) -> None:
        """Finish every request."""
        for sequence in [*self.running, *self.waiting]:
            self.end(sequence, reason)
        self.running.clear()
        self.waiting.clear()

    def sweep_waiting(self, now: float) -> None:
        """Finish queued requests that were cancelled or have timed out."""
        remaining: deque[SequenceState] = deque()
        for sequence in self.waiting:
            if (reason := sequence.stop_reason(now)) is None:
                remaining.append(sequence)
            else:
                self.end(sequence, reason)
        self.waiting = remaining
