"""The text of a model's tokens, given out as it becomes certain.

Decoding each token alone would break characters of several tokens and lose spaces, decoding everything each
time would cost the square of the length. So a few tokens are decoded together.

It knows nothing of terminators and stop strings.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

# What a character decodes to that has begun and not ended, or is none.
UNFINISHED = "\ufffd"
_HELD = 16  # tokens that are decoded together, where all of them could be given out
_MOST_HELD = 64  # and where none could: bytes that are no text
# A character has at most four bytes. Tokenizers that decode a run of bytes as one write a mark for each byte
# of an unfinished character, others one for all of them.
_MOST_MARKS = 3


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The tokens as text, special tokens left out."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


class TextPieces:
    """Turns tokens into text, one at a time; the pieces together are the text of all the tokens.

    One exception: where a tokenizer falls back to bytes, and the model writes bytes that are no UTF-8 right
    after ones that are, the tokenizer takes characters back that have been given out. They stay, and the
    marks for them follow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Tokens whose text is not all given out, and those before them that a tokenizer needs for context.
        self._held: list[int] = []
        self._given = ""  # the text of ``_held`` that has been given out

    def add(self, token: int) -> str:
        """The text that this token makes certain, perhaps none."""
        self._held.append(token)
        text = text_of(self._tokenizer, self._held)
        marks = len(text) - len(text.rstrip(UNFINISHED))
        certain = text[: len(text) - min(marks, _MOST_MARKS)]
        piece = ""
        if not marks or certain.startswith(self._given):
            piece, self._given = certain[_in_common(certain, self._given) :], certain
        if len(self._held) > _HELD:
            piece += self._let_go(text)
        return piece

    def end(self) -> str:
        """The rest of the text, where no more tokens come."""
        text = text_of(self._tokenizer, self._held)
        piece = text[_in_common(text, self._given) :]
        self._held, self._given = [], ""
        return piece

    def _let_go(self, text: str) -> str:
        """Go on with the last tokens alone, if they decode to the end of the text; what that gives out.

        Args:
            text: of all tokens that are held.
        """
        # Where it does not begin with what was given, the last character of a run of bytes has not ended.
        counts = (1, *range(8, 12)) if text.startswith(self._given) else ()
        waiting = len(text) - len(self._given)
        # A whole token may stand for itself. Marks may hide that a character began before the tail, so then
        # there must be more characters than marks; of four lengths one begins where a character does.
        for count in counts:
            tail = text_of(self._tokenizer, self._held[-count:])
            enough = UNFINISHED not in tail and tail if count == 1 else len(tail) > _MOST_MARKS
            if enough and text.endswith(tail) and waiting <= len(tail):
                self._held, self._given = self._held[-count:], tail[: len(tail) - waiting]
                return ""
        return self.end() if len(self._held) > _MOST_HELD else ""


def _in_common(one: str, other: str) -> int:
    """How many characters both begin with."""
    if one.startswith(other):
        return len(other)
    return next(n for n, (a, b) in enumerate(zip(one + "\0", other + "\1", strict=False)) if a != b)
