"""One request on its way: its tokens, which of them are written, and what becomes of a chosen token.

A request that lost its pages goes on later from its tokens, so nothing here hangs on pages but their number.
Knows requests, samplers and texts; not which requests run together.
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

from deltaw.data.invocation import last_occurrence
from deltaw.errors import UserError
from deltaw.runtime.generation import TextPieces
from deltaw.serving.adapters import ActiveAdapter
from deltaw.serving.constraints import Matcher
from deltaw.serving.pages import SequencePages, token_keys, virtual_keys
from deltaw.serving.request import EngineLoad, FinishReason, Listener, Piece, Request, TokenLogprob, Written
from deltaw.serving.sampling import NONE, SamplingState, choose


class QueuedWriting:
    """A text that is being written, as its reader sees it: pieces in a queue, and the whole at the end.

    Implements :class:`deltaw.serving.request.Writing`; an engine of any kind fills it.

    Args:
        woken: called when the reader cancels, so that an engine that sleeps looks.
        listener: told each piece instead of whoever iterates.

    Attributes:
        cancelled: whether the reader has cancelled.
    """

    def __init__(self, woken: Callable[[], None] = lambda: None, listener: Listener | None = None) -> None:
        self.cancelled = False
        self._listener = listener
        self._woken = woken
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._all: list[Piece] = []
        self._terminator: int | None = None
        self._exhausted = False

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._done.is_set()

    def put(self, piece: Piece, terminator: int | None = None) -> None:
        """Add a piece; one with a finish reason is the last."""
        self._all.append(piece)
        if piece.finish is not None:
            self._terminator = terminator
            self._done.set()
        if self._listener is not None:
            self._listener(piece)
        else:
            self._pieces.put(piece)

    def fail(self, error: BaseException) -> None:
        """End it with an error, which :meth:`result` raises."""
        self._error = error
        self.put(Piece("", finish="error"))

    def __iter__(self) -> Iterator[Piece]:
        while not self._exhausted:
            piece = self._pieces.get()
            self._exhausted = piece.finish is not None
            yield piece

    def cancel(self) -> None:
        """End it; the last piece then says "cancelled"."""
        if not self.done:
            self.cancelled = True
            self._woken()

    def result(self) -> Written:
        """Wait for the end.

        Raises:
            Exception: what the engine failed with.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        whole = Piece.joined(self._all)
        tokens = np.asarray(whole.tokens, dtype=np.int64)
        return Written(whole.text, tokens, whole.finish or "error", whole.logprobs, self._terminator)


MOST_STOPS = 16
LONGEST_STOP = 1024


def validate_stops(stop: Sequence[str]) -> None:
    """Check a request's stop strings.

    Raises:
        UserError: one is empty or longer than 1,024 characters, or there are more than 16.
    """
    if len(stop) > MOST_STOPS:
        raise UserError(f"there are {len(stop)} stop strings", where="stop", hint=f"at most {MOST_STOPS}")
    for text in stop:
        if not text:
            raise UserError("a stop string is empty", where="stop", hint="give it a character at least")
        if len(text) > LONGEST_STOP:
            raise UserError(f"a stop string has {len(text)} characters", where="stop", hint=f"at most {LONGEST_STOP}")


class WrittenText:
    """The text of one request: tokens in, pieces out; together they are the text before its first stop
    string.

    A stop string may begin in one token and end in another. So text that could still become one is held back
    until the next tokens tell.

    The first is the one that is complete first; of two that end together, the longer.

    Attributes:
        stopped: a stop string has come, and the text has ended.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._pieces = TextPieces(tokenizer)
        self._stop = [_StopString(one) for one in stop]
        self._held = ""

    def add(self, token: int) -> str:
        """The text that this token makes certain; none once the text is ``stopped``."""
        return "" if self.stopped else self._certain(self._pieces.add(token))

    def end(self) -> str:
        """The rest of the text, where no more tokens come."""
        if self.stopped:
            return ""
        piece = self._certain(self._pieces.end())
        if not self.stopped:
            piece, self._held = piece + self._held, ""
        return piece

    def _certain(self, text: str) -> str:
        """What can be given out after more text: all but its longest end that begins a stop string."""
        if not self._stop:
            return text
        start = len(self._held)
        self._held += text
        for end, character in enumerate(text, start + 1):
            complete = [len(one.text) for one in self._stop if one.add(character)]
            if complete:
                piece, self._held, self.stopped = self._held[: end - max(complete)], "", True
                return piece
        keep = max(one.begun for one in self._stop)
        piece = self._held[: len(self._held) - keep]
        self._held = self._held[len(piece) :]
        return piece


class _StopString:
    """Finds one string in a text that comes a character at a time, as Knuth, Morris and Pratt do: the work
    for a character does not grow with what came before.

    Attributes:
        begun: how many characters of it the text so far ends with.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.begun = 0
        # For each beginning of it, the longest shorter beginning that this one ends with.
        self._shorter = [0] * (len(text) + 1)
        for length in range(1, len(text)):
            self._shorter[length + 1] = self._longer(self._shorter[length], text[length])

    def add(self, character: str) -> bool:
        """Whether the text ends with it after this character; then no more may be added."""
        self.begun = self._longer(self.begun, character)
        return self.begun == len(self.text)

    def _longer(self, begun: int, character: str) -> int:
        while begun and self.text[begun] != character:
            begun = self._shorter[begun]
        return begun + 1 if self.text[begun] == character else 0


