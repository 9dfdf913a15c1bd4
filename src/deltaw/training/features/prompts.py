"""What an activated adapter does not act on: keys and values of prompts, computed once for each row.

Before its invocation sequence an activated adapter is off (``deltaw.lora.adapted``). So keys and values of
a prompt are the base model's own: they need no backward, and are the same in every epoch. A batch runs in two
parts. Those tokens of its prompts whose keys are not known yet go through the model without a graph and
without the adapter. Then the answers run, forward and backward, over the keys of all tokens. What was
computed is kept in a store, in which prompts that begin alike share the beginning.

Knows examples, batches, models and stores; not files, keys of stores or optimizers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.cache import key
from deltaw.data.example import Example, Item, rows_of
from deltaw.data.invocation import learns
from deltaw.data.packing import Batch, Node, PrefixTree, sort_key
from deltaw.data.sequences import lengths_of
from deltaw.errors import UserError
from deltaw.hub.loading import has_values
from deltaw.kernels.transfer import to_device
from deltaw.lora import adapter_parameters, is_factor_B
from deltaw.lora.adapted import PLACES
from deltaw.machine.choices import Choice
from deltaw.runtime.layer_entry import Level
from deltaw.runtime.packed import backbone_of
from deltaw.runtime.partial import PartialLayout
from deltaw.runtime.partial_check import can_run_apart
from deltaw.training.features.prefix_cache import (
    MADE_BY,
    TRIED_ROWS,
    brief,
    difference_of,
    facts_of,
    few_rows,
    near,
    on_device,
    placed,
    tolerance_of,
)
from deltaw.training.features.store import LIMIT_BYTES, FeatureStore, MemoryStore, NoStore, PartStore, Shape
from deltaw.training.microbatches import AnyBatcher, AnyObjective, Feed
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
        ordered = sorted(found.items(), key=lambda named: sort_key(named[1]))
        tree = PrefixTree()
        for _, prompt in ordered:
            tree.insert(prompt, share=True)
        self._root, self._nodes = tree.root, tree.depth_first()
        *begins, self.units = np.cumsum([0, *(len(node.tokens) for node in self._nodes)]).tolist()
        self._begins = dict(zip(map(id, self._nodes), begins, strict=True))
        self._ends = {name: end for (name, _), end in zip(ordered, tree.ends, strict=True)}

    def know(self, items: Sequence[Item]) -> bool:
        """Whether all these rows are among them."""
        return all(_is_learned(row) and _prompt(row).tobytes() in self._ends for item in items for row in rows_of(item))

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


class StoredPrompts(Feed):
    """Keys and values of prompts: computed where they are missing, else read. Its microbatches run the tokens of
    answers alone, over the keys of all.

    Args:
        objective, batcher: what a training without it would use.
        index: the rows that there is room for; others run as a whole.
        store: where keys and values are; its rows are units.
        form: of the keys; None where it is still to be seen.
        inactive_cost: what a token of a prompt counts in a microbatch. Microbatches are cut by what runs in each
            epoch: many prompts go with few tokens of answers.
    """

    store: FeatureStore

    def __init__(
        self,
        objective: CausalObjective,
        batcher: CausalMicroBatcher,
        index: PromptIndex,
        store: FeatureStore,
        form: Form | None = None,
        inactive_cost: float = 1.0,
    ) -> None:
        super().__init__(objective, batcher, store)
        self.index = index
        self.form = form
        self.most = batcher.tokens_per_pass
        self.backbone = backbone_of(objective.model)
        self._cutting = dataclasses.replace(batcher, inactive_cost=inactive_cost)

    def batches(self, rows: Sequence[Item]) -> Iterator[Batch]:
        if not self.index.know(rows):
            yield from self.batcher.batches(rows)
            return
        for batch in self._cutting.batches(rows):
            units = self.units_of(batch)
            known = int(self.store.done[units[units >= 0]].sum())
            enter = functools.partial(self._answers, batch, units)
            yield dataclasses.replace(batch, tokens=batch.tokens - known, enter=enter)

    def shapes(self, rows: Sequence[Item]) -> list[tuple[int, int]]:
        """(1, tokens that count) of each microbatch."""
        return (self._cutting if self.index.know(rows) else self.batcher).shapes(rows)

    def units_of(self, batch: Batch) -> np.ndarray:
        """(T,) the unit of each token of a prompt, -1 for the others."""
        units = np.full(batch.inputs["packed_layout"].length, -1)  # type: ignore[attr-defined]
        for member in batch.members:
            units[member.places[: member.example.active_from]] = self.index.places(member.example)
        return units

    def known_keys(self, batch: Batch, all_units: np.ndarray) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer, keys and values of the whole packed row, those of its prompts filled in."""
        prompt = np.flatnonzero(all_units >= 0)
        units = all_units[prompt]
        there = self.store.done[units]
        keys = self._read(batch, prompt[there], units[there]) if there.any() else {}
        missing = prompt[~there]
        for start in range(0, len(missing), self.most):
            self._run(batch, missing[start : start + self.most], keys)
        if self.form is None:
            self.form = {number: (k.shape[1:], v.shape[1:]) for number, (k, v) in keys.items()}
        if len(missing):
            found, first = np.unique(all_units[missing], return_index=True)
            places = _tensor(missing[first], batch)
            parts = [t.index_select(0, places).flatten(1) for n in sorted(keys) for t in keys[n]]
            self.store.write(found, found, torch.cat(parts, 1))
        return keys

    @contextlib.contextmanager
    def _answers(self, batch: Batch, units: np.ndarray) -> Iterator[Batch]:
        """The batch with the tokens alone on which the adapter acts, over the keys of all."""
        keys = self.known_keys(batch, units)
        places = _tensor(np.flatnonzero(units < 0), batch)
        predictors = _tensor(np.cumsum(units < 0) - 1, batch).index_select(0, batch.predictors)
        inputs = {**_part_of(batch, places, keys), PLACES: True}
        yield dataclasses.replace(batch, inputs=inputs, predictors=predictors, asked=None)

    def _read(self, batch: Batch, places: np.ndarray, units: np.ndarray) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer, keys and values (T, key heads, d) with those of the store at these places."""
        assert self.form is not None
        where = _tensor(places, batch)
        values = to_device(self.store.read(units), where.device)
        length, at = batch.inputs["packed_layout"].length, 0  # type: ignore[attr-defined]
        found: dict[int, list[Tensor]] = {}
        for number in sorted(self.form):
            for shape in self.form[number]:
                part = values[:, at : at + shape.numel()]
                whole = part.new_zeros(length, *shape).index_copy_(0, where, part.view(-1, *shape))
                found.setdefault(number, []).append(whole)
                at += shape.numel()
        return {number: (k, v) for number, (k, v) in found.items()}

    @torch.no_grad()
    def _run(self, batch: Batch, places: np.ndarray, keys: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Run tokens of prompts as the base model does; their keys and values are added to ``keys``."""
        inputs = _part_of(batch, _tensor(places, batch), keys)
        self.backbone(**inputs, **{PLACES: False}, use_cache=False)


