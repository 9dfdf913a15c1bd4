"""Tests of sampling tokens from logits, compared with transformers' processors and closed forms."""

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

from deltaw.decoding.request import Sampling
from deltaw.decoding.sampling import (
    MIN_LOGPROB,
    NO_TOKEN,
    SamplingState,
    candidates,
    choose,
    logprob,
    nucleus,
    validate,
)
from deltaw.errors import UserError

V = 997
PROMPT = np.array([5, 9, 9, 700])


def random_logits(rows: int, seed: int = 0, vocabulary: int = V, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, vocabulary)) * scale).astype(np.float32)


def state(vocabulary: int = V, prompt: np.ndarray = PROMPT, **settings: object) -> SamplingState:
    return SamplingState(Sampling(**settings), prompt, vocabulary)


def sample_tokens(logits: np.ndarray, count: int, sampling_state: SamplingState) -> list[int]:
    """Sample ``count`` tokens from the same logits (1, V)."""
    return [int(choose(logits, [sampling_state]).tokens[0]) for _ in range(count)]


def words(*tokens: int) -> np.ndarray:
    bits = np.zeros((V + 31) // 32 * 32, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def probabilities(row: np.ndarray, **settings: object) -> np.ndarray:
    """Return the sampling probabilities of a row over the full vocabulary."""
    ids, weights = candidates(row, Sampling(**settings))
    full = np.zeros(len(row))
    full[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return full


# In the order in which transformers' ``generate`` applies them.
WARPERS = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
WARPERS |= {"min_p": MinPLogitsWarper}
WARPER_VALUES = [(0.7, None, None, None), (1.0, 1, None, None), (1.3, 40, None, None), (1.0, 400, None, None)]
WARPER_VALUES += [(1.0, None, 0.9, None), (4.0, None, 0.999, None), (1.0, None, 1e-6, None), (1.0, None, None, 0.05)]
WARPER_VALUES += [(0.5, None, None, 1.0), (0.8, 60, 0.8, None), (2.0, 300, 0.97, 0.02), (1.5, None, 0.95, 0.01)]


@pytest.mark.parametrize("values", WARPER_VALUES, ids=str)
def test_sampling_probabilities_match_transformers(values):
    settings = {name: value for name, value in zip(WARPERS, values, strict=True) if value is not None}
    warpers = LogitsProcessorList([WARPERS[name](value) for name, value in settings.items()])
    for seed in range(5):
        row = random_logits(1, seed)[0]
        scores = warpers(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(row.astype(np.float64))[None])
        expected = scores.softmax(-1)[0].numpy()
        ours = probabilities(row, **settings)
        assert np.array_equal(ours > 0, expected > 0)
        np.testing.assert_allclose(ours, expected, rtol=1e-4)


def pearson(counts: np.ndarray, expected: np.ndarray) -> float:
    """Return Pearson's statistic divided by its 99.9th percentile, which is below 1 if the counts fit.

    The percentile uses the cube-root approximation of Wilson and Hilferty.
    """
    inside = expected > 0
    expected_counts = counts.sum() * expected[inside]
    statistic = float(((counts[inside] - expected_counts) ** 2 / expected_counts).sum())
    degrees = int(inside.sum()) - 1
    spread = 2 / (9 * degrees)
    return statistic / (degrees * (1 - spread + 3.09 * math.sqrt(spread)) ** 3)


def test_sampled_frequencies_match_probabilities():
    row = random_logits(1, 3, vocabulary=700, scale=1.5)[0]
    options = {"temperature": 0.9, "top_k": 30, "top_p": 0.9}
    counts = np.bincount(sample_tokens(row[None], 5000, state(700, seed=11, **options)), minlength=700)
    expected = probabilities(row, **options)
    assert counts[expected == 0].sum() == 0
    assert pearson(counts, expected) < 1
    # The test detects a different distribution: the same tokens at temperature 1.
    different = np.where(expected > 0, probabilities(row, temperature=1.0), 0)
    assert pearson(counts, different / different.sum()) > 1


def test_block_boundaries_are_sampled_by_weight():
    """Weights are summed in blocks, so positions at block boundaries are tested."""
    row = np.full(1000, -np.inf, dtype=np.float32)
    indices = [0, 1, 255, 256, 257, 511, 512, 999]
    row[indices] = np.log(np.arange(1, 9))
    counts = np.bincount(sample_tokens(row[None], 3000, state(1000, seed=5, temperature=1.0)), minlength=1000)
    assert counts.sum() == counts[indices].sum()
    assert pearson(counts, probabilities(row, temperature=1.0)) < 1


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-6, 0.1, 0.25, 0.3, 0.5, 1.0]), min_size=1, max_size=60),
    top_p=st.floats(1e-6, 1.0, exclude_max=True),
)
@settings(deadline=None, max_examples=120)
@example(np.exp(np.random.default_rng(0).normal(size=50_000)), 0.9)
def test_nucleus_is_smallest_set_reaching_top_p(weights, top_p):
    weight_array = np.array([*weights, 1.0], dtype=np.float32)
    selected = nucleus(weight_array, top_p)
    order = np.argsort(-weight_array, kind="stable")
    sums = np.cumsum(weight_array[order], dtype=np.float64)
    target = top_p * weight_array.sum(dtype=np.float64)
    tolerance = 1e-12 * sums[-1]
    assert sorted(order[: len(selected)].tolist()) == selected.tolist()
    assert sums[len(selected) - 1] >= target - tolerance
    assert len(selected) == 1 or sums[len(selected) - 2] < target + tolerance


