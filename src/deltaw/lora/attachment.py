"""The record of an attached adapter: enough to restore the model exactly.

The record hangs on the model as a plain attribute, so that it is copied with it and goes with it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.kernels.torch_private import inside_compiled, own_modules, own_parameters
from deltaw.lora.adapted import Activation, AdaptedLayer, like
from deltaw.lora.config import LoRAConfig
from deltaw.lora.fingerprint import has_values
from deltaw.lora.layers import LoRALayer
from deltaw.lora.layers_parts import LoRAParameter
from deltaw.lora.places import Replacement
from deltaw.lora.stored import weight_shape

_ATTRIBUTE = "_deltaw_attachment"


@dataclass
class TrainedBias:
    """A bias that is trained in its place, and the values it had before."""

    name: str
    parameter: nn.Parameter
    original: Tensor


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
    wrapper = nn.parallel.DistributedDataParallel
    while (inner := model.module if isinstance(model, wrapper) else inside_compiled(model)) is not None:
        model = inner
    return model


def attachment(model: nn.Module) -> Attachment | None:
    """The record on ``model``, or None."""
    found: Attachment | None = vars(model).get(_ATTRIBUTE)
    return found


def attached(model: nn.Module) -> Attachment:
    """The record on ``model``.

    Raises:
        UserError: there is none.
    """
    if (record := attachment(model)) is None:
        raise _no_adapter()
    return record


def _no_adapter() -> UserError:
    return UserError("the model has no adapter attached", hint="call attach or load_adapter on it first")


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
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, AdaptedLayer) and m.follows is None]
    if not layers:
        raise _no_adapter()
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
            hint = "merge with keep_original=True"
            raise UserError("the base model's weights were not kept when the adapter was merged", where=name, hint=hint)
    record = attachment(model)
    with contextlib.ExitStack() as stack:
        for _, layer in layers:
            stack.enter_context(layer.as_base())
        for bias in record.biases if record else ():
            stack.callback(setattr, bias.parameter, "data", bias.parameter.data)
            bias.parameter.data = like(bias.original, bias.parameter)
        for whole in record.extra_modules if record else ():
            stack.callback(whole.put, whole.current)
            whole.put_original(model)
        yield


# How many parameters a model has and how many of them are trained.


@dataclass(frozen=True)
class ParameterCount:
    """Distinct parameters: one that is used in two places counts once.

    Attributes:
        total: N, the base model's own parameters; the adapter's are not among them.
        trained: M, the parameters that ask for a gradient.
        per_module: M by module, without those that have none.
    """

    total: int
    trained: int
    per_module: dict[str, int]

    @property
    def share(self) -> float:
        """M / N; 0 for a model without parameters."""
        return self.trained / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.trained:,} of {self.total:,} parameters trained ({self.share:.2%})"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count ``model``'s parameters, adapted or not."""
    model = unwrapped(model)
    record = attachment(model)
    base: dict[int, int] = {}
    copies: set[int] = set()
    for whole in record.extra_modules if record else ():
        base.update({id(p): p.numel() for p in whole.original.parameters()})
        copies.update(id(p) for p in whole.current.parameters())
    per_module: dict[str, int] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = module.trained if isinstance(module, AdaptedLayer) else ()
        trained = 0
        for key, parameter in own_parameters(module).items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            trained += parameter.numel() if parameter.requires_grad else 0
            if key not in own and id(parameter) not in copies:
                shape = weight_shape(module) if key == "weight" else parameter.shape
                base[id(parameter)] = math.prod(shape)
        if trained:
            per_module[name] = trained
    return ParameterCount(sum(base.values()), sum(per_module.values()), per_module)


