"""Rollouts: before a step, the policy generates completions of its prompts, which are scored and trained on.

The seed determines the order of prompts, as for rows of other tasks. :class:`RewardFeed` replaces the prompts of a
step by completions. The completions depend only on the model, the seed and the step, so a run that was interrupted
within a rollout generates them again. Rollouts that several updates train on are stored, because the weights change
between these updates.

Completions have one turn, or alternate with an environment. Generated tokens are used unchanged. Messages of the
environment are rendered by the chat template and are not labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from deltaw.data.example import Example
from deltaw.data.messages import Message
from deltaw.data.prompts import TokenizedPrompt, prompt_messages
from deltaw.data.templates import Encoder
from deltaw.decoding.generation import SampledCompletion, Sampler, SamplingParams, derive_seed
from deltaw.errors import UserError
from deltaw.progress import track_progress
from deltaw.tasks.reward.environments import Environments
from deltaw.tasks.reward.losses import Rollout, advantages
from deltaw.tasks.reward.scoring import Completions, Prompts, Scorer
from deltaw.tasks.reward.settings import RewardSettings
from deltaw.training.evaluation.base import mean_interval
from deltaw.training.losses import RowLogProbs
from deltaw.training.reducer import SINGLE_PROCESS, Reducer
from deltaw.training.rollouts import RolloutFeed


@dataclass
class _Conversation:
    """A conversation in progress.

    Attributes:
        index: Index of the conversation.
        prompt: Prompt of the row.
        messages: Messages of the prompt.
        tools: Tools of the prompt.
        tokens: Token ids of the prompt.
        limit: Maximum number of tokens in total.
        response: Tokens after the prompt.
        is_generated: True for each response token that the model generated.
        logprobs: Log-probability of each response token, NaN if not generated.
        text: Text of the model's last turn.
        terminator: Terminator of the model's last turn.
        reward: Sum of the rewards.
        is_active: True if the model generates another turn.
    """

    index: int
    prompt: TokenizedPrompt
    messages: list[Message]
    tools: tuple[Message, ...]
    tokens: np.ndarray
    limit: int
    response: list[int] = field(default_factory=list)
    is_generated: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    terminator: int | None = None
    reward: float = 0.0
    is_active: bool = True

    def add(self, tokens: Sequence[int], is_generated: bool, logprobs: np.ndarray | None = None) -> None:
        self.response += map(int, tokens)
        self.is_generated += [is_generated] * len(tokens)
        self.logprobs += [np.nan] * len(tokens) if logprobs is None else logprobs.tolist()

    def completion(self) -> SampledCompletion:
        response = np.array(self.response, np.int64)
        logprobs = np.array(self.logprobs, np.float32)
        is_generated = np.array(self.is_generated, bool)
        return SampledCompletion(response, self.text, self.terminator, logprobs, self.tokens, is_generated, self.reward)


class SingleTurnSampler:
    """Samples one completion per prompt."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __call__(self, prompts: Sequence[TokenizedPrompt], params: SamplingParams) -> list[SampledCompletion]:
        """Return a completion of each prompt, in order."""
        return self._sampler([prompt.tokens for prompt in prompts], params)

    def close(self) -> None:
        """No-op, because no resources are held."""


