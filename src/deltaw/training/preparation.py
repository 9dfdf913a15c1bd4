"""Prepare a model's weights: quantization to int8 or NF4, and activation checkpointing.

int8 quantization is calibrated on rows of the run, and its effect on the loss is reported.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from deltaw.atomic_files import write_text
from deltaw.cache.results import load_result, store_result
from deltaw.data.example import Example, RowGroup
from deltaw.decoding.generation import position_limit
from deltaw.errors import UserError
from deltaw.hub.transformers_private import quiet
from deltaw.lora.stored import quantization_library
from deltaw.machine.kernel_choice import numerics_key
from deltaw.machine.memory import release_free_memory, trim_memory
from deltaw.progress import track_progress
from deltaw.runtime.layer_entry import frozen_level
from deltaw.runtime.nf4 import quantize_nf4, quantize_with_bitsandbytes
from deltaw.runtime.quantized_weights import Rounding, quantize_int8
from deltaw.runtime.sharded import sharded_blocks
from deltaw.training.causal_objective import loss_of_outputs

# Number of calibration tokens for int8.
CALIBRATION_TOKENS = 512
# Maximum number of cached calibrations. Each has 0.5 MB (135M parameters) to 5 MB (8B).
MAX_CACHED_CALIBRATIONS = 40
CACHE_DEPENDENCIES = (
    "torch",
    "transformers",
    "deltaw.kernels",
    "deltaw.lora",
    "deltaw.runtime",
    "deltaw.training.preparation",
)


# File in the run's folder with the int8 calibration, so that inference rounds the base model as in training.
CALIBRATION = "int8.json"


def save_calibration(folder: Path, identity: str | None, roundings: Sequence[Rounding]) -> None:
    """Write the calibration of the model ``identity``, if there is one."""
    if roundings and identity is not None:
        content = {"model": identity, "roundings": [rounding.as_json() for rounding in roundings]}
        write_text(folder / CALIBRATION, json.dumps(content))


def saved_calibration(folder: Path, identity: str | None) -> list[Rounding] | None:
    """Return the calibration that :func:`save_calibration` wrote for this model, or None if missing or damaged."""
    try:
        content = json.loads((folder / CALIBRATION).read_text(encoding="utf-8"))
        return [Rounding.from_json(r) for r in content["roundings"]] if content["model"] == identity else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def quantize_weights(
    model: PreTrainedModel, precision: str, examples: Sequence[Any], identity: str | None = None, device: str = "cpu"
) -> tuple[list[str], list[Rounding]]:
    """Quantize the weights of a freshly loaded model if its precision is int8 or NF4.

    Args:
        model: Model to quantize.
        precision: Precision of the weights.
        examples: Rows for the calibration.
        identity: Identity of the model's weights, used to cache the calibration.
        device: Device to compute on, to which the model is moved.

    Returns:
        Messages for the user, and the int8 calibration of the layers.
    """
    if precision in ("int8", "nf4") and uses_library(model, device):
        return _quantize_with_library(model, precision, device), []
    if precision == "nf4":
        return quantize_weights_nf4(model), []
    return quantize_weights_int8(model, examples, identity) if precision == "int8" else ([], [])


def quantize_weights_int8(
    model: PreTrainedModel, examples: Sequence[Any], identity: str | None = None
) -> tuple[list[str], list[Rounding]]:
    """Quantize the blocks' weights to int8, calibrated on sample rows.

    Call it before the first use of the model: each block's weights are read once and released.

    Returns:
        Messages for the user, and the calibration of the layers.
    """
    examples = _single(examples)
    with torch.no_grad():
        if not all(hasattr(example, "tokens") for example in examples[:1]):
            return [f"precision int8: {quantize_int8(model.base_model)}"], []
        length = min(CALIBRATION_TOKENS, position_limit(model) or CALIBRATION_TOKENS)
        rows = examples[:CALIBRATION_TOKENS]
        tokens = torch.cat([torch.from_numpy(row.tokens) for row in rows])[:length].long()
        labels = None
        if all(isinstance(row, Example) for row in rows):
            labels = torch.cat([torch.from_numpy(row.is_label) for row in rows])[:length].nonzero()[:, 0]
        label_indices = None if labels is None else labels.tolist()
        key = [identity, tokens.tolist(), label_indices, numerics_key(model.device), torch.get_num_threads()]
        sharded = sharded_blocks(model)
        cached = None if identity is None or sharded is not None else load_result("int8", key, CACHE_DEPENDENCIES)
        if isinstance(cached, dict):
            roundings = [Rounding.from_json(rounding) for rounding in cached["roundings"]]
            quantize_int8(model.base_model, roundings=roundings)
            trim_memory()
            return list(cached["said"]), roundings
        hidden_states: list[Tensor] = []
        inputs: dict[str, Any] = {"input_ids": tokens[None]}
        if "use_cache" in inspect.signature(model.base_model.forward).parameters:
            inputs["use_cache"] = False  # keys and values of all blocks can be larger than a block's weights
        report = quantize_int8(model.base_model, lambda: hidden_states.append(model.base_model(**inputs)[0][0]))
        if sharded is not None:
            sharded.finish()
        messages = [f"precision int8: {report}"]
        head = model.get_output_embeddings()
        if report.layers and labels is not None and len(labels) and isinstance(head, nn.Module):
            hidden_states.append(model.base_model(**inputs)[0][0])
            before, after = (
                loss_of_outputs(model, hidden[labels - 1], tokens[labels], int8=int8)
                for hidden, int8 in zip(hidden_states, (False, True), strict=True)
            )
            losses = f"changes from {before:.4f} to {after:.4f}"
            messages.append(f"  the loss on the first {length} tokens of the rows {losses}")
        if identity is not None and sharded is None:
            values = {"roundings": [r.as_json() for r in report.roundings], "said": messages}
            store_result("int8", key, values, CACHE_DEPENDENCIES, MAX_CACHED_CALIBRATIONS)
    release_free_memory()
    return messages, report.roundings if sharded is None else []


def uses_library(model: nn.Module, device: str) -> bool:
    """True if bitsandbytes quantizes the weights, or the model's files contain quantized layers of a library."""
    return device != "cpu" or any(map(quantization_library, model.modules()))


