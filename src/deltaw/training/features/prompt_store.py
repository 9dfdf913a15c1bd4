"""Whether prompts run apart from answers under an activated adapter, and where their keys are kept.

This is verified first, on a small copy of the model (``runtime.partial_check``) and on the model itself: a
few of the user's own rows run in two parts, with keys computed and keys read, and as a whole with the adapter
masked before the invocation sequence. Loss and gradients must agree, or rows run as a whole and the run says
why. Keys of an earlier run are compared with new ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from deltaw.cache import key
from deltaw.data.example import Example
from deltaw.data.packing import Item, rows_of
from deltaw.data.sequences import lengths_of
from deltaw.errors import UserError
from deltaw.host.choices import Choice
from deltaw.host.kernel_choice import computed_on
from deltaw.hub.skeleton import has_values
from deltaw.lora import adapter_parameters, is_factor_B
from deltaw.runtime.layer_entry import Level, frozen_digest
from deltaw.runtime.partial_check import can_run_apart
from deltaw.training.features.device_store import on_device
from deltaw.training.features.prefix_cache import IRRELEVANT, MADE_BY, MEMORY_BYTES
from deltaw.training.features.prompts import Form, PromptIndex, StoredPrompts
from deltaw.training.features.store import (
    LIMIT_BYTES,
    FeatureStore,
    MemoryStore,
    NoStore,
    PartStore,
    Shape,
    ShapeStore,
    open_store,
    size_text,
)
from deltaw.training.features.trial import (
    TRIED_ROWS,
    few_rows,
    loss_and_gradients,
    near,
    tolerance_of,
)
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from deltaw.training.tasks.causal_objective import CausalObjective

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
    whole = "whole rows, the adapter masked before the invocation sequence: "
    if not isinstance(batcher, CausalMicroBatcher) or not isinstance(objective, CausalObjective):
        return None, Choice("masked", whole + "the task has batches of its own")
    if batcher.padded:
        return None, Choice("masked", whole + "rows are padded")
    if int(lengths_of(examples).sum()) > MANY_TOKENS:
        return None, Choice("masked", whole + "there are too many rows to tell prompts that begin alike")
    index = PromptIndex(examples)
    if not index.units:
        return None, Choice("masked", whole + "nothing precedes it")
    apart = can_run_apart(model)
    if not apart.value:
        return None, Choice("masked", whole + apart.why)
    known = [row for item in examples for row in rows_of(item) if index.know([row])]
    few: list[Example] = few_rows(known)
    try:
        form, dtype = _form(objective, batcher, few)
        difference = _difference(model, objective, batcher, few, form, dtype)
    except Exception as error:  # whatever a foreign model raises here, it can run whole rows
        brief = f"{type(error).__name__}: {str(error)[:100]}"
        return None, Choice("masked", f"{whole}{type(model).__name__} cannot run prompts apart ({brief})")
    if difference is not None:
        return None, Choice("masked", f"{whole}{type(model).__name__} run apart gives {difference}")
    store, how = _store(model, index, form, dtype, batcher, keep, folder, limit)
    prompts = StoredPrompts(objective, batcher, index, store, form, _inactive_cost(model, form))
    try:
        again = _still_right(prompts, known)
    except BaseException:
        prompts.close()
        raise
    found = f", {again:,} of {index.units:,} tokens there already" if again else ""
    return prompts, Choice(how.value, how.why + found)


def _form(
    objective: CausalObjective, batcher: CausalMicroBatcher, few: Sequence[Example]
) -> tuple[Form, torch.dtype]:
    """Shapes and type of a token's keys and values, seen by running a few."""
    index = PromptIndex(few)
    prompts = StoredPrompts(objective, batcher, index, NoStore(index.units))
    for batch in prompts.batcher.batches(few):
        keys = prompts.known_keys(batch)
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
    model: PreTrainedModel,
    objective: CausalObjective,
    batcher: CausalMicroBatcher,
    few: Sequence[Example],
    form: Form,
    dtype: torch.dtype,
) -> str | None:
    """What differs from whole rows with the adapter masked, with keys computed and keys read; None where
    nothing does. On fake tensors nothing is compared, but it must run."""
    trained = [p for p in model.parameters() if p.requires_grad]
    index = PromptIndex(few)
    store = MemoryStore(Shape.of(index.units, index.units, _width(form), dtype))
    prompts = StoredPrompts(objective, batcher, index, store, form)
    real = has_values(model)
    with _acting(model) if real else contextlib.nullcontext():
        usual = loss_and_gradients(objective, batcher, few, trained)
        for _ in range(2):
            ours = loss_and_gradients(prompts.objective, prompts.batcher, few, trained)
            if not real:
                continue
            if not near(usual[:1], ours[:1], tolerance_of(dtype)):
                return "another loss"
            exact = dtype in (torch.float32, torch.float64)
            if not near(usual[1:], ours[1:], tolerance_of(dtype) if exact else ROUNDED):
                return "other gradients"
    return None


