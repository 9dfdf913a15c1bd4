"""The rows of one decoding step: tokens of several requests end to end, as a decoder takes them.

Knows requests and how tokens become rows; not which tokens run, nor what becomes of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltaw.kernels.decode import PackedAdapter
from deltaw.serving.probes import Entry
from deltaw.serving.running import Run


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
