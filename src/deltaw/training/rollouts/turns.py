"""Completions of several turns: the model and an environment write by turns, all conversations at once.

The tokens that the model wrote stay as they are; what the environment says is rendered by the chat template behind
them, and is no label. Knows no engine and no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from deltaw.data.messages import Message
from deltaw.data.prompts import Prompt, asked
from deltaw.data.templates import Encoder
from deltaw.errors import UserError
from deltaw.runtime.generation import Drawing, Drawn, Sampler, seed_of
from deltaw.task_settings import RewardSettings
from deltaw.training.rollouts.environments import Environments


@dataclass
class _Conversation:
    """One that is going on.

    Attributes:
        number: its own. prompt: of the row. messages, tools: what the model was asked first.
        tokens: int ids of that. limit: the most tokens of all.
        behind, written, logprobs: the tokens that follow, whether the model wrote each, and its log-probability, NaN
            where the engine gave none.
        text, terminator: of the model's last turn. reward: the sum so far. goes_on: whether the model is to write.
    """

    number: int
    prompt: Prompt
    messages: list[Message]
    tools: tuple[Message, ...]
    tokens: np.ndarray
    limit: int
    behind: list[int] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    terminator: int | None = None
    reward: float = 0.0
    goes_on: bool = True

    def add(self, tokens: Sequence[int], written: bool, logprobs: np.ndarray | None = None) -> None:
        self.behind += map(int, tokens)
        self.written += [written] * len(tokens)
        self.logprobs += [np.nan] * len(tokens) if logprobs is None else logprobs.tolist()

    def drawn(self) -> Drawn:
        behind, logprobs = np.array(self.behind, np.int64), np.array(self.logprobs, np.float32)
        turns = {"prompt": self.tokens, "written": np.array(self.written, bool), "reward": self.reward}
        return Drawn(behind, self.text, self.terminator, logprobs, **turns)  # type: ignore[arg-type]


class OneTurn:
    """Draws completions of prompts as ``sampler`` writes them."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __call__(self, prompts: Sequence[Prompt], drawing: Drawing) -> list[Drawn]:
        """A completion of each prompt, in their order."""
        return self._sampler([prompt.tokens for prompt in prompts], drawing)

    def close(self) -> None:
        """Nothing is held."""


class Turns:
    """Draws completions of prompts in an environment.

    Args:
        settings: the ``reward:`` section, with an environment. sampler: writes a turn of each conversation.
        encoder: renders messages as for training. known: token ids are below it, except virtual ones.
    """

    def __init__(self, settings: RewardSettings, sampler: Sampler, encoder: Encoder, known: int) -> None:
        self._settings, self._sampler, self._encoder, self._known = settings, sampler, encoder, known
        self._environments = Environments(settings)

    def __call__(self, prompts: Sequence[Prompt], drawing: Drawing) -> list[Drawn]:
        """A completion of each prompt, through its last turn, in their order.

        Raises:
            UserError: the environment fails, or the chat template does not accept what it says.
        """
        every = [self._begun(number, prompt) for number, prompt in enumerate(prompts)]
        for turn in range(self._settings.turns):
            going = [one for one in every if one.goes_on]
            if not going:
                break
            seeds = tuple(seed_of(drawing.seeds[one.number], turn) for one in going) if drawing.seeds else ()
            contexts = [np.append(one.tokens, one.behind).astype(np.int32) for one in going]
            for one, drawn in zip(going, self._sampler(contexts, replace(drawing, seeds=seeds)), strict=True):
                self._took(one, drawn, last=turn == self._settings.turns - 1)
        return [one.drawn() for one in every]

    def close(self) -> None:
        """End the environments."""
        self._environments.close()

    def _begun(self, number: int, prompt: Prompt) -> _Conversation:
        where = f"row {prompt.row}"
        if prompt.active_from is not None:
            what = "an activated adapter would begin anew in each turn"
            raise UserError(what, where="reward.environment", hint="train another method, or without an environment")
        begun = self._environments.reset(number, prompt.row, prompt.columns)
        messages, tools = asked(dict(prompt.columns), where)
        tokens, limit = prompt.tokens, len(prompt.tokens) + self._settings.most_tokens
        if begun.text or begun.tools:
            if begun.text:
                messages[-1] = {"role": "user", "content": begun.text}
            tools = (*tools, *begun.tools)
            virtual = tokens[tokens >= self._known]
            tokens = np.append(virtual, self._encoder.prompt(messages, tools)).astype(tokens.dtype)
        if len(tokens) + self._settings.max_new_tokens > limit:
            what = f"what the environment asks first takes {len(tokens)} tokens, more than there is room for"
            raise UserError(what, where=where, hint="raise reward.environment_tokens")
        return _Conversation(number, prompt, messages, tools, tokens, limit)

    def _took(self, one: _Conversation, drawn: Drawn, *, last: bool) -> None:
        """Add what the model wrote, and what the environment says of it."""
        one.add(drawn.tokens.tolist(), True, drawn.logprobs)
        one.text, one.terminator = drawn.text, drawn.terminator
        said = self._environments.step(one.number, one.prompt.row, drawn.text)
        one.reward += said.reward
        one.goes_on = not (last or said.done or drawn.terminator is None)
        if not one.goes_on:
            return
        reply = self._encoder.after_answer(one.messages, said.message, one.tools)
        length = len(one.tokens) + len(one.behind) + 1 + len(reply)
        if length + self._settings.max_new_tokens > one.limit:  # no room for another turn
            one.goes_on = False
            return
        assert drawn.terminator is not None
        one.add([drawn.terminator], True)
        one.add(reply, False)


def turns_of(settings: RewardSettings, sampler: Sampler, encoder: Encoder | None, known: int) -> OneTurn | Turns:
    """What writes completions: with the environment of the ``reward:`` section, if it names one.

    Args:
        encoder, known: see :class:`Turns`.
    """
    if settings.environment is None:
        return OneTurn(sampler)
    assert encoder is not None
    return Turns(settings, sampler, encoder, known)
