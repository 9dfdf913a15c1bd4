"""Attach an adapter to a model, and detach it again.

``attach`` freezes the model and replaces the selected layers by adapted layers that share their weights. ``detach``
restores the model exactly. In ``disabled`` the model produces the base model's outputs. All checks precede the first
change.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from deltaw.errors import UserError
from deltaw.kernels.torch_modules import direct_buffers, direct_parameters
from deltaw.lora.adapted import Activation, AdaptedLayer
from deltaw.lora.attachment import (
    Attachment,
    ParameterCount,
    base_model_active,
    count_parameters,
    get_attachment,
    require_attachment,
    set_attachment,
    unwrap_model,
)
from deltaw.lora.complete_names import complete_names
from deltaw.lora.config import CHANGING_INITS, LoRAConfig
from deltaw.lora.fingerprint import base_fingerprint
from deltaw.lora.initialize import init_refusal, initialize
from deltaw.lora.kinds import adapter_for, get_output_head, is_linear
from deltaw.lora.layers_parts import LoRAParameter, trained_tokens_of
from deltaw.lora.merging import shared_weights
from deltaw.lora.replacements import ParameterUpdate, Replacement, TrainedBias, find_spots
from deltaw.lora.select import Selection, Target, TokenTarget, select
from deltaw.tensor_files import has_values


@dataclass(frozen=True)
class Summary(ParameterCount):
    """Result of :func:`attach`: the parameter counts of the adapted model, and a description of the adapted layers.

    Attributes:
        matches: Matched names by entry of the config, for example ``"target_modules 'q_proj'"``.
        adapted: Number of adapted layers.
        notes: Notes for the user, for example about weights that were untied.
    """

    matches: dict[str, tuple[str, ...]]
    adapted: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.adapted} adapted layers; {super().__str__()}"]
        for entry, names in self.matches.items():
            example = f", such as {names[0]}" if len(names) > 1 else f": {names[0]}" if names else ""
            lines.append(f"  {entry}: {len(names)} module{'s' if len(names) != 1 else ''}{example}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def attach(model: nn.Module, config: LoRAConfig, *, seed: int | None = None) -> Summary:
    """Freeze ``model`` and attach an adapter to it, in place.

    A module that occurs several times is adapted once and replaced everywhere. If a weight is tied, adapting one of its
    modules does not affect the other. Modules in ``train_modules`` are copied: the copy is trained, and the original is
    retained for :func:`disabled` and :func:`detach`.

    Args:
        model: Any module. It retains its class and its names.
        config: Settings of the adapter.
        seed: Seed of the factors. None uses torch's global generator.

    Raises:
        UserError: if an adapter is attached already, or ``config`` does not fit the model, which is then unchanged.
    """
    model = unwrap_model(model)
    require_unadapted(model)
    with _collector_paused():
        return attach_selected(model, config, select(model, config), seed=seed)


def attach_selected(
    model: nn.Module, config: LoRAConfig, selection: Selection, *, seed: int | None = None, init_factors: bool = True
) -> Summary:
    """Attach an adapter to the selected modules, see :func:`attach`.

    Args:
        model: Model to change.
        config: Settings of the adapter.
        selection: Selected modules and parameters.
        seed: Seed of the factors.
        init_factors: If False, factors are zero, to be loaded from a file.
    """
    replaced = [p for extra in selection.extra_modules for p in extra.module.parameters()]
    if config.active == "completion":
        _check_activation(model, config, selection)
    record = Attachment(config, base_fingerprint(model, replaced), complete_names=complete_names(model))
    record.trainable_before = [(p, p.requires_grad) for p in model.parameters()]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    notes: list[str] = []
    try:
        # Initializations that change weights run last, after all checks.
        changing = config.init in CHANGING_INITS
        init = config.init if init_factors and not changing else None
        for target in (*selection.targets, *selection.parameters):
            _adapt(model, target, record, init, generator)
        for token_target in selection.tokens:
            _train_tokens(model, token_target, record)
        if changing:
            _check_weight_change(model, record)
        for parameter, _ in record.trainable_before:
            parameter.requires_grad_(False)
        _copy_extra_modules(model, selection, record, notes)
        _train_biases(model, config, record)
        _switch_fast_paths(model, record)
        if changing:
            for _, layer in record.adapted():
                initialize(layer, config.init)
    except BaseException:
        _restore(model, record)
        raise
    for replacement in (*record.layers, *record.tokens, *record.extra_modules):
        replacement.put(replacement.current)
    for update in record.parameters:
        update.put()
    if config.active == "completion":
        _activate(model, record)
        notes.append(f"active from the last occurrence of {config.invocation_tokens} in a row on")
    if init_factors and config.init == "eva":
        notes.append("initialize_from_activations must initialize A from the first batches")
    set_attachment(model, record)
    count = count_parameters(model)
    adapted = len(record.layers) + len(record.parameters)
    return Summary(count.total, count.trained, count.per_module, selection.matches, adapted, tuple(notes))


def detach(model: nn.Module) -> None:
    """Remove the adapter and restore the original modules, flags and values from before :func:`attach`.

    After ``merge(model, keep_original=False)`` the original weights no longer exist. Then ΔW, trained biases and extra
    trainable modules remain, and only the factors are removed.

    Raises:
        UserError: if no adapter is attached.
    """
    model = unwrap_model(model)
    record = require_attachment(model)
    _restore(model, record, keep_trained=any(not layer.can_restore_base for _, layer in record.updated()))
    set_attachment(model, None)


def disabled(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Context manager in which ``model`` produces the base model's outputs. Not for computing gradients.

    Raises:
        UserError: if no adapter is attached, or it was merged without keeping the original weights.
    """
    return base_model_active(unwrap_model(model))


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the garbage collector, which takes a third of the time of attaching to ten thousand layers and frees
    nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def require_unadapted(model: nn.Module) -> None:
    """Raise UserError if ``model`` contains adapted layers."""
    if get_attachment(model) is not None or any(isinstance(m, AdaptedLayer) for m in model.modules()):
        raise UserError("the model has an adapter already", hint="call detach on it first, or merge it")


