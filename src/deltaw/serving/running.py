"""One request on its way: its tokens, which of them are written, and what becomes of a chosen token.

A request that lost its pages goes on later from its tokens, so nothing here hangs on pages but their number.
Knows requests, samplers and texts; not which requests run together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from deltaw.data.invocation import last_occurrence
from deltaw.errors import UserError
from deltaw.serving.adapters import ActiveAdapter
from deltaw.serving.matcher import Matcher
from deltaw.serving.pages import SequencePages, token_keys, virtual_keys
from deltaw.serving.request import FinishReason, Piece, Request, TokenLogprob
from deltaw.serving.sampling import NONE, SamplingState
from deltaw.serving.text import WrittenText
from deltaw.serving.writing import QueuedWriting

_NEVER = 1 << 60


class Run:
    """A request on its way.

    Args:
        ends: the tokens that end its text. allowance: tokens that it may write.

    Attributes:
        tokens, keys: (length) of the sequence, virtual tokens first (their ids are 0); and their keys.
        virtual: how many virtual tokens stand in front.
        acts_from: the place from which on the adapter's update acts.
        pages: of its sequence, while it runs. slot: its row of the page table; -1 while it waits.
        written: tokens of the text so far.
    """

    def __init__(
        self,
        request: Request,
        writing: QueuedWriting,
        sampler: SamplingState,
        matcher: Matcher | None,
        tokenizer: PreTrainedTokenizerBase,
        ends: Sequence[int],
        allowance: int,
    ) -> None:
        self.request, self.writing = request, writing
        self.sampler, self.matcher = sampler, matcher
        self.ends, self.allowance = frozenset(ends), allowance
        self.text = WrittenText(tokenizer, request.stop)
        self.deadline = None if request.seconds is None else time.monotonic() + request.seconds
        self.adapter: ActiveAdapter | None = None
        self.pages: SequencePages | None = None
        self.slot = -1
        self.virtual = 0
        self.acts_from = _NEVER
        self.written = 0
        self.length = 0
        self.tokens = self.keys = np.empty(0, np.int64)
        self._told = False
        self._reused = 0
        self._prompt_logprobs: list[TokenLogprob] = []

    def place(self, adapter: ActiveAdapter | None) -> None:
        """Lay out the sequence for the adapter that writes it; once, before it first runs."""
        self.adapter = adapter
        prompt = np.asarray(self.request.tokens, dtype=np.int64)
        facts = None if adapter is None else adapter.facts
        self.virtual = 0 if facts is None else facts.virtual_tokens
        known = self.virtual + len(prompt)
        self.tokens = np.zeros(known + self.allowance, np.int64)
        self.tokens[self.virtual : known] = prompt
        self.length = known
        if adapter is not None and facts is not None and adapter.packed is not None:
            self.acts_from = 0
            if facts.invocation is not None:
                found = last_occurrence(prompt, facts.invocation)
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
            self._prompt_logprobs = []  # a text that lost its pages sees its prompt again

    def add_prompt_logprobs(self, logprobs: Sequence[TokenLogprob]) -> None:
        """Take log-probabilities of the prompt's next tokens."""
        self._prompt_logprobs.extend(logprobs)

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
                raise UserError(
                    f"the text cannot be held to its constraint any longer: {failed}",
                    where="constraint",
                    hint="make it simpler",
                )
            raise UserError(
                "no token can be chosen: the model's logits are not numbers, or nothing is allowed",
                hint="look for values that are not finite in the model and its adapter",
            )
        if token in self.ends:
            self.finish("stop", terminator=token)
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
        self._put(text, (token,), () if logprob is None else (logprob,), finish)
        return finish is not None

    def finish(self, reason: FinishReason, terminator: int | None = None) -> None:
        """End the text."""
        self._put("", (), (), reason, terminator)

    def _put(
        self,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        finish: FinishReason | None,
        terminator: int | None = None,
    ) -> None:
        if finish is not None:
            text += self.text.end()
        of_prompt, self._prompt_logprobs = tuple(self._prompt_logprobs), []
        piece = Piece(text, tokens, (*of_prompt, *logprobs), finish, 0 if self._told else self._reused)
        self._told = True
        self.writing.put(piece, terminator)