def _part_of(batch: Batch, places: Tensor, keys: dict[int, tuple[Tensor, Tensor]]) -> dict[str, object]:
    """The model's inputs for the tokens at these places."""
    inputs: Any = batch.inputs
    return {
        "input_ids": inputs["input_ids"].index_select(1, places),
        "position_ids": inputs["position_ids"].index_select(1, places),
        "packed_layout": PartialLayout(inputs["packed_layout"], places, keys),
    }


def _tensor(places: np.ndarray, batch: Batch) -> Tensor:
    return to_device(torch.from_numpy(places), batch.predictors.device)


# Whether prompts run apart from answers under an activated adapter, and where their keys are kept.
#
# This is verified first, on a small copy of the model (``runtime.partial_check``) and on the model itself: a
# few of the user's own rows run in two parts, with keys computed and keys read, and as a whole with the adapter
# masked before the invocation sequence. Loss and gradients must agree, or rows run as a whole and the run says
# why. Keys of an earlier run are compared with new ones.

# Shares of the prompts' tokens that are kept: the first one that there is room for.
SHARES = (1.0, 0.5, 0.25, 0.125)
# Rows of more tokens than this are not sorted into one tree, which is in memory.
MANY_TOKENS = 100_000_000
# The vectors of the model's width that a token keeps in each block for the backward, roughly.
KEPT_VECTORS = 20
# The relative difference of gradients that rounding alone may make, since the masked adapter runs the model's
# own code: up to 0.05 was seen in bf16 and 0.2 with int8-quantized weights. In fp32 it is that of ``trial``.
ROUNDED = 0.5


