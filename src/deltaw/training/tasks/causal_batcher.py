"""How rows go through a model: how many tokens at once, shared or not, flat or padded, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass

from transformers import PreTrainedModel

from deltaw.data.example import Example
from deltaw.data.packing import Batch, batches, pack, pass_shapes, split_into_passes
from deltaw.errors import UserError
from deltaw.host.choices import Choice
from deltaw.kernels import loader
from deltaw.kernels.layout import Layout
from deltaw.runtime.generation import position_limit
from deltaw.runtime.packed import can_pack, fused_blocks, packed_rows

# Tokens per pass where the user leaves it open: enough for matrix products to run at full speed, and on a
# processor no more, since activations grow with it.
TOKENS_PER_PASS = {"cpu": 1024, "cuda": 8192, "mps": 4096}


@dataclass(frozen=True)
class CausalMicroBatcher:
    """Tokens that go through at once, whether beginnings are shared, whether rows are padded, and where; and
    whether flat rows are filled up to lengths that come again."""

    tokens_per_pass: int
    share: bool
    padded: bool
    device: str
    fill: bool = True

    def shapes(self, rows: Sequence[Example]) -> list[tuple[int, int]]:
        """(rows, length) of each pass of :meth:`batches`, without laying any out."""
        return pass_shapes(rows, self.tokens_per_pass, share=self.share, padded=self.padded, fill=self.fill)

    def labels(self, rows: Sequence[Example]) -> list[int]:
        """Labels in each pass."""
        return [sum(row.label_count for row in part) for part in self._split(rows)]

    def layouts(self, rows: Sequence[Example]) -> Iterator[Layout]:
        """The layout of each pass; padded rows have none."""
        for part in [] if self.padded else self._split(rows):
            layout = pack(part, share=self.share, fill=self.fill).inputs["packed_layout"]
            assert isinstance(layout, Layout)
            yield layout

    def _split(self, rows: Sequence[Example]) -> list[list[Example]]:
        return split_into_passes(rows, self.tokens_per_pass, share=self.share, padded=self.padded)

    def batches(self, rows: Sequence[Example]) -> Iterator[Batch]:
        return batches(
            rows,
            self.tokens_per_pass,
            share=self.share,
            padded=self.padded,
            fill=self.fill,
            device=self.device,
        )


def longest_row(model: PreTrainedModel, examples: Sequence[Sized], virtual_tokens: int = 0) -> int:
    """Tokens of the longest row as the model will see it.

    Raises:
        UserError: the model has fewer positions.
    """
    longest = max(len(e) for e in examples) + virtual_tokens
    limit = position_limit(model)
    if limit is not None and longest > limit:
        raise UserError(
            f"the longest row has {longest:,} tokens, and the model {limit:,} positions",
            where="data.max_length",
            hint=f"set data.max_length: {limit - virtual_tokens}, with data.long_rows: cut or drop",
        )
    return longest


def choose_tokens_per_pass(asked: int | str, longest: int, device: str) -> Choice:
    """As asked, or as many tokens as fill the device, and the longest row at least."""
    if asked != "auto":
        return Choice(int(asked), "as asked")
    usual = TOKENS_PER_PASS.get(device.partition(":")[0], TOKENS_PER_PASS["cpu"])
    return Choice(max(usual, longest), "fills the machine" if longest <= usual else "the longest row")


def choose_causal_batcher(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    device: str,
    tokens_per_pass: int | str = "auto",
    share: bool | str = "auto",
    method_shares: bool = True,
    virtual_tokens: int = 0,
) -> tuple[CausalMicroBatcher, dict[str, Choice]]:
    """Settle what the user left open.

    Args:
        method_shares: whether the method trains exactly the same with shared beginnings.
        virtual_tokens: positions that the method will put before each row.

    Returns:
        the microbatches, and by setting the value chosen with its reason.

    Raises:
        UserError: a row is longer than the model has positions.
    """
    longest = longest_row(model, examples, virtual_tokens)
    packable = can_pack(model)
    if share == "auto":
        why = (
            "exact, and computes them once"
            if method_shares
            else "dropout would draw one mask for several rows"
        )
        shared = Choice(method_shares, why)
    else:
        shared = Choice(bool(share), "as asked")
    if shared.value and not packable.value:
        shared = Choice(False, packable.why)
    tokens = choose_tokens_per_pass(tokens_per_pass, longest, device)
    # Without dropout, fused blocks on the compiled kernels meet no library that builds kernels for shapes.
    any_shape = packable.value and method_shares and loader.library() is not None and _fused(model)
    return CausalMicroBatcher(tokens.value, shared.value, not packable.value, device, fill=not any_shape), {
        "train.share_prefixes": shared,
        "train.tokens_per_pass": tokens,
        "packing": packable,
    }


def _fused(model: PreTrainedModel) -> bool:
    with packed_rows(model):
        return fused_blocks(model).choice.value
