"""Rows of one step that each have their own adapter, or none, through a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.serving.bank import AdapterBank, Packer
from deltaw.serving.decodable import Decodable


def drawn_prompts(count: int, vocabulary: int, *, seed: int = 0) -> list[np.ndarray]:
    """Prompts of 3 to 9 tokens."""
    draw = np.random.default_rng(seed)
    return [draw.integers(3, vocabulary, draw.integers(3, 10)) for _ in range(count)]


def bank_over(model: nn.Module, made: Decodable, *folders: Path) -> AdapterBank:
    """A bank of these adapters by their numbers."""
    bank = AdapterBank(model, None, Packer(model, made), budget_bytes=1 << 30)
    for number, folder in enumerate(folders):
        bank.add(str(number), folder)
    return bank


def packed_of(bank: AdapterBank) -> list:
    return [bank.acquire(name).packed for name in bank.names()]


def last_logits(model: nn.Module, text: np.ndarray, count: int = 1) -> Tensor:
    """The model's own logits (count, V) at the last tokens of a text."""
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(np.asarray(text))[None]).logits[0, -count:]


class Rows:
    """Sequences in a decoder, which grow by one token a step.

    Args:
        adapters: packed ones. which: of each sequence its place in ``adapters``, or -1.
    """

    def __init__(self, made: Decodable, adapters: Sequence, which: Sequence[int], most: int = 64) -> None:
        self._made, self._adapters = made, list(adapters)
        self._which = torch.tensor(which, dtype=torch.int32)
        each = -(-most // made.decoder.page_tokens)
        self._pages = made.decoder.new_pages(each * len(which))
        self._table = torch.arange(each * len(which), dtype=torch.int32).view(len(which), each)
        self._lengths = [0] * len(which)

    def step(self, tokens: Sequence[np.ndarray]) -> Tensor:
        """Add tokens to each sequence; logits (sequences, V) at the last of each."""
        counts = [len(t) for t in tokens]
        ids = torch.as_tensor(np.concatenate(tokens))
        places = [torch.arange(n, n + count) for n, count in zip(self._lengths, counts, strict=True)]
        positions = torch.cat(places).to(torch.int32)
        sequence = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(torch.int32)
        entry, hidden = self._made.entry, self._made.entry.rows(ids)
        if entry.positions is not None:
            hidden = hidden + entry.positions[positions.long()]
        _, logits = self._made.decoder.step(
            pages=self._pages,
            hidden=hidden,
            positions=positions,
            sequence=sequence,
            page_table=self._table,
            adapter=self._which[sequence.long()].contiguous(),
            adapters=self._adapters,
            wanted=(torch.tensor(counts).cumsum(0) - 1).to(torch.int32),
        )
        self._lengths = [n + count for n, count in zip(self._lengths, counts, strict=True)]
        return logits.clone()


def written(rows: Rows, prompts: Sequence[np.ndarray], steps: int) -> tuple[Tensor, list[np.ndarray]]:
    """Logits (steps + 1, sequences, V) of a prompt and likeliest tokens behind it, and the whole texts."""
    texts, new, found = [list(p) for p in prompts], list(prompts), []
    for _ in range(steps + 1):
        found.append(rows.step(new))
        new = [np.array([int(token)]) for token in found[-1].argmax(-1)]
        for text, token in zip(texts, new, strict=True):
            text.extend(token)
    return torch.stack(found), [np.array(text[:-1]) for text in texts]
