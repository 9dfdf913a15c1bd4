"""Batches: the prefix tree is compared with its rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.data.example import Example
from deltaw.data.packing import epoch_order, pack, packed_length, pad, split_into_microbatches
from deltaw.data.prefix_tree import MIN_SHARED_TOKENS


def example(tokens, labels=None, row=1):
    tokens = np.asarray(tokens, np.int32)
    if labels is None:
        labels = np.zeros(len(tokens), bool)
        labels[len(tokens) // 2 :] = True
        labels[0] = False
    return Example(row, tokens, np.asarray(labels, bool), 0, None)


@st.composite
def rows(draw):
    """Generate rows that often share a prefix, with few token ids."""
    sequences: list[list[int]] = []
    for _ in range(draw(st.integers(1, 8))):
        start: list[int] = []
        if sequences and draw(st.booleans()):
            earlier = draw(st.sampled_from(sequences))
            start = earlier[: draw(st.integers(0, len(earlier)))]
        tail = draw(st.lists(st.integers(0, 2), min_size=0 if len(start) > 1 else 2, max_size=12))
        sequences.append(start + tail)
    labels = [draw(st.lists(st.booleans(), min_size=len(r) - 1, max_size=len(r) - 1)) for r in sequences]
    return [example(r, [False, *after], row=i) for i, (r, after) in enumerate(zip(sequences, labels, strict=True))]


def visible_contexts(batch):
    """Return the visible tokens of each flat token, from the root to the token, according to the batch."""
    visible = batch.inputs["packed_layout"].visible()
    tokens = batch.inputs["input_ids"][0].numpy()
    positions = batch.inputs["position_ids"][0].numpy()
    assert (visible.sum(1) == positions + 1).all()
    return [tuple(tokens[visible[i]]) for i in range(len(tokens))]


@settings(max_examples=50, deadline=None)
@given(rows(), st.booleans())
def test_each_label_is_predicted_from_its_preceding_tokens(batch_rows, share):
    batch = pack(batch_rows, share=share)
    context = visible_contexts(batch)
    expected: dict = {}
    for row in batch_rows:
        for index in np.flatnonzero(row.is_label):
            key = (tuple(row.tokens[:index]), int(row.tokens[index]))
            expected[key] = expected.get(key, 0) + 1
    actual: dict = {}
    for predictor, target, weight in zip(batch.predictors, batch.targets, batch.weights, strict=True):
        key = (context[predictor], int(target))
        actual[key] = actual.get(key, 0) + float(weight)
    assert actual == expected and batch.tokens <= batch.row_tokens == sum(map(len, batch_rows))
    assert share or batch.tokens == batch.row_tokens
    assert batch.weights.sum() == sum(int(r.is_label.sum()) for r in batch_rows)


def test_shared_prefixes_are_stored_once_and_nested():
    stem = list(range(10, 20))
    middle = list(range(30, 36))
    batch = pack([example([*stem, 1, 2]), example([*stem, 3]), example([*stem, 1, 2, *range(30, 40)])])
    assert (batch.tokens, batch.row_tokens) == (10 + 2 + 1 + 10, 12 + 11 + 22)
    left = batch.members[0].indices
    right = batch.members[1].indices
    assert (left[:10] == right[:10]).all() and not set(left[10:]) & set(right[10:])
    batch = pack([example([*stem, *middle, 1, 2]), example([*stem, *middle, 3, 4]), example([*stem, 5, 6])])
    assert batch.tokens == 10 + 6 + 6 and max(batch.inputs["packed_layout"].offsets()) == 16
    # A short shared prefix is not worth a segment.
    assert MIN_SHARED_TOKENS > 1
    batch = pack([example([7, 1, 2]), example([7, 3, 4])])
    assert batch.inputs["packed_layout"].parents.tolist()[:2] == [-1, -1]
    # Equal rows count their labels twice.
    batch = pack([example([1, 2, 3, 4, 5, 6]), example([1, 2, 3, 4, 5, 6])])
    assert (batch.tokens, batch.weights.tolist()) == (6, [2.0, 2.0, 2.0])


@settings(max_examples=40, deadline=None)
@given(rows(), st.integers(1, 60), st.booleans(), st.booleans(), st.booleans())
def test_microbatches_contain_each_row_once_within_the_budget(rows, budget, share, fill, padded):
    parts = split_into_microbatches(rows, budget, share=share, padded=padded)
    assert sorted(r.row for p in parts for r in p) == sorted(r.row for r in rows)
    for part in parts:
        tokens = pad(part).tokens if padded else pack(part, share=share).tokens
        assert tokens <= budget or len(part) == 1
    for part in parts:
        packed = pack(part, share=share, fill=fill).inputs["input_ids"]
        assert packed.shape == (1, packed_length(part, share=share, fill=fill))


def test_padding_is_masked_by_length_if_its_id_is_a_label():
    batch = pad([example([5, 0, 0], [False, True, True]), example([5, 0], [False, True])])
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]] and batch.targets.tolist() == [0, 0, 0]
    assert batch.predictors.tolist() == [0, 1, 3]


def test_epoch_order_is_a_deterministic_permutation():
    first, again, later, other = (epoch_order(50, *of).tolist() for of in ((3, 7), (3, 7), (4, 7), (3, 8)))
    assert sorted(first) == list(range(50)) and first == again and first != later and first != other


@settings(max_examples=25, deadline=None)
@given(rows(), st.sampled_from(["shared", "flat", "padded"]))
def test_members_contain_the_token_indices_of_each_row(batch_rows, layout):
    batch = pad(batch_rows) if layout == "padded" else pack(batch_rows, share=layout == "shared")
    assert sorted(m.example.row for m in batch.members) == sorted(r.row for r in batch_rows)
    flat = batch.inputs["input_ids"].flatten().numpy()
    for member in batch.members:
        assert (flat[member.indices] == member.example.tokens).all()
        if layout != "padded":
            positions = batch.inputs["position_ids"][0].numpy()[member.indices]
            assert (positions == np.arange(len(member.example))).all()
