"""Continuous batching: selects the tokens of each step and samples the next tokens.

A step computes one token of every running completion plus chunks of prompts. Prompt tokens per step are limited and
shared, so that a long prompt delays neither completions nor short prompts. Requests start in arrival order, as pages
permit. If no page is left, the sequence that started last is preempted and resumes later from its tokens.

The batch has no thread and no lock. The engine must call it from one thread at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltaw.decoding.adapters import Adapters
from deltaw.decoding.decodable import Decodable
from deltaw.decoding.pages import PagePool, SavedStates, SequencePages
from deltaw.decoding.request import EngineLoad, FinishReason
from deltaw.decoding.sampling import logprob
from deltaw.decoding.sequences import SequenceScheduler, SequenceState, next_tokens


class ScheduledTokens(NamedTuple):
    """Tokens ``start`` to ``stop`` (exclusive) of a sequence that run in one step."""

    sequence: SequenceState
    start: int
    stop: int

    @property
    def output_positions(self) -> range:
        """Positions whose logits are needed.

        These are the last position, if it is the sequence's last token, or all positions of a prompt whose
        log-probabilities are requested.
        """
        sequence, start, stop = self
        if sequence.needs_prompt_logprobs:
            return range(max(start, sequence.virtual), stop)
        return range(stop - 1 if stop == sequence.length else stop, stop)


# Seconds between checks of the queue for cancelled and timed-out requests.
_SWEEP_SECONDS = 0.05
# Seconds that a step waits for constraints to compute the allowed tokens. Sequences with slower constraints skip steps.
_CONSTRAINT_WAIT = 0.02
_SLOW_CONSTRAINT = 1.0  # seconds after which a pending constraint is cancelled during shutdown


@dataclass(frozen=True)
class BatchLimits:
    """Limits of a step.

    Args:
        running: Maximum number of running sequences.
        prompt_rows: Maximum number of prompt tokens in a step that also decodes completions. It bounds the time between
            two tokens of a completion.
        prefill_rows: Maximum number of prompt tokens in a step without completions.
        min_rows: Minimum number of tokens per prompt if several prompts share a step.
        saved_state_bytes: Maximum size of saved states of recurrent layers.
    """

    running: int = 64
    prompt_rows: int = 64
    prefill_rows: int = 256
    min_rows: int = 16
    saved_state_bytes: int = 0


class RunningBatch(SequenceScheduler):
    """Scheduler that runs sequences on a paged decoder.

    Args:
        model: Model with its decoder.
        pages: Number of pages, each of ``model.decoder.page_tokens`` tokens.
        adapters: Adapters of the requests.
        limits: Limits of a step.
    """

    def __init__(self, model: Decodable, pages: int, adapters: Adapters, limits: BatchLimits) -> None:
        decoder = model.decoder
        super().__init__(model.entry.num_tokens, model.vocabulary, min(model.positions, pages * decoder.page_tokens))
        self.model = model
        self.adapters = adapters
        self.limits = limits
        self.images = model.entry.images
        self.memory = decoder.new_pages(pages, limits.running)
        saved = SavedStates(limits.saved_state_bytes) if decoder.state_bytes else None
        self.pool = PagePool(pages, decoder.page_tokens, self.memory.copy, saved)
        self._table = np.zeros((limits.running, -(-self.max_length // decoder.page_tokens)), np.int32)
        self._page_table = torch.from_numpy(self._table)  # the same memory
        self._slots = list(range(limits.running))
        self._last_sweep = 0.0

    @property
    def load(self) -> EngineLoad:
        pool = self.pool
        return replace(super().load, pages_used=pool.count - pool.available, pages=pool.count, reused=pool.reused)

    def step(self) -> None:
        """Run one step and emit its results.

        An error of a single sequence finishes only that sequence. An error of the forward pass finishes all sequences
        in it.
        """
        self._wait_for_constraints()
        self._sweep()
        self._admit()
        scheduled = self._schedule()
        if not scheduled:
            if slow := next((sequence.matcher for sequence in self.running if not sequence.can_continue), None):
                slow.wait(_CONSTRAINT_WAIT)  # no sequence can continue before a constraint is ready
            return
        self.tokens += sum(stop - start for _, start, stop in scheduled)
        try:
            logits, owners = self._compute(scheduled)
            for sequence, _, stop in scheduled:
                assert sequence.pages is not None
                if self.pool.commit(sequence.pages, sequence.keys, stop):
                    self._table[sequence.slot, : len(sequence.pages.pages)] = sequence.pages.pages
                if self.memory.states is not None and stop % self.pool.page_tokens == 0:
                    self._save_state(sequence, sequence.pages)
            self._sample(logits, owners)
        except Exception as error:  # any error leaves the sequences of this step without a valid result
            for sequence, _, _ in scheduled:
                if sequence.pages is not None:
                    self.end(sequence, error)

    def cancel_slow(self) -> None:
        for sequence in list(self.running):
            if sequence.matcher is not None and sequence.matcher.pending > _SLOW_CONSTRAINT:
                self.end(sequence, "cancelled")

    def end(self, sequence: SequenceState, reason: FinishReason | BaseException | None) -> None:
        if sequence.pages is not None:
            self._remove_running(sequence, cache=not isinstance(reason, BaseException))
        if sequence.adapter is not None:
            self.adapters.release(sequence.adapter)
            sequence.adapter = None
        super().end(sequence, reason)

    def _remove_running(self, sequence: SequenceState, cache: bool = True) -> None:
        """Remove a sequence from the running ones, and free its pages and its slot.

        Args:
            sequence: The sequence.
            cache: Keep its computed pages in the prefix cache.
        """
        assert sequence.pages is not None
        self.running.remove(sequence)
        self.pool.release(sequence.pages, sequence.keys if cache else None)
        self._slots.append(sequence.slot)
        sequence.pages = None
        sequence.slot = -1

    def _wait_for_constraints(self) -> None:
        """Wait a moment for constraints. A constraint that was late before is not waited for."""
        deadline = time.monotonic() + _CONSTRAINT_WAIT
        for sequence in self.running:
            if sequence.matcher is not None and not sequence.matcher.late:
                sequence.matcher.wait(deadline - time.monotonic())

    def _sweep(self) -> None:
        """Finish requests that were cancelled or have timed out."""
        now = time.monotonic()
        for sequence in list(self.running):
            if (reason := sequence.stop_reason(now)) is not None:
                self.end(sequence, reason)
        if now - self._last_sweep >= _SWEEP_SECONDS or not self.running:
            self._last_sweep = now
            self.sweep_waiting(now)

    def _admit(self) -> None:
        """Start queued requests while pages are available. Requests are skipped until their adapter is loaded."""
        skipped: list[SequenceState] = []
        while self.waiting and self._slots and len(skipped) < self.limits.running:
            sequence = self.waiting.popleft()
            try:
                if not self._acquire_adapter(sequence):
                    skipped.append(sequence)
                    continue
            except Exception as error:  # for example the adapter cannot be loaded
                self.end(sequence, error)
                continue
            # Pages for its tokens, and one page in reserve for each running sequence.
            if self.running and self.pool.available < -(-sequence.length // self.pool.page_tokens) + len(self.running):
                self.waiting.appendleft(sequence)
                break
            slot = self._slots.pop()
            sequence.start(self.pool.start_sequence(sequence.reusable, sequence.request.owner), slot)
            assert sequence.pages is not None
            self._table[slot, : len(sequence.pages.pages)] = sequence.pages.pages
            if self.memory.states is not None and sequence.pages.state is not None:
                self.memory.states[slot] = sequence.pages.state
                sequence.pages.state = None  # it may be evicted
            self.running.append(sequence)
        self.waiting.extendleft(reversed(skipped))

    def _acquire_adapter(self, sequence: SequenceState) -> bool:
        """Acquire the adapter of a sequence. Return False if it is not loaded yet."""
        if sequence.is_prepared:
            return True
        adapter = None if sequence.request.adapter is None else self.adapters.acquire(sequence.request.adapter)
        if adapter is None and sequence.request.adapter is not None:
            return False
        sequence.prepare(adapter)
        return True

    def _schedule(self) -> list[ScheduledTokens]:
        """Select the tokens of the next step."""
        ready = [sequence for sequence in self.running if sequence.can_continue]
        missing = {s: s.length - s.pages.length for s in ready if s.pages is not None}
        prompts = [sequence for sequence in ready if missing[sequence] > 1]
        limits = self.limits
        remaining = limits.prompt_rows if len(prompts) < len(ready) else limits.prefill_rows
        share = max(limits.min_rows, remaining // max(1, len(prompts)))
        rows: dict[SequenceState, int] = {}
        for sequence in prompts:
            rows[sequence] = max(0, min(missing[sequence], share, remaining))
            remaining -= rows[sequence]
        for sequence in prompts:  # distribute the rest
            extra = min(missing[sequence] - rows[sequence], remaining)
            rows[sequence] += extra
            remaining -= extra
        scheduled: list[ScheduledTokens] = []
        for sequence in ready:
            if sequence.pages is None:
                continue  # preempted by an earlier sequence
            start = sequence.pages.length
            stop = start + rows.get(sequence, 1)
            if self.memory.states is not None:
                stop = min([stop, *(end for end in self._saved_ends(sequence, sequence.pages) if end > start)])
            if stop > start and self._reserve(sequence, stop):
                scheduled.append(ScheduledTokens(sequence, start, stop))
        return scheduled

    def _saved_ends(self, sequence: SequenceState, pages: SequencePages) -> tuple[int, int]:
        """Return the positions after whose tokens a prompt's state is saved for other requests."""
        prompt = sequence.length - sequence.num_generated
        return pages.matched, (prompt - 1) // self.pool.page_tokens * self.pool.page_tokens

    def _save_state(self, sequence: SequenceState, pages: SequencePages) -> None:
        """Save the state after the tokens of a sequence if other sequences may continue it."""
        assert self.memory.states is not None
        in_completion = pages.length > sequence.length - sequence.num_generated
        if in_completion or pages.length in self._saved_ends(sequence, pages):
            self.pool.save_state(pages, self.memory.states[sequence.slot], in_completion)

    def _reserve(self, sequence: SequenceState, stop: int) -> bool:
        """Reserve pages for the tokens up to ``stop``. Preempts the sequences that started last if necessary.

        Returns:
            False if the sequence itself was preempted.
        """
        assert sequence.pages is not None
        before = len(sequence.pages.pages)
        while not self.pool.reserve(sequence.pages, stop):
            last = self.running[-1]
            self._remove_running(last)
            self.waiting.appendleft(last)
            if last is sequence:
                return False
        pages = sequence.pages.pages
        if len(pages) > before:
            self._table[sequence.slot, before : len(pages)] = pages[before:]
        return True

    def _compute(self, scheduled: list[ScheduledTokens]) -> tuple[Tensor, list[tuple[SequenceState, int]]]:
        """Run the forward pass of a step.

        Returns:
            Logits (k, V), and for each row its sequence and the position of the token.
        """
        entry = self.model.entry
        total = sum(stop - start for _, start, stop in scheduled)
        tokens = np.empty(total, np.int64)
        token_positions = np.empty(total, np.int32)
        slots = np.empty(total, np.int32)
        adapter_rows = np.full(total, -1, np.int32)
        packed: list[Any] = []  # in the form of the decoder
        numbers: dict[int, int] = {}
        output_rows: list[int] = []
        owners: list[tuple[SequenceState, int]] = []
        soft: list[tuple[int, Tensor]] = []
        row = 0
        for part in scheduled:
            sequence, start, stop = part
            end = row + stop - start
            tokens[row:end] = sequence.tokens[start:stop]
            token_positions[row:end] = start if stop - start == 1 else np.arange(start, stop)
            slots[row:end] = sequence.slot
            update = None if sequence.adapter is None else sequence.adapter.packed
            if update is not None and stop > sequence.adapter_start:
                number = numbers.setdefault(id(update), len(packed))
                if number == len(packed):
                    packed.append(update)
                adapter_rows[row + max(0, sequence.adapter_start - start) : end] = number
            if start < sequence.virtual and sequence.adapter is not None and sequence.adapter.soft_prompt is not None:
                soft.append((row, sequence.adapter.soft_prompt[start : min(stop, sequence.virtual)]))
            output_rows += [row + position - start for position in part.output_positions]
            owners += [(sequence, position) for position in part.output_positions]
            row = end
        hidden = entry.rows(torch.from_numpy(tokens))
        for first, prompt in soft:
            hidden[first : first + len(prompt)] = prompt.float() * entry.outer
        positions, sequences, adapters = map(torch.from_numpy, (token_positions, slots, adapter_rows))
        if entry.positions is not None:
            hidden += entry.positions.index_select(0, positions)
        rows = (hidden, positions, sequences, self._page_table, adapters)
        _, logits = self.model.decoder.step(self.memory, *rows, packed, torch.tensor(output_rows, dtype=torch.int32))
        return logits, owners

    def _sample(self, logits: Tensor, owners: Sequence[tuple[SequenceState, int]]) -> None:
        """Sample the next tokens, and finish sequences that are complete."""
        values = logits.numpy()
        rows: list[int] = []
        sequences: list[SequenceState] = []
        for row, (sequence, position) in enumerate(owners):
            if sequence.needs_prompt_logprobs and position + 1 < sequence.length:
                top = sequence.request.sampling.logprobs or 0
                sequence.prompt_logprobs.append(logprob(values[row], int(sequence.tokens[position + 1]), top))
            if position + 1 == sequence.length:
                if sequence.token_limit:
                    rows.append(row)
                    sequences.append(sequence)
                else:
                    self.end(sequence, "length")
        if not sequences:
            return
        for sequence, token, score in next_tokens(sequences, values if len(rows) == len(values) else values[rows]):
            try:
                finished = sequence.append_token(token, score)
            except Exception as error:  # affects only this sequence
                self.end(sequence, error)
                continue
            if finished:
                self.end(sequence, None)
