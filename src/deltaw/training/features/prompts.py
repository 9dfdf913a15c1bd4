"""Cached keys and values of prompts for activated adapters.

An activated adapter is disabled before its invocation sequence (``deltaw.lora.adapted``). The keys and values of a
prompt are therefore those of the base model, need no backward pass, and are equal in each epoch. A batch runs in two
parts. First, prompt tokens without stored keys run without a graph and without the adapter. Then the answers run
forward and backward over the keys of all tokens. The keys and values are stored, and prompts with a common prefix share
it.
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
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.cache import key
from deltaw.data.chat_template import acts_before_labels
from deltaw.data.example import Example, Item, lengths_of, rows_of
from deltaw.data.packing import MicroBatch, Node, PrefixTree, sort_key
from deltaw.errors import UserError
from deltaw.hub.loading import has_values
from deltaw.kernels.layout import Layout, to_device
from deltaw.lora import adapter_parameters, is_factor_B
from deltaw.lora.adapted import ACTIVE_KEYWORD
from deltaw.machine.choices import Choice
from deltaw.runtime.layer_entry import Level
from deltaw.runtime.packed import backbone_of, can_run_separately
from deltaw.runtime.partial import PartialLayout
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.features.prefix_cache import (
    CACHE_DEPENDENCIES,
    NUM_PROBE_ROWS,
    compare_feeds,
    create_store,
    is_close,
    model_key,
    select_probe_rows,
    short_error,
    tolerance_of,
    with_device_copy,
)
from deltaw.training.features.store import FeatureStore, MemoryStore, NoStore, PartialStore, Shape, StoreLocation
from deltaw.training.microbatches import Feed

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
        prompts = {_prompt(row).tobytes(): _prompt(row) for row in all_rows if _is_indexed(row)}
        ordered = sorted(prompts.items(), key=lambda entry: sort_key(entry[1]))
        tree = PrefixTree()
        for _, prompt in ordered:
            tree.insert(prompt, share=True)
        self._root, self._nodes = tree.root, tree.depth_first()
        *starts, self.units = np.cumsum([0, *(len(node.tokens) for node in self._nodes)]).tolist()
        self._starts = dict(zip(map(id, self._nodes), starts, strict=True))
        self._ends = {name: end for (name, _), end in zip(ordered, tree.leaves, strict=True)}

    def contains(self, items: Sequence[Item]) -> bool:
        """Return True if the index contains all these rows."""
        return all(_is_indexed(row) and _prompt(row).tobytes() in self._ends for item in items for row in rows_of(item))

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


def _is_indexed(row: Example) -> bool:
    """Return True if the adapter is active on the row before each label."""
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
        inactive_cost: Cost of a prompt token in a microbatch, relative to an answer token. The microbatch size counts
            tokens that run in each epoch, so that several prompts with short answers fit.
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
        self.index, self.key_shapes, self.max_tokens = index, key_shapes, reference.tokens_per_pass
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
        length, column = _length(batch), 0
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


# Separate prompts are verified first, on a small copy of the model and on the model itself.
# A few rows of the user run in two parts, with computed and with stored keys, and in one part with the adapter masked
# before the invocation sequence. Loss and gradients must agree. Otherwise rows run in one part and the run reports the
# reason. Stored keys of an earlier run are compared with new ones.

# Shares of the prompt tokens to store. The first one that fits is used.
SHARES = (1.0, 0.5, 0.25, 0.125)
# Maximum number of tokens in the prefix tree, which is in memory.
MAX_TREE_TOKENS = 100_000_000
# Approximate number of hidden-size vectors that each block stores per token for the backward pass.
STORED_VECTORS = 20
# Maximum relative difference of gradients due to rounding, because the masked adapter runs the original model code.
# Measured values are up to 0.05 in bf16 and 0.2 with int8 weights. fp32 uses ``tolerance_of``.
GRADIENT_TOLERANCE = 0.5


def stored_prompts(
    model: PreTrainedModel, reference: Feed, examples: Sequence[Item], location: StoreLocation, *, store_keys: bool
) -> tuple[StoredPrompts | None, Choice[str]]:
    """Create the feed with separately computed prompts. Call it when the model accepts these batches, without dropout.

    In a dry run on fake tensors the store contains only shapes, so that a plan runs the same steps.

    Args:
        model: Model to train.
        reference: Feed of the training without stored prompts.
        examples: All rows, including held-out ones.
        location: Location of the stores.
        store_keys: Store keys and values. If False, they are computed in each step.

    Returns:
        The feed, which the caller closes, and a description. Or None and the reason.
    """

    def masked(reason: str) -> tuple[None, Choice[str]]:
        return None, Choice("masked", f"whole rows, the adapter masked before the invocation sequence: {reason}")

    batcher = reference.batcher
    if not isinstance(batcher, CausalMicroBatcher) or not isinstance(reference.objective, CausalObjective):
        return masked("the task has a different batcher")
    if batcher.padded:
        return masked("rows are padded")
    if int(lengths_of(examples).sum()) > MAX_TREE_TOKENS:
        return masked("the data is too large to find common prefixes of prompts")
    index = PromptIndex(examples)
    if not index.units:
        return masked("no tokens precede it")
    separable = can_run_separately(model)
    if not separable.value:
        return masked(separable.why)
    indexed_rows = [row for item in examples for row in rows_of(item) if index.contains([row])]
    probe_rows: list[Example] = select_probe_rows(indexed_rows)
    try:
        key_shapes, dtype = _detect_key_shapes(reference, probe_rows)
        difference = _difference(model, reference, probe_rows, key_shapes, dtype)
    except Exception as error:  # a third-party model can raise any error, and runs rows in one part
        return masked(f"{type(model).__name__} cannot run prompts separately ({short_error(error)})")
    if difference is not None:
        return masked(f"{type(model).__name__} run separately gives {difference}")
    description = "prompts run without the adapter and without a backward"
    store: FeatureStore = NoStore(index.units)
    choice = Choice("recomputed", f"{description}, again in each step: rows occur once")
    if store_keys:
        shape = Shape.of(index.units, index.units, _width(key_shapes), dtype)
        store, choice = _create_prompt_store(model, index, torch.device(batcher.device), shape, description, location)
    prompts = StoredPrompts(reference, index, store, key_shapes, _inactive_cost(model, key_shapes))
    try:
        num_stored = _verify_stored(prompts, indexed_rows)
    except BaseException:
        prompts.close()
        raise
    suffix = f", {num_stored:,} of {index.units:,} tokens already stored" if num_stored else ""
    return prompts, Choice(choice.value, choice.why + suffix)


def _detect_key_shapes(reference: Feed, rows: Sequence[Example]) -> tuple[KeyShapes, torch.dtype]:
    """Return shapes and dtype of a token's keys and values, from running a few rows."""
    index = PromptIndex(rows)
    prompts = StoredPrompts(reference, index, NoStore(index.units))
    for batch in reference.batcher.batches(rows):
        keys = prompts.prompt_keys(batch, prompts.units_of(batch))
        if keys and prompts.key_shapes:
            return prompts.key_shapes, next(iter(keys.values()))[0].dtype
    raise RuntimeError("no attention layer was called")


