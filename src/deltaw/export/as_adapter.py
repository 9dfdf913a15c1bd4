"""One adapter made of one or several: of a lower rank, or their combination, in PEFT's format.

All layers get one rank and a scaling of 1, so that readers that know one rank and one alpha take it;
factors of a lower rank are filled up with zeros. The base model's weights are not read; its classes say how
a weight lies in memory.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from deltaw.errors import UserError
from deltaw.export.adapters import Factors, LowRank, Trained, factors_of, rows_are_inputs
from deltaw.export.base import MergeOptions, Merging, Say, prepared
from deltaw.export.combine import (
    Combined,
    Reduced,
    ratio,
    reduced,
    require_rank,
    side_by_side,
    stacked,
    truncated_dense,
)
from deltaw.export.merged import OF_TOKENIZER
from deltaw.export.output_folder import appearing, check_target
from deltaw.lora import LoRAConfig, load_adapter, read_adapter, save_adapter
from deltaw.lora.adapt import attach_selected
from deltaw.lora.attachment import attached
from deltaw.lora.fingerprint import same_base
from deltaw.lora.kinds import refusal
from deltaw.lora.layers import LoRABias, LoRAConv, LoRALayer
from deltaw.lora.select import Selection, Target
from deltaw.settings import SETTINGS
from deltaw.tensor_files import row_blocks
from deltaw.training.prompting import copy_system
from deltaw.working import working


@dataclass(frozen=True)
class AdapterResult:
    """What :func:`write_adapter` did.

    Attributes:
        output: the folder. base: what names the base model. rank: of all layers.
        bytes: of the weights file. parameters: numbers in the factors.
        errors: by parameter, ‖written − ΔW‖_F / ‖ΔW‖_F, where ΔW is the (weighted sum of the) adapters'.
        error: the same over all parameters together.
        seconds: of all of it.
    """

    output: Path
    base: str
    rank: int
    bytes: int
    parameters: int
    errors: dict[str, float]
    error: float
    seconds: float


def write_adapter(
    run: str | Path, output: str | Path, options: MergeOptions, *, rank: int | None, say: Say = lambda line: None
) -> AdapterResult:
    """Write one adapter in place of one or several.

    Args:
        rank: of all layers; None keeps what the combination gives (``ties`` and ``dare`` have no low rank of
            their own and take the largest of the adapters').

    Raises:
        UserError: an adapter holds more than low-rank updates, or there is nothing to do.
    """
    began = time.perf_counter()
    target = Path(output)
    check_target(target, overwrite=options.overwrite)
    if rank is None and options.recipe is None:
        hint = "give a lower --rank, or more adapters --with"
        raise UserError("one adapter alone is an adapter already", where="--as-adapter", hint=hint)
    require_rank(rank)
    with (
        prepared(Path(run), options, say) as job,
        appearing(target, overwrite=options.overwrite, say=say) as folder,
        torch.no_grad(),
        working("computing the factors"),
    ):
        if job.combination is None:
            assert rank is not None
            made = _reduce_in_place(job, folder, rank)
        else:
            made = _combined(job, folder, rank)
        _copy_beside(job, folder)
        stored = (folder / "adapter_model.safetensors").stat().st_size
    lost, total = sum(one.lost for one in made.values()), sum(one.total for one in made.values())
    numbers = sum(one.factors.left.numel() + one.factors.right.numel() for one in made.values())
    largest = max((one.factors.rank for one in made.values()), default=0)
    errors = {name: ratio(one.lost, one.total) for name, one in made.items()}
    seconds = time.perf_counter() - began
    return AdapterResult(target, job.base.reference, largest, stored, numbers, errors, ratio(lost, total), seconds)


def _reduce_in_place(job: Merging, folder: Path, rank: int) -> dict[str, Reduced]:
    """Give every layer of the one adapter a lower rank; what else it trained stays."""
    source = job.adapters[0].folder
    model = job.base.skeleton()
    if job.adapters[0].method != "lora":
        raise UserError(f"an adapter of method '{job.adapters[0].method}' has no rank", where=str(job.run))
    load_adapter(model, source)
    record = attached(model)
    largest = max((layer.rank for _, layer in record.adapted()), default=0)
    if rank >= largest:
        what = f"the adapter's rank is {largest}, and --rank {rank} is not lower"
        raise UserError(what, where="--rank", hint=f"give less than {largest}")
    made = {}
    for name, layer in record.adapted():
        made[name] = reduced(factors_of(layer), rank)
        if isinstance(layer, LoRABias):
            layer.lora_bias = nn.Parameter(layer.lora_bias * layer.scaling, requires_grad=False)
        _fill(layer, made[name].factors, rank)
    record.config = dataclasses.replace(
        record.config, rank=rank, alpha=rank, rank_pattern={}, alpha_pattern={}, rslora=False
    )
    _save(model, job, folder, source)
    return made


def _combined(job: Merging, folder: Path, rank: int | None) -> dict[str, Reduced]:
    made = {one.names[0]: _factors(one, job, rank) for one in job.trained}
    most = max((one.factors.rank for one in made.values()), default=0)
    model = job.base.skeleton()
    modules: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules[id(module)] = (*modules.get(id(module), ()), name)
    selection = Selection()
    for one in job.trained:
        owner, _, attribute = one.names[0].rpartition(".")
        module = model.get_submodule(owner)
        names = (owner, *(name for name in modules[id(module)] if name != owner))
        if attribute == "weight" and refusal(module) is None:
            selection.targets.append(Target(names, module, most, float(most)))
        elif isinstance(module, nn.MultiheadAttention) or attribute == "weight":
            what = f"'{one.names[0]}' is read without its layer being called, and has no adapter of its own"
            raise UserError(what, where=one.names[0], hint="merge the adapters into the model instead")
        else:
            selection.parameters.append(Target(names, module, most, float(most), attribute))
    layers = [target.names[0] for target in selection.targets]
    parameters = [f"{p.names[0]}.{p.attribute}" for p in selection.parameters]
    config = LoRAConfig(rank=most, alpha=float(most), target_modules=layers, target_parameters=parameters)
    attach_selected(model, config, selection, filled=False)
    record = attached(model)
    by_weight = {f"{name}.weight": layer for name, layer in record.adapted() if layer.is_layer}
    by_weight |= {f"{u.names[0]}.{u.layer.attribute}": u.layer for u in record.parameters}
    for name, found in made.items():
        _fill(by_weight[name], found.factors, most)
    known = [adapter.fingerprint for adapter in job.adapters]
    least = min(known, key=lambda name: len(name or ""))  # of weights that were rounded to bf16, if any were
    record.fingerprint = least if all(same_base(least, name) for name in known) else None
    _save(model, job, folder, None)
    return made


def _factors(one: Trained, job: Merging, rank: int | None) -> Reduced:
    """The factors of one parameter's combined update, and their squared error to the weighted sum."""
    recipe = job.options.recipe
    assert recipe is not None and job.combination is not None
    parts = one.change.parts if isinstance(one.change, Combined) else [one.change]
    if any(part is not None and not isinstance(part, LowRank) for part in parts):
        what = f"'{one.names[0]}' is not changed by a low-rank update alone, so it fits into no adapter"
        raise UserError(what, where=one.names[0], hint="merge into a model's folder instead")
    if isinstance(one.change, LowRank):  # concat or svd
        lost, total = job.combination.known[one.names[0]]
        if rank is None or rank >= one.change.factors.rank:
            return Reduced(one.change.factors, lost, total)
        made = reduced(one.change.factors, rank)
        return Reduced(made.factors, lost + made.lost, total)
    assert isinstance(one.change, Combined)
    pairs = zip(recipe.weights, parts, strict=True)
    weighted = [part.factors.scaled(weight) for weight, part in pairs if isinstance(part, LowRank)]
    joined = side_by_side(weighted)
    if recipe.method == "linear":
        if rank is None or rank >= joined.rank:
            return Reduced(joined, 0.0, reduced(joined, joined.rank).total)
        return reduced(joined, rank)
    return _of_dense(one, joined, rank or max(factors.rank for factors in weighted))


def _of_dense(one: Trained, joined: Factors, rank: int) -> Reduced:
    """Of TIES and DARE, whose update has no low rank: formed whole, and cut by its SVD."""
    change = one.change
    assert isinstance(change, Combined)
    change.lost = change.total = 0.0
    parts = [(0, one.shape[0])] if change.whole else row_blocks(one.shape)
    delta = torch.cat([change.delta(torch.zeros(stop - start, *one.shape[1:]), start) for start, stop in parts])
    matrices = list(delta) if joined.left.dim() == 3 else [delta.flatten(1)]
    factors = stacked([truncated_dense(matrix, rank) for matrix in matrices], joined)
    exact = joined.rows(0, one.shape[0])
    lost = float((factors.rows(0, one.shape[0]) - exact).double().square().sum())
    return Reduced(factors, lost, float(exact.double().square().sum()))


def _fill(layer: LoRALayer, factors: Factors, rank: int) -> None:
    """Give a layer these factors, at a scaling of 1 and filled up to ``rank`` with zeros."""
    missing = rank - factors.rank
    left = nn.functional.pad(factors.left, (0, missing))
    right = nn.functional.pad(factors.right, (0, 0, 0, missing))
    if isinstance(layer, LoRAConv):
        kernel = layer.lora_A.shape[2:]
        factor_A, factor_B = right.view(rank, -1, *kernel), left.view(-1, rank, *(1 for _ in kernel))
    elif rows_are_inputs(layer):
        factor_A, factor_B = left, right
    else:
        factor_A, factor_B = right.transpose(-1, -2), left.transpose(-1, -2)
    layer.lora_A = nn.Parameter(factor_A.contiguous(), requires_grad=False)
    layer.lora_B = nn.Parameter(factor_B.contiguous(), requires_grad=False)
    vars(layer).update(rank=rank, alpha=float(rank), scaling=1.0, rslora=False)


def _save(model: nn.Module, job: Merging, folder: Path, source: Path | None) -> None:
    metadata: Mapping[str, str] = {}
    task: str | None = "auto"
    if source is not None:
        found = read_adapter(source).metadata
        metadata = {key: value for key, value in found.items() if key.startswith("deltaw.")}
        task = found.get("task_type")
    save_adapter(model, folder, base_model=job.base.reference, task_type=task, metadata=metadata)


def _copy_beside(job: Merging, folder: Path) -> None:
    """The run's tokenizer and chat template, how its rows are prompted, and its settings where it is one run."""
    copy_system(job.run, folder)
    for name in [*OF_TOKENIZER, *([SETTINGS] if job.combination is None else [])]:
        if (job.run / name).is_file():
            shutil.copyfile(job.run / name, folder / name)
