"""Where a run learned: the size of what it saved, by layer and kind of module, from the adapter's files.

For factors A and B that is the norm of ΔW and its singular values, computed from the factors alone
(:mod:`deltaw.reports.inspect`). Other methods save tensors, of which it gives the norms. It knows no
page.
"""

from __future__ import annotations

import dataclasses
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
from deltaw.lora.files import open_adapter
from deltaw.lora.peft_format import without_wrappers
from deltaw.lora.peft_updates import FileUpdate, content_of
from deltaw.methods.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from deltaw.reports.inspect import effective_rank, kinds_of, root_sum_of_squares, values_of
from deltaw.reports.page.svg import Curve, Figure, Numbers, Strip, evenly, heat_map, legend_of, line_chart, swatch
from deltaw.reports.wording import short
from deltaw.tensor_files import TensorFile

# Bytes of weights above which their norms are not computed for a page.
LARGEST = 4_000_000_000
# In the names of factors and of what belongs to them.
_FACTOR = ".lora_"
# Singular values that are kept of a module.
VALUES = 64
# Numbers that are widened to float64 at a time.
_AT_ONCE = 1 << 20
# The order in which a block computes its projections; files have them by name.
COMPUTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass(frozen=True)
class Part:
    """What one module, or one tensor, came to.

    Attributes:
        name: its name in the model. layer: its first number; None outside of layers. kind: its name without
            numbers and what all names have in common.
        norm: ‖ΔW‖_F, or of the saved tensor.
        values: the singular values of ΔW, descending; empty for a tensor.
        effective_rank: of ΔW; None for a tensor.
    """

    name: str
    layer: int | None
    kind: str
    norm: float
    values: Sequence[float] = ()
    effective_rank: float | None = None


@dataclass(frozen=True)
class Learned:
    """What an adapter holds.

    Attributes:
        parts: in the order of the model.
        is_update: whether the norms are those of ΔW, and not of what was saved instead.
        others: names and norms of what an adapter with factors holds besides them.
        note: why there is less than usual; empty otherwise.
    """

    parts: Sequence[Part] = ()
    is_update: bool = True
    others: Sequence[tuple[str, float]] = ()
    note: str = ""

    def layers(self) -> list[int]:
        return sorted({part.layer for part in self.parts if part.layer is not None})

    def kinds(self) -> list[str]:
        """Kinds of modules: those of attention and MLP as a block computes them, others as they come."""
        found = list(dict.fromkeys(part.kind for part in self.parts))
        return sorted(found, key=lambda kind: COMPUTED.index(kind) if kind in COMPUTED else len(COMPUTED))

    def grid(self) -> dict[str, dict[int | None, float]]:
        """By kind and layer, the norm of all parts there; parts outside of layers are at None."""
        grid: dict[str, dict[int | None, float]] = defaultdict(dict)
        for part in self.parts:
            grid[part.kind][part.layer] = math.hypot(grid[part.kind].get(part.layer, 0.0), part.norm)
        return grid

    def by_layer(self) -> list[tuple[int, float, list[float], Part]]:
        """Each layer's norm, its three largest singular values, and the part that changed most."""
        found = []
        for layer in self.layers():
            parts = [part for part in self.parts if part.layer == layer]
            top = sorted((value for part in parts for value in part.values[:3]), reverse=True)[:3]
            found.append((layer, root_sum_of_squares(p.norm for p in parts), top, max(parts, key=lambda p: p.norm)))
        return found


