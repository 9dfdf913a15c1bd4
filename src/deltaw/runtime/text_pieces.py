"""The text of a model's tokens, given out as it becomes certain.

Decoding each token alone would break characters of several tokens and lose spaces, decoding everything each
time would cost the square of the length. So a few tokens are decoded together.

It knows nothing of terminators and stop strings.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a character that has begun and not ended decodes to
_HELD = 16


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The tokens as text, special tokens left out."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


class TextPieces:
    """Turns tokens into text, one at a time; the pieces together are the whole text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Tokens whose text is not all given out, and those before them that a tokenizer needs for context.
        self._held: list[int] = []
        self._given = ""  # the text of ``_held`` that has been given out

    def add(self, token: int) -> str:
        """The text that this token makes certain, perhaps none."""
        self._held.append(token)
        text = text_of(self._tokenizer, self._held)
        if text.endswith(UNFINISHED):
            return ""
        piece = text[len(self._given) :]
        self._given = text
        last = text_of(self._tokenizer, self._held[-1:])
        if len(self._held) > _HELD and UNFINISHED not in last:
            # Start anew with the last token alone, whose text then stands for what was given.
            self._held, self._given = self._held[-1:], last
        return piece

    def end(self) -> str:
        """The rest of the text, where no more tokens come."""
        piece = text_of(self._tokenizer, self._held)[len(self._given) :]
        self._held, self._given = [], ""
        return piece