def _adapt(
    model: nn.Module, target: Target, record: Attachment, init: str | None, generator: torch.Generator | None
) -> None:
    """Create the adapted layer or the updates for ``target``. Errors include its name."""
    config = record.config
    module = target.module
    name = target.names[0]
    rank = target.rank
    alpha = target.alpha
    rslora = config.rslora
    update = partial(LoRAParameter, rank=rank, alpha=alpha, rslora=rslora, init=init, generator=generator)
    updates: dict[str, LoRAParameter] = {}
    try:
        if key := target.attribute:
            name = f"{name}.{key}"
            is_in_out = bool(getattr(module, "is_transposed", False))
            updates[f"lora_{key}"] = update(module, key, is_in_out=is_in_out)
        elif isinstance(module, nn.MultiheadAttention):
            update(module.out_proj, "weight")  # PEFT samples these factors twice, which changes all later ones
            updates["lora_in_proj_weight"] = update(module, "in_proj_weight")
            updates["lora_out_proj_weight"] = update(module.out_proj, "weight")
        else:
            create = partial(adapter_for(module, config.dora, config.lora_bias).from_module, module, rank, alpha)
            layer = create(dropout=config.dropout, rslora=rslora, init=init, generator=generator)
            record.layers.append(_replacement(model, target.names, module, layer))
    except UserError as error:
        raise UserError(f"'{name}': {error.message}", location=error.location, hint=error.hint) from error
    for key, layer in updates.items():
        record.parameters.append(ParameterUpdate(target.names, module, key, layer, not target.attribute))


def _check_activation(model: nn.Module, config: LoRAConfig, selection: Selection) -> None:
    """Raise UserError unless the invocation sequence is token ids and all targets are linear layers of blocks."""
    if not isinstance(config.invocation_tokens, list):
        message = "an activated adapter needs its invocation sequence as token ids"
        hint = "pass ids, for example tokenizer('<|im_start|>assistant').input_ids"
        raise UserError(message, location="invocation_tokens", hint=hint)
    head = get_output_head(model)
    for target in selection.targets:
        if not is_linear(target.module) or target.module is head:
            message = "the output head" if target.module is head else f"a {type(target.module).__name__}"
            message = f"'{target.names[0]}' is {message}, but activated adapters support only linear layers of blocks"
            raise UserError(message, location="target_modules", hint="exclude it with exclude_modules")


def _activate(model: nn.Module, record: Attachment) -> None:
    """Share one activation between all adapted layers."""
    tokens = record.config.invocation_tokens
    assert isinstance(tokens, list)
    record.activation = Activation(tokens)
    for _, layer in record.adapted():
        vars(layer)["activation"] = record.activation
    record.activation.register_hooks(model)


def _train_tokens(model: nn.Module, target: TokenTarget, record: Attachment) -> None:
    """Create the layer with trained token rows, and the layers with tied weights."""
    leader = trained_tokens_of(target.module, target.tokens)
    record.tokens.append(_replacement(model, target.names, target.module, leader))
    for tied_target in target.tied:
        layer = trained_tokens_of(tied_target.module, target.tokens, leader)
        record.tokens.append(_replacement(model, tied_target.names, tied_target.module, layer))


def _replacement(model: nn.Module, names: tuple[str, ...], original: nn.Module, current: nn.Module) -> Replacement:
    return Replacement(names, find_spots(model, names), original, current)


