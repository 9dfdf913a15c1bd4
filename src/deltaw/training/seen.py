"""Rows as the model is to see them with a method: virtual tokens prepended, and where an activated adapter
begins to act.

Knows methods and examples; not models or batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from deltaw.data.example import Example, RowGroup, rows_of
from deltaw.data.invocation import activated, ending_of_prompts, learns, opening_of_answer
from deltaw.data.sequences import lengths_of, picked
from deltaw.errors import UserError
from deltaw.machine.choices import Choice
from deltaw.methods.base import Method

KEY = "lora.invocation_tokens"


def as_seen(example: Any, method: Method) -> Any:
    """The example as the model is to see it.

    Raises:
        UserError: the method prepends tokens or acts from a token on, and the example has none.
    """
    invocation = method.invocation
    if method.virtual_tokens == 0 and invocation is None:
        return example
    if isinstance(example, RowGroup):
        return replace(example, rows=tuple(as_seen(row, method) for row in example.rows))
    if isinstance(example, Example):
        if method.virtual_tokens:
            example = example.after(method.virtual_tokens, method.with_virtual_tokens(example.tokens))
        return example if invocation is None else activated(example, invocation)
    if hasattr(example, "tokens") and invocation is None:
        return replace(example, tokens=method.with_virtual_tokens(example.tokens))
    if invocation is not None:
        raise _only_for_answers()
    hint = "choose another method"
    raise UserError(f"method '{method.name}' puts tokens before a row, and images have none", where="method", hint=hint)


def rows_as_seen(rows: Sequence[Any], method: Method) -> Sequence[Any]:
    """All rows as the model is to see them: a list of a list's rows, a view of stored ones.

    Raises:
        UserError: as :func:`as_seen`.
    """
    if method.virtual_tokens == 0 and method.invocation is None:
        return rows
    return [as_seen(row, method) for row in rows] if isinstance(rows, list) else SeenRows(rows, method)


class SeenRows(Sequence[Any]):
    """Stored rows as the model is to see them, each made when it is asked for."""

    def __init__(self, rows: Sequence[Any], method: Method) -> None:
        self._rows = rows
        self._method = method

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return SeenRows(self._rows[index], self._method)
        return as_seen(self._rows[index], self._method)

    def __iter__(self) -> Iterator[Any]:
        for row in self._rows:
            yield as_seen(row, self._method)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each, virtual ones included."""
        return lengths_of(self._rows) + self._method.virtual_tokens

    def picked(self, indices: np.ndarray) -> SeenRows:
        """The rows at these indices."""
        return SeenRows(picked(self._rows, indices), self._method)


def resolve_invocation(
    method: Method, tokenizer: PreTrainedTokenizerBase | None, rows: Sequence[Any], *, chat: bool
) -> Choice[list[int]] | None:
    """Find the invocation sequence of an activated adapter, tell the method, and check the rows to train on.

    Args:
        chat: whether the rows were rendered with the chat template.

    Returns:
        the sequence and where it comes from; None for a method without one.

    Raises:
        UserError: none can be derived, or rows lack it, or have labels before it.
    """
    if not method.activates:
        return None
    if tokenizer is None or not all(isinstance(row, Example) for row in _each(rows)):
        raise _only_for_answers()
    given = method.invocation_given
    if isinstance(given, str):
        given = tokenizer(given, add_special_tokens=False)["input_ids"]
    found = _derived(tokenizer, _each(rows), chat) if given is None else Choice(list(given), "as given")
    method.invoke_by(found.value)
    without, before, count = [], [], 0
    for row in _each(rows):
        count += 1
        seen = activated(row, found.value)
        if seen.active_from == len(seen.tokens):
            without.append(row.row)
        elif not learns(seen):
            before.append(row.row)
    text = repr(tokenizer.decode(found.value))
    if without:
        what = f"{len(without):,} of {count:,} rows do not have the invocation sequence {text} ({found.value})"
        hint = f"set {KEY} to tokens that all prompts have, or let all prompts end alike"
        raise UserError(what, where=f"row {without[0]}", hint=hint)
    if before:
        what = f"{len(before):,} of {count:,} rows have labels before the last {text}, where the adapter does not act"
        raise UserError(what, where=f"row {before[0]}", hint="set data.labels: last, or lora.activation: always")
    return found


def _each(rows: Sequence[Any]) -> Iterator[Any]:
    """The rows of all groups, and those that come alone."""
    return (row for item in rows for row in rows_of(item))


def _derived(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Example], chat: bool) -> Choice[list[int]]:
    tokens = opening_of_answer(tokenizer) if chat else []
    if tokens:
        return Choice(tokens, f"{tokenizer.decode(tokens)!r} opens the answer in the chat template")
    tokens = ending_of_prompts(rows)
    if tokens:
        return Choice(tokens, f"all prompts end with {tokenizer.decode(tokens)!r}")
    why = ("the chat template opens no answer, and " if chat else "") + "the prompts do not end alike"
    hint = "end all prompts with the same words, such as 'Answer:', or set lora.invocation_tokens"
    raise UserError(f"no invocation sequence can be derived: {why}", where=KEY, hint=hint)


def _only_for_answers() -> UserError:
    what = "lora.activation 'completion' is for models that write an answer to a prompt"
    return UserError(what, where="lora.activation", hint="set task: causal-lm, or lora.activation: always")
