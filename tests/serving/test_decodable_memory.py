"""Tests of the memory that verifying a decoder needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltaw.decoding import decodable as module
from deltaw.decoding.probes import Prober
from tests.byte_models import tiny_llama
from tests.peak_memory import peak_tensor_bytes

VOCABULARY = 60_000


def test_verification_computes_only_requested_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    entry = Prober.entry

    def recorded(self: Prober, max_positions: int, rotary: Any) -> Any:
        probe = entry(self, max_positions, rotary)
        counts.append(probe.limit)
        return probe

    monkeypatch.setattr(Prober, "entry", recorded)
    model = tiny_llama(max_position_embeddings=100_000).requires_grad_(False)
    module.build_decodable(model, positions=64)
    assert counts == [64, 64]


def test_logit_comparison_needs_memory_of_two_copies() -> None:
    model = tiny_llama(vocab_size=VOCABULARY).requires_grad_(False)
    decoder = module.build_decodable(model, positions=64)
    with module.eval_mode(model):
        peak = peak_tensor_bytes(lambda: module.logit_difference(decoder, model))
    assert peak < 2.3 * module.SAMPLE * VOCABULARY * 4


def test_logit_difference_is_relative_norm() -> None:
    model, other = (tiny_llama(seed).requires_grad_(False) for seed in (0, 1))
    decoder = module.build_decodable(other, positions=64)
    tokens = torch.arange(module.SAMPLE)
    with module.eval_mode(model), module.eval_mode(other):
        expected, decoded = (network(input_ids=tokens[None]).logits[0] for network in (model, other))
        difference = module.logit_difference(decoder, model, tokens=tokens)
    assert difference == pytest.approx(float((decoded - expected).norm() / expected.norm()), rel=1e-3)
