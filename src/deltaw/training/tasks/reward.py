"""The task ``reward``: reinforcement learning from rewards of generated completions."""

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
from deltaw.progress import track_progress
from deltaw.runtime.generation import Sampler, SamplingParams
from deltaw.task_settings import RewardSettings
from deltaw.training.callbacks import LogFunction
from deltaw.training.evaluation.base import Evaluation, mean_interval
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.rollouts.environments import Environments
from deltaw.training.rollouts.feed import RolloutFeed
from deltaw.training.rollouts.losses import PolicyLoss
from deltaw.training.rollouts.scoring import Scorer, interval_of, pass_at
from deltaw.training.rollouts.turns import TurnSampler, make_sampler
from deltaw.training.tasks.base import BatcherChoice, Classes, ModelFiles, RateFactor, Rows, RunData, TaskGeneration
from deltaw.training.tasks.causal import CausalTask, EvaluatedAnswer, EvaluationScore
from deltaw.training.tasks.causal_objective import CausalObjective

# Rounding tolerance of sums of weighted rewards.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class RewardEvaluation:
    """Options of an evaluation with rewards.

    Attributes:
        samples: Number of sampled completions per prompt, in addition to the greedy one.
        temperature: Sampling temperature, or None for the temperature of training.
        threshold: Minimum weighted reward of a passing completion. None for the highest reward of functions with values
            up to 1.
        max_new_tokens: Maximum number of tokens of a completion, or None for the limit of training.
    """

    samples: int = 0
    temperature: float | None = None
    threshold: float | None = None
    max_new_tokens: int | None = None


GREEDY = RewardEvaluation()


@dataclass(frozen=True)
class RewardedAnswer(EvaluatedAnswer):
    """Greedy completion with its weighted reward.

    Attributes:
        reward: Weighted sum of rewards.
        passed: True if the reward reaches the threshold.
    """

    reward: float
    passed: bool

    @property
    def exact(self) -> bool:
        return self.passed

    @property
    def display_text(self) -> str:
        return f"{self.reward:.2f}  {self.output}"


