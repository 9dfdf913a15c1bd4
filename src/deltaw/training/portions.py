"""How rows go through a model: how many tokens at once, shared or not, flat or padded, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from deltaw.data.example import Example
from deltaw.data.packing import Batch, batches
from deltaw.errors import UserError
from deltaw.models.forest import can_pack
from deltaw.models.generation import position_limit
from deltaw.models.machine import Choice

# Tokens per pass where the user leaves it open: enough for matrix products to run at full speed, and on a
# processor no more, since activations grow with it.
TOKENS_PER_PASS = {"cpu": 1024, "cuda": 8192, "mps": 4096}


@dataclass(frozen=True)
class Portions:
    """Tokens that go through at once, whether beginnings are shared, whether rows are padded, and where."""

    tokens_per_pass: int
    share: bool
    padded: bool
    device: str

    def batches(self, rows: Sequence[Example]) -> Iterator[Batch]:
        return batches(rows, self.tokens_per_pass, share=self.share, padded=self.padded, device=self.device)


def choose_portions(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    device: str,
    tokens_per_pass: int | str = "auto",
    share: bool | str = "auto",
    method_shares: bool = True,
) -> tuple[Portions, dict[str, Choice]]:
    """Settle what the user left open.

    Args:
        method_shares: whether the method trains exactly the same with shared beginnings.

    Returns:
        the portions, and by setting the value chosen with its reason.

    Raises:
        UserError: a row is longer than the model has positions.
    """
    longest = max(len(e.tokens) for e in examples)
    limit = position_limit(model)
    if limit is not None and longest > limit:
        raise UserError(
            f"the longest row has {longest:,} tokens, and the model {limit:,} positions",
            where="data.max_length",
            mend=f"set data.max_length: {limit}, with data.long_rows: cut or drop",
        )
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
    if tokens_per_pass == "auto":
        usual = TOKENS_PER_PASS.get(device.partition(":")[0], TOKENS_PER_PASS["cpu"])
        tokens = Choice(max(usual, longest), "fills the machine" if longest <= usual else "the longest row")
    else:
        tokens = Choice(int(tokens_per_pass), "as asked")
    return Portions(tokens.value, shared.value, not packable.value, device), {
        "train.share_prefixes": shared,
        "train.tokens_per_pass": tokens,
        "packing": packable,
    }
