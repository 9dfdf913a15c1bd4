"""Memory of verifying a decoder against its model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltaw.memory.measure import peak_tensor_bytes
from deltaw.serving import decodable as module
from deltaw.serving.probes import Prober
from tests.byte_models import tiny_llama

VOCABULARY = 60_000


def test_verification_computes_no_more_positions_than_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    entry = Prober.entry

    def recorded(self: Prober, most: int, rotary: Any) -> Any:
        found = entry(self, most, rotary)
        counts.append(found.limit)
        return found

    monkeypatch.setattr(Prober, "entry", recorded)
    model = tiny_llama(max_position_embeddings=100_000).requires_grad_(False)
    module.decodable(model, positions=64)
    assert counts == [64, 64]


def test_comparing_logits_needs_two_copies_of_them_and_not_five() -> None:
    model = tiny_llama(vocab_size=VOCABULARY).requires_grad_(False)
    made = module.decodable(model, positions=64)
    with module.evaluating(model):
        peak = peak_tensor_bytes(lambda: module.difference(made, model))
    assert peak < 2.3 * module.SAMPLE * VOCABULARY * 4


def test_difference_is_the_ratio_of_norms_over_all_tokens() -> None:
    model, other = (tiny_llama(seed).requires_grad_(False) for seed in (0, 1))
    made = module.decodable(other, positions=64)
    tokens = torch.arange(module.SAMPLE)
    with module.evaluating(model), module.evaluating(other):
        own, theirs = (one(input_ids=tokens[None]).logits[0] for one in (model, other))
        found = module.difference(made, model, tokens=tokens)
    assert found == pytest.approx(float((theirs - own).norm() / own.norm()), rel=1e-3)
