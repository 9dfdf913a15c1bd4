"""From logits to tokens: transformers' own processors and closed forms say what is right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deltaw.errors import UserError
from deltaw.serving.request import Sampling
from deltaw.serving.sampling import LEAST_LOGPROB, NONE, SamplingState, candidates, choose, logprob, nucleus, validate

V = 997
PROMPT = np.array([5, 9, 9, 700])


def some_logits(rows: int, seed: int = 0, vocabulary: int = V, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, vocabulary)) * scale).astype(np.float32)


def state(vocabulary: int = V, prompt: np.ndarray = PROMPT, **settings: object) -> SamplingState:
    return SamplingState(Sampling(**settings), prompt, vocabulary)


def written(logits: np.ndarray, count: int, one: SamplingState) -> list[int]:
    """The tokens of a text that is drawn from the same logits (1, V) again and again."""
    return [int(choose(logits, [one]).tokens[0]) for _ in range(count)]


def words(*tokens: int) -> np.ndarray:
    bits = np.zeros((V + 31) // 32 * 32, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def probabilities(row: np.ndarray, **settings: object) -> np.ndarray:
    """What the row's token is drawn by, over the whole vocabulary."""
    ids, weights = candidates(row, Sampling(**settings))
    whole = np.zeros(len(row))
    whole[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return whole


# In the order in which transformers' ``generate`` applies them.
WARPERS = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
WARPERS |= {"min_p": MinPLogitsWarper}
MANY = [(0.7, None, None, None), (1.0, 1, None, None), (1.3, 40, None, None), (1.0, 400, None, None)]
MANY += [(1.0, None, 0.9, None), (4.0, None, 0.999, None), (1.0, None, 1e-6, None), (1.0, None, None, 0.05)]
MANY += [(0.5, None, None, 1.0), (0.8, 60, 0.8, None), (2.0, 300, 0.97, 0.02), (1.5, None, 0.95, 0.01)]


@pytest.mark.parametrize("values", MANY, ids=str)
def test_tokens_are_drawn_by_the_probabilities_that_transformers_has(values):
    settings = {name: value for name, value in zip(WARPERS, values, strict=True) if value is not None}
    warpers = LogitsProcessorList([WARPERS[name](value) for name, value in settings.items()])
    for seed in range(5):
        row = some_logits(1, seed)[0]
        scores = warpers(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(row.astype(np.float64))[None])
        expected, ours = scores.softmax(-1)[0].numpy(), probabilities(row, **settings)
        assert np.array_equal(ours > 0, expected > 0)
        np.testing.assert_allclose(ours, expected, rtol=1e-4)


def pearson(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic of counts against probabilities, over its 99.9th percentile by the cube-root
    approximation of Wilson and Hilferty: below 1 where the counts fit."""
    inside = expected > 0
    wanted = counts.sum() * expected[inside]
    statistic = float(((counts[inside] - wanted) ** 2 / wanted).sum())
    freedom = int(inside.sum()) - 1
    spread = 2 / (9 * freedom)
    return statistic / (freedom * (1 - spread + 3.09 * math.sqrt(spread)) ** 3)


def test_as_many_tokens_are_drawn_as_their_probabilities_say():
    row = some_logits(1, 3, vocabulary=700, scale=1.5)[0]
    chosen = {"temperature": 0.9, "top_k": 30, "top_p": 0.9}
    counts = np.bincount(written(row[None], 5000, state(700, seed=11, **chosen)), minlength=700)
    expected = probabilities(row, **chosen)
    assert counts[expected == 0].sum() == 0
    assert pearson(counts, expected) < 1
    # It would notice another distribution: the same tokens at temperature 1.
    other = np.where(expected > 0, probabilities(row, temperature=1.0), 0)
    assert pearson(counts, other / other.sum()) > 1


def test_every_place_of_a_large_vocabulary_is_drawn_by_its_weight():
    """Blocks of weights are summed apart; the borders between them must not show."""
    row = np.full(1000, -np.inf, dtype=np.float32)
    places = [0, 1, 255, 256, 257, 511, 512, 999]
    row[places] = np.log(np.arange(1, 9))
    counts = np.bincount(written(row[None], 3000, state(1000, seed=5, temperature=1.0)), minlength=1000)
    assert counts.sum() == counts[places].sum()
    assert pearson(counts, probabilities(row, temperature=1.0)) < 1


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-6, 0.1, 0.25, 0.3, 0.5, 1.0]), min_size=1, max_size=60),
    top_p=st.floats(1e-6, 1.0, exclude_max=True),
)
@settings(deadline=None, max_examples=120)
@example(np.exp(np.random.default_rng(0).normal(size=50_000)), 0.9)
def test_nucleus_is_the_fewest_heaviest_tokens_that_have_the_share(weights, top_p):
    given_weights = np.array([*weights, 1.0], dtype=np.float32)
    kept = nucleus(given_weights, top_p)
    order = np.argsort(-given_weights, kind="stable")
    sums = np.cumsum(given_weights[order], dtype=np.float64)
    share, tolerance = top_p * given_weights.sum(dtype=np.float64), 1e-12 * sums[-1]
    assert sorted(order[: len(kept)].tolist()) == kept.tolist()
    assert sums[len(kept) - 1] >= share - tolerance
    assert len(kept) == 1 or sums[len(kept) - 2] < share + tolerance


def test_repetition_penalty_is_that_of_transformers_on_prompt_and_text():
    logits = some_logits(1)
    # A soft prompt's ids are passed over.
    tokens = written(logits, 6, state(prompt=np.append(PROMPT, V + 3), repetition_penalty=1.3))
    processor = RepetitionPenaltyLogitsProcessor(1.3)
    for count, token in enumerate(tokens):
        seen = torch.tensor([[*PROMPT.tolist(), *tokens[:count]]])
        assert token == int(processor(seen, torch.from_numpy(logits.copy())).argmax())
    assert len(set(tokens)) > 1  # without the penalty the same token would come each time


def test_presence_and_frequency_are_taken_from_the_logits_of_the_text_alone():
    logits = np.array([[3.0, 2.4, 1.9, -9, -9, -9]], dtype=np.float32)
    one = state(6, prompt=np.array([0, 0, 0]), presence_penalty=0.5, frequency_penalty=0.25)
    # 0 at 3.0 (the prompt does not count), then at 2.25, so 1 at 2.4, then 0 again at 2.25, 0 at 2.0 over
    # 2 at 1.9, and 2.
    assert written(logits, 5, one) == [0, 1, 0, 0, 2]
    two = state(2, presence_penalty=-1.0)  # which encourages
    two.append(0)
    assert written(np.array([[1.0, 1.1]], dtype=np.float32), 1, two) == [0]


def test_logit_bias_is_added_and_can_forbid():
    logits = some_logits(1)
    best, second = np.argsort(-logits[0])[:2].tolist()
    for bias, chosen in ({best: -100}, second), ({17: 100}, 17):
        assert written(logits, 1, state(logit_bias=bias)) == [chosen]


def test_text_depends_neither_on_the_rows_beside_it_nor_on_its_place():
    kinds: list[dict[str, object]] = [
        {},
        {"temperature": 1.0, "seed": 4},
        {"temperature": 0.8, "top_k": 30, "seed": 5},
        {"temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.2, "seed": -6},
        {"temperature": 1.0, "min_p": 0.1, "frequency_penalty": 0.5, "seed": 2**64 - 1},
    ]
    steps = [some_logits(len(kinds), step) for step in range(12)]

    def texts(*rows: int) -> list[list[int]]:
        """What these rows write beside one another."""
        states = [state(**kinds[n]) for n in rows]
        chosen = [choose(np.ascontiguousarray(logits[list(rows)]), states).tokens.tolist() for logits in steps]
        return [list(text) for text in zip(*chosen, strict=True)]

    order = (3, 0, 4, 2, 1)
    assert texts(*order) == [texts(n)[0] for n in order]
    assert texts(0) == [[int(logits[0].argmax()) for logits in steps]]


def test_seed_decides_the_text_and_tiny_temperatures_draw_the_likeliest_token():
    logits = some_logits(1, scale=0.5)
    for temperature in (1e-3, 1e-30, 5e-324):
        assert written(some_logits(1), 1, state(temperature=temperature)) == [some_logits(1).argmax()]
    one, again, other = (written(logits, 8, state(temperature=1.0, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other


def test_only_allowed_tokens_are_chosen():
    logits, allowed = some_logits(3), (3, 40, 996)
    states = [state(), state(temperature=5.0), state()]
    for _ in range(20):
        tokens = choose(logits, states, {0: words(*allowed), 1: words(*allowed)}).tokens
        assert tokens[0] == max(allowed, key=lambda token: logits[0, token])
        assert tokens[1] in allowed and tokens[2] == logits[2].argmax()


def test_rows_without_a_choice_say_so_and_the_others_go_on():
    logits = some_logits(4)
    logits[[0, 1], [5, 6]] = np.nan
    before = logits.copy()
    tokens = choose(logits, [state(), state(temperature=1.0, top_p=0.5), state(), state()], {2: words()}).tokens
    assert tokens.tolist() == [NONE, NONE, NONE, int(logits[3].argmax())]
    np.testing.assert_array_equal(logits, before)


def test_log_probabilities_are_the_models_own():
    logits = some_logits(2)
    expected = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    before = logits.copy()
    choices = choose(logits, [state(temperature=2.0, top_k=3, logprobs=4, repetition_penalty=1.5), state(logprobs=0)])
    np.testing.assert_array_equal(logits, before)
    for found, row, token, count in zip(choices.logprobs, expected, choices.tokens, (4, 0), strict=True):
        best = np.argsort(-row)[:count].tolist()
        assert found.token == token and [other for other, _ in found.top] == best
        own = [row[token], *row[best]]
        assert [found.logprob, *(value for _, value in found.top)] == pytest.approx(own, abs=1e-5)
    assert choose(logits, [state(), state()]).logprobs == (None, None)


def test_equally_likely_tokens_come_in_order_and_those_ruled_out_have_a_finite_log_probability():
    logits = np.full(40, -np.inf, dtype=np.float32)
    logits[[3, 9]] = 1.0
    found, half = logprob(logits, 3, 4), math.log(0.5)
    assert found.logprob == pytest.approx(half)
    assert found.top[2:] == ((0, LEAST_LOGPROB), (1, LEAST_LOGPROB))
    assert found.top[:2] == ((3, pytest.approx(half)), (9, pytest.approx(half)))
    for chosen in ({"top_k": 10}, {"top_p": 0.9}, {"min_p": 0.1}, {}):
        assert set(written(logits[None], 30, state(40, temperature=1.0, **chosen))) == {3, 9}


WRONG: dict[str, list[object]] = {"temperature": [-0.1, math.nan, math.inf], "top_k": [-1], "top_p": [0.0, 1.1]}
WRONG |= {"min_p": [-0.5, 2.0], "repetition_penalty": [0.0, math.nan], "presence_penalty": [2.5], "seed": [2**70]}
WRONG |= {"frequency_penalty": [-3.0], "logprobs": [-1, 1000]}
WRONG |= {"logit_bias": [{V: 1.0}, {-1: 1.0}, {3: 101.0}, {3: math.nan}]}


def test_values_out_of_range_are_refused_by_name_and_those_at_the_borders_taken():
    for name, value in [(name, value) for name, values in WRONG.items() for value in values]:
        with pytest.raises(UserError) as error:
            validate(Sampling(**{name: value}), V)
        assert error.value.where == name and error.value.hint
    validate(Sampling(), V)
    drawn = {"temperature": 2.0, "top_k": V + 5, "top_p": 1e-9, "min_p": 1.0, "seed": -1, "logprobs": 20}
    penalties = {"presence_penalty": -2.0, "frequency_penalty": 2.0, "logit_bias": {0: -100, V - 1: 100}}
    validate(Sampling(**drawn, **penalties), V)
