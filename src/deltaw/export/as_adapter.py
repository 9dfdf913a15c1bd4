"""Creation of one PEFT adapter from one or several: with a lower rank, or as their combination.

All layers get the same rank and a scaling of 1, because some readers support only one rank and one alpha. Factors of
lower rank are padded with zeros. The base model's weights are not read, only its classes, which define weight layouts.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from deltaw.errors import UserError
from deltaw.export.adapters import LowRankChange, ParameterChange, WeightFactors, factors_of, has_input_rows
from deltaw.export.combine import (
    CombinedChange,
    ReducedFactors,
    concatenate_factors,
    reduce_rank,
    require_rank,
    stack_factors,
    truncate_dense,
)
from deltaw.export.merge_plan import MergeOptions, MergePlan, prepare_merge
from deltaw.export.merged_folder import RUN_TOKENIZER_FILES
from deltaw.export.output_folder import atomic_folder, check_target
from deltaw.inference.prompting import copy_system
from deltaw.lora import LoRAConfig, load_adapter, read_adapter, save_adapter
from deltaw.lora.adapt import attach_selected
from deltaw.lora.attachment import require_attachment
from deltaw.lora.fingerprint import same_base
from deltaw.lora.kinds import refusal
from deltaw.lora.layers import LoRABias, LoRAConv, LoRALayer
from deltaw.lora.math import relative_errors
from deltaw.lora.select import Selection, Target
from deltaw.progress import LogFunction, ignore_line, track_progress
from deltaw.settings.config import SETTINGS
from deltaw.tensor_files import row_blocks


@dataclass(frozen=True)
class AdapterResult:
    """Result of :func:`write_adapter`.

    Attributes:
        output: Folder of the adapter.
        base: Reference of the base model.
        rank: Rank of all layers.
        bytes: Size of the weights file.
        parameters: Number of elements in the factors.
        errors: ‖written − ΔW‖_F / ‖ΔW‖_F by parameter, where ΔW is the weighted sum of the adapters' updates.
        error: The same error over all parameters together.
        seconds: Elapsed time.
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
    run: str | Path, output: str | Path, options: MergeOptions, *, rank: int | None, log: LogFunction = ignore_line
) -> AdapterResult:
    """Write one adapter that replaces one or several.

    Args:
        run: Folder of the first adapter.
        output: Folder to create.
        options: Options of the merge.
        rank: Rank of all layers. None retains the rank of the combination. ``ties`` and ``dare``, which produce
            full-rank updates, then use the largest rank of the adapters.
        log: Receives messages for the user.

    Raises:
        UserError: if an adapter contains other changes than low-rank updates, or if a single adapter has no lower rank.
    """
    start_time = time.perf_counter()
    target = Path(output)
    check_target(target, overwrite=options.overwrite)
    if rank is None and options.recipe is None:
        hint = "set a lower --rank, or add adapters with --with"
        raise UserError("a single adapter needs no conversion", location="--as-adapter", hint=hint)
    require_rank(rank)
    with (
        prepare_merge(Path(run), options, log) as job,
        atomic_folder(target, overwrite=options.overwrite, log=log) as folder,
        torch.no_grad(),
        track_progress("computing the factors"),
    ):
        if job.combination is None:
            assert rank is not None
            reduced = _reduce_in_place(job, folder, rank)
        else:
            reduced = _combine_adapters(job, folder, rank)
        # Copy the run's tokenizer, chat template and prompt settings, and for a single run its settings.
        copy_system(job.run, folder)
        for name in [*RUN_TOKENIZER_FILES, *([SETTINGS] if job.combination is None else [])]:
            if (job.run / name).is_file():
                shutil.copyfile(job.run / name, folder / name)
        size = (folder / "adapter_model.safetensors").stat().st_size
    num_parameters = sum(item.factors.factor_L.numel() + item.factors.factor_R.numel() for item in reduced.values())
    max_rank = max((item.factors.rank for item in reduced.values()), default=0)
    errors = relative_errors({name: (item.squared_error, item.squared_norm) for name, item in reduced.items()})
    seconds = time.perf_counter() - start_time
    return AdapterResult(target, job.base.reference, max_rank, size, num_parameters, *errors, seconds)


