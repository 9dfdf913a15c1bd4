"""Cached keys and values of prompts for activated adapters.

An activated adapter is disabled before its invocation sequence (``deltaw.lora.adapted``). The keys and values of a
prompt are therefore those of the base model, need no backward pass, and are equal in each epoch. A batch runs in two
parts. First, prompt tokens without stored keys run without a graph and without the adapter. Then the answers run
forward and backward over the keys of all tokens. Keys and values are stored per token. Prompts with a common prefix
share the prefix's entries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.data.chat_template import acts_before_labels
from deltaw.data.example import Example, Item, rows_of
from deltaw.data.packing import MicroBatch
from deltaw.data.prefix_tree import Node, PrefixTree, sort_key
from deltaw.kernels.layout import Layout, to_device
from deltaw.lora.adapted import ACTIVE_KEYWORD
from deltaw.runtime.packed import backbone_of
from deltaw.runtime.partial import PartialLayout
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.features.store import FeatureStore
from deltaw.training.feed import Feed

# Shapes of one token's key and value by layer: (key heads, d).
KeyShapes = dict[int, tuple[torch.Size, torch.Size]]


class PromptIndex:
    """Assigns each row's prompt to units of a store: a prefix tree of all prompts with one unit per token.

    Args:
        examples: Rows or groups of rows. Rows on which the adapter is inactive, or active after a label, are skipped.

    Attributes:
        units: Number of tokens in the tree.
    """

    def __init__(self, examples: Sequence[Item]) -> None:
        all_rows = (row for item in examples for row in rows_of(item))
        prompts = {_prompt(row).tobytes(): _prompt(row) for row in all_rows if _has_cacheable_prompt(row)}
        ordered = sorted(prompts.items(), key=lambda entry: sort_key(entry[1]))
        tree = PrefixTree()
        for _, prompt in ordered:
            tree.insert(prompt, share=True)
        self._root = tree.root
        self._nodes = tree.depth_first()
        *starts, self.units = np.cumsum([0, *(len(node.tokens) for node in self._nodes)]).tolist()
        self._starts = dict(zip(map(id, self._nodes), starts, strict=True))
        self._ends = {name: end for (name, _), end in zip(ordered, tree.leaves, strict=True)}

    def contains(self, items: Sequence[Item]) -> bool:
        """Return True if the index contains all these rows."""
        return all(
            _has_cacheable_prompt(row) and _prompt(row).tobytes() in self._ends
            for item in items
            for row in rows_of(item)
        )

    def row_units(self, row: Example) -> np.ndarray:
        """Return (prompt tokens,) the units of a row's prompt."""
        parts: list[np.ndarray] = []
        node: Node | None = self._ends[_prompt(row).tobytes()]
        while node is not None and node is not self._root:
            start = self._starts[id(node)]
            parts.append(np.arange(start, start + len(node.tokens)))
            node = node.parent
        return np.concatenate(parts[::-1]) if parts else np.zeros(0, np.int64)

    def digest(self) -> bytes:
        """Return a digest of all prompts and their units."""
        digest = hashlib.sha256()
        for node in self._nodes:
            parent_start = -1 if node.parent is self._root or node.parent is None else self._starts[id(node.parent)]
            digest.update(parent_start.to_bytes(8, "little", signed=True) + len(node.tokens).to_bytes(8, "little"))
            digest.update(node.tokens.astype("<i4").tobytes())
        return digest.digest()


def _has_cacheable_prompt(row: Example) -> bool:
    """Return True if the row has a prompt without the adapter, which becomes active before the first label."""
    return row.active_from is not None and acts_before_labels(row)


def _prompt(row: Example) -> np.ndarray:
    """Return the tokens before the adapter becomes active."""
    return row.tokens[: row.active_from]


