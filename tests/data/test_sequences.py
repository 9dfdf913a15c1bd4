"""Long sequences of rows behave as lists of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deltaw.data.sequences import Joined, Picked, joined, lengths_of, picked, used_tokens


class Stored(tuple):
    """Rows that are no list, with their lengths at hand."""

    @property
    def lengths(self):
        return np.array([len(row) for row in self])


PARTS = st.lists(st.lists(st.text("ab", max_size=3), max_size=5), min_size=1, max_size=4)


@given(PARTS, st.slices(12))
def test_joined_sequences_are_one(parts, cut):
    flat = [row for part in parts for row in part]
    whole = joined(*map(Stored, parts))
    assert list(whole) == flat and len(whole) == len(flat)
    assert [whole[n] for n in range(-len(flat), len(flat))] == flat + flat
    assert list(whole[cut]) == flat[cut]
    assert lengths_of(whole).tolist() == [len(row) for row in flat]
    assert joined(*parts) == flat


def test_picked_rows_are_a_list_of_a_list_and_else_a_view():
    rows = ["a", "bb", "ccc"]
    indices = np.array([2, 0, 2])
    assert picked(rows, indices) == ["ccc", "a", "ccc"]
    view = picked(Stored(rows), indices)
    assert isinstance(view, Picked) and list(view) == ["ccc", "a", "ccc"]
    assert lengths_of(view).tolist() == [3, 1, 3] and list(view[1:]) == ["a", "ccc"]


def test_a_digest_tells_parts_apart():
    class Known(Stored):
        def digest(self):
            return repr(tuple(self)).encode()

    assert Joined([Known("ab"), Known("c")]).digest() != Joined([Known("a"), Known("bc")]).digest()


def test_rows_without_tokens_have_none():
    assert len(used_tokens(["a", "b"])) == 0


def test_tokens_of_groups_are_those_of_their_rows():
    rows = [SimpleNamespace(tokens=np.array(tokens)) for tokens in ([5, 3], [9], [3])]
    assert used_tokens([SimpleNamespace(rows=tuple(rows[:2])), rows[2]]).tolist() == [3, 5, 9]