def stored_prompts(
    model: PreTrainedModel,
    objective: AnyObjective,
    batcher: AnyBatcher,
    examples: Sequence[Item],
    *,
    keep: bool = True,
    folder: Path | None = None,
    limit: int = LIMIT_BYTES,
) -> tuple[StoredPrompts | None, Choice[str]]:
    """A training's prompts, run apart; to be called where the model can run these batches, nothing random.

    In a dry run on fake tensors the store holds shapes alone, so that a plan sees the same steps.

    Args:
        objective, batcher: what the training would use otherwise.
        examples: every row that will come, held-out ones too.
        keep: whether keys and values are kept; otherwise they are computed again each time.
        folder: where stores are. limit: bytes that all stores may take.

    Returns:
        the prompts, which are to be closed in the end, and how they run; None and why not.
    """

    def masked(why: str) -> tuple[None, Choice[str]]:
        return None, Choice("masked", f"whole rows, the adapter masked before the invocation sequence: {why}")

    if not isinstance(batcher, CausalMicroBatcher) or not isinstance(objective, CausalObjective):
        return masked("the task has batches of its own")
    if batcher.padded:
        return masked("rows are padded")
    if int(lengths_of(examples).sum()) > MANY_TOKENS:
        return masked("there are too many rows to tell prompts that begin alike")
    index = PromptIndex(examples)
    if not index.units:
        return masked("nothing precedes it")
    apart = can_run_apart(model)
    if not apart.value:
        return masked(apart.why)
    known = [row for item in examples for row in rows_of(item) if index.know([row])]
    few: list[Example] = few_rows(known)
    try:
        form, dtype = _form(objective, batcher, few)
        difference = _difference(model, Feed(objective, batcher), few, form, dtype)
    except Exception as error:  # whatever a foreign model raises here, it can run whole rows
        return masked(f"{type(model).__name__} cannot run prompts apart ({brief(error)})")
    if difference is not None:
        return masked(f"{type(model).__name__} run apart gives {difference}")
    once = "prompts run without the adapter and without a backward"
    store: FeatureStore = NoStore(index.units)
    how = Choice("recomputed", f"{once}, in each step anew: rows come once")
    if keep:
        store, how = _store(model, index, batcher, _width(form), dtype, once, folder=folder, limit=limit)
    prompts = StoredPrompts(objective, batcher, index, store, form, _inactive_cost(model, form))
    try:
        again = _still_right(prompts, known)
    except BaseException:
        prompts.close()
        raise
    found = f", {again:,} of {index.units:,} tokens there already" if again else ""
    return prompts, Choice(how.value, how.why + found)


def _form(objective: CausalObjective, batcher: CausalMicroBatcher, few: Sequence[Example]) -> tuple[Form, torch.dtype]:
    """Shapes and type of a token's keys and values, seen by running a few."""
    index = PromptIndex(few)
    prompts = StoredPrompts(objective, batcher, index, NoStore(index.units))
    for batch in batcher.batches(few):
        keys = prompts.known_keys(batch, prompts.units_of(batch))
        if keys and prompts.form:
            return prompts.form, next(iter(keys.values()))[0].dtype
    raise RuntimeError("no attention was seen")


def _width(form: Form) -> int:
    return sum(shape.numel() for shapes in form.values() for shape in shapes)


