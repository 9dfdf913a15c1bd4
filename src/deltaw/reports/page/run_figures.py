"""The figures of one run's page: its curves, its memory, its rows, and the search of its learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from deltaw.data.report import count_of
from deltaw.reports.page.svg import (
    Bar,
    Curve,
    Figure,
    Numbers,
    bars,
    evenly,
    histogram,
    legend_of,
    line_chart,
    smoothed,
    swatch,
    thinned,
)
from deltaw.reports.plan import PARTS
from deltaw.reports.wording import count, gigabytes, metric_name, metric_value, short, tick
from deltaw.runs.folder import Run, number, numbers, sequence

# Rows of the table behind a curve.
ROWS = 40
# Reward functions that have a color of their own.
MOST_FUNCTIONS = 8
# A range test is drawn up to so many times the height from its lowest point to its first; beyond, it runs away.
ABOVE_FIRST = 1.5
# The word for the horizontal axis of all curves over a run.
STEP = "step"


_GENERAL = "The loss on the base model's own answers that each step also learns (train.keep_general)."
_LENGTH = "Tokens of the completions of each step, the mean."
_CUT = "The share of completions that were cut at reward.max_new_tokens."
_TEACHING = "The share of groups whose rewards differ. Only these teach something."
_CLIPPED = "The share of tokens whose probability had changed too far to count."
_KL = "How far the model is from the base model on what it writes."
_MISMATCH = "How far the log-probabilities of the decoding engine are from the training's, for the same tokens."
# Columns of the metrics with a figure: title, what it shows, unit of the vertical axis, and whether it is smoothed.
COLUMNS = {
    "length": ("Length of completions", _LENGTH, "tokens", True),
    "teaching_groups": ("Groups that teach", _TEACHING, "share of groups", True),
    "cut_share": ("Cut completions", _CUT, "share of completions", True),
    "kl": ("Divergence from the base model", _KL, "KL, nats per token", True),
    "clip_share": ("Clipped tokens", _CLIPPED, "share of tokens", True),
    "mismatch": ("Mismatch of engine and training", _MISMATCH, "mean difference, nats", True),
    "learning_rate": ("Learning rate", "The learning rate that each step used.", "learning rate", False),
    "gradient_norm": ("Gradient norm", "The gradient's norm at each step, before clipping.", "gradient norm", True),
    "general_loss": ("General answers", _GENERAL, "loss, nats per token", True),
}


def curve_figures(record: Run) -> list[Figure]:
    """The reward or the loss first, then what else was measured over the steps."""
    *rewarded, rate, gradient, general = (column_figure(record, name) for name in COLUMNS)
    rewards = [reward_figure(record), functions_figure(record), *rewarded]
    figures = [*rewards, loss_figure(record), *metric_figures(record), rate, gradient, speed_figure(record), general]
    return [figure for figure in figures if figure is not None]


def over_steps(
    identity: str, title: str, text: str, said: str, curves: list[Curve], numbers: Numbers, **axis: Any
) -> Figure:
    """Curves over the steps of a run.

    Args:
        said: what is drawn, in a sentence. axis: of :func:`deltaw.reports.page.svg.line_chart`.
    """
    axis = {"x_format": _step, "y_format": tick, "x_from": 0, "x_name": f"{STEP} ", **axis}
    drawn = line_chart(identity, f"{title} over steps", said, curves, **axis)
    return Figure(identity, title, text, drawn, numbers, legend_of(curves))


def loss_figure(record: Run) -> Figure | None:
    """Training loss, raw and smoothed, with the held-out loss."""
    steps, losses = record.metrics.column("loss")
    if not len(steps):
        return None
    mean = smoothed(losses)
    held_out = dict(record.held_out_losses)
    curves = [
        Curve(points_of(steps, losses), "c1 raw", "training, each step"),
        Curve(points_of(steps, mean), "c1", "training, running mean"),
    ]
    said = f"The training loss went from {short(mean[0])} to {short(mean[-1])} over {len(steps):,} steps"
    if held_out:
        points = [(float(step), value) for step, value in held_out.items()]
        curves.append(Curve(points, "c2", "held-out rows", dots=True))
        said += f"; on rows held out it was {short(record.held_out_losses[-1][1])} at the last evaluation"
    rows = []
    for place in _rows_with(steps, held_out):
        step = int(steps[place])
        of_held_out = short(held_out[step]) if step in held_out else ""
        rows.append((f"{step:,}", short(losses[place]), short(mean[place]), of_held_out))
    head = ("step", "loss", "running mean", "held-out")
    table = Numbers("Loss by step", head, rows, _selected(len(steps), len(rows)))
    return over_steps("loss", "Loss", said + ".", said, curves, table, height=280)


def reward_figure(record: Run) -> Figure | None:
    """The reward of each step's completions, its running mean, its 95 % interval, and that of held-out prompts."""
    steps, rewards = record.metrics.column("reward")
    if not len(steps):
        return None
    mean, held_out = smoothed(rewards), dict(record.metrics.evaluated("reward"))
    known, half = record.metrics.column("reward_error")
    errors = dict(zip(known.tolist(), half.tolist(), strict=True))
    curves = [
        Curve(points_of(steps, rewards), "c1 raw", "completions of each step"),
        Curve(points_of(steps, mean), "c1", "running mean"),
    ]
    if len(known):
        around, half = np.interp(known, steps, mean), smoothed(half)
        lowest = min(0.0, float(rewards.min()))
        curves.append(
            Curve(
                points_of(known, np.maximum(around - half, lowest)),
                "c8 raw",
                "95 % interval of a step, over its groups",
            )
        )
        curves.append(Curve(points_of(known, around + half), "c8 raw"))
    said = f"The mean reward went from {short(mean[0])} to {short(mean[-1])} over {len(steps):,} steps"
    if (error := errors.get(steps[-1])) is not None:
        said += f"; over the groups of the last step it is {short(rewards[-1])} ± {short(error)} (95 % interval)"
    if held_out:
        curves.append(Curve([(float(s), value) for s, value in held_out.items()], "c2", "held-out, greedy", dots=True))
        said += f"; greedy completions of held-out prompts had {short([*held_out.values()][-1])} at last"
    rows = []
    for place in _rows_with(steps, held_out):
        step = int(steps[place])
        error, of_held_out = errors.get(steps[place]), held_out.get(step)
        told = "" if error is None else f"± {short(error)}"
        rows.append((f"{step:,}", short(rewards[place]), told, "" if of_held_out is None else short(of_held_out)))
    head = ("step", "reward", "95 % interval over groups", "held-out, greedy")
    table = Numbers("Reward by step", head, rows, _selected(len(steps), len(rows)))
    return over_steps("reward", "Reward", said + ".", said, curves, table, height=280, log=False)


