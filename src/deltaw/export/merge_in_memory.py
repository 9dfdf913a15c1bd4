"""Merge into a model in memory.

Used if the files of the base model do not store parameters individually. It needs as much memory as the model in the
type of its files. The save method of transformers reverses the conversion of its load method. Weights tied to an
unchanged weight are untied, and missing biases are added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.export.adapters import ParameterChange, WeightChange
from deltaw.export.merge_plan import MergePlan
from deltaw.export.merged import MergedModel, MergedTensor
from deltaw.export.merged_config import PRECISIONS, read_settings
from deltaw.hub.checkpoint import read_checkpoint
from deltaw.hub.transformers_private import quiet
from deltaw.kernels.torch_modules import direct_parameters
from deltaw.lora.fingerprint import base_fingerprint, same_base
from deltaw.lora.replacements import find_spots
from deltaw.methods.parameters import parameters_by_name
from deltaw.tensor_files import row_blocks


@torch.no_grad()
def apply_changes(model: nn.Module, changes: Sequence[ParameterChange]) -> None:
    """Apply changes to the parameters of a loaded model.

    Raises:
        UserError: if the model lacks a parameter.
    """
    for change in changes:
        parameters = parameters_by_name(model)
        existing = [name for name in change.names if name in parameters]
        try:
            spots = find_spots(model, change.names)
        except AttributeError as error:
            hint = "use the base model that the adapter was trained on"
            raise UserError(f"the model has no '{change.names[0]}'", location=change.names[0], hint=hint) from error
        if existing:
            parameter = parameters[existing[0]]
            if any(p is parameter and name not in change.names for name, p in parameters.items()):
                parameter = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        else:
            weight = direct_parameters(spots[0][0])["weight"]
            assert weight is not None
            parameter = nn.Parameter(weight.new_zeros(change.shape), requires_grad=False)
        for module, attribute in spots:
            setattr(module, attribute, parameter)
        change_in_place(parameter, change.change)


@torch.no_grad()
def change_in_place(parameter: Tensor, change: WeightChange, *, rounded: torch.dtype | None = None) -> None:
    """Apply a change to a parameter, computed in fp32 (fp64 for fp64), and round to the parameter's type.

    Args:
        parameter: Parameter to modify.
        change: Change to apply.
        rounded: Narrower type to round to first, if any.
    """
    data = parameter.data if parameter.dim() else parameter.data.view(1)
    compute_dtype = torch.float64 if data.dtype == torch.float64 else torch.float32

    def blocks(single_block: bool = False) -> Iterator[tuple[int, Tensor]]:
        for start, stop in [(0, len(data))] if single_block else row_blocks(data.shape):
            yield start, data[start:stop].to(compute_dtype, copy=True)

    change.prepare(blocks)
    for start, rows in blocks(change.needs_all_rows):
        changed = change.apply(rows, start)
        data[start : start + len(rows)] = changed if rounded is None else changed.to(rounded)


_SHARD = "5GB"
_FP32 = {"float32", "float64", "float16"}


def write_from_memory(job: MergePlan, folder: Path) -> MergedModel:
    """Merge in memory, save into ``folder``, and return a description of the merged model.

    Raises:
        UserError: if the base model differs from the one used in training, or the model cannot represent a change.
    """
    if job.base.is_view:
        message = "an adapter of experts cannot be merged into a vision-language model"
        raise UserError(message, location=str(job.run), hint="keep the adapter separate")
    settings = read_settings(job.base.folder)
    stored = str(settings.get("dtype") or settings.get("torch_dtype") or "float32")
    model = job.base.load("fp32" if stored in _FP32 else "bf16").model
    parameters = parameters_by_name(model)
    replaced = [[parameters[name] for name in item.replaced if name in parameters] for item in job.adapters]
    digests = [base_fingerprint(model, values) for values in replaced]
    is_same = job.same_base(same_base(name, item.fingerprint) for name, item in zip(digests, job.adapters, strict=True))
    for item in job.changes:
        absent = [name for name in item.names if name not in parameters]
        tied = {n for n, p in parameters.items() for name in item.names if name in parameters and p is parameters[name]}
        if absent or tied - set(item.names):
            message = f"'{item.names[0]}' is tied to an unchanged weight or does not exist in {type(model).__name__}"
            raise UserError(message, location=item.names[0], hint="keep the adapter separate")
    dtype = getattr(torch, stored, None)
    base_dtype = dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32
    target = PRECISIONS.get(job.options.precision, base_dtype)
    # If the target type is narrower than the model in memory, each sum is rounded once, from fp32.
    for item in job.changes:
        change_in_place(parameters[item.names[0]], item.change, rounded=target)
    with quiet():
        nn.Module.to(model, target)
        model.save_pretrained(folder, max_shard_size=job.options.shard_size or _SHARD)
    stored_tensors = read_checkpoint(folder).tensors.values()
    outputs = tuple(MergedTensor(t.name, t.dtype, t.shape, t, (), t.file.name) for t in stored_tensors)
    changed = {name: item.change for item in job.changes for name in item.names}
    return MergedModel(job, outputs, read_settings(folder), changed, same_base=is_same)
