"""``deltaw.accelerate`` and ``deltaw.restore``."""

from __future__ import annotations

import weakref

from torch import nn
from transformers import PreTrainedModel

from deltaw.acceleration.accelerated_model import AcceleratedModel
from deltaw.acceleration.model_calls import BackboneForward, CausalForward
from deltaw.acceleration.replaced_forward import ReplacedForward
from deltaw.acceleration.report import Report
from deltaw.errors import UserError


class Acceleration:
    """Replaced forward methods of a model."""

    def __init__(self, model: PreTrainedModel, *, logits: bool = True) -> None:
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


def accelerate(model: nn.Module, *, logits: bool = True) -> Report:
    found = find_model(model)
    if found not in _ACCELERATIONS:
        _ACCELERATIONS[found] = Acceleration(found, logits=logits)
    return _ACCELERATIONS[found].report


def restore(model: nn.Module) -> None:
    acceleration = _ACCELERATIONS.pop(find_model(model), None)
    if acceleration is not None:
        acceleration.close()


def find_model(model: nn.Module) -> PreTrainedModel:
    """Return the outermost model of transformers in a module.

    Raises:
        UserError: if there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UserError(f"a {type(model).__name__} contains no model of transformers")
