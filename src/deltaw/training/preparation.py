"""Weights of a run in int8, calibrated on a few of its rows, with what that costs; or in NF4.

Knows models and rows; not methods, and not how products in int8 are computed.
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

from deltaw.cache import recall, remember
from deltaw.data.example import Example, RowGroup
from deltaw.durable import write_text
from deltaw.errors import UserError
from deltaw.hub.quiet import quiet
from deltaw.machine.kernel_choice import computed_on
from deltaw.machine.memory import release_free_memory, trim_memory
from deltaw.runtime.generation import position_limit
from deltaw.runtime.layer_entry import lowest_trained
from deltaw.runtime.quantized_weights import Rounding, quantize_int8, quantize_nf4
from deltaw.runtime.sharded import sharded_blocks
from deltaw.training.tasks.causal_objective import loss_of_outputs
from deltaw.working import working

# Tokens that int8 quantization is calibrated on.
CALIBRATION_TOKENS = 512
# At most so many calibrations are remembered, each of 0.5 MB (135M parameters) to 5 MB (8B).
KEPT = 40
MADE_BY = ("torch", "transformers", "deltaw.kernels", "deltaw.lora", "deltaw.runtime", "deltaw.training.preparation")


# What a run's folder keeps of the calibration to int8, so that the base model is rounded as it was in training.
CALIBRATION = "int8.json"


def save_calibration(folder: Path, identity: str | None, roundings: Sequence[Rounding]) -> None:
    """Write the calibration of the model that ``identity`` names; nothing where there is none."""
    if roundings and identity is not None:
        kept = {"model": identity, "roundings": [rounding.as_json() for rounding in roundings]}
        write_text(folder / CALIBRATION, json.dumps(kept))


def saved_calibration(folder: Path, identity: str | None) -> list[Rounding] | None:
    """What :func:`save_calibration` wrote for this model; None where it wrote nothing, or the file is damaged."""
    try:
        kept = json.loads((folder / CALIBRATION).read_text(encoding="utf-8"))
        return [Rounding.of_json(one) for one in kept["roundings"]] if kept["model"] == identity else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def quantized(
    model: PreTrainedModel, precision: str, examples: Sequence[Any], identity: str | None = None
) -> tuple[list[str], list[Rounding]]:
    """Quantize a freshly loaded model's weights where its precision asks for it; say what was done, and how
    layers were calibrated to int8.

    Args:
        identity: names the model's weights, so that a calibration is remembered.
    """
    if precision == "nf4":
        return quantized_nf4(model), []
    return quantized_int8(model, examples, identity) if precision == "int8" else ([], [])


@working("quantizing the weights to int8")
def quantized_int8(
    model: PreTrainedModel, examples: Sequence[Any], identity: str | None = None
) -> tuple[list[str], list[Rounding]]:
    """Quantize the blocks' weights to int8, calibrated on a few rows; what it did and what it costs.

    Comes before anything else runs the model: each block's weights are read once, and given back.
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
        marked = None if labels is None else labels.tolist()
        key = [identity, tokens.tolist(), marked, computed_on(model.device), torch.get_num_threads()]
        sharded = sharded_blocks(model)
        kept = None if identity is None or sharded is not None else recall("int8", key, MADE_BY)
        if isinstance(kept, dict):
            roundings = [Rounding.of_json(rounding) for rounding in kept["roundings"]]
            quantize_int8(model.base_model, known=roundings)
            trim_memory()
            return list(kept["said"]), roundings
        found: list[Tensor] = []
        inputs: dict[str, Any] = {"input_ids": tokens[None]}
        if "use_cache" in inspect.signature(model.base_model.forward).parameters:
            inputs["use_cache"] = False  # keys and values of all blocks can be more than a block's weights
        report = quantize_int8(model.base_model, lambda: found.append(model.base_model(**inputs)[0][0]))
        if sharded is not None:
            sharded.finish()
        said = [f"precision int8: {report}"]
        head = model.get_output_embeddings()
        if report.layers and labels is not None and len(labels) and isinstance(head, nn.Module):
            found.append(model.base_model(**inputs)[0][0])
            before, after = (
                loss_of_outputs(model, hidden[labels - 1], tokens[labels], int8=int8)
                for hidden, int8 in zip(found, (False, True), strict=True)
            )
            said.append(f"  the loss on the first {length} tokens of the rows goes from {before:.4f} to {after:.4f}")
        if identity is not None and sharded is None:
            remember("int8", key, {"roundings": [r.as_json() for r in report.roundings], "said": said}, MADE_BY, KEPT)
    release_free_memory()
    return said, report.roundings if sharded is None else []


@working("rounding the weights to NF4")
def quantized_nf4(model: PreTrainedModel) -> list[str]:
    """Round the blocks' weights to NF4, and say what was done."""
    with torch.no_grad():
        said = [f"precision nf4: {quantize_nf4(model.base_model)}"]
    release_free_memory()
    return said


def _single(items: Sequence[Any]) -> Sequence[Any]:
    """The rows of the first groups, as many as a calibration takes; rows that come alone as they are."""
    if not any(isinstance(item, RowGroup) for item in items[:1]):
        return items
    return [row for item in items[:CALIBRATION_TOKENS] for row in item.rows]


# Activation checkpointing of a model's blocks: a block keeps its input, and its backward runs it again.


def checkpoint_blocks(model: PreTrainedModel, blocks: bool | int = True, trained: Sequence[nn.Parameter] = ()) -> None:
    """Turn activation checkpointing on: a block keeps its input alone, and its backward runs it again.

    The model stays in eval mode, so that its own dropout stays off; the checkpointed blocks alone are told
    that they train.

    Args:
        blocks: True for all of them, or how many: the lowest that a backward reaches, since by the time they
            run again, the activations of the upper ones are gone.
        trained: the trained parameters; below the lowest of them no backward goes.
    """
    if not model.supports_gradient_checkpointing:
        hint = "set train.checkpointing to false, or lower train.tokens_per_pass"
        what = f"{type(model).__name__} has no activation checkpointing"
        raise UserError(what, where="train.checkpointing", hint=hint)
    with quiet():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # Only reentrant checkpointing needs it; the backward would run through all that is frozen.
        model.disable_input_require_grads()
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if blocks is not True:
        level = lowest_trained(model, trained) if trained else None
        begin = level.index if level is not None and level.kind == "block" else 0
        found = found[begin : begin + int(blocks)]
    for module in found:
        module.training = True
