"""Measures this machine and writes one table into docs/performance.md: `make figures`.

    python benchmarks/figures.py [--only step sft decode]

Runs ``step.py``, ``sft.py`` and ``decode.py``, each with ``--json``. The section of a processor stands between
markers that name it; another run on the same processor replaces it, one on another processor adds its own.
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

from deltaw.machine.processor import processor_name

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
COMMANDS = {
    "step": ("step.py",),
    "sft": ("sft.py", "--data", "sarcasm", "--repeats", "1"),
    "decode": ("decode.py", "--rounds", "3"),
}
MORE = "<!-- more figures -->"  # where the section of a new processor goes
HEAD = ("benchmark", "side", "speed", "times the peer's best", "peak memory", "held-out loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    given = parser.parse_args()
    found = {name: measured(name) for name in given.only}
    text = section(found, str(datetime.date.today()))
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), processor_name(), text), encoding="utf-8")
    print(text)


def measured(name: str) -> Any:
    """Runs one benchmark, whose output is shown, and returns what it wrote as JSON."""
    script, *flags = COMMANDS[name]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), *flags, "--json", str(file)], check=True)
        return json.loads(file.read_text(encoding="utf-8"))


def commit() -> str:
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"


def section(found: dict[str, Any], date: str) -> str:
    """One table of everything that was measured, with date, commit, machine and commands below."""
    rows = [HEAD, ("---", "---", *["---:"] * 4), *(row for name in found for row in ROWS[name](found[name]))]
    commands = ", ".join(f"`benchmarks/{' '.join(COMMANDS[name])}`" for name in found)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    about = f"{date}, commit {commit()}; {commands}; medians."
    return "\n".join([*lines, "", about, "", *(f"- {line}" for line in machine_lines())])


def with_section(page: str, processor: str, text: str) -> str:
    """The page with this processor's section in its place."""
    begin, end = f"<!-- figures: {processor} -->", f"<!-- /figures: {processor} -->"
    whole = f"{begin}\n### {processor}\n\n{text}\n{end}"
    if begin in page:
        return page.partition(begin)[0] + whole + page.partition(end)[2]
    return page.replace(MORE, f"{whole}\n\n{MORE}")


def step_rows(found: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, ...]]:
    rates = {name: [run["tokens_per_second"] for run in runs] for name, runs in found.items()}
    for name, runs in found.items():
        peak = _gigabytes(runs) if "peak_bytes" in runs[0] else ""  # the floor has none
        yield "step", name, f"{statistics.median(rates[name]):.0f} tokens/s", _times(rates, name, "peft"), peak, ""


def sft_rows(found: dict[str, dict[str, list[dict[str, Any]]]]) -> Iterator[tuple[str, ...]]:
    for data, results in found.items():
        for size in dict.fromkeys(key.split("|")[0] for key in results):
            sides = {key.split("|")[1]: runs for key, runs in results.items() if key.split("|")[0] == size}
            rates = {name: [run["rows_per_second"] for run in runs] for name, runs in sides.items()}
            for name, runs in sides.items():
                speed = f"{statistics.median(rates[name]):.1f} rows/s"
                loss = f"{statistics.median(run['held_out_loss'] for run in runs):.4f}"
                times = _times(rates, name, "TRL")
                yield f"{data}, {size} rows per step", name, speed, times, _gigabytes(runs), loss


def decode_rows(found: dict[str, dict[str, list[float]]]) -> Iterator[tuple[str, ...]]:
    for count, rates in found.items():
        for name in rates:
            speed, times = f"{statistics.median(rates[name]):.0f} tokens/s", _times(rates, name, "llama.cpp")
            yield f"decoding, prompts at once: {count}", name, speed, times, "", ""


def _times(rates: dict[str, list[float]], name: str, peer: str) -> str:
    """The median of a side's ratios to the fastest of the peer's sides, round by round."""
    best = max((n for n in rates if n.startswith(peer)), key=lambda n: statistics.median(rates[n]), default=None)
    return f"{statistics.median(map(operator.truediv, rates[name], rates[best])):.2f}" if best else ""


def _gigabytes(runs: Sequence[dict[str, Any]]) -> str:
    return f"{statistics.median(run['peak_bytes'] for run in runs) / 1e9:.2f} GB"


ROWS = {"step": step_rows, "sft": sft_rows, "decode": decode_rows}

if __name__ == "__main__":
    main()
