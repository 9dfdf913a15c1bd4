"""Batches of labeled rows: masked padding, minimum-cost splits, and images within the token budget."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaw.data.example import LabeledExample
from deltaw.data.packing import Padding, cut_by_length
from deltaw.training.batchers import PADDING_MULTIPLE, LabelMicroBatcher


def row(length: int, label: int | float = 0, segments: list[int] | None = None) -> LabeledExample:
    tokens = np.arange(1, length + 1, dtype=np.int32)
    return LabeledExample(1, tokens, label, None if segments is None else np.array(segments, np.int8))


@given(st.lists(st.integers(1, 80), min_size=1, max_size=30), st.integers(1, 200))
def test_each_row_occurs_once_with_a_mask_of_its_length(lengths, budget):
    rows = [row(length, i) for i, length in enumerate(lengths)]
    batches = list(LabelMicroBatcher(budget, padding=Padding(1, PADDING_MULTIPLE, 80)).batches(rows))
    assert sorted(t for b in batches for t in b.targets.tolist()) == list(range(len(rows)))
    for batch in batches:
        ids = batch.inputs["input_ids"]
        mask = batch.inputs["attention_mask"]
        assert ids.shape[1] % PADDING_MULTIPLE == 0 and batch.tokens == ids.numel()
        assert batch.rows == 1 or batch.tokens <= budget
        for index, example in enumerate(batch.examples):
            assert ids[index, : len(example)].tolist() == example.tokens.tolist()
            assert mask[index].sum() == len(example) and mask[index, : len(example)].all()
    assert sum(b.row_tokens for b in batches) == sum(lengths)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 60), st.integers(0, 20))
def test_split_has_minimum_cost(lengths, budget, pass_cost):
    lengths = sorted(lengths)

    def cost(cuts):
        total = 0
        for start, stop in itertools.pairwise((0, *cuts, len(lengths))):
            area = (stop - start) * lengths[stop - 1]
            if area > budget and stop - start > 1:
                return float("inf")
            total += area + pass_cost
        return total

    ranges = cut_by_length(lengths, budget, pass_cost)
    inner = range(1, len(lengths))
    candidates = (c for n in range(len(lengths)) for c in itertools.combinations(inner, n))
    assert cost([start for start, _ in ranges[1:]]) == min(map(cost, candidates))
    assert ranges[0][0] == 0 and ranges[-1][1] == len(lengths)


def test_padding_respects_max_positions_and_class_targets_are_integers():
    (batch,) = LabelMicroBatcher(100, padding=Padding(0, PADDING_MULTIPLE, 10)).batches([row(9), row(10)])
    assert batch.inputs["input_ids"].shape == (2, 10)
    for label, dtype in ((2, torch.int64), (2.5, torch.float32)):
        (batch,) = LabelMicroBatcher(100).batches([row(3, label)])
        assert batch.targets.dtype == dtype


def test_segments_align_to_the_end_of_the_row():
    batcher = LabelMicroBatcher(100, segments=True)
    (batch,) = batcher.batches([row(6, segments=[0, 1, 1]), row(4, segments=[0, 0, 1, 1])])
    assert batch.inputs["token_type_ids"][:, :6].tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    (without,) = LabelMicroBatcher(100).batches([row(3, segments=[0, 1, 1])])
    assert "token_type_ids" not in without.inputs
