"""Measure this machine, and insert the measured figures into README and the pages in docs.

    python benchmarks/figures.py                # measure everything, then insert: about two hours on 2 cores
    python benchmarks/figures.py step sft       # measure only these
    python benchmarks/figures.py --insert       # measure nothing
    python benchmarks/figures.py --check        # exit with status 1 if a page differs from the files

A measurement is stored as ``docs/figures/NAME.json`` with its command, CPU, versions, commit and date, and replaces the
previous one. Pages refer to it by comments. The text between them is generated::

    <!-- figures: step -->                      a table of the whole file
    <!-- /figures -->
    <!-- figure: step deltaw-auto -->2.06×<!-- /figure -->      one value

``gpu.json`` is written by ``gpu_kit.py`` on a machine with a GPU. Results of the simulated device are rejected.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "figures"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS: dict[str, tuple[str, ...]] = {
    "step": ("step.py", "--in-turns", "--steps", "16"),
    **{
        f"step-{model}": ("step.py", "--model", model, "--sides", "deltaw-auto", "--repeats", "1")
        for model in ("qwen2.5-0.5b", "llama-3.2-1b", "llama-3.2-3b")
    },
    "sft": ("sft.py", "--repeats", "1", "--batch-sizes", "16"),
    "decode": ("decode.py", "--rounds", "3"),
    "preferences": ("preferences.py", "--data", "headlines", "--pairs", "32", "--repeats", "1", "--sides",
                    "deltaw auto", "deltaw int8", "TRL bf16, bf16 factors, reference first",
                    "TRL fp32, reference first"),
    "rewards": ("rewards.py", "--steps", "2", "--repeats", "1", "--sides", "deltaw bf16", "deltaw int8", "TRL bf16"),
    "quantized": ("quantized.py", "--repeats", "1", "--sides", "deltaw-gguf", "deltaw-nf4", "deltaw-bf16",
                  "bitsandbytes-bf16", "bitsandbytes-fp32"),
    "embeddings": ("embeddings.py", "--repeats", "1", "--rows", "512", "--sides", "deltaw auto",
                   "sentence-transformers fp32", "sentence-transformers fp32, sorted", "sentence-transformers bf16"),
    "memory": ("memory.py", "--set", "tasks", "--only", "^(gpt2|bert|roberta|qwen3|smollm2 +lora +batch_size=4) "),
    "times": ("times.py", "--held-out"),
    "fits": ("fits.py",),
}  # fmt: skip
# Models of the table "sizes" by the file with their speed.
SIZES = {
    "SmolLM2-135M": "step",
    "Qwen2.5-0.5B": "step-qwen2.5-0.5b",
    "Llama-3.2-1B": "step-llama-3.2-1b",
    "Llama-3.2-3B": "step-llama-3.2-3b",
    "Qwen3-8B": "",
}
TABLE = re.compile(r"<!-- figures: (\S+) -->\n.*?<!-- /figures -->", re.DOTALL)
VALUE = re.compile(r"<!-- figure: (\S+) (.+?) -->.*?<!-- /figure -->")
Rows = Iterator[Sequence[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*COMMANDS, []], metavar="NAME")
    parser.add_argument("--insert", action="store_true", help="only insert the stored figures")
    parser.add_argument("--check", action="store_true", help="only compare the pages with the stored figures")
    args = parser.parse_args()
    if not (args.insert or args.check):
        for name in args.names or COMMANDS:
            measure(name)
    outdated = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = with_figures(text)
        if filled != text:
            outdated.append(str(page.relative_to(ROOT)))
            if not args.check:
                page.write_text(filled, encoding="utf-8")
    if args.check and outdated:
        sys.exit(f"outdated: {', '.join(outdated)}; run python benchmarks/figures.py --insert")


def measure(name: str) -> None:
    """Run a benchmark, show its output and store its results."""
    from machine import machine_lines

    script, *flags = COMMANDS[name]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), *flags, "--json", str(file)], check=True)
        results = json.loads(file.read_text(encoding="utf-8"))
    record = {
        "command": f"benchmarks/{shlex.join(COMMANDS[name])}",
        "machine": machine_lines(),
        "commit": commit(),
        "date": str(datetime.date.today()),
        "results": results,
    }
    FOLDER.mkdir(exist_ok=True)
    temporary = FOLDER / f".{name}.json"
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, FOLDER / f"{name}.json")


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def stored(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    if record.get("simulated"):
        raise ValueError(f"docs/figures/{name}.json is from the simulated device, not from a GPU: delete it")
    return record


def with_figures(page: str) -> str:
    """Return a page with its tables and values replaced by those of the stored figures."""
    page = TABLE.sub(lambda match: f"<!-- figures: {match[1]} -->\n{table(match[1])}\n<!-- /figures -->", page)
    return VALUE.sub(lambda m: f"<!-- figure: {m[1]} {m[2]} -->{value(m[1], m[2])}<!-- /figure -->", page)


def table(name: str) -> str:
    """Return the Markdown table of a file in docs/figures, with its command, commit, date and machine."""
    if name == "sizes":
        return sizes()
    if name == "gpu" and not (FOLDER / "gpu.json").exists():
        return "There are no results: the benchmark has not run on a GPU yet."
    record = stored(name)
    if "tables" in record:  # copied from older measurements
        parts = [f"**{t['title']}**\n\n{markdown([t['columns'], *t['rows']])}" for t in record["tables"]]
        return "\n\n".join([*parts, f"{record['source']}; {record['date']}; {record['cpu']}."])
    lines = markdown(list(TABLES[name](record["results"])))
    origin = f"`{record['command']}`, {record['date']}, commit {record['commit']}. {' '.join(record['machine'])}"
    notes = [*record.get("notes", ()), *(f"skipped: {stage}" for stage in record.get("skipped", ()))]
    listed = ["\n".join(f"- {note}" for note in notes)] if notes else []
    return "\n\n".join([lines, *listed, f"<small>{origin}</small>"])


def sizes() -> str:
    """Return a table of the planned memory and the training time of some models, from several files."""
    plans = {row[0]: row[1:] for row in stored("fits")["results"]}
    rows = [["model", "bf16", "nf4", "1,000 rows of 256 tokens"]]
    for model, file in SIZES.items():
        speed = _median(stored(file)["results"]["deltaw-auto"], "tokens_per_second") if file else 0
        time = f"{256_000 / speed / 60:,.0f} min" if speed else "not measured"
        rows.append([model, *plans[model][:2], time])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows, of which the first is the head, as a Markdown table."""
    texts = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([texts[0], f"| --- |{' ---: |' * (len(rows[0]) - 1)}", *texts[1:]])


