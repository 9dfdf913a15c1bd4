"""Creation of stored prompts, which are verified first on a small copy of the model and on the model itself.

Sample rows of the user run in two parts, with computed and with stored keys, and in one part with the adapter masked
before the invocation sequence. Loss and gradients must agree. Otherwise rows run in one part and the run reports the
reason. Stored keys of an earlier run are compared with new ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from deltaw.cache.keys import key
from deltaw.data.example import Example, Item, lengths_of, rows_of
from deltaw.errors import UserError
from deltaw.hub.skeletons import has_values
from deltaw.lora import adapter_parameters, is_factor_B
from deltaw.machine.choices import Choice
from deltaw.runtime.layer_entry import Level
from deltaw.runtime.packing_checks import can_run_separately
from deltaw.training.batchers import CausalMicroBatcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.features.device_store import with_device_copy
from deltaw.training.features.feed_comparison import (
    NUM_PROBE_ROWS,
    compare_feeds,
    is_close,
    select_probe_rows,
    short_error,
    tolerance_of,
)
from deltaw.training.features.prefix_cache import CACHE_DEPENDENCIES, create_store, model_key
from deltaw.training.features.prompts import KeyShapes, PromptIndex, StoredPrompts
from deltaw.training.features.store import FeatureStore, MemoryStore, NoStore, PartialStore, Shape, StoreLocation
from deltaw.training.feed import Feed

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
    """Return shapes and dtype of a token's keys and values, from running sample rows."""
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
    index = PromptIndex(rows)
    is_wide = dtype in (torch.float32, torch.float64)
    store = MemoryStore(Shape.of(index.units, index.units, _width(key_shapes), dtype))
    prompts = StoredPrompts(reference, index, store, key_shapes)
    if not has_values(model):
        return compare_feeds(model, reference, prompts, rows, loss_tolerance=None)
    with _random_adapter(model):
        return compare_feeds(
            model,
            reference,
            prompts,
            rows,
            loss_tolerance=tolerance_of(dtype),
            gradient_tolerance=None if is_wide else GRADIENT_TOLERANCE,
        )


def _create_prompt_store(
    model: PreTrainedModel, index: PromptIndex, device: torch.device, full: Shape, summary: str, location: StoreLocation
) -> tuple[FeatureStore, Choice[str]]:
    """Return a store for the keys and values of all prompt tokens, or of as many as fit, with a description."""
    has_weights = has_values(model)
    name = ""
    refusal = ""
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
    store = prompts.store
    index = prompts.index
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
