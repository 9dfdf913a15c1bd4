"""A run becomes a model's folder: base and adapter, or several adapters, merged.

The weights go from the base's files to the merged ones a block of rows at a time; the adapter is all that is
in memory whole. Only where the base's files do not hold its weights one by one (experts that transformers
puts together while it loads) the model is loaded, and that is said. The folder appears whole or not at all,
and not before it was verified, where that is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.export.adapters import Change, Trained
from deltaw.export.base import MergeOptions, Merging, Say, prepared
from deltaw.export.merged import (
    PRECISIONS,
    MergedModel,
    NotByName,
    Output,
    assemble,
    read_settings,
    write_beside,
    write_weights,
)
from deltaw.export.output_folder import appearing, check_target
from deltaw.hub.checkpoint import read_checkpoint
from deltaw.hub.quiet import quiet
from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.fingerprint import base_fingerprint, same_base
from deltaw.lora.places import spots_of
from deltaw.methods.parameters import names_of
from deltaw.tensor_files import row_blocks

# Into a model that is in memory, changes are put without rounding to a narrower type. Weights that are tied to one that
# the changes leave alone are untied, and biases are added where a model has none. Knows changes and modules; not
# adapters.


@torch.no_grad()
def apply_changes(model: nn.Module, trained: Sequence[Trained]) -> None:
    """Change the parameters of ``model`` in place.

    Raises:
        UserError: it has no place for one.
    """
    for one in trained:
        own = names_of(model)
        inside = [name for name in one.names if name in own]
        try:
            spots = spots_of(model, one.names)
        except AttributeError as error:
            hint = "use the base model that the adapter was trained on"
            raise UserError(f"the model has no '{one.names[0]}'", where=one.names[0], hint=hint) from error
        if inside:
            parameter = own[inside[0]]
            if any(p is parameter and name not in one.names for name, p in own.items()):
                parameter = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        else:
            weight = own_parameters(spots[0][0])["weight"]
            assert weight is not None
            parameter = nn.Parameter(weight.new_zeros(one.shape), requires_grad=False)
        for module, attribute in spots:
            setattr(module, attribute, parameter)
        change_in_place(parameter, one.change)


@torch.no_grad()
def change_in_place(parameter: Tensor, change: Change, *, rounded: torch.dtype | None = None) -> None:
    """Apply a change to a parameter, in fp32 (fp64 for fp64), and round to its type.

    Args:
        rounded: a narrower type that the values are rounded to first; None for the parameter's own.
    """
    data = parameter.data if parameter.dim() else parameter.data.view(1)
    wide = torch.float64 if data.dtype == torch.float64 else torch.float32

    def blocks(whole: bool = False) -> Iterator[tuple[int, Tensor]]:
        for start, stop in [(0, len(data))] if whole else row_blocks(data.shape):
            yield start, data[start:stop].to(wide, copy=True)

    change.prepare(blocks)
    for start, rows in blocks(change.whole):
        made = change.apply(rows, start)
        data[start : start + len(rows)] = made if rounded is None else made.to(rounded)


# The slow way, by which the base model is loaded, changed in memory and saved by transformers, is for models whose
# files do not hold their weights one by one. Takes as much memory as the model in the type of its files, and writes
# what transformers writes: its save undoes what its load put together.


_SHARD = "5GB"
_FP32 = {"float32", "float64", "float16"}


def write_from_memory(job: Merging, folder: Path) -> MergedModel:
    """Merge in memory and save into ``folder``; returns a description of what is there.

    Raises:
        UserError: the base is another one, or the adapter needs tensors that the model has no place for.
    """
    settings = read_settings(job.base.folder)
    stored = str(settings.get("dtype") or settings.get("torch_dtype") or "float32")
    model = job.base.load("fp32" if stored in _FP32 else "bf16").model
    own = names_of(model)
    found = [base_fingerprint(model, [own[name] for name in one.replaced if name in own]) for one in job.adapters]
    same = job.same_base(same_base(name, one.fingerprint) for name, one in zip(found, job.adapters, strict=True))
    for one in job.trained:
        absent = [name for name in one.names if name not in own]
        tied = {n for n, p in own.items() for name in one.names if name in own and p is own[name]}
        if absent or tied - set(one.names):
            what = f"'{one.names[0]}' is tied to an unchanged weight, or has no place in a {type(model).__name__}"
            raise UserError(what, where=one.names[0], hint="keep the adapter separate")
    named = getattr(torch, stored, None)
    own_type = named if isinstance(named, torch.dtype) and named.is_floating_point else torch.float32
    target = PRECISIONS.get(job.options.precision, own_type)
    # Where the target is narrower than the model in memory, each sum is rounded once, from fp32.
    for one in job.trained:
        change_in_place(own[one.names[0]], one.change, rounded=target)
    with quiet():
        nn.Module.to(model, target)
        model.save_pretrained(folder, max_shard_size=job.options.shard_size or _SHARD)
    written = read_checkpoint(folder).tensors.values()
    outputs = tuple(Output(t.name, t.dtype, t.shape, t, (), t.file.name) for t in written)
    changed = {name: one.change for one in job.trained for name in one.names}
    return MergedModel(job, outputs, read_settings(folder), changed, same_base=same)


@dataclass(frozen=True)
class MergeResult:
    """What :func:`merge_run` did.

    Attributes:
        output: the folder. base: what names its base model. method: of the adapter.
        files: of the weights. bytes: of the tensors. tensors: how many there are. changed: parameters that
            differ from the base's.
        untied: weights that are tied no more. dropped: tensors of the base's that are not there any more.
        same_base: whether it is the base that the adapter was trained on; None where that is not known.
        in_memory: why the model had to be loaded; None where it was not.
        errors: of a combination, by parameter; error: over all.
        verification: what the verifier found; None where there was none.
        seconds: without verification.
        notes: what a person should know.
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
    verify: Callable[[Merging, Path], object] | None = None,
    keep: bool = False,
    say: Say = lambda line: None,
) -> MergeResult:
    """Merge the adapter of ``run`` into its base model, as the folder ``output``.

    Args:
        verify: compares the merged model with the unmerged one before the folder appears.
        keep: let the folder appear also where that refuses it; the refusal is raised all the same.
        say: told what a person should know, a line each.

    Raises:
        UserError: it cannot be merged, or was refused by ``verify``.
    """
    options = options or MergeOptions()
    target = Path(output)
    check_target(target, overwrite=options.overwrite)
    began = time.perf_counter()
    with prepared(Path(run), options, say) as job:
        try:
            merged: MergedModel | None = assemble(job)
            why = None
        except NotByName as reason:
            merged, why = None, str(reason)
            say(f"{why}: the whole model is loaded for this merge")
        written = read_checkpoint(job.base.folder).tensors.values() if merged is None else merged.tensors
        needed = sum(tensor.bytes for tensor in written)
        refused: UserError | None = None
        with appearing(target, overwrite=options.overwrite, needed=needed, say=say) as folder:
            if merged is None:
                merged = write_from_memory(job, folder)
                files = sorted({output.file for output in merged.tensors})
            else:
                files = write_weights(merged, folder, options.shard_size)
            for note in merged.notes:
                say(note)
            write_beside(merged, folder)
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
                in_memory=why,
                seconds=time.perf_counter() - began,
                notes=list(merged.notes),
                errors={} if job.combination is None else job.combination.errors(),
                error=None if job.combination is None else job.combination.total_error(),
            )
            if verify is not None:
                try:
                    result = replace(result, verification=verify(job, folder))
                except UserError as error:
                    if not keep:
                        raise
                    refused = error
        if refused is not None:
            raise refused
        return result
