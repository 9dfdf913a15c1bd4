"""What settings mean where several processes train together: refused, or as each process has them.

Knows settings and how many processes there are.
"""

from __future__ import annotations

import os

from deltaw.config import RunConfig
from deltaw.errors import UserError
from deltaw.host.choices import choose_device, choose_threads
from deltaw.training.callbacks import Say
from deltaw.training.parallel.reducer import Reducer
from deltaw.training.parallel.sharding import as_sharded

_ONE_PROCESS = "train in one process, without torchrun, or "


def as_parallel(config: RunConfig, processes: Reducer, say: Say) -> RunConfig:
    """The settings that all processes train with; those given where one trains alone.

    Raises:
        UserError: they ask for what several processes cannot do.
    """
    sharded = config.train.sharding == "base"
    if processes.size == 1:
        if sharded:
            say("train.sharding: base: one process alone holds the whole base model")
        return config
    if sharded:
        config = as_sharded(config, say)
    train = config.train
    whole = sharded or config.lora.activation == "always"
    if train.keep_features is True and not whole:
        raise _refused("kept keys and values of prompts", "train.keep_features", "set it to false")
    check_device(config, processes)
    say(f"{processes.size} processes, {processes.local_size} of them here: they share the rows of a step")
    if train.keep_features == "auto" and not whole:
        say("train.keep_features: false: several processes keep no keys and values of prompts")
        return config.model_copy(update={"train": train.model_copy(update={"keep_features": False})})
    return config


def check_device(config: RunConfig, processes: Reducer) -> None:
    """Refuse more processes on this machine than it has CUDA devices, where they compute on these.

    Raises:
        UserError: there are too few, or one device is named for all.
    """
    kind, _, index = choose_device(config.device).value.partition(":")
    if kind == "cpu":
        return
    if index:
        raise _refused(f"the one device {config.device}", "device", "set device: cuda")
    import torch

    there = torch.cuda.device_count() if kind == "cuda" else 1
    if processes.local_size > there:
        raise UserError(
            f"{processes.local_size} processes are to train on {there} {kind} devices of this machine",
            where="device",
            hint="start as many processes on a node as it has devices, or set device: cpu",
        )


def threads_of(config: RunConfig, processes: Reducer) -> str | int:
    """Threads of a process: its part of those that the machine gives, where the settings name no number."""
    if processes.local_size == 1 or config.threads != "auto" or os.environ.get("OMP_NUM_THREADS"):
        return config.threads
    return max(1, choose_threads("auto").value // processes.local_size)


def _refused(what: str, where: str, instead: str) -> UserError:
    return UserError(f"several processes cannot use {what}", where=where, hint=_ONE_PROCESS + instead)
