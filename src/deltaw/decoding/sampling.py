"""Sample the next tokens of a batch of requests, each with separate sampling parameters.

Logits are processed in this order: constraint mask, repetition penalty, presence and frequency penalties, logit bias,
temperature, top-k, top-p, min-p. From top-k on, order and semantics match transformers. Greedy rows share one argmax,
and no row sorts the entire vocabulary. The result of a row does not depend on the other rows of the batch.

Log-probabilities are those of the model before any processing, as in the OpenAI API. The most likely tokens may
therefore include tokens that a constraint forbids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deltaw.decoding.request import Sampling, TokenLogprob
from deltaw.errors import UserError

# Marks a row of ``Choices`` without a token, because its logits are not finite or the constraint allows no token.
NO_TOKEN = -1
MAX_LOGPROBS = 100
MIN_LOGPROB = -9999.0  # replaces -inf, which JSON cannot represent; same value as the OpenAI API
_MIN_TEMPERATURE = 1e-30  # smaller values are subnormal or zero in fp32
_BLOCK = 256  # weights per partial sum
_PART = 64  # values per partial maximum
_BIN_SHIFT = 20  # leaves the fp32 exponent and three mantissa bits: eight bins per power of two


@dataclass(frozen=True)
class Choices:
    """Tokens sampled in one step.

    Attributes:
        tokens: (k,) int64 token ids, or ``NO_TOKEN``.
        logprobs: Log-probabilities of each row's token, or None if they were not requested.
    """

    tokens: np.ndarray
    logprobs: tuple[TokenLogprob | None, ...]


def validate(sampling: Sampling, vocabulary: int) -> None:
    """Validate sampling parameters.

    Args:
        sampling: The parameters.
        vocabulary: Number of tokens.

    Raises:
        UserError: if a value is out of range or NaN, or a token does not exist.
    """
    for name, (lowest, highest, hint) in _RANGES.items():
        value = getattr(sampling, name)
        # This form of the comparison also rejects NaN.
        if not lowest <= value <= highest or not math.isfinite(value):
            raise UserError(f"{name} is {value}", location=name, hint=hint)
    max_logprobs = min(MAX_LOGPROBS, vocabulary)
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= max_logprobs:
        hint = f"use 0 for the chosen token only, or at most {max_logprobs}"
        raise UserError(f"logprobs is {sampling.logprobs}", location="logprobs", hint=hint)
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < vocabulary:
            hint = f"token ids are 0 to {vocabulary - 1}"
            raise UserError(f"there is no token {token}", location="logit_bias", hint=hint)
        if not -100 <= bias <= 100:
            raise UserError(f"the bias of token {token} is {bias}", location="logit_bias", hint="between -100 and 100")


_ABOVE_0 = math.ulp(0.0)
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0, 100, "0 for greedy decoding, or above 0 to sample; at most 100"),
    "top_k": (0, 2**31, "0 for all tokens, or the number of tokens to sample from"),
    "top_p": (_ABOVE_0, 1, "above 0, at most 1"),
    "min_p": (0, 1, "between 0 and 1"),
    "repetition_penalty": (_ABOVE_0, 100, "above 0, at most 100; 1 disables it"),
    "presence_penalty": (-2, 2, "between -2 and 2"),
    "frequency_penalty": (-2, 2, "between -2 and 2"),
    "seed": (-(2**63), 2**64 - 1, "an integer of at most 64 bits"),
}


class SamplingState:
    """Sampling state of one request.

    Args:
        sampling: Sampling parameters.
        prompt: (length,) token ids. Ids outside the vocabulary, such as virtual tokens, are ignored.
        vocabulary: Number of tokens.

    Attributes:
        greedy: True if the most likely token is chosen.
        plain: True if the logits are used without penalties and bias.
        random: Random number generator of the request.
    """

    def __init__(self, sampling: Sampling, prompt: np.ndarray, vocabulary: int) -> None:
        self.sampling = sampling
        # PCG64 takes no negative seeds.
        self.random = np.random.Generator(np.random.PCG64(sampling.seed % 2**64))
        self._counts: dict[int, int] = {}
        self._seen = np.empty(0, dtype=np.int64)
        if sampling.repetition_penalty != 1:
            tokens = np.unique(np.asarray(prompt, dtype=np.int64))
            self._seen = tokens[(tokens >= 0) & (tokens < vocabulary)]
        self._penalized = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self.greedy = sampling.temperature == 0
        self.plain = not self._penalized and sampling.repetition_penalty == 1 and not sampling.logit_bias

    def append(self, token: int) -> None:
        """Record a generated token."""
        if self._penalized:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self.sampling.repetition_penalty != 1 and token not in self._seen:
            self._seen = np.append(self._seen, token)

    def adjust(self, row: np.ndarray) -> None:
        """Apply penalties and bias to (vocabulary,) logits in place."""
        sampling = self.sampling
        penalty = self.sampling.repetition_penalty
        if penalty != 1:
            penalized = row[self._seen]
            row[self._seen] = np.where(penalized < 0, penalized * penalty, penalized / penalty)
        if self._counts:
            tokens = np.fromiter(self._counts.keys(), dtype=np.int64)
            counts = np.fromiter(self._counts.values(), dtype=np.float32)
            row[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if sampling.logit_bias:
            row[list(sampling.logit_bias)] += np.fromiter(sampling.logit_bias.values(), dtype=np.float32)


def choose(logits: np.ndarray, states: list[SamplingState], allowed: Mapping[int, np.ndarray] | None = None) -> Choices:
    """Sample a token for every row and record it in the row's state.

    Args:
        logits: (k, vocabulary) fp32 logits. They are not modified.
        states: States of the k requests.
        allowed: Allowed tokens by row, as int32 words (ceil(vocabulary / 32),). The lowest bit of the first word is
            token 0. Rows without an entry may choose any token.
    """
    allowed = allowed or {}
    tokens = np.full(len(states), NO_TOKEN, dtype=np.int64)
    fast = [row for row, state in enumerate(states) if state.greedy and state.plain and row not in allowed]
    if len(fast) == len(states):
        tokens = logits.argmax(axis=1)
    elif fast:
        tokens[fast] = logits[fast].argmax(axis=1)
    for row in fast:
        # argmax returns the index of a NaN if there is one.
        if math.isnan(logits[row, tokens[row]]):
            tokens[row] = NO_TOKEN
    for row in sorted(set(range(len(states))) - set(fast)):
        tokens[row] = _choose_row(logits[row], states[row], allowed.get(row))
    logprobs: list[TokenLogprob | None] = [None] * len(states)
    for row, state in enumerate(states):
        token = int(tokens[row])
        if token == NO_TOKEN:
            continue
        state.append(token)
        if state.sampling.logprobs is not None:
            logprobs[row] = logprob(logits[row], token, state.sampling.logprobs)
    return Choices(tokens, tuple(logprobs))


def _choose_row(logits: np.ndarray, state: SamplingState, words: np.ndarray | None) -> int:
    """Sample the token of one row."""
    row = logits
    if words is not None or not state.plain:
        row = logits.copy()
    if words is not None:
        row[np.unpackbits(words.view(np.uint8), bitorder="little", count=len(row)) == 0] = -np.inf
    if not state.plain:
        state.adjust(row)
    best = int(row.argmax())
    if not math.isfinite(float(row[best])):
        return NO_TOKEN
    if state.greedy:
        return best
    ids, weights = candidates(row, state.sampling)
    index = _sample_index(weights, float(state.random.random()))
    return index if ids is None else int(ids[index])


def candidates(row: np.ndarray, sampling: Sampling) -> tuple[np.ndarray | None, np.ndarray]:
    """Apply temperature, top-k, top-p and min-p to a row.

    Args:
        row: (vocabulary,) fp32 logits after penalties and bias. At least one is finite.
        sampling: Sampling parameters.

    Returns:
        Remaining token ids in ascending order (None for all), and their unnormalized fp32 probabilities.
    """
    top = row.max()
    ids: np.ndarray | None = None
    if 0 < sampling.top_k < len(row):
        ids = np.flatnonzero(row >= _nth_largest(row, sampling.top_k))
    elif sampling.min_p > 0 and sampling.top_p == 1:
        # Slightly below the exact threshold, which is applied to the weights below.
        ids = np.flatnonzero(row >= top + sampling.temperature * math.log(0.99 * sampling.min_p))
    weights = row - top if ids is None else row[ids] - top
    with np.errstate(over="ignore", under="ignore"):
        weights /= np.float32(max(sampling.temperature, _MIN_TEMPERATURE))
        np.exp(weights, out=weights)
    if sampling.top_p < 1:
        selected = nucleus(weights, sampling.top_p)
        ids = selected if ids is None else ids[selected]
        weights = weights[selected]
    if sampling.min_p > 0:  # the most likely token has weight 1
        selected = np.flatnonzero(weights >= np.float32(sampling.min_p))
        ids = selected if ids is None else ids[selected]
        weights = weights[selected]
    return ids, weights


def _nth_largest(values: np.ndarray, n: int) -> float:
    """Return the n-th largest value.

    The n-th largest of the maxima of parts is a lower bound, so only values above it are partitioned: a small multiple
    of n instead of the vocabulary.
    """
    parts = len(values) // _PART
    if n <= parts // 4:
        maxima = values[: parts * _PART].reshape(_PART, parts).max(axis=0)
        values = values[values >= np.partition(maxima, parts - n)[parts - n]]
    return float(np.partition(values, len(values) - n)[len(values) - n])


def _sample_index(weights: np.ndarray, fraction: float) -> int:
    """Return the index at which the cumulative sum of the weights exceeds ``fraction`` of their total.

    This is inverse transform sampling with ``fraction`` uniform in [0, 1). Block sums are searched first, because a
    cumulative sum over the vocabulary is a slow chain of dependent additions.
    """
    starts = np.arange(0, len(weights), _BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    threshold = fraction * blocks[-1]
    block = min(int(np.searchsorted(blocks, threshold, side="right")), len(blocks) - 1)
    cumulative = np.cumsum(weights[starts[block] : starts[block] + _BLOCK], dtype=np.float64)
    cumulative += blocks[block - 1] if block else 0.0
    index = int(starts[block]) + int(np.searchsorted(cumulative, threshold, side="right"))
    # Rounding may overshoot the end of the block, and must not select a token of weight zero.
    index = min(index, int(starts[block]) + len(cumulative) - 1)
    while weights[index] == 0:
        index -= 1
    return index


def nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Return the ascending indices of the smallest set of weights with a fraction ``top_p`` of their sum (arXiv
    1904.09751).

    Ties are broken by the lower index. Weights too small to matter even if all of them were that small are dropped
    first. A histogram over exponents and leading mantissa bits locates the threshold, and only its bin is sorted.

    Args:
        weights: fp32 weights, at least 0 and not all 0.
        top_p: Fraction of the sum.
    """
    total = float(weights.sum(dtype=np.float64))
    threshold = top_p * total
    # The factor 0.99 guards against rounding.
    indices = np.flatnonzero(weights >= 0.99 * (total - threshold) / len(weights))
    weights = weights[indices]
    bins = (weights.view(np.uint32) >> _BIN_SHIFT).astype(np.intp)
    above = np.cumsum(np.bincount(bins, weights)[::-1])
    edge = min(int(np.searchsorted(above, threshold, side="left")), len(above) - int(bins.min()) - 1)
    inside = np.sort(weights[bins == len(above) - 1 - edge])[::-1]
    sums = np.cumsum(inside, dtype=np.float64)
    if edge:
        sums += above[edge - 1]
    # A weight is selected if the larger weights do not reach the threshold.
    count = min(int(np.searchsorted(sums, threshold, side="left")) + 1, len(inside))
    min_weight = inside[count - 1]
    selected = weights > min_weight
    selected[np.flatnonzero(weights == min_weight)[: np.count_nonzero(inside[:count] == min_weight)]] = True
    return np.asarray(indices[selected])


def logprob(logits: np.ndarray, token: int, top: int = 0) -> TokenLogprob:
    """Return the log-probability of a token, and those of the ``top`` most likely tokens, ties in the order of their
    ids.
    """
    highest = logits.max()
    shifted = logits - highest
    np.exp(shifted, out=shifted)
    log_sum = float(highest) + math.log(float(shifted.sum(dtype=np.float64)))
    top_ids = np.empty(0, dtype=np.int64)
    if top:
        top_ids = np.flatnonzero(logits >= _nth_largest(logits, min(top, len(logits))))
        top_ids = top_ids[np.argsort(-logits[top_ids], kind="stable")][:top]

    def value(token_id: int) -> float:
        return max(float(logits[token_id]) - log_sum, MIN_LOGPROB)

    return TokenLogprob(token, value(token), tuple((token_id, value(token_id)) for token_id in top_ids.tolist()))
