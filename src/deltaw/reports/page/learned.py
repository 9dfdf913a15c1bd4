"""Measure a run's adapter and plot the size of its changes by layer and kind of module.

For factors A and B, the norm of ΔW and its singular values are computed without forming ΔW
(:mod:`deltaw.reports.inspect`). For methods that store other tensors, the norms of these tensors are reported.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from deltaw.errors import UserError
from deltaw.lora.files import read_adapter
from deltaw.lora.peft_format import without_wrappers
from deltaw.lora.peft_updates import FileUpdate, read_content
from deltaw.methods.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from deltaw.reports.inspect import effective_rank, module_kinds, root_sum_of_squares, update_singular_values
from deltaw.reports.svg import (
    ChartSeries,
    Figure,
    FigureTable,
    Strip,
    build_legend,
    evenly_spaced,
    heat_map,
    line_chart,
    swatch,
)
from deltaw.reports.tables import short
from deltaw.tensor_files import TensorFile

# Size in bytes above which an adapter is not measured for a page.
MAX_BYTES = 4_000_000_000
# Occurs in the names of LoRA factors and their additional tensors.
_FACTOR = ".lora_"
# Maximum number of singular values stored per module.
MAX_SINGULAR_VALUES = 64
# Elements converted to float64 at a time.
_CHUNK_SIZE = 1 << 20
# Display order of projections: the order of computation in a block. Files are sorted by name.
PROJECTION_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass(frozen=True)
class ModuleSummary:
    """Size of the change of one module, or of one stored tensor.

    Attributes:
        name: Name in the model.
        layer: First number in the name, or None outside of layers.
        kind: Name without numbers, reduced to the parts that distinguish kinds.
        norm: ‖ΔW‖_F, or the norm of the stored tensor.
        values: Singular values of ΔW in descending order, empty for a tensor.
        effective_rank: Effective rank of ΔW, or None for a tensor.
    """

    name: str
    layer: int | None
    kind: str
    norm: float
    values: Sequence[float] = ()
    effective_rank: float | None = None


@dataclass(frozen=True)
class AdapterSummary:
    """Measured contents of an adapter.

    Attributes:
        modules: Modules in the order of the model.
        is_update: True if the norms are those of ΔW, False if they are those of stored tensors.
        other_norms: Names and norms of tensors other than A and B in an adapter with factors.
        note: Reason for missing measurements, empty otherwise.
    """

    modules: Sequence[ModuleSummary] = ()
    is_update: bool = True
    other_norms: Sequence[tuple[str, float]] = ()
    note: str = ""

    def layers(self) -> list[int]:
        return sorted({module.layer for module in self.modules if module.layer is not None})

    def kinds(self) -> list[str]:
        """Return the kinds of modules: projections in order of computation, then all other kinds."""
        kinds = list(dict.fromkeys(module.kind for module in self.modules))
        order = {kind: index for index, kind in enumerate(PROJECTION_ORDER)}
        return sorted(kinds, key=lambda kind: order.get(kind, len(order)))

    def grid(self) -> dict[str, dict[int | None, float]]:
        """Return the norm by kind and layer. Modules outside of layers have the key None."""
        grid: dict[str, dict[int | None, float]] = defaultdict(dict)
        for module in self.modules:
            grid[module.kind][module.layer] = math.hypot(grid[module.kind].get(module.layer, 0.0), module.norm)
        return grid

    def by_layer(self) -> list[tuple[int, float, list[float], ModuleSummary]]:
        """Return each layer's norm, its three largest singular values, and its module with the largest norm."""
        summaries = []
        for layer in self.layers():
            modules = [module for module in self.modules if module.layer == layer]
            top = sorted((value for module in modules for value in module.values[:3]), reverse=True)[:3]
            largest = max(modules, key=lambda module: module.norm)
            summaries.append((layer, root_sum_of_squares(module.norm for module in modules), top, largest))
        return summaries


