"""Environments: what answers the model's texts over several turns, and rewards them; in a file of the user's own.

A run names a class (``reward.environment: FILE.py:CLASS``) that implements :class:`Environment`. Its objects live in a
worker process with a limit on the time of each call: :class:`Environments` asks; this module run as a program is the
answering side (:mod:`deltaw.training.rewards.worker`).

Knows texts and rows; no model, no tokens, no torch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from deltaw.data.messages import Message
from deltaw.errors import UserError
from deltaw.task_settings import RewardSettings
from deltaw.training.rewards.base import from_file
from deltaw.training.rewards.worker import Answering, Worker, answer_requests, as_number, described

_ROLES = ("user", "tool")


class Environment(Protocol):
    """One conversation with the model; an object is made for each completion of a prompt.

    A class may have ``tools``: descriptions of functions that the model may call, as chat templates take them. What
    calls them is in the model's text, as its template writes calls.
    """

    def reset(self, row: Mapping[str, Any]) -> str | None:
        """What the model is asked in place of the last turn of its prompt; None or empty text for the prompt itself.

        Args:
            row: the columns of the prompt.
        """
        ...

    def step(self, text: str) -> tuple[str | Mapping[str, str], float, bool]:
        """What follows a text of the model: the next message, a reward, and whether this was the last turn.

        The message is the text of a user's, or ``{"role": "tool", "content": …}``.
        """
        ...


@dataclass(frozen=True)
class Begun:
    """What an environment says first: ``text`` (empty for the row's own prompt), and the ``tools`` of its class."""

    text: str
    tools: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Stepped:
    """What an environment says of a text: the ``message`` that comes next, a ``reward``, and whether it is ``done``."""

    message: Message
    reward: float
    done: bool


class Environments:
    """The environments of a rollout, in a worker process that starts when it is first asked.

    Args:
        settings: the ``reward:`` section, with an environment.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self._settings = settings
        self._worker = Worker(__name__, str(settings.environment), settings.seconds)

    def reset(self, number: int, row: int, columns: Mapping[str, Any]) -> Begun:
        """Begin the conversation of this number; 0 forgets all earlier ones.

        Args:
            row: its number in the file, for messages. columns: of the row.

        Raises:
            UserError: the environment raises, takes longer than ``reward.seconds``, ends its process or gives what
                is no text.
        """
        answer = self._asked({"number": number, "row": dict(columns)}, row)
        text, tools = answer["text"], answer["tools"]
        if not (text is None or isinstance(text, str)) or not all(isinstance(tool, dict) for tool in tools):
            raise self._wrong("reset must give a text or None, and tools must be a list of descriptions", row)
        return Begun(text or "", tuple(tools))

    def step(self, number: int, row: int, text: str) -> Stepped:
        """What the environment says of a text.

        Raises:
            UserError: as :meth:`reset`, or the reward is no finite number.
        """
        answer = self._asked({"number": number, "text": text}, row)
        said, reward = answer["said"], answer["reward"]
        message = {"role": "user", "content": said} if isinstance(said, str) else said
        if message is None and answer["done"]:
            message = {"role": "user", "content": ""}
        if not isinstance(message, dict) or message.get("role") not in _ROLES or not _is_text(message.get("content")):
            raise self._wrong(
                f"step must give a text or {{'role': 'tool', 'content': …}}, and gives {repr(said)[:200]}", row
            )
        if not isinstance(reward, float) or not math.isfinite(reward):
            raise self._wrong(f"the reward is {reward!r}", row)
        return Stepped(message, reward, answer["done"])

    def close(self) -> None:
        """End the worker."""
        self._worker.close()

    def _asked(self, request: dict[str, Any], row: int) -> dict[str, Any]:
        answer = self._worker.ask(request, self._settings.seconds)
        if answer is None:
            raise self._wrong(f"it {self._worker.failure}", row, "correct it, or raise reward.seconds")
        if "error" in answer:
            raise self._wrong(answer["error"], row, answer.get("hint"))
        return answer

    def _wrong(self, what: str, row: int, hint: str | None = None) -> UserError:
        return UserError(f"the environment: {what}", where=f"{self._settings.environment}, row {row}", hint=hint)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def answering(kind: Callable[[], Environment]) -> Answering:
    """What answers the requests of :class:`Environments` with objects of this class."""
    begun: dict[int, Environment] = {}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        number = request["number"]
        try:
            if "row" in request:
                if number == 0:
                    begun.clear()
                begun[number] = kind()
                return {"text": begun[number].reset(request["row"]), "tools": list(getattr(kind, "tools", None) or ())}
            said, reward, done = begun[number].step(request["text"])
            return {"said": said, "reward": as_number(reward), "done": bool(done)}
        except Exception as error:  # whatever a foreign class raises
            return {"error": f"it raised {described(error)}"}

    return answer


if __name__ == "__main__":
    answer_requests(lambda: answering(from_file(sys.argv[1], "reward.environment")))