def value(name: str, key: str) -> str:
    """Return one figure of a file: "cpu", or the ratio, speed or memory of a side as ``SIDE[, COLUMN]``.

    The default column is the ratio to the peer's fastest side.
    """
    record = stored(name)
    if key == "cpu":
        name_of_cpu = re.sub(r".*processor: (.*?) \(.*", r"\1", record["machine"][0])
        return re.sub(r" (\d+) (\d+) \d+$", r" (family \1, model \2)", name_of_cpu)
    if key == "date":
        return str(record["date"])
    head, *rows = list(TABLES[name](record["results"]))
    side, _, column = key.partition("; ")
    row = next((row for row in rows if row[0] == side), None)
    index = head.index(column) if column else next(n for n, title in enumerate(head) if "times" in title)
    if row is None:
        raise ValueError(f"docs/figures/{name}.json has no side '{side}', only {[row[0] for row in rows]}")
    return f"{float(row[index]):.1f}×" if not column else row[index]


# ---- tables


def step_table(results: dict[str, list[dict[str, Any]]]) -> Rows:
    yield "side", "tokens/s", "times PEFT's fastest", "peak memory"
    rates = {name: [run["tokens_per_second"] for run in runs] for name, runs in results.items()}
    for name, runs in results.items():
        peak = _gigabytes(runs, "peak_bytes") if "peak_bytes" in runs[0] else ""  # the floor has no peak
        yield name, f"{statistics.median(rates[name]):.0f}", times(rates, name, "peft"), peak


