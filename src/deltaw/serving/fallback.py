"""Texts by transformers' ``generate``, for models that have no decoder: correct for any model, and slower.

Requests that wait are decoded together, as many as their tokens allow; who comes meanwhile waits for the next
batch. Tokens are chosen and texts cut as in the decoding engine, so that all settings of a request mean the
same. Prompts are computed anew each time.

Knows inference sessions and requests; not threads.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque

import numpy as np
from torch import Tensor

from deltaw.errors import UserError
from deltaw.runtime.generation import decode_by, position_limit
from deltaw.serving.batch import EngineLoad
from deltaw.serving.matcher import masks
from deltaw.serving.request import Request
from deltaw.serving.running import Run
from deltaw.serving.sampling import choose
from deltaw.training.inference import InferenceSession

# Positions of a model that does not say how many it has.
_UNSAID = 1 << 17


class FallbackWork:
    """Computes requests of a session, a batch at a time; see :class:`deltaw.serving.engine.Work`.

    Args:
        own_adapter: the name that a request gives to get the session's adapter.
        batch_tokens: prompts and texts of a batch, at most; one request alone may exceed it. rows: texts of a
            batch, at most.
    """

    def __init__(
        self, session: InferenceSession, own_adapter: str | None, *, batch_tokens: int = 4096, rows: int = 16
    ) -> None:
        self._session, self._own = session, own_adapter
        self._batch_tokens, self._rows = batch_tokens, rows
        self._waiting: deque[Run] = deque()
        self._running: list[Run] = []
        self._tokens = 0
        embedding = session.model.get_input_embeddings().weight
        head = session.model.get_output_embeddings()
        self._known = int(embedding.shape[0])  # type: ignore[union-attr, index]
        self._logits = self._known if head is None else int(head.weight.shape[0])  # type: ignore[union-attr, index]

    @property
    def known(self) -> int:
        return self._known

    @property
    def vocabulary(self) -> int:
        return self._logits

    @property
    def longest(self) -> int:
        return position_limit(self._session.model) or _UNSAID

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(len(self._running), len(self._waiting), tokens=self._tokens)

    def refuse(self, request: Request) -> None:
        """Log-probabilities of prompts need logits that ``generate`` does not give."""
        if request.prompt_logprobs:
            raise UserError(
                "log-probabilities of the prompt are not to be had where transformers decodes",
                where="prompt_logprobs",
                hint="leave them out",
            )

    def add(self, run: Run) -> None:
        self._waiting.append(run)

    def hurry(self) -> None:
        """Nothing: constraints are waited for within a step."""

    def end_all(self, error: BaseException | None) -> None:
        for run in [*self._running, *self._waiting]:
            if not run.writing.done:
                if error is None:
                    run.finish("cancelled")
                else:
                    run.writing.fail(error)
        self._running.clear()
        self._waiting.clear()

    def step(self) -> None:
        """Write the texts of the next batch, to their ends."""
        now = time.monotonic()
        for run in [run for run in self._waiting if run.ended_by(now) is not None]:
            self._waiting.remove(run)
            run.finish(run.ended_by(now) or "cancelled")
        self._running = self._next()
        try:
            if self._running:
                self._write(self._running)
        except Exception as error:  # whatever foreign code raises: these requests have no right result
            for run in self._running:
                if not run.writing.done:
                    run.writing.fail(error)
        self._running = []

    def _next(self) -> list[Run]:
        """The requests of the next batch: those for the same model, in order, as far as they fit."""
        chosen: list[Run] = []
        longest = most = 0
        for run in list(self._waiting):
            if chosen and run.request.adapter != chosen[0].request.adapter:
                continue
            length, allowance = len(run.request.tokens), run.allowance
            wide = (max(longest, length) + max(most, allowance)) * (len(chosen) + 1)
            if chosen and (wide > self._batch_tokens or len(chosen) == self._rows):
                break
            # Padding takes positions too, so that short prompts beside long ones could run out of them.
            if chosen and max(longest, length) + max(most, allowance) + self._virtual > self.longest:
                continue
            longest, most = max(longest, length), max(most, allowance)
            self._waiting.remove(run)
            if allowance:
                chosen.append(run)
            else:
                run.finish("length")
        return chosen

    @property
    def _virtual(self) -> int:
        return self._session.virtual_tokens

    def _write(self, runs: list[Run]) -> None:
        session = self._session
        bare = session.adapter and runs[0].request.adapter is None and self._own is not None
        with session.base() if bare else contextlib.nullcontext():
            prompts = [session.prompt(np.asarray(run.request.tokens, np.int64)) for run in runs]
            for run in runs:
                run.place(None)

            def next_tokens(logits: Tensor) -> list[int | None]:
                return self._chosen(runs, logits)

            decode_by(
                session.model, session.tokenizer, prompts, max(run.allowance for run in runs), next_tokens
            )

    def _chosen(self, runs: list[Run], logits: Tensor) -> list[int | None]:
        """The next token of each text that goes on."""
        self._end(runs)
        tokens: list[int | None] = [None] * len(runs)
        rows = [row for row, run in enumerate(runs) if not run.writing.done]
        if not rows:
            return tokens
        matchers = {n: m for n, row in enumerate(rows) if (m := runs[row].matcher) is not None}
        chosen = choose(
            logits.numpy(force=True)[rows],
            [runs[row].sampler for row in rows],
            masks(matchers) if matchers else None,
        )
        self._tokens += len(rows)
        for row, token, logprob in zip(rows, chosen.tokens.tolist(), chosen.logprobs, strict=True):
            try:
                runs[row].take(token, logprob)
                tokens[row] = token
            except Exception as error:  # of this text alone
                runs[row].writing.fail(error)
        self._end(runs)
        return [None if run.writing.done else token for run, token in zip(runs, tokens, strict=True)]

    @staticmethod
    def _end(runs: list[Run]) -> None:
        """End the texts that end here."""
        now = time.monotonic()
        for run in runs:
            if not run.writing.done:
                if run.matcher is not None:
                    run.matcher.wait()
                if (reason := run.ended_by(now)) is not None:
                    run.finish(reason)
