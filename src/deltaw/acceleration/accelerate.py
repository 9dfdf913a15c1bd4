"""``deltaw.accelerate`` and ``deltaw.restore``: one line in a script with transformers, PEFT, TRL or
sentence-transformers.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from deltaw.acceleration.accelerated_model import AcceleratedModel, Unsupported
from deltaw.acceleration.model_calls import BackboneForward, CausalForward
from deltaw.acceleration.replaced_forward import ReplacedForward
from deltaw.acceleration.report import Report
from deltaw.errors import UserError


class Acceleration:
    """Replaced forward methods of a model.

    Args:
        model: The model.
        logits: False if the caller does not read the logits of training calls with labels.
    """

    def __init__(self, model: PreTrainedModel, *, logits: bool) -> None:
        self.report = Report()
        self.accelerated = AcceleratedModel(model, self.report)
        self.forwards: list[ReplacedForward] = [BackboneForward(model.base_model, self.accelerated)]
        if model.base_model is not model and model.get_output_embeddings() is not None:
            self.forwards.append(CausalForward(model, self.accelerated, needs_logits=logits))
        for forward in self.forwards:
            forward.install()

    def close(self) -> None:
        """Use the original forward methods."""
        for forward in reversed(self.forwards):
            forward.remove()
        self.accelerated.close()


_ACCELERATIONS: weakref.WeakKeyDictionary[PreTrainedModel, Acceleration] = weakref.WeakKeyDictionary()


def accelerate(target: nn.Module | Trainer, *, logits: bool = True) -> Report:
    """Accelerate training on a CPU in a script of one's own.

    Recognized blocks run fused, rows run without padding, and prefixes that rows of a batch share are computed once.
    Parameters, names, hooks and files of the model are unchanged. The first batch is compared with the model's own
    code, and what differs is not used. ``DELTAW_ACCELERATE=0`` in the environment disables everything.

    Args:
        target: A model of transformers, plain, with PEFT's or deltaw's adapters, or inside another module; or a trainer
            of transformers, TRL or sentence-transformers.
        logits: False if a loop of one's own reads only ``loss`` of a call with labels. Then ``logits`` is None while
            training, and the output head is computed only at labels. Trainers set it themselves.

    Returns:
        A report, which can be printed. As a context manager, it restores the model at the end.

    Raises:
        UserError: if the target contains no model of transformers.
    """
    if isinstance(target, nn.Module):
        return _accelerate_model(target, logits=logits)
    models = [model for name in ("model", "ref_model") if isinstance(model := getattr(target, name, None), nn.Module)]
    if not models or not callable(getattr(target, "compute_loss", None)):
        raise UserError(f"a {type(target).__name__} is neither a model nor a trainer")
    autocast = torch.autocast("cpu", torch.bfloat16) if getattr(target.args, "bf16", False) else contextlib.nullcontext()
    with autocast:
        reports = [_accelerate_model(model, logits=_reads_logits(target)) for model in models]
    return reports[0]


def restore(target: nn.Module | Trainer) -> None:
    """Undo :func:`accelerate`. A model that is not accelerated is unchanged."""
    models = [target] if isinstance(target, nn.Module) else [target.model, getattr(target, "ref_model", None)]
    for model in models:
        acceleration = None if model is None else _ACCELERATIONS.pop(find_model(model), None)
        if acceleration is not None:
            acceleration.close()


def find_model(module: nn.Module) -> PreTrainedModel:
    """Return the outermost model of transformers in a module.

    Raises:
        UserError: if there is none.
    """
    for inner in module.modules():
        if isinstance(inner, PreTrainedModel):
            return inner
    raise UserError(f"a {type(module).__name__} contains no model of transformers")


def _accelerate_model(module: nn.Module, *, logits: bool) -> Report:
    model = find_model(module)
    if model in _ACCELERATIONS:
        return _ACCELERATIONS[model].report
    acceleration = Acceleration(model, logits=logits)
    _ACCELERATIONS[model] = acceleration
    acceleration.report.restore = lambda: restore(model)
    with contextlib.suppress(Unsupported):  # the report contains the reason
        acceleration.accelerated.twin()
    return acceleration.report


def _reads_logits(trainer: Any) -> bool:
    """Return True unless a trainer reads only the loss of calls with labels."""
    own_loss = type(trainer).compute_loss is not Trainer.compute_loss
    return own_loss or any(getattr(trainer, name, None) is not None for name in ("compute_loss_func", "label_smoother"))
