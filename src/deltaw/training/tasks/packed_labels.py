"""Packed rows for groups of labeled texts: passages of a query, or two answers to a prompt.

Rows of an encoder have no shared prefixes, because its tokens attend to later tokens. Rows of a decoder share common
prefixes, for example a prompt and a query. The head reads the first or the last token of each row.
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
from deltaw.data.packing import PackedBatch
from deltaw.kernels.transfer import to_device
from deltaw.machine.choices import Choice
from deltaw.runtime.packed import can_pack, first_position, without_cache
from deltaw.runtime.recognition import TOLERANCE, measure_once
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher, choose_causal_batcher, choose_independent_batcher


@dataclass(frozen=True)
class PackedLabelBatcher:
    """Lays out groups of labeled texts in packed rows.

    Attributes:
        inner: Cuts and packs rows.
        independent: True if rows have no shared prefixes, as for encoders.
        segments: True if the model accepts ``token_type_ids``.
        first: Position of a row's first token.
    """

    inner: CausalMicroBatcher
    independent: bool
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
        """Yield the microbatches of these rows, laying out each one on demand."""
        items = self.cost_rows(rows)
        pairs = (zip(item.rows, rows_of(row), strict=True) for item, row in zip(items, rows, strict=True))
        rows_by_id: dict[int, Any] = {id(example): row for group in pairs for example, row in group}
        for batch in self.inner.batches(items):
            yield self._labeled(batch, rows_by_id)

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        """Return (1, length) of each microbatch, without laying out any."""
        return self.inner.shapes(self.cost_rows(rows))

    def head_rows(self, rows: Sequence[Any]) -> list[int]:
        """Return the number of rows per microbatch that the head is applied to."""
        return [sum(len(rows_of(item)) for item in part) for part in self.inner.split(self.cost_rows(rows))]

    def cost_rows(self, rows: Sequence[Any]) -> list[Any]:
        """Return the rows in the form of the inner batcher."""
        return [RowGroup(tuple(map(unlabeled, rows_of(item)))) for item in rows]

    def _labeled(self, batch: PackedBatch, rows_by_id: dict[int, Any]) -> LabelBatch:
        members = [batch.members[index] for group in batch.groups for index in group]
        rows = tuple(rows_by_id[id(member.example)] for member in members)
        inputs: dict[str, Any] = {**batch.inputs, "position_ids": batch.inputs["position_ids"] + self.first}  # type: ignore[operator]
        if self.segments and any(row.segments is not None for row in rows):
            segments = np.zeros(inputs["input_ids"].shape, np.int64)
            for member, row in zip(members, rows, strict=True):
                if row.segments is not None:
                    segments[0, member.indices] = row.segments
            inputs["token_type_ids"] = self._to_device(torch.from_numpy(segments))
        read_indices = torch.tensor([int(member.indices[0 if self.independent else -1]) for member in members])
        targets = torch.tensor([row.label for row in rows], dtype=torch.float32)
        return LabelBatch(
            inputs,
            self._to_device(targets),
            rows,
            len(rows),
            batch.row_tokens,
            batch.tokens,
            tuple(map(len, batch.groups)),
            read_indices=self._to_device(read_indices),
        )

    def _to_device(self, values: Tensor) -> Tensor:
        return to_device(values, self.inner.device)


def unlabeled(row: Any) -> Example:
    """Return the tokens of a row in the form of a language model's batcher."""
    return Example(row.row, row.tokens, np.zeros(len(row.tokens), bool), 0, None)


def choose_packed_batcher(
    model: PreTrainedModel, examples: Sequence[Any], *, at_last: bool, limit: int | None, **options: Any
) -> tuple[PackedLabelBatcher, dict[str, Choice]] | None:
    """Create a batcher that packs these groups.

    Args:
        at_last: True if the head reads a row's last token instead of an encoder's first token.
        limit: Positions that the model supports, or None for no limit.
        options: Options of :func:`deltaw.training.tasks.causal_batcher.choose_causal_batcher`.

    Returns:
        The batcher and its choices, or None if the model needs padded rows.

    Raises:
        UserError: if a row is longer than the model has positions.
    """
    if options.get("virtual_tokens"):
        return None
    if at_last:
        if not can_pack(model).value:
            return None
        inner, choices = choose_causal_batcher(model, examples, **options)
    else:
        shared = {name: options[name] for name in ("device", "tokens_per_pass") if name in options}
        independent = choose_independent_batcher(model, examples, limit, **shared) if uses_first_token(model) else None
        if independent is None or independent[0].fill:
            return None
        inner, choices = independent
    segments = "token_type_ids" in inspect.signature(model.forward).parameters
    return PackedLabelBatcher(inner, not at_last, segments, first_position(model)), choices


def logits_at(model: PreTrainedModel, inputs: dict[str, Any], token_indices: Tensor, head: Any) -> Tensor:
    """Return the outputs (rows, classes) of the rows in a packed microbatch.

    Args:
        token_indices: (rows,) token of each row that the head reads.
        head: Head of a decoder, or None to apply all layers of an encoder above its backbone.
    """
    hidden = model.base_model(**inputs, **without_cache(model)).last_hidden_state
    vectors = hidden.flatten(0, 1).index_select(0, token_indices)
    return _apply_head(model, vectors) if head is None else head(vectors)


def _apply_head(model: PreTrainedModel, vectors: Tensor) -> Tensor:
    """Return the model's outputs for first-token vectors (rows, width), computed by all layers above the backbone."""
    base: Any = model.base_model
    hidden = vectors[:, None]

    def read(*_: Any, **__: Any) -> BaseModelOutputWithPooling:
        pooler = getattr(base, "pooler", None)
        return BaseModelOutputWithPooling(hidden, None if pooler is None else pooler(hidden))

    ids = torch.zeros(len(vectors), 1, dtype=torch.int64, device=vectors.device)
    original_forward = vars(base).get("forward")
    base.forward = read
    try:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # type: ignore[no-any-return]
    finally:
        if original_forward is None:
            del base.forward
        else:
            base.forward = original_forward


_DIFFERENCES: dict[Any, float] = {}


def uses_first_token(model: PreTrainedModel) -> bool:
    """True if the head depends only on a row's first token. This is tested on a small copy of the model."""
    if model.base_model is model:
        return False
    try:
        return measure_once(_DIFFERENCES, model, _first_token_error) < TOLERANCE
    except Exception:  # any error of a third-party model means that it needs padded rows
        return False


@torch.no_grad()
def _first_token_error(small: PreTrainedModel) -> float:
    """Return the relative difference of norms between outputs from first tokens only and the model's outputs."""
    ids = (torch.arange(24).view(3, 8) * 5 + 3) % small.config.get_text_config().vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = small(**inputs).logits
    computed = _apply_head(small, small.base_model(**inputs).last_hidden_state[:, 0])
    return float((computed - expected).norm() / expected.norm())
