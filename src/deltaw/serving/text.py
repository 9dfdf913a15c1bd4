"""The text of one request as its tokens come: valid, and cut at its first stop string.

A stop string may begin in one token and end in another. So text that could still become one is held back
until the next tokens tell.

It knows neither terminators nor the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from deltaw.errors import UserError
from deltaw.runtime.text_pieces import TextPieces

MOST_STOPS = 16
LONGEST_STOP = 1024


def validate_stops(stop: Sequence[str]) -> None:
    """Check a request's stop strings.

    Raises:
        UserError: one is empty or longer than 1,024 characters, or there are more than 16.
    """
    if len(stop) > MOST_STOPS:
        raise UserError(f"there are {len(stop)} stop strings", where="stop", hint=f"at most {MOST_STOPS}")
    for text in stop:
        if not text:
            raise UserError("a stop string is empty", where="stop", hint="give it a character at least")
        if len(text) > LONGEST_STOP:
            raise UserError(
                f"a stop string has {len(text)} characters", where="stop", hint=f"at most {LONGEST_STOP}"
            )


class WrittenText:
    """The text of one request: tokens in, pieces out; together they are the text up to the first stop string.

    Attributes:
        stopped: a stop string has come, and the text has ended.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._pieces = TextPieces(tokenizer)
        self._stop = _StopStrings(stop)

    def add(self, token: int) -> str:
        """The text that this token makes certain; none once the text is ``stopped``."""
        if self.stopped:
            return ""
        piece, self.stopped = self._stop.add(self._pieces.add(token))
        return piece

    def end(self) -> str:
        """The rest of the text, where no more tokens come."""
        if self.stopped:
            return ""
        piece, self.stopped = self._stop.add(self._pieces.end())
        return piece if self.stopped else piece + self._stop.rest()


class _StopStrings:
    """Holds back what could become a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """What can be given out after more text, and whether a stop string ended it."""
        held = self._held + text
        found = [at for at in (held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        keep = self._could_begin(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def rest(self) -> str:
        """What was held back, where no more text comes."""
        held, self._held = self._held, ""
        return held

    def _could_begin(self, text: str) -> int:
        """The length of the longest end of ``text`` that begins a stop string."""
        longest = min(len(text), max((len(stop) for stop in self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
