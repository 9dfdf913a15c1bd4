"""Continuous batching: which tokens of which requests run in the next step, and what becomes of them.

A step takes one token of every text that is being written, and beside them chunks of prompts, shared out so
that a long prompt holds up neither texts nor short prompts. Requests start in the order in which they came,
as far as there are pages. A text that needs a page where none is left takes those of the request that
started last, which waits and goes on later from its tokens.

Has no thread and no lock: whoever owns it calls it from one thread at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltaw.kernels.decode import PackedAdapter
from deltaw.serving.adapters import Adapters
from deltaw.serving.decodable import Decodable
from deltaw.serving.pages import PagePool
from deltaw.serving.request import EngineLoad, FinishReason
from deltaw.serving.running import Run, Work, next_tokens
from deltaw.serving.sampling import logprob


class Part(NamedTuple):
    """Tokens from ``start`` to ``stop`` of a request, in one step."""

    run: Run
    start: int
    stop: int

    @property
    def wanted(self) -> range:
        """The places whose logits are wanted: its last, where that is the request's last token, and all of a
        prompt whose log-probabilities are asked for."""
        run, start, stop = self
        if run.wants_prompt:
            return range(max(start, run.virtual), stop)
        return range(stop - 1 if stop == run.length else stop, stop)


# How often requests that wait are looked through for those that have ended.
_SWEEP_SECONDS = 0.05
# Seconds that a step waits for constraints to say which tokens may come next. Where they do not, their texts
# sit out steps until they do.
_PATIENCE = 0.02
_SLOW = 1.0  # seconds after which a constraint is not waited for where the engine is to end soon


@dataclass(frozen=True)
class BatchLimits:
    """Bounds on a step.

    Args:
        running: texts that are written at once, at most.
        prompt_rows: tokens of prompts in a step beside texts, at most: what a text waits for at each token.
        alone_rows: tokens of prompts in a step without texts, at most.
        least_rows: of one prompt, where several share a step.
    """

    running: int = 64
    prompt_rows: int = 64
    alone_rows: int = 256
    least_rows: int = 16


class Batch(Work):
    """The requests in hand, for a decoder.

    Args:
        model: what computes a step. pages: how many there are, each ``model.decoder.page_tokens`` long.
        adapters: of the requests.
    """

    def __init__(self, model: Decodable, pages: int, adapters: Adapters, limits: BatchLimits) -> None:
        decoder = model.decoder
        super().__init__(model.entry.known, model.vocabulary, min(model.positions, pages * decoder.page_tokens))
        self.model, self.adapters, self.limits = model, adapters, limits
        self.memory = decoder.new_pages(pages)
        self.pool = PagePool(pages, decoder.page_tokens, self.memory.copy)
        self._table = np.zeros((limits.running, -(-self.longest // decoder.page_tokens)), np.int32)
        self._page_table = torch.from_numpy(self._table)  # the same memory
        self._slots = list(range(limits.running))
        self._swept = 0.0

    @property
    def load(self) -> EngineLoad:
        pool = self.pool
        used = pool.count - pool.available
        return replace(super().load, pages_used=used, pages=pool.count, reused=pool.reused)

    def step(self) -> None:
        """Compute one step, and hand out what it gave.

        A request whose own part fails ends with that error; where the step itself fails, all that were in it.
        """
        self._hear_constraints()
        self._sweep()
        self._admit()
        parts = self._parts()
        if not parts:
            if slow := next((run.matcher for run in self.running if not run.may_go_on), None):
                slow.wait(_PATIENCE)  # nothing can go on before one of them is ready
            return
        self.tokens += sum(stop - start for _, start, stop in parts)
        try:
            logits, owners = self._compute(parts)
            for run, _, stop in parts:  # is written now
                assert run.pages is not None
                if self.pool.wrote(run.pages, run.keys, stop):
                    self._table[run.slot, : len(run.pages.pages)] = run.pages.pages
            self._hand_out(logits, owners)
        except Exception as error:  # whatever it was, the requests of this step have no right result
            for run, _, _ in parts:
                if run.pages is not None:
                    self.end(run, error)

    def hurry(self) -> None:
        for run in list(self.running):
            if run.matcher is not None and run.matcher.pending > _SLOW:
                self.end(run, "cancelled")

    def end(self, run: Run, why: FinishReason | BaseException | None) -> None:
        if run.pages is not None:
            self._take_out(run, keep=not isinstance(why, BaseException))
        if run.adapter is not None:
            self.adapters.release(run.adapter)
            run.adapter = None
        super().end(run, why)

    def _take_out(self, run: Run, keep: bool = True) -> None:
        """Take a request out of those that run: its pages, and its row of the page table, are free."""
        assert run.pages is not None
        self.running.remove(run)
        self.pool.release(run.pages, run.keys if keep else None)
        self._slots.append(run.slot)
        run.pages, run.slot = None, -1

    def _hear_constraints(self) -> None:
        """Give constraints a moment to say what may come next; those that were late once get none."""
        until = time.monotonic() + _PATIENCE
        for run in self.running:
            if run.matcher is not None and not run.matcher.late:
                run.matcher.wait(until - time.monotonic())

    def _sweep(self) -> None:
        """End requests that were cancelled, or whose time is up."""
        now = time.monotonic()
        for run in list(self.running):
            if (reason := run.ended_by(now)) is not None:
                self.end(run, reason)
        if now - self._swept >= _SWEEP_SECONDS or not self.running:
            self._swept = now
            self.sweep_waiting(now)

    def _admit(self) -> None:
        """Start requests that wait, as long as there are pages for their prompts; those whose adapter is not
        in memory let others pass."""
        passed: list[Run] = []
        while self.waiting and self._slots and len(passed) < self.limits.running:
            run = self.waiting.popleft()
            try:
                ready = self._has_adapter(run)
            except Exception as error:  # its adapter cannot be loaded, say: it alone ends
                self.end(run, error)
                continue
            if not ready:
                passed.append(run)
                continue
            # Pages for what it has, and one for each that runs.
            wanted = -(-run.length // self.pool.page_tokens) + len(self.running)
            if self.running and self.pool.available < wanted:
                self.waiting.appendleft(run)
                break
            slot = self._slots.pop()
            run.begin(self.pool.begin(run.reusable, run.request.owner), slot)
            assert run.pages is not None
            self._table[slot, : len(run.pages.pages)] = run.pages.pages
            self.running.append(run)
        self.waiting.extendleft(reversed(passed))

    def _has_adapter(self, run: Run) -> bool:
        """Whether a request's adapter is in memory; it is held then."""
        if run.placed:
            return True
        adapter = None if run.request.adapter is None else self.adapters.acquire(run.request.adapter)
        if adapter is None and run.request.adapter is not None:
            return False
        run.place(adapter)
        return True

    def _parts(self) -> list[Part]:
        """What runs in the next step: rows of texts, and chunks of prompts."""
        going = [run for run in self.running if run.may_go_on]
        missing = {run: run.length - run.pages.length for run in going if run.pages is not None}
        prompts = [run for run in going if missing[run] > 1]
        limits = self.limits
        left = limits.prompt_rows if len(prompts) < len(going) else limits.alone_rows
        share = max(limits.least_rows, left // max(1, len(prompts)))
        rows: dict[Run, int] = {}
        for run in prompts:
            rows[run] = max(0, min(missing[run], share, left))
            left -= rows[run]
        for run in prompts:  # what others did not want
            more = min(missing[run] - rows[run], left)
            rows[run] += more
            left -= more
        parts: list[Part] = []
        for run in going:
            if run.pages is None:
                continue  # it lost them to one before
            start = run.pages.length
            stop = start + rows.get(run, 1)
            if stop > start and self._reserve(run, stop):
                parts.append(Part(run, start, stop))
        return parts

    def _reserve(self, run: Run, stop: int) -> bool:
        """Get a request the pages for tokens up to ``stop``, from those that started last if need be."""
        assert run.pages is not None
        before = len(run.pages.pages)
        while not self.pool.reserve(run.pages, stop):
            last = self.running[-1]
            self._take_out(last)
            self.waiting.appendleft(last)  # to go on later
            if last is run:
                return False
        pages = run.pages.pages
        if len(pages) > before:
            self._table[run.slot, before : len(pages)] = pages[before:]
        return True

    def _compute(self, parts: list[Part]) -> tuple[Tensor, list[tuple[Run, int]]]:
        """Logits (k, V), and whose they are: a request and the place of the token."""
        entry = self.model.entry
        total = sum(stop - start for _, start, stop in parts)
        tokens = np.empty(total, np.int64)
        places, sequence, adapter = np.empty(total, np.int32), np.empty(total, np.int32), np.full(total, -1, np.int32)
        packed: list[PackedAdapter] = []
        numbers: dict[int, int] = {}
        wanted: list[int] = []
        owners: list[tuple[Run, int]] = []
        soft: list[tuple[int, Tensor]] = []
        at = 0
        for part in parts:
            run, start, stop = part
            end = at + stop - start
            tokens[at:end] = run.tokens[start:stop]
            places[at:end] = start if stop - start == 1 else np.arange(start, stop)
            sequence[at:end] = run.slot
            own = None if run.adapter is None else run.adapter.packed
            if own is not None and stop > run.acts_from:
                number = numbers.setdefault(id(own), len(packed))
                if number == len(packed):
                    packed.append(own)
                adapter[at + max(0, run.acts_from - start) : end] = number
            if start < run.virtual and run.adapter is not None and run.adapter.soft_prompt is not None:
                soft.append((at, run.adapter.soft_prompt[start : min(stop, run.virtual)]))
            wanted += [at + place - start for place in part.wanted]
            owners += [(run, place) for place in part.wanted]
            at = end
        hidden = entry.rows(torch.from_numpy(tokens))
        for first, prompt in soft:
            hidden[first : first + len(prompt)] = prompt.float() * entry.outer
        positions, sequences, adapters = map(torch.from_numpy, (places, sequence, adapter))
        if entry.positions is not None:
            hidden += entry.positions.index_select(0, positions)
        outputs = torch.tensor(wanted, dtype=torch.int32)
        rows = (hidden, positions, sequences, self._page_table, adapters)
        _, logits = self.model.decoder.step(self.memory, *rows, packed, outputs)
        return logits, owners

    def _hand_out(self, logits: Tensor, owners: Sequence[tuple[Run, int]]) -> None:
        """Choose the next token of each text, and end those that are done."""
        values = logits.numpy()
        rows: list[int] = []
        runs: list[Run] = []
        for row, (run, place) in enumerate(owners):
            if run.wants_prompt and place + 1 < run.length:
                top = run.request.sampling.logprobs or 0
                run.prompt_logprobs.append(logprob(values[row], int(run.tokens[place + 1]), top))
            if place + 1 == run.length:
                if run.allowance:
                    rows.append(row)
                    runs.append(run)
                else:
                    self.end(run, "length")
        if not runs:
            return
        for run, token, told in next_tokens(runs, values if len(rows) == len(values) else values[rows]):
            try:
                ended = run.take(token, told)
            except Exception as error:  # of this text alone
                self.end(run, error)
                continue
            if ended:
                self.end(run, None)