def adapter_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that the adapter consists of: factors, magnitudes, biases, trained tokens,
    extra trainable modules.

    Raises:
        UserError: no adapter is attached.
    """
    model = unwrapped(model)
    adapted_layers(model)
    record = attachment(model)
    layers = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    added = {id(own_parameters(layer)[key]) for layer in layers for key in layer.trained}
    if record is not None:
        added |= {id(bias.parameter) for bias in record.biases}
        added |= {id(p) for whole in record.extra_modules for p in whole.current.parameters()}
    return [(name, p) for name, p in model.named_parameters() if id(p) in added]


def is_factor_B(name: str) -> bool:
    """Whether the parameter ``name`` of :func:`adapter_parameters` is a B, the factor that is zero at first.

    LoRA+ (arXiv 2402.12354) gives B a higher learning rate than all else. PEFT's LoRA+ gives it also to what
    has one dimension (trained biases, magnitudes), and both factors of an embedding a rate of their own.
    Here an embedding's B is zero at first, like every other B; in PEFT its A is.
    """
    return name.rpartition(".")[2] == "lora_B"


# Add ΔW to the weights and take it out again.
#
# The sum is formed in fp32 and rounded once; taking ΔW out again gives back the very weights from before, not
# W + ΔW − ΔW. All refusals come before the first change.


def merge(model: nn.Module, keep_original: bool = True) -> None:
    """Put W + ΔW into the weight of every adapted layer; outputs stay the same up to rounding.

    Args:
        model: has an adapter attached.
        keep_original: keep the weights from before, for :func:`unmerge` and ``disabled``, at the price of a
            second copy of the adapted weights.

    Raises:
        UserError: the adapter is merged already; a weight is used by another module as well (a tied head),
            whose outputs would change too; a kernel is grouped; or a sum is not finite. The model is then
            unchanged.
    """
    model = unwrapped(model)
    layers = adapted_layers(model)
    shared = shared_weights(model)
    for name, layer in layers:
        if layer.merged:
            raise UserError("the adapter is merged already", where=name, hint="call unmerge first")
        if others := _other_users(model, layer, shared):
            what = f"the weight of '{name}' is also that of '{others[0]}', whose outputs merging would change"
            raise UserError(what, where=name, hint="untie the two, or keep the adapter separate")
        if reason := layer.merge_refusal():
            raise UserError(f"'{name}' cannot be merged: {reason}", where=name, hint="keep the adapter separate")
    # Without room for all sums at once, they are computed twice: to check them, and to store them.
    sums: dict[str, Tensor] = {}
    for name, layer in layers:
        total = layer.merged_weight()
        if not torch.isfinite(total).all():
            hint = "the adapter's factors are broken, or its values too large for the weight's type"
            raise UserError(f"the merged weight of '{name}' is not finite", where=name, hint=hint)
        if keep_original:
            sums[name] = total
    for name, layer in layers:
        layer.set_merged(sums[name] if keep_original else layer.merged_weight(), keep_original)


def unmerge(model: nn.Module) -> None:
    """Give every adapted layer the weight it had before :func:`merge`, to the bit.

    Raises:
        UserError: nothing is merged, or the weights from before were not kept.
    """
    layers = adapted_layers(unwrapped(model))
    if not (merged := [(name, layer) for name, layer in layers if layer.merged]):
        raise UserError("the adapter is not merged", hint="call merge first")
    for name, layer in merged:
        if layer._unmerged_weight is None:
            what = "the weights from before the merge were not kept"
            raise UserError(what, where=name, hint="merge with keep_original=True")
    for _, layer in merged:
        layer.unset_merged()


def _other_users(model: nn.Module, layer: AdaptedLayer, shared: dict[int, list[str]]) -> list[str]:
    """The modules with the same weight that would not expect the merged one."""
    users = [(name, model.get_submodule(name)) for name in shared.get(id(layer.weight), ())]
    return [name for name, user in users if user is not layer.holder and getattr(user, "follows", None) is not layer]


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """For every parameter that more than one module uses: its id, and those modules' names."""
    users: dict[object, dict[str, None]] = {}
    places: dict[int, object] = {}
    for name, module in model.named_modules():
        for parameter in own_parameters(module).values():
            if parameter is not None:
                place = places[id(parameter)] = _place(parameter)
                users.setdefault(place, {})[name] = None
    return {parameter: list(users[place]) for parameter, place in places.items() if len(users[place]) > 1}


def _place(parameter: Tensor) -> object:
    """Where a parameter's numbers lie: two Parameters over the same memory are one weight."""
    if not has_values(parameter) or parameter.data_ptr() == 0:
        return id(parameter)
    return (parameter.device, parameter.data_ptr())
