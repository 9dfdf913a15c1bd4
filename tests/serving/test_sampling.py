"""From logits to tokens: transformers' own processors and closed forms say what is right."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
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


def words(tokens: list[int], vocabulary: int = V) -> np.ndarray:
    bits = np.zeros((vocabulary + 31) // 32 * 32, dtype=np.uint8)
    bits[tokens] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def probabilities(row: np.ndarray, **settings: object) -> np.ndarray:
    """What the row's token is drawn by, over the whole vocabulary."""
    ids, weights = candidates(row, Sampling(**settings))
    whole = np.zeros(len(row))
    whole[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return whole


def by_transformers(row: np.ndarray, **settings: float) -> np.ndarray:
    """The same by transformers' warpers, in the order in which its ``generate`` applies them."""
    made: list[tuple[str, Callable]] = [
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ]
    processors = LogitsProcessorList([make(settings[name]) for name, make in made if name in settings])
    scores = processors(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(row.astype(np.float64))[None])
    return scores.softmax(-1)[0].numpy()


def test_greedy_rows_take_the_likeliest_token() -> None:
    logits = some_logits(5)
    assert choose(logits, [state() for _ in range(5)]).tokens.tolist() == logits.argmax(axis=1).tolist()


MANY = [(0.7, None, None, None), (1.0, 1, None, None), (1.3, 40, None, None), (1.0, 400, None, None)]
MANY += [(1.0, None, 0.9, None), (4.0, None, 0.999, None), (1.0, None, 1e-6, None), (1.0, None, None, 0.05)]
MANY += [(0.5, None, None, 1.0), (0.8, 60, 0.8, None), (2.0, 300, 0.97, 0.02), (1.5, None, 0.95, 0.01)]


@pytest.mark.parametrize("values", MANY, ids=str)
def test_tokens_are_drawn_by_the_probabilities_that_transformers_has(values: tuple[float | None, ...]) -> None:
    names = ("temperature", "top_k", "top_p", "min_p")
    settings = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    for seed in range(5):
        row = some_logits(1, seed)[0]
        expected = by_transformers(row, **settings)
        ours = probabilities(row, **settings)
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


def test_as_many_tokens_are_drawn_as_their_probabilities_say() -> None:
    row = some_logits(1, 3, vocabulary=700, scale=1.5)[0]
    chosen = {"temperature": 0.9, "top_k": 30, "top_p": 0.9}
    one = state(700, seed=11, **chosen)
    counts = np.zeros(700)
    for _ in range(5_000):
        counts[choose(row[None], [one]).tokens[0]] += 1
    expected = probabilities(row, **chosen)
    assert counts[expected == 0].sum() == 0
    assert pearson(counts, expected) < 1
    # It would notice another distribution: the same tokens at temperature 1.
    other = np.where(expected > 0, probabilities(row, temperature=1.0), 0)
    assert pearson(counts, other / other.sum()) > 1


def test_every_place_of_a_large_vocabulary_is_drawn_by_its_weight() -> None:
    """Blocks of weights are summed apart; the borders between them must not show."""
    row = np.full(1000, -np.inf, dtype=np.float32)
    places = [0, 1, 255, 256, 257, 511, 512, 999]
    row[places] = np.log(np.arange(1, 9))
    one = state(1000, seed=5, temperature=1.0)
    counts = np.bincount([choose(row[None], [one]).tokens[0] for _ in range(3000)], minlength=1000)
    assert counts.sum() == counts[places].sum()
    assert pearson(counts, probabilities(row, temperature=1.0)) < 1


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-6, 0.1, 0.25, 0.3, 0.5, 1.0]), min_size=1, max_size=60),
    top_p=st.floats(1e-6, 1.0, exclude_max=True),
)
@settings(deadline=None, max_examples=120)
def test_nucleus_is_the_fewest_heaviest_tokens_that_have_the_share(weights: list[float], top_p: float) -> None:
    given_weights = np.array([*weights, 1.0], dtype=np.float32)
    kept = nucleus(given_weights, top_p)
    order = np.argsort(-given_weights, kind="stable")
    sums = np.cumsum(given_weights[order], dtype=np.float64)
    share = top_p * given_weights.sum(dtype=np.float64)
    tolerance = 1e-12 * sums[-1]
    assert sorted(order[: len(kept)].tolist()) == kept.tolist()
    assert sums[len(kept) - 1] >= share - tolerance
    assert len(kept) == 1 or sums[len(kept) - 2] < share + tolerance


