"""Groups of labeled texts, packed without padding: the passages of a query, or two answers to a prompt.

An encoder's rows share nothing, since their tokens see what follows them. A decoder's share the tokens that they begin
with, such as a prompt and a query. The head reads one token of each row, the first or the last.

Knows models and packed rows; not losses.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from deltaw.data.example import Example, RowGroup, rows_of
from deltaw.data.images import LabelBatch
from deltaw.data.packing import Batch
from deltaw.kernels.transfer import to_device
from deltaw.machine.choices import Choice
from deltaw.runtime.packed import can_pack, first_position, without_cache
from deltaw.runtime.recognition import TOLERANCE, asked_once
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher, choose_apart_batcher, choose_causal_batcher


@dataclass(frozen=True)
class PackedLabelBatcher:
    """Lays out groups of labeled texts in packed rows.

    Attributes:
        inner: cuts and packs rows. apart: whether these share nothing, as an encoder's.
        segments: whether the model takes ``token_type_ids``. first: the position of a row's first token.
    """

    inner: CausalMicroBatcher
    apart: bool
    segments: bool
    first: int

    padded = False

    @property
    def share(self) -> bool:
        return self.inner.share

    @property
    def tokens_per_pass(self) -> int:
        return self.inner.tokens_per_pass

    def batches(self, rows: Sequence[Any]) -> Iterator[LabelBatch]:
        """The microbatches of these rows, each laid out only when its turn comes."""
        items = self.costing(rows)
        pairs = (zip(item.rows, rows_of(row), strict=True) for item, row in zip(items, rows, strict=True))
        known: dict[int, Any] = {id(example): row for group in pairs for example, row in group}
        for batch in self.inner.batches(items):
            yield self._labeled(batch, known)

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        """(1, length) of each microbatch, without laying any out."""
        return self.inner.shapes(self.costing(rows))

    def head_rows(self, rows: Sequence[Any]) -> list[int]:
        """Rows in each microbatch, which the head is applied to."""
        return [sum(len(rows_of(item)) for item in part) for part in self.inner.split(self.costing(rows))]

    def costing(self, rows: Sequence[Any]) -> list[Any]:
        """The rows as the batcher within sees them."""
        return [RowGroup(tuple(map(unlabeled, rows_of(item)))) for item in rows]

    def _labeled(self, batch: Batch, known: dict[int, Any]) -> LabelBatch:
        members = [batch.members[place] for group in batch.groups for place in group]
        rows = tuple(known[id(member.example)] for member in members)
        inputs: dict[str, Any] = {**batch.inputs, "position_ids": batch.inputs["position_ids"] + self.first}  # type: ignore[operator]
        if self.segments and any(row.segments is not None for row in rows):
            kinds = np.zeros(inputs["input_ids"].shape, np.int64)
            for member, row in zip(members, rows, strict=True):
                if row.segments is not None:
                    kinds[0, member.places] = row.segments
            inputs["token_type_ids"] = self._here(torch.from_numpy(kinds))
        places = torch.tensor([int(member.places[0 if self.apart else -1]) for member in members])
        targets = torch.tensor([row.label for row in rows], dtype=torch.float32)
        return LabelBatch(
            inputs,
            self._here(targets),
            rows,
            len(rows),
            batch.row_tokens,
            batch.tokens,
            tuple(map(len, batch.groups)),
            places=self._here(places),
        )

    def _here(self, values: Tensor) -> Tensor:
        return to_device(values, self.inner.device)


def unlabeled(row: Any) -> Example:
    """The tokens of a row as a language model's batcher takes them."""
    return Example(row.row, row.tokens, np.zeros(len(row.tokens), bool), 0, None)


def choose_packed_batcher(
    model: PreTrainedModel, examples: Sequence[Any], *, at_last: bool, limit: int | None, **how: Any
) -> tuple[PackedLabelBatcher, dict[str, Choice]] | None:
    """A batcher that packs these groups, with what was chosen and why; None where the model needs padded rows.

    Args:
        at_last: whether the head reads a row's last token, and not what an encoder makes of its first one.
        limit: positions that the model has; None: any number.
        how: as for :func:`deltaw.training.tasks.causal_batcher.choose_causal_batcher`.

    Raises:
        UserError: a row is longer than the model has positions.
    """
    if how.get("virtual_tokens"):
        return None
    if at_last:
        if not can_pack(model).value:
            return None
        inner, chosen = choose_causal_batcher(model, examples, **how)
    else:
        known = {name: how[name] for name in ("device", "tokens_per_pass") if name in how}
        found = choose_apart_batcher(model, examples, limit, **known) if reads_first(model) else None
        if found is None or found[0].fill:
            return None
        inner, chosen = found
    segments = "token_type_ids" in inspect.signature(model.forward).parameters
    return PackedLabelBatcher(inner, not at_last, segments, first_position(model)), chosen


def logits_at(model: PreTrainedModel, inputs: dict[str, Any], places: Tensor, head: Any) -> Tensor:
    """The outputs (rows, classes) for the rows of a packed microbatch.

    Args:
        places: (rows,) the token of each that the head reads. head: that is applied to a decoder's tokens; None: all
            that an encoder has above its backbone.
    """
    hidden = model.base_model(**inputs, **without_cache(model)).last_hidden_state
    vectors = hidden.flatten(0, 1).index_select(0, places)
    return _above(model, vectors) if head is None else head(vectors)


def _above(model: PreTrainedModel, vectors: Tensor) -> Tensor:
    """What the model makes of the first tokens (rows, width) of rows: all but its backbone."""
    base: Any = model.base_model
    hidden = vectors[:, None]

    def read(*_: Any, **__: Any) -> BaseModelOutputWithPooling:
        pooler = getattr(base, "pooler", None)
        return BaseModelOutputWithPooling(hidden, None if pooler is None else pooler(hidden))

    ids = torch.zeros(len(vectors), 1, dtype=torch.int64, device=vectors.device)
    before = vars(base).get("forward")
    base.forward = read
    try:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # type: ignore[no-any-return]
    finally:
        if before is None:
            del base.forward
        else:
            base.forward = before


_DIFFERENCES: dict[Any, float] = {}


def reads_first(model: PreTrainedModel) -> bool:
    """Whether the head reads nothing but a row's first token, as is found out on a small copy of the model."""
    if model.base_model is model:
        return False
    try:
        return asked_once(_DIFFERENCES, model, _above_against_whole) < TOLERANCE
    except Exception:  # whatever a foreign model raises here, padded rows are right for it
        return False


@torch.no_grad()
def _above_against_whole(small: PreTrainedModel) -> float:
    """The relative difference (of norms) between outputs from the first tokens alone and the model's own."""
    ids = (torch.arange(24).view(3, 8) * 5 + 3) % small.config.get_text_config().vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = small(**inputs).logits
    found = _above(small, small.base_model(**inputs).last_hidden_state[:, 0])
    return float((found - expected).norm() / expected.norm())
