"""Format plans: a table of memory by part, bars, and the predicted time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deltaw.memory.plan import FittingPlan, FittingTime, Plan
from deltaw.reports.tables import WIDTH, add_row, duration, gigabytes, table, time_by_part, wrap_line

# Parts of a plan in stacking order: name, label and terminal color. Figures color them by position (``p1`` to ``p9``).
PARTS = (
    ("weights", "the model's weights", "blue"),
    ("trained", "trained parameters", "cyan"),
    ("gradients", "gradients", "yellow"),
    ("optimizer", "optimizer state", "bright_red"),
    ("activations", "activations", "green"),
    ("logits", "logits", "magenta"),
    ("batch", "batch", "bright_black"),
    ("workspace", "workspace", "bright_yellow"),
    ("process", "process, rows, kernels", "white"),
)


# Parts with a smaller share of the peak are summed as "the rest".
MIN_SHARE = 0.05
BAR = 56


def process_parts(plan: Plan) -> dict[str, int]:
    """Return the peak memory of the process by part. Memory outside of tensors is ``process``."""
    return {**plan.parts, "process": plan.peak_resident_bytes - plan.peak_bytes}


def plan_report(plans: Mapping[str, Plan], method: str, free: int | None, processes: int = 1) -> RenderableType:
    """Return the memory of the selected method and its verdict. Several methods are also shown side by side.

    Args:
        plans: Plans by method.
        method: Method in the settings.
        free: Bytes of the device's memory that are available to a process, or None if unknown.
        processes: Number of processes that train together.
    """
    comparison: list[RenderableType] = [Text(""), methods_table(plans, method), Text(""), plan_bars(plans)]
    return Group(*plan_text(plans[method], free, processes), *(comparison if len(plans) > 1 else ()))


def plan_text(plan: Plan, free: int | None, processes: int = 1) -> list[Text]:
    """Return the lines of a plan: total and verdict, parts, and the location of the peak."""
    is_cpu = plan.device == "cpu"
    total = plan.required_bytes * (processes if is_cpu else 1)
    needs = f"needs {gigabytes(total)}" if is_cpu else f"needs {gigabytes(total)} on {plan.device}"
    if processes > 1 and is_cpu:
        needs = f"{processes} processes need {gigabytes(plan.peak_resident_bytes)} each, {gigabytes(total)}"
    verdict = Text("fits", "bold green") if free is None or total <= free else Text("does not fit", "bold red")
    share = plan.trained_parameters / plan.total_parameters if plan.total_parameters else 0.0
    trained = f"{plan.trained_parameters:,} of {plan.total_parameters:,} parameters trained ({share:.2%})"
    if free is None:
        free = total
        lines = [
            Text(f"{needs}; this machine has no such card: set memory to its size, such as 24GB, to check if it fits")
        ]
    else:
        lines = [Text(f"{needs} of the {gigabytes(free)} that are {'free' if is_cpu else 'available'}: ") + verdict]
    if total > free:
        fitting = max(0.1, int(free / processes / 1e8) / 10)
        lines.append(Text(f"settings that fit: the same command with --fit-memory {fitting:g}GB"))
    lines.append(Text(f"method {plan.method}: {trained}" + (f", {plan.precision}" if plan.precision else "")))
    parts = list(_sized(plan))
    large_parts = [part for part in parts if abs(part[1]) >= MIN_SHARE * plan.required_bytes]
    remainder = sum(size for _, size, _ in parts) - sum(size for _, size, _ in large_parts)
    totals = [("other", remainder, ""), ("total", plan.required_bytes, "bold")]
    for label, size, style in [*large_parts, *(totals if remainder else totals[1:])]:
        amount = f"-{gigabytes(-size)}" if size < 0 else gigabytes(size)
        lines.append(Text(f"  {label:<34}", style).append(f"{amount:>9}", style if style == "bold" else "default"))
    if not is_cpu:
        lines.append(Text(f"main memory while the weights are loaded: {gigabytes(plan.host_bytes)}"))
    if plan.disk_bytes:
        lines.append(Text(f"features on disk: {gigabytes(plan.disk_bytes)}"))
    if (rollouts := plan.phases.get("rollouts")) is not None:
        lines.append(Text(f"while completions are generated: {gigabytes(rollouts)}"))
    location = f"at {plan.module}" if plan.module else "outside all modules"
    lines.append(Text(wrap_line(f"peak in the {plan.phase}, {location}; microbatches of {plan.tokens:,} tokens")))
    return lines + [Text(line) for line in (*long_rows_lines(plan), *time_lines(plan))]


def time_lines(plan: Plan) -> list[str]:
    """Return the predicted time by phase and per step, or no lines if it was not predicted."""
    if plan.seconds is None:
        return [wrap_line(f"time: {plan.time_uncertain}")] if plan.time_uncertain else []
    start = "takes about "
    first, *following = time_by_part(plan.seconds_by_phase, WIDTH - len(start))
    lines = [start + first, *following, f"{duration(plan.seconds_per_step)} per step"]
    return lines + ([f"the time is uncertain: {plan.time_uncertain}"] if plan.time_uncertain else [])


def _sized(plan: Plan) -> Iterator[tuple[str, int, str]]:
    """Yield label, bytes and color of each part of the process, tensors first."""
    for name, label, color in PARTS[:-1]:
        if size := plan.parts.get(name, 0):
            yield label, size, color
    if unread := plan.resident["tensors"] - plan.peak_bytes:
        yield "embedding rows that stay on disk", unread, ""
    for name, size in {**plan.resident, **plan.overhead}.items():
        if name != "tensors" and size:
            yield _RESIDENT[name], size, ""


def long_rows_lines(plan: Plan) -> list[str]:
    """Return the memory cost of rare long rows and the settings that avoid it, or no lines if the cost is small."""
    if not plan.long_rows:
        return []
    rows = plan.long_rows["rows"]
    limit = plan.long_rows["max_length"]
    verb, determine = ("is", "sets") if rows == 1 else ("are", "set")
    remaining_size = gigabytes(plan.peak_resident_bytes - plan.long_rows["saves"])
    return [
        f"{rows} of {plan.long_rows['of']:,} rows {verb} longer than {limit:,} tokens and {determine} the peak:",
        f"  without them about {remaining_size} (data.max_length: {limit}, data.long_rows: drop)",
    ]


# Parts that scale with the number of trained parameters.
STATE = ("trained", "gradients", "optimizer")
_RESIDENT = {
    "process": "interpreter, libraries, rows",
    "kernels": "kernels and their scratch",
    "features": "features on disk, memory-mapped",
    "allocator": "allocator overhead",
    "context": "CUDA context",
    "decoder": "weight copies of the decoding engine",
    "rollouts": "excess while completions are generated",
    "reading": "excess while tokenizer and rows are read",
    "loading": "excess while weights are converted",
    "saving": "excess while the tokenizer is saved",
}


def methods_table(plans: Mapping[str, Plan], method: str) -> Table:
    """Return a table of trained parameters and memory by method."""
    caption = "state: trained parameters, their gradients and the optimizer's moments"
    heads = ("method", "trained", "share", "state", "activations", "tensors", "process")
    result = table(heads, caption=caption, caption_justify="left")
    for name, plan in plans.items():
        share = f"{plan.trained_parameters / plan.total_parameters:.2%}"
        state = sum(plan.parts[part] for part in STATE)
        sizes = (state, plan.parts["activations"], plan.peak_bytes, plan.peak_resident_bytes)
        cells = (name, f"{plan.trained_parameters:,}", share, *map(gigabytes, sizes))
        add_row(result, cells, "bold" if name == method else "")
    return result


def chain_report(plans: Mapping[str, Plan], free: int) -> RenderableType:
    """Return the memory and the time of each stage of a chain.

    Args:
        plans: Plans by stage.
        free: Bytes of main memory that are available to a process.
    """
    result = table(("stage", "trained", "memory", "per step", "time"))
    for name, plan in plans.items():
        times = duration(plan.seconds_per_step), duration(plan.seconds)
        add_row(result, (name, f"{plan.trained_parameters:,}", gigabytes(plan.peak_resident_bytes), *times))
    peak = max(plan.peak_resident_bytes for plan in plans.values())
    seconds = [p.seconds for p in plans.values()]
    total = None if None in seconds else sum(second or 0.0 for second in seconds)
    add_row(result, ("all, without the final scores", "", gigabytes(peak), "", duration(total)), "bold")
    verdict = Text("fits", "bold green") if peak <= free else Text("does not fit", "bold red")
    return Group(Text(f"needs {gigabytes(peak)} of the {gigabytes(free)} that are free: ") + verdict, result)


def plan_bars(plans: Mapping[str, Plan]) -> RenderableType:
    """Return a bar of stacked parts per method, and the legend."""
    largest = max(plan.peak_resident_bytes for plan in plans.values())
    lines = []
    for name, plan in plans.items():
        bar = Text(f"{name:>8} ")
        parts = process_parts(plan)
        filled = 0
        cumulative = 0
        for part, _, color in PARTS:
            cumulative += parts.get(part, 0)
            end = round(BAR * cumulative / largest)
            bar.append("█" * (end - filled), style=color)
            filled = end
        lines.append(bar.append(f" {gigabytes(plan.peak_resident_bytes)}"))
    return Group(*lines, *_legend(plans.values(), at_least=largest / BAR / 2))


def _legend(plans: Collection[Plan], *, at_least: float) -> list[Text]:
    """Return the legend of the parts that use more than ``at_least`` bytes in any plan."""
    margin = " " * 9
    lines = [Text(margin)]
    for part, label, color in PARTS:
        if not any(process_parts(plan).get(part, 0) > at_least for plan in plans):
            continue
        entry = Text("█ ", style=color).append(f"{label}  ", style="default")
        if lines[-1].cell_len + entry.cell_len > WIDTH:
            lines.append(Text(margin))
        lines[-1].append_text(entry)
    return lines


def plan_lines(plan: Plan, limit: int | None) -> list[str]:
    """Return a plan in two lines, as printed at the start of a run."""
    parts = sorted(process_parts(plan).items(), key=lambda item: -item[1])
    labels = {name: label for name, label, *_ in PARTS}
    largest = ", ".join(f"{labels[name]} {gigabytes(size)}" for name, size in parts[:4])
    limit_text = f" of {gigabytes(limit)}" if limit is not None else ""
    if plan.overhead:
        limit_text += f", {gigabytes(plan.required_bytes)} with the CUDA context and unused memory of the allocator"
    tensors = f"{gigabytes(plan.peak_bytes)} of it tensors (peak in the {plan.phase})"
    return [f"planned memory: {gigabytes(plan.peak_resident_bytes)}{limit_text}, {tensors}", f"  mainly: {largest}"]


def fitting_times_table(candidates: Sequence[FittingTime]) -> Table:
    """Return a table of settings that fit into a time budget, those with the most steps first."""
    heads = ("precision", "tokens\nper pass", "check-\npointing", "data.rows", "epochs", "steps", "memory", "time")
    result = table(heads, padding=(0, 1, 0, 0))
    for fitting in candidates:
        execution = (fitting.precision, str(fitting.tokens_per_pass), "on" if fitting.checkpointing else "off")
        amount = ("all" if fitting.rows is None else f"{fitting.rows:,}", f"{fitting.epochs:g}", f"{fitting.steps:,}")
        cost = (gigabytes(fitting.plan.peak_resident_bytes), duration(fitting.seconds))
        add_row(result, (*execution, *amount, *cost))
    return result


def budget_table(candidates: Sequence[FittingPlan]) -> Table:
    """Return a table of settings that fit a budget, fastest first."""
    result = table(("method", "rank", "tokens per pass", "checkpointing", "precision", "process", "time"))
    for candidate in candidates:
        execution = (f"{candidate.tokens_per_pass:,}", "on" if candidate.checkpointing else "off", candidate.precision)
        cost = (gigabytes(candidate.plan.peak_resident_bytes), f"{candidate.seconds / candidates[0].seconds:.2f} x")
        add_row(result, (candidate.method, str(candidate.rank or ""), *execution, *cost))
    return result
