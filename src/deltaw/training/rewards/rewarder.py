"""A reward function in a process of its own, which another process asks and may end at any time.

The asking side is :class:`Rewarder`; this module run as a program is the answering side
(:mod:`deltaw.training.rewards.worker`). It imports neither torch nor transformers, unless a reward is a model.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from deltaw.errors import UserError
from deltaw.task_settings import RewardFunction
from deltaw.training.rewards import Reward, required_columns, reward_of
from deltaw.training.rewards.base import Scored, place_of
from deltaw.training.rewards.worker import Answering, Worker, answer_requests, as_number, described


class Rewarder:
    """One reward function, in a worker process that starts when it is first asked.

    Args:
        settings: which function, and what it may take.

    Attributes:
        settings: as given.
    """

    def __init__(self, settings: RewardFunction) -> None:
        self.settings = settings
        self._worker = Worker(
            __name__, settings.model_dump_json(by_alias=True, exclude_defaults=True), settings.seconds
        )

    def __call__(self, given: Sequence[Scored]) -> list[float]:
        """The reward of each completion, None as 0.

        Raises:
            UserError: the function raises, ends its process, takes longer than ``seconds`` or gives what is no
                finite number; with the row.
        """
        if not given:
            return []
        answer = self._asked(given)
        if answer is None and len(given) > 1:  # one of them is to blame
            for one in given:
                if self._asked([one]) is None:
                    raise self._late(one.row)
        if answer is None:
            raise self._late(given[0].row)
        self._refuse(answer)
        return self._numbers(answer["rewards"], given)

    def check(self, rows: Iterable[Scored], *, call: bool) -> None:
        """Check, before a model is loaded, that the rows have the columns that the function needs.

        Args:
            rows: Rows of the run with plausible completions.
            call: Also call the function, with the first row that has all of these columns.

        Raises:
            UserError: if a column is missing or if the function cannot be used, as in :meth:`__call__`.
        """
        answer = self._worker.ask(None, self.settings.seconds)
        if answer is None:
            raise self._late(None)
        self._refuse(answer)
        needs, known, given = set(answer["needs"]), set[str](), list[Scored]()
        for one in rows:
            provided = one.columns.keys() | ({"answer"} if one.answer is not None else set())
            known |= provided
            given = given or [one]
            if needs <= provided:
                given = [one]
                break
        if missing := sorted(needs - known):
            hint = f"the rows have: {', '.join(sorted(known))}"
            raise UserError(f"the reward needs '{missing[0]}', which no row has", where=self._place(None), hint=hint)
        if call:
            self(given)

    def close(self) -> None:
        """End the worker."""
        self._worker.close()

    def _asked(self, given: Sequence[Scored]) -> dict[str, Any] | None:
        """What the worker answers; None where it does not within its time, or has ended."""
        return self._worker.ask([asdict(one) for one in given], self.settings.seconds_for(len(given)))

    def _refuse(self, answer: dict[str, Any]) -> None:
        """Raise the error that an answer contains, if there is one."""
        if "error" in answer:
            raise UserError(answer["error"], where=self._place(answer.get("row")), hint=answer.get("hint"))

    def _late(self, row: int | None) -> UserError:
        hint = "correct the function, or raise its 'seconds'"
        return UserError(f"the reward {self._worker.failure}", where=self._place(row), hint=hint)

    def _place(self, row: int | None) -> str:
        return place_of(self.settings) + ("" if row is None else f", row {row}")

    def _numbers(self, rewards: Any, given: Sequence[Scored]) -> list[float]:
        """Rewards that are as many as they should be, and numbers.

        Raises:
            UserError: they are not.
        """
        if not isinstance(rewards, list) or len(rewards) != len(given):
            what = (
                f"the reward gave {len(rewards) if isinstance(rewards, list) else 'no'} numbers for {len(given)} rows"
            )
            raise UserError(what, where=self._place(None), hint="give one number for each completion")
        for value, one in zip(rewards, given, strict=True):
            if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
                hint = "give a finite number, or None where it does not apply"
                raise UserError(f"the reward is {value!r}", where=self._place(one.row), hint=hint)
        return [0.0 if value is None else float(value) for value in rewards]


def _answer(reward: Reward, given: list[Scored]) -> dict[str, Any]:
    """Rewards, or what the function raised and for which row."""
    try:
        found = list(reward(given))
        return {"rewards": [None if value is None else as_number(value) for value in found]}
    except UserError as error:
        return {"error": error.what, "hint": error.hint}
    except Exception as error:
        for one in given if len(given) > 1 else []:
            alone = _answer(reward, [one])
            if "error" in alone:
                return {**alone, "row": one.row}
        row = given[0].row if len(given) == 1 else None
        return {"error": f"the reward raised {described(error)}", "row": row}


def _answering() -> Answering:
    settings = RewardFunction.model_validate_json(sys.argv[1])
    reward = reward_of(settings)

    def answering(given: Any) -> dict[str, Any]:
        if given is not None:
            return _answer(reward, [Scored(**one) for one in given])
        try:
            return {"needs": required_columns(settings, reward)}
        except UserError as error:
            return {"error": error.what, "hint": error.hint}

    return answering


if __name__ == "__main__":
    answer_requests(_answering)
