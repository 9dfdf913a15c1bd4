"""Methods that train complete parameters: all of them, the biases, the output layer, or the last blocks."""

from __future__ import annotations

from torch import nn

from deltaw.errors import UserError
from deltaw.lora.kinds import get_output_head, is_linear
from deltaw.lora.replacements import ReplacedParameter
from deltaw.methods.base import Names
from deltaw.methods.in_place import InPlace, modules_outside
from deltaw.methods.parameters import add_biases, find_modules, make_trainable, names_inside, parameters_by_name
from deltaw.methods.settings import HeadSettings, LastSettings
from deltaw.runtime.image_tokens import connector_module
from deltaw.runtime.recognition import blocks_of


class Bias(InPlace):
    """Train every parameter named ``bias`` (BitFit, arXiv 2106.10199).

    In a model without biases, each linear layer except the head first gets a zero bias, which has no effect until it is
    trained.
    """

    name = "bias"
    default_learning_rate = 5e-4
    _num_added = 0

    def parameter_names(self, model: nn.Module, extra_modules: Names) -> list[str]:
        return [name for name in modules_outside(extra_modules, model) if name.rpartition(".")[2] == "bias"]

    def enable_training(self, model: nn.Module, extra_modules: Names, seed: int) -> list[ReplacedParameter]:
        if self.parameter_names(model, extra_modules):
            return super().enable_training(model, extra_modules, seed)
        replacements = make_trainable(model, names_inside(extra_modules, parameters_by_name(model)))
        biases = add_biases(model, _linear_layers(model, extra_modules))
        self._num_added = len(biases)
        return [*replacements, *biases]

    def summary(self, model: nn.Module, total: int, extra_modules: Names) -> str:
        text = super().summary(model, total, extra_modules)
        note = f"\n  note: the model has no biases; a zero bias was added to {self._num_added} linear layers"
        return text + note if self._num_added else text


def _linear_layers(model: nn.Module, extra_modules: Names) -> list[tuple[str, nn.Module]]:
    """Return the linear layers without the output head and the excluded modules."""
    head = get_output_head(model)
    excluded = tuple(f"{module_name}." for module_name in extra_modules)
    linear = [(name, module) for name, module in model.named_modules() if is_linear(module) and module is not head]
    return [(name, module) for name, module in linear if not f"{name}.".startswith(excluded)]


class Full(InPlace):
    """Train all parameters: the baseline that the other methods are compared with.

    A bf16 model gets fp32 master weights, because small updates vanish in bf16.
    """

    name = "full"
    default_learning_rate = 2e-5

    def parameter_names(self, model: nn.Module, extra_modules: Names) -> list[str]:
        return list(parameters_by_name(model))


class Head(InPlace):
    """Train ``head.modules``, by default the model's output layer.

    The backbone gets no gradients and stores no activations.
    """

    name = "head"
    section = HeadSettings
    default_learning_rate = 1e-3
    settings: HeadSettings

    def parameter_names(self, model: nn.Module, extra_modules: Names) -> list[str]:
        modules: list[str] = []
        if self.settings.modules:
            modules = find_modules(model, self.settings.modules, "head.modules")
        elif {*extra_modules} <= {connector_module(model)} and (head := get_output_head(model)) is not None:
            # Another extra module is a new classifier, which is the head.
            modules = [name for name, module in model.named_modules() if module is head]
        return names_inside(modules, parameters_by_name(model))


class Last(InPlace):
    """Train the last ``last.blocks`` blocks. The backward pass stops at the first of them."""

    name = "last"
    section = LastSettings
    default_learning_rate = 5e-5
    settings: LastSettings

    def parameter_names(self, model: nn.Module, extra_modules: Names) -> list[str]:
        if (blocks_entry := blocks_of(model)) is None:
            message = f"a {type(model).__name__} has no list of blocks"
            raise UserError(message, location="method", hint="choose another method")
        name, blocks = blocks_entry
        if self.settings.blocks > len(blocks):
            message = f"last.blocks is {self.settings.blocks}, but the model has {len(blocks)} blocks"
            raise UserError(message, location="last.blocks", hint=f"use at most {len(blocks)}")
        last = [f"{name}.{i}" for i in range(len(blocks) - self.settings.blocks, len(blocks))]
        return names_inside(last, parameters_by_name(model))