def functions_figure(record: Run) -> Figure | None:
    """What each of several functions gave, as running means."""
    curves, rows = [], []
    for place, name in enumerate(record.metrics.rewards()[:MOST_FUNCTIONS], 1):
        steps, values = record.metrics.column(name)
        if not len(steps):
            continue
        mean, function = smoothed(values), name.removeprefix("reward ")
        curves.append(Curve(points_of(steps, mean), f"c{place}", function))
        _, errors = record.metrics.column(name.replace("reward", "reward_error", 1))
        told = f"± {short(errors[-1])}" if len(errors) else ""
        rows.append((function, short(values[0]), short(values[-1]), told, short(mean[-1])))
    if not curves:
        return None
    said = "What each reward function gave on average, without its weight, as a running mean"
    head = ("function", "first step", "last step", "95 % interval over groups", "running mean")
    table = Numbers("Reward by function", head, rows)
    return over_steps("functions", "Reward by function", said + ".", said, curves, table, log=False)


def metric_figures(record: Run) -> list[Figure]:
    """Metrics of the held-out rows that were evaluated more than once, apart from the loss."""
    figures: list[Figure] = []
    for name in record.metrics.metric_names():
        found = record.metrics.evaluated(name)
        last = name.rpartition("/")[2]
        told = name in (record.loss_metric, "reward") or last == "perplexity" or last.startswith("passages_")
        if told or len(found) < 2 or len(figures) >= 8:
            continue
        unit = metric_name(name)
        title = unit[:1].upper() + unit[1:] if unit.islower() else unit
        first, last = (metric_value(name, found[place][1]) for place in (0, -1))
        said = f"{title} on held-out rows, from {first} to {last}"
        points = points_of(*np.array(found, dtype=float).T)
        rows = [(f"{found[i][0]:,}", metric_value(name, found[i][1])) for i in evenly(len(found), ROWS)]
        table = Numbers(f"{title} by step", ("step", unit), rows, _selected(len(found), len(rows)))
        curves = [Curve(points, "c2", dots=len(points) < 100)]
        axis: dict[str, Any] = {"y_format": value_format(name), "log": False}
        figures.append(over_steps(f"metric-{len(figures) + 1}", title, said + ".", said, curves, table, **axis))
    return figures