_NEVER = 1 << 60


@dataclass(eq=False)
class Run:
    """A request on its way.

    Attributes:
        text: that is written. ends: the tokens that end it. allowance: tokens that it may write.
        tokens, keys: (length) of the sequence, virtual tokens first (their ids are 0); and their keys.
        virtual: how many virtual tokens stand in front.
        acts_from: the place from which on the adapter's update acts.
        pages: of its sequence, while it runs. slot: its row of the page table; -1 while it waits.
        written: tokens of the text so far.
        prompt_logprobs: log-probabilities of the prompt's tokens that no piece has told yet.
    """

    request: Request
    writing: QueuedWriting
    sampler: SamplingState
    matcher: Matcher | None
    text: WrittenText
    ends: frozenset[int]
    allowance: int
    adapter: ActiveAdapter | None = None
    pages: SequencePages | None = None
    slot: int = -1
    virtual: int = 0
    acts_from: int = _NEVER
    written: int = 0
    length: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    _told: bool = False
    _reused: int = 0

    def __post_init__(self) -> None:
        seconds = self.request.seconds
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.tokens = self.keys = np.empty(0, np.int64)

    def place(self, adapter: ActiveAdapter | None) -> None:
        """Lay out the sequence for the adapter that writes it; once, before it first runs."""
        self.adapter = adapter
        prompt = np.asarray(self.request.tokens, dtype=np.int64)
        self.virtual = 0 if adapter is None else adapter.facts.virtual_tokens
        self.length = self.virtual + len(prompt)
        self.tokens = np.zeros(self.length + self.allowance, np.int64)
        self.tokens[self.virtual : self.length] = prompt
        if adapter is not None and adapter.packed is not None:
            invocation = adapter.facts.invocation
            found = -self.virtual if invocation is None else last_occurrence(prompt, invocation)
            self.acts_from = _NEVER if found is None else self.virtual + found
        number = 0 if adapter is None else adapter.number
        self.keys = token_keys(self.tokens)
        self.keys[self.acts_from :] = token_keys(self.tokens[self.acts_from :], number)
        self.keys[: self.virtual] = virtual_keys(self.virtual, number)

    @property
    def placed(self) -> bool:
        """Whether the sequence is laid out."""
        return self.length > 0

    @property
    def wants_prompt(self) -> bool:
        """Whether logits of the prompt's own tokens are wanted still."""
        return self.request.prompt_logprobs and not self._told

    @property
    def reusable(self) -> np.ndarray:
        """Keys of the tokens that need not run where they are written already."""
        return self.keys[: self.virtual if self.wants_prompt else self.length - 1]

    def begin(self, pages: SequencePages, slot: int) -> None:
        """Take the pages of its sequence."""
        self.pages, self.slot = pages, slot
        if not self._told:
            self._reused = max(0, pages.reused - self.virtual)
            self.prompt_logprobs = []  # a text that lost its pages sees its prompt again

    @property
    def may_go_on(self) -> bool:
        """Whether it is known which tokens may come next."""
        return self.matcher is None or self.matcher.ready

    def ended_by(self, now: float) -> FinishReason | None:
        """Why it is to end without another token, if it is."""
        if self.writing.cancelled:
            return "cancelled"
        if self.matcher is not None and self.written and self.matcher.ready:
            if self.matcher.ended:
                return "stop"
            if self.written >= self.allowance:
                return "length"
        return "timeout" if self.deadline is not None and now > self.deadline else None

    def take(self, token: int, logprob: TokenLogprob | None) -> bool:
        """Take the token that was chosen; whether the text has ended.

        Raises:
            UserError: there was none to choose.
        """
        if token == NONE:
            failed = None if self.matcher is None else self.matcher.failed
            if failed is not None:
                what = f"the text cannot be held to its constraint any longer: {failed}"
                raise UserError(what, where="constraint", hint="make it simpler")
            what = "no token can be chosen: the model's logits are not numbers, or nothing is allowed"
            raise UserError(what, hint="look for values that are not finite in the model and its adapter")
        if token in self.ends:
            self._put(Piece("", finish="stop"), token)
            return True
        self.tokens[self.length] = token
        number = self.adapter.number if self.adapter is not None and self.length >= self.acts_from else 0
        self.keys[self.length] = token + (number << 32)
        self.length += 1
        self.written += 1
        text = self.text.add(token)
        finish: FinishReason | None = None
        if self.text.stopped:
            finish = "stop"
        elif self.matcher is not None:
            self.matcher.accept(token)  # whether that ends it, is asked before the next one
        elif self.written >= self.allowance:
            finish = "length"
        self._put(Piece(text, (token,), () if logprob is None else (logprob,), finish))
        return finish is not None

    def finish(self, reason: FinishReason) -> None:
        """End the text."""
        self._put(Piece("", finish=reason))

    def _put(self, piece: Piece, terminator: int | None = None) -> None:
        """Hand out a piece, with what is told besides: the text's end, and what is known of its prompt."""
        text = piece.text if piece.finish is None else piece.text + self.text.end()
        logprobs, self.prompt_logprobs = (*self.prompt_logprobs, *piece.logprobs), []
        whole = Piece(text, piece.tokens, logprobs, piece.finish, 0 if self._told else self._reused)
        self._told = True
        self.writing.put(whole, terminator)


