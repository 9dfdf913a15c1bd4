"""From logits to tokens."""

from __future__ import annotations

import numpy as np

from deltaw.serving.request import Sampling
from deltaw.serving.sampling import SamplingState, choose


def test_likeliest_token_is_taken() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 97)).astype(np.float32)
    states = [SamplingState(Sampling(), np.array([1]), 97) for _ in range(5)]
    assert choose(logits, states).tokens.tolist() == logits.argmax(axis=1).tolist()