def column_figure(record: Run, column: str) -> Figure | None:
    """One of :data:`COLUMNS` over the steps; None where there is none."""
    steps, values = record.metrics.column(column)
    title, text, unit, smooth = COLUMNS[column]
    if not len(steps):
        return None
    return _figure_of(column.replace("_", "-"), title, text, unit, steps, values, smooth)


def speed_figure(record: Run) -> Figure | None:
    """Tokens a second, step by step."""
    steps, seconds = record.metrics.column("seconds")
    if not len(steps):
        return None
    tokens = record.metrics.columns["tokens"][np.isfinite(record.metrics.columns["seconds"])]
    there = (seconds > 0) & np.isfinite(tokens)
    if not there.any():
        return None
    steps, seconds, tokens = steps[there], seconds[there], tokens[there]
    overall = count(tokens.sum() / seconds.sum())
    text = f"Tokens of the data that went through each second; {overall} over the whole run."
    from_zero = {"from_zero": True, "log": False}
    return _figure_of("speed", "Speed", text, "tokens per second", steps, tokens / seconds, True, **from_zero)


def _figure_of(
    identity: str, title: str, text: str, unit: str, steps: np.ndarray, values: np.ndarray, smooth: bool, **axis: Any
) -> Figure:
    mean = smoothed(values) if smooth else values
    curves = [Curve(points_of(steps, mean), "c1", "running mean" if smooth else "")]
    if smooth:
        curves.insert(0, Curve(points_of(steps, values), "c1 raw", "each step"))
    said = f"{unit} from {short(values[0])} at step {steps[0]:,.0f} to {short(values[-1])} at {steps[-1]:,.0f}"
    rows = [(f"{steps[i]:,.0f}", short(values[i])) for i in evenly(len(steps), ROWS)]
    table = Numbers(f"{title} by step", ("step", unit), rows, _selected(len(steps), len(rows)))
    return over_steps(identity, title, text, said, curves, table, **axis)


def memory_figure(record: Run) -> Figure | None:
    """Planned memory by part, and what was measured; None where nothing was planned or measured."""
    plan, peak = record.part("plan"), record.peak_bytes
    parts = plan.get("parts")
    if not isinstance(parts, Mapping) or not record.planned_bytes:
        return None
    planned = record.planned_bytes
    sizes = {name: found for name, size in parts.items() if (found := number(size)) is not None}
    sizes["process"] = max(0.0, planned - (number(plan.get("peak_bytes")) or sum(sizes.values())))
    drawn = [(f"p{n}", label, sizes.get(name, 0.0)) for n, (name, label, *_) in enumerate(PARTS, 1)]
    drawn = [part for part in drawn if part[2] > 0]
    given = [Bar("planned", gigabytes(planned), drawn)]
    text = f"{gigabytes(planned)} planned before the run began"
    if peak:
        given.append(Bar("measured", gigabytes(peak), [("measured", "measured", float(peak))]))
        off = (peak - planned) / planned
        text += f"; {gigabytes(peak)} measured at its peak, {abs(off):.1%} {'more' if off > 0 else 'less'}"
    if limit := number(plan.get("limit_bytes")):
        text += f". The machine gives {gigabytes(int(limit))}"
    sums = [("planned in all", planned), ("measured at the peak", peak)]
    sized = [*[(label, size) for _, label, size in drawn], *[(label, size) for label, size in sums if size]]
    rows = [(label, gigabytes(int(size)), f"{size / planned:.1%}") for label, size in sized]
    table = Numbers("Memory at the peak by part", ("part", "size", "of the plan"), rows)
    legend = [(swatch(kind, area=True), label) for kind, label, size in drawn if size > 0.005 * planned]
    title = "Memory planned and measured"
    return Figure("memory", title, text + ".", bars("memory", title, text, given), table, legend)