class StoredPrompts(Feed):
    """Feed with stored keys and values of prompts.

    Its microbatches run only answer tokens, over the keys of all tokens.

    Args:
        reference: Feed of the training without stored prompts.
        index: Units of the rows. Other rows run in one part.
        store: Store of keys and values. Its rows are units.
        key_shapes: Shapes of the keys, or None if they are not known yet.
        inactive_cost: Cost of a prompt token relative to an answer token, used to fill microbatches. Prompt tokens run
            only in the first epoch, so a lower cost lets more prompts share a microbatch.
    """

    store: FeatureStore

    def __init__(
        self,
        reference: Feed,
        index: PromptIndex,
        store: FeatureStore,
        key_shapes: KeyShapes | None = None,
        inactive_cost: float = 1.0,
    ) -> None:
        super().__init__(reference.objective, reference.batcher, store)
        assert isinstance(reference.batcher, CausalMicroBatcher)
        self.index = index
        self.key_shapes = key_shapes
        self.max_tokens = reference.tokens_per_pass
        self.backbone = backbone_of(reference.objective.model)
        self._split_batcher = dataclasses.replace(reference.batcher, inactive_cost=inactive_cost)

    def batches(self, rows: Sequence[Item]) -> Iterator[MicroBatch]:
        if not self.index.contains(rows):
            yield from self.batcher.batches(rows)
            return
        for batch in self._split_batcher.batches(rows):
            units = self.units_of(batch)
            num_stored = int(self.store.done[units[units >= 0]].sum())
            enter = functools.partial(self._enter_answers, batch, units)
            yield dataclasses.replace(batch, tokens=batch.tokens - num_stored, enter=enter)

    def shapes(self, rows: Sequence[Item]) -> list[tuple[int, int]]:
        """Return (1, cost in tokens) of each microbatch."""
        return (self._split_batcher if self.index.contains(rows) else self.batcher).shapes(rows)

    def units_of(self, batch: MicroBatch) -> np.ndarray:
        """Return (T,) the unit of each prompt token, and -1 for other tokens."""
        units = np.full(_length(batch), -1)
        for member in batch.members:
            units[member.indices[: member.example.active_from]] = self.index.row_units(member.example)
        return units

    def prompt_keys(self, batch: MicroBatch, all_units: np.ndarray) -> dict[int, tuple[Tensor, Tensor]]:
        """Return keys and values of the packed row by layer, filled in for prompt tokens."""
        prompt = np.flatnonzero(all_units >= 0)
        units = all_units[prompt]
        is_stored = self.store.done[units]
        keys = self._read(batch, prompt[is_stored], units[is_stored]) if is_stored.any() else {}
        missing = prompt[~is_stored]
        for start in range(0, len(missing), self.max_tokens):
            self._run(batch, missing[start : start + self.max_tokens], keys)
        if self.key_shapes is None:
            self.key_shapes = {number: (k.shape[1:], v.shape[1:]) for number, (k, v) in keys.items()}
        if len(missing):
            new_units, first = np.unique(all_units[missing], return_index=True)
            positions = _tensor(missing[first], batch)
            parts = [t.index_select(0, positions).flatten(1) for n in sorted(keys) for t in keys[n]]
            self.store.write(new_units, new_units, torch.cat(parts, 1))
        return keys

    @contextlib.contextmanager
    def _enter_answers(self, batch: MicroBatch, units: np.ndarray) -> Iterator[MicroBatch]:
        """Yield the batch reduced to tokens with an active adapter, over the keys of all tokens."""
        keys = self.prompt_keys(batch, units)
        predictors = _tensor(np.cumsum(units < 0) - 1, batch).index_select(0, batch.predictors)
        inputs = {**_partial_inputs(batch, _tensor(np.flatnonzero(units < 0), batch), keys), ACTIVE_KEYWORD: True}
        yield dataclasses.replace(batch, inputs=inputs, predictors=predictors, predictor_indices=None)

    def _read(self, batch: MicroBatch, positions: np.ndarray, units: np.ndarray) -> dict[int, tuple[Tensor, Tensor]]:
        """Return keys and values (T, key heads, d) by layer, filled in from the store at these positions."""
        assert self.key_shapes is not None
        target_positions = _tensor(positions, batch)
        values = to_device(self.store.read(units), target_positions.device)
        length = _length(batch)
        column = 0
        tensors: dict[int, list[Tensor]] = {}
        for number in sorted(self.key_shapes):
            for shape in self.key_shapes[number]:
                part = values[:, column : column + shape.numel()]
                full_row = part.new_zeros(length, *shape).index_copy_(0, target_positions, part.view(-1, *shape))
                tensors.setdefault(number, []).append(full_row)
                column += shape.numel()
        return {number: (k, v) for number, (k, v) in tensors.items()}

    @torch.no_grad()
    def _run(self, batch: MicroBatch, positions: np.ndarray, keys: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Run prompt tokens as the base model does, and add their keys and values to ``keys``."""
        inputs = _partial_inputs(batch, _tensor(positions, batch), keys)
        self.backbone(**inputs, **{ACTIVE_KEYWORD: False}, use_cache=False)


def _partial_inputs(batch: MicroBatch, positions: Tensor, keys: dict[int, tuple[Tensor, Tensor]]) -> dict[str, object]:
    """Return the model's inputs for the tokens at these positions."""
    inputs: Any = batch.inputs
    selected = {name: inputs[name].index_select(1, positions) for name in ("input_ids", "position_ids")}
    return {**selected, "packed_layout": PartialLayout(inputs["packed_layout"], positions, keys)}


def _length(batch: MicroBatch) -> int:
    layout = batch.inputs["packed_layout"]
    assert isinstance(layout, Layout)
    return layout.length


def _tensor(positions: np.ndarray, batch: MicroBatch) -> Tensor:
    return to_device(torch.from_numpy(positions), batch.predictors.device)