def test_repetition_penalty_matches_transformers():
    logits = random_logits(1)
    # Ids of a soft prompt are ignored.
    tokens = sample_tokens(logits, 6, state(prompt=np.append(PROMPT, V + 3), repetition_penalty=1.3))
    processor = RepetitionPenaltyLogitsProcessor(1.3)
    for count, token in enumerate(tokens):
        context = torch.tensor([[*PROMPT.tolist(), *tokens[:count]]])
        assert token == int(processor(context, torch.from_numpy(logits.copy())).argmax())
    assert len(set(tokens)) > 1  # without the penalty all tokens would be equal


def test_presence_and_frequency_penalties_ignore_prompt():
    logits = np.array([[3.0, 2.4, 1.9, -9, -9, -9]], dtype=np.float32)
    penalized = state(6, prompt=np.array([0, 0, 0]), presence_penalty=0.5, frequency_penalty=0.25)
    # Token 0 wins at 3.0, because the prompt is not counted. It then has 2.25, so token 1 wins at 2.4. Token 0 wins
    # at 2.25 and at 2.0, and finally token 2 at 1.9.
    assert sample_tokens(logits, 5, penalized) == [0, 1, 0, 0, 2]
    favored = state(2, presence_penalty=-1.0)  # a negative penalty favors repetition
    favored.append(0)
    assert sample_tokens(np.array([[1.0, 1.1]], dtype=np.float32), 1, favored) == [0]


def test_logit_bias_is_added_and_can_exclude_tokens():
    logits = random_logits(1)
    best, second = np.argsort(-logits[0])[:2].tolist()
    for bias, chosen in ({best: -100}, second), ({17: 100}, 17):
        assert sample_tokens(logits, 1, state(logit_bias=bias)) == [chosen]