def measure_adapter(folder: Path) -> AdapterSummary | None:
    """Measure the adapter in a run's folder, or return None if it does not contain one yet."""
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file() or not (folder / ADAPTER_CONFIG).is_file():
        return None
    size = weights.stat().st_size
    if size > MAX_BYTES:
        return AdapterSummary(note=f"The adapter has {size / 1e9:.1f} GB, which is too large to measure for a page.")
    try:
        return _measure_factors(folder) if _has_factors(weights) else _measure_tensors(weights)
    except (UserError, SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        brief = str(error).splitlines()[0] if str(error) else type(error).__name__
        return AdapterSummary(note=f"The adapter could not be measured: {brief}")


def _has_factors(weights: Path) -> bool:
    with safe_open(weights, "pt") as file:
        return any(_FACTOR in name for name in file.keys())  # noqa: SIM118


def _measure_factors(folder: Path) -> AdapterSummary:
    """Measure an adapter with factors, loading the factors of one layer at a time."""
    adapter = read_adapter(folder, lazy=True)
    file = TensorFile(folder / ADAPTER_WEIGHTS)
    layers: dict[int | None, list[str]] = defaultdict(list)
    for name in file:
        layers[layer_of(name)].append(name)
    modules = []
    other_norms = []
    for names in layers.values():
        tensors = {name: file[name] if _FACTOR in name else file.meta_tensor(name) for name in names}
        content = read_content(adapter._replace(tensors=tensors))
        modules += [module for update in content.updates if (module := _summarize_update(update)) is not None]
        stored = {without_wrappers(name): name for name in names}
        other_norms += [(name, _norm(file, stored[name])) for name in content.other_tensors]
    kinds = module_kinds([module.name for module in modules])
    modules = [dataclasses.replace(module, kind=kind) for module, kind in zip(modules, kinds, strict=True)]
    return AdapterSummary(_in_order(modules), True, other_norms)


def _summarize_update(update: FileUpdate) -> ModuleSummary | None:
    """Summarize an update without its kind, or return None if all of its factors contain non-finite numbers."""
    values = update_singular_values(update)
    if not values:
        return None
    all_values = torch.cat(values).sort(descending=True).values
    norm = float(all_values.square().sum().sqrt())
    largest = [float(value) for value in all_values[:MAX_SINGULAR_VALUES]]
    rank = sum(effective_rank(matrix_values) for matrix_values in values) / len(values)
    return ModuleSummary(update.name, layer_of(update.name), "", norm, largest, rank)


def _measure_tensors(weights: Path) -> AdapterSummary:
    """Measure the norms of stored tensors.

    A chunk is in memory at a time. Files are not memory-mapped, because mapped weights would count toward the peak
    memory of the training process.
    """
    file = TensorFile(weights)
    norms = {name: _norm(file, name) for name in file if file.meta_tensor(name).is_floating_point()}
    named = zip(norms.items(), module_kinds(list(norms)), strict=True)
    modules = [ModuleSummary(name, layer_of(name), kind, norm) for (name, norm), kind in named if math.isfinite(norm)]
    return AdapterSummary(_in_order(modules), False, note=_explain_norms(weights.parent))


def _norm(file: TensorFile, name: str) -> float:
    """Return the norm of a stored tensor in float64, computed in chunks."""
    chunks = (chunk for block in file.blocks(name) for chunk in block.flatten().split(_CHUNK_SIZE))
    return root_sum_of_squares(float(chunk.double().norm()) for chunk in chunks)


def _explain_norms(folder: Path) -> str:
    """Return the note that explains norms of stored tensors."""
    try:
        method = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("method")
    except (OSError, ValueError):
        method = None
    named = f"The method {method}" if method else "This method"
    return f"{named} stores parameter values instead of LoRA factors. The norms are those of the stored values."


def layer_of(name: str) -> int | None:
    """Return the first number in a module's name."""
    match = _NUMBER.search(name)
    return int(match[0]) if match else None


def _in_order(modules: list[ModuleSummary]) -> list[ModuleSummary]:
    """Sort by layer, with modules outside of layers last."""
    return sorted(modules, key=lambda module: math.inf if module.layer is None else module.layer)


# Maximum number of kinds, layers and spectra that are plotted, and rows of a table.
KINDS = 24
LAYERS = 200
SPECTRA = 240
ROWS = 60


def learned_figures(summary: AdapterSummary) -> list[Figure]:
    """Return the figures of an adapter, empty if it was not measured."""
    if not summary.modules:
        return []
    spectra = [module.values for module in summary.modules if len(module.values) > 1]
    return [norm_figure(summary), *([spectrum_figure(summary)] if spectra else [])]


def norm_figure(summary: AdapterSummary) -> Figure:
    """Plot the norms as a heat map with a row per kind of module and a cell per layer."""
    grid = summary.grid()
    layers = summary.layers()[:LAYERS]
    columns = [f"layer {layer}" for layer in layers] or ["all"]
    strips = []
    ranked = summary.kinds()
    largest_kinds = sorted(ranked, key=lambda kind: -sum(v * v for v in grid[kind].values()))[:KINDS]
    for kind in (kind for kind in ranked if kind in largest_kinds):
        row = grid[kind]
        in_layers = any(layer is not None for layer in row)
        values = [row.get(layer) for layer in layers] if in_layers else [row[None], *[None] * (len(columns) - 1)]
        note = f"up to {short(max(v for v in values if v is not None))}"
        strips.append(Strip(kind if in_layers else f"{kind} (outside of layers)", note, values))
    quantity = "‖ΔW‖, the size of the change of each weight" if summary.is_update else "the norm of the stored values"
    top = max(summary.modules, key=lambda module: module.norm)
    text = f"A stronger color means a larger value of {quantity}. Largest: {top.name} ({short(top.norm)})."
    head = ["module", "norm", "name"]
    rows = [[m.name, short(m.norm), m.name] for m in summary.modules]
    if layers:
        head = ["layer", "norm", "largest module"]
        rows = []
        if summary.is_update:
            head.insert(2, "largest singular values")
        for layer, norm, singular, module in summary.by_layer():
            largest = [", ".join(map(short, singular))] if summary.is_update else []
            rows.append([str(layer), short(norm), *largest, module.name])
    indices = evenly_spaced(len(rows), ROWS)
    note = f"{len(indices)} of {len(rows)} layers" if len(indices) < len(rows) else ""
    title = "Norm of the change by layer" if summary.is_update else "Norm of the stored values by layer"
    chart = heat_map("learned", "Norm by layer and kind of module", text, strips, columns)
    return Figure("learned", title, text, chart, FigureTable("Norms by layer", head, [rows[i] for i in indices], note))


def spectrum_figure(summary: AdapterSummary) -> Figure:
    """Plot the singular values of each ΔW relative to the largest: a thin line per module, and their median."""
    modules = [module for module in summary.modules if len(module.values) > 1 and module.values[0] > 0]
    longest = max((len(module.values) for module in modules), default=0)
    text = "B is zero in all modules: the adapter has no effect."
    legend = []
    curves: list[ChartSeries] = []
    rows: list[tuple[str, ...]] = []
    if modules:
        shares = np.full((len(modules), longest), np.nan)
        for row, module in enumerate(modules):
            shares[row, : len(module.values)] = np.maximum(1e-4, np.array(module.values) / module.values[0])
        lines = [(shares[row], "c1 thin", "") for row in evenly_spaced(len(modules), SPECTRA)]
        for values, kind, name in [*lines, (np.nanmedian(shares, axis=0), "c2", "median of the modules")]:
            points = [(n, float(value)) for n, value in enumerate(values, 1) if not math.isnan(value)]
            curves.append(ChartSeries(points, kind, name))
        rank = _median_rank(modules)
        text = (
            "Singular values of each ΔW relative to its largest. A line that falls early means that only a few of the "
            f"{longest} directions carry the change: the median effective rank is {rank} out of {longest}."
        )
        legend = [*build_legend(curves), (swatch("c1 thin"), "one module")]
    for kind in summary.kinds():
        if kind_modules := [module for module in modules if module.kind == kind]:
            rows.append((kind, short(max(module.values[0] for module in kind_modules)), _median_rank(kind_modules)))
    axes: dict[str, Any] = {"x_format": "σ{:.0f}".format, "y_format": _percent, "log": True}
    chart = line_chart("spectrum", "Singular values of ΔW", text, curves, x_name="σ", **axes)
    head = ("kind", "largest singular value", "effective rank, median")
    table = FigureTable("Singular values by kind of module", head, rows)
    return Figure("spectrum", "Singular values of the change", text, chart, table, legend)


def _median_rank(modules: Sequence[ModuleSummary]) -> str:
    return f"{np.median([module.effective_rank or 0.0 for module in modules]):.1f}"


def _percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.01 else f"{value:.2%}"


# Characters of an answer, and lines of a pretty-printed answer, that are compared.
MAX_LENGTH = 8_000
MAX_LINES = 400
# Characters that reorder or hide text, and surrogates, which cannot be encoded in UTF-8.
_INVISIBLE = re.compile("[\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def pretty_json(text: str | None) -> list[str] | None:
    """Return the lines of a JSON object or list, or None for any other text.

    Text with a duplicate key, or with a number such as NaN, is not pretty-printed, because the result would differ.
    """
    if text is None or len(text) > MAX_LENGTH:
        return None
    try:
        value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
        lines = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).split("\n")
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict | list) or len(lines) > MAX_LINES or sum(map(len, lines)) > 4 * MAX_LENGTH:
        return None
    return [_INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", line) for line in lines]


def marked_lines(lines: Sequence[str], reference: Sequence[str] | None) -> list[tuple[str, str]]:
    """Return each line with a mark: ``+`` for an added line, ``-`` for a line of the reference that is missing."""
    if reference is None:
        return [(" ", line) for line in lines]
    marked: list[tuple[str, str]] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, reference, lines, autojunk=False).get_opcodes():
        marked += [("-", line) for line in reference[a:b] if kind != "equal"]
        marked += [(" " if kind == "equal" else "+", line) for line in lines[c:d]]
    return marked


def _refuse(value: str) -> Any:
    raise ValueError(f"{value} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(pairs)) < len(pairs):
        raise ValueError("duplicate key")
    return unique
