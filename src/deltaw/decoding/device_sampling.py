"""Sample tokens on the device of the logits, without synchronization.

Temperature, top-k, top-p, min-p and random numbers are those of :mod:`deltaw.decoding.sampling`. The same seed selects
the same token, unless the logits or sums differ by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deltaw.decoding.sampling import NO_TOKEN, SamplingState


class DeviceSampler:
    """Samples tokens of a batch of requests without penalties, biases and constraints.

    Args:
        states: States of the requests. Their random numbers for all steps are drawn and copied to the device at once.
        steps: Number of steps.
        device: Device of the logits.
    """

    def __init__(self, states: Sequence[SamplingState], steps: int, device: torch.device) -> None:
        parameters = [state.sampling for state in states]
        self._sorts = any(sampling.top_k or sampling.top_p < 1 for sampling in parameters)
        self._greedy = all(state.greedy for state in states)
        columns = [[s.temperature, s.top_k, s.top_p, s.min_p] for s in parameters]
        uniform = [np.zeros(steps) if state.greedy else state.random.random(steps) for state in states]
        table = torch.from_numpy(np.hstack([np.array(columns, np.float64), np.stack(uniform)])).to(device)
        self._temperature, self._top_k, self._top_p, self._min_p = table[:, :4, None].unbind(1)
        self._uniform = table[:, 4:]

    def __call__(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return tokens (rows,), or ``NO_TOKEN`` if logits are not finite, and their log-probabilities (rows,).

        Args:
            logits: (rows, vocabulary) fp32 logits.
            step: Number of the step, from 0.
        """
        best = logits.max(-1)
        tokens = best.indices
        if not self._greedy:
            sampled = self._sample(logits - best.values[:, None], self._uniform[:, step, None])
            tokens = torch.where(self._temperature[:, 0] > 0, sampled, tokens)
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        return torch.where(best.values.isfinite(), tokens, NO_TOKEN), logprobs

    def _sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Sample tokens (rows,) by inverse transform sampling, from logits whose maximum is 0."""
        weights = (logits / self._temperature.float().clamp(min=1e-30)).exp()
        if self._sorts:
            ordered, order = weights.sort(dim=-1, descending=True, stable=True)
            count = torch.where(self._top_k > 0, self._top_k, ordered.shape[-1]).clamp(max=ordered.shape[-1])
            ordered = torch.where(ordered >= ordered.gather(-1, count.long() - 1), ordered, 0)
            sums = ordered.cumsum(-1, dtype=torch.float64)
            in_nucleus = (sums - ordered < self._top_p * sums[:, -1:]) | (self._top_p == 1)
            weights = torch.zeros_like(weights).scatter(-1, order, torch.where(in_nucleus, ordered, 0))
        sums = torch.where(weights >= self._min_p.float(), weights, 0).cumsum(-1, dtype=torch.float64)
        total = sums[:, -1:]
        # Rounding may move the threshold beyond the last token with a weight.
        index, last = (sums <= uniform * total).sum(-1), (sums < total).sum(-1)
        return torch.minimum(index, last)
