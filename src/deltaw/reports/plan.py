"""What a run will need, for a person: a table of parts, bars side by side, a picture."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deltaw import durable
from deltaw.errors import UserError
from deltaw.memory.plan import Fitting, Plan
from deltaw.reports.tables import WIDTH, add_row, folded, table
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


# A smaller share of the whole is not shown as a part of its own.
LEAST = 0.05
BAR = 56
PICTURES = ("png", "svg", "pdf")


def parts_of(plan: Plan) -> dict[str, int]:
    """The whole process's memory by part: the tensors' parts, and what is not tensors as ``process``."""
    return {**plan.parts, "process": plan.peak_resident_bytes - plan.peak_bytes}


def plan_report(plans: Mapping[str, Plan], own: str, free: int, processes: int = 1) -> RenderableType:
    """What the run's own method needs and whether it fits; where there are further methods, all side by side.

    Args:
        plans: by method. own: the method that the settings name.
        free: bytes of main memory that a process could take now.
        processes: that train together.
    """
    more: list[RenderableType] = [Text(""), methods_table(plans, own), Text(""), plan_bars(plans)]
    return Group(*plan_text(plans[own], free, processes), *(more if len(plans) > 1 else ()))


def plan_text(plan: Plan, free: int, processes: int = 1) -> list[Text]:
    """One plan in lines: its sum and whether it fits, its parts, and where the peak falls."""
    total = processes * plan.peak_resident_bytes
    needs = f"needs {gigabytes(total)}"
    if processes > 1:
        needs = f"{processes} processes need {gigabytes(plan.peak_resident_bytes)} each, {gigabytes(total)}"
    verdict = Text("fits", "bold green") if total <= free else Text("does not fit", "bold red")
    share = plan.trained_parameters / plan.total_parameters if plan.total_parameters else 0.0
    trained = f"{plan.trained_parameters:,} of {plan.total_parameters:,} parameters trained ({share:.2%})"
    lines = [Text(f"{needs} of the {gigabytes(free)} that are free: ") + verdict]
    if total > free:
        fitting = max(0.1, int(free / processes / 1e8) / 10)
        lines.append(Text(f"settings that fit: the same command with --budget {fitting:g}GB"))
    lines.append(Text(f"method {plan.method}: {trained}" + (f", {plan.precision}" if plan.precision else "")))
    parts = list(_sized(plan))
    shown = [part for part in parts if abs(part[1]) >= LEAST * plan.peak_resident_bytes]
    rest = sum(size for _, size, _ in parts) - sum(size for _, size, _ in shown)
    ends = [("the rest", rest, ""), ("in all", plan.peak_resident_bytes, "bold")]
    for label, size, style in [*shown, *(ends if rest else ends[1:])]:
        amount = f"-{gigabytes(-size)}" if size < 0 else gigabytes(size)
        lines.append(Text(f"  {label:<34}", style).append(f"{amount:>9}", style if style == "bold" else "default"))
    if plan.disk_bytes:
        lines.append(Text(f"and features on the disk: {gigabytes(plan.disk_bytes)}"))
    if (rollouts := plan.phases.get("rollouts")) is not None:
        lines.append(Text(f"while completions are written: {gigabytes(rollouts)}"))
    where = f"at {plan.module}" if plan.module else "outside all modules"
    lines.append(Text(folded(f"the peak falls in the {plan.phase}, {where}; microbatches of {plan.tokens:,} tokens")))
    return lines + [Text(line) for line in long_rows_lines(plan)]


def _sized(plan: Plan) -> Iterator[tuple[str, int, str]]:
    """Label, bytes and color of each part of the process, the kinds of its tensors first."""
    for name, label, color, _ in PARTS[:-1]:
        if size := plan.parts.get(name, 0):
            yield label, size, color
    if unread := plan.resident["tensors"] - plan.peak_bytes:
        yield "embedding rows that stay on disk", unread, ""
    for name, size in plan.resident.items():
        if name != "tensors" and size:
            yield _RESIDENT[name], size, ""


def long_rows_lines(plan: Plan) -> list[str]:
    """What few long rows cost, and the settings that spare it; nothing where they cost little."""
    if not plan.long_rows:
        return []
    rows, limit = plan.long_rows["rows"], plan.long_rows["max_length"]
    are, set_it = ("is", "sets") if rows == 1 else ("are", "set")
    less = gigabytes(plan.peak_resident_bytes - plan.long_rows["saves"])
    return [
        f"{rows} of {plan.long_rows['of']:,} rows {are} longer than {limit:,} tokens and {set_it} the peak:",
        f"  without them about {less} (data.max_length: {limit}, data.long_rows: drop)",
    ]


# What the optimizer needs for what is trained.
STATE = ("trained", "gradients", "optimizer")
_RESIDENT = {
    "process": "interpreter, libraries, rows",
    "kernels": "kernels and their scratch",
    "features": "of features on the disk, mapped",
    "allocator": "held by the allocator",
    "decoder": "the decoder's copies of weights",
    "rollouts": "excess while completions are written",
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