def test_samples_do_not_depend_on_batch_or_row_position():
    kinds: list[dict[str, object]] = [{}, {"temperature": 1.0, "seed": 4}, {"temperature": 0.8, "top_k": 30, "seed": 5}]
    kinds += [{"temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.2, "seed": -6}]
    kinds += [{"temperature": 1.0, "min_p": 0.1, "frequency_penalty": 0.5, "seed": 2**64 - 1}]
    steps = [random_logits(len(kinds), step) for step in range(12)]

    def texts(*rows: int) -> list[list[int]]:
        """Return the tokens of these rows in one batch."""
        states = [state(**kinds[n]) for n in rows]
        chosen = [choose(np.ascontiguousarray(logits[list(rows)]), states).tokens.tolist() for logits in steps]
        return [list(text) for text in zip(*chosen, strict=True)]

    order = (3, 0, 4, 2, 1)
    assert texts(*order) == [texts(n)[0] for n in order]
    assert texts(0) == [[int(logits[0].argmax()) for logits in steps]]


def test_seed_is_deterministic_and_tiny_temperature_is_greedy():
    logits = random_logits(1, scale=0.5)
    for temperature in (1e-3, 1e-30, 5e-324):
        assert sample_tokens(random_logits(1), 1, state(temperature=temperature)) == [random_logits(1).argmax()]
    first, repeated, other = (sample_tokens(logits, 8, state(temperature=1.0, seed=seed)) for seed in (1, 1, 2))
    assert first == repeated != other


def test_only_allowed_tokens_are_chosen():
    logits = random_logits(3)
    allowed = (3, 40, 996)
    states = [state(), state(temperature=5.0), state()]
    for _ in range(20):
        tokens = choose(logits, states, {0: words(*allowed), 1: words(*allowed)}).tokens
        assert tokens[0] == max(allowed, key=lambda token: logits[0, token])
        assert tokens[1] in allowed and tokens[2] == logits[2].argmax()


def test_rows_without_valid_token_return_no_token():
    logits = random_logits(4)
    logits[[0, 1], [5, 6]] = np.nan
    before = logits.copy()
    tokens = choose(logits, [state(), state(temperature=1.0, top_p=0.5), state(), state()], {2: words()}).tokens
    assert tokens.tolist() == [NO_TOKEN, NO_TOKEN, NO_TOKEN, int(logits[3].argmax())]
    np.testing.assert_array_equal(logits, before)


def test_logprobs_match_unmodified_logits():
    logits = random_logits(2)
    expected = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    before = logits.copy()
    choices = choose(logits, [state(temperature=2.0, top_k=3, logprobs=4, repetition_penalty=1.5), state(logprobs=0)])
    np.testing.assert_array_equal(logits, before)
    for entry, row, token, count in zip(choices.logprobs, expected, choices.tokens, (4, 0), strict=True):
        best = np.argsort(-row)[:count].tolist()
        assert entry.token == token and [other for other, _ in entry.top] == best
        reference = [row[token], *row[best]]
        assert [entry.logprob, *(value for _, value in entry.top)] == pytest.approx(reference, abs=1e-5)
    assert choose(logits, [state(), state()]).logprobs == (None, None)


def test_equal_logprobs_are_ordered_and_excluded_tokens_are_finite():
    logits = np.full(40, -np.inf, dtype=np.float32)
    logits[[3, 9]] = 1.0
    entry = logprob(logits, 3, 4)
    half = math.log(0.5)
    assert entry.logprob == pytest.approx(half)
    assert entry.top[2:] == ((0, MIN_LOGPROB), (1, MIN_LOGPROB))
    assert entry.top[:2] == ((3, pytest.approx(half)), (9, pytest.approx(half)))
    for chosen in ({"top_k": 10}, {"top_p": 0.9}, {"min_p": 0.1}, {}):
        assert set(sample_tokens(logits[None], 30, state(40, temperature=1.0, **chosen))) == {3, 9}


INVALID_VALUES: dict[str, list[object]] = {"temperature": [-0.1, math.nan, math.inf], "top_k": [-1]}
INVALID_VALUES |= {"top_p": [0.0, 1.1]}
INVALID_VALUES |= {
    "min_p": [-0.5, 2.0],
    "repetition_penalty": [0.0, math.nan],
    "presence_penalty": [2.5],
    "seed": [2**70],
}
INVALID_VALUES |= {"frequency_penalty": [-3.0], "logprobs": [-1, 1000]}
INVALID_VALUES |= {"logit_bias": [{V: 1.0}, {-1: 1.0}, {3: 101.0}, {3: math.nan}]}


def test_out_of_range_values_are_rejected_and_limits_accepted():
    for name, value in [(name, value) for name, values in INVALID_VALUES.items() for value in values]:
        with pytest.raises(UserError) as error:
            validate(Sampling(**{name: value}), V)
        assert error.value.location == name and error.value.hint
    validate(Sampling(), V)
    sampling = {"temperature": 2.0, "top_k": V + 5, "top_p": 1e-9, "min_p": 1.0, "seed": -1, "logprobs": 20}
    penalties = {"presence_penalty": -2.0, "frequency_penalty": 2.0, "logit_bias": {0: -100, V - 1: 100}}
    validate(Sampling(**sampling, **penalties), V)