class MultiTurnSampler:
    """Samples completions of prompts in an environment.

    Args:
        settings: The ``reward:`` section, with an environment.
        sampler: Samples a turn of each conversation.
        encoder: Renders messages as in training.
        vocab_size: Upper bound of token ids, except for ids of virtual tokens.
    """

    def __init__(self, settings: RewardSettings, sampler: Sampler, encoder: Encoder, vocab_size: int) -> None:
        self._settings = settings
        self._sampler = sampler
        self._encoder = encoder
        self._vocab_size = vocab_size
        self._environments = Environments(settings)

    def __call__(self, prompts: Sequence[TokenizedPrompt], params: SamplingParams) -> list[SampledCompletion]:
        """Return a completion of each prompt including all turns, in order.

        Raises:
            UserError: if the environment fails, or the chat template rejects a message.
        """
        conversations = [self._start(index, prompt) for index, prompt in enumerate(prompts)]
        for turn in range(self._settings.turns):
            active = [conversation for conversation in conversations if conversation.is_active]
            if not active:
                break
            seeds = tuple(derive_seed(params.seeds[c.index], turn) for c in active) if params.seeds else ()
            contexts = [np.append(c.tokens, c.response).astype(np.int32) for c in active]
            completions = self._sampler(contexts, replace(params, seeds=seeds))
            for conversation, completion in zip(active, completions, strict=True):
                self._advance(conversation, completion, last=turn == self._settings.turns - 1)
        return [conversation.completion() for conversation in conversations]

    def close(self) -> None:
        """Close the environments."""
        self._environments.close()

    def _start(self, index: int, prompt: TokenizedPrompt) -> _Conversation:
        location = f"row {prompt.row}"
        if prompt.active_from is not None:
            message = "activated adapters do not support multi-turn sampling"
            hint = "use another method, or remove the environment"
            raise UserError(message, location="reward.environment", hint=hint)
        start = self._environments.reset(index, prompt.row, prompt.columns)
        messages, tools = prompt_messages(dict(prompt.columns), location)
        tokens = prompt.tokens
        limit = len(prompt.tokens) + self._settings.max_response_tokens
        if start.text or start.tools:
            if start.text:
                messages[-1] = {"role": "user", "content": start.text}
            tools = (*tools, *start.tools)
            virtual = tokens[tokens >= self._vocab_size]
            tokens = np.append(virtual, self._encoder.prompt(messages, tools)).astype(tokens.dtype)
        if len(tokens) + self._settings.max_new_tokens > limit:
            message = f"the prompt with the environment's first message has {len(tokens)} tokens, which leaves too few"
            raise UserError(message, location=location, hint="raise reward.environment_tokens")
        return _Conversation(index, prompt, messages, tools, tokens, limit)

    def _advance(self, conversation: _Conversation, completion: SampledCompletion, *, last: bool) -> None:
        """Add the model's turn and the response of the environment."""
        conversation.add(completion.tokens.tolist(), True, completion.logprobs)
        conversation.text = completion.text
        conversation.terminator = completion.terminator
        response = self._environments.step(conversation.index, conversation.prompt.row, completion.text)
        conversation.reward += response.reward
        conversation.is_active = not (last or response.done or completion.terminator is None)
        if not conversation.is_active:
            return
        reply = self._encoder.encode_reply(conversation.messages, response.message, conversation.tools)
        length = len(conversation.tokens) + len(conversation.response) + 1 + len(reply)
        if length + self._settings.max_new_tokens > conversation.limit:  # another response would exceed the limit
            conversation.is_active = False
            return
        assert completion.terminator is not None
        conversation.add([completion.terminator], True)
        conversation.add(reply, False)


TurnSampler: TypeAlias = SingleTurnSampler | MultiTurnSampler


def make_sampler(settings: RewardSettings, sampler: Sampler, encoder: Encoder | None, vocab_size: int) -> TurnSampler:
    """Return the sampler of completions, with the environment of the ``reward:`` section if it has one.

    Args:
        encoder: See :class:`MultiTurnSampler`.
        vocab_size: See :class:`MultiTurnSampler`.
    """
    if settings.environment is None:
        return SingleTurnSampler(sampler)
    assert encoder is not None
    return MultiTurnSampler(settings, sampler, encoder, vocab_size)


if TYPE_CHECKING:
    from deltaw.training.causal_objective import CausalObjective


