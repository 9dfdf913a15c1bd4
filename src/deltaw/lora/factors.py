"""The low-rank factors of a saved adapter, for a model that does not carry it.

Whoever serves many adapters on one model wants each one's A and B, and the model as it is. Names and shapes
are checked against the model as :func:`~deltaw.lora.files.load_adapter` checks them. An adapter that has more
than factors of linear layers is refused, and the refusal names what it has. Knows no decoding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.lora.config import CHANGING_INITS, LoRAConfig
from deltaw.lora.config import scaling as scaling_of
from deltaw.lora.files import WEIGHTS_NAME, factor_tensors, read_adapter

_MERGE = "merge it into a model of its own: deltaw merge"


@dataclass(frozen=True)
class Factors:
    """The update of one linear layer: y += scaling · (x·A)·B.

    Attributes:
        lora_A: (in, r) fp32. lora_B: (r, out) fp32. They may be views of a file's or a layer's memory.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


@dataclass(frozen=True)
class AdapterFactors:
    """The factors of an adapter.

    Attributes:
        config: its settings.
        layers: by the layer's name in the model, in the model's order.
        metadata: see :class:`~deltaw.lora.files.AdapterFile`.
    """

    config: LoRAConfig
    layers: Mapping[str, Factors]
    metadata: Mapping[str, str]


def read_factors(model: nn.Module, folder: str | Path) -> AdapterFactors:
    """The factors in ``folder`` for ``model``, which carries no adapter and is not changed.

    Raises:
        UserError: files are missing or broken, a tensor does not fit or is missing, a value is not finite, or
            the adapter has more than low-rank factors of linear layers.
    """
    adapter = read_adapter(folder)
    where = str(Path(folder) / WEIGHTS_NAME)
    if (reason := more_than_factors(adapter.config)) is not None:
        raise UserError(reason, where=str(folder), hint=_MERGE)
    layers: dict[str, Factors] = {}
    for target, lora_A, lora_B in factor_tensors(model, adapter, where):
        scaling = scaling_of(target.rank, target.alpha, adapter.config.rslora)
        name = target.names[0]
        layers[name] = Factors(_factor(lora_A, name, where), _factor(lora_B, name, where), scaling)
    return AdapterFactors(adapter.config, layers, adapter.metadata)


def more_than_factors(config: LoRAConfig) -> str | None:
    """What an adapter has beside factors, in a sentence; None where that is nothing."""
    if config.dora:
        return "it is a DoRA adapter (use_dora), whose magnitudes change the base's own weights"
    if config.bias != "none":
        return f"it has biases of the base trained in their place (bias: {config.bias})"
    if config.lora_bias:
        return "it has biases on its factors (lora_bias)"
    if config.train_modules:
        return f"it has modules trained in full (modules_to_save): {', '.join(config.train_modules)}"
    if config.target_parameters:
        return f"it adapts parameters (target_parameters): {', '.join(config.target_parameters)}"
    if config.trainable_token_indices:
        return "it has trained rows of token embeddings (trainable_token_indices)"
    if config.init in CHANGING_INITS:
        return f"its initialization '{config.init}' changed the base's weights"
    return None


def _factor(stored: Tensor, name: str, where: str) -> Tensor:
    """A factor of the file in a layer's orientation, in fp32."""
    factor = stored.t().float()
    # Either is no number where any value is none. NumPy takes one thread: others may be computing texts.
    values = factor.numpy()
    if factor.numel() and not (math.isfinite(values.min()) and math.isfinite(values.max())):
        hint = "take an earlier checkpoint of the adapter"
        raise UserError(f"the factors of '{name}' have values that are not finite", where=where, hint=hint)
    return factor
