"""Factors of the adapter that is attached to a model, in the form that the decoder reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from deltaw.decoding.decodable import Decodable
from deltaw.decoding.model_decoder import ModelAdapter, ModelDecoder
from deltaw.errors import UserError
from deltaw.kernels.decode import PackedAdapter
from deltaw.lora.attachment import get_attachment, unwrap_model
from deltaw.lora.files import Factors, unsupported_reason
from deltaw.lora.kinds import get_output_head
from deltaw.lora.layers import LoRAConv1D, LoRALinear
from deltaw.runtime.block_roles import module_at

# Location of the output head, which is outside all blocks.
HEAD = (-1, "head")


class Packer:
    """Packs the factors of a model's linear layers for its decoder.

    A decoder identifies the parts of its blocks (query, key, value, output, gate, up, down) and the output head, not
    module names. A fused layer (``qkv_proj`` and ``gate_up_proj`` of Phi-3, ``c_attn`` of GPT-2) is represented by its
    first part, with outputs in the same order.

    Args:
        model: Model with its head. An adapter may be attached.
        decodable: Decoder of the model, with its blocks and their roles.
    """

    def __init__(self, model: nn.Module, decodable: Decodable) -> None:
        self._pack: Callable[[Any], PackedAdapter | ModelAdapter] = decodable.decoder.pack_adapter
        self._locations: dict[str, tuple[int, str] | str] = {}
        if isinstance(decodable.decoder, ModelDecoder):
            self._locations.update(decodable.decoder.names)
            return
        names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(name)
        for index, (block, roles) in enumerate(zip(decodable.blocks, decodable.roles, strict=True)):
            attention = roles.attention
            mlp = roles.mlp
            assert mlp is not None
            parts = {attention.output: "output", mlp.output: "down"}
            # A fused layer is represented by its first part.
            parts |= dict(zip(attention.inputs, ("query", "key", "value"), strict=False))
            parts |= dict(zip(mlp.inputs, ("gate", "up"), strict=False))
            for path, role in parts.items():
                self._locations |= dict.fromkeys(names[id(module_at(block, path))], (index, role))
        self._locations |= dict.fromkeys(names.get(id(get_output_head(model)), ()), HEAD)

    def __call__(self, layers: Mapping[str, Factors]) -> PackedAdapter | ModelAdapter:
        """Pack factors for the decoder.

        Args:
            layers: Factors by the names of the layers in the model.

        Raises:
            UserError: if a layer is neither in a block nor the head.
        """
        by_location = {}
        for name, factors in layers.items():
            if name not in self._locations:
                message = f"it adapts '{name}', which is neither in a block of the model nor its output head"
                raise UserError(message, location=name, hint="merge the adapter into the model: deltaw merge")
            by_location[self._locations[name]] = (factors.lora_A, factors.lora_B, factors.scaling)
        return self._pack(by_location)


def pack_attached_adapter(model: nn.Module, packer: Packer) -> PackedAdapter | ModelAdapter | str | None:
    """Pack the adapter that is attached to a model, for a decoder of the model's weights.

    Returns:
        The packed adapter, None if the model has no adapter, or the reason if the adapter is more than low-rank
        factors.
    """
    layers = attached_factors(model)
    if isinstance(layers, str):
        return layers
    try:
        return packer(layers) if layers else None
    except UserError as error:
        return error.message


def attached_factors(model: nn.Module) -> dict[str, Factors] | str:
    """Return the factors of the attached adapter by layer name. They share memory with the adapter.

    Returns:
        An empty dictionary without an adapter, or the reason if the adapter is more than low-rank factors.
    """
    record = get_attachment(unwrap_model(model))
    if record is None:
        return {}
    if (reason := unsupported_reason(record.config)) is not None:
        return reason
    layers: dict[str, Factors] = {}
    for name, layer in record.adapted():
        if not isinstance(layer, LoRALinear | LoRAConv1D) or type(layer) not in (LoRALinear, LoRAConv1D):
            return f"it adapts '{name}' as a {type(layer).__name__}"
        if layer.merged or layer.changed_init is not None:
            return f"the weight of '{name}' differs from the base model's"
        layers[name] = Factors(layer.lora_A.detach().float(), layer.lora_B.detach().float(), layer.scaling)
    return layers