def _width(key_shapes: KeyShapes) -> int:
    return sum(shape.numel() for shapes in key_shapes.values() for shape in shapes)


def _inactive_cost(model: PreTrainedModel, key_shapes: KeyShapes) -> float:
    """Return the memory of a prompt token relative to an answer token, which stores activations for the backward."""
    config = model.config.get_text_config()
    blocks, width = (getattr(config, name, 0) or 0 for name in ("num_hidden_layers", "hidden_size"))
    return min(1.0, _width(key_shapes) / max(1, STORED_VECTORS * blocks * width))


@contextlib.contextmanager
def _random_adapter(model: nn.Module) -> Iterator[None]:
    """Set each factor B to random values inside this context, so that A has a gradient."""
    factors = [p for name, p in adapter_parameters(model) if is_factor_B(name)]
    original_values = [p.detach().clone() for p in factors]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in factors:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1 * p.shape[0] ** -0.5)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(factors, original_values, strict=True):
                p.copy_(value)


def _difference(
    model: PreTrainedModel, reference: Feed, rows: Sequence[Example], key_shapes: KeyShapes, dtype: torch.dtype
) -> str | None:
    """Return the difference to rows in one part with a masked adapter, or None.

    Fake tensors are run but not compared.
    """
    index, is_wide = PromptIndex(rows), dtype in (torch.float32, torch.float64)
    store = MemoryStore(Shape.of(index.units, index.units, _width(key_shapes), dtype))
    prompts = StoredPrompts(reference, index, store, key_shapes)
    if not has_values(model):
        return compare_feeds(model, reference, prompts, rows, loss=None)
    with _random_adapter(model):
        gradients = 0.0 if is_wide else GRADIENT_TOLERANCE
        return compare_feeds(model, reference, prompts, rows, loss=tolerance_of(dtype), gradients=gradients)


