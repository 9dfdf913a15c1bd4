"""Run a decoder on rows that each have a separate adapter, or use only the base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.decoding.attached_adapter import Packer
from deltaw.decoding.bank import AdapterBank
from deltaw.decoding.decodable import Decodable


def random_prompts(count: int, vocabulary: int, *, seed: int = 0) -> list[np.ndarray]:
    """Return prompts of 3 to 9 tokens."""
    random = np.random.default_rng(seed)
    return [random.integers(3, vocabulary, random.integers(3, 10)) for _ in range(count)]


def make_bank(model: nn.Module, decoder: Decodable, *folders: Path) -> AdapterBank:
    """Return a bank with these adapters, named by their index."""
    bank = AdapterBank(model, None, Packer(model, decoder), budget_bytes=1 << 30)
    for number, folder in enumerate(folders):
        bank.add(str(number), folder)
    return bank


def packed_adapters(bank: AdapterBank) -> list:
    return [bank.acquire(name).packed for name in bank.names()]


def last_logits(model: nn.Module, text: np.ndarray, count: int = 1) -> Tensor:
    """Return the model's logits (count, V) at the last tokens of a text."""
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(np.asarray(text))[None]).logits[0, -count:]


class Rows:
    """Sequences in a decoder that grow by one token per step.

    Args:
        adapters: Packed adapters.
        which: Index into ``adapters`` for each sequence, or -1 for none.
        most: Maximum number of tokens per sequence.
    """

    def __init__(
        self, model: Decodable, adapters: Sequence, adapter_indices: Sequence[int], max_tokens: int = 64
    ) -> None:
        self._model = model
        self._adapters = list(adapters)
        self._adapter_indices = torch.tensor(adapter_indices, dtype=torch.int32)
        pages_per_sequence = -(-max_tokens // model.decoder.page_tokens)
        self._pages = model.decoder.new_pages(pages_per_sequence * len(adapter_indices), len(adapter_indices))
        pages = torch.arange(pages_per_sequence * len(adapter_indices), dtype=torch.int32)
        self._table = pages.view(len(adapter_indices), pages_per_sequence)
        self._lengths = [0] * len(adapter_indices)

    def step(self, tokens: Sequence[np.ndarray]) -> Tensor:
        """Append tokens to each sequence and return the logits (sequences, V) at the last token of each."""
        counts = [len(t) for t in tokens]
        ids = torch.as_tensor(np.concatenate(tokens))
        new_positions = [torch.arange(n, n + count) for n, count in zip(self._lengths, counts, strict=True)]
        positions = torch.cat(new_positions).to(torch.int32)
        sequence = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(torch.int32)
        input_layer = self._model.entry
        hidden = self._model.entry.rows(ids)
        if input_layer.positions is not None:
            hidden = hidden + input_layer.positions[positions.long()]
        _, logits = self._model.decoder.step(
            pages=self._pages,
            hidden=hidden,
            positions=positions,
            sequence=sequence,
            page_table=self._table,
            adapter=self._adapter_indices[sequence.long()].contiguous(),
            adapters=self._adapters,
            output_rows=(torch.tensor(counts).cumsum(0) - 1).to(torch.int32),
        )
        self._lengths = [n + count for n, count in zip(self._lengths, counts, strict=True)]
        return logits.clone()


def decode_greedily(rows: Rows, prompts: Sequence[np.ndarray], steps: int) -> tuple[Tensor, list[np.ndarray]]:
    """Decode greedily and return the logits (steps + 1, sequences, V) and the full texts."""
    texts = [list(p) for p in prompts]
    pending = list(prompts)
    logits = []
    for _ in range(steps + 1):
        logits.append(rows.step(pending))
        pending = [np.array([int(token)]) for token in logits[-1].argmax(-1)]
        for text, token in zip(texts, pending, strict=True):
            text.extend(token)
    return torch.stack(logits), [np.array(text[:-1]) for text in texts]
