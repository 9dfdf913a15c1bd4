"""A run becomes a model's folder: base and adapter, or several adapters, merged.

The weights go from the base's files to the merged ones a block of rows at a time; the adapter is all that is
in memory whole. Only where the base's files do not hold its weights one by one (experts that transformers
puts together while it loads) the model is loaded, and that is said. The folder appears whole or not at all,
and not before it was verified, where that is asked for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.errors import UserError
from deltaw.export.adapters import AdapterChanges, Change, Trained, changes_of
from deltaw.export.base import Base, Say, base_of
from deltaw.export.combine import Combination, Recipe, combine
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
from deltaw.export.plain_adapter import plain_adapter
from deltaw.hub.checkpoint import read_checkpoint
from deltaw.hub.loading import load
from deltaw.hub.quiet import quiet
from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.fingerprint import base_fingerprint, same_base
from deltaw.lora.places import spots_of
from deltaw.methods.parameters import names_of
from deltaw.tensor_files import row_blocks
from deltaw.working import working

# ---- Changes of weights put into a model that is in memory, without rounding to a narrower type.
#
# Weights that are tied to one that the changes leave alone are untied, and biases are added where a model has
# none. Knows changes and modules; not adapters.


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
            raise UserError(
                f"the model has no '{one.names[0]}'",
                where=one.names[0],
                hint="use the base model that the adapter was trained on",
            ) from error
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


# ---- The slow way of a merge: the base model is loaded, changed in memory, and saved by transformers.
#
# For models whose files do not hold their weights one by one. Takes as much memory as the model in the type of
# its files, and writes what transformers writes: its save undoes what its load put together.


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


# ---- merge


class Verifier(Protocol):
    """Compares a merged model with the unmerged one, before its folder appears."""

    def __call__(self, job: Merging, folder: Path) -> object:
        """What was found.

        Raises:
            UserError: the merged model is not what the adapter makes of its base.
        """


@dataclass(frozen=True)
class MergeOptions:
    """How a merge is done.

    Attributes:
        model: the base model, where it is not the one that the adapter names.
        trust_remote_code: run the Python files that came with it.
        precision: ``keep``, ``bf16``, ``fp16`` or ``fp32``.
        shard_size: most bytes of a file; None as the base's.
        overwrite: replace an output folder that holds files.
        other_base: merge also into another base model than the adapter was trained on.
        others: further adapters' folders.
        recipe: how several are combined; None for a single one of weight 1.
    """

    model: str | None = None
    trust_remote_code: bool = False
    precision: str = "keep"
    shard_size: int | None = None
    overwrite: bool = False
    other_base: bool = False
    others: tuple[Path, ...] = ()
    recipe: Recipe | None = None


@dataclass(frozen=True)
class Merging:
    """A merge that is prepared: the base, the adapters, and what becomes of each parameter."""

    run: Path
    base: Base
    adapters: tuple[AdapterChanges, ...]
    trained: tuple[Trained, ...]
    options: MergeOptions
    combination: Combination | None = None


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
    verify: Verifier | None = None,
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
    with contextlib.ExitStack() as stack:
        began = time.perf_counter()
        job = stack.enter_context(prepared(Path(run), options, say))
        try:
            merged: MergedModel | None = assemble(
                job.base, job.adapters, job.trained, precision=options.precision, other_base=options.other_base
            )
            why = None
        except NotByName as reason:
            merged, why = None, str(reason)
            say(f"{why}: the whole model is loaded for this merge")
        needed = (
            sum(tensor.bytes for tensor in read_checkpoint(job.base.folder).tensors.values())
            if merged is None
            else sum(output.bytes for output in merged.tensors)
        )
        refused: UserError | None = None
        with appearing(target, overwrite=options.overwrite, needed=needed, say=say) as folder:
            if merged is None:
                made = write_from_memory(job.base, job.adapters, job.trained, folder, options, say)
                merged, files = made.model, made.files
            else:
                files = write_weights(merged, folder, options.shard_size)
            for note in merged.notes:
                say(note)
            write_beside(merged, job.run, folder, facts_of(job, options))
            result = _result(job, merged, target, files, time.perf_counter() - began, why)
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


@contextlib.contextmanager
def prepared(run: Path, options: MergeOptions, say: Say) -> Iterator[Merging]:
    """Read base and adapters, and settle what becomes of each parameter.

    Raises:
        UserError: something cannot be merged.
    """
    dtype = "fp32" if options.precision in ("fp32", "fp16") else "bf16"
    with contextlib.ExitStack() as stack, working("reading the adapter"):
        base = base_of(run, options.model, dtype, say, trust_remote_code=options.trust_remote_code)
        folders = [run, *options.others]
        adapters = []
        for folder in folders:
            plain = stack.enter_context(plain_adapter(folder, base, say))
            adapters.append(changes_of(plain, base.skeleton()))
        trained: Sequence[Trained] = adapters[0].trained
        combination = None
        if options.recipe is not None:
            combination = combine(adapters, options.recipe)
            trained = combination.trained
        elif len(adapters) > 1:
            raise ValueError("several adapters need a recipe")
        yield Merging(run, base, tuple(adapters), tuple(trained), options, combination)


def facts_of(job: Merging, options: MergeOptions) -> dict[str, str]:
    """What a merged model's card says."""
    facts = {"adapter": str(job.run), "method": job.adapters[0].method, "precision": options.precision}
    recipe = options.recipe
    if recipe is not None:
        folders = [job.run, *options.others]
        parts = [f"{weight:g} × {folder}" for weight, folder in zip(recipe.weights, folders, strict=True)]
        facts["combined"] = f"{recipe.method}: {' + '.join(parts)}"
    return facts


def _result(
    job: Merging, merged: MergedModel, target: Path, files: list[str], seconds: float, why: str | None
) -> MergeResult:
    combination = job.combination
    return MergeResult(
        output=target,
        base=job.base.reference,
        method=job.adapters[0].method,
        precision=job.options.precision,
        files=files,
        bytes=sum(output.bytes for output in merged.tensors),
        tensors=len(merged.tensors),
        changed=sorted(merged.changed),
        untied=list(merged.untied),
        dropped=list(merged.dropped),
        same_base=merged.same_base,
        in_memory=why,
        seconds=seconds,
        notes=list(merged.notes),
        errors={} if combination is None else combination.errors(),
        error=None if combination is None else combination.total_error(),
    )
