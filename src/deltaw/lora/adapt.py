"""Attach an adapter to a model, and detach it again.

``attach`` freezes the model and replaces the chosen layers by adapted ones that share their weights.
``detach`` restores the model exactly. Within ``disabled`` the model gives the base model's outputs.
Everything is checked before anything is changed. This module knows no files and no training.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltaw.errors import UserError
from deltaw.kernels.torch_private import own_buffers, own_parameters
from deltaw.lora.adapted import Activation, AdaptedLayer
from deltaw.lora.attachment import (
    Attachment,
    ParameterUpdate,
    TrainedBias,
    attached,
    attachment,
    base_in_place,
    count_parameters,
    set_attachment,
    shared_weights,
    unwrapped,
)
from deltaw.lora.config import CHANGING_INITS, LoRAConfig
from deltaw.lora.fingerprint import base_fingerprint, has_values
from deltaw.lora.initialize import init_refusal, initialize
from deltaw.lora.kinds import adapter_for, is_linear, own_head
from deltaw.lora.layers_parts import ATTENTION_KEYS, LoRAParameter, adapt_attention, trained_tokens_of
from deltaw.lora.places import Replacement, spots_of
from deltaw.lora.select import Selection, Target, TokenTarget, select


@dataclass(frozen=True)
class Summary:
    """What :func:`attach` did.

    Attributes:
        matches: each entry of the config, as ``"target_modules 'q_proj'"``, and the names it matched.
        adapted: number of adapted layers.
        trained: M, trained parameters.
        total: N, the base model's parameters.
        notes: what one should know, such as weights that were tied and are no longer.
    """

    matches: dict[str, tuple[str, ...]]
    adapted: int
    trained: int
    total: int
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """M / N."""
        return self.trained / self.total if self.total else 0.0

    def __str__(self) -> str:
        counted = f"{self.trained:,} of {self.total:,} parameters trained ({self.share:.2%})"
        lines = [f"{self.adapted} adapted layers; {counted}"]
        for entry, names in self.matches.items():
            example = f", such as {names[0]}" if len(names) > 1 else f": {names[0]}" if names else ""
            lines.append(f"  {entry}: {len(names)} module{'s' if len(names) != 1 else ''}{example}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def attach(model: nn.Module, config: LoRAConfig, *, seed: int | None = None) -> Summary:
    """Freeze ``model`` and put an adapter of ``config`` on it, in place.

    A module that stands in several places is adapted once and stands in all of them. A weight that is tied
    to another stays so: adapting one of the two leaves the other alone. A module of ``train_modules`` is
    copied; the copy is trained, and the original is kept for :func:`disabled` and :func:`detach`.

    Args:
        model: any module; with an adapter it keeps its class and its names.
        config: what to adapt, and how.
        seed: of the factors; None draws from torch's own generator.

    Raises:
        UserError: an adapter is attached already, or ``config`` does not fit the model. The model is then
            unchanged.
    """
    model = unwrapped(model)
    refuse_adapted(model)
    with _collector_paused():
        return attach_selected(model, config, select(model, config), seed=seed)


def attach_selected(
    model: nn.Module, config: LoRAConfig, selection: Selection, *, seed: int | None = None, filled: bool = True
) -> Summary:
    """:func:`attach` with the selection made; ``filled=False`` leaves zeros, for a file to fill."""
    parameters = list(model.named_parameters())
    replaced = [p for whole in selection.extra_modules for p in whole.module.parameters()]
    if config.activation == "completion":
        _refuse_activation(model, config, selection)
    record = Attachment(config, base_fingerprint(model, replaced))
    record.trainable_before = [(p, p.requires_grad) for _, p in parameters]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    notes: list[str] = []
    try:
        # What changes weights comes last, when nothing else can be refused any more.
        changing = config.init in CHANGING_INITS
        init = config.init if filled and not changing else None
        how = {"rslora": config.rslora, "init": init, "generator": generator}
        for target in selection.targets:
            _adapt(model, target, record, how)
        for chosen in selection.parameters:
            _adapt_parameter(chosen, record, how)
        for rows in selection.tokens:
            _train_tokens(model, rows, record)
        if changing:
            _refuse_change(model, record)
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
    if config.activation == "completion":
        _activate(model, record)
        notes.append(f"active from the last {config.invocation_tokens} of a row on")
    if filled and config.init == "eva":
        notes.append("A is initialized from the first batches, by initialize_from_activations")
    set_attachment(model, record)
    count = count_parameters(model)
    adapted = len(record.layers) + len(record.parameters)
    return Summary(selection.matches, adapted, count.trained, count.total, tuple(notes))


def detach(model: nn.Module) -> None:
    """Take the adapter off: the same module objects, flags and bits as before :func:`attach`.

    After ``merge(model, keep_original=False)`` there are no weights from before to give back: then ΔW stays
    in the weights, trained biases and extra trainable modules stay too, and only the factors go.

    Raises:
        UserError: no adapter is attached.
    """
    model = unwrapped(model)
    record = attached(model)
    _restore(model, record, keep_trained=any(not layer.base_is_known for _, layer in record.updated()))
    set_attachment(model, None)


def disabled(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within the block ``model`` gives the base model's own outputs; gradients are not for here.

    Raises:
        UserError: no adapter is attached, or it was merged without keeping the weights before.
    """
    return base_in_place(unwrapped(model))


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the garbage collector: with ten thousand new layers it scans them again and again, which takes a
    third of the time of attaching and frees nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def refuse_adapted(model: nn.Module) -> None:
    """Raise where ``model`` holds adapted layers already."""
    if attachment(model) is not None or any(isinstance(m, AdaptedLayer) for m in model.modules()):
        raise UserError("the model has an adapter already", hint="call detach on it first, or merge it")


