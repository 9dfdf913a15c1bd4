"""Read the low-rank factors of a saved adapter for a model that does not have it attached.

Used to serve several adapters on one model. Names and shapes are checked against the model as in
:func:`~deltaw.lora.files.load_adapter`. Adapters with more than factors of linear layers are rejected.
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

_MERGE = "merge it into a separate model: deltaw merge"


@dataclass(frozen=True)
class Factors:
    """The update of one linear layer: y += scaling · (x·A)·B.

    The tensors may be views of a file's or a layer's memory.

    Attributes:
        lora_A: (in, r) fp32.
        lora_B: (r, out) fp32.
        scaling: Factor of A·B.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


@dataclass(frozen=True)
class AdapterFactors:
    """The factors of an adapter.

    Attributes:
        config: Settings of the adapter.
        layers: Factors by the layer's name in the model, in model order.
        metadata: See :class:`~deltaw.lora.files.AdapterFile`.
    """

    config: LoRAConfig
    layers: Mapping[str, Factors]
    metadata: Mapping[str, str]


def read_factors(model: nn.Module, folder: str | Path) -> AdapterFactors:
    """Read the factors in ``folder`` for ``model``, which has no adapter and is not changed.

    Raises:
        UserError: if files are missing or damaged, a tensor is missing or does not fit, or a value is not finite. Also
            if the adapter has more than low-rank factors of linear layers.
    """
    adapter = read_adapter(folder)
    location = str(Path(folder) / WEIGHTS_NAME)
    if (reason := unsupported_reason(adapter.config)) is not None:
        raise UserError(reason, location=str(folder), hint=_MERGE)
    layers: dict[str, Factors] = {}
    for target, lora_A, lora_B in factor_tensors(model, adapter, location):
        scaling = scaling_of(target.rank, target.alpha, adapter.config.rslora)
        name = target.names[0]
        layers[name] = Factors(_factor(lora_A, name, location), _factor(lora_B, name, location), scaling)
    return AdapterFactors(adapter.config, layers, adapter.metadata)


def unsupported_reason(config: LoRAConfig) -> str | None:
    """Return a sentence about parts of an adapter other than factors, or None if it has none."""
    if config.dora:
        return "it is a DoRA adapter (use_dora), whose magnitudes change the base weights"
    if config.bias != "none":
        return f"it has trained biases of the base model (bias: {config.bias})"
    if config.lora_bias:
        return "it has biases on its factors (lora_bias)"
    if config.train_modules:
        return f"it has modules trained in full (modules_to_save): {', '.join(config.train_modules)}"
    if config.target_parameters:
        return f"it adapts parameters (target_parameters): {', '.join(config.target_parameters)}"
    if config.trainable_token_indices:
        return "it has trained rows of token embeddings (trainable_token_indices)"
    if config.init in CHANGING_INITS:
        return f"its initialization '{config.init}' changed the base weights"
    return None


def _factor(stored: Tensor, name: str, location: str) -> Tensor:
    """Convert a factor of the file to a layer's orientation and fp32."""
    factor = stored.t().float()
    # min and max are NaN if any value is. NumPy uses one thread, so that it does not slow down generation.
    values = factor.numpy()
    if factor.numel() and not (math.isfinite(values.min()) and math.isfinite(values.max())):
        hint = "use an earlier checkpoint of the adapter"
        raise UserError(f"the factors of '{name}' have values that are not finite", location=location, hint=hint)
    return factor
