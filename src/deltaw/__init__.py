"""deltaw: LoRA fine-tuning of any PyTorch model.

The public face: names only. Each is imported when it is first asked for, so that the command line answers
before torch is loaded, and so that a layer in one's own loop needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from deltaw.errors import UserError
from deltaw.version import __version__

if TYPE_CHECKING:
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
    from deltaw.reports.run import fit
    from deltaw.settings import RunConfig
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
    "adapter_parameters",
    "attach",
    "count_parameters",
    "detach",
    "disabled",
    "fit",
    "load_adapter",
    "merge",
    "plan",
    "save_adapter",
    "train",
    "unmerge",
]

# Names that do not come from deltaw.lora.
_ELSEWHERE = {
    "fit": "deltaw.reports.run",
    "plan": "deltaw.training.planning.plan_run",
    "train": "deltaw.training.loop",
    "RunConfig": "deltaw.settings",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'deltaw' has no attribute '{name}'")
    value = getattr(importlib.import_module(_ELSEWHERE.get(name, "deltaw.lora")), name)
    globals()[name] = value
    return value
