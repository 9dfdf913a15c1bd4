"""The task ``reward``: write answers to prompts, and make those likelier that are rewarded."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.example import Example
from deltaw.data.prompts import Prompt, PromptReader
from deltaw.data.row_reader import Reader
from deltaw.data.settings import DataSettings
from deltaw.data.templates import Encoder
from deltaw.runtime.generation import Drawing, Drawn, generate
from deltaw.settings import RewardSettings
from deltaw.training.callbacks import Say
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.policy_losses import PolicyLoss
from deltaw.training.rollouts import RolloutFeed
from deltaw.training.tasks.base import Batched, Classes, ModelFiles, Rows
from deltaw.training.tasks.causal import CausalTask
from deltaw.training.tasks.causal_objective import CausalObjective


class RewardTask(CausalTask):
    """Learn from rewards of the model's own completions.

    Args:
        settings: the ``reward:`` section.

    Attributes:
        encoder: of the rows that were read last; None before.
    """

    name = "reward"
    rolls_out = True
    shares_evaluation = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Say, settings: RewardSettings) -> None:
        super().__init__(tokenizer, say)
        self.settings = settings
        self.encoder: Encoder | None = None

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> RewardTask:
        task = cls(files.tokenizer(), files.say, files.reward or RewardSettings())
        task.folder = files.folder
        return task

    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        reader = PromptReader(settings, self.tokenizer, say=self._say)
        self.encoder = reader.encoder
        return reader

    def batcher(self, model: PreTrainedModel, examples: Rows, **how: Any) -> Batched:
        """That of the longest prompt with the longest completion."""
        longest = np.zeros(max(map(len, examples)) + self.settings.most_tokens, np.int32)
        return super().batcher(model, [Example(1, longest, longest == 0, 0, None)], **how)

    def objective(self, model: PreTrainedModel) -> CausalObjective:
        return CausalObjective(model, PolicyLoss(self.settings))

    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        """Rewards of greedy completions; each function's mean, and their weighted sum as the score."""
        assert isinstance(objective, CausalObjective)
        if isinstance(batcher, RolloutFeed):
            return _evaluation(batcher, rows)
        model, tokenizer = objective.model, self.tokenizer

        def sampler(prompts: Sequence[np.ndarray], drawing: Drawing) -> list[Drawn]:
            written = generate(model, tokenizer, prompts, max_new_tokens=drawing.max_new_tokens)
            return [Drawn(one.tokens, one.text, one.terminator) for one in written]

        how: dict[str, Any] = {"encoder": self.encoder, "seed": 0, "base": contextlib.nullcontext}
        feed = RolloutFeed(objective, batcher, sampler, tokenizer, self.settings, **how)
        try:
            return _evaluation(feed, rows)
        finally:
            feed.close()


def _evaluation(feed: RolloutFeed, rows: Sequence[Prompt]) -> Evaluation:
    drawn = feed.write(rows, Drawing(feed.settings.max_new_tokens))
    rewards = feed.rewards(rows, drawn)
    totals = feed.weighted(rewards)
    metrics = {"loss": -float(totals.mean()), "reward": float(totals.mean())}
    if len(rewards) > 1:
        metrics |= {f"reward {name}": float(of.mean()) for name, of in zip(feed.names, rewards, strict=True)}
    metrics["length"] = float(np.mean([one.length for one in drawn]))
    return Evaluation.of_rows(metrics, "reward", totals)
