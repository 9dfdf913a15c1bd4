"""Figures of a run's page: training curves, memory, row lengths and the learning-rate range test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from deltaw.data.report import count_of
from deltaw.reports.memory_parts import memory_legend, memory_parts
from deltaw.reports.svg import (
    Bar,
    ChartSeries,
    Figure,
    FigureTable,
    bars,
    build_legend,
    downsample,
    evenly_spaced,
    histogram,
    line_chart,
    running_mean,
    stack,
)
from deltaw.reports.tables import count, gigabytes, metric_name, metric_value, short, tick
from deltaw.runs.folder import Run, number, numbers, sequence

# Maximum number of rows in the table of a curve.
ROWS = 40
# Number of reward functions with distinct colors.
MAX_REWARD_FUNCTIONS = 8
# Losses of a range test are clipped at this multiple of the distance from the lowest to the first loss.
RANGE_TEST_HEIGHT = 1.5
# Label of the horizontal axis of training curves.
STEP = "step"


_GENERAL = "Divergence from the base model on its answers to general prompts, which train.keep_general limits."
_LENGTH = "Mean number of tokens in the completions of each step."
_CUT = "Share of completions truncated at reward.max_new_tokens."
_TEACHING = "Share of groups whose rewards differ. Only these groups have an advantage."
_CLIPPED = "Share of tokens whose probability ratio was outside the clipping range."
_KL = "Divergence between the model and the base model on the model's completions."
_MISMATCH = "Difference between the log-probabilities of the decoding engine and of training, for the same tokens."
# Metric columns with a figure: title, description, unit of the vertical axis, and if a running mean is plotted.
COLUMNS = {
    "length": ("Length of completions", _LENGTH, "tokens", True),
    "groups_with_advantage": ("Groups with differing rewards", _TEACHING, "share of groups", True),
    "truncated_share": ("Truncated completions", _CUT, "share of completions", True),
    "kl": ("Divergence from the base model", _KL, "KL, nats per token", True),
    "clip_share": ("Clipped tokens", _CLIPPED, "share of tokens", True),
    "mismatch": ("Mismatch of engine and training", _MISMATCH, "mean difference, nats", True),
    "learning_rate": ("Learning rate", "Learning rate of each step.", "learning rate", False),
    "gradient_norm": ("Gradient norm", "Gradient norm of each step before clipping.", "gradient norm", True),
    "general_loss": ("General answers", _GENERAL, "KL, nats per token", True),
}


def curve_figures(record: Run) -> list[Figure]:
    """Return all figures over steps: reward and loss first, then the other metrics."""
    *rewarded, rate, gradient, general = (column_figure(record, name) for name in COLUMNS)
    rewards = [reward_figure(record), reward_functions_figure(record), *rewarded]
    figures = [*rewards, loss_figure(record), *metric_figures(record), rate, gradient, speed_figure(record), general]
    return [figure for figure in figures if figure is not None]


def step_figure(
    identity: str, title: str, text: str, description: str, curves: list[ChartSeries], numbers: FigureTable, **axis: Any
) -> Figure:
    """Return a figure of curves over training steps.

    Args:
        description: Sentence that describes the drawing.
        **axis: Options of :func:`deltaw.reports.svg.line_chart`.
    """
    axis = {"x_format": _step, "y_format": tick, "x_from": 0, "x_name": f"{STEP} ", **axis}
    chart = line_chart(identity, f"{title} over steps", description, curves, **axis)
    return Figure(identity, title, text, chart, numbers, build_legend(curves))


def loss_figure(record: Run) -> Figure | None:
    """Plot the training loss, its running mean and the held-out loss."""
    steps, losses = record.metrics.column("loss")
    if not len(steps):
        return None
    mean = running_mean(losses)
    held_out = dict(record.held_out_losses)
    curves = [
        ChartSeries(downsampled_points(steps, losses), "c1 raw", "training, each step"),
        ChartSeries(downsampled_points(steps, mean), "c1", "training, running mean"),
    ]
    description = f"The training loss changed from {short(mean[0])} to {short(mean[-1])} over {len(steps):,} steps"
    if held_out:
        points = [(float(step), value) for step, value in held_out.items()]
        curves.append(ChartSeries(points, "c2", "held-out rows", dots=True))
        description += f"; the held-out loss was {short(record.held_out_losses[-1][1])} at the last evaluation"
    rows = []
    for index in _rows_with(steps, held_out):
        step = int(steps[index])
        held_out_loss = short(held_out[step]) if step in held_out else ""
        rows.append((f"{step:,}", short(losses[index]), short(mean[index]), held_out_loss))
    head = ("step", "loss", "running mean", "held-out")
    table = FigureTable("Loss by step", head, rows, _selected(len(steps), len(rows)))
    return step_figure("loss", "Loss", description + ".", description, curves, table, height=280)


def reward_figure(record: Run) -> Figure | None:
    """Plot the mean reward of each step, its running mean and 95% interval, and the reward of held-out prompts."""
    steps, rewards = record.metrics.column("reward")
    if not len(steps):
        return None
    mean = running_mean(rewards)
    held_out = dict(record.metrics.evaluated("reward"))
    error_steps, half_width = record.metrics.column("reward_error")
    errors = dict(zip(error_steps.tolist(), half_width.tolist(), strict=True))
    curves = [
        ChartSeries(downsampled_points(steps, rewards), "c1 raw", "completions of each step"),
        ChartSeries(downsampled_points(steps, mean), "c1", "running mean"),
    ]
    if len(error_steps):
        center = np.interp(error_steps, steps, mean)
        half_width = running_mean(half_width)
        curves.append(
            ChartSeries(
                downsampled_points(error_steps, np.maximum(center - half_width, min(0.0, float(rewards.min())))),
                "c8 raw",
                "95 % interval of a step, over its groups",
            )
        )
        curves.append(ChartSeries(downsampled_points(error_steps, center + half_width), "c8 raw"))
    description = f"The mean reward changed from {short(mean[0])} to {short(mean[-1])} over {len(steps):,} steps"
    if (error := errors.get(steps[-1])) is not None:
        description += f"; over the groups of the last step it is {short(rewards[-1])} ± {short(error)} (95 % interval)"
    if held_out:
        points = [(float(step), value) for step, value in held_out.items()]
        curves.append(ChartSeries(points, "c2", "held-out, greedy", dots=True))
        description += f"; greedy completions of held-out prompts got {short(points[-1][1])} in the last evaluation"
    rows = []
    for index in _rows_with(steps, held_out):
        step = int(steps[index])
        error = errors.get(steps[index])
        evaluated = held_out.get(step)
        interval = "" if error is None else f"± {short(error)}"
        rows.append((f"{step:,}", short(rewards[index]), interval, "" if evaluated is None else short(evaluated)))
    head = ("step", "reward", "95 % interval over groups", "held-out, greedy")
    table = FigureTable("Reward by step", head, rows, _selected(len(steps), len(rows)))
    return step_figure("reward", "Reward", description + ".", description, curves, table, height=280, log=False)


def reward_functions_figure(record: Run) -> Figure | None:
    """Plot the running mean of each reward function of a run with several functions."""
    curves = []
    rows = []
    for index, name in enumerate(record.metrics.rewards()[:MAX_REWARD_FUNCTIONS], 1):
        steps, values = record.metrics.column(name)
        if not len(steps):
            continue
        mean = running_mean(values)
        function = name.removeprefix("reward ")
        curves.append(ChartSeries(downsampled_points(steps, mean), f"c{index}", function))
        _, errors = record.metrics.column(name.replace("reward", "reward_error", 1))
        interval = f"± {short(errors[-1])}" if len(errors) else ""
        rows.append((function, short(values[0]), short(values[-1]), interval, short(mean[-1])))
    if not curves:
        return None
    description = "Running mean of each reward function, before weighting"
    head = ("function", "first step", "last step", "95 % interval over groups", "running mean")
    table = FigureTable("Reward by function", head, rows)
    return step_figure("functions", "Reward by function", description + ".", description, curves, table, log=False)


def metric_figures(record: Run) -> list[Figure]:
    """Plot up to eight metrics of the held-out rows that were evaluated more than once, other than the loss."""
    figures: list[Figure] = []
    for name in record.metrics.metric_names():
        values = record.metrics.evaluated(name)
        last = name.rpartition("/")[2]
        is_skipped = name in (record.loss_metric, "reward") or last == "perplexity" or last.startswith("passages_")
        if is_skipped or len(values) < 2 or len(figures) >= 8:
            continue
        unit = metric_name(name)
        title = unit[:1].upper() + unit[1:] if unit.islower() else unit
        first, last = (metric_value(name, values[index][1]) for index in (0, -1))
        text = f"{title} on held-out rows, from {first} to {last}"
        points = downsampled_points(*np.array(values, dtype=float).T)
        rows = [(f"{values[i][0]:,}", metric_value(name, values[i][1])) for i in evenly_spaced(len(values), ROWS)]
        table = FigureTable(f"{title} by step", ("step", unit), rows, _selected(len(values), len(rows)))
        curves = [ChartSeries(points, "c2", dots=len(points) < 100)]
        axis: dict[str, Any] = {"y_format": value_format(name), "log": False}
        figures.append(step_figure(f"metric-{len(figures) + 1}", title, text + ".", text, curves, table, **axis))
    return figures


def column_figure(record: Run, column: str) -> Figure | None:
    """Plot one of :data:`COLUMNS` over the steps, or return None if it was not recorded."""
    steps, values = record.metrics.column(column)
    title, text, unit, smooth = COLUMNS[column]
    return None if not len(steps) else _figure_of(column.replace("_", "-"), title, text, unit, steps, values, smooth)


def speed_figure(record: Run) -> Figure | None:
    """Plot the tokens per second of each step."""
    steps, seconds = record.metrics.column("seconds")
    if not len(steps):
        return None
    tokens = record.metrics.columns["tokens"][np.isfinite(record.metrics.columns["seconds"])]
    valid = (seconds > 0) & np.isfinite(tokens)
    if not valid.any():
        return None
    steps = steps[valid]
    seconds = seconds[valid]
    tokens = tokens[valid]
    text = f"Tokens processed per second; {count(tokens.sum() / seconds.sum())} over the entire run."
    from_zero = {"from_zero": True, "log": False}
    return _figure_of("speed", "Speed", text, "tokens per second", steps, tokens / seconds, True, **from_zero)


def _figure_of(
    identity: str, title: str, text: str, unit: str, steps: np.ndarray, values: np.ndarray, smooth: bool, **axis: Any
) -> Figure:
    mean = running_mean(values) if smooth else values
    curves = [ChartSeries(downsampled_points(steps, mean), "c1", "running mean" if smooth else "")]
    if smooth:
        curves.insert(0, ChartSeries(downsampled_points(steps, values), "c1 raw", "each step"))
    description = f"{unit} from {short(values[0])} at step {steps[0]:,.0f} to {short(values[-1])} at {steps[-1]:,.0f}"
    rows = [(f"{steps[i]:,.0f}", short(values[i])) for i in evenly_spaced(len(steps), ROWS)]
    table = FigureTable(f"{title} by step", ("step", unit), rows, _selected(len(steps), len(rows)))
    return step_figure(identity, title, text, description, curves, table, **axis)


def memory_figure(record: Run) -> Figure | None:
    """Plot planned memory by part and the measured peak of a run with a memory plan."""
    plan = record.part("plan")
    peak = record.peak_bytes
    parts = plan.get("parts")
    if not isinstance(parts, Mapping) or not record.planned_bytes:
        return None
    planned = record.planned_bytes
    sizes = {name: value for name, size in parts.items() if (value := number(size)) is not None}
    sizes["process"] = max(0.0, planned - (number(plan.get("peak_bytes")) or sum(sizes.values())))
    planned_parts = memory_parts(sizes)
    items = [Bar("planned peak", gigabytes(planned), stack(planned_parts))]
    legend = memory_legend(items)
    text = f"Peak memory of the process: {gigabytes(planned)} planned before the run started, colored by part"
    if peak:
        items.append(Bar("measured peak", gigabytes(peak), [("ink", "measured peak", 0.0, float(peak))]))
        deviation = (peak - planned) / planned
        text += f"; {gigabytes(peak)} measured, {abs(deviation):.1%} {'more' if deviation > 0 else 'less'}"
    if limit := number(plan.get("limit_bytes")):
        text += f". {gigabytes(int(limit))} are available on the machine"
    sums = [("planned total", planned), ("measured peak", peak)]
    sized = [*[(label, size) for _, label, size in planned_parts], *[(label, size) for label, size in sums if size]]
    rows = [(label, gigabytes(int(size)), f"{size / planned:.1%}") for label, size in sized]
    table = FigureTable("Peak memory by part", ("part", "size", "share of the plan"), rows)
    title = "Peak memory, planned and measured"
    return Figure("memory", title, text + ".", bars("memory", title, text, items), table, legend)


def length_figure(record: Run) -> Figure | None:
    """Plot a histogram of the number of tokens per training row."""
    lengths = record.part("data").get("lengths")
    if not isinstance(lengths, Mapping):
        return None
    edges, counts = ([int(n) for n in numbers(sequence(lengths.get(key)))] for key in ("edges", "rows"))
    if len(edges) < 2 or len(edges) != len(counts) + 1:
        return None
    median, labels, sampled, total = (number(lengths.get(key)) for key in ("median", "labels_median", "sampled", "of"))
    text = f"Tokens per training row, with a median of {count(median)}"
    if labels:
        text += f"; the median row has {count_of(int(labels), 'label')}"
    if sampled != total:
        text += f" ({count(sampled)} rows of {count(total)})"
    title = "Rows by number of tokens"
    rows = []
    for (start, end), num_rows in zip(pairwise(edges), counts, strict=True):
        rows.append((f"{start:,} to {end - 1:,}" if end - start > 1 else f"{start:,}", f"{num_rows:,}"))
    chart = histogram("lengths", title, text, edges, counts)
    return Figure("lengths", "Row lengths", text + ".", chart, FigureTable(title, ("tokens", "rows"), rows))


def rate_figure(search: Mapping[str, Any]) -> Figure | None:
    """Plot the loss of a learning-rate range test with at least two losses.

    Args:
        search: Fields of :class:`deltaw.training.callbacks.RateSearch`.
    """
    losses = _over_rates(search, "losses")
    mean = _over_rates(search, "smoothed")
    if len(losses) < 2:
        return None
    chosen = number(search.get("chosen"))
    usual = number(search.get("usual"))
    text = f"Loss while the learning rate increased from {losses[0][0]:.2g} to {losses[-1][0]:.2g}"
    if chosen is not None:
        text += f"; {chosen:.2g} was chosen"
    if usual is not None:
        text += f", {usual:.2g} is the default"
    if isinstance(search.get("why"), str):
        text += f" ({search['why']})"
    lowest = min(loss for _, loss in [*losses, *mean])
    first = (mean or losses)[0][1]
    highest = lowest + RANGE_TEST_HEIGHT * max(first - lowest, 1e-6)
    highest = max(highest, *(loss for _, loss in losses[: max(1, len(losses) // 2)]))
    curves = [
        ChartSeries([(rate, min(loss, highest)) for rate, loss in points], kind, name)
        for points, kind, name in ((losses, "c1 raw", "each step"), (mean or losses, "c1", "smoothed"))
    ]
    for rate, kind, name in ((chosen, "c2", "chosen"), (usual, "c3", "usual")):
        if rate is not None and rate > 0:
            curves.append(ChartSeries([(rate, lowest), (rate, highest)], kind, f"{name} {rate:.2g}"))
    by_rate = dict(mean)
    selected = [losses[index] for index in evenly_spaced(len(losses), ROWS)]
    rows = [(f"{rate:.3g}", short(loss), short(by_rate.get(rate))) for rate, loss in selected]
    table = FigureTable("Loss by learning rate", ("learning rate", "loss", "smoothed"), rows)
    axes: dict[str, Any] = {"x_format": "{:.0e}".format, "y_format": tick, "log": False, "log_x": True}
    chart = line_chart("rate-search", "Loss over learning rate", text, curves, x_name="learning rate ", **axes)
    return Figure("rate-search", "Search of the learning rate", text + ".", chart, table, build_legend(curves))


def _over_rates(search: Mapping[str, Any], name: str) -> list[tuple[float, float]]:
    """Return (learning rate, loss) of each step of a search, sorted by rate."""
    pairs = zip(sequence(search.get("rates")), sequence(search.get(name)), strict=False)
    points = [(number(rate), number(loss)) for rate, loss in pairs]
    return sorted((rate, loss) for rate, loss in points if rate is not None and loss is not None and rate > 0)


def downsampled_points(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """Return the points of a downsampled curve."""
    thin_x, thin_y = downsample(x, y)
    return list(zip(thin_x.tolist(), thin_y.tolist(), strict=True))


def _rows_with(steps: np.ndarray, evaluated: Mapping[int, float]) -> list[int]:
    """Return the indices of table rows: evenly spaced steps, and a sample of the evaluated steps."""
    indices = set(evenly_spaced(len(steps), ROWS // 2))
    index_of_step = {int(step): position for position, step in enumerate(steps)} if evaluated else {}
    evaluated_indices = [index_of_step[step] for step in evaluated if step in index_of_step]
    return sorted(indices | {evaluated_indices[i] for i in evenly_spaced(len(evaluated_indices), ROWS // 2)})


def _selected(total: int, selected: int) -> str:
    return f"{selected} of {total:,}, evenly spread; all are in metrics.jsonl" if selected < total else ""


def _step(value: float) -> str:
    return f"{STEP} {value:,.0f}" if value == 0 else f"{value:,.0f}"


def value_format(metric: str) -> Callable[[float], str]:
    """Return the axis formatter of a metric."""
    share = metric_value(metric, 0.5).endswith("%")
    return lambda value: f"{100 * value:.4g}%" if share else tick(value)
