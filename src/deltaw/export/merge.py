"""Merge of one or several adapters into their base model, written as a model folder.

Weights are streamed from the base model's files to the merged files in blocks of rows, so that only the adapter is in
memory. If transformers assembles weights from several tensors while loading (some mixtures of experts), the model is
loaded instead, and a message is logged. The folder appears atomically, after an optional verification.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.export.adapters import ParameterChange, WeightChange
from deltaw.export.base import MergeOptions, MergePlan, atomic_folder, check_target, prepare_merge
from deltaw.export.merged import (
    PRECISIONS,
    MergedModel,
    MergedTensor,
    NeedsMemoryMerge,
    assemble,
    read_settings,
    write_metadata_files,
    write_weights,
)
from deltaw.hub.checkpoint import read_checkpoint
from deltaw.hub.transformers_private import quiet
from deltaw.kernels.torch_modules import direct_parameters
from deltaw.lora.fingerprint import base_fingerprint, same_base
from deltaw.lora.replacements import find_spots
from deltaw.methods.parameters import parameters_by_name
from deltaw.progress import LogFunction, ignore_line
from deltaw.tensor_files import row_blocks

# Changes of a loaded model are not rounded to a narrower type. Weights tied to an unchanged weight are untied, and
# missing biases are added.


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


# Merge in memory, for files that do not store parameters individually. It needs as much memory as the model in
# the type of its files. transformers' save method reverses the conversion of its load method.


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


@dataclass(frozen=True)
class MergeResult:
    """Result of :func:`merge_run`.

    Attributes:
        output: Folder of the merged model.
        base: Reference of the base model.
        method: Training method of the adapter.
        precision: Requested precision.
        files: Names of the weight files.
        bytes: Total size of the tensors.
        tensors: Number of tensors.
        changed: Names of parameters that differ from the base model.
        untied: Names of weights that are no longer tied.
        dropped: Names of base tensors that the merged model does not contain.
        same_base: Whether the base model is the one used in training, or None if unknown.
        in_memory: Reason for loading the model, if it was loaded.
        seconds: Elapsed time without verification.
        notes: Notes for the user.
        errors: Error of a combination by parameter.
        error: Error of a combination over all parameters.
        verification: Result of the verifier, if any.
    """

    output: Path
    base: str
    method: str
    precision: str
    files: list[str]
    bytes: int
    tensors: int
    changed: list[str]
    untied: list[str]
    dropped: list[str]
    same_base: bool | None
    in_memory: str | None
    seconds: float
    notes: list[str]
    errors: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    verification: object = None


def merge_run(
    run: str | Path,
    output: str | Path,
    options: MergeOptions | None = None,
    *,
    verify: Callable[[MergePlan, Path], object] | None = None,
    keep: bool = False,
    log: LogFunction = ignore_line,
) -> MergeResult:
    """Merge the adapter of ``run`` into its base model and write the folder ``output``.

    Args:
        run: Folder of the adapter.
        output: Folder to create.
        options: Options of the merge.
        verify: Compares the merged and the unmerged model before the folder appears.
        keep: Create the folder even if ``verify`` fails. Its error is raised in any case.
        log: Receives messages for the user.

    Raises:
        UserError: if the adapter cannot be merged, or ``verify`` fails.
    """
    options = options or MergeOptions()
    target = Path(output)
    check_target(target, overwrite=options.overwrite)
    start_time = time.perf_counter()
    with prepare_merge(Path(run), options, log) as job:
        try:
            merged: MergedModel | None = assemble(job)
            reason_to_load = None
        except NeedsMemoryMerge as reason:
            merged = None
            reason_to_load = str(reason)
            log(f"{reason_to_load}: loading the entire model for this merge")
        planned = read_checkpoint(job.base.folder).tensors.values() if merged is None else merged.tensors
        required_bytes = sum(tensor.bytes for tensor in planned)
        verification_error: UserError | None = None
        with atomic_folder(target, overwrite=options.overwrite, needed=required_bytes, log=log) as folder:
            if merged is None:
                merged = write_from_memory(job, folder)
                files = sorted({output.file for output in merged.tensors})
            else:
                files = write_weights(merged, folder, options.shard_size)
            for note in merged.notes:
                log(note)
            write_metadata_files(merged, folder)
            errors, error = ({}, None) if job.combination is None else job.combination.errors()
            result = MergeResult(
                output=target,
                base=job.base.reference,
                method=job.adapters[0].method,
                precision=options.precision,
                files=files,
                bytes=sum(output.bytes for output in merged.tensors),
                tensors=len(merged.tensors),
                changed=sorted(merged.changed),
                untied=list(merged.untied),
                dropped=list(merged.dropped),
                same_base=merged.same_base,
                in_memory=reason_to_load,
                seconds=time.perf_counter() - start_time,
                notes=list(merged.notes),
                errors=errors,
                error=error,
            )
            if verify is not None:
                try:
                    result = replace(result, verification=verify(job, folder))
                except UserError as error:
                    if not keep:
                        raise
                    verification_error = error
        if verification_error is not None:
            raise verification_error
        return result
