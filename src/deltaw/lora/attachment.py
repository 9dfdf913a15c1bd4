"""The record of an attached adapter: replaced modules and everything else that restores the model exactly.

The record is a plain attribute of the model, so that it is copied together with the model.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.kernels.torch_private import direct_modules, direct_parameters, inside_compiled
from deltaw.lora.adapted import Activation, AdaptedLayer, cast_like
from deltaw.lora.complete_names import NameMap
from deltaw.lora.config import LoRAConfig
from deltaw.lora.layers import LoRALayer
from deltaw.lora.layers_parts import LoRAParameter
from deltaw.lora.math import relative_errors
from deltaw.lora.stored import weight_shape
from deltaw.tensor_files import has_values

_ATTRIBUTE = "_deltaw_attachment"


# Replaced modules and parameters, and restoring the originals. Used for adapted layers, copies of extra trainable
# modules, untied parameters, and the embedding with a soft prompt.

Original = TypeVar("Original", bound="nn.Module | nn.Parameter | None")
Current = TypeVar("Current", bound="nn.Module | nn.Parameter")
Spot = tuple[nn.Module, str]
"""A parent module and the attribute name of its child module or parameter."""


@dataclass
class ReplacedModule(Generic[Original, Current]):
    """A module or parameter that is replaced by another.

    Attributes:
        names: All full names. Files use the first.
        spots: (parent, attribute) for each name.
        original: The original, or None if it did not exist (an added bias).
        current: The replacement. It is ``original`` itself if that is trained in place.
    """

    names: tuple[str, ...]
    spots: list[Spot]
    original: Original
    current: Current

    @property
    def name(self) -> str:
        """Name used in files."""
        return self.names[0]

    def put(self, part: nn.Module | nn.Parameter | None) -> None:
        """Assign ``part`` at all spots."""
        for parent, attribute in self.spots:
            setattr(parent, attribute, part)

    def put_current(self) -> None:
        """Assign the replacement at all spots."""
        self.put(self.current)

    def put_original(self, model: nn.Module) -> None:
        """Restore the original with the replacement's device and dtype.

        ``model`` may have been moved or cast in the meantime, which does not affect parameters that only ``original``
        contains.
        """
        self._put_original({id(p) for p in model.parameters()})

    def _put_original(self, present: Container[int]) -> None:
        original, current = self.original, self.current
        if isinstance(original, nn.Parameter) and isinstance(current, nn.Parameter):
            if original is not current and id(original) not in present:
                _match_device_and_dtype(original, current)
        elif isinstance(original, nn.Module) and isinstance(current, nn.Module):
            for name, parameter in original.named_parameters(remove_duplicate=False):
                if id(parameter) not in present:
                    _match_device_and_dtype(parameter, current.get_parameter(name))
            for name, buffer in original.named_buffers(remove_duplicate=False):
                _match_device_and_dtype(buffer, current.get_buffer(name))
            original.train(current.training)
        self.put(original)


Replacement = ReplacedModule[nn.Module, nn.Module]
"""A replaced module."""

ReplacedParameter = ReplacedModule["nn.Parameter | None", nn.Parameter]
"""A replaced parameter."""


@contextlib.contextmanager
def originals_restored(model: nn.Module, replacements: Iterable[ReplacedModule[Original, Current]]) -> Iterator[None]:
    """Context manager in which the model has its original modules and parameters."""
    replaced = list(replacements)
    present = {id(p) for p in model.parameters()}
    try:
        for replacement in replaced:
            replacement._put_original(present)
        yield
    finally:
        for replacement in replaced:
            replacement.put_current()


def find_spots(model: nn.Module, names: Sequence[str]) -> list[Spot]:
    """Return the spots with these full names of modules or parameters.

    Raises:
        AttributeError: if a parent is not a module of the model.
    """
    split = [name.rpartition(".") for name in names]
    return [(model.get_submodule(parent), attribute) for parent, _, attribute in split]


def find_module_spots(model: nn.Module, module: nn.Module) -> list[Spot]:
    """Return every spot of ``model`` that contains this ``module``."""
    return [(owner, key) for owner in model.modules() for key, part in direct_modules(owner).items() if part is module]


def _match_device_and_dtype(tensor: Tensor, reference: Tensor) -> None:
    """Move ``tensor`` to the device and dtype of ``reference``."""
    if tensor.device != reference.device or tensor.dtype != reference.dtype:
        tensor.data = tensor.data.to(device=reference.device, dtype=reference.dtype)


@dataclass
class TrainedBias:
    """A bias that is trained in place, with its original values."""

    name: str
    parameter: nn.Parameter
    original: Tensor


@dataclass
class ParameterUpdate:
    """An update of a parameter, with the module that computes with it.

    Attributes:
        names: Names of the module.
        runner: Module whose child ``key`` is the update.
        key: Attribute name of the update.
        layer: The update.
        is_attention: True if the module was selected as an attention, with both of its projections.
    """

    names: tuple[str, ...]
    runner: nn.Module
    key: str
    layer: LoRAParameter
    is_attention: bool = False

    @property
    def name(self) -> str:
        """Name of the update in the model."""
        return f"{self.names[0]}.{self.key}"

    def put(self) -> None:
        """Install the update in the module."""
        setattr(self.runner, self.key, self.layer)
        self.layer.register_hooks(self.runner)

    def remove(self) -> None:
        """Remove the update from the module."""
        self.layer.remove_hooks()
        if self.key in direct_modules(self.runner):
            delattr(self.runner, self.key)


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


# Merging adds ΔW in fp32 and rounds once. Unmerging restores the original weights, it does not compute W + ΔW − ΔW. All
# checks precede the first change.


# Share of the update above which a merge warns about rounding.
_MAX_ROUNDING = 0.5


@dataclass(frozen=True)
class MergeSummary:
    """Result of :func:`merge`: the part of the update that rounding to the dtype of the weights changed.

    Attributes:
        error: Relative error of ΔW over all layers, 0 for weights in fp32.
        errors: Relative error of ΔW of each layer whose weight has a narrower dtype.
    """

    error: float
    errors: Mapping[str, float]

    def __str__(self) -> str:
        return f"rounding changed {self.error:.0%} of the update; keep the adapter unmerged, or load the model in fp32"


def merge(model: nn.Module, keep_original: bool = True) -> MergeSummary:
    """Set the weight of every adapted layer to W + ΔW. Outputs are unchanged up to rounding.

    Warns if rounding to the dtype of the weights changes most of the update.

    Args:
        model: Model with an attached adapter.
        keep_original: Retain the original weights for :func:`unmerge` and ``disabled``, which needs memory for a second
            copy of the adapted weights.

    Raises:
        UserError: if the adapter is merged already, another module shares a weight (a tied head), a convolution is
            grouped, or a sum is not finite. The model is then unchanged.
    """
    model = unwrap_model(model)
    layers = adapted_layers(model)
    shared = shared_weights(model)
    for name, layer in layers:
        if layer.merged:
            raise UserError("the adapter is merged already", location=name, hint="call unmerge first")
        if users := _users_of_unmerged_weight(model, layer, shared):
            message = f"the weight of '{name}' is shared with '{users[0]}', whose outputs would change"
            raise UserError(message, location=name, hint="untie the weights, or do not merge the adapter")
        if reason := layer.merge_refusal():
            raise UserError(f"'{name}' cannot be merged: {reason}", location=name, hint="do not merge the adapter")
    # To save memory, sums that are not retained are computed twice: to check them, and to store them.
    sums: dict[str, Tensor] = {}
    squares: dict[str, tuple[float, float]] = {}
    for name, layer in layers:
        total = layer.merged_weight()
        if not torch.isfinite(total).all():
            hint = "the adapter's factors are invalid, or too large for the weight's dtype"
            raise UserError(f"the merged weight of '{name}' is not finite", location=name, hint=hint)
        if keep_original:
            sums[name] = total
        if layer.weight.element_size() < 4 and has_values(total):
            exact = layer.merged_weight(rounded=False)
            rounding, update = total - exact, exact - layer.weight
            squares[name] = float(rounding.square().sum()), float(update.square().sum())
    for name, layer in layers:
        layer.set_merged(sums[name] if keep_original else layer.merged_weight(), keep_original)
    errors, error = relative_errors(squares)
    summary = MergeSummary(error, errors)
    if error > _MAX_ROUNDING:
        warnings.warn(str(summary), stacklevel=2)
    return summary


def unmerge(model: nn.Module) -> None:
    """Restore the exact weights from before :func:`merge`.

    Raises:
        UserError: if the adapter is not merged, or the original weights were not kept.
    """
    if not (merged := [(name, layer) for name, layer in adapted_layers(unwrap_model(model)) if layer.merged]):
        raise UserError("the adapter is not merged", hint="call merge first")
    for name, layer in merged:
        if layer._unmerged_weight is None:
            message = "the weights from before the merge were not kept"
            raise UserError(message, location=name, hint="merge with keep_original=True")
    for _, layer in merged:
        layer.unset_merged()


def _users_of_unmerged_weight(model: nn.Module, layer: AdaptedLayer, shared: dict[int, list[str]]) -> list[str]:
    """Return the names of modules that share the layer's weight but expect it unmerged."""
    users = [(name, model.get_submodule(name)) for name in shared.get(id(layer.weight), ())]
    return [name for name, user in users if user is not layer.owner and getattr(user, "tied_to", None) is not layer]


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of the using modules by parameter id, for each parameter that more than one module uses."""
    users: dict[object, dict[str, None]] = {}
    keys: dict[int, object] = {}
    for name, module in model.named_modules():
        for parameter in direct_parameters(module).values():
            if parameter is not None:
                key = keys[id(parameter)] = _storage_key(parameter)
                users.setdefault(key, {})[name] = None
    return {parameter: list(users[key]) for parameter, key in keys.items() if len(users[key]) > 1}


def _storage_key(parameter: Tensor) -> object:
    """Return a key that is equal for parameters that share memory, which count as one weight."""
    if not has_values(parameter) or parameter.data_ptr() == 0:
        return id(parameter)
    return (parameter.device, parameter.data_ptr())