def _inactive_cost(model: PreTrainedModel, form: Form) -> float:
    """What a prompt's token takes of memory beside an answer's, which keeps activations for the backward."""
    config = model.config.get_text_config()
    blocks, width = (getattr(config, name, 0) or 0 for name in ("num_hidden_layers", "hidden_size"))
    return min(1.0, _width(form) / max(1, KEPT_VECTORS * blocks * width))


@contextlib.contextmanager
def _acting(model: nn.Module) -> Iterator[None]:
    """While open, each B is other than zero, so that the adapter acts and A has a gradient."""
    factors = [p for name, p in adapter_parameters(model) if is_factor_B(name)]
    before = [p.detach().clone() for p in factors]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in factors:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1 * p.shape[0] ** -0.5)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(factors, before, strict=True):
                p.copy_(value)


def _difference(
    model: PreTrainedModel, usual: Feed, few: Sequence[Example], form: Form, dtype: torch.dtype
) -> str | None:
    """What differs from whole rows with the adapter masked; None where nothing does. On fake tensors nothing is
    compared, but it must run."""
    trained = [p for p in model.parameters() if p.requires_grad]
    index, exact = PromptIndex(few), dtype in (torch.float32, torch.float64)
    store = MemoryStore(Shape.of(index.units, index.units, _width(form), dtype))
    prompts = StoredPrompts(usual.objective, usual.batcher, index, store, form)  # type: ignore[arg-type]
    if not has_values(model):
        return difference_of(usual, prompts, few, trained, loss=None)
    with _acting(model):
        gradients = None if exact else ROUNDED
        return difference_of(usual, prompts, few, trained, loss=tolerance_of(dtype), gradients=gradients)


def _store(
    model: PreTrainedModel,
    index: PromptIndex,
    batcher: CausalMicroBatcher,
    width: int,
    dtype: torch.dtype,
    once: str,
    *,
    folder: Path | None,
    limit: int,
) -> tuple[FeatureStore, Choice[str]]:
    """Where keys and values are kept, and why: all of them, or those of as many tokens as there is room for."""
    real, name, refused = has_values(model), "", ""
    if real:
        below = facts_of(model, Level("head"), torch.device(batcher.device))
        name = key("features", ["prompts", str(dtype), *below, index.digest().hex()], MADE_BY)
    for share in SHARES:
        units = int(index.units * share)
        shape = Shape.of(units, units, width, dtype)
        if not real and shape.bytes > limit:
            continue
        about = f"{type(model).__name__}, keys and values of {units:,} tokens of prompts"
        numbered = f"{name}-{units}" if real else ""
        try:
            store, where = placed(numbered, shape, about=about, folder=folder, limit=limit, since=refused)
        except UserError as error:
            refused = refused or error.what
            continue
        if share == 1:
            return on_device(store, model.device), Choice("kept", f"{once}, once for each row: {where}")
        part = f"once for {share:.0%} of their tokens and in each step anew for the others: {where}"
        why = f"{once}, {part}" + (f", since {refused}" if refused not in where else "")
        return PartStore(store, index.units), Choice("kept", why)
    return NoStore(index.units), Choice("recomputed", f"{once}, in each step anew, since {refused}")


def _still_right(prompts: StoredPrompts, rows: Sequence[Example]) -> int:
    """Tokens that the store has already; none, all forgotten, where some computed anew differ from it."""
    store, index = prompts.store, prompts.index
    count = int(store.done.sum())
    if not count:
        return 0
    whole = [row for row in rows if store.done[index.places(row)].all() and len(index.places(row))]
    few = whole[:: max(1, len(whole) // TRIED_ROWS)][:TRIED_ROWS]
    again = PromptIndex(few)
    room = MemoryStore(dataclasses.replace(store.shape, rows=again.units, units=again.units))
    fresh = StoredPrompts(prompts.objective, prompts.batcher, again, room, prompts.form)  # type: ignore[arg-type]
    for batch in prompts.batcher.batches(few):
        fresh.known_keys(batch, fresh.units_of(batch))
    read = ((store.read(index.places(row)), fresh.store.read(again.places(row))) for row in few)
    if few and all(near([after], [before], tolerance_of(before.dtype)) for before, after in read):
        return count
    store.forget()
    return 0
