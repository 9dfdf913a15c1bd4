"""A base model divided among the processes of a run: with which settings it can be, and how it is loaded.

Knows settings and processes; how blocks are divided is in :mod:`deltaw.runtime.sharded`.
"""

from __future__ import annotations

import torch

from deltaw.config import RunConfig
from deltaw.errors import UserError
from deltaw.host.choices import choose_device
from deltaw.host.memory import give_large_blocks_back
from deltaw.hub.loading import Weights
from deltaw.training.callbacks import Say
from deltaw.training.parallel.group import Group
from deltaw.training.parallel.reducer import Reducer

_WHOLE = "set train.sharding: none, or "


def as_sharded(config: RunConfig, say: Say) -> RunConfig:
    """The settings of a run whose base model is divided; what reads text of its own is off unless asked for.

    Raises:
        UserError: they ask for what a divided base model cannot do.
    """
    train, lora = config.train, config.lora
    refused = {
        "method": (config.method != "lora", f"method {config.method}", "method: lora"),
        "task": (config.task != "causal-lm", f"task {config.task}", "task: causal-lm"),
        "lora.dora": (lora.dora, "DoRA, which needs the norms of whole weights", "lora.dora: false"),
        "lora.init": (
            lora.init not in ("uniform", "gaussian", "orthogonal"),
            f"init {lora.init}, which needs whole weights or many rows of inputs",
            "lora.init: uniform",
        ),
        "lora.bias": (lora.bias != "none", "trained biases of the base model", "lora.bias: none"),
        "lora.target_parameters": (
            bool(lora.target_parameters),
            "adapted parameters of modules",
            "adapt linear layers",
        ),
        "lora.train_modules": (bool(lora.train_modules), "copies of modules", "lora.train_modules: []"),
        "lora.trainable_token_indices": (
            bool(lora.trainable_token_indices),
            "trained rows of embeddings",
            "lora.trainable_token_indices: null",
        ),
        "lora.activation": (
            lora.activation != "always",
            "an adapter that acts from an invocation sequence on",
            "lora.activation: always",
        ),
        "train.keep_features": (
            train.keep_features is True,
            "kept features, with which processes would run different blocks",
            "train.keep_features: false",
        ),
        "train.keep_general": (train.keep_general > 0, "general answers", "train.keep_general: 0"),
        "precision": (
            config.precision in ("gguf", "nf4"),
            f"precision {config.precision}, whose blocks are not divided",
            "precision: bf16 or int8",
        ),
        "device": (choose_device(config.device).value != "cpu", f"device {config.device}", "device: cpu"),
    }
    for key, (wrong, what, instead) in refused.items():
        if wrong:
            raise UserError(
                f"a base model that is divided among processes cannot be used with {what}",
                where=f"{key} (train.sharding: base)",
                hint=_WHOLE + instead,
            )
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(FSDPModule, "set_custom_all_gather"):
        raise UserError(
            f"dividing a base model needs a newer torch than {torch.__version__}",
            where="train.sharding",
            hint="pip install --upgrade torch, or set train.sharding: none",
        )
    off: dict[str, object] = {}
    if train.drift == "auto":
        off["drift"] = False
    if train.samples == "auto":
        off["samples"] = 0
    if off:
        said = " and ".join(f"train.{key}: {str(value).lower()}" for key, value in off.items())
        say(f"{said}: each token of an answer would gather every block of the divided model")
    return config.model_copy(update={"train": train.model_copy(update={**off, "keep_features": False})})


def divided(config: RunConfig, processes: Reducer) -> Weights | None:
    """What loads the run's model with its blocks divided; None where each process holds it whole."""
    if config.train.sharding != "base" or not isinstance(processes, Group):
        return None
    from deltaw.runtime.sharded import ShardedLoader

    give_large_blocks_back()
    return ShardedLoader(processes.divide(), processes.gathering, rounded=config.precision == "int8")
