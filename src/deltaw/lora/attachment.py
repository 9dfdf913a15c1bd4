"""The record of an attached adapter: enough to restore the model exactly.

The record hangs on the model as a plain attribute, so that it is copied with it and goes with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.kernels.torch_private import inside_compiled, own_modules
from deltaw.lora.activation import Activation
from deltaw.lora.adapted import AdaptedLayer
from deltaw.lora.config import LoRAConfig
from deltaw.lora.layers import LoRALayer
from deltaw.lora.layers_parameter import LoRAParameter
from deltaw.lora.places import Replacement

_ATTRIBUTE = "_deltaw_attachment"


@dataclass
class TrainedBias:
    """A bias that is trained in its place, and the values it had before."""

    name: str
    parameter: nn.Parameter
    original: Tensor

    def original_here(self) -> Tensor:
        """The values before, where and as the bias is now."""
        return self.original.to(device=self.parameter.device, dtype=self.parameter.dtype)


@dataclass
class ParameterUpdate:
    """A parameter's update, and the module that computes with it.

    Attributes:
        names: of the module.
        runner: the module, whose child ``key`` the update is.
        of_attention: whether the module was chosen as an attention, with both of its projections.
    """

    names: tuple[str, ...]
    runner: nn.Module
    key: str
    layer: LoRAParameter
    of_attention: bool = False

    @property
    def name(self) -> str:
        """The update's own name in the model."""
        return f"{self.names[0]}.{self.key}"

    def put(self) -> None:
        """Let the module compute with the update."""
        setattr(self.runner, self.key, self.layer)
        self.layer.watch(self.runner)

    def remove(self) -> None:
        """Let the module be as it was."""
        self.layer.unwatch()
        if self.key in own_modules(self.runner):
            delattr(self.runner, self.key)


@dataclass
class Attachment:
    """The record of one :func:`~deltaw.lora.adapt.attach`.

    ``copies`` are weights of the base model that the adapter's file has as well and that could not be
    compared, on a model on the meta device.
    """

    config: LoRAConfig
    fingerprint: str | None
    layers: list[Replacement] = field(default_factory=list)
    extra_modules: list[Replacement] = field(default_factory=list)
    parameters: list[ParameterUpdate] = field(default_factory=list)
    tokens: list[Replacement] = field(default_factory=list)
    biases: list[TrainedBias] = field(default_factory=list)
    trainable_before: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    switched: list[tuple[nn.Module, str, object]] = field(default_factory=list)
    activation: Activation | None = None
    copies: dict[str, Tensor] = field(default_factory=dict)

    def adapted(self) -> Iterator[tuple[str, LoRALayer]]:
        """(first name, layer) of everything with factors: layers in the model's order, then parameters."""
        for replacement in self.layers:
            if isinstance(replacement.current, LoRALayer):
                yield replacement.names[0], replacement.current
        for update in self.parameters:
            yield update.name, update.layer

    def updated(self) -> Iterator[tuple[str, AdaptedLayer]]:
        """(first name, layer) of everything that has an update of its own, trained tokens among it."""
        yield from self.adapted()
        for replacement in self.tokens:
            if isinstance(replacement.current, AdaptedLayer) and replacement.current.follows is None:
                yield replacement.names[0], replacement.current


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile`` or ``DistributedDataParallel``."""
    while True:
        inner = inside_compiled(model)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def attachment(model: nn.Module) -> Attachment | None:
    """The record on ``model``, or None."""
    record = vars(model).get(_ATTRIBUTE)
    return record if isinstance(record, Attachment) else None


def activation_of(model: nn.Module) -> Activation | None:
    """Where in a row the model's adapter acts; None where there is none, or it acts on all tokens."""
    record = attachment(unwrapped(model))
    return None if record is None else record.activation


def attached(model: nn.Module) -> Attachment:
    """The record on ``model``.

    Raises:
        UserError: there is none.
    """
    record = attachment(model)
    if record is None:
        raise UserError("the model has no adapter attached", hint="call attach or load_adapter on it first")
    return record


def set_attachment(model: nn.Module, record: Attachment | None) -> None:
    """Hang ``record`` on ``model``, or take it off."""
    if record is None:
        vars(model).pop(_ATTRIBUTE, None)
    else:
        vars(model)[_ATTRIBUTE] = record


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLayer]]:
    """(name, layer) of every layer in ``model`` with an update of its own, also of those put there by hand.

    Raises:
        UserError: there is none.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, AdaptedLayer) and module.follows is None
    ]
    if not layers:
        raise UserError("the model has no adapter attached", hint="call attach or load_adapter on it first")
    return layers


@contextlib.contextmanager
def base_in_place(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the base model: weights, biases and extra trainable modules.

    Raises:
        UserError: no adapter is attached, or it was merged without keeping the weights before.
    """
    layers = adapted_layers(model)
    for name, layer in layers:
        if not layer.base_is_known:
            raise UserError(
                "the base model's weights were not kept when the adapter was merged",
                where=name,
                hint="merge with keep_original=True",
            )
    record = attachment(model)
    with contextlib.ExitStack() as stack:
        for _, layer in layers:
            stack.enter_context(layer.as_base())
        for bias in record.biases if record else ():
            stack.callback(setattr, bias.parameter, "data", bias.parameter.data)
            bias.parameter.data = bias.original_here()
        for whole in record.extra_modules if record else ():
            stack.callback(whole.put, whole.current)
            whole.put_original(model)
        yield
