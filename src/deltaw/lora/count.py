"""How many parameters a model has and how many of them are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.adapted import AdaptedLayer
from deltaw.lora.attachment import adapted_layers, attachment, unwrapped
from deltaw.lora.stored import weight_shape


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
    for whole in record.extra_modules if record else ():
        base.update({id(p): p.numel() for p in whole.original.parameters()})
    copies = {id(p) for whole in (record.extra_modules if record else ()) for p in whole.current.parameters()}
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
