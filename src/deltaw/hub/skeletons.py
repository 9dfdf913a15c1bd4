"""Models without weights, built from config.json.

Within :func:`deltaw.memory.simulation.fake_tensors` their tensors are fake, so that a dry run can measure memory.
"""

from __future__ import annotations

import os

import torch
from torch import nn
from transformers import PreTrainedModel

from deltaw import tensor_files
from deltaw.hub.empty_models import build_empty, check_architecture
from deltaw.hub.folders import config_folder
from deltaw.hub.parameter_names import match_names
from deltaw.hub.transformers_private import quiet
from deltaw.lora.complete_names import complete_names
from deltaw.machine.choices import dtype_of
from deltaw.settings import task_registry
from deltaw.tensor_files import read_header


def skeleton(
    reference: str | os.PathLike[str],
    *,
    dtype: str,
    task: str | None = None,
    num_labels: int | None = None,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return the frozen model in evaluation mode that :func:`load` would load, with uninitialized values.

    In a dry run, its tensors have no storage.

    Args:
        reference: As for :func:`load`. A hub id is downloaded completely.
        dtype: Key of :data:`deltaw.machine.choices.PRECISIONS`.
        task, num_labels, attention, trust_remote_code: As for :func:`load`.

    Raises:
        UserError: if the model is not found or its architecture does not support the task.
    """
    folder = config_folder(os.fspath(reference), dtype, trust_remote_code)
    task = task or task_registry.default_task()
    config = check_architecture(folder, task, trust_remote_code, num_labels)
    with quiet():
        model, _ = build_empty(folder, config, task, dtype, attention, trust_remote_code)
    if dtype == "gguf":
        from deltaw.hub import gguf_loading

        gguf_loading.insert_block_layers(model, gguf_loading.read_block_index(folder))
    return model.requires_grad_(False).eval()


def has_values(model: nn.Module) -> bool:
    """Return True if the parameters have values, which they do not have in a dry run."""
    return all(tensor_files.has_values(p) for p in model.parameters())


def new_modules(model: PreTrainedModel, reference: str, *, dtype: str, trust_remote_code: bool = False) -> list[str]:
    """Return the modules outside the backbone that have no weights in the files. Only headers are read."""
    missing = _missing_tensors(model, reference, dtype=dtype, trust_remote_code=trust_remote_code)
    return sorted({name.rpartition(".")[0] for name in missing})


def _missing_tensors(model: PreTrainedModel, reference: str, *, dtype: str, trust_remote_code: bool) -> list[str]:
    """Return the names of tensors outside the backbone that are missing from the weight files, if there are any files.

    Tensor names may or may not start with the prefix of the backbone, because checkpoints of other tasks use different
    prefixes.
    """
    files = config_folder(reference, dtype, trust_remote_code).glob("*.safetensors")
    stored_names = {name for file in files for name in read_header(file)}
    if not stored_names:
        return []
    if complete_names(model) is not None:
        names = match_names(model, dict.fromkeys(stored_names))
        return [name for name, _ in model.named_parameters() if name not in {**names.stored, **names.converted}]
    prefix = f"{model.base_model_prefix}."
    missing = [n for n, _ in model.named_parameters() if not {n, n.removeprefix(prefix), prefix + n} & stored_names]
    # The names of a text view are the endings of names in a complete model.
    missing = [n for n in missing if not any(stored.endswith(f".{n}") for stored in stored_names)]
    return [name for name in missing if not name.startswith(prefix) or ".pooler." in name]


def converted_bytes(model: PreTrainedModel, reference: str, *, dtype: str, trust_remote_code: bool = False) -> int:
    """Return the size of the files with weights that are converted to another type while loading.

    These files are memory-mapped in addition to the converted weights.
    """
    folder = config_folder(reference, dtype, trust_remote_code)
    if dtype == "gguf":
        return 0  # blocks are read without mapping the file
    target_code = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype_of(dtype)]
    files = [(file, {tensor.code for tensor in read_header(file).values()}) for file in folder.glob("*.safetensors")]
    return sum(file.stat().st_size for file, codes in files if codes - {target_code, "I64"})
