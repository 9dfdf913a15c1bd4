"""How rows of a language model become microbatches: of how many tokens, shared, packed or padded, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from deltaw.data.example import Item, RowGroup
from deltaw.data.packing import Batch, batches, microbatch_cost, microbatch_shapes, pack, split_into_microbatches
from deltaw.data.sequences import lengths_of
from deltaw.errors import UserError
from deltaw.kernels import loader
from deltaw.kernels.layout import Layout
from deltaw.machine.choices import Choice
from deltaw.runtime.fused_blocks import fused_in_mode
from deltaw.runtime.generation import position_limit
from deltaw.runtime.packed import PACKED_APART, can_pack, can_pack_apart, fused_blocks, packed_rows

# How many tokens go through a model at once: what every task's batcher chooses alike.

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
        what = f"the longest row has {longest:,} tokens, and the model {limit:,} positions"
        hint = f"set data.max_length: {limit - virtual_tokens}, with data.long_rows: cut or drop"
        raise UserError(what, where="data.max_length", hint=hint)
    return longest


def choose_tokens_per_pass(asked: int | str, longest: int, device: str) -> Choice[int]:
    """As asked, or as many tokens as fill the device, and the longest row at least."""
    if asked != "auto":
        return Choice(int(asked), "as asked")
    usual = TOKENS_PER_PASS.get(device.partition(":")[0], TOKENS_PER_PASS["cpu"])
    return Choice(max(usual, longest), "fills the machine" if longest <= usual else "the longest row")


# Rows that are sorted and cut together: more than a step has, and fewer than would fill memory where a large
# data set is evaluated.
ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class CausalMicroBatcher:
    """Cuts rows of a language model into microbatches and lays them out.

    Attributes:
        tokens_per_pass: the most tokens of a microbatch, unless one row (or group) alone has more.
        share: whether shared prefixes are computed once. padded: whether rows are padded, not packed.
        device: where batches are put.
        fill: whether packed rows are filled up to lengths that come again.
        inactive_cost: what a token counts on which an activated adapter does not act, where such tokens are
            not run with the others.
    """

    tokens_per_pass: int
    share: bool
    padded: bool
    device: str
    fill: bool = True
    inactive_cost: float = 1.0

    def shapes(self, rows: Sequence[Item]) -> list[tuple[int, int]]:
        """(rows, length) of each microbatch of :meth:`batches`, without laying any out."""
        parts, how = list(self.split(rows)), {"share": self.share, "padded": self.padded, "fill": self.fill}
        return microbatch_shapes(parts, inactive_cost=self.inactive_cost, **how)

    def labels(self, rows: Sequence[Item]) -> list[int]:
        """Labels in each microbatch."""
        return [sum(row.label_count for row in part) for part in self.split(rows)]

    def layouts(self, rows: Sequence[Item]) -> Iterator[Layout]:
        """The layout of each microbatch; padded rows have none."""
        for part in [] if self.padded else self.split(rows):
            layout = pack(part, share=self.share, fill=self.fill).inputs["packed_layout"]
            assert isinstance(layout, Layout)
            yield layout

    def batches(self, rows: Sequence[Item]) -> Iterator[Batch]:
        """The microbatches of these rows, each laid out only when its turn comes."""
        for part, how in self._parts(rows):
            yield from batches(part, self.tokens_per_pass, fill=self.fill, device=self.device, **how)

    def split(self, rows: Sequence[Item]) -> Iterator[list[Item]]:
        """The rows of each microbatch."""
        for part, how in self._parts(rows):
            yield from split_into_microbatches(part, self.tokens_per_pass, **how)

    def _parts(self, rows: Sequence[Item]) -> Iterator[tuple[Sequence[Item], dict[str, Any]]]:
        """Rows in their order, few enough at a time to be in memory, and how they are cut."""
        how: dict[str, Any] = {"share": self.share, "padded": self.padded, "inactive_cost": self.inactive_cost}
        how["cost"] = microbatch_cost(self.device)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            yield rows[start : start + ROWS_AT_ONCE], how


def choose_causal_batcher(
    model: PreTrainedModel,
    examples: Sequence[Item],
    *,
    device: str,
    tokens_per_pass: int | str = "auto",
    share: bool | str = "auto",
    method_shares: bool = True,
    virtual_tokens: int = 0,
) -> tuple[CausalMicroBatcher, dict[str, Choice]]:
    """Resolve the settings that the user left at ``auto``.

    Args:
        method_shares: whether the method trains exactly the same with shared prefixes.
        virtual_tokens: positions that the method will prepend to each row.

    Returns:
        the batcher, and by setting the value chosen with its reason.

    Raises:
        UserError: a row is longer than the model has positions.
    """
    longest = longest_row(examples, virtual_tokens, position_limit(model))
    packable = can_pack(model)
    shared = Choice(bool(share), "as asked")
    if share == "auto" and method_shares:
        shared = Choice(True, "exact, and shared prefixes are computed once")
    elif share == "auto":
        shared = Choice(False, "dropout would draw one mask for several rows")
    if shared.value and not packable.value:
        shared = Choice(False, packable.why)
    tokens = choose_tokens_per_pass(tokens_per_pass, longest, device)
    # Fused blocks on the compiled kernels take any shape, unless dropout makes blocks run their own code.
    any_shape = packable.value and method_shares and loader.library() is not None
    if any_shape:
        with packed_rows(model):
            any_shape = fused_blocks(model).choice.value
    batcher = CausalMicroBatcher(tokens.value, shared.value, not packable.value, device, fill=not any_shape)
    return batcher, {"train.share_prefixes": shared, "train.tokens_per_pass": tokens, "packing": packable}


def choose_apart_batcher(
    model: PreTrainedModel,
    examples: Sequence[Any],
    limit: int | None,
    *,
    device: str,
    tokens_per_pass: int | str = "auto",
) -> tuple[CausalMicroBatcher, dict[str, Choice]] | None:
    """:func:`choose_causal_batcher` for an encoder, whose rows share nothing; None where it cannot run packed rows.

    Args:
        limit: positions that the model has; None: any number.

    Raises:
        UserError: a row is longer than that.
    """
    packable = can_pack_apart(model)
    if not packable.value:
        return None
    tokens = choose_tokens_per_pass(tokens_per_pass, longest_row(examples, 0, limit), device)
    with packed_rows(model, apart=True):
        any_shape = fused_in_mode(model, PACKED_APART).choice.value
    batcher = CausalMicroBatcher(tokens.value, False, False, device, fill=not any_shape)
    return batcher, {"train.tokens_per_pass": tokens, "packing": packable}
