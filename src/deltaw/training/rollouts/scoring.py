"""What a run's reward functions give completions: by function, as one weighted number, and who was best and worst.

Knows prompts and completions; no model, and nothing of who wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb

import numpy as np

from deltaw.data.prompts import Prompt, last_asked
from deltaw.errors import UserError
from deltaw.runtime.generation import Drawn
from deltaw.task_settings import RewardSettings
from deltaw.training.evaluation.base import Interval, mean_interval
from deltaw.training.rewards import Scored
from deltaw.training.rewards.rewarder import Rewarder

# Characters of a prompt and of a completion that are kept to be looked at, and how many of the best and the worst.
SHOWN_TEXT, SHOWN = 600, 2
# The largest weighted reward: sums, squares and gradients of larger ones may not be finite.
_LARGEST = 1e12


@dataclass(frozen=True)
class Rewarded:
    """A completion with what it was given, for a person.

    Attributes:
        row: of its prompt. prompt: its last turn, as text. text: the completion. reward: the weighted sum.
        parts: the reward of each function, by name; empty where there is one.
    """

    row: int
    prompt: str
    text: str
    reward: float
    parts: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON, long texts cut: the end of a prompt and the beginning of a completion stay."""
        return asdict(self) | {"prompt": self.prompt[-SHOWN_TEXT:], "text": self.text[:SHOWN_TEXT]}


class Scorer:
    """Scores completions with the functions of ``reward.functions``, each in a worker process of its own, and with what
    an environment gave them.

    Attributes:
        names: one for each function and the environment, as metrics have them: ``reward`` and the function's own name.
        highest: the weighted reward of a completion to which each function gives 1, or of negative weight 0.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self._rewarders = [Rewarder(function) for function in settings.functions]
        weights, names = [function.weight for function in settings.functions], [f.name for f in settings.functions]
        if settings.environment is not None:  # its rewards count as they are
            weights, names = [*weights, 1.0], [*names, settings.environment]
        self._weights = np.array(weights)
        self.highest = float(np.maximum(self._weights, 0.0).sum())
        own = [name.rpartition(":")[2] for name in names]
        told = [name if own.count(name) == 1 else f"{name} {own[: n + 1].count(name)}" for n, name in enumerate(own)]
        self.names = [f"reward {name}" for name in told]

    def check(self, prompts: Sequence[Prompt], *, call: bool) -> None:
        """Check the functions against the rows before a model is loaded.

        Args:
            call: Also call each function with the answer of a row, or with its prompt if it has no answer.

        Raises:
            UserError: if a function cannot be used, or if it needs a column that no row has.
        """
        for rewarder in self._rewarders:
            rewarder.check(
                (_scored_text(prompt, prompt.answer or last_asked(prompt.columns)) for prompt in prompts), call=call
            )

    def __call__(self, prompts: Sequence[Prompt], drawn: Sequence[Drawn]) -> np.ndarray:
        """Return the unweighted rewards, fp64 (names, completions).

        Raises:
            UserError: if a function fails, or if a weighted reward is too large to compute with.
        """
        given = [_scored_text(prompt, one.text, one.ended) for prompt, one in zip(prompts, drawn, strict=True)]
        found = [rewarder(given) for rewarder in self._rewarders]
        if len(self.names) > len(found):
            found.append([one.reward for one in drawn])
        rewards = np.array(found, np.float64).reshape(len(self.names), -1)
        with np.errstate(over="ignore"):
            weighted = self._weights[:, None] * rewards
        if not (np.abs(weighted) <= _LARGEST).all():
            name, index = np.argwhere(~(np.abs(weighted) <= _LARGEST))[0]
            what = f"{self._weights[name]:g} × {rewards[name, index]:g}, weight × reward, is beyond ±{_LARGEST:g}"
            where = f"{self.names[name].replace('reward', 'reward function', 1)}, row {prompts[index].row}"
            raise UserError(what, where=where, hint="lower the weight, or return smaller rewards")
        return rewards

    def weighted(self, rewards: np.ndarray) -> np.ndarray:
        """fp64 (completions,): the functions' rewards with their weights."""
        return self._weights @ rewards

    def named(self, rewards: np.ndarray) -> dict[str, np.ndarray]:
        """The weighted reward and, where there are several functions, that of each: fp64 (completions,) by name."""
        several = zip(self.names, rewards, strict=True) if len(self.names) > 1 else ()
        return {"reward": self.weighted(rewards), **dict(several)}

    def each(self, prompts: Sequence[Prompt], drawn: Sequence[Drawn], rewards: np.ndarray) -> list[Rewarded]:
        """The completions as a person reads them."""
        totals, *parts = self.named(rewards).values()
        named = [dict(zip(self.names, map(float, column), strict=True)) for column in zip(*parts, strict=True)]
        of_each = zip(prompts, drawn, totals, named or [{}] * len(drawn), strict=True)
        return [Rewarded(p.row, last_asked(p.columns), one.text, float(total), told) for p, one, total, told in of_each]

    def extremes(self, prompts: Sequence[Prompt], drawn: Sequence[Drawn], rewards: np.ndarray) -> list[Rewarded]:
        """The best completions and the worst ones, the best first."""
        order = np.argsort(-self.weighted(rewards), kind="stable")
        places = order if len(order) <= 2 * SHOWN else np.concatenate([order[:SHOWN], order[-SHOWN:]])
        return self.each([prompts[n] for n in places], [drawn[n] for n in places], rewards[:, places])

    def close(self) -> None:
        for rewarder in self._rewarders:
            rewarder.close()


def _scored_text(prompt: Prompt, text: str, ended: bool = True) -> Scored:
    return Scored(last_asked(prompt.columns), text, prompt.answer, prompt.row, prompt.columns, ended)


def interval_of(values: np.ndarray) -> Interval | None:
    """The 95 % interval of the mean of (n,) values; of a share, where all of them are 0 or 1."""
    return mean_interval(values, share=bool(np.isin(values, (0.0, 1.0)).all()))


def pass_at(passed: np.ndarray, k: int) -> np.ndarray:
    """fp64 (prompts,): the probability that at least one of ``k`` completions of a prompt passes, without bias:
    1 − C(n − c, k) / C(n, k) with c of n completions that pass (arXiv 2107.03374, eq. 1).

    Args:
        passed: bool (prompts, n) with n ≥ k.
    """
    count = passed.shape[1]
    return np.array([1 - comb(count - int(right), k) / comb(count, k) for right in passed.sum(1)])
