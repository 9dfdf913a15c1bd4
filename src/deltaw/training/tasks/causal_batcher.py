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
from deltaw.host.choices import Choice
from deltaw.kernels import loader
from deltaw.kernels.layout import Layout
from deltaw.runtime.generation import position_limit
from deltaw.runtime.packed import can_pack, fused_blocks, packed_rows

# ---- How many tokens go through a model at once: what every task's batcher chooses alike.

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
        return microbatch_shapes(
            list(self._split(rows)),
            share=self.share,
            padded=self.padded,
            fill=self.fill,
            inactive_cost=self.inactive_cost,
        )

    def labels(self, rows: Sequence[Item]) -> list[int]:
        """Labels in each microbatch."""
        return [sum(row.label_count for row in part) for part in self._split(rows)]

    def layouts(self, rows: Sequence[Item]) -> Iterator[Layout]:
        """The layout of each microbatch; padded rows have none."""
        for part in [] if self.padded else self._split(rows):
            layout = pack(part, share=self.share, fill=self.fill).inputs["packed_layout"]
            assert isinstance(layout, Layout)
            yield layout

    def batches(self, rows: Sequence[Item]) -> Iterator[Batch]:
        """The microbatches of these rows, each laid out only when its turn comes."""
        for part in _parts(rows):
            yield from batches(
                part,
                self.tokens_per_pass,
                share=self.share,
                padded=self.padded,
                fill=self.fill,
                device=self.device,
                cost=microbatch_cost(self.device),
                inactive_cost=self.inactive_cost,
            )

    def _split(self, rows: Sequence[Item]) -> Iterator[list[Item]]:
        for part in _parts(rows):
            yield from split_into_microbatches(
                part,
                self.tokens_per_pass,
                share=self.share,
                padded=self.padded,
                cost=microbatch_cost(self.device),
                inactive_cost=self.inactive_cost,
            )


def _parts(rows: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Rows in their order, so many at a time that all of them can be in memory."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[start : start + ROWS_AT_ONCE]


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
    if share == "auto":
        why = (
            "exact, and shared prefixes are computed once"
            if method_shares
            else "dropout would draw one mask for several rows"
        )
        shared = Choice(method_shares, why)
    else:
        shared = Choice(bool(share), "as asked")
    if shared.value and not packable.value:
        shared = Choice(False, packable.why)
    tokens = choose_tokens_per_pass(tokens_per_pass, longest, device)
    # Fused blocks on the compiled kernels take any shape, unless dropout makes blocks run their own code.
    any_shape = packable.value and method_shares and loader.library() is not None and _fused(model)
    return CausalMicroBatcher(tokens.value, shared.value, not packable.value, device, fill=not any_shape), {
        "train.share_prefixes": shared,
        "train.tokens_per_pass": tokens,
        "packing": packable,
    }


def _fused(model: PreTrainedModel) -> bool:
    with packed_rows(model):
        return fused_blocks(model).choice.value
