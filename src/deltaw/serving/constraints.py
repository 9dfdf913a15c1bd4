"""Texts that must match a JSON schema, a regular expression or a grammar: which tokens may come next.

The work is llguidance's. What is added: limits on what a hostile schema may cost, terminators that are the
request's own and are allowed only where the text may end, and errors that a user can read.

It knows neither the model nor how a token is chosen.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deltaw.errors import UserError
from deltaw.serving.request import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions

LONGEST_CONSTRAINT = 256 * 1024  # characters
# The work for an object grows with the square of its properties: the sum of the squares, over all objects of
# a schema, is at most that of one with so many.
MOST_PROPERTIES = 1000
# Compiled constraints that are kept, for requests that come with the same one again.
_KEPT = 32
_LONGEST_REASON = 300  # characters; a whole regular expression may stand in it
# Of JSON: that exactly one of several schemas matches cannot be followed a token at a time, so that any may.
# White space is short, since small models would otherwise write it without end.
_JSON: JsonCompileOptions = {"coerce_one_of": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,16}"}


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
        self._kept: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._keeping = threading.Lock()
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary)

    def compile(self, constraint: Constraint, ends: Sequence[int]) -> Matcher:
        """A matcher at the start of a text.

        Args:
            ends: the request's terminators; they are allowed where the text may end, and only there.

        Raises:
            UserError: the constraint cannot be read, is too large, or can match no text.
        """
        with self._keeping:
            known = self._kept.get(constraint)
            if known is not None:
                self._kept.move_to_end(constraint)
                matcher = known.deep_copy()
        if known is None:
            matcher = self._compiled(constraint)
        compiled = Matcher(matcher, self.vocabulary, ends, self._tokenizer.eos_tokens)
        # The first mask shows what compiling does not: that no text matches, or that the work is too much.
        if matcher.is_error() or not (compiled.allowed().any() or compiled.ended) or compiled.failed:
            raise UserError(
                f"the {_NAMES[constraint.kind]} cannot be used: {_reason(matcher)}",
                where=constraint.kind,
                hint="correct it, or make it simpler",
            )
        return compiled

    def _compiled(self, constraint: Constraint) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        # Some tenths of a second for compiling a constraint, tens of milliseconds for a token, tens of
        # megabytes. Past that the constraint is refused, or its text ends with an error.
        limits = LLParserLimits(
            initial_lexer_fuel=300_000,
            step_lexer_fuel=100_000,
            max_lexer_states=20_000,
            max_grammar_size=100_000,
            verbose_errors=False,
        )
        matcher = LLMatcher(self._tokenizer, _grammar(constraint), log_level=0, limits=limits)
        if not matcher.is_error():
            with self._keeping:
                self._kept[constraint] = matcher.deep_copy()
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
        return matcher


def _reason(matcher: LLMatcher) -> str:
    """What is wrong, in a line: what follows in llguidance's messages is the state of its parser."""
    message = (matcher.get_error().splitlines() or [""])[0].strip()
    if not message or message.startswith("NoExtension"):
        return "no text matches it"
    return message if len(message) <= _LONGEST_REASON else message[: _LONGEST_REASON - 1] + "…"


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
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON)
    try:
        schema = json.loads(constraint.value)
        cost = _property_squares(schema)
    except ValueError as error:
        raise UserError(
            f"the JSON schema is not JSON: {error}", where="json_schema", hint="correct it"
        ) from error
    except RecursionError as error:
        raise UserError(
            "the JSON schema is nested too deeply", where="json_schema", hint="make it simpler"
        ) from error
    if cost > MOST_PROPERTIES**2:
        raise UserError(
            "the JSON schema has too many properties",
            where="json_schema",
            hint=f"at most {MOST_PROPERTIES} in one object, fewer in several",
        )
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise UserError(
            "the JSON schema is no object", where="json_schema", hint='give one, such as {"type": "object"}'
        )
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON)


def _property_squares(schema: object) -> int:
    """The squares of the numbers of properties of all objects in a schema, summed."""
    if isinstance(schema, list):
        return sum(map(_property_squares, schema))
    if not isinstance(schema, dict):
        return 0
    return len(schema) ** 2 + sum(map(_property_squares, schema.values()))


class Matcher:
    """Where one text stands in its grammar. It belongs to one request.

    Args:
        ends: the request's terminators. own_ends: those that ``matcher`` takes for terminators.
    """

    def __init__(
        self, matcher: LLMatcher, vocabulary: int, ends: Sequence[int], own_ends: Sequence[int]
    ) -> None:
        self._matcher = matcher
        self._ends = _words(vocabulary, ends)
        self._no_ends = ~_words(vocabulary, [*ends, *own_ends])

    @property
    def ended(self) -> bool:
        """Whether the text is whole and nothing but a terminator may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def failed(self) -> str | None:
        """Why the text cannot go on, where a limit was passed or a token taken that is not allowed; None
        otherwise."""
        return _reason(self._matcher) if self._matcher.is_error() else None

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, as int32 words (ceil(vocabulary / 32)), lowest bit first; none where
        it has ``failed``, and terminators alone where it has ``ended``."""
        mask = self._matcher.compute_bitmask()  # may pass a limit
        if self._matcher.is_error():
            return np.zeros_like(self._ends)
        words: np.ndarray = np.frombuffer(mask, dtype=np.int32)[: len(self._ends)] & self._no_ends
        return words | self._ends if self._matcher.is_accepting() else words

    def accept(self, token: int) -> bool:
        """Take a token of the text, no terminator; False where the grammar does not allow it."""
        return bool(self._matcher.consume_token(token))


def _words(vocabulary: int, tokens: Sequence[int]) -> np.ndarray:
    """Tokens as a mask: int32 words (ceil(vocabulary / 32)), lowest bit first."""
    bits = np.zeros((vocabulary + 31) // 32 * 32, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def masks(matchers: Mapping[int, Matcher]) -> dict[int, np.ndarray]:
    """What each row's matcher allows, as :func:`deltaw.serving.sampling.choose` takes it."""
    return {row: matcher.allowed() for row, matcher in matchers.items()}
