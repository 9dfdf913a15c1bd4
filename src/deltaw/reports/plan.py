"""What a run will need, for a person: a table of parts, bars side by side, a picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deltaw import durable
from deltaw.errors import UserError
from deltaw.memory.plan import Fitting, Plan
from deltaw.reports.tables import Cell, add_row, table
from deltaw.reports.wording import gigabytes

# The parts of a plan in the order in which they are stacked, with a color for the terminal and one for the picture
# (both from a palette that color-blind readers can tell apart).
PARTS = (
    ("weights", "the model's weights", "blue", "#0072b2"),
    ("trained", "trained parameters", "cyan", "#56b4e9"),
    ("gradients", "gradients", "yellow", "#f0e442"),
    ("optimizer", "optimizer state", "bright_red", "#d55e00"),
    ("activations", "activations kept", "green", "#009e73"),
    ("logits", "logits", "magenta", "#cc79a7"),
    ("batch", "batch", "bright_black", "#999999"),
    ("workspace", "workspace", "bright_yellow", "#e69f00"),
    ("process", "process, rows, kernels", "white", "#dddddd"),
)


BAR = 56
# A line of what is printed; a terminal has so many columns at least.
WIDTH = 80
PICTURES = ("png", "svg", "pdf")


def parts_of(plan: Plan) -> dict[str, int]:
    """The whole process's memory by part: the tensors' parts, and what is not tensors as ``process``."""
    return {**plan.parts, "process": plan.peak_resident_bytes - plan.peak_bytes}


def plan_report(plans: Mapping[str, Plan], own: str) -> RenderableType:
    """The run's own method in detail, and all methods side by side.

    Args:
        plans: by method. own: the method that the settings name.
    """
    detail: list[RenderableType] = [plan_table(plans[own]), Text("")] if own in plans else []
    methods: list[RenderableType] = [methods_table(plans, own), Text("")] if len(plans) > 1 else []
    return Group(*detail, *methods, plan_bars(plans))


def plan_table(plan: Plan) -> Table:
    """The parts of one plan, with where the peak falls."""
    share = plan.trained_parameters / plan.total_parameters if plan.total_parameters else 0.0
    rows: list[tuple[Cell, Cell]] = [
        (Text(label, style=color), gigabytes(plan.parts[name]))
        for name, label, color, _ in PARTS[:-1]
        if plan.parts.get(name)
    ]
    rows.append((Text("tensors in all", style="bold"), Text(gigabytes(plan.peak_bytes), style="bold")))
    if plan.resident["tensors"] < plan.peak_bytes:
        unread = plan.peak_bytes - plan.resident["tensors"]
        rows.append(("embedding rows that stay on disk", f"-{gigabytes(unread)}"))
    rows += [(_RESIDENT[name], gigabytes(size)) for name, size in plan.resident.items() if name != "tensors" and size]
    rows.append((Text("process in all", style="bold"), Text(gigabytes(plan.peak_resident_bytes), style="bold")))
    if plan.disk_bytes:
        rows.append(("features on the disk", gigabytes(plan.disk_bytes)))
    trained = f"{plan.trained_parameters:,} of {plan.total_parameters:,} parameters trained ({share:.2%})"
    where = f"the peak falls in the {plan.phase}, {f'at {plan.module}' if plan.module else 'outside all modules'}"
    caption = f"{where};\nmicrobatches of {plan.tokens:,} tokens"
    said: dict[str, Any] = {"title": f"method {plan.method}: {trained}", "caption": caption}
    return table(("at the peak", ""), rows, title_justify="left", caption_justify="left", **said)


# What the optimizer needs for what is trained.
STATE = ("trained", "gradients", "optimizer")
_RESIDENT = {
    "process": "interpreter, libraries, rows",
    "kernels": "kernels and their scratch",
    "features": "of features on the disk, mapped",
    "allocator": "held by the allocator",
    "reading": "excess while tokenizer and rows are read",
    "loading": "excess while weights are converted",
    "saving": "excess while the tokenizer is saved",
}


def methods_table(plans: Mapping[str, Plan], own: str) -> Table:
    """Methods side by side: what each trains and needs."""
    caption = "state: trained parameters, their gradients and the optimizer's moments"
    heads = ("method", "trained", "share", "state", "activations", "tensors", "process")
    made = table(heads, caption=caption, caption_justify="left")
    for name, plan in plans.items():
        share = f"{plan.trained_parameters / plan.total_parameters:.2%}"
        state = sum(plan.parts[part] for part in STATE)
        sizes = (state, plan.parts["activations"], plan.peak_bytes, plan.peak_resident_bytes)
        cells = (name, f"{plan.trained_parameters:,}", share, *map(gigabytes, sizes))
        add_row(made, cells, "bold" if name == own else "")
    return made


def plan_bars(plans: Mapping[str, Plan]) -> RenderableType:
    """One bar a method, its parts in colors, and what the colors mean."""
    most = max(plan.peak_resident_bytes for plan in plans.values())
    lines = []
    for name, plan in plans.items():
        bar = Text(f"{name:>8} ")
        parts = parts_of(plan)
        drawn, sofar = 0, 0
        for part, _, color, _ in PARTS:
            sofar += parts.get(part, 0)
            end = round(BAR * sofar / most)
            bar.append("█" * (end - drawn), style=color)
            drawn = end
        lines.append(bar.append(f" {gigabytes(plan.peak_resident_bytes)}"))
    return Group(*lines, *_legend(plans.values(), at_least=most / BAR / 2))


def _legend(plans: Collection[Plan], *, at_least: float) -> list[Text]:
    """What the colors of the parts mean that any plan has ``at_least`` so many bytes of."""
    margin = " " * 9
    lines = [Text(margin)]
    for part, label, color, _ in PARTS:
        if not any(parts_of(plan).get(part, 0) > at_least for plan in plans):
            continue
        entry = Text("█ ", style=color).append(f"{label}  ", style="default")
        if lines[-1].cell_len + entry.cell_len > WIDTH:
            lines.append(Text(margin))
        lines[-1].append_text(entry)
    return lines


def picture_kind(path: Path) -> str:
    """The kind of picture that a path's ending asks for.

    Raises:
        UserError: it is none that can be drawn.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in PICTURES:
        hint = f"let it end with {', '.join('.' + known for known in PICTURES)}"
        raise UserError(f"'{path.name}' names no picture that can be drawn", where="--picture", hint=hint)
    return kind


