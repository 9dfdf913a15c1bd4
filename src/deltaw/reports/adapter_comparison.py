"""Comparison of two adapters.

Modules are matched by name, so adapters of different base models of one architecture can be compared too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from deltaw.errors import first_names
from deltaw.experiments.comparison import without_nan
from deltaw.export.as_adapter import AdapterResult
from deltaw.export.combine import inner_product, norm, principal_angles
from deltaw.export.merge import MergeResult
from deltaw.lora import read_adapter
from deltaw.lora.fingerprint import FINGERPRINT_KEY, same_base
from deltaw.lora.peft_updates import FileUpdate, read_content
from deltaw.reports.inspect import PLAIN, factor_pairs, natural_key, root_sum_of_squares
from deltaw.reports.tables import table

# Comparison of two adapters. Modules are matched by name, so adapters of different base models of one architecture can
# be compared too.
_MAX_LAYERS = 40


@dataclass(frozen=True)
class LayerComparison:
    """ΔW of one module in both adapters.

    Attributes:
        module: Name of the module.
        ranks: Ranks in the first and the second adapter.
        norms: ‖ΔW‖_F in the first and the second adapter.
        cosine: ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖), from −1 to 1, or None if one of them is zero.
        output_overlap: Mean cos² of the principal angles between the column spaces of both ΔW: 1 if one contains the
            other, about r/n for random subspaces of n dimensions.
        input_overlap: The same for the row spaces.
        angle: Smallest principal angle between the column spaces in degrees.
    """

    module: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    cosine: float | None
    output_overlap: float | None
    input_overlap: float | None
    angle: float | None


@dataclass(frozen=True)
class AdapterComparison:
    """Result of :func:`compare_adapters`.

    Attributes:
        folders: Folders of both adapters.
        base_models: Base models by their metadata.
        same_base: True if both were trained on the same weights, or None if a file has no fingerprint.
        settings: Settings that differ, by name.
        layers: Modules that both adapt.
        only: Modules and other tensors that only one of them has.
        norms: ‖ΔW‖_F over all modules of each adapter.
        cosine: Cosine over all modules, including those that only one has, or None if one adapter is zero.
        notes: Remarks for the user.
    """

    folders: tuple[str, str]
    base_models: tuple[str | None, str | None]
    same_base: bool | None
    settings: dict[str, tuple[object, object]]
    layers: list[LayerComparison]
    only: tuple[list[str], list[str]]
    norms: tuple[float, float]
    cosine: float | None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON. Non-finite numbers become None."""
        return {key: without_nan(value) for key, value in asdict(self).items()}

    def render(self) -> RenderableType:
        """Return the comparison for a terminal."""
        parts: list[RenderableType] = [self._head()]
        if self.settings:
            rows = [(name, *map(str, values)) for name, values in self.settings.items()]
            parts += [Text(), table(("settings that differ", "A", "B"), rows, num_left=3, fold=True, **PLAIN)]
        if self.layers:
            parts += [Text(), self._layers()]
        for letter, names in zip("AB", self.only, strict=True):
            if names:
                parts.append(Text(f"only {letter} has {len(names)}: {first_names(names)}"))
        parts += [Text(f"note: {note}") for note in self.notes]
        return Group(*parts)

    def _head(self) -> Table:
        head = Table.grid(padding=(0, 2))
        for letter, folder, base, size in zip("AB", self.folders, self.base_models, self.norms, strict=True):
            head.add_row(letter, folder, f"base {base or 'not named'}", f"‖ΔW‖ {size:.4g}")
        head.add_row("base", {True: "the same", False: "different", None: "unknown from the files"}[self.same_base])
        head.add_row("cosine", _format_cosine(self.cosine), "over all modules")
        return head

    def _layers(self) -> Table:
        shared = _shared_prefix([layer.module for layer in self.layers])
        heads = ("rank A", "rank B", "‖ΔW‖ A", "‖ΔW‖ B", "cosine", "outputs", "inputs")
        rows = [
            (
                layer.module[len(shared) + 1 if shared else 0 :],
                *(str(rank) for rank in layer.ranks),
                *(f"{size:#.3g}" for size in layer.norms),
                *(_format_cosine(value) for value in (layer.cosine, layer.output_overlap, layer.input_overlap)),
            )
            for layer in self.layers[:_MAX_LAYERS]
        ]
        num_hidden = len(self.layers) - _MAX_LAYERS
        caption = f"and {num_hidden} more; --json has all" if num_hidden > 0 else None
        first = f"module, in {shared}" if shared else "module"
        return table((first, *heads), rows, fold=True, caption=caption, caption_justify="left", **PLAIN)


def _shared_prefix(names: Sequence[str]) -> str:
    """Return the module path that all names have in common, or ''."""
    first, last = (name.split(".")[:-1] for name in (min(names), max(names)))
    length = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), None)
    return ".".join(first[: min(len(first), len(last)) if length is None else length])


