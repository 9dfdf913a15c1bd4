"""deltaw: LoRA fine-tuning of any PyTorch model.

Public names are imported lazily, so that the command line starts without loading torch, and so that LoRA layers in
your own training loop only require torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from deltaw.errors import UserError
from deltaw.settings import registry as _registry
from deltaw.version import __version__

if TYPE_CHECKING:
    from deltaw.acceleration.accelerate import accelerate, restore
    from deltaw.lora import (
        LoRAConfig,
        LoRAConv1D,
        LoRAConv1d,
        LoRAConv2d,
        LoRAConv3d,
        LoRAEmbedding,
        LoRALinear,
        OtherBaseModelWarning,
        adapter_parameters,
        attach,
        count_parameters,
        detach,
        disabled,
        load_adapter,
        merge,
        save_adapter,
        unmerge,
    )
    from deltaw.runs.fit import fit
    from deltaw.settings.config import RunConfig
    from deltaw.training.loop import train
    from deltaw.training.planning.plan_run import plan

__all__ = [
    "LoRAConfig",
    "LoRAConv1D",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRALinear",
    "OtherBaseModelWarning",
    "RunConfig",
    "UserError",
    "__version__",
    "accelerate",
    "adapter_parameters",
    "attach",
    "count_parameters",
    "detach",
    "disabled",
    "fit",
    "load_adapter",
    "merge",
    "plan",
    "restore",
    "save_adapter",
    "train",
    "unmerge",
]

# Modules of the names that are not defined in deltaw.lora.
_MODULES = {
    "accelerate": "deltaw.acceleration.accelerate",
    "restore": "deltaw.acceleration.accelerate",
    "fit": "deltaw.runs.fit",
    "plan": "deltaw.training.planning.plan_run",
    "train": "deltaw.training.loop",
    "RunConfig": "deltaw.settings.config",
}


# The built-in methods and tasks are registered when settings are first read.
_registry.built_in_packages = ("deltaw.methods", "deltaw.tasks")
_registry.default_callbacks = ("deltaw.reports.run:PageCallback",)


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'deltaw' has no attribute '{name}'")
    value = getattr(importlib.import_module(_MODULES.get(name, "deltaw.lora")), name)
    globals()[name] = value
    return value