class RewardFeed(RolloutFeed):
    """Feeds completions of a step's prompts.

    Args:
        objective: Objective of the completions, with a :class:`PolicyLoss`.
        batcher: Batcher of the completions.
        sampler: Samples completions from the current model. Not needed in a dry run.
        settings: The ``reward:`` section.
        seed: Seed of the training.
        reference: Context in which the model is the reference model.
        processes: Processes of the training.

    Attributes:
        scorer: Scores completions.
    """

    row_class = Rollout

    def __init__(
        self,
        objective: CausalObjective,
        batcher: Any,
        sampler: TurnSampler | None,
        settings: RewardSettings,
        *,
        seed: int,
        reference: Callable[[], AbstractContextManager[None]],
        processes: Reducer = SINGLE_PROCESS,
    ) -> None:
        super().__init__(objective, batcher, processes)
        self.settings = settings
        self.sampler = sampler
        self.steps_per_round = settings.updates
        self._seed = seed
        self._reference = reference
        self.scorer = Scorer(settings)

    def worst_case_rows(self, prompts: Prompts) -> list[Rollout]:
        """Return completions of maximum size for a dry run: maximum length, and no shared prefix after the prompt."""
        length = self.settings.max_response_tokens
        logprobs = np.zeros(length, np.float32)
        size = self.settings.group
        group = [SampledCompletion(np.full(length, n, np.int64), "", None, logprobs) for n in range(size)]
        return [self.complete(prompt, completion) for prompt in prompts for completion in group]

    def close(self) -> None:
        self.scorer.close()
        if self.sampler is not None:
            self.sampler.close()
        super().close()

    def has_gradient(self, row: Rollout) -> bool:
        return row.advantage != 0 or self.settings.beta > 0

    def counts_for_check(self, row: Rollout) -> bool:
        return row.advantage != 0  # the gradient of the divergence is 0 as long as the model equals the reference

    def generate(self, prompts: Prompts, rollout_index: int) -> list[Rollout]:
        """Return completions of the prompts of a step, grouped by prompt.

        A group with equal rewards has no advantage, so it is sampled again up to
        ``settings.redraw`` times (dynamic sampling, DAPO section 3.2).

        Raises:
            UserError: if a reward function fails.
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
        settings = self.settings
        group = self.settings.group
        rank = self.processes.rank
        size = self.processes.size
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
        parts = [json.loads(text) for text in self.processes.texts(json.dumps(local_results))]
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
        rows = [self.complete(*pair) for pair in zip(prompts, completions, strict=True)]
        if settings.beta:
            with self._reference():
                rows = self._with_logprobs(rows, "base_logprobs")
            if settings.loss == "rloo":
                rows = self._with_logprobs(rows, "old_logprobs")
                totals = totals - settings.beta * np.array([float(np.sum(_log_ratios(row))) for row in rows])
        if settings.updates > 1 and rows[0].old_logprobs is None:
            rows = self._with_logprobs(rows, "old_logprobs")
        values = advantages(totals.reshape(-1, settings.group), settings.loss, settings.loss != "dr_grpo").reshape(-1)
        is_truncated = np.array([not completion.ended for completion in completions])
        if settings.mask_cut:
            values = np.where(is_truncated, 0.0, values)
        self._log(rewards, totals, rows, is_truncated, values)
        self.extremes = self.scorer.extremes(prompts, completions, rewards)
        return [replace(row, advantage=float(value)) for row, value in zip(rows, values, strict=True)]

    def _log(
        self,
        rewards: np.ndarray,
        totals: np.ndarray,
        rows: Sequence[Rollout],
        is_truncated: np.ndarray,
        advantages: np.ndarray,
    ) -> None:
        """Add metrics of the completions to the step. Errors are half the width of the 95% interval over groups."""
        groups = totals.reshape(-1, self.settings.group)
        metrics = {}
        for name, values in self.scorer.by_name(rewards).items():
            metrics[name] = float(values.mean())
            if (bounds := mean_interval(values.reshape(groups.shape).mean(1))) is not None:
                metrics[name.replace("reward", "reward_error", 1)] = bounds[1] - metrics[name]
        metrics["reward_std"] = float(groups.std(1).mean())
        metrics["groups_with_advantage"] = float(advantages.reshape(groups.shape).any(1).mean())
        metrics["length"] = float(np.mean([row.label_count for row in rows]))
        metrics["truncated_share"] = float(is_truncated.mean())
        if self.settings.beta and self.settings.loss == "rloo":  # the other losses report it
            metrics["kl"] = float(np.concatenate(list(map(_log_ratios, rows))).mean())
        self.step_metrics = metrics

    def complete(self, prompt: Example, completion: SampledCompletion, **fields: Any) -> Rollout:
        logprobs = completion.logprobs
        is_generated = completion.is_generated
        if logprobs is not None and is_generated is not None:
            logprobs = logprobs[is_generated]
        rollout: Rollout = super().complete(prompt, completion, engine_logprobs=logprobs, **fields)
        return rollout

    @torch.no_grad()
    def _with_logprobs(self, rows: Sequence[Rollout], name: str) -> list[Rollout]:
        """Return the rows with the current model's log-probabilities of their labels, computed as in training."""
        logprobs: dict[int, np.ndarray] = {}
        objective: Any = self.objective
        for batch in self.batcher.batches(rows):
            batch_logprobs = RowLogProbs.of(batch, objective.token_log_probs(batch))
            row_indices = batch_logprobs.row.cpu().numpy()
            values = batch_logprobs.values[batch_logprobs.index].float().cpu().numpy()
            logprobs |= {id(row): values[row_indices == index] for index, row in enumerate(batch_logprobs.rows)}
        fields: list[dict[str, Any]] = [{name: logprobs[id(row)]} for row in rows]
        return [replace(row, **row_fields) for row, row_fields in zip(rows, fields, strict=True)]


def _log_ratios(row: Rollout) -> np.ndarray:
    """Return the log-ratios of a row's labels under the sampling and the base model."""
    assert row.old_logprobs is not None and row.base_logprobs is not None
    return row.old_logprobs - row.base_logprobs
