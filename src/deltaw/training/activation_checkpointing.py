"""Activation checkpointing of a model's blocks: a block keeps its input, and its backward runs it again.

Knows models and what is trained of them; not rows or settings.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from deltaw.errors import UserError
from deltaw.hub.quiet import quiet
from deltaw.runtime.layer_entry import lowest_trained


def checkpoint_blocks(
    model: PreTrainedModel, blocks: bool | int = True, trained: Sequence[nn.Parameter] = ()
) -> None:
    """Turn activation checkpointing on: a block keeps its input alone, and its backward runs it again.

    The model stays in eval mode, so that its own dropout stays off; the checkpointed blocks alone are told
    that they train.

    Args:
        blocks: True for all of them, or how many: the lowest that a backward reaches, since by the time they
            run again, the activations of the upper ones are gone.
        trained: the trained parameters; below the lowest of them no backward goes.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"{type(model).__name__} has no activation checkpointing",
            where="train.checkpointing",
            hint="set train.checkpointing to false, or lower train.tokens_per_pass",
        )
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
