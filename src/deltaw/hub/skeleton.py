"""A model of the right shape without its weights: made from config.json alone, in no time and no memory.

Within :func:`deltaw.memory.simulation.fake_tensors` its tensors are fake, and a dry run shows what a run
would take. Knows configurations and transformers' classes; reads no weights.
"""

from __future__ import annotations

import json
import os

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from deltaw.host.choices import dtype_of
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import read_config
from deltaw.hub.quiet import quiet
from deltaw.hub.unfilled import unfilled
from deltaw.lora import fingerprint


def skeleton(
    reference: str | os.PathLike[str],
    *,
    dtype: str,
    task: str = "causal-lm",
    num_labels: int | None = None,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model that :func:`deltaw.hub.loading.load` would load, in evaluation mode and frozen; its
    weights are whatever stood in memory; in a dry run there are none.

    Args:
        reference: as for ``load``; a hub id is fetched whole.
        dtype: a key of :data:`deltaw.host.choices.PRECISIONS`.
        task, num_labels, attention, trust_remote_code: as for ``load``.

    Raises:
        UserError: the reference leads nowhere, or the architecture does not fit the task.
    """
    folder = config_folder(os.fspath(reference), dtype, trust_remote_code)
    with quiet():
        config = read_config(folder, task, num_labels, trust_remote_code)
        model, _ = unfilled(folder, config, task, dtype, attention, trust_remote_code)
    if dtype == "gguf":
        from deltaw.hub import gguf_blocks  # the file's readers are imported where there is such a file

        gguf_blocks.put_blocks(model, gguf_blocks.entries_of(folder))
    return model.requires_grad_(False).eval()


def has_values(model: nn.Module) -> bool:
    """Whether the model's parameters hold numbers; in a dry run they do not, and none can be compared."""
    return all(fingerprint.has_values(p) for p in model.parameters())


def new_modules(
    model: PreTrainedModel, reference: str, *, dtype: str, trust_remote_code: bool = False
) -> list[str]:
    """Names of modules whose weights the model's files do not hold, told by the files' headers alone.

    Empty where the files are not there. The base model's part of a name may be missing in a
    file, or stand there alone, as it does in files of other tasks.
    """
    folder = config_folder(reference, dtype, trust_remote_code)
    known: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            known.update(file.keys())
    if not known:
        return []
    prefix = f"{model.base_model_prefix}."
    missing = [
        name
        for name, _ in model.named_parameters()
        if not {name, name.removeprefix(prefix), prefix + name} & known
    ]
    new = [name for name in missing if not name.startswith(prefix) or ".pooler." in name]
    return sorted({name.rpartition(".")[0] for name in new})


def converted_bytes(
    model: PreTrainedModel, reference: str, *, dtype: str, trust_remote_code: bool = False
) -> int:
    """Bytes of the model's files that hold weights of another type than they are loaded as: they are mapped
    while they are read, beside the weights made of them."""
    folder = config_folder(reference, dtype, trust_remote_code)
    if dtype == "gguf":
        return 0  # its blocks are read, not mapped
    wanted = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype_of(dtype)]
    mapped = 0
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:  # a safetensors file begins with the length of its header, in JSON
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        if any(entry["dtype"] not in (wanted, "I64") for entry in header.values()):
            mapped += path.stat().st_size
    return mapped
