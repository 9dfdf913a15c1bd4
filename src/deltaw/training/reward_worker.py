"""A reward function in a process of its own, which another process asks and may end at any time.

The asking side is :class:`Rewarder`. This module run as a program is the answering side: it reads lines of JSON from
standard input, and writes one line for each to what was standard output, which the function itself cannot reach: what
it prints goes to standard error. It imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO, Any

from deltaw.errors import UserError
from deltaw.settings import RewardFunction
from deltaw.training.rewards import Reward, Scored, reward_of

# A line of an answer is at most so long; what is longer is no list of numbers.
_MOST_BYTES = 1 << 24
# Seconds that a worker may take to start, on a busy machine.
_TO_START = 60.0


class Rewarder:
    """One reward function, in a worker process that starts when it is first asked.

    Args:
        settings: which function, and what it may take.

    Attributes:
        settings: as given.
    """

    def __init__(self, settings: RewardFunction) -> None:
        self.settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[bytes] = queue.Queue()

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
                    raise self._late(one)
        if answer is None:
            raise self._late(given[0])
        if "error" in answer:
            raise UserError(answer["error"], where=self._place(answer.get("row")), hint=answer.get("hint"))
        return self._numbers(answer["rewards"], given)

    def close(self) -> None:
        """End the worker."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _asked(self, given: Sequence[Scored]) -> dict[str, Any] | None:
        """What the worker answers; None where it does not within its time, or has ended."""
        process = self._process or self._start()
        if process is None:
            return None
        line = json.dumps([asdict(one) for one in given], default=str).encode() + b"\n"
        try:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
            answer = self._answers.get(timeout=self.settings.seconds)
        except (queue.Empty, OSError):
            answer = b""
        if not answer:
            self.close()
            return None
        return json.loads(answer)

    def _start(self) -> subprocess.Popen[bytes] | None:
        """A worker that has read its function; None where it does not come to that."""
        words = [sys.executable, "-m", "deltaw.training.reward_worker", self.settings.model_dump_json(by_alias=True)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(words, start_new_session=os.name != "nt", **pipes)
        self._answers = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()
        try:
            if self._answers.get(timeout=_TO_START + self.settings.seconds):
                return self._process
        except queue.Empty:
            pass
        self.close()
        return None

    def _late(self, one: Scored) -> UserError:
        what = f"the reward gave no answer within {self.settings.seconds:g} seconds, or ended its process"
        return UserError(what, where=self._place(one.row), hint="mend the function, or raise its 'seconds'")

    def _place(self, row: int | None) -> str:
        return f"reward.functions, {self.settings.name}" + ("" if row is None else f", row {row}")

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


def _read(pipe: IO[bytes], answers: queue.Queue[bytes]) -> None:
    """Pass on lines until the pipe ends, which is an empty one."""
    while line := pipe.readline(_MOST_BYTES):
        answers.put(line)
    answers.put(b"")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker with what it started."""
    if os.name == "nt":
        process.kill()
    else:
        try:
            os.killpg(process.pid, 9)
        except ProcessLookupError:
            process.kill()
    process.wait()


def _answer(reward: Reward, given: list[Scored]) -> dict[str, Any]:
    """Rewards, or what the function raised and for which row."""
    try:
        found = list(reward(given))
        return {"rewards": [None if value is None else _plain(value) for value in found]}
    except UserError as error:
        return {"error": error.what, "hint": error.hint}
    except Exception as error:
        for one in given if len(given) > 1 else []:
            alone = _answer(reward, [one])
            if "error" in alone:
                return {**alone, "row": one.row}
        row = given[0].row if len(given) == 1 else None
        return {"error": f"the reward raised {type(error).__name__}: {error}", "row": row}


def _plain(value: Any) -> Any:
    """A number as JSON has it; what is none, as its text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return repr(value)[:100]


def main() -> None:
    """Answer until standard input ends."""
    own = os.getpid()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    settings = RewardFunction.model_validate_json(sys.argv[1])
    try:
        reward = reward_of(settings)
        failed = None
    except UserError as error:
        failed = {"error": error.what, "hint": error.hint}
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        given = [Scored(**one) for one in json.loads(line)]
        answer = failed or _answer(reward, given)
        if os.getpid() != own:  # the function forked, and this is the other one
            os._exit(0)
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
