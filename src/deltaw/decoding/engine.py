"""Decoding engine: accepts requests from any thread and runs decoding steps on a separate thread.

Implements :class:`deltaw.decoding.request.TextEngine` on top of a :class:`deltaw.decoding.sequences.SequenceScheduler`.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from deltaw.decoding.adapters import Adapters, FixedAdapters
from deltaw.decoding.constraints import ConstraintLimits, Grammars
from deltaw.decoding.generation import Progress
from deltaw.decoding.request import EngineLoad, GenerationResult, Listener, Request
from deltaw.decoding.sampling import SamplingState, validate
from deltaw.decoding.sequences import OutputText, QueuedGeneration, SequenceScheduler, SequenceState, validate_stops
from deltaw.errors import UserError

# Seconds between attempts to start requests if all of them wait for adapters.
_IDLE_SECONDS = 0.005


class Engine:
    """Text generation engine.

    Args:
        scheduler: Scheduler that computes the steps.
        tokenizer: Tokenizer of the model.
        terminators: Terminator tokens of requests without an adapter.
        adapters: Adapters that requests may use.
        session_adapter: Name of the inference session's adapter. None if the session has no adapter, or if requests
            without an adapter name use it.
        has_base: True if requests without an adapter name use the base model.
        why: Description of the decoding implementation and the reason for its choice.
        constraints: Limits of constrained decoding.
    """

    def __init__(
        self,
        scheduler: SequenceScheduler,
        tokenizer: PreTrainedTokenizerBase,
        terminators: Sequence[int] = (),
        adapters: Adapters | None = None,
        *,
        session_adapter: str | None = None,
        has_base: bool = True,
        why: str = "",
        constraints: ConstraintLimits | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.bank: Adapters = adapters or FixedAdapters()
        self.session_adapter = session_adapter
        self.has_base = has_base
        self.why = why
        self.scheduler = scheduler
        self._terminators = tuple(terminators)
        self._grammars = Grammars(tokenizer, scheduler.vocabulary, constraints)
        self._incoming: deque[SequenceState] = deque()
        self._unfinished: weakref.WeakSet[QueuedGeneration] = weakref.WeakSet()
        self._changed = threading.Condition()
        self._stepping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = self._draining = self._cancelling_slow = False

    @property
    def positions(self) -> int:
        """Maximum number of tokens of a prompt and its completion together."""
        return self.scheduler.max_length

    @property
    def load(self) -> EngineLoad:
        """Current load, including requests that the scheduler has not received yet."""
        load = self.scheduler.load
        return replace(load, waiting=load.waiting + len(self._incoming), adapters_loaded=self.bank.loaded)

    def adapters(self) -> tuple[str, ...]:
        """Return the adapter names that requests may use."""
        return self.bank.names()

    def submit(self, request: Request, listener: Listener | None = None) -> QueuedGeneration:
        """Queue a request. See :meth:`deltaw.decoding.request.TextEngine.submit`."""
        sequence = self._prepare(request, listener)
        sequence.is_streamed = True
        with self._changed:
            self._queue([sequence])
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="deltaw-engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return sequence.handle

    def generate_all(self, requests: Sequence[Request], on_progress: Progress = None) -> list[GenerationResult]:
        """Generate the completions of all requests on the caller's thread, in the order of the requests.

        Args:
            requests: The requests.
            on_progress: Called with (completed, total) when requests complete.

        Raises:
            UserError: if a request is invalid. No completion is generated then.
        """
        sequences: list[SequenceState] = []
        for index, request in enumerate(requests, start=1):
            try:
                sequences.append(self._prepare(request))
            except UserError as error:
                if error.location == "prompt" and len(requests) > 1:  # add the prompt's number
                    error = UserError(error.message, location=f"prompt {index}", hint=error.hint)
                raise error
        with self._changed:
            self._queue(sequences)
        pending = list(sequences)
        completed = 0
        try:
            with self._stepping:
                while pending:
                    self._step()
                    pending = [sequence for sequence in pending if not sequence.handle.done]
                    if on_progress is not None and len(sequences) - len(pending) > completed:
                        completed = len(sequences) - len(pending)
                        on_progress(completed, len(sequences))
        finally:
            for sequence in pending:
                sequence.handle.cancel()
        return [sequence.handle.result() for sequence in sequences]

    def cancel_slow(self) -> None:
        """Cancel requests that wait long for their constraints, from this moment on."""
        self._cancelling_slow = True
        self._wake()

    def close(self, *, drain: bool = True) -> None:
        """Stop accepting requests, and stop the engine.

        Args:
            drain: Finish pending requests first. Otherwise cancel them.
        """
        with self._changed:
            self._closed = True
            self._draining = drain
            unfinished = [] if drain else list(self._unfinished)
            self._changed.notify_all()
        for handle in unfinished:
            handle.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._stepping:
            self._drain_incoming()
            self.scheduler.end_all("cancelled")
        self._grammars.close()
        self.bank.close()

    def _queue(self, sequences: Sequence[SequenceState]) -> None:
        """Queue sequences for the engine's thread. The caller must have acquired the lock."""
        if self._closed:
            raise UserError("the engine is shut down", hint="start it again")
        self._unfinished.update(sequence.handle for sequence in sequences)
        self._incoming.extend(sequences)

    def _prepare(self, request: Request, listener: Listener | None = None) -> SequenceState:
        """Validate a request and return its initial state.

        Raises:
            UserError: if the request is invalid.
        """
        info = None if request.adapter is None else self.bank.info(request.adapter)
        tokens = np.asarray(request.tokens)
        if tokens.ndim != 1 or not len(tokens):
            raise UserError("the prompt is empty", location="prompt", hint="provide at least one token")
        if not self.scheduler.accepts(tokens).all():
            hint = f"token ids are 0 to {self.scheduler.num_tokens - 1}"
            raise UserError("the prompt has a token that does not exist", location="prompt", hint=hint)
        length = len(tokens) + (0 if info is None else info.virtual_tokens)
        available = self.positions - length
        if available < min(1, request.max_new_tokens):
            message = f"the prompt has {length} tokens, and the model has {self.positions} positions"
            raise UserError(message, location="prompt", hint="shorten the prompt")
        if request.max_new_tokens < 0:
            raise UserError(f"max_new_tokens is {request.max_new_tokens}", location="max_new_tokens", hint="0 or more")
        if request.prompt_logprobs and not self.scheduler.scores_prompts:
            message = "log-probabilities of the prompt are unavailable when transformers or vLLM decodes"
            raise UserError(message, location="prompt_logprobs", hint="leave them out")
        validate(request.sampling, self.scheduler.vocabulary)
        validate_stops(request.stop)
        default_terminators = self._terminators if info is None else info.terminators or self._terminators
        terminators = default_terminators if request.stop_ids is None else request.stop_ids
        matcher = None
        if request.constraint is not None:
            in_vocabulary = [token for token in terminators if 0 <= token < self.scheduler.vocabulary]
            matcher = self._grammars.compile(request.constraint, in_vocabulary, request.owner)
        sampler = SamplingState(request.sampling, tokens, self.scheduler.vocabulary)
        token_limit = min(request.max_new_tokens, available)
        handle = QueuedGeneration(self._wake, listener)
        output = OutputText(self.tokenizer, request.stop)
        return SequenceState(request, handle, sampler, matcher, output, frozenset(terminators), token_limit)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _drain_incoming(self) -> None:
        with self._changed:
            while self._incoming:
                self.scheduler.waiting.append(self._incoming.popleft())

    def _step(self) -> None:
        """Run one step of all pending requests."""
        self._drain_incoming()
        with torch.inference_mode():
            try:
                if self._cancelling_slow:
                    self.scheduler.cancel_slow()
                self.scheduler.step()
            except Exception as error:  # fail all requests, or their callers would wait forever
                self.scheduler.end_all(error)

    def _loop(self) -> None:
        """Run steps until the engine is closed."""
        while True:
            with self._changed:
                while not self._incoming and self.scheduler.idle and not self._closed:
                    self._changed.wait()
                if self._closed and (not self._draining or (self.scheduler.idle and not self._incoming)):
                    return
            with self._stepping:
                self._step()
            if not self.scheduler.load.running and not self.scheduler.idle:
                time.sleep(_IDLE_SECONDS)
