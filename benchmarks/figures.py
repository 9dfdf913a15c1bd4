"""Measure this machine and write a table into docs/performance.md (`make figures`).

    python benchmarks/figures.py [--only step sft decode]

Runs ``step.py``, ``sft.py`` and ``decode.py`` with ``--json``. The section of a processor is enclosed in markers with
its name. Another run on the same processor replaces it. A run on another processor adds a section.
"""

from __future__ import annotations

import argparse
import datetime
import json
import operator
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from machine import machine_lines

from deltaw.kernels.processor import processor_name

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
COMMANDS = {
    "step": ("step.py",),
    "sft": ("sft.py", "--data", "sarcasm", "--repeats", "1"),
    "decode": ("decode.py", "--rounds", "3"),
}
INSERTION_MARKER = "<!-- more figures -->"  # the section of a new processor is inserted before this marker
HEAD = ("benchmark", "side", "speed", "times the peer's best", "peak memory", "held-out loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    args = parser.parse_args()
    results = {name: measure(name) for name in args.only}
    text = section(results, str(datetime.date.today()))
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), processor_name(), text), encoding="utf-8")
    print(text)


def measure(name: str) -> Any:
    """Run a benchmark, show its output and return its JSON results."""
    script, *flags = COMMANDS[name]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), *flags, "--json", str(file)], check=True)
        return json.loads(file.read_text(encoding="utf-8"))


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def section(results: dict[str, Any], date: str) -> str:
    """Return the table of all results, with date, commit, machine and commands."""
    rows = [HEAD, ("---", "---", *["---:"] * 4), *(row for name in results for row in ROWS[name](results[name]))]
    commands = ", ".join(f"`benchmarks/{' '.join(COMMANDS[name])}`" for name in results)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    description = f"{date}, commit {commit()}; {commands}; medians."
    return "\n".join([*lines, "", description, "", *(f"- {line}" for line in machine_lines())])


def with_section(page: str, processor: str, text: str) -> str:
    """Return the page with the section of this processor inserted or replaced."""
    start_marker, end_marker = f"<!-- figures: {processor} -->", f"<!-- /figures: {processor} -->"
    section_text = f"{start_marker}\n### {processor}\n\n{text}\n{end_marker}"
    if start_marker in page:
        return page.partition(start_marker)[0] + section_text + page.partition(end_marker)[2]
    return page.replace(INSERTION_MARKER, f"{section_text}\n\n{INSERTION_MARKER}")


def step_rows(results: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, ...]]:
    rates = {name: [run["tokens_per_second"] for run in runs] for name, runs in results.items()}
    for name, runs in results.items():
        peak = _gigabytes(runs) if "peak_bytes" in runs[0] else ""  # the floor has no peak
        yield "step", name, f"{statistics.median(rates[name]):.0f} tokens/s", _times(rates, name, "peft"), peak, ""


def sft_rows(all_results: dict[str, dict[str, list[dict[str, Any]]]]) -> Iterator[tuple[str, ...]]:
    for data, data_results in all_results.items():
        for size in dict.fromkeys(key.split("|")[0] for key in data_results):
            sides = {key.split("|")[1]: runs for key, runs in data_results.items() if key.split("|")[0] == size}
            rates = {name: [run["rows_per_second"] for run in runs] for name, runs in sides.items()}
            for name, runs in sides.items():
                speed = f"{statistics.median(rates[name]):.1f} rows/s"
                loss = f"{statistics.median(run['held_out_loss'] for run in runs):.4f}"
                times = _times(rates, name, "TRL")
                yield f"{data}, {size} rows per step", name, speed, times, _gigabytes(runs), loss


def decode_rows(results: dict[str, dict[str, list[float]]]) -> Iterator[tuple[str, ...]]:
    for count, rates in results.items():
        for name in rates:
            speed, times = f"{statistics.median(rates[name]):.0f} tokens/s", _times(rates, name, "llama.cpp")
            yield f"decoding, prompts at once: {count}", name, speed, times, "", ""


def _times(rates: dict[str, list[float]], name: str, peer: str) -> str:
    """Return the median ratio of a side to the peer's fastest side, round by round."""
    best = max((n for n in rates if n.startswith(peer)), key=lambda n: statistics.median(rates[n]), default=None)
    return f"{statistics.median(map(operator.truediv, rates[name], rates[best])):.2f}" if best else ""


def _gigabytes(runs: Sequence[dict[str, Any]]) -> str:
    return f"{statistics.median(run['peak_bytes'] for run in runs) / 1e9:.2f} GB"


ROWS = {"step": step_rows, "sft": sft_rows, "decode": decode_rows}

if __name__ == "__main__":
    main()