def next_tokens(runs: Sequence[Run], logits: np.ndarray) -> Iterator[tuple[Run, int, TokenLogprob | None]]:
    """The token that is chosen for each request by its row of logits (k, vocabulary)."""
    allowed = {n: run.matcher.allowed() for n, run in enumerate(runs) if run.matcher is not None}
    chosen = choose(logits, [run.sampler for run in runs], allowed)
    return zip(runs, chosen.tokens.tolist(), chosen.logprobs, strict=True)


class Work:
    """Requests in hand, and what computes them. Called from one thread at a time, but for its numbers.

    Attributes:
        known: how many token ids a prompt may have. vocabulary: how many logits there are.
        longest: the most tokens that a sequence may have.
        waiting, running: requests, in the order in which they start, or started.
        tokens: that were computed since the start.
        scores_prompts: whether log-probabilities of a prompt's own tokens can be had.
    """

    scores_prompts = True

    def __init__(self, known: int, vocabulary: int, longest: int) -> None:
        self.known, self.vocabulary, self.longest = known, vocabulary, longest
        self.waiting: deque[Run] = deque()
        self.running: list[Run] = []
        self.tokens = 0

    @property
    def idle(self) -> bool:
        """Whether no request is in hand."""
        return not self.waiting and not self.running

    @property
    def load(self) -> EngineLoad:
        """What is in hand at the moment."""
        return EngineLoad(len(self.running), len(self.waiting), tokens=self.tokens)

    def step(self) -> None:
        """Do some work, and hand out what it gave."""
        raise NotImplementedError

    def hurry(self) -> None:
        """End texts whose constraints are slow to say what may come next."""

    def end(self, run: Run, why: FinishReason | BaseException | None) -> None:
        """Let go of a request, which ends for this reason or with this error; None where it has ended."""
        if run.writing.done or why is None:
            return
        if isinstance(why, BaseException):
            run.writing.fail(why)
        else:
            run.finish(why)

    def end_all(self, why: FinishReason | BaseException) -> None:
        """End every request at once."""
        for run in [*self.running, *self.waiting]:
            self.end(run, why)
        self.running.clear()
        self.waiting.clear()

    def sweep_waiting(self, now: float) -> None:
        """End requests that wait, and were cancelled or whose time is up."""
        kept: deque[Run] = deque()
        for run in self.waiting:
            if (reason := run.ended_by(now)) is None:
                kept.append(run)
            else:
                self.end(run, reason)
        self.waiting = kept