def _create_prompt_store(
    model: PreTrainedModel, index: PromptIndex, device: torch.device, full: Shape, summary: str, location: StoreLocation
) -> tuple[FeatureStore, Choice[str]]:
    """Return a store for the keys and values of all prompt tokens, or of as many as fit, with a description."""
    has_weights, name, refusal = has_values(model), "", ""
    if has_weights:
        parts = ["prompts", str(full.torch_dtype), *model_key(model, Level("head"), device), index.digest().hex()]
        name = key("features", parts, CACHE_DEPENDENCIES)
    for share in SHARES:
        units = int(index.units * share)
        shape = dataclasses.replace(full, rows=units, units=units)
        if not has_weights and shape.bytes > location.limit:
            continue
        about = f"{type(model).__name__}, keys and values of {units:,} tokens of prompts"
        numbered = f"{name}-{units}" if has_weights else ""
        try:
            store, position = create_store(numbered, shape, about, location, refusal)
        except UserError as error:
            refusal = refusal or error.message
            continue
        if share == 1:
            return with_device_copy(store, model.device), Choice("kept", f"{summary}, once per row: {position}")
        part = f"once for {share:.0%} of their tokens and again in each step for the rest: {position}"
        reason = f"{summary}, {part}" + (f", since {refusal}" if refusal not in position else "")
        return PartialStore(store, index.units), Choice("kept", reason)
    return NoStore(index.units), Choice("recomputed", f"{summary}, again in each step, since {refusal}")


def _verify_stored(prompts: StoredPrompts, rows: Sequence[Example]) -> int:
    """Return the number of stored tokens. Clear the store and return 0 if recomputed tokens differ."""
    store, index = prompts.store, prompts.index
    count = int(store.done.sum())
    if not count:
        return 0
    complete_rows = [row for row in rows if store.done[index.row_units(row)].all() and len(index.row_units(row))]
    probes = complete_rows[:: max(1, len(complete_rows) // NUM_PROBE_ROWS)][:NUM_PROBE_ROWS]
    probe_index = PromptIndex(probes)
    memory_store = MemoryStore(dataclasses.replace(store.shape, rows=probe_index.units, units=probe_index.units))
    recomputed = StoredPrompts(prompts, probe_index, memory_store, prompts.key_shapes)
    for batch in prompts.batcher.batches(probes):
        recomputed.prompt_keys(batch, recomputed.units_of(batch))
    pairs = ((store.read(index.row_units(row)), recomputed.store.read(probe_index.row_units(row))) for row in probes)
    if probes and all(is_close([new_values], [stored], tolerance_of(stored.dtype)) for stored, new_values in pairs):
        return count
    store.clear()
    return 0
