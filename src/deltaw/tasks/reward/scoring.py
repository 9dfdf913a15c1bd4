"""Scores of completions: rewards by function, their weighted sum, and the best and worst completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import TypeAlias

import numpy as np

from deltaw.data.prompts import TokenizedPrompt, last_prompt_text
from deltaw.decoding.generation import SampledCompletion
from deltaw.errors import UserError
from deltaw.tasks.reward.rewards.functions import Completion
from deltaw.tasks.reward.rewards.rewarder import Rewarder
from deltaw.tasks.reward.settings import RewardSettings
from deltaw.training.evaluation.base import Interval, mean_interval

# Maximum number of characters of a logged text, and number of best and of worst completions to log.
MAX_TEXT_LENGTH = 600
NUM_EXTREMES = 2
# Maximum weighted reward. Sums, squares and gradients of larger rewards might overflow.
_MAX_REWARD = 1e12

Prompts: TypeAlias = Sequence[TokenizedPrompt]
Completions: TypeAlias = Sequence[SampledCompletion]


@dataclass(frozen=True)
class ScoredCompletion:
    """A completion with its rewards.

    Attributes:
        row: Number of the prompt's row.
        prompt: Text of the prompt's last turn.
        text: Text of the completion.
        reward: Weighted sum of rewards.
        parts: Reward of each function by name. Empty for a single function.
    """

    row: int
    prompt: str
    text: str
    reward: float
    parts: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        """Return values for JSON, with the start of a long prompt and the end of a long completion truncated."""
        return asdict(self) | {"prompt": self.prompt[-MAX_TEXT_LENGTH:], "text": self.text[:MAX_TEXT_LENGTH]}


class Scorer:
    """Scores completions with the functions of ``reward.functions``, in worker processes, and with rewards of an
    environment.

    Attributes:
        names: Metric name of each function and of the environment: ``reward`` and the function's name.
        highest: Weighted reward of a completion if each function returns its best value: 1, or 0 for negative weights.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self._rewarders = [Rewarder(function) for function in settings.functions]
        weights = [function.weight for function in settings.functions]
        names = [f.name for f in settings.functions]
        if settings.environment is not None:  # rewards of an environment have weight 1
            weights = [*weights, 1.0]
            names = [*names, settings.environment]
        self._weights = np.array(weights)
        self.highest = float(np.maximum(self._weights, 0.0).sum())
        short_names = [name.rpartition(":")[2] for name in names]
        counts = [(short_names.count(name), short_names[: n + 1].count(name)) for n, name in enumerate(short_names)]
        pairs = zip(short_names, counts, strict=True)
        self.names = [f"reward {name}" if total == 1 else f"reward {name} {number}" for name, (total, number) in pairs]

    def check(self, prompts: Prompts, *, call: bool) -> None:
        """Check the functions against the rows before a model is loaded.

        Args:
            call: True to also call each function with the answer of a row, or with its prompt if it has no answer.

        Raises:
            UserError: if a function fails, or needs a column that no row has.
        """
        for rewarder in self._rewarders:
            rewarder.check((_completion(p, p.answer or last_prompt_text(p.columns)) for p in prompts), call=call)

    def __call__(self, prompts: Prompts, completions: Completions) -> np.ndarray:
        """Return the unweighted rewards, fp64 (names, completions).

        Raises:
            UserError: if a function fails, or a weighted reward is too large.
        """
        pairs = zip(prompts, completions, strict=True)
        inputs = [_completion(prompt, c.text, c.ended) for prompt, c in pairs]
        results = [rewarder(inputs) for rewarder in self._rewarders]
        if len(self.names) > len(results):
            results.append([completion.reward for completion in completions])
        rewards = np.array(results, np.float64).reshape(len(self.names), -1)
        with np.errstate(over="ignore"):
            weighted = self._weights[:, None] * rewards
        if not (np.abs(weighted) <= _MAX_REWARD).all():
            name, index = np.argwhere(~(np.abs(weighted) <= _MAX_REWARD))[0]
            message = f"{self._weights[name]:g} × {rewards[name, index]:g} (weight × reward) exceeds ±{_MAX_REWARD:g}"
            location = f"{self.names[name].replace('reward', 'reward function', 1)}, row {prompts[index].row}"
            raise UserError(message, location=location, hint="lower the weight, or return smaller rewards")
        return rewards

    def total(self, rewards: np.ndarray) -> np.ndarray:
        """Return the weighted sums of rewards, fp64 (completions,)."""
        return (self._weights[:, None] * rewards).sum(0)  # a matrix product may round equal columns differently

    def by_name(self, rewards: np.ndarray) -> dict[str, np.ndarray]:
        """Return fp64 (completions,) arrays by name: the weighted reward, and each function's reward if there are
        several.
        """
        function_rewards = zip(self.names, rewards, strict=True) if len(self.names) > 1 else ()
        return {"reward": self.total(rewards), **dict(function_rewards)}

    def describe(self, prompts: Prompts, completions: Completions, rewards: np.ndarray) -> list[ScoredCompletion]:
        """Return the completions with texts and rewards."""
        totals, *parts = self.by_name(rewards).values()
        rewards_by_name = [dict(zip(self.names, map(float, c), strict=True)) for c in zip(*parts, strict=True)]
        items = zip(prompts, completions, totals, rewards_by_name or [{}] * len(completions), strict=True)
        return [ScoredCompletion(p.row, last_prompt_text(p.columns), c.text, float(t), r) for p, c, t, r in items]

    def extremes(self, prompts: Prompts, completions: Completions, rewards: np.ndarray) -> list[ScoredCompletion]:
        """Return the best and the worst completions, best first."""
        order = np.argsort(-self.total(rewards), kind="stable")
        ends = np.concatenate([order[:NUM_EXTREMES], order[-NUM_EXTREMES:]])
        indices = order if len(order) <= 2 * NUM_EXTREMES else ends
        return self.describe([prompts[n] for n in indices], [completions[n] for n in indices], rewards[:, indices])

    def close(self) -> None:
        for rewarder in self._rewarders:
            rewarder.close()


def _completion(prompt: TokenizedPrompt, text: str, ended: bool = True) -> Completion:
    return Completion(last_prompt_text(prompt.columns), text, prompt.answer, prompt.row, prompt.columns, ended)


def interval_of(values: np.ndarray) -> Interval | None:
    """Return the 95% interval of the mean of (n,) values, treated as a share if all values are 0 or 1."""
    return mean_interval(values, share=bool(np.isin(values, (0.0, 1.0)).all()))


def pass_at(passed: np.ndarray, k: int) -> np.ndarray:
    """Return fp64 (prompts,): unbiased estimates of the probability that at least one of ``k`` completions passes.

    1 − C(n − c, k) / C(n, k) for c passing completions of n (arXiv 2107.03374, eq. 1).

    Args:
        passed: bool (prompts, n) with n ≥ k.
    """
    count = passed.shape[1]
    return np.array([1 - comb(count - int(num_passed), k) / comb(count, k) for num_passed in passed.sum(1)])
