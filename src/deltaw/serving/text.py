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
    """The text of one request: tokens in, pieces out; together they are the text before its first stop
    string.

    The first is the one that is complete first; of two that end together, the longer.

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
    """Holds back what could become a stop string: the longest end of the text that begins one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [_StopString(one) for one in stop]
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """What can be given out after more text, and whether a stop string ended it."""
        if not self._stop:
            return text, False
        start = len(self._held)
        self._held += text
        for end, character in enumerate(text, start + 1):
            complete = [len(one.text) for one in self._stop if one.add(character)]
            if complete:
                piece, self._held = self._held[: end - max(complete)], ""
                return piece, True
        keep = max(one.begun for one in self._stop)
        piece = self._held[: len(self._held) - keep]
        self._held = self._held[len(piece) :]
        return piece, False

    def rest(self) -> str:
        """What was held back, where no more text comes."""
        held, self._held = self._held, ""
        return held


class _StopString:
    """Finds one string in a text that comes a character at a time, as Knuth, Morris and Pratt do: the work
    for a character does not grow with what came before.

    Attributes:
        begun: how many characters of it the text so far ends with.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.begun = 0
        # For each beginning of it, the longest shorter beginning that this one ends with.
        self._shorter = [0] * (len(text) + 1)
        for length in range(1, len(text)):
            self._shorter[length + 1] = self._longer(self._shorter[length], text[length])

    def add(self, character: str) -> bool:
        """Whether the text ends with it after this character; then no more may be added."""
        self.begun = self._longer(self.begun, character)
        return self.begun == len(self.text)

    def _longer(self, begun: int, character: str) -> int:
        while begun and self.text[begun] != character:
            begun = self._shorter[begun]
        return begun + 1 if self.text[begun] == character else 0
