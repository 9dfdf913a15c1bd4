"""From logits to tokens, for many requests at once, each with settings of its own.

A step gives logits (k, vocabulary) and the states of their k requests; :func:`choose` takes one token for
each. Rows that only want the likeliest token share one argmax. No row is sorted over the whole vocabulary,
and no row's choice depends on which rows stand beside it.

The order of what is done to a row's logits: what a constraint forbids is left out; repetition penalty;
presence and frequency penalty; logit bias; temperature; top-k; top-p over what top-k left; min-p. From top-k
on this is transformers' order and its semantics.

Log-probabilities are those of the model itself, before anything in that list, as the OpenAI API reports them.
A token that a constraint forbids may therefore be among the likeliest ones.

It knows neither models nor text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deltaw.errors import UserError
from deltaw.serving.request import Sampling, TokenLogprob

# A token's place in ``Choices`` where none can be chosen: the logits are not numbers, or nothing is allowed.
NONE = -1
MOST_LOGPROBS = 100
LEAST_LOGPROB = -9999.0  # of tokens that a model rules out, since JSON knows no infinity; as the OpenAI API
_LEAST_TEMPERATURE = 1e-30  # fp32 knows smaller numbers only as 0 or inexactly
_BLOCK = 256  # weights that are summed one after another
_PART = 64  # values of which one maximum is taken
_BIN_SHIFT = 20  # leaves of fp32 the exponent and three bits: eight bins for each power of two


@dataclass(frozen=True)
class Choices:
    """What was chosen in one step.

    Attributes:
        tokens: (k,) int64 token ids; ``NONE`` where there is none to choose.
        logprobs: for each row its token's log-probabilities, None where they were not asked for.
    """

    tokens: np.ndarray
    logprobs: tuple[TokenLogprob | None, ...]


def validate(sampling: Sampling, vocabulary: int) -> None:
    """Check the settings of a request.

    Raises:
        UserError: a value is out of range, not a number, or names a token that does not exist.
    """
    for name, (lowest, highest, hint) in _RANGES.items():
        value = getattr(sampling, name)
        # Written so that "not a number" is out of range too.
        if not lowest <= value <= highest or not math.isfinite(value):
            raise UserError(f"{name} is {value}", where=name, hint=hint)
    most = min(MOST_LOGPROBS, vocabulary)
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= most:
        hint = f"0 for the chosen token alone, at most {most}"
        raise UserError(f"logprobs is {sampling.logprobs}", where="logprobs", hint=hint)
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < vocabulary:
            hint = f"token ids are 0 to {vocabulary - 1}"
            raise UserError(f"there is no token {token}", where="logit_bias", hint=hint)
        if not -100 <= bias <= 100:
            raise UserError(f"the bias of token {token} is {bias}", where="logit_bias", hint="between -100 and 100")


_ABOVE_0 = math.ulp(0.0)
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0, 100, "0 for the likeliest token, or above 0 to draw; at most 100"),
    "top_k": (0, 2**31, "0 for all tokens, or a number of them"),
    "top_p": (_ABOVE_0, 1, "above 0, at most 1"),
    "min_p": (0, 1, "between 0 and 1"),
    "repetition_penalty": (_ABOVE_0, 100, "above 0, at most 100; 1 changes nothing"),
    "presence_penalty": (-2, 2, "between -2 and 2"),
    "frequency_penalty": (-2, 2, "between -2 and 2"),
    "seed": (-(2**63), 2**64 - 1, "a whole number of at most 64 bits"),
}


class SamplingState:
    """What the choice of a request's next token depends on, besides the logits.

    Args:
        prompt: (length,) token ids; those outside the vocabulary, a soft prompt's, are passed over.
        vocabulary: how many tokens there are.

    Attributes:
        greedy: whether the likeliest token is taken. plain: whether the logits count as they are.
        random: the request's own generator.
    """

    def __init__(self, sampling: Sampling, prompt: np.ndarray, vocabulary: int) -> None:
        self.sampling = sampling
        # Negative seeds are theirs modulo 2^64.
        self.random = np.random.Generator(np.random.PCG64(sampling.seed % 2**64))
        self._counts: dict[int, int] = {}
        self._seen = np.empty(0, dtype=np.int64)
        if sampling.repetition_penalty != 1:
            known = np.unique(np.asarray(prompt, dtype=np.int64))
            self._seen = known[(known >= 0) & (known < vocabulary)]
        self._penalized = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self.greedy = sampling.temperature == 0
        self.plain = not self._penalized and sampling.repetition_penalty == 1 and not sampling.logit_bias

    def append(self, token: int) -> None:
        """Note a token of the text."""
        if self._penalized:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self.sampling.repetition_penalty != 1 and token not in self._seen:
            self._seen = np.append(self._seen, token)

    def adjust(self, row: np.ndarray) -> None:
        """Apply penalties and bias to logits (vocabulary), in place."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            seen = row[self._seen]
            row[self._seen] = np.where(seen < 0, seen * sampling.repetition_penalty, seen / sampling.repetition_penalty)
        if self._counts:
            tokens = np.fromiter(self._counts.keys(), dtype=np.int64)
            times = np.fromiter(self._counts.values(), dtype=np.float32)
            row[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * times
        if sampling.logit_bias:
            row[list(sampling.logit_bias)] += np.fromiter(sampling.logit_bias.values(), dtype=np.float32)


def choose(
    logits: np.ndarray, states: Sequence[SamplingState], allowed: Mapping[int, np.ndarray] | None = None
) -> Choices:
    """Take a token for every row, and note it in the row's state.

    Args:
        logits: (k, vocabulary) fp32; they are not changed.
        states: of the k requests.
        allowed: by row, the tokens that a constraint allows: int32 words (ceil(vocabulary / 32)), the lowest
            bit of the first word for token 0. Rows that are not in it may take any token.
    """
    allowed = allowed or {}
    tokens = np.full(len(states), NONE, dtype=np.int64)
    fast = [n for n, state in enumerate(states) if state.greedy and state.plain and n not in allowed]
    if len(fast) == len(states):
        tokens = logits.argmax(axis=1)
    elif fast:
        tokens[fast] = logits[fast].argmax(axis=1)
    for n in fast:
        # An argmax over anything with a NaN in it finds the NaN.
        if math.isnan(logits[n, tokens[n]]):
            tokens[n] = NONE
    for n in sorted(set(range(len(states))) - set(fast)):
        tokens[n] = _chosen(logits[n], states[n], allowed.get(n))
    logprobs: list[TokenLogprob | None] = [None] * len(states)
    for n, state in enumerate(states):
        token = int(tokens[n])
        if token == NONE:
            continue
        state.append(token)
        if state.sampling.logprobs is not None:
            logprobs[n] = logprob(logits[n], token, state.sampling.logprobs)
    return Choices(tokens, tuple(logprobs))


def _chosen(logits: np.ndarray, state: SamplingState, words: np.ndarray | None) -> int:
    """The token of one row."""
    row = logits
    if words is not None or not state.plain:
        row = logits.copy()
    if words is not None:
        forbidden = np.unpackbits(words.view(np.uint8), bitorder="little", count=len(row)) == 0
        row[forbidden] = -np.inf
    if not state.plain:
        state.adjust(row)
    likeliest = int(row.argmax())
    top = float(row[likeliest])
    if not math.isfinite(top):
        return NONE
    if state.greedy:
        return likeliest
    ids, weights = candidates(row, state.sampling)
    place = _place(weights, float(state.random.random()))
    return place if ids is None else int(ids[place])


def candidates(row: np.ndarray, sampling: Sampling) -> tuple[np.ndarray | None, np.ndarray]:
    """The tokens that temperature, top-k, top-p and min-p leave, and how likely they are.

    Args:
        row: (vocabulary,) fp32 logits, penalties and bias applied; one of them is finite at least.

    Returns:
        Their ids, ascending, None for all; and their weights, fp32: probabilities up to a common factor.
    """
    top = row.max()
    ids: np.ndarray | None = None
    if 0 < sampling.top_k < len(row):
        ids = np.flatnonzero(row >= _nth_largest(row, sampling.top_k))
    elif sampling.min_p > 0 and sampling.top_p == 1:
        # A little less than the least logit that can stay: exactly, they are compared below.
        ids = np.flatnonzero(row >= top + sampling.temperature * math.log(0.99 * sampling.min_p))
    weights = row - top if ids is None else row[ids] - top
    with np.errstate(over="ignore", under="ignore"):
        weights /= np.float32(max(sampling.temperature, _LEAST_TEMPERATURE))
        np.exp(weights, out=weights)
    if sampling.top_p < 1:
        kept = nucleus(weights, sampling.top_p)
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    if sampling.min_p > 0:  # the likeliest token has weight 1
        kept = np.flatnonzero(weights >= np.float32(sampling.min_p))
        ids, weights = (kept if ids is None else ids[kept]), weights[kept]
    return ids, weights


def _nth_largest(values: np.ndarray, n: int) -> float:
    """The value that n - 1 others are at least as large as.

    The n-th largest of the maxima of parts is at most the n-th largest value, so only what reaches it is
    partitioned: a few times n values instead of a vocabulary.
    """
    parts = len(values) // _PART
    if n <= parts // 4:
        maxima = values[: parts * _PART].reshape(_PART, parts).max(axis=0)
        values = values[values >= np.partition(maxima, parts - n)[parts - n]]
    return float(np.partition(values, len(values) - n)[len(values) - n])


def _place(weights: np.ndarray, share: float) -> int:
    """Where the running sum of the weights passes a share of it, in [0, 1): inverse transform sampling.

    Sums of blocks come first: summing one after another over a whole vocabulary is slow, as each addition
    waits for the one before.
    """
    starts = np.arange(0, len(weights), _BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    wanted = share * blocks[-1]
    block = min(int(np.searchsorted(blocks, wanted, side="right")), len(blocks) - 1)
    within = np.cumsum(weights[starts[block] : starts[block] + _BLOCK], dtype=np.float64)
    within += blocks[block - 1] if block else 0.0
    place = int(starts[block]) + int(np.searchsorted(within, wanted, side="right"))
    # Rounding may lead past the block's end, and must not lead to a token that has no weight.
    place = min(place, int(starts[block]) + len(within) - 1)
    while weights[place] == 0:
        place -= 1
    return place


def nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """The places of the fewest heaviest weights that together have the share ``top_p`` (arXiv 1904.09751),
    ascending; of equal weights the first ones.

    Weights so light that all of them, were they all that light, would fit into the rest are left out at once.
    A histogram over the others' exponents and first bits finds the few among which the border lies, and only
    those are sorted.

    Args:
        weights: fp32, at least 0, not all 0.
    """
    total = float(weights.sum(dtype=np.float64))
    wanted = top_p * total
    # A little less, so that rounding leaves nothing out.
    places = np.flatnonzero(weights >= 0.99 * (total - wanted) / len(weights))
    weights = weights[places]
    bins = (weights.view(np.uint32) >> _BIN_SHIFT).astype(np.intp)
    above = np.cumsum(np.bincount(bins, weights)[::-1])
    edge = min(int(np.searchsorted(above, wanted, side="left")), len(above) - int(bins.min()) - 1)
    inside = np.sort(weights[bins == len(above) - 1 - edge])[::-1]
    sums = np.cumsum(inside, dtype=np.float64)
    if edge:
        sums += above[edge - 1]
    # A weight stays if those above it do not have the share yet.
    most = min(int(np.searchsorted(sums, wanted, side="left")) + 1, len(inside))
    lightest = inside[most - 1]
    kept = weights > lightest
    kept[np.flatnonzero(weights == lightest)[: np.count_nonzero(inside[:most] == lightest)]] = True
    return places[kept]


def logprob(logits: np.ndarray, token: int, top: int = 0) -> TokenLogprob:
    """The log-probability of a token in the model's own distribution, and of the ``top`` likeliest ones,
    of which equal ones stand in the order of their ids."""
    highest = logits.max()
    shifted = logits - highest
    np.exp(shifted, out=shifted)
    whole = float(highest) + math.log(float(shifted.sum(dtype=np.float64)))
    likeliest = np.empty(0, dtype=np.int64)
    if top:
        likeliest = np.flatnonzero(logits >= _nth_largest(logits, min(top, len(logits))))
        likeliest = likeliest[np.argsort(-logits[likeliest], kind="stable")][:top]

    def value(one: int) -> float:
        return max(float(logits[one]) - whole, LEAST_LOGPROB)

    return TokenLogprob(token, value(token), tuple((one, value(one)) for one in likeliest.tolist()))