def compare_adapters(first: str | Path, second: str | Path) -> AdapterComparison:
    """Compare the LoRA adapters in two folders.

    Raises:
        UserError: If a folder contains no adapter, or a damaged one.
    """
    adapters = [read_adapter(folder) for folder in (first, second)]
    contents = [read_content(adapter) for adapter in adapters]
    updates = [{update.name: update for update in content.updates} for content in contents]
    layers = []
    products = []
    notes = []
    for name in sorted(updates[0].keys() & updates[1].keys(), key=natural_key):
        pairs = [_matrices(module_updates[name]) for module_updates in updates]
        sizes = [[(factor_l.shape[0], factor_r.shape[1]) for factor_l, factor_r in matrices] for matrices in pairs]
        if sizes[0] != sizes[1]:
            notes.append(f"'{name}' has a different size in B and is not compared")
            continue
        layer, product = _compare(name, (updates[0][name].rank, updates[1][name].rank), *pairs)
        layers.append(layer)
        products.append(product)
    compared = {layer.module for layer in layers}
    only = tuple(
        sorted([*(set(group) - compared), *(set(one.other_tensors) - set(other.other_tensors))], key=natural_key)
        for group, one, other in zip(updates, contents, contents[::-1], strict=True)
    )
    norms = [root_sum_of_squares(norm(*pair) for u in m.values() for pair in _matrices(u)) for m in updates]
    if uncertain := {update.name for group in updates for update in group.values() if not update.certain}:
        notes.append(f"rank and alpha of {first_names(sorted(uncertain))} cannot be determined from the files")
    configs = [dataclasses.asdict(adapter.config) for adapter in adapters]
    metadata = [adapter.metadata for adapter in adapters]
    bases = [values.get("base_model_name_or_path") or None for values in metadata]
    is_same = same_base(*(values.get(FINGERPRINT_KEY) for values in metadata))
    settings = {name: (value, configs[1][name]) for name, value in configs[0].items() if value != configs[1][name]}
    folders = (str(first), str(second))
    measured = ((norms[0], norms[1]), _cosine(sum(products), *norms))
    only_one = (only[0], only[1])
    return AdapterComparison(folders, (bases[0], bases[1]), is_same, settings, layers, only_one, *measured, notes)


# (L, R) with ΔW = L·R, for each expert and group.
Matrices: TypeAlias = Sequence[tuple[Tensor, Tensor]]


def _compare(name: str, ranks: tuple[int, int], first: Matrices, second: Matrices) -> tuple[LayerComparison, float]:
    """Compare a module and return ⟨ΔW₁, ΔW₂⟩. Products are summed over experts and overlaps are averaged."""
    norms = (root_sum_of_squares(norm(*pair) for pair in first), root_sum_of_squares(norm(*pair) for pair in second))
    product = sum(inner_product(a, b) for a, b in zip(first, second, strict=True))
    outputs = []
    inputs = []
    for (first_l, first_r), (second_l, second_r) in zip(first, second, strict=True):
        outputs.append(principal_angles(_column_space(first_l, first_r), _column_space(second_l, second_r)))
        inputs.append(principal_angles(_column_space(first_r.T, first_l.T), _column_space(second_r.T, second_l.T)))
    cosines = [float(angle_cosines[0]) for angle_cosines in outputs if angle_cosines.numel()]
    angle = math.degrees(math.acos(max(cosines))) if cosines else None
    overlaps = _overlap(outputs), _overlap(inputs)
    return LayerComparison(name, ranks, norms, _cosine(product, *norms), *overlaps, angle), product


def _matrices(update: FileUpdate) -> Matrices:
    """Return (L, R) with ΔW = L·R (outputs, inputs) for each expert. A kernel's inputs are flattened."""
    factor = update.scaling * update.times
    return [(b * factor, a) for pair in update.pairs() for a, b in factor_pairs(*pair)]


def _column_space(factor_l: Tensor, factor_r: Tensor) -> Tensor:
    """Return a matrix with the column space of L·R: the columns of L, weighted as in ΔW."""
    return factor_l @ torch.linalg.qr(factor_r.T, mode="r").R.T


def _overlap(cosines: Sequence[Tensor]) -> float | None:
    means = [float(cosine.square().mean()) for cosine in cosines if cosine.numel()]
    return sum(means) / len(means) if means else None


def _cosine(product: float, first: float, second: float) -> float | None:
    return None if not (first > 0 and second > 0) else max(-1.0, min(1.0, product / (first * second)))


def _format_cosine(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


_MAX_ERRORS = 5


def merge_lines(result: MergeResult) -> list[str]:
    """Return the lines about a merged model."""
    lines = []
    if result.error is not None:
        lines += _error_lines(result.errors, result.error)
    if result.dropped:
        example = f"such as '{result.dropped[0]}'"
        lines.append(f"dropped {len(result.dropped)} tensors of the base that this model does not use, {example}")
    size = result.bytes / 1e9
    seconds = result.seconds
    files = "1 file" if len(result.files) == 1 else f"{len(result.files)} files"
    cost = f"{size:.2f} GB in {files}, {seconds:.1f} s ({size / max(seconds, 1e-9):.2f} GB/s)"
    return [*lines, f"merged {len(result.changed)} of {result.tensors} tensors into {result.output}: {cost}"]


def adapter_lines(result: AdapterResult) -> list[str]:
    """Return the lines about a written adapter."""
    size = f"{result.parameters:,} parameters, {result.bytes / 1e6:.2f} MB"
    summary = f"wrote an adapter of rank {result.rank} into {result.output}: {size}"
    return [*_error_lines(result.errors, result.error), summary]


def as_dict(result: MergeResult | AdapterResult) -> dict[str, object]:
    """Return plain values for JSON. Non-finite numbers become None."""
    return {field.name: _plain(getattr(result, field.name)) for field in dataclasses.fields(result)}


def _error_lines(errors: dict[str, float], total: float) -> list[str]:
    lines = [f"relative error of ΔW: {total:.3g} over all layers"]
    worst = sorted(errors.items(), key=lambda entry: -entry[1])[:_MAX_ERRORS]
    if worst and worst[0][1] > 0:
        lines.append("  largest: " + ", ".join(f"{name} {error:.3g}" for name, error in worst))
    return lines


def _plain(value: object) -> object:
    if hasattr(value, "as_dict"):
        return _plain(value.as_dict())
    return str(value) if isinstance(value, Path) else without_nan(value)