def what_was_learned(folder: Path) -> Learned | None:
    """Measure the adapter in a run's folder; None where it holds none yet."""
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file() or not (folder / ADAPTER_CONFIG).is_file():
        return None
    size = weights.stat().st_size
    if size > LARGEST:
        return Learned(note=f"The adapter has {size / 1e9:.1f} GB, too much to measure for a page.")
    try:
        if _has_factors(weights):
            return _of_factors(folder)
        return _of_tensors(weights)
    except (UserError, SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        brief = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Learned(note=f"The adapter could not be measured: {brief}")


def _has_factors(weights: Path) -> bool:
    with safe_open(weights, "pt") as file:
        return any(_FACTOR in name for name in file.keys())  # noqa: SIM118


def _of_factors(folder: Path) -> Learned:
    """Of the factors, those of one layer are in memory at a time, as in :func:`_of_tensors`."""
    adapter, file = open_adapter(folder), TensorFile(folder / ADAPTER_WEIGHTS)
    layers: dict[int | None, list[str]] = defaultdict(list)
    for name in file:
        layers[layer_of(name)].append(name)
    parts, others = [], []
    for names in layers.values():
        tensors = {name: file[name] if _FACTOR in name else file.described(name) for name in names}
        content = content_of(adapter._replace(tensors=tensors))
        parts += [part for update in content.updates if (part := _of_update(update)) is not None]
        stored = {without_wrappers(name): name for name in names}
        others += [(name, _norm(file, stored[name])) for name in content.others]
    kinds = kinds_of([part.name for part in parts])
    parts = [dataclasses.replace(part, kind=kind) for part, kind in zip(parts, kinds, strict=True)]
    return Learned(_in_order(parts), True, others)


def _of_update(update: FileUpdate) -> Part | None:
    """What it came to, its kind left open; None where no number of it is finite."""
    values = values_of(update)
    if not values:
        return None
    together = torch.cat(values).sort(descending=True).values
    norm = float(together.square().sum().sqrt())
    kept = [float(value) for value in together[:VALUES]]
    rank = sum(effective_rank(one) for one in values) / len(values)
    return Part(update.name, layer_of(update.name), "", norm, kept, rank)


def _of_tensors(weights: Path) -> Learned:
    """The norms of saved tensors.

    A part of one is in memory at a time, and none is mapped: beside a training that has just ended, mapped
    weights would count as much as all that it trained.
    """
    file = TensorFile(weights)
    norms = {name: _norm(file, name) for name in file if file.described(name).is_floating_point()}
    named = zip(norms.items(), kinds_of(list(norms)), strict=True)
    parts = [Part(name, layer_of(name), kind, norm) for (name, norm), kind in named if math.isfinite(norm)]
    return Learned(_in_order(parts), False, note=_meaning(weights.parent))


def _norm(file: TensorFile, name: str) -> float:
    """Of a stored tensor, in float64, a part at a time."""
    return root_sum_of_squares(
        float(part.double().norm()) for block in file.blocks(name) for part in block.flatten().split(_AT_ONCE)
    )


def _meaning(folder: Path) -> str:
    """What the saved tensors of a method are."""
    try:
        method = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("method")
    except (OSError, ValueError):
        method = None
    named = f"The method {method}" if method else "This method"
    return f"{named} saves values, not the factors of a change: these are norms of what it saved, not of what changed."


def layer_of(name: str) -> int | None:
    """The first number in a module's name."""
    found = _NUMBER.search(name)
    return int(found[0]) if found else None


def _in_order(parts: list[Part]) -> list[Part]:
    """By layer, those outside of layers last."""
    return sorted(parts, key=lambda part: math.inf if part.layer is None else part.layer)


# The most kinds, layers and modules that are drawn one by one.
KINDS, LAYERS, SPECTRA, ROWS = 24, 200, 240, 60


def learned_figures(learned: Learned) -> list[Figure]:
    """None where nothing was measured."""
    if not learned.parts:
        return []
    spectra = [part.values for part in learned.parts if len(part.values) > 1]
    return [norm_figure(learned), *([spectrum_figure(learned)] if spectra else [])]


def norm_figure(learned: Learned) -> Figure:
    """A strip for each kind of module, a cell for each layer."""
    grid, layers = learned.grid(), learned.layers()[:LAYERS]
    columns = [f"layer {layer}" for layer in layers] or ["all"]
    strips = []
    ranked = learned.kinds()
    shown = sorted(ranked, key=lambda kind: -sum(v * v for v in grid[kind].values()))[:KINDS]
    for kind in (kind for kind in ranked if kind in shown):
        row = grid[kind]
        inside = any(layer is not None for layer in row)
        values = [row.get(layer) for layer in layers] if inside else [row[None], *[None] * (len(columns) - 1)]
        note = f"up to {short(max(v for v in values if v is not None))}"
        strips.append(Strip(kind if inside else f"{kind} (outside of layers)", note, values))
    what = "‖ΔW‖, the size of the change of each weight" if learned.is_update else "the norm of what was saved"
    top = max(learned.parts, key=lambda part: part.norm)
    text = f"The stronger the color, the larger is {what}. Largest: {top.name} ({short(top.norm)})."
    head, rows = ["part", "norm", "name"], [[part.name, short(part.norm), part.name] for part in learned.parts]
    if layers:
        head, rows = ["layer", "norm", "most in"], []
        if learned.is_update:
            head.insert(2, "largest singular values")
        for layer, norm, singular, part in learned.by_layer():
            largest = [", ".join(map(short, singular))] if learned.is_update else []
            rows.append([str(layer), short(norm), *largest, part.name])
    places = evenly(len(rows), ROWS)
    note = f"{len(places)} of {len(rows)} layers" if len(places) < len(rows) else ""
    title = "Where it learned" if learned.is_update else "Where the saved values are large"
    drawn = heat_map("learned", "Norm by layer and kind of module", text, strips, columns)
    return Figure("learned", title, text, drawn, Numbers("Norms by layer", head, [rows[i] for i in places], note))


def spectrum_figure(learned: Learned) -> Figure:
    """The singular values of each ΔW, in relation to its largest: a thin line a module, and their median."""
    parts = [part for part in learned.parts if len(part.values) > 1 and part.values[0] > 0]
    longest = max((len(part.values) for part in parts), default=0)
    text, legend = "B is zero in all modules: the adapter changes nothing.", []
    curves: list[Curve] = []
    rows: list[tuple[str, ...]] = []
    if parts:
        shares = np.full((len(parts), longest), np.nan)
        for row, part in enumerate(parts):
            shares[row, : len(part.values)] = np.maximum(1e-4, np.array(part.values) / part.values[0])
        lines = [(shares[row], "c1 thin", "") for row in evenly(len(parts), SPECTRA)]
        for values, kind, name in [*lines, (np.nanmedian(shares, axis=0), "c2", "median of the modules")]:
            curves.append(Curve([(n, float(v)) for n, v in enumerate(values, 1) if not math.isnan(v)], kind, name))
        rank = _median_rank(parts)
        text = (
            "Singular values of each ΔW as shares of its largest. A line that falls early means that few of the "
            f"{longest} directions carry the change: the median effective rank is {rank} out of {longest}."
        )
        legend = [*legend_of(curves), (swatch("c1 thin"), "one module")]
    for kind in learned.kinds():
        if same := [part for part in parts if part.kind == kind]:
            rows.append((kind, short(max(part.values[0] for part in same)), _median_rank(same)))
    axes: dict[str, Any] = {"x_format": "σ{:.0f}".format, "y_format": _percent, "log": True}
    drawn = line_chart("spectrum", "Singular values of ΔW", text, curves, x_name="σ", **axes)
    head = ("kind", "largest singular value", "effective rank, median")
    table = Numbers("Singular values by kind of module", head, rows)
    return Figure("spectrum", "How many directions it uses", text, drawn, table, legend)


def _median_rank(parts: Sequence[Part]) -> str:
    return f"{np.median([part.effective_rank or 0.0 for part in parts]):.1f}"


def _percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.01 else f"{value:.2%}"