def _adapt(model: nn.Module, target: Target, record: Attachment, how: Mapping[str, Any]) -> None:
    """Make the adapted layer over ``target``, or both updates of an attention; a refusal names it."""
    config = record.config
    given = (target.module, target.rank, target.alpha)
    try:
        if isinstance(target.module, nn.MultiheadAttention):
            updates = adapt_attention(*given, **how)  # type: ignore[arg-type]
            for key, update in zip(ATTENTION_KEYS, updates, strict=True):
                record.parameters.append(ParameterUpdate(target.names, target.module, key, update, True))
            return
        layer = adapter_for(target.module, config.dora, config.lora_bias)(*given, dropout=config.dropout, **how)
    except UserError as error:
        raise _named(target.names[0], error) from error
    record.layers.append(_replacement(model, target.names, target.module, layer))


def _adapt_parameter(target: Target, record: Attachment, how: Mapping[str, Any]) -> None:
    """Make the update of a parameter; a refusal names it."""
    try:
        given = (target.module, target.attribute, target.rank, target.alpha)
        layer = LoRAParameter(*given, **how, is_in_out=bool(getattr(target.module, "is_transposed", False)))
    except UserError as error:
        raise _named(f"{target.names[0]}.{target.attribute}", error) from error
    record.parameters.append(ParameterUpdate(target.names, target.module, f"lora_{target.attribute}", layer))


def _named(name: str, error: UserError) -> UserError:
    return UserError(f"'{name}': {error.what}", where=error.where, hint=error.hint)


def _refuse_activation(model: nn.Module, config: LoRAConfig, selection: Selection) -> None:
    """An activated adapter needs its sequence as ids, and layers that get one row for each token."""
    if not isinstance(config.invocation_tokens, list):
        what = "an activated adapter is attached with its invocation sequence as token ids"
        hint = "give ids, such as tokenizer('<|im_start|>assistant').input_ids"
        raise UserError(what, where="invocation_tokens", hint=hint)
    head = own_head(model)
    for target in selection.targets:
        if not is_linear(target.module) or target.module is head:
            what = "the output head" if target.module is head else f"a {type(target.module).__name__}"
            what = f"'{target.names[0]}' is {what}, and an activated adapter is for the linear layers of blocks"
            raise UserError(what, where="target_modules", hint="leave it out with exclude_modules")


def _activate(model: nn.Module, record: Attachment) -> None:
    """Let all adapted layers act where the invocation sequence says."""
    tokens = record.config.invocation_tokens
    assert isinstance(tokens, list)
    record.activation = Activation(tokens)
    for _, layer in record.adapted():
        vars(layer)["activation"] = record.activation
    record.activation.watch(model)


def _train_tokens(model: nn.Module, target: TokenTarget, record: Attachment) -> None:
    """Make the layer with trained rows, and those whose weight is tied to its."""
    leader = trained_tokens_of(target.module, target.tokens)
    record.tokens.append(_replacement(model, target.names, target.module, leader))
    for other in target.tied:
        layer = trained_tokens_of(other.module, target.tokens, leader)
        record.tokens.append(_replacement(model, other.names, other.module, layer))


def _replacement(model: nn.Module, names: tuple[str, ...], original: nn.Module, current: nn.Module) -> Replacement:
    return Replacement(names, spots_of(model, names), original, current)


