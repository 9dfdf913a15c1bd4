"""Tables of measured figures: the rows that a page shows for the results of a benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Models of the table "sizes" by the file with their speed, and the side of this file.
SIZES = {
    "SmolLM2-135M": ("step", "deltaw-auto"),
    "Qwen2.5-0.5B": ("step-qwen2.5-0.5b", "deltaw-auto"),
    "Llama-3.2-1B": ("large", "deltaw llama-3.2-1b nf4"),
    "Llama-3.2-3B": ("large", "deltaw llama-3.2-3b nf4"),
    "Llama-3.1-8B": ("large", "deltaw llama-3.1-8b nf4"),
    "Qwen3-8B": ("large", "deltaw qwen3-8b nf4"),
}
STEP_FILES = [file for file, _ in SIZES.values() if file.startswith("step")]
Rows = Iterator[Sequence[str]]


def step_table(results: dict[str, list[dict[str, Any]]]) -> Rows:
    yield "side", "tokens/s", "times PEFT's fastest", "peak memory"
    rates = {name: [run["tokens_per_second"] for run in runs] for name, runs in results.items()}
    for name, runs in results.items():
        peak = gigabytes(runs, "peak_bytes") if "peak_bytes" in runs[0] else ""  # the floor has no peak
        yield name, f"{statistics.median(rates[name]):.0f}", times(rates, name, "peft"), peak


def sft_table(all_results: dict[str, dict[str, list[dict[str, Any]]]]) -> Rows:
    yield "rows, side", "rows/s", "times TRL's fastest", "peak memory", "evaluation loss"
    for data, data_results in all_results.items():
        sides = {key.split("|")[1]: runs for key, runs in data_results.items()}
        rates = {name: [run["rows_per_second"] for run in runs] for name, runs in sides.items()}
        for name, runs in sides.items():
            loss = median_of(runs, "held_out_loss")
            speed = statistics.median(rates[name])
            peak = gigabytes(runs, "peak_bytes")
            yield f"{data}, {name}", f"{speed:.1f}", times(rates, name, "TRL"), peak, f"{loss:.4f}"


def decode_table(results: dict[str, dict[str, list[float]]]) -> Rows:
    yield "prompts at once, side", "tokens/s", "times llama.cpp"
    for count, rates in results.items():
        for name in rates:
            yield f"{count}, {name}", f"{statistics.median(rates[name]):.0f}", times(rates, name, "llama.cpp")


def preferences_table(all_results: dict[str, dict[str, list[dict[str, Any]]]]) -> Rows:
    yield "side", "pairs/s, steps only", "times TRL's fastest", "pairs/s with the reference", "peak memory"
    for results in all_results.values():
        rates = {name: [run["steps"] for run in runs] for name, runs in results.items()}
        for name, runs in results.items():
            speeds = (f"{statistics.median(rates[name]):.2f}", times(rates, name, "TRL"))
            yield name, *speeds, f"{median_of(runs, 'whole'):.2f}", gigabytes(runs, "peak_bytes")


def rewards_table(results: dict[str, list[dict[str, Any]]]) -> Rows:
    yield "side", "seconds per step", "times TRL's fastest", "sampled tokens", "peak memory"
    rates = {name: [1 / run["seconds"] for run in runs] for name, runs in results.items()}
    for name, runs in results.items():
        cells = (f"{median_of(runs, 'seconds'):.1f}", times(rates, name, "TRL"), f"{median_of(runs, 'tokens'):.0f}")
        yield name, *cells, gigabytes(runs, "peak")


def quantized_table(results: dict[str, list[dict[str, Any]]]) -> Rows:
    yield "side", "tokens/s", "times PEFT over bitsandbytes", "peak memory", "loss"
    rates = {name: [run["tokens_per_second"] for run in runs] for name, runs in results.items()}
    for name, runs in results.items():
        cells = (f"{statistics.median(rates[name]):.0f}", times(rates, name, "bitsandbytes"))
        yield name, *cells, gigabytes(runs, "peak_bytes"), f"{median_of(runs, 'loss'):.4f}"


def embeddings_table(results: dict[str, list[dict[str, Any]]]) -> Rows:
    yield "side", "rows/s", "times the fastest of sentence-transformers", "peak memory"
    rates = {name: [run["rows"] / run["seconds"] for run in runs] for name, runs in results.items()}
    for name, runs in results.items():
        speed = f"{statistics.median(rates[name]):.0f}"
        yield name, speed, times(rates, name, "sentence-transformers"), gigabytes(runs, "peak")


LARGE_HEAD = ("side", "peak", "planned", "step", "planned", "tokens/s", "of the limit", "1,000 rows", "run, planned")


def large_row(result: dict[str, Any]) -> Sequence[str]:
    """Return a row of the table of large models. A planned value is followed by its error."""
    peak = result["peak"]
    step = result["step"]
    cells = [result["side"], f"{peak / 1e9:.2f} GB", "", f"{step:.1f} s", "", f"{result['tokens_per_second']:.1f}", ""]
    cells += [f"{result['total'] / 60:.0f} min", ""]
    if "planned_peak" in result:
        cells[2] = f"{result['planned_peak'] / 1e9:.2f} GB, {result['planned_peak'] / peak - 1:+.1%}"
        cells[4] = f"{result['planned_step']:.1f} s, {result['planned_step'] / step - 1:+.0%}"
        cells[6] = f"{result['limit_seconds'] / step:.0%}"
        cells[8] = f"{result['planned_run'] / result['run'] - 1:+.0%}"
    return cells


def large_table(results: list[dict[str, Any]]) -> Rows:
    yield LARGE_HEAD
    yield from map(large_row, results)


def memory_table(rows: list[dict[str, Any]]) -> Rows:
    yield "run", "planned", "measured", "error"
    errors = []
    for row in rows:
        changes = ", ".join(f"{key.rpartition('.')[2]}={text}" for key, text in row["settings"].items())
        planned = row["planned_resident"]
        measured = row["resident"]
        errors.append(planned / measured - 1)
        name = f"{row['model']}, {row['method']}{', ' if changes else ''}{changes}"
        yield name, f"{planned / 1e9:.2f} GB", f"{measured / 1e9:.2f} GB", f"{errors[-1]:+.1%}"
    mean = statistics.fmean(map(abs, errors))
    worst = max(errors, key=abs)
    yield "mean of the absolute errors", "", "", f"{mean:.1%}"
    yield "largest error", "", "", f"{worst:+.1%}"


def times_table(rows: list[dict[str, Any]]) -> Rows:
    yield "run", "predicted", "measured", "error", "error per step"
    all_errors = []
    for row in rows:
        changes = ", ".join(f"{key.rpartition('.')[2]}={text}" for key, text in row["settings"].items())
        errors = [row[f"planned_{name}"] / row[name] - 1 for name in ("seconds", "seconds_per_step")]
        all_errors.append(errors)
        name = f"{row['model']}, {row['method']}{', ' if changes else ''}{changes}"
        predicted = f"{row['planned_seconds']:.0f} s"
        measured = f"{row['seconds']:.0f} s"
        yield name, predicted, measured, *(f"{error:+.0%}" for error in errors)
    columns = [list(map(abs, column)) for column in zip(*all_errors, strict=True)]
    yield "mean of the absolute errors", "", "", *(f"{statistics.fmean(column):.0%}" for column in columns)
    yield "largest error", "", "", *(f"{max(column):.0%}" for column in columns)


def gpu_table(all_results: dict[str, dict[str, dict[str, list[dict[str, Any]]]]]) -> Rows:
    yield "model, rows, side", "rows/s", "times the fastest peer", "peak", "planned", "loss difference", "launches"
    for size, by_kind in all_results.items():
        for kind, by_side in by_kind.items():
            sides = {name: [run for run in runs if "error" not in run] for name, runs in by_side.items()}
            rates = {name: median_of(runs, "rows_per_second") for name, runs in sides.items() if runs}
            best = max((rate for name, rate in rates.items() if name != "deltaw"), default=None)
            for name, runs in sides.items():
                label = f"{size}, {kind}, {name}"
                if not runs:
                    yield label, by_side[name][-1]["error"].partition(":")[0], *[""] * 5
                    continue
                planned = gigabytes(runs, "planned_bytes") if runs[0].get("planned_bytes") else ""
                difference = loss_difference(sides.get("deltaw", []), runs)
                texts = (f"{rates[name] / best:.2f}" if best else "", gigabytes(runs, "peak_bytes"), planned)
                loss = "" if difference is None or name == "deltaw" else f"{difference:.4f}"
                yield label, f"{rates[name]:.2f}", *texts, loss, str(runs[0].get("launches", ""))


def loss_difference(runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> float | None:
    """Return the largest difference of the losses of two sides over the steps of both, or None without results."""
    losses = [side[0]["losses"] for side in (runs, others) if side and "losses" in side[0]]
    return max(abs(a - b) for a, b in zip(*losses, strict=False)) if len(losses) == 2 else None


def fits_table(rows: list[list[str]]) -> Rows:
    yield from rows


TABLES: dict[str, Callable[[Any], Rows]] = dict.fromkeys(STEP_FILES, step_table) | {
    name.removesuffix("_table"): function for name, function in list(globals().items()) if name.endswith("_table")
}


def times(rates: dict[str, list[float]], name: str, peer: str) -> str:
    """Return the median ratio of a side to the peer's fastest side, round by round."""
    best = max((n for n in rates if n.startswith(peer)), key=lambda n: statistics.median(rates[n]), default=None)
    if best is None:
        return ""
    return f"{statistics.median(a / b for a, b in zip(rates[name], rates[best], strict=True)):.2f}"


def median_of(runs: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def gigabytes(runs: Sequence[dict[str, Any]], key: str) -> str:
    return f"{median_of(runs, key) / 1e9:.2f} GB"
