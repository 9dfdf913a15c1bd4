"""What an activated adapter does not act on: keys and values of prompts, computed once for each row.

Before its invocation sequence an activated adapter is off (``deltaw.lora.activation``). So keys and values of
a prompt are the base model's own: they need no backward, and are the same in every epoch. A batch runs in two
parts. Those tokens of its prompts whose keys are not known yet go through the model without a graph and
without the adapter. Then the answers run, forward and backward, over the keys of all tokens. What was
computed is kept in a store, in which prompts that begin alike share the beginning.

Knows examples, batches, models and stores; not files, keys of stores or optimizers.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.data.example import Example
from deltaw.data.invocation import learns
from deltaw.data.packing import Batch, Item, rows_of
from deltaw.data.prefix_tree import Node, PrefixTree, sort_key
from deltaw.kernels.transfer import to_device
from deltaw.lora.activation import PLACES
from deltaw.runtime.packed import backbone_of
from deltaw.runtime.partial import PartialLayout
from deltaw.training.features.store import FeatureStore
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from deltaw.training.tasks.causal_objective import CausalObjective

# By layer, the shapes of one token's key and value: (key heads, d).
Form = dict[int, tuple[torch.Size, torch.Size]]


class PromptIndex:
    """Where each row's prompt is in a store: a prefix tree over all prompts, one unit for each token.

    Args:
        examples: all rows, or groups of rows; those on which an adapter acts nowhere, or too late for a
            label, are not among them.

    Attributes:
        units: tokens of the tree.
    """

    def __init__(self, examples: Sequence[Item]) -> None:
        every = (row for item in examples for row in rows_of(item))
        found = {_prompt(row).tobytes(): _prompt(row) for row in every if _is_learned(row)}
        prompts = list(found.values())
        tree = PrefixTree()
        order = sorted(range(len(prompts)), key=lambda n: sort_key(prompts[n]))
        for n in order:
            tree.insert(prompts[n], share=True)
        nodes = tree.depth_first()
        lengths = [len(node.tokens) for node in nodes]
        begins = dict(zip(map(id, nodes), np.cumsum([0, *lengths])[:-1].tolist(), strict=True))
        self.units = sum(lengths)
        self._begins: dict[int, int] = begins
        names = list(found)
        self._ends = {names[n]: end for n, end in zip(order, tree.ends, strict=True)}
        self._root = tree.root
        self._nodes = nodes

    def know(self, items: Sequence[Item]) -> bool:
        """Whether all these rows are among them."""
        return all(
            _is_learned(row) and _prompt(row).tobytes() in self._ends
            for item in items
            for row in rows_of(item)
        )

    def places(self, row: Example) -> np.ndarray:
        """(tokens of its prompt,) units."""
        parts: list[np.ndarray] = []
        node: Node | None = self._ends[_prompt(row).tobytes()]
        while node is not None and node is not self._root:
            begin = self._begins[id(node)]
            parts.append(np.arange(begin, begin + len(node.tokens)))
            node = node.parent
        return np.concatenate(parts[::-1]) if parts else np.zeros(0, np.int64)

    def digest(self) -> bytes:
        """A hash of all prompts and of where they are."""
        digest = hashlib.sha256()
        for node in self._nodes:
            above = -1 if node.parent is self._root or node.parent is None else self._begins[id(node.parent)]
            digest.update(above.to_bytes(8, "little", signed=True) + len(node.tokens).to_bytes(8, "little"))
            digest.update(node.tokens.astype("<i4").tobytes())
        return digest.digest()


def _is_learned(row: Example) -> bool:
    """Whether an adapter acts on the row, and before each of its labels."""
    return row.active_from is not None and learns(row)


def _prompt(row: Example) -> np.ndarray:
    """The tokens on which the adapter does not act."""
    return row.tokens[: row.active_from]


@dataclasses.dataclass(frozen=True, eq=False)
class PromptedBatch:
    """A batch, and which of its tokens are in the store; all else is asked of the batch.

    Attributes:
        units: (T,) the unit of each token of a prompt, -1 for the others.
        tokens: that run: those of the answers, and of prompts that are not known yet.
    """

    inner: Batch
    units: np.ndarray
    tokens: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class StoredPrompts:
    """Keys and values of prompts: computed where they are missing, else read.

    Args:
        objective, batcher: what a training without it would use.
        index: the rows that there is room for; others run as a whole.
        store: where keys and values are; its rows are units.
        form: of the keys; None where it is still to be seen.
        inactive_cost: what a token of a prompt counts in a microbatch.

    Attributes:
        objective, batcher: to be used in place of the given ones, together.
    """

    def __init__(
        self,
        objective: CausalObjective,
        batcher: CausalMicroBatcher,
        index: PromptIndex,
        store: FeatureStore,
        form: Form | None = None,
        inactive_cost: float = 1.0,
    ) -> None:
        self.index = index
        self.store = store
        self.form = form
        self.most = batcher.tokens_per_pass
        self.backbone = backbone_of(objective.model)
        self.objective = PromptedObjective(objective, self)
        self.batcher = PromptedBatcher(batcher, self, inactive_cost)

    def close(self) -> None:
        """Bring everything to the disk and let other runs have it."""
        self.store.close()

    def known_keys(self, batch: PromptedBatch) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer, keys and values of the whole packed row, those of its prompts filled in."""
        prompt = np.flatnonzero(batch.units >= 0)
        units = batch.units[prompt]
        there = self.store.done[units]
        keys = self._read(batch, prompt[there], units[there]) if there.any() else {}
        missing = prompt[~there]
        for start in range(0, len(missing), self.most):
            self._run(batch, missing[start : start + self.most], keys)
        if self.form is None:
            self.form = {number: (k.shape[1:], v.shape[1:]) for number, (k, v) in keys.items()}
        if len(missing):
            found, first = np.unique(batch.units[missing], return_index=True)
            places = _tensor(missing[first], batch)
            parts = [t.index_select(0, places).flatten(1) for n in sorted(keys) for t in keys[n]]
            self.store.write(found, found, torch.cat(parts, 1))
        return keys

    def _read(
        self, batch: PromptedBatch, places: np.ndarray, units: np.ndarray
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer, keys and values (T, key heads, d) with those of the store at these places."""
        assert self.form is not None
        where = _tensor(places, batch)
        values = to_device(self.store.read(units), where.device)
        length, at = len(batch.units), 0
        keys: dict[int, tuple[Tensor, Tensor]] = {}
        for number in sorted(self.form):
            both = []
            for shape in self.form[number]:
                part = values[:, at : at + shape.numel()]
                whole = part.new_zeros(length, *shape)
                both.append(whole.index_copy_(0, where, part.view(-1, *shape)))
                at += shape.numel()
            keys[number] = (both[0], both[1])
        return keys

    @torch.no_grad()
    def _run(self, batch: PromptedBatch, places: np.ndarray, keys: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Run tokens of prompts as the base model does; their keys and values are added to ``keys``."""
        inputs = _part_of(batch, _tensor(places, batch), keys)
        self.backbone(**inputs, **{PLACES: False}, use_cache=False)


def _part_of(
    batch: PromptedBatch, places: Tensor, keys: dict[int, tuple[Tensor, Tensor]]
) -> dict[str, object]:
    """The model's inputs for the tokens at these places."""
    inputs: Any = batch.inner.inputs
    return {
        "input_ids": inputs["input_ids"].index_select(1, places),
        "position_ids": inputs["position_ids"].index_select(1, places),
        "packed_layout": PartialLayout(inputs["packed_layout"], places, keys),
    }


def _tensor(places: np.ndarray, batch: PromptedBatch) -> Tensor:
    return to_device(torch.from_numpy(places), batch.inner.predictors.device)


class PromptedBatcher:
    """Microbatches that know which of their tokens are in the store; all else is asked of the inner batcher.

    Cut by what runs in each epoch: many prompts go with few tokens of answers.
    """

    def __init__(self, inner: CausalMicroBatcher, prompts: StoredPrompts, inactive_cost: float) -> None:
        self.inner = inner
        self._prompts = prompts
        self._cutting = dataclasses.replace(inner, inactive_cost=inactive_cost)

    def batches(self, rows: Sequence[Item]) -> Iterator[Any]:
        index = self._prompts.index
        if not index.know(rows):
            yield from self.inner.batches(rows)
            return
        for batch in self._cutting.batches(rows):
            length = batch.inputs["packed_layout"].length  # type: ignore[attr-defined]
            units = np.full(length, -1)
            for member in batch.members:
                units[member.places[: member.example.active_from]] = index.places(member.example)
            known = int(self._prompts.store.done[units[units >= 0]].sum())
            yield PromptedBatch(batch, units, batch.tokens - known)

    def shapes(self, rows: Sequence[Item]) -> list[tuple[int, int]]:
        """(1, tokens that count) of each microbatch."""
        return (self._cutting if self._prompts.index.know(rows) else self.inner).shapes(rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class PromptedObjective:
    """The inner objective on the answers of batches whose prompts are known; other batches run as a whole.

    All else is asked of the inner objective.
    """

    def __init__(self, inner: CausalObjective, prompts: StoredPrompts) -> None:
        self.inner = inner
        self._prompts = prompts

    def __call__(self, batch: Any) -> Tensor:
        return self.inner(self._answers(batch))

    def units(self, rows: Sequence[Any]) -> int:
        """As the inner objective counts."""
        return self.inner.units(rows)

    def token_log_probs(self, batch: Any) -> Tensor:
        """As :meth:`deltaw.training.tasks.causal_objective.CausalObjective.token_log_probs`."""
        return self.inner.token_log_probs(self._answers(batch))

    def evaluate_rows(self, batch: Any) -> tuple[Tensor, Tensor]:
        """As :meth:`deltaw.training.tasks.causal_objective.CausalObjective.evaluate_rows`."""
        return self.inner.evaluate_rows(self._answers(batch))

    def _answers(self, batch: Any) -> Any:
        """The batch with the tokens alone on which the adapter acts, over the keys of all."""
        if not isinstance(batch, PromptedBatch):
            return batch
        keys = self._prompts.known_keys(batch)
        active = np.flatnonzero(batch.units < 0)
        place = np.cumsum(batch.units < 0) - 1
        places = _tensor(active, batch)
        predictors = _tensor(place, batch).index_select(0, batch.inner.predictors)
        inputs = {**_part_of(batch, places, keys), PLACES: True}
        return dataclasses.replace(batch.inner, inputs=inputs, predictors=predictors, asked=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