def test_nucleus_of_a_flat_vocabulary_is_exact() -> None:
    weights = np.exp(np.random.default_rng(0).normal(size=50_000)).astype(np.float32)
    kept = nucleus(weights, 0.9)
    order = np.argsort(-weights, kind="stable")
    sums = np.cumsum(weights[order], dtype=np.float64)
    assert len(kept) == int(np.searchsorted(sums, 0.9 * sums[-1])) + 1
    assert np.array_equal(np.sort(order[: len(kept)]), kept)


def test_repetition_penalty_is_that_of_transformers_on_prompt_and_text() -> None:
    logits = some_logits(1)
    one = state(prompt=np.append(PROMPT, V + 3), repetition_penalty=1.3)  # a soft prompt's ids are passed over
    written = [int(choose(logits, [one]).tokens[0]) for _ in range(6)]
    processor = RepetitionPenaltyLogitsProcessor(1.3)
    seen = PROMPT.tolist()
    for token in written:
        scores = processor(torch.tensor([seen]), torch.from_numpy(logits.copy()))
        assert token == int(scores.argmax())
        seen.append(token)
    assert len(set(written)) > 1  # without the penalty the same token would come each time


def test_presence_and_frequency_are_taken_from_the_logits_of_the_text_alone() -> None:
    logits = np.zeros((1, 6), dtype=np.float32)
    logits[0] = [3.0, 2.4, 1.9, -9, -9, -9]
    one = state(6, prompt=np.array([0, 0, 0]), presence_penalty=0.5, frequency_penalty=0.25)
    # 0 at 3.0 (the prompt does not count), then at 2.25, so 1 at 2.4, then 0 again at 2.25, 0 at 2.0 over
    # 2 at 1.9, and 2.
    assert [int(choose(logits, [one]).tokens[0]) for _ in range(5)] == [0, 1, 0, 0, 2]
    two = state(2, presence_penalty=-1.0)  # which encourages
    two.append(0)
    assert choose(np.array([[1.0, 1.1]], dtype=np.float32), [two]).tokens[0] == 0


def test_logit_bias_is_added_and_can_forbid() -> None:
    logits = some_logits(1)
    best, second = np.argsort(-logits[0])[:2].tolist()
    assert choose(logits, [state(logit_bias={best: -100})]).tokens[0] == second
    assert choose(logits, [state(logit_bias={17: 100})]).tokens[0] == 17


