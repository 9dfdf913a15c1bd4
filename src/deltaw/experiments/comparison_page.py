"""Markdown page of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deltaw.experiments.comparison import Comparison, column_titles, failures, findings, method_cells, with_interval
from deltaw.runs.folder import or_empty


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, num_left: int = 1) -> list[str]:
    """Return a table as lines of Markdown, including an empty last line.

    Args:
        num_left: Number of left-aligned columns at the start.
    """
    rule = ["---"] * num_left + ["---:"] * (len(headers) - num_left)
    return [*(f"| {' | '.join(texts)} |" for texts in (headers, rule, *rows)), ""]


def comparison_markdown(comparison: Comparison, figure: str | None = None) -> str:
    """Return the comparison as a Markdown page.

    Args:
        figure: File name of the figure.
    """
    seeds = f"{len(comparison.seeds)} seed{'s' if len(comparison.seeds) != 1 else ''}"
    trained = or_empty(comparison.training_rows, "trained on {:,} rows, ".format)
    scored = f"{trained}{seeds}, scored on {comparison.held_out_rows:,} held-out rows that were not used for any choice"
    cells = [method_cells(comparison, r) for r in comparison.lines if r.error is None]
    setup = f"Model `{comparison.model}`, task {comparison.task}: the same rows and seeds for each method; {scored}."
    length = "Each training continued until its validation loss flattened or the budget ended."
    table = markdown_table(column_titles(comparison), cells)
    points = [f"- {line}" for line in [*findings(comparison), *failures(comparison)]]
    lines = ["# Methods compared", "", f"{setup} {length}", "", *table, *points, ""]
    if figure is not None:
        lines += [f"![score and peak memory by method]({figure})", ""]
    return "\n".join([*lines, *_seed_table(comparison), *_rate_table(comparison)])


def _seed_table(comparison: Comparison) -> list[str]:
    """Return a table with a row per training of a comparison with several seeds."""
    rows = []
    for result in comparison.results if len(comparison.seeds) > 1 else ():
        for seed in result.seeds:
            score = "" if seed.score is None else with_interval(comparison, seed.score, None)
            steps = [f"{seed.steps:,}", f"{seed.best_step:,}"]
            flat = "yes" if seed.flattened else "no"
            rows.append([result.method, str(seed.seed), score, *steps, flat, f"{seed.validation_loss:.4f}"])
    metric = comparison.metric.replace("_", " ")
    heads = ("method", "seed", metric, "steps", "best step", "flattened", "validation loss")
    return ["## Seed by seed", "", *markdown_table(heads, rows)] if rows else []


def _rate_table(comparison: Comparison) -> list[str]:
    rows = []
    for result in comparison.results:
        losses = {rate: "diverged" if loss is None else f"{loss:.4f}" for rate, loss in sorted(result.rates)}
        if len(losses) > 1:
            rows.append((result.method, ", ".join(f"{rate:g}: {loss}" for rate, loss in losses.items())))
    explanation = "The loss is the lowest on the validation rows, with the first seed and a share of the budget."
    table = markdown_table(("method", "rate: validation loss"), rows, num_left=2)
    return ["## Learning rates tried", "", *table, explanation, ""] if rows else []
