"""Rows as the model is to see them with a method: virtual tokens prepended, and where an activated adapter
begins to act.

Knows methods and examples; not models or batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from deltaw.data.example import Example, RowGroup
from deltaw.data.invocation import activated, ending_of_prompts, learns, opening_of_answer
from deltaw.data.packing import rows_of
from deltaw.errors import UserError
from deltaw.host.choices import Choice
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
        return RowGroup(tuple(as_seen(row, method) for row in example.rows))
    if isinstance(example, Example):
        if method.virtual_tokens:
            example = example.after(method.virtual_tokens, method.with_virtual_tokens(example.tokens))
        return example if invocation is None else activated(example, invocation)
    if hasattr(example, "tokens") and invocation is None:
        return replace(example, tokens=method.with_virtual_tokens(example.tokens))
    if invocation is not None:
        raise _only_for_answers()
    raise UserError(
        f"method '{method.name}' puts tokens before a row, and images have none",
        where="method",
        hint="choose another method",
    )


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
    every = [row for item in rows for row in rows_of(item)] if tokenizer is not None else []
    if tokenizer is None or not all(isinstance(row, Example) for row in every):
        raise _only_for_answers()
    given = method.invocation_given
    if given is not None:
        tokens = tokenizer(given, add_special_tokens=False)["input_ids"] if isinstance(given, str) else given
        found = Choice(list(tokens), "as given")
    else:
        found = _derived(tokenizer, every, chat)
    method.invoke_by(found.value)
    seen = [activated(row, found.value) for row in every]
    text = tokenizer.decode(found.value)
    without = [row.row for row in seen if row.active_from == len(row.tokens)]
    if without:
        raise UserError(
            f"{len(without):,} of {len(seen):,} rows do not have the invocation sequence {text!r} "
            f"({found.value}) in their prompt, so that the adapter would not act on them",
            where=f"row {without[0]}",
            hint=f"set {KEY} to tokens that all prompts have, or let all prompts end alike",
        )
    before = [row.row for row in seen if not learns(row)]
    if before:
        raise UserError(
            f"{len(before):,} of {len(seen):,} rows have labels before the last {text!r}, where the adapter "
            "does not act",
            where=f"row {before[0]}",
            hint="set data.labels: last, or lora.activation: always",
        )
    return found


def _derived(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], chat: bool) -> Choice[list[int]]:
    tokens = opening_of_answer(tokenizer) if chat else []
    if tokens:
        return Choice(tokens, f"{tokenizer.decode(tokens)!r} opens the answer in the chat template")
    tokens = ending_of_prompts(rows)
    if tokens:
        return Choice(tokens, f"all prompts end with {tokenizer.decode(tokens)!r}")
    raise UserError(
        "no invocation sequence can be derived: "
        + ("the chat template opens no answer, and " if chat else "")
        + "the prompts do not end alike",
        where=KEY,
        hint="end all prompts with the same words, such as 'Answer:', or set lora.invocation_tokens",
    )


def _only_for_answers() -> UserError:
    return UserError(
        "lora.activation 'completion' is for models that write an answer to a prompt",
        where="lora.activation",
        hint="set task: causal-lm, or lora.activation: always",
    )
