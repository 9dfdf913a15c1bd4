"""How many tokens go through a model at once: what every task's batcher chooses alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltaw.data.example import RowGroup
from deltaw.data.sequences import lengths_of
from deltaw.errors import UserError
from deltaw.host.choices import Choice

# Tokens of a microbatch where the setting is ``auto``: enough for matrix products to run at full speed, and
# on a processor no more, since activations grow with it.
TOKENS_PER_PASS = {"cpu": 1024, "cuda": 8192, "mps": 4096}


def longest_row(rows: Sequence[Any], virtual_tokens: int, limit: int | None) -> int:
    """Tokens of the longest row as the model will see it; of groups, the longest row of any.

    Args:
        virtual_tokens: that the method prepends. limit: positions that the model has; None: any number.

    Raises:
        UserError: it is longer than the limit.
    """
    if any(isinstance(row, RowGroup) for row in rows[:1]):
        rows = [row for group in rows for row in group.rows]
    longest = int(lengths_of(rows).max()) + virtual_tokens
    if limit is not None and longest > limit:
        raise UserError(
            f"the longest row has {longest:,} tokens, and the model {limit:,} positions",
            where="data.max_length",
            hint=f"set data.max_length: {limit - virtual_tokens}, with data.long_rows: cut or drop",
        )
    return longest


def choose_tokens_per_pass(asked: int | str, longest: int, device: str) -> Choice[int]:
    """As asked, or as many tokens as fill the device, and the longest row at least."""
    if asked != "auto":
        return Choice(int(asked), "as asked")
    usual = TOKENS_PER_PASS.get(device.partition(":")[0], TOKENS_PER_PASS["cpu"])
    return Choice(max(usual, longest), "fills the machine" if longest <= usual else "the longest row")
