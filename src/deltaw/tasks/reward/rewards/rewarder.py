"""Reward functions in worker processes that can be killed at any time.

:class:`Rewarder` sends the requests. :func:`main` runs the worker
(:mod:`deltaw.tasks.reward.rewards.worker`). It imports torch and transformers only for reward models.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from deltaw.errors import UserError
from deltaw.tasks.reward.rewards import load_reward, required_columns
from deltaw.tasks.reward.rewards.functions import Completion, Reward, settings_location
from deltaw.tasks.reward.rewards.worker import RequestHandler, RewardWorker, answer_requests, as_number, describe_error
from deltaw.tasks.reward.settings import RewardFunction


class Rewarder:
    """A reward function in a worker process, which starts with the first request.

    Args:
        settings: Settings of the function.
    """

    def __init__(self, settings: RewardFunction) -> None:
        self.settings = settings
        values = settings.model_dump_json(by_alias=True, exclude_defaults=True)
        self._worker = RewardWorker(__name__, values, settings.seconds)

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """Return the reward of each completion, with None as 0.

        Raises:
            UserError: if the function raises, exits, exceeds ``seconds``, or returns a value that is not a finite
                number.
                The error names the row.
        """
        if not completions:
            return []
        answer = self._request(completions)
        if answer is None and len(completions) > 1:  # find the row that causes the failure
            for completion in completions:
                if self._request([completion]) is None:
                    raise self._timeout_error(completion.row)
        if answer is None:
            raise self._timeout_error(completions[0].row)
        self._raise_error(answer)
        return self._validated(answer["rewards"], completions)

    def check(self, rows: Iterable[Completion], *, call: bool) -> None:
        """Check, before a model is loaded, that the rows have the columns that the function needs.

        Args:
            rows: Rows of the run with plausible completions.
            call: True to also call the function with the first row that has all of these columns.

        Raises:
            UserError: if a column is missing, or the function fails as in :meth:`__call__`.
        """
        answer = self._worker.request(None, self.settings.seconds)
        if answer is None:
            raise self._timeout_error(None)
        self._raise_error(answer)
        required = set(answer["needs"])
        available = set[str]()
        sample = list[Completion]()
        for completion in rows:
            has_answer = bool(completion.answer and completion.answer.strip())
            provided = completion.columns.keys() - {"answer"} | ({"answer"} if has_answer else set())
            available |= provided
            sample = sample or [completion]
            if required <= provided:
                sample = [completion]
                break
        if missing := sorted(required - available):
            hint = f"the rows have: {', '.join(sorted(available))}"
            message = f"the reward needs '{missing[0]}', which no row has"
            raise UserError(message, location=self._location(None), hint=hint)
        if call:
            self(sample)

    def close(self) -> None:
        """Stop the worker."""
        self._worker.close()

    def _request(self, completions: Sequence[Completion]) -> dict[str, Any] | None:
        """Return the worker's answer, or None if it exits or exceeds its time limit."""
        return self._worker.request([asdict(c) for c in completions], self.settings.timeout_for(len(completions)))

    def _raise_error(self, answer: dict[str, Any]) -> None:
        """Raise the error of an answer, if any."""
        if "error" in answer:
            raise UserError(answer["error"], location=self._location(answer.get("row")), hint=answer.get("hint"))

    def _timeout_error(self, row: int | None) -> UserError:
        hint = "correct the function, or raise its 'seconds'"
        return UserError(f"the reward {self._worker.failure}", location=self._location(row), hint=hint)

    def _location(self, row: int | None) -> str:
        return settings_location(self.settings) + ("" if row is None else f", row {row}")

    def _validated(self, rewards: Any, completions: Sequence[Completion]) -> list[float]:
        """Return the rewards after checking their number and values.

        Raises:
            UserError: if they are invalid.
        """
        if not isinstance(rewards, list) or len(rewards) != len(completions):
            count = len(rewards) if isinstance(rewards, list) else "no"
            message = f"the reward returned {count} numbers for {len(completions)} rows"
            raise UserError(message, location=self._location(None), hint="return one number for each completion")
        for value, completion in zip(rewards, completions, strict=True):
            if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
                hint = "return a finite number, or None if the reward does not apply"
                raise UserError(f"the reward is {value!r}", location=self._location(completion.row), hint=hint)
        return [0.0 if value is None else float(value) for value in rewards]


def _answer(reward: Reward, completions: list[Completion]) -> dict[str, Any]:
    """Return the rewards, or the error of the function and the row that causes it."""
    try:
        rewards = list(reward(completions))
        return {"rewards": [None if value is None else as_number(value) for value in rewards]}
    except UserError as error:
        return {"error": error.message, "hint": error.hint}
    except Exception as error:
        for completion in completions if len(completions) > 1 else []:
            single = _answer(reward, [completion])
            if "error" in single:
                return {**single, "row": completion.row}
        row = completions[0].row if len(completions) == 1 else None
        return {"error": f"the reward raised {describe_error(error)}", "row": row}


def _make_handler() -> RequestHandler:
    settings = RewardFunction.model_validate_json(sys.argv[1])
    reward = load_reward(settings)

    def handler(completions: Any) -> dict[str, Any]:
        if completions is not None:
            return _answer(reward, [Completion(**completion) for completion in completions])
        try:
            return {"needs": required_columns(settings, reward)}
        except UserError as error:
            return {"error": error.message, "hint": error.hint}

    return handler


def main() -> None:
    """Run the worker."""
    answer_requests(_make_handler)
