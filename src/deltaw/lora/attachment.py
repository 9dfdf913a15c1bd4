"""The record of an attached adapter: replaced modules and everything else that restores the model exactly.

The record is a plain attribute of the model, so that it is copied together with the model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.kernels.torch_modules import direct_parameters, inside_compiled
from deltaw.lora.adapted import Activation, AdaptedLayer, cast_like
from deltaw.lora.complete_names import NameMap
from deltaw.lora.config import LoRAConfig
from deltaw.lora.layers import LoRALayer
from deltaw.lora.replacements import ParameterUpdate, Replacement, TrainedBias
from deltaw.lora.stored import weight_shape

_ATTRIBUTE = "_deltaw_attachment"


@dataclass
class Attachment:
    """The record of one :func:`~deltaw.lora.adapt.attach`.

    Attributes:
        config: Settings of the adapter.
        fingerprint: Fingerprint of the base model, or None if unknown.
        layers: Adapted layers.
        extra_modules: Extra trainable modules.
        parameters: Updates of parameters.
        tokens: Layers with trained token rows.
        biases: Trained biases.
        trainable_before: Parameters with their original ``requires_grad``.
        changed_attributes: Module, attribute and original value of changed attributes.
        activation: Shared activation, or None if the adapter is always active.
        complete_names: Names in the complete model, if the model is a text view.
        copies: Base weights in the adapter's file that could not be compared because the model is on the meta device.
    """

    config: LoRAConfig
    fingerprint: str | None
    layers: list[Replacement] = field(default_factory=list)
    extra_modules: list[Replacement] = field(default_factory=list)
    parameters: list[ParameterUpdate] = field(default_factory=list)
    tokens: list[Replacement] = field(default_factory=list)
    biases: list[TrainedBias] = field(default_factory=list)
    trainable_before: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    changed_attributes: list[tuple[nn.Module, str, object]] = field(default_factory=list)
    activation: Activation | None = None
    complete_names: NameMap | None = None
    copies: dict[str, Tensor] = field(default_factory=dict)

    def adapted(self) -> Iterator[tuple[str, LoRALayer]]:
        """Yield (first name, layer) of all layers with factors in model order, then of the parameters' updates."""
        for replacement in self.layers:
            if isinstance(replacement.current, LoRALayer):
                yield replacement.names[0], replacement.current
        for update in self.parameters:
            yield update.name, update.layer

    def updated(self) -> Iterator[tuple[str, AdaptedLayer]]:
        """Yield (first name, layer) of everything with a separate update, including trained tokens."""
        yield from self.adapted()
        for replacement in self.tokens:
            if isinstance(replacement.current, AdaptedLayer) and replacement.current.tied_to is None:
                yield replacement.names[0], replacement.current


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile`` or ``DistributedDataParallel``."""
    wrapper = nn.parallel.DistributedDataParallel
    while (inner := model.module if isinstance(model, wrapper) else inside_compiled(model)) is not None:
        model = inner
    return model


def get_attachment(model: nn.Module) -> Attachment | None:
    """Return the record on ``model``, or None."""
    return cast("Attachment | None", vars(model).get(_ATTRIBUTE))


def require_attachment(model: nn.Module) -> Attachment:
    """Return the record on ``model``.

    Raises:
        UserError: if no adapter is attached.
    """
    if (record := get_attachment(model)) is None:
        raise _no_adapter_error()
    return record


def _no_adapter_error() -> UserError:
    return UserError("the model has no adapter attached", hint="call attach or load_adapter on it first")


def set_attachment(model: nn.Module, record: Attachment | None) -> None:
    """Set the record on ``model``, or remove it."""
    if record is None:
        vars(model).pop(_ATTRIBUTE, None)
    else:
        vars(model)[_ATTRIBUTE] = record


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLayer]]:
    """Return (name, layer) of every layer in ``model`` with a separate update, including layers created manually.

    Raises:
        UserError: if the model has no adapted layers.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, AdaptedLayer) and m.tied_to is None]
    if not layers:
        raise _no_adapter_error()
    return layers


@contextlib.contextmanager
def base_model_active(model: nn.Module) -> Iterator[None]:
    """Context manager in which the model has the base model's weights, biases and modules.

    Raises:
        UserError: if no adapter is attached, or it was merged without keeping the original weights.
    """
    layers = adapted_layers(model)
    for name, layer in layers:
        if not layer.can_restore_base:
            hint = "merge with keep_original=True"
            raise UserError("the base weights were not kept when the adapter was merged", location=name, hint=hint)
    record = get_attachment(model)
    with contextlib.ExitStack() as stack:
        for _, layer in layers:
            stack.enter_context(layer.base_weight_active())
        for bias in record.biases if record else ():
            stack.callback(setattr, bias.parameter, "data", bias.parameter.data)
            bias.parameter.data = cast_like(bias.original, bias.parameter)
        for extra in record.extra_modules if record else ():
            stack.callback(extra.put, extra.current)
            extra.put_original(model)
        yield


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of distinct parameters. A shared parameter counts once.

    Attributes:
        total: Number of parameters of the base model, without the adapter.
        trained: Number of trainable parameters.
        per_module: Number of trainable parameters by module, without modules that have 0.
    """

    total: int
    trained: int
    per_module: dict[str, int]

    @property
    def share(self) -> float:
        """Trainable parameters relative to the total, or 0 for a model without parameters."""
        return self.trained / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.trained:,} of {self.total:,} parameters trained ({self.share:.2%})"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a model, with or without adapter."""
    model = unwrap_model(model)
    record = get_attachment(model)
    base: dict[int, int] = {}
    copies: set[int] = set()
    for extra in record.extra_modules if record else ():
        base.update({id(p): p.numel() for p in extra.original.parameters()})
        copies.update(id(p) for p in extra.current.parameters())
    per_module: dict[str, int] = {}
    visited: set[int] = set()
    for name, module in model.named_modules():
        adapter_keys = module.trained if isinstance(module, AdaptedLayer) else ()
        trained = 0
        for key, parameter in direct_parameters(module).items():
            if parameter is None or id(parameter) in visited:
                continue
            visited.add(id(parameter))
            trained += parameter.numel() if parameter.requires_grad else 0
            if key not in adapter_keys and id(parameter) not in copies:
                base[id(parameter)] = math.prod(weight_shape(module) if key == "weight" else parameter.shape)
        if trained:
            per_module[name] = trained
    return ParameterCount(sum(base.values()), sum(per_module.values()), per_module)


def adapter_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return (name, parameter) of all parameters of the adapter: factors, magnitudes, biases, trained tokens and extra
    trainable modules.

    Raises:
        UserError: if no adapter is attached.
    """
    model = unwrap_model(model)
    adapted_layers(model)
    record = get_attachment(model)
    layers = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    added = {id(direct_parameters(layer)[key]) for layer in layers for key in layer.trained}
    if record is not None:
        added |= {id(bias.parameter) for bias in record.biases}
        added |= {id(p) for extra in record.extra_modules for p in extra.current.parameters()}
    return [(name, p) for name, p in model.named_parameters() if id(p) in added]


def is_factor_B(name: str) -> bool:
    """True if ``name`` is the name of a B, the factor that is initialized with zeros.

    LoRA+ (arXiv 2402.12354) trains B with a higher learning rate. PEFT's LoRA+ also applies that rate to
    one-dimensional parameters (trained biases, magnitudes), and a separate rate to both factors of an embedding. In
    this package an embedding's B is initialized with zeros like every other B. In PEFT its A is.
    """
    return name.rpartition(".")[2] == "lora_B"
