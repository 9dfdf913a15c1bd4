"""A task as an external package would define it: the model is rewarded for letters in its own completions.

The file contains the settings section, the rollouts, the loss, the metric, and the registry entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from deltaw.data.example import Example
from deltaw.data.prompts import PromptReader
from deltaw.decoding.generation import SampledCompletion, SamplingParams, derive_seed
from deltaw.decoding.opening import SessionGenerator
from deltaw.errors import UserError
from deltaw.inference.scores import EvaluationScore
from deltaw.inference.text_inference import TextInference
from deltaw.progress import ignore_line
from deltaw.settings.fields import TaskSettings, setting
from deltaw.settings.row_kinds import PROMPTED_FORMATS, PROMPTS
from deltaw.settings.task_registry import TaskEntry
from deltaw.tasks.language.task import CausalTask
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.rollouts import RolloutFeed
from deltaw.training.task import TaskGeneration


class LetterSettings(TaskSettings):
    """The ``letters:`` section."""

    letters: str = setting("abcdefghijklm", "letters that are rewarded", min_length=1)
    group: int = setting(4, "number of completions per prompt", ge=2)
    max_new_tokens: int = setting(8, "maximum number of tokens per completion", ge=1)
    updates: int = setting(1, "number of optimizer steps per round", ge=1)

    def check_run(self, config):
        if self.updates > config.train.batch_size:
            raise UserError("there are more updates than rows of a step", location="letters.updates", hint="lower it")

    def reward(self, text):
        return sum(letter in self.letters for letter in text) / max(1, len(text))


@dataclass(frozen=True, eq=False, kw_only=True)
class Completed(Example):
    """A prompt with a completion, and the difference of its reward from the mean of its group."""

    advantage: float = 1.0


class Reinforce:
    """REINFORCE with the mean reward of a group as baseline. The unit is a completion."""

    def __call__(self, rows):
        return -(rows.sums() * torch.tensor([row.advantage for row in rows.rows])).sum()

    def units(self, rows):
        return len(rows)


class LetterFeed(RolloutFeed):
    row_class = Completed

    def __init__(self, session, settings):
        super().__init__(session.objective, session.batcher, session.processes)
        self.settings = settings
        self.steps_per_round = settings.updates
        self.sampler = session.sampler()
        self.seed = session.config.train.seed

    def generate(self, rows, round_index):
        count = self.settings.group
        prompts = [row for row in rows for _ in range(count)]
        seeds = tuple(derive_seed(self.seed, round_index, row.row, n % count) for n, row in enumerate(prompts))
        params = SamplingParams(self.settings.max_new_tokens, 1.0, seeds=seeds)
        completions = self.sampler([row.tokens for row in prompts], params)
        rewards = np.array([self.settings.reward(completion.text) for completion in completions]).reshape(-1, count)
        self.step_metrics = {"reward": float(rewards.mean())}
        advantages = (rewards - rewards.mean(1, keepdims=True)).flatten().tolist()
        items = zip(prompts, completions, advantages, strict=True)
        return [self.complete(prompt, completion, advantage=advantage) for prompt, completion, advantage in items]

    def worst_case_rows(self, rows):
        tokens = [np.full(self.settings.max_new_tokens, n) for n in range(self.settings.group)]
        return [self.complete(row, SampledCompletion(part, "", None)) for row in rows for part in tokens]

    def has_gradient(self, row):
        return row.advantage != 0


class LetterTask(CausalTask):
    """Reward for letters, evaluated by the reward of greedy completions."""

    name = "toy-letters"
    needs_session = True
    caches_features = False
    shares_evaluation = False
    settings: LetterSettings

    @classmethod
    def open(cls, name, files):
        task = super().open(name, files)
        task.settings = files.section or LetterSettings()
        return task

    @classmethod
    def check_settings(cls, section):
        if section.letters.isspace():
            raise UserError("all letters are blank", location="letters.letters", hint="name a letter")

    def reader(self, settings, classes=None):
        return PromptReader(settings, self.tokenizer)

    def batcher(self, model, examples, options):
        longest = np.zeros(max(map(len, examples)) + self.settings.max_new_tokens, np.int32)
        return super().batcher(model, [Example(1, longest, longest == 0, 0, None)], options)

    def generation_limits(self, data, batch_size):
        settings = self.settings
        length = max(map(len, data.all_rows)) + settings.max_new_tokens
        held_out = len(data.held_out)
        rows = max(batch_size * settings.group, held_out)
        tokens = held_out * settings.max_new_tokens
        return TaskGeneration(rows, length, tokens, settings.group, settings.max_new_tokens)

    def objective(self, model):
        return CausalObjective(model, Reinforce())

    def feed(self, session):
        return LetterFeed(session, self.settings)

    def evaluate(self, objective, rows, batcher, classes=None):
        return self.score_completions(rows, batcher.sampler)

    def score_completions(self, rows, sampler):
        completions = sampler([row.tokens for row in rows], SamplingParams(self.settings.max_new_tokens))
        rewards = np.array([self.settings.reward(completion.text) for completion in completions])
        return Evaluation.of_rows({"reward": float(rewards.mean())}, "reward", rewards)


class LetterInference(TextInference):
    """Evaluates a loaded model by the reward of greedy completions."""

    def score(self, opened, rows, options, generator):
        generator = generator or SessionGenerator(opened, ignore_line)
        return EvaluationScore(self.task.score_completions(rows, generator.sample))


ENTRY = TaskEntry(
    "toy-letters",
    LetterTask,
    "AutoModelForCausalLM",
    "generate text",
    settings=LetterSettings,
    section="letters",
    description="letters that are rewarded, for task: toy-letters",
    row_kinds=(*PROMPTED_FORMATS, PROMPTS),
    supports_range_test=False,
    inference=LetterInference,
    goal="write some letters",
)
