"""Texts that must match a JSON schema, a regular expression or a grammar: which tokens may come next.

The work is llguidance's. What is added: limits on what a hostile schema may cost, terminators that are the
request's own and are allowed only where the text may end, and errors that a user can read.

It knows neither the model nor how a token is chosen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deltaw.errors import UserError
from deltaw.serving.request import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher

LONGEST_CONSTRAINT = 256 * 1024  # characters


class Grammars:
    """Compiles constraints for one tokenizer. It may be used from several threads.

    Args:
        vocabulary: how many logits the model gives, at least the tokenizer's number of tokens.

    Raises:
        UserError: llguidance is not installed, or the tokenizer is not one of the fast ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        try:
            import llguidance.hf
        except ImportError as error:
            raise UserError(
                "constrained texts need the package llguidance", hint="pip install 'deltaw[serve]'"
            ) from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UserError(
                f"constrained texts need a fast tokenizer, and this is a {type(tokenizer).__name__}",
                where="tokenizer",
                hint="leave the constraint out",
            )
        self.vocabulary = vocabulary
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary)

    def compile(self, constraint: Constraint, ends: Sequence[int]) -> Matcher:
        """A matcher at the start of a text.

        Args:
            ends: the request's terminators; they are allowed where the text may end, and only there.

        Raises:
            UserError: the constraint cannot be read, is too large, or can match no text.
        """
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, _grammar(constraint), log_level=0, limits=limits)
        compiled = Matcher(matcher, self.vocabulary, ends, self._tokenizer.eos_tokens)
        if matcher.is_error() or not compiled.allowed().any():
            reason = (matcher.get_error().splitlines() or ["it matches no text"])[0]
            raise UserError(
                f"the {_NAMES[constraint.kind]} cannot be used: {reason}",
                where=constraint.kind,
                hint="correct it, or make it simpler",
            )
        return compiled


_NAMES = {
    "json_schema": "JSON schema",
    "json_object": "JSON object",
    "regex": "regular expression",
    "grammar": "grammar",
}


def _grammar(constraint: Constraint) -> str:
    """The constraint in llguidance's own form."""
    from llguidance import LLMatcher

    if len(constraint.value) > LONGEST_CONSTRAINT:
        raise UserError(
            f"the {_NAMES[constraint.kind]} has {len(constraint.value)} characters",
            where=constraint.kind,
            hint=f"at most {LONGEST_CONSTRAINT}",
        )
    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.value)
    if constraint.kind == "grammar":
        return LLMatcher.grammar_from_lark(constraint.value)
    if constraint.kind == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}')
    try:
        json.loads(constraint.value)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"the JSON schema is not JSON: {error}", where="json_schema", hint="correct it"
        ) from error
    return LLMatcher.grammar_from_json_schema(constraint.value)


class Matcher:
    """Where one text stands in its grammar."""

    def __init__(
        self, matcher: LLMatcher, vocabulary: int, ends: Sequence[int], own_ends: Sequence[int]
    ) -> None:
        self._matcher = matcher
        self._words = (vocabulary + 31) // 32
        self._ends = np.zeros(self._words, dtype=np.int32)
        self._no_ends = ~np.zeros(self._words, dtype=np.int32)
        _set_bits(self._ends, ends)
        cleared = np.zeros(self._words, dtype=np.int32)
        _set_bits(cleared, [*ends, *own_ends])
        self._no_ends = ~cleared

    @property
    def ended(self) -> bool:
        """Whether the text is whole and nothing but a terminator may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, as int32 words (ceil(vocabulary / 32)), lowest bit first."""
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)[: self._words]
        words = words & self._no_ends
        if self._matcher.is_accepting():
            words |= self._ends
        return words

    def accept(self, token: int) -> bool:
        """Take a token of the text, no terminator; False where the grammar does not allow it."""
        return bool(self._matcher.consume_token(token))


def _set_bits(words: np.ndarray, tokens: Sequence[int]) -> None:
    bits = np.zeros(len(words) * 32, dtype=np.uint8)
    bits[list(tokens)] = 1
    words |= np.packbits(bits, bitorder="little").view(np.int32)


def masks(matchers: Mapping[int, Matcher]) -> dict[int, np.ndarray]:
    """What each row's matcher allows, as :func:`deltaw.serving.sampling.choose` takes it."""
    return {row: matcher.allowed() for row, matcher in matchers.items()}
