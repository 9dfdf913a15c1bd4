"""Sample tokens on the device of the logits, and copy them to the host in blocks.

Temperature, top-k, top-p, min-p and random numbers are those of :mod:`deltaw.decoding.sampling`. The same seed selects
the same token, unless the logits or sums differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from deltaw.decoding.sampling import NO_TOKEN, SamplingState
from deltaw.kernels.layout import to_device
from deltaw.kernels.operators import widest_dtype

# Number of tokens per row that are generated on a GPU before the host checks which rows have ended.
STEPS_PER_SYNC = 16


class DeviceSampler:
    """Samples tokens of a batch of requests without penalties, biases and constraints.

    The host synchronizes with the device once per ``steps_per_sync`` tokens of a row.

    Args:
        states: States of the requests.
        steps: Maximum number of steps.
        device: Device of the logits.
        receive: Called with tokens and log-probabilities, (steps, rows) each. Returns True to stop. Tokens are
            ``NO_TOKEN`` if the logits are not finite.
        steps_per_sync: Number of steps between synchronizations.
    """

    def __init__(
        self,
        states: Sequence[SamplingState],
        steps: int,
        device: torch.device,
        receive: Callable[[np.ndarray, np.ndarray], bool],
        steps_per_sync: int = STEPS_PER_SYNC,
    ) -> None:
        self._receive = receive
        self._steps_per_sync = steps_per_sync
        self._block = list[Tensor]()
        parameters = [(s.temperature, s.top_k, s.top_p, s.min_p) for s in (state.sampling for state in states)]
        table = np.hstack([np.array(parameters), [state.random.random(steps) for state in states]])
        self._is_greedy = not table[:, 0].any()
        self._needs_sort = bool(table[:, 1].any() or table[:, 2].min() < 1)
        self._wide = widest_dtype(device)
        columns = to_device(torch.from_numpy(table).to(self._wide), device)[:, :, None].unbind(1)
        self._temperature, self._top_k, self._top_p, self._min_p, *self._uniform = columns

    def __call__(self, logits: Tensor) -> Tensor | None:
        """Return the next tokens (rows,) for fp32 logits (rows, vocabulary), or None to stop."""
        best = logits.max(-1)
        uniform = self._uniform.pop(0)
        tokens = best.indices
        if not self._is_greedy:
            tokens = self._sample(logits - best.values[:, None], uniform).where(self._temperature[:, 0] > 0, tokens)
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        reported_tokens = tokens.where(best.values.isfinite(), NO_TOKEN)
        self._block.append(torch.stack((reported_tokens.to(self._wide), logprobs.to(self._wide))))
        if len(self._block) == self._steps_per_sync or not self._uniform:
            block = torch.stack(self._block, 1).numpy(force=True)
            self._block = []
            if self._receive(block[0].astype(np.int64), block[1]):
                return None
        return tokens

    def _sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Sample tokens (rows,) by inverse transform sampling, from logits with a maximum of 0."""
        weights = (logits / self._temperature.float().clamp(min=1e-30)).exp()
        if self._needs_sort:
            ordered, order = weights.sort(dim=-1, descending=True, stable=True)
            count = self._top_k.where(self._top_k > 0, ordered.shape[-1]).clamp(max=ordered.shape[-1]).long()
            ordered = ordered.where(ordered >= ordered.gather(-1, count - 1), 0)
            sums = ordered.cumsum(-1, dtype=self._wide)
            in_nucleus = (sums - ordered < self._top_p * sums[:, -1:]) | (self._top_p == 1)
            weights = torch.zeros_like(weights).scatter(-1, order, ordered.where(in_nucleus, 0))
        sums = weights.where(weights >= self._min_p.float(), 0).cumsum(-1, dtype=self._wide)
        # Rounding may move the threshold beyond the last token with a weight.
        return torch.minimum((sums <= uniform * sums[:, -1:]).sum(-1), (sums < sums[:, -1:]).sum(-1))
