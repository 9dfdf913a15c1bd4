"""Turns become as few examples as their contexts allow."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deltaw.data.templates import fewest


def test_turns_that_are_prefixes_share_the_last_ones_example() -> None:
    assert fewest([[1, 2], [1, 2, 3], [1, 2, 3, 4]]) == [[0, 1, 2]]


def test_a_turn_in_another_context_is_an_example_of_its_own() -> None:
    assert fewest([[1, 9], [1, 2, 3], [1, 2, 3, 4]]) == [[0], [1, 2]]
    assert fewest([[1, 9], [1, 8], [1, 7]]) == [[0], [1], [2]]


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=6))
def test_every_turn_is_in_one_example_of_which_it_is_a_prefix(turns: list[list[int]]) -> None:
    groups = fewest(turns)
    assert sorted(turn for group in groups for turn in group) == list(range(len(turns)))
    for group in groups:
        assert group == sorted(group)
        assert all(turns[group[-1]][: len(turns[turn])] == turns[turn] for turn in group)
    # Two examples whose last turns could share one would be one too many.
    lasts = [turns[group[-1]] for group in groups]
    for n, last in enumerate(lasts):
        assert not any(later[: len(last)] == last for later in lasts[n + 1 :])
