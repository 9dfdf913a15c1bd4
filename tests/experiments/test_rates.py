"""Search of the learning rate: rates to try and the best rate."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.errors import UserError
from deltaw.experiments.entry import best_rate, next_rate, parse_rates, rate_grid


def search_rates(loss, planned, *, extend=True):
    """Return the losses of all rates that the search tries."""
    losses: dict[float, float] = {}
    while (rate := next_rate(planned, losses, extend=extend)) is not None:
        losses[rate] = loss(rate)
    return losses


def test_best_rate_inside_grid_needs_no_further_trial():
    assert rate_grid(2e-4) == [6.7e-5, 2e-4, 6e-4]
    losses = search_rates(lambda rate: abs(math.log(rate / 2e-4)), rate_grid(2e-4))
    assert sorted(losses) == rate_grid(2e-4) and best_rate(losses) == 2e-4


@pytest.mark.parametrize(("better", "beyond"), [(1, 2.2e-5), (-1, 1.8e-3)])
def test_best_rate_at_edge_extends_grid_once(better, beyond):
    losses = search_rates(lambda rate: better * rate, rate_grid(2e-4))
    assert set(losses) - set(rate_grid(2e-4)) == {beyond} and best_rate(losses) == beyond
    assert sorted(search_rates(lambda rate: better * rate, [1e-4, 3e-4], extend=False)) == [1e-4, 3e-4]


def test_diverged_rate_is_never_best_and_bounds_search():
    losses = search_rates(lambda rate: math.inf if rate > 1e-4 else -rate, rate_grid(2e-4))
    assert best_rate(losses) == 6.7e-5
    assert 6e-4 not in losses and min(losses) == 2.2e-5
    assert best_rate(search_rates(lambda rate: math.inf, rate_grid(2e-4))) is None


@given(st.floats(1e-7, 1.0), st.lists(st.floats(0.1, 9.0) | st.just(math.inf), min_size=4, max_size=4))
def test_search_tries_at_most_four_rates(usual, loss_values):
    answers = iter(loss_values)
    losses = search_rates(lambda rate: next(answers), rate_grid(usual))
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    best = best_rate(losses)
    assert len(losses) <= 4
    assert (best is None) == (not finite) and (best is None or losses[best] == min(finite))


def test_rates_are_parsed_by_method():
    assert parse_rates(["lora=1e-4, 3e-4", "head=0.01"], ["lora", "head"]) == {"lora": [1e-4, 3e-4], "head": [0.01]}


INVALID_RATES = [("lora", "METHOD=RATE"), ("lora=", "METHOD=RATE"), ("lra=1e-4", "'lora'"), ("lora=fast", "'fast'")]
INVALID_RATES += [("lora=1e-4,-1", "'-1'"), ("lora=nan", "'nan'")]


@pytest.mark.parametrize(("text", "word"), INVALID_RATES)
def test_invalid_rates_are_rejected(text, word):
    with pytest.raises(UserError, match=word):
        parse_rates([text], ["lora", "head"])
