"""Cut rows of a language model into microbatches: size in tokens, shared prefixes, packing or padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from deltaw.data.example import Item, RowGroup
from deltaw.data.packing import PackedBatch, batches, microbatch_cost, microbatch_shapes, pack, split_into_microbatches
from deltaw.data.sequences import lengths_of
from deltaw.errors import UserError
from deltaw.kernels import loader
from deltaw.kernels.layout import Layout
from deltaw.machine.choices import Choice
from deltaw.runtime.fused_blocks import fused_in_mode
from deltaw.runtime.generation import position_limit
from deltaw.runtime.packed import PACKED_INDEPENDENT, can_pack, can_pack_independent, fused_blocks, packed_rows

# Tokens of a microbatch for ``auto``: enough for full matmul throughput. More would only increase activation memory.
TOKENS_PER_PASS = {"cpu": 1024, "cuda": 8192, "mps": 4096}


def longest_row(rows: Sequence[Any], virtual_tokens: int, limit: int | None) -> int:
    """Return the number of tokens of the longest row, including virtual tokens. Groups count by their longest row.

    Args:
        virtual_tokens: Tokens that the method prepends.
        limit: Positions that the model supports, or None for no limit.

    Raises:
        UserError: if the row exceeds the limit.
    """
    if any(isinstance(row, RowGroup) for row in rows[:1]):
        rows = [row for group in rows for row in group.rows]
    longest = int(lengths_of(rows).max()) + virtual_tokens
    if limit is not None and longest > limit:
        message = f"the longest row has {longest:,} tokens, and the model {limit:,} positions"
        hint = f"set data.max_length: {limit - virtual_tokens}, with data.long_rows: cut or drop"
        raise UserError(message, location="data.max_length", hint=hint)
    return longest


def choose_tokens_per_pass(requested: int | str, longest: int, device: str) -> Choice[int]:
    """Return the requested number of tokens, or for ``auto`` the device's default, at least the longest row."""
    if requested != "auto":
        return Choice(int(requested), "as requested")
    default = TOKENS_PER_PASS.get(device.partition(":")[0], TOKENS_PER_PASS["cpu"])
    return Choice(max(default, longest), "fills the machine" if longest <= default else "the longest row")


# Rows that are sorted and cut together. Larger than a step, and small enough to evaluate a large data set in memory.
MAX_BUFFERED_ROWS = 8192


@dataclass(frozen=True)
class CausalMicroBatcher:
    """Cuts rows of a language model into microbatches and lays them out.

    Attributes:
        tokens_per_pass: Maximum number of tokens of a microbatch. A single row or group may exceed it.
        share: True to compute shared prefixes once.
        padded: True to pad rows instead of packing them.
        device: Device that batches are moved to.
        fill: True to fill packed rows up to recurring lengths.
        inactive_cost: Relative cost of a token that an activated adapter does not modify, if such tokens run
            separately.
    """

    tokens_per_pass: int
    share: bool
    padded: bool
    device: str
    fill: bool = True
    inactive_cost: float = 1.0

    def shapes(self, rows: Sequence[Item]) -> list[tuple[int, int]]:
        """Return (rows, length) of each microbatch of :meth:`batches`, without laying out any."""
        parts, options = list(self.split(rows)), {"share": self.share, "padded": self.padded, "fill": self.fill}
        return microbatch_shapes(parts, inactive_cost=self.inactive_cost, **options)

    def labels(self, rows: Sequence[Item]) -> list[int]:
        """Return the number of labels of each microbatch."""
        return [sum(row.label_count for row in part) for part in self.split(rows)]

    def layouts(self, rows: Sequence[Item]) -> Iterator[Layout]:
        """Yield the layout of each microbatch. Padded rows have no layout."""
        for part in [] if self.padded else self.split(rows):
            layout = pack(part, share=self.share, fill=self.fill).inputs["packed_layout"]
            assert isinstance(layout, Layout)
            yield layout

    def batches(self, rows: Sequence[Item]) -> Iterator[PackedBatch]:
        """Yield the microbatches of these rows, laying out each one on demand."""
        for part, options in self._parts(rows):
            yield from batches(part, self.tokens_per_pass, fill=self.fill, device=self.device, **options)

    def split(self, rows: Sequence[Item]) -> Iterator[list[Item]]:
        """Yield the rows of each microbatch."""
        for part, options in self._parts(rows):
            yield from split_into_microbatches(part, self.tokens_per_pass, **options)

    def _parts(self, rows: Sequence[Item]) -> Iterator[tuple[Sequence[Item], dict[str, Any]]]:
        """Yield consecutive rows that fit in memory, with the arguments for cutting them."""
        options: dict[str, Any] = {"share": self.share, "padded": self.padded, "inactive_cost": self.inactive_cost}
        options["cost"] = microbatch_cost(self.device)
        for start in range(0, len(rows), MAX_BUFFERED_ROWS):
            yield rows[start : start + MAX_BUFFERED_ROWS], options


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
    """Create the batcher, resolving settings that are ``auto``.

    Args:
        method_shares: True if results with shared prefixes are identical.
        virtual_tokens: Positions that the method prepends to each row.

    Returns:
        The batcher, and the chosen value of each setting with its reason.

    Raises:
        UserError: if a row is longer than the model has positions.
    """
    longest = longest_row(examples, virtual_tokens, position_limit(model))
    packable = can_pack(model)
    shared = Choice(bool(share), "as requested")
    if share == "auto" and method_shares:
        shared = Choice(True, "exact, and shared prefixes are computed once")
    elif share == "auto":
        shared = Choice(False, "dropout would draw one mask for several rows")
    if shared.value and not packable.value:
        shared = Choice(False, packable.why)
    tokens = choose_tokens_per_pass(tokens_per_pass, longest, device)
    # Fused blocks of the compiled kernels accept any shape, unless dropout forces blocks to run the model's code.
    any_shape = packable.value and method_shares and loader.library() is not None
    if any_shape:
        with packed_rows(model):
            any_shape = fused_blocks(model).choice.value
    batcher = CausalMicroBatcher(tokens.value, shared.value, not packable.value, device, fill=not any_shape)
    return batcher, {"train.share_prefixes": shared, "train.tokens_per_pass": tokens, "packing": packable}


def choose_independent_batcher(
    model: PreTrainedModel, rows: Sequence[Any], limit: int | None, *, device: str, tokens_per_pass: int | str = "auto"
) -> tuple[CausalMicroBatcher, dict[str, Choice]] | None:
    """Create a batcher of packed rows without shared prefixes for an encoder (see :func:`choose_causal_batcher`).

    Args:
        limit: Positions that the model supports, or None for no limit.

    Returns:
        The batcher and its choices, or None if the encoder cannot run packed rows.

    Raises:
        UserError: if a row exceeds the limit.
    """
    packable = can_pack_independent(model)
    if not packable.value:
        return None
    tokens = choose_tokens_per_pass(tokens_per_pass, longest_row(rows, 0, limit), device)
    with packed_rows(model, independent=True):
        any_shape = fused_in_mode(model, PACKED_INDEPENDENT).choice.value
    batcher = CausalMicroBatcher(tokens.value, False, False, device, fill=not any_shape)
    return batcher, {"train.tokens_per_pass": tokens, "packing": packable}