@track_progress("quantizing the weights with bitsandbytes")
def _quantize_with_library(model: PreTrainedModel, precision: str, device: str) -> list[str]:
    """Quantize the blocks' weights on a GPU, move the model there, and return messages for the user."""
    if any(map(quantization_library, model.modules())):
        message = f"precision {precision}: the weights remain as the model's files store them"
    else:
        message = f"precision {precision}: {quantize_with_bitsandbytes(model.base_model, precision, device)}"
    nn.Module.to(model, device)
    release_free_memory()
    return [message]


def quantize_weights_nf4(model: PreTrainedModel) -> list[str]:
    """Round the blocks' weights to NF4 and return messages for the user."""
    with torch.no_grad():
        messages = [f"precision nf4: {quantize_nf4(model.base_model)}"]
    release_free_memory()
    return messages


def _single(items: Sequence[Any]) -> Sequence[Any]:
    """Return the rows of the first groups, enough for a calibration. Ungrouped rows are returned unchanged."""
    if not any(isinstance(item, RowGroup) for item in items[:1]):
        return items
    return [row for item in items[:CALIBRATION_TOKENS] for row in item.rows]


def checkpoint_blocks(model: PreTrainedModel, blocks: bool | int = True, trained: Sequence[nn.Parameter] = ()) -> None:
    """Enable activation checkpointing of blocks.

    A checkpointed block stores only its input and recomputes its activations in the backward pass. The model remains in
    eval mode, which disables its dropout. Only the checkpointed blocks are set to training mode.

    Args:
        model: Model to change.
        blocks: True for all blocks, or the number of blocks. These are the lowest ones that the backward pass reaches,
            because the activations of the upper blocks are released before the lower ones are recomputed.
        trained: Trained parameters. The backward pass stops at the lowest one.

    Raises:
        UserError: if the model does not support activation checkpointing.
    """
    if not model.supports_gradient_checkpointing:
        hint = "set train.checkpointing to false, or lower train.tokens_per_pass"
        message = f"{type(model).__name__} has no activation checkpointing"
        raise UserError(message, location="train.checkpointing", hint=hint)
    with quiet():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # Only reentrant checkpointing needs it. The backward pass would extend to the frozen layers.
        model.disable_input_require_grads()
    modules = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if blocks is not True:
        level = frozen_level(model, trained) if trained else None
        start = level.index if level is not None and level.kind == "block" else 0
        modules = modules[start : start + int(blocks)]
    for module in modules:
        module.training = True