def sft_table(all_results: dict[str, dict[str, list[dict[str, Any]]]]) -> Rows:
    yield "rows, side", "rows/s", "times TRL's fastest", "peak memory", "evaluation loss"
    for data, data_results in all_results.items():
        sides = {key.split("|")[1]: runs for key, runs in data_results.items()}
        rates = {name: [run["rows_per_second"] for run in runs] for name, runs in sides.items()}
        for name, runs in sides.items():
            loss = _median(runs, "held_out_loss")
            speed = statistics.median(rates[name])
            peak = _gigabytes(runs, "peak_bytes")
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
            yield name, *speeds, f"{_median(runs, 'whole'):.2f}", _gigabytes(runs, "peak_bytes")


def rewards_table(results: dict[str, list[dict[str, Any]]]) -> Rows:
    yield "side", "seconds per step", "times TRL's fastest", "sampled tokens", "peak memory"
    rates = {name: [1 / run["seconds"] for run in runs] for name, runs in results.items()}
    for name, runs in results.items():
        cells = (f"{_median(runs, 'seconds'):.1f}", times(rates, name, "TRL"), f"{_median(runs, 'tokens'):.0f}")
        yield name, *cells, _gigabytes(runs, "peak")


def quantized_table(results: dict[str, list[dict[str, Any]]]) -> Rows:
    yield "side", "tokens/s", "times PEFT over bitsandbytes", "peak memory", "loss"
    rates = {name: [run["tokens_per_second"] for run in runs] for name, runs in results.items()}
    for name, runs in results.items():
        cells = (f"{statistics.median(rates[name]):.0f}", times(rates, name, "bitsandbytes"))
        yield name, *cells, _gigabytes(runs, "peak_bytes"), f"{_median(runs, 'loss'):.4f}"


def embeddings_table(results: dict[str, list[dict[str, Any]]]) -> Rows:
    yield "side", "rows/s", "times the fastest of sentence-transformers", "peak memory"
    rates = {name: [run["rows"] / run["seconds"] for run in runs] for name, runs in results.items()}
    for name, runs in results.items():
        speed = f"{statistics.median(rates[name]):.0f}"
        yield name, speed, times(rates, name, "sentence-transformers"), _gigabytes(runs, "peak")


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
            rates = {name: _median(runs, "rows_per_second") for name, runs in sides.items() if runs}
            best = max((rate for name, rate in rates.items() if name != "deltaw"), default=None)
            for name, runs in sides.items():
                label = f"{size}, {kind}, {name}"
                if not runs:
                    yield label, by_side[name][-1]["error"].partition(":")[0], *[""] * 5
                    continue
                planned = _gigabytes(runs, "planned_bytes") if runs[0].get("planned_bytes") else ""
                difference = loss_difference(sides.get("deltaw", []), runs)
                texts = (f"{rates[name] / best:.2f}" if best else "", _gigabytes(runs, "peak_bytes"), planned)
                loss = "" if difference is None or name == "deltaw" else f"{difference:.4f}"
                yield label, f"{rates[name]:.2f}", *texts, loss, str(runs[0].get("launches", ""))


def loss_difference(runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> float | None:
    """Return the largest difference of the losses of two sides over the steps of both, or None without results."""
    losses = [side[0]["losses"] for side in (runs, others) if side and "losses" in side[0]]
    return max(abs(a - b) for a, b in zip(*losses, strict=False)) if len(losses) == 2 else None


def fits_table(rows: list[list[str]]) -> Rows:
    yield from rows


TABLES: dict[str, Callable[[Any], Rows]] = dict.fromkeys(filter(None, SIZES.values()), step_table) | {
    name.removesuffix("_table"): function for name, function in list(globals().items()) if name.endswith("_table")
}


def times(rates: dict[str, list[float]], name: str, peer: str) -> str:
    """Return the median ratio of a side to the peer's fastest side, round by round."""
    best = max((n for n in rates if n.startswith(peer)), key=lambda n: statistics.median(rates[n]), default=None)
    if best is None:
        return ""
    return f"{statistics.median(a / b for a, b in zip(rates[name], rates[best], strict=True)):.2f}"


def _median(runs: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _gigabytes(runs: Sequence[dict[str, Any]], key: str) -> str:
    return f"{_median(runs, key) / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
