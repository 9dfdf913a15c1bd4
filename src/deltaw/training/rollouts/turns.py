"""Sampling of completions, in one response or in alternation with an environment.

Generated tokens are used unchanged. Messages of the environment are rendered by the chat template and are not labels.
All conversations of a rollout run at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from deltaw.data.messages import Message
from deltaw.data.prompts import TokenizedPrompt, prompt_messages
from deltaw.data.templates import Encoder
from deltaw.errors import UserError
from deltaw.runtime.generation import SampledCompletion, Sampler, SamplingParams, derive_seed
from deltaw.task_settings import RewardSettings
from deltaw.training.rollouts.environments import Environments


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
        response, logprobs = np.array(self.response, np.int64), np.array(self.logprobs, np.float32)
        turns = {"prompt": self.tokens, "is_generated": np.array(self.is_generated, bool), "reward": self.reward}
        return SampledCompletion(response, self.text, self.terminator, logprobs, **turns)  # type: ignore[arg-type]


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
        self._settings, self._sampler, self._encoder, self._known = settings, sampler, encoder, vocab_size
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
        tokens, limit = prompt.tokens, len(prompt.tokens) + self._settings.max_response_tokens
        if start.text or start.tools:
            if start.text:
                messages[-1] = {"role": "user", "content": start.text}
            tools = (*tools, *start.tools)
            virtual = tokens[tokens >= self._known]
            tokens = np.append(virtual, self._encoder.prompt(messages, tools)).astype(tokens.dtype)
        if len(tokens) + self._settings.max_new_tokens > limit:
            message = f"the environment's first message needs {len(tokens)} tokens, which exceeds the limit"
            raise UserError(message, location=location, hint="raise reward.environment_tokens")
        return _Conversation(index, prompt, messages, tools, tokens, limit)

    def _advance(self, conversation: _Conversation, completion: SampledCompletion, *, last: bool) -> None:
        """Add the model's turn and the response of the environment."""
        conversation.add(completion.tokens.tolist(), True, completion.logprobs)
        conversation.text, conversation.terminator = completion.text, completion.terminator
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
