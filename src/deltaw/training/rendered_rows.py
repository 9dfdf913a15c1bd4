"""Render rows for a training method: prepend virtual tokens, and mark the token that activates an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from deltaw.data.chat_template import acts_before_labels, ending_of_prompts, opening_of_answer, with_activation
from deltaw.data.example import Example, RowGroup, lengths_of, rows_of, select_rows
from deltaw.errors import UserError
from deltaw.machine.choices import Choice
from deltaw.methods.base import Method

KEY = "lora.invocation_tokens"


def render_example(example: Any, method: Method) -> Any:
    """Return the example as the model receives it.

    Raises:
        UserError: if the method prepends tokens or has an invocation sequence, and the example has no tokens.
    """
    invocation = method.invocation
    if method.virtual_tokens == 0 and invocation is None:
        return example
    if isinstance(example, RowGroup):
        return replace(example, rows=tuple(render_example(row, method) for row in example.rows))
    if isinstance(example, Example):
        if method.virtual_tokens:
            example = example.with_prefix(method.virtual_tokens, method.with_virtual_tokens(example.tokens))
        return example if invocation is None else with_activation(example, invocation)
    if hasattr(example, "tokens") and invocation is None:
        return replace(example, tokens=method.with_virtual_tokens(example.tokens))
    if invocation is not None:
        raise _task_error()
    message = f"method '{method.name}' prepends tokens to a row, and images have none"
    raise UserError(message, location="method", hint="choose another method")


def render_rows(rows: Sequence[Any], method: Method) -> Sequence[Any]:
    """Render all rows, as a list for a list and as a view for stored rows.

    Raises:
        UserError: see :func:`render_example`.
    """
    if method.virtual_tokens == 0 and method.invocation is None:
        return rows
    return [render_example(row, method) for row in rows] if isinstance(rows, list) else RenderedRows(rows, method)


class RenderedRows(Sequence[Any]):
    """View of stored rows that renders each row on access."""

    def __init__(self, rows: Sequence[Any], method: Method) -> None:
        self._rows = rows
        self._method = method

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return RenderedRows(self._rows[index], self._method)
        return render_example(self._rows[index], self._method)

    def __iter__(self) -> Iterator[Any]:
        for row in self._rows:
            yield render_example(row, self._method)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) number of tokens of each row, including virtual tokens."""
        return lengths_of(self._rows) + self._method.virtual_tokens

    def select(self, indices: np.ndarray) -> RenderedRows:
        """Return the rows at these indices."""
        return RenderedRows(select_rows(self._rows, indices), self._method)


def resolve_invocation(
    method: Method, tokenizer: PreTrainedTokenizerBase | None, rows: Sequence[Any], *, chat: bool
) -> Choice[list[int]] | None:
    """Determine the invocation sequence of an activated adapter, pass it to the method, and check the training rows.

    Args:
        method: Training method.
        tokenizer: Tokenizer of the model.
        rows: Training rows.
        chat: True if the rows were rendered with the chat template.

    Returns:
        The sequence with its origin, or None for a method without one.

    Raises:
        UserError: if no sequence can be derived, or rows lack it or have labels before it.
    """
    if not method.is_activated:
        return None
    if tokenizer is None or not all(isinstance(row, Example) for row in _iter_rows(rows)):
        raise _task_error()
    setting = method.requested_invocation
    if isinstance(setting, str):
        setting = tokenizer(setting, add_special_tokens=False)["input_ids"]
    given = None if setting is None else Choice(list(setting), "as given")
    invocation = _derive_invocation(tokenizer, _iter_rows(rows), chat) if given is None else given
    method.set_invocation(invocation.value)
    rows_without = []
    rows_with_early_labels = []
    count = 0
    for row in _iter_rows(rows):
        count += 1
        marked = with_activation(row, invocation.value)
        if marked.active_from == len(marked.tokens):
            rows_without.append(row.row)
        elif not acts_before_labels(marked):
            rows_with_early_labels.append(row.row)
    text = repr(tokenizer.decode(invocation.value))
    if rows_without:
        share = f"{len(rows_without):,} of {count:,} rows"
        sequence = f"{text} ({invocation.value})"
        message = f"{share} do not have the invocation sequence {sequence}"
        hint = f"set {KEY} to tokens that all prompts contain, or end all prompts with the same text"
        raise UserError(message, location=f"row {rows_without[0]}", hint=hint)
    if rows_with_early_labels:
        share = f"{len(rows_with_early_labels):,} of {count:,} rows"
        message = f"{share} have labels before the last {text}, where the adapter does not act"
        hint = "set data.labels: last, or lora.active: always"
        raise UserError(message, location=f"row {rows_with_early_labels[0]}", hint=hint)
    return invocation


def _iter_rows(rows: Sequence[Any]) -> Iterator[Any]:
    """Yield the rows of all groups, and ungrouped rows."""
    return (row for item in rows for row in rows_of(item))


def _derive_invocation(tokenizer: PreTrainedTokenizerBase, rows: Iterable[Example], chat: bool) -> Choice[list[int]]:
    tokens = opening_of_answer(tokenizer) if chat else []
    if tokens:
        return Choice(tokens, f"{tokenizer.decode(tokens)!r} opens the answer in the chat template")
    tokens = ending_of_prompts(rows)
    if tokens:
        return Choice(tokens, f"all prompts end with {tokenizer.decode(tokens)!r}")
    reason = ("the chat template opens no answer, and " if chat else "") + "the prompts do not end with the same text"
    hint = "end all prompts with the same words, such as 'Answer:', or set lora.invocation_tokens"
    raise UserError(f"no invocation sequence can be derived: {reason}", location=KEY, hint=hint)


def _task_error() -> UserError:
    message = "lora.active 'completion' is for models that generate an answer to a prompt"
    return UserError(message, location="lora.active", hint="set task: causal-lm, or lora.active: always")