class RewardTask(CausalTask):
    """Train on rewards of the model's completions.

    Args:
        settings: The ``reward:`` section.

    Attributes:
        encoder: Encoder of the rows that were read last, or None before reading.
    """

    name = "rl"
    uses_rollouts = True
    checks_generation = True
    shares_evaluation = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, log: LogFunction, settings: RewardSettings) -> None:
        super().__init__(tokenizer, log)
        self.settings = settings
        self.encoder: Encoder | None = None

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> RewardTask:
        task = cls(files.tokenizer(), files.log, files.section or RewardSettings())
        task.folder = files.folder
        return task

    @classmethod
    def rate_factor(cls, section: RewardSettings | None) -> RateFactor:
        """Return 0.1: TRL's defaults are 1e-6 for GRPO and 2e-5 for SFT; tinker-cookbook's LoRA rates differ by 7."""
        return RateFactor(0.1, "defaults of TRL and tinker-cookbook")

    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        reader = PromptReader(settings, self.tokenizer, log=self._log)
        self.encoder = reader.encoder
        return reader

    def batcher(self, model: PreTrainedModel, examples: Rows, **options: Any) -> BatcherChoice:
        """Choose a batcher that fits the longest prompt with the longest completion."""
        longest = np.zeros(max(map(len, examples)) + self.settings.max_response_tokens, np.int32)
        return super().batcher(model, [Example(1, longest, longest == 0, 0, None)], **options)

    def check(self, data: RunData, *, call: bool) -> None:
        """Check the reward functions and the environment on one row."""
        scorer, environments = Scorer(self.settings), Environments(self.settings)
        with contextlib.closing(scorer), contextlib.closing(environments), track_progress("checking the rewards"):
            scorer.check(data.train, call=call)
            if call and self.settings.environment is not None:
                first = data.train[0]
                environments.reset(0, first.row, first.columns)
                environments.step(0, first.row, first.answer or ".")

    def generation_limits(self, data: RunData, batch_size: int) -> TaskGeneration:
        sets, group = [len(rows) for rows in data.sets.values()], self.settings.group
        max_tokens = self.settings.max_response_tokens
        max_length = max(map(len, data.all_rows)) + max_tokens
        num_rows, num_tokens = max([batch_size * group, *sets]), sum(sets) * max_tokens
        return TaskGeneration(num_rows, max_length, num_tokens, group, self.settings.max_new_tokens)

    def objective(self, model: PreTrainedModel) -> CausalObjective:
        return CausalObjective(model, PolicyLoss(self.settings))

    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        """Return the rewards of greedy completions by function, and their weighted sum as the primary metric."""
        assert isinstance(batcher, RolloutFeed)
        assert batcher.sampler is not None
        return self.score_completions(rows, batcher.sampler, batcher.scorer).evaluation

    def turns(self, sampler: Sampler) -> TurnSampler:
        """Return the sampler of completions, which alternates with the environment, if any."""
        return make_sampler(self.settings, sampler, self.encoder, len(self.tokenizer))

    def score_completions(
        self, rows: Rows, sampler: TurnSampler, scorer: Scorer, options: RewardEvaluation = GREEDY
    ) -> EvaluationScore:
        """Generate and score completions: one greedy completion per prompt, and samples according to ``options``.

        Args:
            sampler: Generates the completions.

        Raises:
            UserError: if a reward function fails.
        """
        max_new_tokens = options.max_new_tokens or self.settings.max_new_tokens
        threshold = scorer.highest if options.threshold is None else options.threshold
        with track_progress("writing completions"):
            completions = sampler(rows, SamplingParams(max_new_tokens))
        rewards = scorer(rows, completions)
        metrics = scorer.by_name(rewards)
        totals = metrics["reward"]
        metrics["passed"] = (totals >= threshold - _ROUNDING).astype(np.float64)
        bounds = {name: interval_of(values) for name, values in metrics.items()}
        metrics["length"] = np.array([float(scored.length + scored.ended) for scored in completions])
        metrics["truncated_share"] = np.array([float(not scored.ended) for scored in completions])
        items = zip(scorer.describe(rows, completions, rewards), rows, metrics["passed"], strict=True)
        greedy = [RewardedAnswer(s.row, s.prompt, row.answer or "", s.text, s.reward, bool(p)) for s, row, p in items]
        if options.samples:
            count = options.samples
            temperature = self.settings.temperature if options.temperature is None else options.temperature
            repeated_rows = [row for row in rows for _ in range(count)]
            seeds = np.random.default_rng(0).integers(2**63, size=count * len(rows)).tolist()
            params = SamplingParams(max_new_tokens, temperature, self.settings.top_p, self.settings.top_k, tuple(seeds))
            with track_progress("writing completions"):
                samples = sampler(repeated_rows, params)
            sampled_rewards = scorer.by_name(scorer(repeated_rows, samples))
            sampled = {f"sampled {name}": values.reshape(-1, count).mean(1) for name, values in sampled_rewards.items()}
            bounds |= {name: interval_of(values) for name, values in sampled.items()}
            passed = sampled_rewards["reward"].reshape(-1, count) >= threshold - _ROUNDING
            ks = {1 << n for n in range(count.bit_length())}
            pass_rates = {f"pass@{k}": pass_at(passed, k) for k in sorted({*ks, count})}
            # pass@k estimates vary less over prompts than a binary share with the same mean.
            bounds |= {name: mean_interval(values, share=True) for name, values in pass_rates.items()}
            metrics |= sampled | pass_rates
        means = {name: float(values.mean()) for name, values in metrics.items()}
        intervals = {name: bound for name, bound in bounds.items() if bound is not None and name != "reward"}
        evaluation = Evaluation(means, "reward", per_row=totals, interval=bounds["reward"], intervals=intervals)
        return EvaluationScore(evaluation, list(greedy))
