"""Rows of random tokens that the tests of methods train on."""

from __future__ import annotations

import numpy as np

from deltaw.data.example import Example


def random_rows(count: int = 6) -> list[Example]:
    """Rows of different lengths whose tokens from the fifth on are labels."""
    rng = np.random.default_rng(0)
    rows = []
    for row in range(count):
        tokens = rng.integers(3, 97, size=9 + row).astype(np.int32)
        is_label = np.zeros(len(tokens), bool)
        is_label[4:] = True
        rows.append(Example(row + 1, tokens, is_label, 4, "x"))
    return rows
