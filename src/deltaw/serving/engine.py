"""The decoding engine: takes requests from any thread, and computes their steps on a thread of its own.

Implements :class:`deltaw.serving.request.TextEngine`. Knows requests, tokenizers and threads; what a step
does is in ``batch``, and for models that have no decoder in ``opening``.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from deltaw.errors import UserError
from deltaw.serving.adapters import Adapters, FixedAdapters
from deltaw.serving.constraints import ConstraintLimits, Grammars
from deltaw.serving.request import EngineLoad, Listener, Request, Written
from deltaw.serving.running import QueuedWriting, Run, Work, WrittenText, validate_stops
from deltaw.serving.sampling import SamplingState, validate

# How long to wait where all that is in hand waits for an adapter that somebody else holds.
_NOTHING_STARTS = 0.005


class Engine:
    """Writes texts.

    Args:
        work: what computes them. tokenizer: of the model.
        terminators: tokens that end texts of requests without an adapter.
        adapters: that requests may name.
        own_adapter: the name by which the adapter of an inference session is asked for; None where there is
            none, or where requests without a name get it.
        has_base: whether requests without a name get the base model.
        why: how the texts are computed, and why so.
        constraints: what constraints may take.
    """

    def __init__(
        self,
        work: Work,
        tokenizer: PreTrainedTokenizerBase,
        terminators: Sequence[int] = (),
        adapters: Adapters | None = None,
        *,
        own_adapter: str | None = None,
        has_base: bool = True,
        why: str = "",
        constraints: ConstraintLimits | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.bank: Adapters = adapters or FixedAdapters()
        self.own_adapter, self.has_base, self.why = own_adapter, has_base, why
        self.work = work
        self._ends = tuple(terminators)
        self._grammars = Grammars(tokenizer, work.vocabulary, constraints)
        self._incoming: deque[Run] = deque()
        self._unfinished: weakref.WeakSet[QueuedWriting] = weakref.WeakSet()
        self._changed = threading.Condition()
        self._stepping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = self._draining = self._hurried = False

    @property
    def positions(self) -> int:
        """The most tokens that a prompt and its text have together."""
        return self.work.longest

    @property
    def load(self) -> EngineLoad:
        """What it has in hand at the moment."""
        load = self.work.load
        return replace(load, waiting=load.waiting + len(self._incoming), adapters_loaded=self.bank.loaded)

    def adapters(self) -> tuple[str, ...]:
        """The names that a request may give."""
        return self.bank.names()

    def submit(self, request: Request, listener: Listener | None = None) -> QueuedWriting:
        """Queue a request; see :meth:`deltaw.serving.request.TextEngine.submit`."""
        run = self._checked(request, listener)
        with self._changed:
            self._queue([run])
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
        runs: list[Run] = []
        for number, request in enumerate(requests, start=1):
            try:
                runs.append(self._checked(request))
            except UserError as error:
                if error.where == "prompt" and len(requests) > 1:  # say which
                    error = UserError(error.what, where=f"prompt {number}", hint=error.hint)
                raise error
        with self._changed:
            self._queue(runs)
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

    def hurry(self) -> None:
        """From now on, cancel texts that take long for their own reasons."""
        self._hurried = True
        self._wake()

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests; end when those in hand are written, or at once."""
        with self._changed:
            self._closed, self._draining = True, drain
            unfinished = [] if drain else list(self._unfinished)
            self._changed.notify_all()
        for writing in unfinished:
            writing.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._stepping:
            self._take_incoming()
            self.work.end_all("cancelled")
        self._grammars.close()
        self.bank.close()

    def _queue(self, runs: Sequence[Run]) -> None:
        """Hand requests to the thread that computes; call it with the lock held."""
        if self._closed:
            raise UserError("the engine is shut down", hint="start it again")
        self._unfinished.update(run.writing for run in runs)
        self._incoming.extend(runs)

    def _checked(self, request: Request, listener: Listener | None = None) -> Run:
        """A request that can be served, ready to run.

        Raises:
            UserError: it cannot be served at all.
        """
        facts = None if request.adapter is None else self.bank.facts(request.adapter)
        tokens = np.asarray(request.tokens)
        if tokens.ndim != 1 or not len(tokens):
            raise UserError("the prompt is empty", where="prompt", hint="give it a token at least")
        if tokens.min() < 0 or tokens.max() >= self.work.known:
            hint = f"token ids are 0 to {self.work.known - 1}"
            raise UserError("the prompt has a token that does not exist", where="prompt", hint=hint)
        length = len(tokens) + (0 if facts is None else facts.virtual_tokens)
        room = self.positions - length
        if room < min(1, request.max_new_tokens):
            what = f"the prompt has {length} tokens, and there are {self.positions} positions"
            raise UserError(what, where="prompt", hint="shorten the prompt")
        if request.max_new_tokens < 0:
            raise UserError(f"max_new_tokens is {request.max_new_tokens}", where="max_new_tokens", hint="0 or more")
        if request.prompt_logprobs and not self.work.scores_prompts:
            what = "log-probabilities of the prompt are unavailable when transformers decodes"
            raise UserError(what, where="prompt_logprobs", hint="leave them out")
        validate(request.sampling, self.work.vocabulary)
        validate_stops(request.stop)
        own_ends = self._ends if facts is None else facts.terminators or self._ends
        ends = own_ends if request.stop_ids is None else request.stop_ids
        matcher = None
        if request.constraint is not None:
            possible = [end for end in ends if 0 <= end < self.work.vocabulary]
            matcher = self._grammars.compile(request.constraint, possible, request.owner)
        sampler = SamplingState(request.sampling, tokens, self.work.vocabulary)
        allowance = min(request.max_new_tokens, room)
        writing = QueuedWriting(self._wake, listener)
        text = WrittenText(self.tokenizer, request.stop)
        return Run(request, writing, sampler, matcher, text, frozenset(ends), allowance)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _take_incoming(self) -> None:
        with self._changed:
            while self._incoming:
                self.work.waiting.append(self._incoming.popleft())

    def _turn(self) -> None:
        """One step for all that are in hand."""
        self._take_incoming()
        with torch.inference_mode():
            try:
                if self._hurried:
                    self.work.hurry()
                self.work.step()
            except Exception as error:  # a fault of the batch itself: nobody must wait for ever
                self.work.end_all(error)

    def _work(self) -> None:
        """Compute steps until the engine is closed."""
        while True:
            with self._changed:
                while not self._incoming and self.work.idle and not self._closed:
                    self._changed.wait()
                if self._closed and (not self._draining or (self.work.idle and not self._incoming)):
                    return
            with self._stepping:
                self._turn()
            if not self.work.load.running and not self.work.idle:
                time.sleep(_NOTHING_STARTS)
