"""Long sequences of rows behave like lists."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deltaw.data.example import ConcatSequence, IndexedSequence, concat_rows, lengths_of, select_rows, used_tokens


class StoredRows(tuple):
    """Rows that are not a list, with known lengths."""

    @property
    def lengths(self):
        return np.array([len(row) for row in self])


PARTS = st.lists(st.lists(st.text("ab", max_size=3), max_size=5), min_size=1, max_size=4)


@given(PARTS, st.slices(12))
def test_concatenated_sequences_behave_like_one(parts, cut):
    flat = [row for part in parts for row in part]
    joined = concat_rows(*map(StoredRows, parts))
    assert list(joined) == flat and len(joined) == len(flat)
    assert [joined[n] for n in range(-len(flat), len(flat))] == flat + flat and list(joined[cut]) == flat[cut]
    assert lengths_of(joined).tolist() == [len(row) for row in flat] and concat_rows(*parts) == flat


def test_selected_rows_are_a_list_or_a_view():
    rows = ["a", "bb", "ccc"]
    indices = np.array([2, 0, 2])
    assert select_rows(rows, indices) == ["ccc", "a", "ccc"]
    view = select_rows(StoredRows(rows), indices)
    assert isinstance(view, IndexedSequence) and list(view) == ["ccc", "a", "ccc"]
    assert lengths_of(view).tolist() == [3, 1, 3] and list(view[1:]) == ["a", "ccc"]


def test_digest_depends_on_part_boundaries():
    class Digested(StoredRows):
        def digest(self):
            return repr(tuple(self)).encode()

    first = [Digested("ab"), Digested("c")]
    second = [Digested("a"), Digested("bc")]
    assert ConcatSequence(first).digest() != ConcatSequence(second).digest()


def test_rows_without_tokens_have_no_used_tokens():
    assert len(used_tokens(["a", "b"])) == 0


def test_used_tokens_of_groups_include_all_rows():
    rows = [SimpleNamespace(tokens=np.array(tokens)) for tokens in ([5, 3], [9], [3])]
    assert used_tokens([SimpleNamespace(rows=tuple(rows[:2])), rows[2]]).tolist() == [3, 5, 9]
