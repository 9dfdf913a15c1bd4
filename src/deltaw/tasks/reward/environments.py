"""Environments of user code: respond to the model over several turns and reward its texts.

A run sets a class (``reward.environment: FILE.py:CLASS``) that implements :class:`Environment`. Its objects live in a
worker process with a time limit per call. :class:`Environments` sends the requests. Run as a program, this module is
the worker (:mod:`deltaw.tasks.reward.rewards.worker`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from deltaw.data.messages import Message
from deltaw.errors import UserError
from deltaw.tasks.reward.rewards.function_files import load_function
from deltaw.tasks.reward.rewards.worker import RequestHandler, RewardWorker, answer_requests, as_number, describe_error
from deltaw.tasks.reward.settings import RewardSettings

_ROLES = ("user", "tool")


class Environment(Protocol):
    """A conversation with the model. One object is created per completion of a prompt.

    A class may define ``tools``, descriptions of functions in the format of chat templates. Tool calls are part of the
    model's text, in the format of its template.
    """

    def reset(self, row: Mapping[str, Any]) -> str | None:
        """Return the message that replaces the last turn of the prompt. Without a text the prompt is used.

        Args:
            row: Columns of the prompt.
        """
        ...

    def step(self, text: str) -> tuple[str | Mapping[str, str], float, bool]:
        """Respond to a text of the model.

        Returns:
            The next message, a reward, and True if this was the last turn. The message is a user message as text, or
            ``{"role": "tool", "content": …}``.
        """
        ...


@dataclass(frozen=True)
class EnvironmentStart:
    """Start of a conversation.

    Attributes:
        text: First message, or an empty string to use the prompt of the row.
        tools: Tools of the class.
    """

    text: str
    tools: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class EnvironmentStep:
    """Response of an environment to a text.

    Attributes:
        message: Next message.
        reward: Reward of the text.
        done: True if the conversation is finished.
    """

    message: Message
    reward: float
    done: bool


class Environments:
    """Environments of a rollout, in a worker process that starts with the first request.

    Args:
        settings: The ``reward:`` section, with an environment.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self._settings = settings
        self._worker = RewardWorker(__name__, str(settings.environment), settings.seconds)

    def reset(self, number: int, row: int, columns: Mapping[str, Any]) -> EnvironmentStart:
        """Start a conversation. Number 0 discards all previous conversations.

        Args:
            number: Number of the conversation.
            row: Number of the row in its file, for messages.
            columns: Columns of the row.

        Raises:
            UserError: if the environment raises, exceeds ``reward.seconds``, exits, or returns an invalid value.
        """
        answer = self._request({"number": number, "row": dict(columns)}, row)
        text = answer["text"]
        tools = answer["tools"]
        if not (text is None or isinstance(text, str)) or not all(isinstance(tool, dict) for tool in tools):
            raise self._error("reset must return a text or None, and tools must be a list of descriptions", row)
        return EnvironmentStart(text or "", tuple(tools))

    def step(self, number: int, row: int, text: str) -> EnvironmentStep:
        """Return the environment's response to a text.

        Raises:
            UserError: as in :meth:`reset`, or if the reward is not a finite number.
        """
        answer = self._request({"number": number, "text": text}, row)
        response = answer["said"]
        reward = answer["reward"]
        message = {"role": "user", "content": response} if isinstance(response, str) else response
        if message is None and answer["done"]:
            message = {"role": "user", "content": ""}
        if not isinstance(message, dict) or message.get("role") not in _ROLES or not _is_text(message.get("content")):
            message = "step must return a text or {'role': 'tool', 'content': …}"
            raise self._error(f"{message}, but returns {repr(response)[:200]}", row)
        if not isinstance(reward, float) or not math.isfinite(reward):
            raise self._error(f"the reward is {reward!r}", row)
        return EnvironmentStep(message, reward, answer["done"])

    def close(self) -> None:
        """Stop the worker."""
        self._worker.close()

    def _request(self, request: dict[str, Any], row: int) -> dict[str, Any]:
        answer = self._worker.request(request, self._settings.seconds)
        if answer is None:
            raise self._error(f"it {self._worker.failure}", row, "correct it, or raise reward.seconds")
        if "error" in answer:
            raise self._error(answer["error"], row, answer.get("hint"))
        return answer

    def _error(self, message: str, row: int, hint: str | None = None) -> UserError:
        return UserError(f"the environment: {message}", location=f"{self._settings.environment}, row {row}", hint=hint)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def make_handler(environment_class: Callable[[], Environment]) -> RequestHandler:
    """Return the handler of requests, which creates objects of the class."""
    environments: dict[int, Environment] = {}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        number = request["number"]
        try:
            if "row" in request:
                if number == 0:
                    environments.clear()
                environments[number] = environment_class()
                text = environments[number].reset(request["row"])
                return {"text": text, "tools": list(getattr(environment_class, "tools", None) or ())}
            message, reward, done = environments[number].step(request["text"])
            return {"said": message, "reward": as_number(reward), "done": bool(done)}
        except Exception as error:  # user code can raise any exception
            return {"error": f"it raised {describe_error(error)}"}

    return answer


def main() -> None:
    """Run the worker."""
    answer_requests(lambda: make_handler(load_function(sys.argv[1], "reward.environment")))