def _reduce_in_place(job: MergePlan, folder: Path, rank: int) -> dict[str, ReducedFactors]:
    """Reduce the rank of every layer of a single adapter. Other trained parameters are unchanged."""
    source = job.adapters[0].folder
    model = job.base.skeleton()
    if job.adapters[0].method != "lora":
        raise UserError(f"an adapter of method '{job.adapters[0].method}' has no rank", location=str(job.run))
    load_adapter(model, source)
    record = require_attachment(model)
    max_rank = max((layer.rank for _, layer in record.adapted()), default=0)
    if rank >= max_rank:
        message = f"--rank {rank} is not lower than the adapter's rank {max_rank}"
        raise UserError(message, location="--rank", hint=f"use a rank below {max_rank}")
    reduced_layers = {}
    for name, layer in record.adapted():
        reduced_layers[name] = reduce_rank(factors_of(layer), rank)
        if isinstance(layer, LoRABias):
            layer.lora_bias = nn.Parameter(layer.lora_bias * layer.scaling, requires_grad=False)
        _set_factors(layer, reduced_layers[name].factors, rank)
    record.config = replace(record.config, rank=rank, alpha=rank, rank_pattern={}, alpha_pattern={}, rslora=False)
    metadata = read_adapter(source).metadata
    kept = {key: value for key, value in metadata.items() if key.startswith("deltaw.")}
    save_adapter(model, folder, base_model=job.base.reference, task_type=metadata.get("task_type"), metadata=kept)
    return reduced_layers


def _combine_adapters(job: MergePlan, folder: Path, rank: int | None) -> dict[str, ReducedFactors]:
    combined = {item.names[0]: _combine_parameter(item, job, rank) for item in job.changes}
    max_rank = max((item.factors.rank for item in combined.values()), default=0)
    model = job.base.skeleton()
    modules: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules[id(module)] = (*modules.get(id(module), ()), name)
    selection = Selection()
    for item in job.changes:
        owner, _, attribute = item.names[0].rpartition(".")
        module = model.get_submodule(owner)
        names = (owner, *(name for name in modules[id(module)] if name != owner))
        if attribute == "weight" and refusal(module) is None:
            selection.targets.append(Target(names, module, max_rank, float(max_rank)))
        elif isinstance(module, nn.MultiheadAttention) or attribute == "weight":
            message = f"'{item.names[0]}' is used without calling its layer, so it cannot have an adapter"
            raise UserError(message, location=item.names[0], hint="merge the adapters into the model instead")
        else:
            selection.parameters.append(Target(names, module, max_rank, float(max_rank), attribute))
    layers = [target.names[0] for target in selection.targets]
    parameters = [f"{p.names[0]}.{p.attribute}" for p in selection.parameters]
    config = LoRAConfig(rank=max_rank, alpha=float(max_rank), target_modules=layers, target_parameters=parameters)
    attach_selected(model, config, selection, init_factors=False)
    record = require_attachment(model)
    by_weight = {f"{name}.weight": layer for name, layer in record.adapted() if layer.is_layer}
    by_weight |= {f"{u.names[0]}.{u.layer.attribute}": u.layer for u in record.parameters}
    for name, result in combined.items():
        _set_factors(by_weight[name], result.factors, max_rank)
    fingerprints = [adapter.fingerprint for adapter in job.adapters]
    shortest = min(fingerprints, key=lambda name: len(name or ""))  # the shortest is that of weights rounded to bf16
    record.fingerprint = shortest if all(same_base(shortest, name) for name in fingerprints) else None
    save_adapter(model, folder, base_model=job.base.reference)
    return combined