def _refuse_change(model: nn.Module, record: Attachment) -> None:
    """PiSSA and OLoRA change W: they must suit every layer, and no other module may use that W."""
    init = record.config.init
    shared = shared_weights(model)
    for name, layer in record.adapted():
        reason = init_refusal(layer, init)
        if others := [other for other in shared.get(id(layer.weight), ()) if other != name]:
            reason = f"init '{init}' changes its weight, which '{others[0]}' uses as well"
        if reason is not None:
            raise UserError(f"'{name}': {reason}", where="init", hint="leave it out with exclude_modules")


def _copy_extra_modules(model: nn.Module, selection: Selection, record: Attachment, notes: list[str]) -> None:
    """Copy the extra trainable modules; weights tied among the copies stay tied."""
    if not selection.extra_modules:
        return
    shared = shared_weights(model)
    memo: dict[int, object] = {}
    for whole in selection.extra_modules:
        for tensor in (*whole.module.parameters(), *whole.module.buffers()):
            if not has_values(tensor):
                # deepcopy would copy the mode that such a tensor belongs to, and break it.
                bare = tensor.detach().clone()
                memo.setdefault(id(tensor), nn.Parameter(bare) if isinstance(tensor, nn.Parameter) else bare)
        trained = copy.deepcopy(whole.module, memo)
        for parameter in trained.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        record.extra_modules.append(_replacement(model, whole.names, whole.module, trained))
    copied = {id(m) for whole in selection.extra_modules for m in whole.module.modules()}
    for whole in selection.extra_modules:
        for parameter in whole.module.parameters():
            users = shared.get(id(parameter), ())
            if others := [name for name in users if id(model.get_submodule(name)) not in copied]:
                tied = f"the weight of '{whole.names[0]}' was tied to that of '{others[0]}'"
                notes.append(f"{tied}; its copy is trained, the other stays as it is")


def _train_biases(model: nn.Module, config: LoRAConfig, record: Attachment) -> None:
    if config.bias == "none":
        return
    adapted = {id(replacement.original) for replacement in record.layers}
    adapted |= {id(update.layer.holder) for update in record.parameters}
    whole = {id(m) for replacement in record.extra_modules for m in replacement.original.modules()}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in whole or (config.bias == "lora_only" and id(module) not in adapted):
            continue
        bias = own_parameters(module).get("bias")
        if bias is None or id(bias) in seen:
            continue
        seen.add(id(bias))
        record.biases.append(TrainedBias(f"{name}.bias".lstrip("."), bias, bias.detach().clone()))
        bias.requires_grad_(True)
    if not record.biases:
        raise UserError(f"bias: '{config.bias}' finds no bias to train", where="bias", hint="use bias: none")


def _switch_fast_paths(model: nn.Module, record: Attachment) -> None:
    """In eval mode torch's encoder layers use weights without calling their modules: make them call these."""
    replaced = {id(r.original) for r in (*record.layers, *record.tokens, *record.extra_modules)}
    replaced |= {id(update.runner) for update in record.parameters}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            attribute, value = "activation_relu_or_gelu", 0
        elif isinstance(module, nn.TransformerEncoder):
            attribute, value = "use_nested_tensor", False
        else:
            continue
        if any(id(inner) in replaced for inner in module.modules()):
            record.switched.append((module, attribute, getattr(module, attribute)))
            setattr(module, attribute, value)


def _restore(model: nn.Module, record: Attachment, keep_trained: bool = False) -> None:
    """Undo what ``record`` says; ``keep_trained`` keeps merged weights, biases and extra modules."""
    if record.activation is not None:
        record.activation.unwatch()
    for update in record.parameters:
        if not keep_trained:
            update.layer.restore_base()
        update.remove()
    for replacement in (*record.layers, *record.tokens):
        layer, original = replacement.current, replacement.original
        if isinstance(layer, AdaptedLayer) and not keep_trained:
            layer.restore_base()
        # The model may have been moved or cast meanwhile: the original takes what the layer has now.
        for table in (own_parameters, own_buffers):
            for key in list(table(original)):
                setattr(original, key, table(layer)[key])
        original.training = layer.training
        replacement.put(original)
    for whole in () if keep_trained else record.extra_modules:
        whole.put_original(model)
    for bias in record.biases:
        bias.parameter.grad = None
        if not keep_trained:
            bias.parameter.data.copy_(bias.original)
    for module, attribute, value in record.switched:
        setattr(module, attribute, value)
    for parameter, trainable in record.trainable_before:
        parameter.requires_grad_(trainable)