def _store(
    model: PreTrainedModel,
    index: PromptIndex,
    form: Form,
    dtype: torch.dtype,
    batcher: CausalMicroBatcher,
    keep: bool,
    folder: Path | None,
    limit: int,
) -> tuple[FeatureStore, Choice[str]]:
    """Where keys and values are kept: all of them, or those of as many tokens as there is room for."""
    once = "prompts run without the adapter and without a backward"
    if not keep:
        return NoStore(index.units), Choice("recomputed", f"{once}, in each step anew: rows come once")
    real = has_values(model)
    name = _name(model, index, dtype, batcher) if real else ""
    refused = ""
    for share in SHARES:
        units = int(index.units * share)
        shape = Shape.of(units, units, _width(form), dtype)
        size = size_text(shape.bytes)
        store: FeatureStore
        try:
            if real:
                about = f"{type(model).__name__}, keys and values of {units:,} tokens of prompts"
                kept = open_store(f"{name}-{units}", shape, about=about, folder=folder, limit=limit)
                store, where = kept, f"{size} in {kept.folder}"
            elif shape.bytes > limit:
                continue
            else:
                store, where = ShapeStore(shape), f"{size} on the disk"
        except UserError as error:
            refused = refused or error.what
            if shape.bytes > MEMORY_BYTES:
                continue
            store, where = MemoryStore(shape), f"{size} in memory, since {refused}"
        if share == 1:
            return on_device(store, model.device), Choice("kept", f"{once}, once for each row: {where}")
        part = f"once for {share:.0%} of their tokens and in each step anew for the others: {where}"
        why = f"{once}, {part}" + (f", since {refused}" if refused not in where else "")
        return PartStore(store, index.units), Choice("kept", why)
    return NoStore(index.units), Choice("recomputed", f"{once}, in each step anew, since {refused}")


def _name(model: PreTrainedModel, index: PromptIndex, dtype: torch.dtype, batcher: CausalMicroBatcher) -> str:
    """For everything that stored values depend on."""
    facts = [
        "prompts",
        str(dtype),
        type(model.base_model).__name__,
        {k: v for k, v in model.config.to_dict().items() if k not in IRRELEVANT},
        frozen_digest(model, Level("head")),
        computed_on(torch.device(batcher.device)),
        index.digest().hex(),
    ]
    return key("features", facts, MADE_BY)


def _still_right(prompts: StoredPrompts, rows: Sequence[Example]) -> int:
    """Tokens that the store has already; none, all forgotten, where some computed anew differ from it."""
    store, index = prompts.store, prompts.index
    count = int(store.done.sum())
    if not count:
        return 0
    whole = [row for row in rows if store.done[index.places(row)].all() and len(index.places(row))]
    few = whole[:: max(1, len(whole) // TRIED_ROWS)][:TRIED_ROWS]
    again = PromptIndex(few)
    shape = _of_size(store.shape, again.units)
    fresh = StoredPrompts(
        prompts.objective.inner, prompts.batcher.inner, again, MemoryStore(shape), prompts.form
    )
    for batch in fresh.batcher.batches(few):
        fresh.known_keys(batch)
    for row in few:
        before, after = store.read(index.places(row)), fresh.store.read(again.places(row))
        if not near([after], [before], tolerance_of(before.dtype)):
            store.forget()
            return 0
    if not few:
        store.forget()
        return 0
    return count


def _of_size(shape: Shape, units: int) -> Shape:
    return Shape(units, units, shape.width, shape.dtype)
