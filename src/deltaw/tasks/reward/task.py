"""The task ``reward``: reinforcement learning from rewards of generated completions."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.example import Example
from deltaw.data.prompts import PromptReader
from deltaw.data.row_reader import Reader, RunData
from deltaw.data.starter import TaskStarter
from deltaw.data.templates import Encoder
from deltaw.decoding.generation import Sampler, SamplingParams
from deltaw.inference.scores import EvaluationScore, ScoreOptions
from deltaw.progress import LogFunction, track_progress
from deltaw.settings.data import DataSettings
from deltaw.tasks.language.task import CausalTask
from deltaw.tasks.reward.environments import Environments
from deltaw.tasks.reward.feed import RewardFeed, TurnSampler, make_sampler
from deltaw.tasks.reward.losses import PolicyLoss
from deltaw.tasks.reward.rewards import load_reward
from deltaw.tasks.reward.rewards.function_files import require_file
from deltaw.tasks.reward.rewards.functions import settings_location
from deltaw.tasks.reward.scoring import Scorer, interval_of, pass_at
from deltaw.tasks.reward.settings import RewardSettings
from deltaw.training.batcher import Batcher
from deltaw.training.batchers import BatcherOptions
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.evaluation.answers import EvaluatedAnswer
from deltaw.training.evaluation.base import Evaluation, mean_interval
from deltaw.training.task import BatcherChoice, Classes, ModelFiles, RateFactor, Rows, TaskGeneration, TrainingSession


class RewardStarter(TaskStarter):
    """Starter of the task, with a reward that fits the columns of the rows."""

    def section(self, form: str, columns: Collection[str]) -> tuple[str, ...]:
        function = "    - {name: contains}      # the row's answer occurs in the completion"
        if "tests" in columns:
            function = "    - {name: unit-tests}    # runs the code of the completion with the row's tests"
        elif form in ("", "prompts"):
            function = "    - {name: length, target: 50}  # placeholder: answers of 50 words"
        comment = "# or your own: {name: FILE.py:FUNCTION}, see docs/reward.md"
        return "reward:", f"  functions:              {comment}", function


# Rounding tolerance of sums of weighted rewards.
_ROUNDING = 1e-9


GREEDY = ScoreOptions()


class RewardPromptReader(PromptReader):
    """Reads the prompts of a training on rewards."""

    columns_task = "rl"


class RewardTask(CausalTask):
    """Train on rewards of the model's completions.

    Args:
        settings: The ``reward:`` section.

    Attributes:
        encoder: Encoder of the rows that were read last, or None before reading.
    """

    name = "rl"
    needs_session = True
    caches_features = False
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
    def check_settings(cls, section: RewardSettings) -> None:
        for function in section.functions:
            if ":" in function.name:
                require_file(function.name, settings_location(function))
            elif function.name != "model":
                load_reward(function)
        if section.environment is not None:
            require_file(section.environment, "reward.environment")

    @classmethod
    def rate_factor(cls, section: RewardSettings | None) -> RateFactor:
        """Return 0.1: TRL's defaults are 1e-6 for GRPO and 2e-5 for SFT; tinker-cookbook's LoRA rates differ by 7."""
        return RateFactor(0.1, "defaults of TRL and tinker-cookbook")

    def reader(self, settings: DataSettings, classes: Classes = None) -> Reader:
        reader = RewardPromptReader(settings, self.tokenizer, log=self._log)
        self.encoder = reader.encoder
        return reader

    def batcher(self, model: PreTrainedModel, examples: Rows, options: BatcherOptions) -> BatcherChoice:
        """Choose a batcher that fits the longest prompt with the longest completion."""
        longest = np.zeros(max(map(len, examples)) + self.settings.max_response_tokens, np.int32)
        return super().batcher(model, [Example(1, longest, longest == 0, 0, None)], options)

    def check(self, data: RunData, *, call: bool) -> None:
        """Check the reward functions and the environment on one row."""
        scorer = Scorer(self.settings)
        environments = Environments(self.settings)
        with contextlib.closing(scorer), contextlib.closing(environments), track_progress("checking the rewards"):
            scorer.check(data.train, call=call)
            if call and self.settings.environment is not None:
                first = data.train[0]
                environments.reset(0, first.row, first.columns)
                environments.step(0, first.row, first.answer or ".")

    def generation_limits(self, data: RunData, batch_size: int) -> TaskGeneration:
        sets = [len(rows) for rows in data.sets.values()]
        group = self.settings.group
        max_tokens = self.settings.max_response_tokens
        max_length = max(map(len, data.all_rows)) + max_tokens
        num_rows = max([batch_size * group, *sets])
        num_tokens = sum(sets) * max_tokens
        return TaskGeneration(num_rows, max_length, num_tokens, group, self.settings.max_new_tokens)

    def objective(self, model: PreTrainedModel) -> CausalObjective:
        return CausalObjective(model, PolicyLoss(self.settings))

    def feed(self, session: TrainingSession) -> RewardFeed:
        """Return the feed that samples and scores completions before each step."""
        sampler = session.sampler()
        return RewardFeed(
            session.objective,
            session.batcher,
            None if sampler is None else self.turns(sampler),
            self.settings,
            seed=session.config.train.seed,
            reference=session.reference_active,
            processes=session.processes,
        )

    def evaluate(self, objective: CausalObjective, rows: Rows, batcher: Batcher, classes: Classes = None) -> Evaluation:
        """Return the rewards of greedy completions by function, and their weighted sum as the primary metric."""
        assert isinstance(batcher, RewardFeed)
        assert batcher.sampler is not None
        return self.score_completions(rows, batcher.sampler, batcher.scorer).evaluation

    def turns(self, sampler: Sampler) -> TurnSampler:
        """Return the sampler of completions, which alternates with the environment, if any."""
        return make_sampler(self.settings, sampler, self.encoder, len(self.tokenizer))

    def score_completions(
        self, rows: Rows, sampler: TurnSampler, scorer: Scorer, options: ScoreOptions = GREEDY
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
        greedy = [EvaluatedAnswer(s.row, s.prompt, row.answer or "", s.text, s.reward, bool(p)) for s, row, p in items]
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