def _check_weight_change(model: nn.Module, record: Attachment) -> None:
    """Raise UserError if PiSSA or OLoRA cannot change the weight of a layer, for example because it is shared."""
    init = record.config.init
    shared = shared_weights(model)
    for name, layer in record.adapted():
        reason = init_refusal(layer, init)
        if users := [user for user in shared.get(id(layer.weight), ()) if user != name]:
            reason = f"init '{init}' changes its weight, which '{users[0]}' also uses"
        if reason is not None:
            raise UserError(f"'{name}': {reason}", location="init", hint="exclude it with exclude_modules")


def _copy_extra_modules(model: nn.Module, selection: Selection, record: Attachment, notes: list[str]) -> None:
    """Copy the extra trainable modules. Weights that are tied within the copies remain tied."""
    if not selection.extra_modules:
        return
    shared = shared_weights(model)
    memo: dict[int, object] = {}
    for extra in selection.extra_modules:
        for tensor in (*extra.module.parameters(), *extra.module.buffers()):
            if not has_values(tensor):
                # deepcopy of a fake tensor would copy its mode, which breaks it.
                detached = tensor.detach().clone()
                memo.setdefault(id(tensor), nn.Parameter(detached) if isinstance(tensor, nn.Parameter) else detached)
        trained = copy.deepcopy(extra.module, memo)
        for parameter in trained.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        record.extra_modules.append(_replacement(model, extra.names, extra.module, trained))
    copied = {id(m) for extra in selection.extra_modules for m in extra.module.modules()}
    for extra in selection.extra_modules:
        for parameter in extra.module.parameters():
            users = shared.get(id(parameter), ())
            if untied_users := [name for name in users if id(model.get_submodule(name)) not in copied]:
                tied = f"the weight of '{extra.names[0]}' was tied to that of '{untied_users[0]}'"
                notes.append(f"{tied}; a copy is trained, and the other weight is unchanged")


def _train_biases(model: nn.Module, config: LoRAConfig, record: Attachment) -> None:
    if config.bias == "none":
        return
    adapted = {id(replacement.original) for replacement in record.layers}
    adapted |= {id(update.layer.owner) for update in record.parameters}
    extra_module_ids = {id(m) for replacement in record.extra_modules for m in replacement.original.modules()}
    visited: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in extra_module_ids or (config.bias == "lora_only" and id(module) not in adapted):
            continue
        bias = direct_parameters(module).get("bias")
        if bias is None or id(bias) in visited:
            continue
        visited.add(id(bias))
        record.biases.append(TrainedBias(f"{name}.bias".lstrip("."), bias, bias.detach().clone()))
        bias.requires_grad_(True)
    if not record.biases:
        raise UserError(f"bias: '{config.bias}' finds no bias to train", location="bias", hint="use bias: none")


def _switch_fast_paths(model: nn.Module, record: Attachment) -> None:
    """Disable the fast paths of torch's encoder layers, which in eval mode use weights without calling modules."""
    replaced = {id(r.original) for r in (*record.layers, *record.tokens, *record.extra_modules)}
    replaced |= {id(update.runner) for update in record.parameters}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            attribute = "activation_relu_or_gelu"
            value = 0
        elif isinstance(module, nn.TransformerEncoder):
            attribute = "use_nested_tensor"
            value = False
        else:
            continue
        if any(id(inner) in replaced for inner in module.modules()):
            record.changed_attributes.append((module, attribute, getattr(module, attribute)))
            setattr(module, attribute, value)


def _restore(model: nn.Module, record: Attachment, keep_trained: bool = False) -> None:
    """Undo an attachment. With ``keep_trained``, merged weights, biases and extra modules are retained."""
    if record.activation is not None:
        record.activation.remove_hooks()
    for update in record.parameters:
        if not keep_trained:
            update.layer.restore_base()
        update.remove()
    for replacement in (*record.layers, *record.tokens):
        layer = replacement.current
        original = replacement.original
        if isinstance(layer, AdaptedLayer) and not keep_trained:
            layer.restore_base()
        # The model may have been moved or cast in the meantime, so the original gets the layer's current tensors.
        for table in (direct_parameters, direct_buffers):
            for key in list(table(original)):
                setattr(original, key, table(layer)[key])
        original.training = layer.training
        replacement.put(original)
    for extra in () if keep_trained else record.extra_modules:
        extra.put_original(model)
    for bias in record.biases:
        bias.parameter.grad = None
        if not keep_trained:
            bias.parameter.data.copy_(bias.original)
    for module, attribute, value in record.changed_attributes:
        setattr(module, attribute, value)
    for parameter, trainable in record.trainable_before:
        parameter.requires_grad_(trainable)