def test_text_depends_neither_on_the_rows_beside_it_nor_on_its_place() -> None:
    kinds = [
        {},
        {"temperature": 1.0, "seed": 4},
        {"temperature": 0.8, "top_k": 30, "seed": 5},
        {"temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.2, "seed": -6},
        {"temperature": 1.0, "min_p": 0.1, "frequency_penalty": 0.5, "seed": 2**64 - 1},
    ]
    steps = [some_logits(len(kinds), step) for step in range(12)]
    alone = []
    for n, kind in enumerate(kinds):
        one = state(**kind)
        alone.append([int(choose(logits[n : n + 1], [one]).tokens[0]) for logits in steps])
    order = [3, 0, 4, 2, 1]
    states = [state(**kinds[n]) for n in order]
    together = [choose(np.ascontiguousarray(logits[order]), states).tokens for logits in steps]
    for place, n in enumerate(order):
        assert [int(tokens[place]) for tokens in together] == alone[n]


def test_seed_decides_the_text() -> None:
    logits = some_logits(1, scale=0.5)

    def drawn(seed: int) -> list[int]:
        one = state(temperature=1.0, seed=seed)
        return [int(choose(logits, [one]).tokens[0]) for _ in range(8)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_only_allowed_tokens_are_chosen() -> None:
    logits = some_logits(3)
    allowed = [3, 40, 996]
    states = [state(), state(temperature=5.0), state()]
    for _ in range(20):
        tokens = choose(logits, states, {0: words(allowed), 1: words(allowed)}).tokens
        assert tokens[0] == max(allowed, key=lambda token: logits[0, token])
        assert tokens[1] in allowed
        assert tokens[2] == logits[2].argmax()


def test_rows_without_a_choice_say_so_and_the_others_go_on() -> None:
    logits = some_logits(4)
    logits[0, 5] = np.nan
    logits[1, 6] = np.nan
    before = logits.copy()
    tokens = choose(logits, [state(), state(temperature=1.0, top_p=0.5), state(), state()], {2: words([])}).tokens
    assert tokens.tolist() == [NONE, NONE, NONE, int(logits[3].argmax())]
    np.testing.assert_array_equal(logits, before)


def test_log_probabilities_are_the_models_own() -> None:
    logits = some_logits(2)
    expected = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    states = [state(temperature=2.0, top_k=3, logprobs=4, repetition_penalty=1.5), state(logprobs=0)]
    before = logits.copy()
    choices = choose(logits, states)
    np.testing.assert_array_equal(logits, before)
    for n, count in ((0, 4), (1, 0)):
        found = choices.logprobs[n]
        assert found is not None
        assert found.token == choices.tokens[n]
        assert found.logprob == pytest.approx(expected[n, found.token], abs=1e-5)
        assert [token for token, _ in found.top] == np.argsort(-expected[n])[:count].tolist()
        assert [value for _, value in found.top] == pytest.approx(sorted(expected[n], reverse=True)[:count], abs=1e-5)
    assert choose(logits, [state(), state()]).logprobs == (None, None)


def test_equally_likely_tokens_are_told_in_the_order_of_their_ids() -> None:
    found = logprob(np.zeros(500, dtype=np.float32), 3, 3)
    assert found.logprob == pytest.approx(-math.log(500))
    assert [token for token, _ in found.top] == [0, 1, 2]


def test_tokens_that_the_model_rules_out_have_a_finite_log_probability() -> None:
    logits = np.full(40, -np.inf, dtype=np.float32)
    logits[[3, 9]] = 1.0
    found = logprob(logits, 3, 4)
    assert found.logprob == pytest.approx(math.log(0.5))
    assert [token for token, _ in found.top] == [3, 9, 0, 1]
    assert [value for _, value in found.top[2:]] == [LEAST_LOGPROB] * 2
    for chosen in ({"top_k": 10}, {"top_p": 0.9}, {"min_p": 0.1}, {}):
        one = state(40, temperature=1.0, **chosen)
        assert {int(choose(logits[None], [one]).tokens[0]) for _ in range(30)} == {3, 9}


def test_tiny_temperatures_draw_the_likeliest_token() -> None:
    logits = some_logits(1)
    for temperature in (1e-3, 1e-30, 5e-324):
        assert choose(logits, [state(temperature=temperature)]).tokens[0] == logits[0].argmax()


def test_values_out_of_range_are_refused_by_name() -> None:
    wrong: dict[str, list[object]] = {
        "temperature": [-0.1, math.nan, math.inf],
        "top_k": [-1],
        "top_p": [0.0, 1.1],
        "min_p": [-0.5, 2.0],
        "repetition_penalty": [0.0, math.nan],
        "presence_penalty": [2.5],
        "frequency_penalty": [-3.0],
        "seed": [2**70],
        "logprobs": [-1, 1000],
        "logit_bias": [{V: 1.0}, {-1: 1.0}, {3: 101.0}, {3: math.nan}],
    }
    for name, value in [(name, value) for name, values in wrong.items() for value in values]:
        with pytest.raises(UserError) as error:
            validate(Sampling(**{name: value}), V)
        assert error.value.where == name and error.value.hint


def test_values_at_the_borders_are_taken() -> None:
    validate(Sampling(), V)
    drawn = {"temperature": 2.0, "top_k": V + 5, "top_p": 1e-9, "min_p": 1.0, "seed": -1, "logprobs": 20}
    penalties = {"presence_penalty": -2.0, "frequency_penalty": 2.0, "logit_bias": {0: -100, V - 1: 100}}
    validate(Sampling(**drawn, **penalties), V)