def length_figure(record: Run) -> Figure | None:
    """How long the rows are."""
    lengths = record.part("data").get("lengths")
    if not isinstance(lengths, Mapping):
        return None
    edges, counts = ([int(n) for n in numbers(sequence(lengths.get(key)))] for key in ("edges", "rows"))
    if len(edges) < 2 or len(edges) != len(counts) + 1:
        return None
    median, labels, sampled, of = (number(lengths.get(key)) for key in ("median", "labels_median", "sampled", "of"))
    text = f"Tokens of the training rows; half of them have up to {count(median)}"
    if labels:
        text += f"; the median row has {count_of(int(labels), 'label')}"
    if sampled != of:
        text += f" ({count(sampled)} rows of {count(of)})"
    title, rows = "Rows by number of tokens", []
    for (start, end), held in zip(pairwise(edges), counts, strict=True):
        rows.append((f"{start:,} to {end - 1:,}" if end - start > 1 else f"{start:,}", f"{held:,}"))
    drawn = histogram("lengths", title, text, edges, counts)
    return Figure("lengths", "How long the rows are", text + ".", drawn, Numbers(title, ("tokens", "rows"), rows))


def rate_figure(told: Mapping[str, Any]) -> Figure | None:
    """The range test of the learning rate: loss over the rate tried; None where there was none.

    Args:
        told: as :class:`deltaw.training.callbacks.RateSearch` has it.
    """
    losses, mean = _over_rates(told, "losses"), _over_rates(told, "smoothed")
    if len(losses) < 2:
        return None
    chosen, usual = number(told.get("chosen")), number(told.get("usual"))
    text = f"Loss while the learning rate rose from {losses[0][0]:.2g} to {losses[-1][0]:.2g}"
    if chosen is not None:
        text += f"; {chosen:.2g} was chosen"
    if usual is not None:
        text += f", and {usual:.2g} is usual"
    if isinstance(told.get("why"), str):
        text += f" ({told['why']})"
    lowest, first = min(loss for _, loss in [*losses, *mean]), (mean or losses)[0][1]
    highest = lowest + ABOVE_FIRST * max(first - lowest, 1e-6)
    highest = max(highest, *(loss for _, loss in losses[: max(1, len(losses) // 2)]))
    curves = [
        Curve([(rate, min(loss, highest)) for rate, loss in points], kind, name)
        for points, kind, name in ((losses, "c1 raw", "each step"), (mean or losses, "c1", "smoothed"))
    ]
    for rate, kind, name in ((chosen, "c2", "chosen"), (usual, "c3", "usual")):
        if rate is not None and rate > 0:
            curves.append(Curve([(rate, lowest), (rate, highest)], kind, f"{name} {rate:.2g}"))
    by_rate, shown = dict(mean), [losses[place] for place in evenly(len(losses), ROWS)]
    rows = [(f"{rate:.3g}", short(loss), short(by_rate.get(rate))) for rate, loss in shown]
    table = Numbers("Loss by learning rate", ("learning rate", "loss", "smoothed"), rows)
    axes: dict[str, Any] = {"x_format": "{:.0e}".format, "y_format": tick, "log": False, "log_x": True}
    drawn = line_chart("rate-search", "Loss over learning rate", text, curves, x_name="learning rate ", **axes)
    return Figure("rate-search", "Search of the learning rate", text + ".", drawn, table, legend_of(curves))


def _over_rates(told: Mapping[str, Any], name: str) -> list[tuple[float, float]]:
    """Learning rate and loss of each step of a search, by rate."""
    pairs = zip(sequence(told.get("rates")), sequence(told.get(name)), strict=False)
    found = [(number(rate), number(loss)) for rate, loss in pairs]
    return sorted((rate, loss) for rate, loss in found if rate is not None and loss is not None and rate > 0)


def points_of(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """A curve's points, thinned."""
    thin_x, thin_y = thinned(x, y)
    return list(zip(thin_x.tolist(), thin_y.tolist(), strict=True))


def _rows_with(steps: np.ndarray, evaluated: Mapping[int, float]) -> list[int]:
    """Places for a table: evenly spread, and those of some evaluations."""
    places = set(evenly(len(steps), ROWS // 2))
    index = {int(step): place for place, step in enumerate(steps)} if evaluated else {}
    known = [index[step] for step in evaluated if step in index]
    return sorted(places | {known[i] for i in evenly(len(known), ROWS // 2)})


def _selected(there: int, shown: int) -> str:
    return f"{shown} of {there:,}, evenly spread; all are in metrics.jsonl" if shown < there else ""


def _step(value: float) -> str:
    return f"{STEP} {value:,.0f}" if value == 0 else f"{value:,.0f}"


def value_format(metric: str) -> Callable[[float], str]:
    """How values of a metric stand at an axis."""
    share = metric_value(metric, 0.5).endswith("%")
    return lambda value: f"{100 * value:.4g}%" if share else tick(value)