def _combine_parameter(parameter: ParameterChange, job: MergePlan, rank: int | None) -> ReducedFactors:
    """Return the factors of a parameter's combined update, with their squared error to the weighted sum."""
    recipe = job.options.recipe
    assert recipe is not None and job.combination is not None
    parts = parameter.change.parts if isinstance(parameter.change, CombinedChange) else [parameter.change]
    if any(part is not None and not isinstance(part, LowRankChange) for part in parts):
        message = f"the change of '{parameter.names[0]}' is not a low-rank update, so an adapter cannot contain it"
        raise UserError(message, location=parameter.names[0], hint="merge into a model's folder instead")
    if isinstance(parameter.change, LowRankChange):  # concat or svd
        squared_error, squared_norm = job.combination.known_errors[parameter.names[0]]
        if rank is None or rank >= parameter.change.factors.rank:
            return ReducedFactors(parameter.change.factors, squared_error, squared_norm)
        reduced = reduce_rank(parameter.change.factors, rank)
        return ReducedFactors(reduced.factors, squared_error + reduced.squared_error, squared_norm)
    assert isinstance(parameter.change, CombinedChange)
    pairs = zip(recipe.weights, parts, strict=True)
    weighted = [part.factors.scaled(weight) for weight, part in pairs if isinstance(part, LowRankChange)]
    concatenated = concatenate_factors(weighted)
    if recipe.method == "linear":
        if rank is None or rank >= concatenated.rank:
            return ReducedFactors(concatenated, 0.0, reduce_rank(concatenated, concatenated.rank).squared_norm)
        return reduce_rank(concatenated, rank)
    return _truncate_combined(parameter, concatenated, rank or max(factors.rank for factors in weighted))


def _truncate_combined(parameter: ParameterChange, concatenated: WeightFactors, rank: int) -> ReducedFactors:
    """Truncate the update of TIES or DARE, which has full rank, by its SVD."""
    change = parameter.change
    assert isinstance(change, CombinedChange)
    change.squared_error = change.squared_norm = 0.0
    parts = [(0, parameter.shape[0])] if change.needs_all_rows else row_blocks(parameter.shape)
    delta = torch.cat([change.delta(torch.zeros(stop - start, *parameter.shape[1:]), start) for start, stop in parts])
    matrices = list(delta) if concatenated.factor_L.dim() == 3 else [delta.flatten(1)]
    factors = stack_factors([truncate_dense(matrix, rank) for matrix in matrices], concatenated)
    exact = concatenated.rows(0, parameter.shape[0])
    squared_error = float((factors.rows(0, parameter.shape[0]) - exact).double().square().sum())
    return ReducedFactors(factors, squared_error, float(exact.double().square().sum()))


def _set_factors(layer: LoRALayer, factors: WeightFactors, rank: int) -> None:
    """Set a layer's factors, with a scaling of 1 and zero padding to ``rank``."""
    missing = rank - factors.rank
    factor_L = nn.functional.pad(factors.factor_L, (0, missing))
    factor_R = nn.functional.pad(factors.factor_R, (0, 0, 0, missing))
    if isinstance(layer, LoRAConv):
        kernel = layer.lora_A.shape[2:]
        factor_A = factor_R.view(rank, -1, *kernel)
        factor_B = factor_L.view(-1, rank, *(1 for _ in kernel))
    elif has_input_rows(layer):
        factor_A = factor_L
        factor_B = factor_R
    else:
        factor_A = factor_R.transpose(-1, -2)
        factor_B = factor_L.transpose(-1, -2)
    layer.lora_A = nn.Parameter(factor_A.contiguous(), requires_grad=False)
    layer.lora_B = nn.Parameter(factor_B.contiguous(), requires_grad=False)
    vars(layer).update(rank=rank, alpha=float(rank), scaling=1.0, rslora=False)
