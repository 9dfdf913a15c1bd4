"""Rollouts: before a step, the policy generates completions of its prompts, which are scored and trained on.

The seed determines the order of prompts, as for rows of other tasks. :class:`RolloutFeed` replaces the prompts of a
step by completions. The completions depend only on the model, the seed and the step, so a run that was interrupted
within a rollout generates them again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaw.data.prompts import TokenizedPrompt
from deltaw.errors import UserError
from deltaw.hub.loading import has_values
from deltaw.progress import track_progress
from deltaw.runtime.generation import SampledCompletion, SamplingParams, derive_seed
from deltaw.task_settings import RewardSettings
from deltaw.training.evaluation.base import mean_interval
from deltaw.training.losses import RowLogProbs
from deltaw.training.microbatches import Feed
from deltaw.training.parallel.reducer import SINGLE_PROCESS, Reducer
from deltaw.training.rollouts.losses import PolicyLoss, Rollout, advantages
from deltaw.training.rollouts.scoring import Completions, Prompts, ScoredCompletion, Scorer
from deltaw.training.rollouts.store import RolloutStore, parse_rollouts
from deltaw.training.rollouts.turns import TurnSampler

if TYPE_CHECKING:
    from deltaw.training.tasks.causal_objective import CausalObjective


class RolloutFeed(Feed):
    """Feeds completions of a step's prompts.

    Args:
        objective: Objective of the completions, with a :class:`PolicyLoss`.
        batcher: Batcher of the completions.
        sampler: Samples completions from the current model. Not needed in a dry run.
        settings: The ``reward:`` section.
        seed: Seed of the training.
        base: Context in which the model is the base model.
        processes: Processes of the training.

    Attributes:
        scorer: Scores completions.
        extremes: Best and worst completions of the last rollout.
    """

    def __init__(
        self,
        objective: CausalObjective,
        batcher: Any,
        sampler: TurnSampler | None,
        settings: RewardSettings,
        *,
        seed: int,
        base: Callable[[], AbstractContextManager[None]],
        processes: Reducer = SINGLE_PROCESS,
    ) -> None:
        super().__init__(objective, batcher)
        self.settings, self.sampler = settings, sampler
        self._seed, self._base, self._processes = seed, base, processes
        self.scorer = Scorer(settings)
        self.extremes: list[ScoredCompletion] = []
        self._rollouts: tuple[int, list[Rollout]] = (-1, [])
        self._store: RolloutStore | None = None

    def expand(self, prompts: Prompts, step: int) -> tuple[list[Rollout], bool]:
        """Return the completions of a step, grouped by prompt, and True if any of them contributes a gradient.

        Args:
            prompts: Prompts of the step.
            step: Index of the step, from 0.

        Raises:
            UserError: if a reward function fails.
        """
        settings = self.settings
        if not has_values(self.objective.model):  # type: ignore[attr-defined]
            return self.worst_case_rows(prompts), True
        rollout_index = step // settings.updates
        if self._rollouts[0] != rollout_index:
            self._rollouts = rollout_index, self._load_rollout(step) or self._sample_groups(prompts, rollout_index)
            if self._store is not None:
                self._store.save(*self._rollouts)
        rows = self._rollouts[1]
        return rows, any(map(self._has_gradient, rows))

    def set_run_folder(self, folder: Path) -> None:
        if self.settings.updates > 1:
            self._store = RolloutStore(folder, self.settings.updates)

    def _load_rollout(self, step: int) -> list[Rollout]:
        """Return the stored completions of process 0 if ``step`` continues a rollout, else an empty list."""
        if not step % self.settings.updates:
            return []
        text = "" if self._store is None else self._store.text(step // self.settings.updates)
        first = self._processes.texts(text)[0]
        if not first:
            message = f"the stored completions for step {step + 1} are missing from the run's folder"
            hint = "restore the folder from a copy, or start over with --fresh"
            raise UserError(message, location="rollouts", hint=hint)
        return parse_rollouts(first)

    def worst_case_rows(self, prompts: Prompts) -> list[Rollout]:
        """Return completions of maximum size for a dry run: maximum length, and no shared prefix after the prompt."""
        length = self.settings.max_response_tokens
        logprobs = np.zeros(length, np.float32)
        size = self.settings.group
        group = [SampledCompletion(np.full(length, n, np.int64), "", None, logprobs) for n in range(size)]
        return [_rollout(prompt, completion) for prompt in prompts for completion in group]

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        """Yield the microbatches of completions that contribute a gradient."""
        rows = self._worst_case(rows)
        return super().batches([row for row in rows if self._has_gradient(row)] or list(rows[:1]))

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        return super().shapes(self._worst_case(rows))

    def close(self) -> None:
        self.scorer.close()
        if self.sampler is not None:
            self.sampler.close()
        super().close()

    def _worst_case(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Return completions unchanged. In a dry run, replace prompts by completions of maximum length."""
        return rows if not rows or isinstance(rows[0], Rollout) else self.worst_case_rows(rows)

    def _has_gradient(self, row: Rollout) -> bool:
        return row.advantage != 0 or self.settings.beta > 0

    def _sample_groups(self, prompts: Prompts, rollout_index: int) -> list[Rollout]:
        """Generate the completions of a rollout.

        A group with equal rewards has no advantage, so it is sampled again up to
        ``settings.redraw`` times (dynamic sampling, DAPO section 3.2).
        """
        groups: dict[int, tuple[list[SampledCompletion], np.ndarray]] = {}
        pending = list(range(len(prompts)))
        for attempt in range(self.settings.redraw + 1):
            sampled = self._generate([prompts[index] for index in pending], (rollout_index, attempt))
            groups |= dict(zip(pending, sampled, strict=True))
            pending = [index for index in pending if not np.ptp(self.scorer.total(groups[index][1]))]
            if not pending:
                break
        repeated_prompts = [prompt for prompt in prompts for _ in range(self.settings.group)]
        completions = [completion for index in range(len(prompts)) for completion in groups[index][0]]
        return self._score(repeated_prompts, completions, np.hstack([groups[i][1] for i in range(len(prompts))]))

    def _generate(self, prompts: Prompts, key: tuple[int, int]) -> list[tuple[list[SampledCompletion], np.ndarray]]:
        """Generate and score a group of completions per prompt.

        Each process handles a part, and all get the full result.

        Args:
            key: Numbers that determine the seeds of the completions, in addition to the prompt.

        Returns:
            For each prompt its completions, and their rewards (names, group).
        """
        settings, group = self.settings, self.settings.group
        rank, size = self._processes.rank, self._processes.size
        local_prompts = [prompt for prompt in prompts[rank::size] for _ in range(group)]
        numbered = enumerate(local_prompts)
        seeds = tuple(derive_seed(self._seed, *key, prompt.row, n % group) for n, prompt in numbered)
        sampling = settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k
        params = SamplingParams(*sampling, seeds, True)
        assert self.sampler is not None
        with track_progress("generating completions"):
            completions = self.sampler(local_prompts, params)
        with track_progress("scoring completions"):
            rewards = self.scorer(local_prompts, completions)
        local_results = [completion.as_list() for completion in completions], rewards.T.tolist()
        parts = [json.loads(text) for text in self._processes.texts(json.dumps(local_results))]
        groups = []
        for index in range(len(prompts)):
            group_slice = slice(index // size * group, (index // size + 1) * group)
            group_completions, columns = (part[group_slice] for part in parts[index % size])
            restored = [SampledCompletion.from_list(completion) for completion in group_completions]
            groups.append((restored, np.array(columns, np.float64).T))
        return groups

    def _score(self, prompts: Prompts, completions: Completions, rewards: np.ndarray) -> list[Rollout]:
        """Return the completions with their advantages and the log-probabilities that the loss needs."""
        settings = self.settings
        totals = self.scorer.total(rewards)
        if settings.overlong:
            excess = np.array([c.length for c in completions]) - (settings.max_completion_tokens - settings.overlong)
            totals = totals - np.clip(excess / settings.overlong, 0.0, 1.0)  # DAPO's soft punishment, eq. 13
        rows = [_rollout(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        if settings.beta:
            with self._base():
                rows = self._with_logprobs(rows, "base_logprobs")
            if settings.loss == "rloo":
                rows = self._with_logprobs(rows, "old_logprobs")
                log_ratios = [float(np.sum(row.old_logprobs - row.base_logprobs)) for row in rows]  # type: ignore[operator]
                totals = totals - settings.beta * np.array(log_ratios)
        if settings.updates > 1 and rows[0].old_logprobs is None:
            rows = self._with_logprobs(rows, "old_logprobs")
        values = advantages(totals.reshape(-1, settings.group), settings.loss, settings.loss != "dr_grpo").reshape(-1)
        is_truncated = np.array([not completion.ended for completion in completions])
        if settings.mask_cut:
            values = np.where(is_truncated, 0.0, values)
        self._log(rewards, totals, rows, is_truncated)
        self.extremes = self.scorer.extremes(prompts, completions, rewards)
        return [replace(row, advantage=float(value)) for row, value in zip(rows, values, strict=True)]

    def _log(self, rewards: np.ndarray, totals: np.ndarray, rows: Sequence[Rollout], is_truncated: np.ndarray) -> None:
        """Add metrics of the completions to the step. Errors are half the width of the 95 % interval over groups."""
        groups, metrics = totals.reshape(-1, self.settings.group), {}
        for name, values in self.scorer.by_name(rewards).items():
            metrics[name] = float(values.mean())
            if (bounds := mean_interval(values.reshape(groups.shape).mean(1))) is not None:
                metrics[name.replace("reward", "reward_error", 1)] = bounds[1] - metrics[name]
        metrics["reward_std"] = float(groups.std(1).mean())
        metrics["groups_with_advantage"] = float((np.ptp(groups, axis=1) > 0).mean())
        metrics["length"] = float(np.mean([row.label_count for row in rows]))
        metrics["truncated_share"] = float(is_truncated.mean())
        if self.settings.beta and self.settings.loss == "rloo":  # the other losses report it
            differences = [row.old_logprobs - row.base_logprobs for row in rows]  # type: ignore[operator]
            metrics["kl"] = float(np.concatenate(differences).mean())
        loss = self.objective.loss  # type: ignore[attr-defined]
        assert isinstance(loss, PolicyLoss)
        loss.accumulator.step_metrics = metrics

    @torch.no_grad()
    def _with_logprobs(self, rows: Sequence[Rollout], name: str) -> list[Rollout]:
        """Return the rows with the current model's log-probabilities of their labels, computed as in training."""
        objective: Any = self.objective
        logprobs: dict[int, np.ndarray] = {}
        for batch in self.batcher.batches(rows):
            batch_logprobs = RowLogProbs.of(batch, objective.token_log_probs(batch))
            row_indices = batch_logprobs.row.cpu().numpy()
            values = batch_logprobs.values[batch_logprobs.index].float().cpu().numpy()
            logprobs |= {id(row): values[row_indices == index] for index, row in enumerate(batch_logprobs.rows)}
        fields: list[dict[str, Any]] = [{name: logprobs[id(row)]} for row in rows]
        return [replace(row, **row_fields) for row, row_fields in zip(rows, fields, strict=True)]


def _rollout(prompt: TokenizedPrompt, completion: SampledCompletion) -> Rollout:
    """Concatenate a prompt and its completion. Generated tokens and the terminator are labels."""
    prompt_tokens = prompt.tokens if completion.prompt is None else completion.prompt
    is_generated = np.ones(len(completion.tokens), bool) if completion.is_generated is None else completion.is_generated
    logprobs = completion.logprobs if completion.logprobs is None else completion.logprobs[is_generated]
    terminator = [] if completion.terminator is None else [completion.terminator]
    tokens = np.concatenate([prompt_tokens, completion.tokens, terminator]).astype(np.int32)
    is_label = np.concatenate([np.zeros(len(prompt_tokens), bool), is_generated, np.ones(len(terminator), bool)])
    row = Rollout(prompt.row, tokens, is_label, len(prompt_tokens), completion.text, prompt.active_from)
    return replace(row, engine_logprobs=logprobs)
