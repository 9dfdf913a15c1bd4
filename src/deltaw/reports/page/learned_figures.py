"""Figures of where a run learned: norms by layer and kind of module, and the singular values of ΔW."""

from __future__ import annotations

import numpy as np

from deltaw.reports.page.curves import evenly
from deltaw.reports.page.figure import Figure, Numbers
from deltaw.reports.page.learned import Learned
from deltaw.reports.page.svg import Curve, Strip, heat_map, line_chart, swatch
from deltaw.reports.wording import short

# The most kinds, layers and modules that are drawn one by one.
KINDS, LAYERS, SPECTRA, ROWS = 24, 200, 240, 60


def learned_figures(learned: Learned) -> list[Figure]:
    """None where nothing was measured."""
    if not learned.parts:
        return []
    figures = [norm_figure(learned)]
    if any(len(part.values) > 1 for part in learned.parts):
        figures.append(spectrum_figure(learned))
    return figures


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
        values = [row.get(layer) for layer in layers] if inside else [row[None]] + [None] * (len(columns) - 1)
        note = f"up to {short(max(v for v in values if v is not None))}"
        strips.append(Strip(kind if inside else f"{kind} (outside of layers)", note, values))
    what = (
        "‖ΔW‖, the size of the change of each weight" if learned.is_update else "the norm of what was saved"
    )
    top = max(learned.parts, key=lambda part: part.norm)
    text = f"The stronger the color, the larger is {what}. Largest: {top.name} ({short(top.norm)})."
    rows = [
        (
            str(layer),
            short(norm),
            *([", ".join(short(value) for value in values)] if learned.is_update else []),
            part.name,
        )
        for layer, norm, values, part in learned.by_layer()
    ] or [(part.name, short(part.norm), part.name) for part in learned.parts]
    head = ("layer", "norm", *(["largest singular values"] if learned.is_update else []), "most in")
    if not learned.layers():
        head = ("part", "norm", "name")
    places = evenly(len(rows), ROWS)
    note = f"{len(places)} of {len(rows)} layers" if len(places) < len(rows) else ""
    return Figure(
        "learned",
        "Where it learned" if learned.is_update else "Where the saved values are large",
        text,
        heat_map("learned", "Norm by layer and kind of module", text, strips, columns, short),
        Numbers("Norms by layer", head, [rows[i] for i in places], note),
    )


def spectrum_figure(learned: Learned) -> Figure:
    """The singular values of each ΔW, in relation to its largest: a thin line a module, and their median."""
    parts = [part for part in learned.parts if len(part.values) > 1 and part.values[0] > 0]
    if not parts:
        return _no_spectrum()
    drawn = [parts[i] for i in evenly(len(parts), SPECTRA)]
    floor = 1e-4
    curves = [
        Curve([(n, max(floor, v / part.values[0])) for n, v in enumerate(part.values, 1)], "c1 thin")
        for part in drawn
    ]
    longest = max(len(part.values) for part in parts)
    shares = np.full((len(parts), longest), np.nan)
    for row, part in enumerate(parts):
        shares[row, : len(part.values)] = np.maximum(floor, np.array(part.values) / part.values[0])
    median = np.nanmedian(shares, axis=0)
    curves.append(Curve([(n, float(v)) for n, v in enumerate(median, 1)], "c2"))
    ranks = [part.effective_rank for part in parts if part.effective_rank is not None]
    text = (
        f"Singular values of each ΔW as shares of its largest. A line that falls early means that few of the "
        f"{longest} directions carry the change: in the median module, an effective rank of "
        f"{np.median(ranks):.1f} out of {longest}."
    )
    by_kind = [
        (
            kind,
            short(max(part.values[0] for part in parts if part.kind == kind)),
            f"{np.median([p.effective_rank for p in parts if p.kind == kind and p.effective_rank]):.1f}",
        )
        for kind in learned.kinds()
        if any(part.kind == kind for part in parts)
    ]
    return Figure(
        "spectrum",
        "How many directions it uses",
        text,
        line_chart(
            "spectrum",
            "Singular values of ΔW",
            text,
            curves,
            x_format=lambda value: f"σ{value:.0f}",
            y_format=lambda value: f"{value:.0%}" if value >= 0.01 else f"{value:.2%}",
            log=True,
        ),
        Numbers(
            "Singular values by kind of module",
            ("kind", "largest singular value", "effective rank, median"),
            by_kind,
        ),
        [(swatch("c2"), "median of the modules"), (swatch("c1 thin"), "one module")],
    )


def _no_spectrum() -> Figure:
    text = "B is zero in all modules: the adapter changes nothing."
    return Figure(
        "spectrum",
        "How many directions it uses",
        text,
        line_chart("spectrum", "Singular values of ΔW", text, [], x_format=short, y_format=short),
        Numbers("Singular values", ("kind", "largest singular value"), []),
    )
