"""Continuous batching: which tokens of which requests run in the next step, and what becomes of them.

A step takes one token of every text that is being written, and beside them chunks of prompts, shared out so
that a long prompt holds up neither texts nor short prompts. Requests start in the order in which they came,
as far as there are pages. A text that needs a page where none is left takes those of the request that
started last, which waits and goes on later from its tokens.

Has no thread and no lock: whoever owns it calls it from one thread at a time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltaw.kernels.decode import PackedAdapter
from deltaw.serving.adapters import Adapters
from deltaw.serving.decodable import Decodable
from deltaw.serving.pages import PagePool
from deltaw.serving.probes import Entry
from deltaw.serving.request import EngineLoad, Request
from deltaw.serving.running import Run, next_tokens
from deltaw.serving.sampling import prompt_logprobs

# ---- The rows of one decoding step: tokens of several requests end to end, as a decoder takes them.
#
# Knows requests and how tokens become rows; not which tokens run, nor what becomes of the logits.


@dataclass(frozen=True)
class Part:
    """Tokens from ``start`` to ``stop`` of a request, in one step."""

    run: Run
    start: int
    stop: int


@dataclass(frozen=True)
class StepRows:
    """What a step is called with; see :meth:`deltaw.kernels.decode.Decoder.step`.

    Attributes:
        hidden: (n, D) fp32. positions, sequence, adapter: (n) int32. wanted: (k) int32.
        owners: (k) whose outputs they are: a request, and the place of the token in its sequence.
    """

    hidden: Tensor
    positions: Tensor
    sequence: Tensor
    adapter: Tensor
    adapters: Sequence[PackedAdapter]
    wanted: Tensor
    owners: Sequence[tuple[Run, int]]


def step_rows(parts: Sequence[Part], entry: Entry, default: PackedAdapter | None = None) -> StepRows:
    """The rows of these parts.

    Args:
        default: acts on requests that name no adapter.
    """
    total = sum(part.stop - part.start for part in parts)
    tokens = np.empty(total, np.int64)
    places, sequence = np.empty(total, np.int32), np.empty(total, np.int32)
    adapter = np.full(total, -1 if default is None else 0, np.int32)
    packed: list[PackedAdapter] = [] if default is None else [default]
    numbers: dict[int, int] = {}
    wanted: list[int] = []
    owners: list[tuple[Run, int]] = []
    soft: list[tuple[int, Tensor]] = []
    at = 0
    for part in parts:
        run, start, stop = part.run, part.start, part.stop
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
        for place in _wanted(part):
            wanted.append(at + place - start)
            owners.append((run, place))
        at = end
    hidden = entry.rows(torch.from_numpy(tokens))
    for first, rows in soft:
        hidden[first : first + len(rows)] = rows.float() * entry.outer
    positions = torch.from_numpy(places)
    if entry.positions is not None:
        hidden += entry.positions.index_select(0, positions)
    return StepRows(
        hidden,
        positions,
        torch.from_numpy(sequence),
        torch.from_numpy(adapter),
        packed,
        torch.tensor(wanted, dtype=torch.int32),
        owners,
    )


def _wanted(part: Part) -> range:
    """The places of a part whose logits are wanted: its last, where that is the request's last token, and
    all of a prompt whose log-probabilities are asked for."""
    run = part.run
    if run.wants_prompt:
        return range(max(part.start, run.virtual), part.stop)
    return range(part.stop - 1 if part.stop == run.length else part.stop, part.stop)


# ---- The requests in hand, and a step for them.


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


class Batch:
    """The requests in hand.

    Args:
        model: what computes a step. pages: how many there are, each ``model.decoder.page_tokens`` long.
        adapters: of the requests. default: acts on requests that name none.

    Attributes:
        waiting, running: requests, in the order in which they start, or started.
        steps, tokens: that were computed since the start.
        known: how many token ids a prompt may have. vocabulary: how many logits there are.
        longest: the most tokens that a sequence may have.
    """

    def __init__(
        self,
        model: Decodable,
        pages: int,
        adapters: Adapters,
        limits: BatchLimits,
        default: PackedAdapter | None = None,
    ) -> None:
        decoder = model.decoder
        self.model, self.adapters, self.limits, self.default = model, adapters, limits, default
        self.memory = decoder.new_pages(pages)
        self.pool = PagePool(pages, decoder.page_tokens, self.memory.copy)
        self.waiting: deque[Run] = deque()
        self.running: list[Run] = []
        self.steps = self.tokens = 0
        self.known, self.vocabulary = model.entry.known, model.vocabulary
        self.longest = min(model.positions, pages * decoder.page_tokens)
        self._table = np.zeros((limits.running, -(-self.longest // decoder.page_tokens)), np.int32)
        self._page_table = torch.from_numpy(self._table)  # the same memory
        self._slots = list(range(limits.running))
        self._swept = 0.0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def load(self) -> EngineLoad:
        """What is in hand at the moment."""
        pool = self.pool
        used = pool.count - pool.available
        return EngineLoad(len(self.running), len(self.waiting), used, pool.count, pool.reused, self.tokens)

    def refuse(self, request: Request) -> None:
        """Nothing that a request can ask for is refused."""

    def add(self, run: Run) -> None:
        """Queue a request."""
        self.waiting.append(run)

    def step(self) -> None:
        """Compute one step, and hand out what it gave.

        A request whose own part fails ends with that error; where the step itself fails, all that were in it.
        """
        self._hear_constraints()
        self._sweep()
        self._admit()
        parts = self._parts()
        if not parts:
            slow = next((run.matcher for run in self.running if not run.may_go_on), None)
            if slow is not None:  # nothing can go on before one of them is ready
                slow.wait(_PATIENCE)
            return
        self.steps += 1
        self.tokens += sum(part.stop - part.start for part in parts)
        try:
            logits, wanted = self._compute(parts)
            self._note(parts)
            self._hand_out(logits, wanted)
        except Exception as error:  # whatever it was, the requests of this step have no right result
            for part in parts:
                if part.run.slot >= 0:
                    self._fail(part.run, error)

    def end_all(self, error: BaseException | None) -> None:
        """End every request at once: as cancelled, or with an error."""
        for run in [*self.running, *self.waiting]:
            self._leave(run)
            self._let_go(run)
            if error is None:
                run.finish("cancelled")
            else:
                run.writing.fail(error)
        self.running.clear()
        self.waiting.clear()

    def hurry(self) -> None:
        """End texts whose constraints are slow to say what may come next."""
        for run in list(self.running):
            if run.matcher is not None and run.matcher.pending > _SLOW:
                self._stop(run)
                run.finish("cancelled")

    def _hear_constraints(self) -> None:
        """Give constraints a moment to say what may come next; those that were late once get none."""
        until = time.monotonic() + _PATIENCE
        for run in self.running:
            if run.matcher is not None and not run.matcher.late:
                run.matcher.wait(until - time.monotonic())

    def _sweep(self) -> None:
        """End requests that were cancelled, or whose time is up."""
        now = time.monotonic()
        for run in [run for run in self.running if run.ended_by(now) is not None]:
            reason = run.ended_by(now)
            assert reason is not None
            self._stop(run)
            run.finish(reason)
        if now - self._swept < _SWEEP_SECONDS and self.running:
            return
        self._swept = now
        kept: deque[Run] = deque()
        for run in self.waiting:
            reason = run.ended_by(now)
            if reason is None:
                kept.append(run)
            else:
                self._let_go(run)
                run.finish(reason)
        self.waiting = kept

    def _admit(self) -> None:
        """Start requests that wait, as long as there are pages for their prompts; those whose adapter is not
        in memory let others pass."""
        passed: list[Run] = []
        while self.waiting and self._slots and len(passed) < self.limits.running:
            run = self.waiting.popleft()
            try:
                ready = self._has_adapter(run)
                if ready and not self._has_room(run):
                    self.waiting.appendleft(run)
                    break
            except Exception as error:  # its adapter cannot be loaded, say: it alone ends
                self._let_go(run)
                run.writing.fail(error)
                continue
            if ready:
                self._start(run)
            else:
                passed.append(run)
        self.waiting.extendleft(reversed(passed))

    def _has_adapter(self, run: Run) -> bool:
        """Whether a request's adapter is in memory; it is held then."""
        if run.placed:
            return True
        adapter = None
        if run.request.adapter is not None:
            adapter = self.adapters.acquire(run.request.adapter)
            if adapter is None:
                return False
        run.place(adapter)
        return True

    def _has_room(self, run: Run) -> bool:
        """Whether there are pages for what a request has, and one for each that runs."""
        wanted = -(-run.length // self.pool.page_tokens) + len(self.running)
        return not self.running or self.pool.available >= wanted

    def _start(self, run: Run) -> None:
        pages = self.pool.begin(run.reusable, run.request.owner)
        slot = self._slots.pop()
        run.begin(pages, slot)
        self._table[slot, : len(pages.pages)] = pages.pages
        self.running.append(run)

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
            self._stop(last, again=True)
            if last is run:
                return False
        pages = run.pages.pages
        if len(pages) > before:
            self._table[run.slot, before : len(pages)] = pages[before:]
        return True

    def _compute(self, parts: list[Part]) -> tuple[Tensor, Sequence[tuple[Run, int]]]:
        """Logits (k, V), and whose they are: a request and the place of the token."""
        rows = step_rows(parts, self.model.entry, self.default)
        _, logits = self.model.decoder.step(
            self.memory,
            rows.hidden,
            rows.positions,
            rows.sequence,
            self._page_table,
            rows.adapter,
            rows.adapters,
            rows.wanted,
        )
        return logits, rows.owners

    def _note(self, parts: list[Part]) -> None:
        """Note what is written now."""
        for part in parts:
            run = part.run
            assert run.pages is not None
            if self.pool.wrote(run.pages, run.keys, part.stop):
                self._table[run.slot, : len(run.pages.pages)] = run.pages.pages

    def _hand_out(self, logits: Tensor, owners: Sequence[tuple[Run, int]]) -> None:
        """Choose the next token of each text, and end those that are done."""
        values = logits.numpy()
        rows: list[int] = []
        runs: list[Run] = []
        for row, (run, place) in enumerate(owners):
            if run.wants_prompt and place + 1 < run.length:
                top = run.request.sampling.logprobs or 0
                run.add_prompt_logprobs(prompt_logprobs(values[row : row + 1], run.tokens[place + 1 : place + 2], top))
            if place + 1 == run.length:
                if run.allowance:
                    rows.append(row)
                    runs.append(run)
                else:
                    self._stop(run)
                    run.finish("length")
        if not runs:
            return
        for run, token, logprob in next_tokens(runs, values if len(rows) == len(values) else values[rows]):
            try:
                ended = run.take(token, logprob)
            except Exception as error:  # of this text alone
                self._fail(run, error)
                continue
            if ended:
                self._stop(run)

    def _stop(self, run: Run, again: bool = False) -> None:
        """Take a request out; ``again`` puts it before those that wait, to go on later."""
        self.running.remove(run)
        self._leave(run, keep=True)
        if again:
            self.waiting.appendleft(run)
        else:
            self._let_go(run)

    def _fail(self, run: Run, error: BaseException) -> None:
        self.running.remove(run)
        self._leave(run)
        self._let_go(run)
        run.writing.fail(error)

    def _leave(self, run: Run, keep: bool = False) -> None:
        """Give back a request's pages and its row of the page table."""
        if run.pages is not None:
            self.pool.release(run.pages, run.keys if keep else None)
            self._slots.append(run.slot)
            run.pages, run.slot = None, -1

    def _let_go(self, run: Run) -> None:
        if run.adapter is not None:
            self.adapters.release(run.adapter)
            run.adapter = None
