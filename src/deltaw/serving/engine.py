"""The decoding engine: takes requests from any thread, and computes their steps on a thread of its own.

Implements :class:`deltaw.serving.request.TextEngine` over a batch. Knows requests, tokenizers and threads; what
a step does is said in ``batch``.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from deltaw.errors import UserError
from deltaw.kernels.decode import PackedAdapter
from deltaw.serving.adapters import Adapters, FixedAdapters
from deltaw.serving.batch import Batch, BatchLimits
from deltaw.serving.constraints import Grammars
from deltaw.serving.decodable import Decodable
from deltaw.serving.request import Request, Written
from deltaw.serving.running import Run
from deltaw.serving.sampling import SamplingState, validate
from deltaw.serving.text import validate_stops
from deltaw.serving.writing import QueuedWriting


@dataclass(frozen=True)
class EngineLoad:
    """What an engine has in hand: requests, pages in use and in all, tokens of prompts that were found
    written, and tokens that ran, since the start."""

    running: int
    waiting: int
    pages_used: int
    pages: int
    reused: int
    tokens: int


class Engine:
    """Writes texts with a decoder.

    Args:
        model: the decoder. tokenizer: of the model.
        pages: of keys and values, each ``model.decoder.page_tokens`` tokens long.
        terminators: tokens that end texts of the base model.
        adapters: that requests may name. default: acts on requests that name none.
        own_adapter: the name by which the adapter of the opened run is asked for; None where there is none,
            or where requests without a name get it.

    Attributes:
        why: how well the decoder was verified.
    """

    def __init__(
        self,
        model: Decodable,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pages: int,
        terminators: Sequence[int] = (),
        adapters: Adapters | None = None,
        limits: BatchLimits | None = None,
        default: PackedAdapter | None = None,
        own_adapter: str | None = None,
    ) -> None:
        if pages < 1:
            raise UserError("there is no memory for keys and values", hint="give more memory")
        self.model, self.tokenizer = model, tokenizer
        self.bank: Adapters = adapters or FixedAdapters()
        self.own_adapter = own_adapter
        self.why = model.why
        self._ends = tuple(terminators)
        self._batch = Batch(model, pages, self.bank, limits or BatchLimits(), default)
        self._grammars: Grammars | None = None
        self._incoming: deque[Run] = deque()
        self._changed = threading.Condition()
        self._stepping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = self._draining = False

    @property
    def positions(self) -> int:
        """The most tokens that a prompt and its text have together."""
        return self._batch.longest

    @property
    def load(self) -> EngineLoad:
        """What it has in hand at the moment."""
        batch = self._batch
        pool = batch.pool
        return EngineLoad(
            len(batch.running),
            len(batch.waiting) + len(self._incoming),
            pool.count - pool.available,
            pool.count,
            pool.reused,
            batch.tokens,
        )

    def adapters(self) -> tuple[str, ...]:
        """The names that a request may give."""
        return self.bank.names()

    def submit(self, request: Request) -> QueuedWriting:
        """Queue a request; see :meth:`deltaw.serving.request.TextEngine.submit`."""
        run = self._checked(request)
        with self._changed:
            self._refuse_closed()
            self._incoming.append(run)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="deltaw-engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return run.writing

    def write_all(
        self, requests: Sequence[Request], on_progress: Callable[[int, int], None] | None = None
    ) -> list[Written]:
        """Write many texts, on the caller's thread; in the order of the requests.

        Args:
            on_progress: told (texts done, texts) as texts end.

        Raises:
            UserError: as :meth:`submit`; then none is written.
        """
        runs = [self._checked(request) for request in requests]
        with self._changed:
            self._refuse_closed()
            self._incoming.extend(runs)
        left, told = list(runs), 0
        try:
            with self._stepping:
                while left:
                    self._turn()
                    left = [run for run in left if not run.writing.done]
                    if on_progress is not None and len(runs) - len(left) > told:
                        told = len(runs) - len(left)
                        on_progress(told, len(runs))
        finally:
            for run in left:
                run.writing.cancel()
        return [run.writing.result() for run in runs]

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests; end when those in hand are written, or at once."""
        with self._changed:
            self._closed, self._draining = True, drain
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._stepping:
            self._take_incoming()
            self._batch.end_all(None)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise UserError("the engine is shut down", hint="start it again")

    def _checked(self, request: Request) -> Run:
        """A request that can be served, ready to run.

        Raises:
            UserError: it cannot be served at all.
        """
        facts = None if request.adapter is None else self.bank.facts(request.adapter)
        tokens = np.asarray(request.tokens)
        vocabulary = len(self.model.entry.weight)
        if tokens.ndim != 1 or not len(tokens):
            raise UserError("the prompt is empty", where="prompt", hint="give it a token at least")
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise UserError(
                "the prompt has a token that does not exist",
                where="prompt",
                hint=f"token ids are 0 to {vocabulary - 1}",
            )
        virtual = 0 if facts is None else facts.virtual_tokens
        room = self.positions - len(tokens) - virtual
        if room < min(1, request.max_new_tokens):
            raise UserError(
                f"the prompt has {len(tokens) + virtual} tokens, and there are {self.positions} positions",
                where="prompt",
                hint="shorten the prompt",
            )
        if request.max_new_tokens < 0:
            raise UserError(
                f"max_new_tokens is {request.max_new_tokens}", where="max_new_tokens", hint="0 or more"
            )
        validate(request.sampling, self.model.vocabulary)
        validate_stops(request.stop)
        ends = self._ends if facts is None else facts.terminators or self._ends
        if request.stop_ids is not None:
            ends = request.stop_ids
        matcher = None
        if request.constraint is not None:
            if self._grammars is None:
                self._grammars = Grammars(self.tokenizer, self.model.vocabulary)
            known = [end for end in ends if 0 <= end < self.model.vocabulary]
            matcher = self._grammars.compile(request.constraint, known)
        sampler = SamplingState(request.sampling, tokens, self.model.vocabulary)
        allowance = min(request.max_new_tokens, room)
        writing = QueuedWriting(self._wake)
        return Run(request, writing, sampler, matcher, self.tokenizer, ends, allowance)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _take_incoming(self) -> None:
        with self._changed:
            while self._incoming:
                self._batch.add(self._incoming.popleft())

    def _turn(self) -> None:
        """One step for all that are in hand."""
        self._take_incoming()
        with torch.inference_mode():
            try:
                self._batch.step()
            except Exception as error:  # a fault of the batch itself: nobody must wait for ever
                self._batch.end_all(error)

    def _work(self) -> None:
        """Compute steps until the engine is closed."""
        while True:
            with self._changed:
                while not self._incoming and self._batch.idle and not self._closed:
                    self._changed.wait()
                if self._closed and (not self._draining or (self._batch.idle and not self._incoming)):
                    return
            with self._stepping:
                self._turn()
