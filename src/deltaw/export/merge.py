"""Merge of one or several adapters into their base model, written as a model folder.

Weights are streamed from the base model's files to the merged files in blocks of rows, so that only the adapter is in
memory. If transformers assembles weights from several tensors while loading (some mixtures of experts), the model is
loaded instead, and a message is logged. The folder appears atomically, after an optional verification.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from deltaw.errors import UserError
from deltaw.export.merge_in_memory import write_from_memory
from deltaw.export.merge_plan import MergeOptions, MergePlan, prepare_merge
from deltaw.export.merged import MergedModel, NeedsMemoryMerge, assemble
from deltaw.export.merged_folder import write_metadata_files, write_weights
from deltaw.export.output_folder import atomic_folder, check_target
from deltaw.hub.checkpoint import read_checkpoint
from deltaw.progress import LogFunction, ignore_line


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
        verification: object = None
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
            errors, total_error = ({}, None) if job.combination is None else job.combination.errors()
            seconds = time.perf_counter() - start_time
            try:
                verification = None if verify is None else verify(job, folder)
            except UserError as error:
                if not keep:
                    raise
                verification_error = error
        if verification_error is not None:
            raise verification_error
    return MergeResult(
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
        seconds=seconds,
        notes=list(merged.notes),
        errors=errors,
        error=total_error,
        verification=verification,
    )
