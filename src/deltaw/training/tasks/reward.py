"""The task ``reward``: write answers to prompts, and make those likelier that are rewarded."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.example import Example
from deltaw.data.prompts import PromptReader
from deltaw.data.row_reader import Reader
from deltaw.data.settings import DataSettings
from deltaw.data.templates import Encoder
from deltaw.runtime.generation import Drawing, Sampler
from deltaw.task_settings import RewardSettings
from deltaw.training.callbacks import Say
from deltaw.training.evaluation.base import Evaluation, mean_interval
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.rollouts.environments import Environments
from deltaw.training.rollouts.feed import RolloutFeed
from deltaw.training.rollouts.losses import PolicyLoss
from deltaw.training.rollouts.scoring import Scorer, interval_of, pass_at
from deltaw.training.rollouts.turns import OneTurn, Turns, turns_of
from deltaw.training.tasks.base import Batched, Classes, ModelFiles, RateFactor, Rows, RunData, Written
from deltaw.training.tasks.causal import Answer, CausalTask, Score
from deltaw.training.tasks.causal_objective import CausalObjective
from deltaw.working import working

# Of sums of weighted rewards.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Asked:
    """What an evaluation writes, and what counts as right.

    Attributes:
        samples: completions of each prompt that are drawn beside the greedy one.
        temperature, max_new_tokens: of the completions; None as in training.
        threshold: the weighted reward from which on a completion passes; None for the highest that functions of at
            most 1 give.
    """

    samples: int = 0
    temperature: float | None = None
    threshold: float | None = None
    max_new_tokens: int | None = None


GREEDY = Asked()


@dataclass(frozen=True)
class RewardedAnswer(Answer):
    """A greedy completion with its weighted reward, and whether it passes."""

    reward: float
    passed: bool

    @property
    def exact(self) -> bool:
        return self.passed

    @property
    def shown(self) -> str:
        return f"{self.reward:.2f}  {self.written}"


class RewardTask(CausalTask):
    """Learn from rewards of the model's own completions.

    Args:
        settings: the ``reward:`` section.

    Attributes:
        encoder: of the rows that were read last; None before.
    """

    name = "reward"
    rolls_out = True
    checks_generation = True
    shares_evaluation = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Say, settings: RewardSettings) -> None:
        super().__init__(tokenizer, say)
        self.settings = settings
        self.encoder: Encoder | None = None

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> RewardTask:
        task = cls(files.tokenizer(), files.say, files.section or RewardSettings())
        task.folder = files.folder
        return task

    @classmethod
    def rate_factor(cls, section: RewardSettings | None) -> RateFactor:
        """Return 0.1: TRL's defaults are 1e-6 for GRPO and 2e-5 for SFT; tinker-cookbook's LoRA rates differ by 7."""
        return RateFactor(0.1, "defaults of TRL and tinker-cookbook")

    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        reader = PromptReader(settings, self.tokenizer, say=self._say)
        self.encoder = reader.encoder
        return reader

    def batcher(self, model: PreTrainedModel, examples: Rows, **how: Any) -> Batched:
        """That of the longest prompt with the longest completion."""
        longest = np.zeros(max(map(len, examples)) + self.settings.most_tokens, np.int32)
        return super().batcher(model, [Example(1, longest, longest == 0, 0, None)], **how)

    def check(self, data: RunData, *, call: bool) -> None:
        """Check the reward functions and the environment with a row."""
        scorer, environments = Scorer(self.settings), Environments(self.settings)
        with contextlib.closing(scorer), contextlib.closing(environments), working("checking the rewards"):
            scorer.check(data.train, call=call)
            if call and self.settings.environment is not None:
                first = data.train[0]
                environments.reset(0, first.row, first.columns)
                environments.step(0, first.row, first.answer or ".")

    def written(self, data: RunData, batch_size: int) -> Written:
        sets, group, most = [len(rows) for rows in data.sets.values()], self.settings.group, self.settings.most_tokens
        longest = max(map(len, data.every)) + most
        return Written(max([batch_size * group, *sets]), longest, sum(sets) * most, group, self.settings.max_new_tokens)

    def objective(self, model: PreTrainedModel) -> CausalObjective:
        return CausalObjective(model, PolicyLoss(self.settings))

    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        """Rewards of greedy completions by function, and their weighted sum, which is the score."""
        assert isinstance(batcher, RolloutFeed)
        assert batcher.write is not None
        return self.scored(rows, batcher.write, batcher.scorer).evaluation

    def turns(self, sampler: Sampler) -> OneTurn | Turns:
        """What writes completions with this sampler, by turns with the environment if there is one."""
        return turns_of(self.settings, sampler, self.encoder, len(self.tokenizer))

    def scored(self, rows: Rows, write: OneTurn | Turns, scorer: Scorer, asked: Asked = GREEDY) -> Score:
        """Rewards of completions that ``write`` writes, greedily and as ``asked``, and the greedy ones themselves.

        Raises:
            UserError: a reward function fails.
        """
        most = asked.max_new_tokens or self.settings.max_new_tokens
        threshold = scorer.highest if asked.threshold is None else asked.threshold
        with working("writing completions"):
            drawn = write(rows, Drawing(most))
        rewards = scorer(rows, drawn)
        found = scorer.named(rewards)
        totals = found["reward"]
        found["passed"] = (totals >= threshold - _ROUNDING).astype(np.float64)
        bounds = {name: interval_of(values) for name, values in found.items()}
        found["length"] = np.array([float(one.length + one.ended) for one in drawn])
        found["cut_share"] = np.array([float(not one.ended) for one in drawn])
        written = [
            RewardedAnswer(one.row, one.prompt, row.answer or "", one.text, one.reward, bool(passed))
            for one, row, passed in zip(scorer.each(rows, drawn, rewards), rows, found["passed"], strict=True)
        ]
        if asked.samples:
            count = asked.samples
            temperature = self.settings.temperature if asked.temperature is None else asked.temperature
            every = [row for row in rows for _ in range(count)]
            seeds = np.random.default_rng(0).integers(2**63, size=count * len(rows)).tolist()
            how = Drawing(most, temperature, self.settings.top_p, self.settings.top_k, tuple(seeds))
            with working("writing completions"):
                several = write(every, how)
            given = scorer.named(scorer(every, several))
            sampled = {f"sampled {name}": values.reshape(-1, count).mean(1) for name, values in given.items()}
            bounds |= {name: interval_of(values) for name, values in sampled.items()}
            passed = given["reward"].reshape(-1, count) >= threshold - _ROUNDING
            powers = {1 << n for n in range(count.bit_length())}
            chances = {f"pass@{k}": pass_at(passed, k) for k in sorted({*powers, count})}
            # Chances vary less over prompts than a share with their mean does.
            bounds |= {name: mean_interval(values, share=True) for name, values in chances.items()}
            found |= sampled | chances
        means = {name: float(values.mean()) for name, values in found.items()}
        known = {name: bound for name, bound in bounds.items() if bound is not None and name != "reward"}
        evaluation = Evaluation(means, "reward", per_row=totals, interval=bounds["reward"], intervals=known)
        return Score(evaluation, list(written))
