"""The slow way of a merge: the base model is loaded, changed in memory, and saved by transformers.

For models whose files do not hold their weights one by one. Takes as much memory as the model in the type of
its files, and writes what transformers writes: its save undoes what its load put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from deltaw.errors import UserError
from deltaw.export.adapters import AdapterChanges, Trained
from deltaw.export.apply import change_in_place
from deltaw.export.base import Base, Say
from deltaw.export.merged import PRECISIONS, MergedModel, Output
from deltaw.export.merged_config import read_settings
from deltaw.hub.checkpoint import read_checkpoint
from deltaw.hub.loading import load
from deltaw.hub.quiet import quiet
from deltaw.lora.fingerprint import base_fingerprint, same_base
from deltaw.methods.parameters import names_of

if TYPE_CHECKING:
    from deltaw.export.merge import MergeOptions

_SHARD = "5GB"
_FP32 = {"float32", "float64", "float16"}


@dataclass(frozen=True)
class Written:
    """What was written: a description of the model, and the weight files' names."""

    model: MergedModel
    files: list[str]


def write_from_memory(
    base: Base,
    adapters: Sequence[AdapterChanges],
    trained: Sequence[Trained],
    folder: Path,
    options: MergeOptions,
    say: Say,
) -> Written:
    """Merge in memory and save into ``folder``.

    Raises:
        UserError: the base is another one, or the adapter needs tensors that the model has no place for.
    """
    settings = read_settings(base.folder)
    stored = str(settings.get("dtype") or settings.get("torch_dtype") or "float32")
    model = load(
        str(base.folder),
        precision="fp32" if stored in _FP32 else "bf16",
        device="cpu",
        task=base.task,
        num_labels=base.outputs,
        trust_remote_code=base.trust_remote_code,
        say=lambda line: None,
    ).model
    same = _same_base(model, adapters)
    if same is False and not options.other_base:
        raise UserError(
            f"the adapter was trained on other weights than those of '{base.reference}'",
            where=str(adapters[0].folder),
            hint="name its own base with --model; --other-base merges it all the same",
        )
    own = names_of(model)
    for one in trained:
        absent = [name for name in one.names if name not in own]
        tied = {n for n, p in own.items() for name in one.names if name in own and p is own[name]}
        if absent or tied - set(one.names):
            raise UserError(
                f"'{one.names[0]}' is tied to a weight that the adapter leaves alone, or has no place in a "
                f"{type(model).__name__}",
                where=one.names[0],
                hint="keep the adapter separate",
            )
    target = PRECISIONS.get(options.precision, _type_named(stored))
    # Where the target is narrower than the model in memory, each sum is rounded once, from fp32.
    for one in trained:
        change_in_place(own[one.names[0]], one.change, rounded=target)
    with quiet():
        nn.Module.to(model, target)
        model.save_pretrained(folder, max_shard_size=options.shard_size or _SHARD)
    outputs = tuple(
        Output(t.name, t.dtype, t.shape, t, (), t.file.name) for t in read_checkpoint(folder).tensors.values()
    )
    changed = {name: one.change for one in trained for name in one.names}
    described = MergedModel(base, tuple(adapters), outputs, read_settings(folder), changed, same_base=same)
    return Written(described, sorted({output.file for output in outputs}))


def _same_base(model: PreTrainedModel, adapters: Sequence[AdapterChanges]) -> bool | None:
    own = names_of(model)
    found = []
    for adapter in adapters:
        replaced = [own[name] for name in adapter.replaced if name in own]
        found.append(same_base(base_fingerprint(model, replaced), adapter.fingerprint))
    return False if False in found else True if found and all(found) else None


def _type_named(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.float32
