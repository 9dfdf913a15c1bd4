"""Where a low-rank update goes in a packed decoding step: from a layer's name to a block's part.

A decoder knows the parts of its blocks (query, key, value, output, gate, up, down) and the output head, not
the names of a model's modules. A layer that gives several parts (Phi-3's ``qkv_proj`` and ``gate_up_proj``,
GPT-2's ``c_attn``) is the first of them there as well, with outputs in the same order. Knows descriptions of
blocks, and factors; not files, nor how a step computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.lora.attachment import attachment, unwrapped
from deltaw.lora.factors import Factors, more_than_factors
from deltaw.lora.layers import LoRAConv1D, LoRALayer, LoRALinear
from deltaw.runtime.roles import BlockRoles, part

# What a decoder takes: by block and part, A (in, r), B (r, out) and the scaling.
Placed = dict[tuple[int, str], tuple[Tensor, Tensor, float]]
Packed = TypeVar("Packed", covariant=True)
# The output head's place: it is in no block.
HEAD = (-1, "head")


class FactorPlaces:
    """The places of a model's linear layers in a decoder.

    Args:
        model: with its head; an adapter may be on it.
        blocks: in order, as the decoder has them. roles: the description of each.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], roles: Sequence[BlockRoles]) -> None:
        names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(name)
        self._places: dict[str, tuple[int, str]] = {}
        for number, (block, described) in enumerate(zip(blocks, roles, strict=True)):
            for path, what in _parts_of(described).items():
                self._places |= dict.fromkeys(names[id(part(block, path))], (number, what))
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._places |= dict.fromkeys(names.get(id(head), ()), HEAD)

    def placed(self, layers: Mapping[str, Factors]) -> Placed:
        """The factors of layers, by their names in the model, as a decoder takes them.

        Raises:
            UserError: a layer is in no block, and not the head.
        """
        found: Placed = {}
        for name, factors in layers.items():
            place = self._places.get(name)
            if place is None:
                raise UserError(
                    f"it adapts '{name}', which is no part of the model's blocks and not its head",
                    where=name,
                    hint="merge the adapter into a model of its own: deltaw merge",
                )
            found[place] = (factors.lora_A, factors.lora_B, factors.scaling)
        return found


class Decoder(Protocol[Packed]):
    """What is asked of a decoder here."""

    def pack_adapter(self, factors: Placed) -> Packed:
        """An adapter in the form that its steps take."""


def packing(places: FactorPlaces, decoder: Decoder[Packed]) -> Callable[[Mapping[str, Factors]], Packed]:
    """How a bank packs factors for a decoder."""
    return lambda layers: decoder.pack_adapter(places.placed(layers))


def packed_from_model(
    model: nn.Module, places: FactorPlaces, decoder: Decoder[Packed]
) -> Packed | str | None:
    """The adapter that is on a live model, for a decoder of the model's own weights.

    Returns:
        the adapter; None where there is none; or why its factors do not say all that it does.
    """
    layers = factors_on(model)
    if isinstance(layers, str):
        return layers
    try:
        return decoder.pack_adapter(places.placed(layers)) if layers else None
    except UserError as error:
        return error.what


def factors_on(model: nn.Module) -> dict[str, Factors] | str:
    """The factors of the adapter that is on a model, by names of its layers, sharing memory with it; empty
    without one. Or why factors do not say all that the adapter does."""
    record = attachment(unwrapped(model))
    if record is None:
        return {}
    if (reason := more_than_factors(record.config)) is not None:
        return reason
    layers: dict[str, Factors] = {}
    for name, layer in record.adapted():
        if not isinstance(layer, LoRALinear | LoRAConv1D) or type(layer) not in (LoRALinear, LoRAConv1D):
            return f"it adapts '{name}' as a {type(layer).__name__}"
        if layer.merged or layer.changed_init is not None:
            return f"the weight of '{name}' is not the base model's own"
        layers[name] = _detached(layer)
    return layers


def _detached(layer: LoRALayer) -> Factors:
    return Factors(layer.lora_A.detach().float(), layer.lora_B.detach().float(), layer.scaling)


def _parts_of(roles: BlockRoles) -> dict[str, str]:
    """By the path of each layer of a block: its part."""
    attention, mlp = roles.attention, roles.mlp
    parts = {attention.output: "output", mlp.output: "down"}
    # One layer that gives several parts stands for the first of them.
    parts |= dict(zip(attention.inputs, ("query", "key", "value"), strict=False))
    return parts | dict(zip(mlp.inputs, ("gate", "up"), strict=False))
