"""Which learning rates are tried, and which is taken."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.errors import UserError
from deltaw.experiments.entry import best_rate, grid, next_rate, parse_rates


def searched(loss, planned, *, extend=True):
    """All rates that are tried where ``loss`` says how each goes."""
    losses: dict[float, float] = {}
    while (rate := next_rate(planned, losses, extend=extend)) is not None:
        losses[rate] = loss(rate)
    return losses


def test_a_best_in_the_middle_of_the_grid_is_taken_without_more_trials():
    assert grid(2e-4) == [6.7e-5, 2e-4, 6e-4]
    losses = searched(lambda rate: abs(math.log(rate / 2e-4)), grid(2e-4))
    assert sorted(losses) == grid(2e-4) and best_rate(losses) == 2e-4


@pytest.mark.parametrize(("better", "beyond"), [(1, 2.2e-5), (-1, 1.8e-3)])
def test_a_best_at_an_end_brings_one_more_step_and_no_second_but_none_to_rates_that_were_named(better, beyond):
    losses = searched(lambda rate: better * rate, grid(2e-4))
    assert set(losses) - set(grid(2e-4)) == {beyond} and best_rate(losses) == beyond
    assert sorted(searched(lambda rate: better * rate, [1e-4, 3e-4], extend=False)) == [1e-4, 3e-4]


def test_what_diverges_is_not_tried_higher_up_and_is_never_best():
    losses = searched(lambda rate: math.inf if rate > 1e-4 else -rate, grid(2e-4))
    assert best_rate(losses) == 6.7e-5
    assert 6e-4 not in losses and min(losses) == 2.2e-5
    assert best_rate(searched(lambda rate: math.inf, grid(2e-4))) is None


@given(st.floats(1e-7, 1.0), st.lists(st.floats(0.1, 9.0) | st.just(math.inf), min_size=4, max_size=4))
def test_a_search_ends_after_four_rates_with_the_least_loss(usual, drawn):
    answers = iter(drawn)
    losses = searched(lambda rate: next(answers), grid(usual))
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    best = best_rate(losses)
    assert len(losses) <= 4
    assert (best is None) == (not finite) and (best is None or losses[best] == min(finite))


def test_rates_are_read_by_method():
    assert parse_rates(["lora=1e-4, 3e-4", "head=0.01"], ["lora", "head"]) == {"lora": [1e-4, 3e-4], "head": [0.01]}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("lora", "METHOD=RATE"),
        ("lora=", "METHOD=RATE"),
        ("lra=1e-4", "'lora'"),
        ("lora=fast", "'fast'"),
        ("lora=1e-4,-1", "'-1'"),
        ("lora=nan", "'nan'"),
    ],
)
def test_rates_that_cannot_be_read_are_refused(text, word):
    with pytest.raises(UserError, match=word):
        parse_rates([text], ["lora", "head"])
