"""Quantization of the frozen linear layers of a script's model, in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from deltaw.acceleration.peft_layers import is_peft_module
from deltaw.acceleration.shared_copy import SharedCopy
from deltaw.data.example import Example
from deltaw.errors import UserError
from deltaw.training.preparation import quantize_weights

PRECISIONS = ("int8", "nf4")
# Number of rows for the calibration.
CALIBRATION_ROWS = 64


def quantize_frozen(model: PreTrainedModel, precision: str, rows: Iterable[Any]) -> str:
    """Quantize the frozen linear layers of a model's blocks, and release their weights.

    Args:
        model: Model, possibly with layers of PEFT.
        precision: One of :data:`PRECISIONS`.
        rows: Lists of token ids, for the calibration of int8.

    Returns:
        Description of the quantized layers, and the change of the loss on the rows.

    Raises:
        UserError: if the precision is unknown, or if weights of the blocks are trained.
    """
    if precision not in PRECISIONS:
        hint = f"use one of {', '.join(PRECISIONS)}, or load the model in another dtype"
        raise UserError(f"the precision {precision} cannot be set for a loaded model", hint=hint)
    shared = SharedCopy(model, None, {}, without_adapters=True)
    if any(parameter.requires_grad for parameter in shared.model.base_model.parameters()):
        message = "weights of the model are trained, so they cannot be quantized"
        raise UserError(message, location="precision", hint="add an adapter first, for example with PEFT")
    shared.model.eval()
    examples = [_example(n, tokens) for n, tokens in enumerate(rows)]
    messages, _ = quantize_weights(shared.model, precision, examples)
    for layer in shared.replace_in_source():
        if is_peft_module(layer):
            vars(layer)["merge"] = _refuse_merge
    return " ".join(message.strip().removeprefix(f"precision {precision}: ") for message in messages)


def calibration_rows(dataset: Any) -> list[Any]:
    """Return token ids of the first rows of a trainer's data set. Empty if its rows have no token ids."""
    columns = getattr(dataset, "column_names", None) or []
    name = next((column for column in ("input_ids", "prompt_ids", "prompt_input_ids") if column in columns), None)
    return [] if name is None else [row[name] for row in dataset.select(range(min(CALIBRATION_ROWS, len(dataset))))]


def _example(row: int, tokens: Any) -> Example:
    ids = np.asarray(tokens, np.int32).ravel()
    return Example(row + 1, ids, np.arange(len(ids)) > 0, 0, None)


def _refuse_merge(*args: Any, **kwargs: Any) -> None:
    """Replace the method of PEFT that adds an update to a weight, which would round it to integers."""
    message = "the weights of this model are quantized, so an adapter cannot be merged into them"
    raise UserError(message, hint="save the adapter, load the model again without precision, and merge it there")


def is_quantized(model: nn.Module) -> bool:
    """True if :func:`quantize_frozen` changed a model."""
    return any(vars(module).get("merge") is _refuse_merge for module in model.modules())