def draw_plans(plans: Mapping[str, Plan], path: Path) -> None:
    """Stacked bars of every plan as a picture; its kind (:data:`PICTURES`) follows from the path's ending.

    Raises:
        UserError: the ending is another, or the folder cannot be written to.
    """
    kind = picture_kind(path)
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(8, 0.9 + 0.5 * len(plans)), layout="constrained")
    axes = figure.subplots()
    handles = {}
    for row, plan in enumerate(plans.values()):
        left, sizes = 0.0, parts_of(plan)
        for part, label, _, color in PARTS:
            if size := sizes.get(part, 0) / 1e9:
                axes.barh(row, size, left=left, color=color, edgecolor="white", linewidth=0.4)
                handles[label] = Patch(color=color, label=label)
            left += size
        axes.text(left, row, f" {left:.2f} GB", va="center", fontsize=9)
    axes.set_yticks(range(len(plans)), list(plans))
    axes.invert_yaxis()
    axes.set_xlabel("peak memory of the process, GB")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    shown = [handles[label] for _, label, *_ in PARTS if label in handles]
    figure.legend(handles=shown, loc="outside lower center", ncols=3, frameon=False)
    with durable.replacing(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=150)


def plan_lines(plan: Plan, limit: int | None) -> list[str]:
    """A plan in two lines, as a run begins with it."""
    parts = sorted(parts_of(plan).items(), key=lambda item: -item[1])
    labels = {name: label for name, label, *_ in PARTS}
    most = ", ".join(f"{labels[name]} {gigabytes(size)}" for name, size in parts[:4])
    there = f" of {gigabytes(limit)}" if limit is not None else ""
    tensors = f"{gigabytes(plan.peak_bytes)} of it tensors (peak in the {plan.phase})"
    return [f"planned memory: {gigabytes(plan.peak_resident_bytes)}{there}, {tensors}", f"  most of it: {most}"]


def budget_table(found: Sequence[Fitting]) -> Table:
    """Settings that fit a budget, the fastest first."""
    heads = ("method", "rank", "tokens per pass", "checkpointing", "precision", "process", "time")
    made = table(heads)
    for one in found:
        how = (f"{one.tokens_per_pass:,}", "on" if one.checkpointing else "off", one.precision)
        cost = (gigabytes(one.plan.peak_resident_bytes), f"{one.seconds / found[0].seconds:.2f} x")
        add_row(made, (one.method, str(one.rank or ""), *how, *cost))
    return made
