"""Measure this machine, and insert the measured figures into README and the pages in docs.

    python benchmarks/figures.py                # measure everything, then insert: about four hours on 2 cores
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
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figure_tables import SIZES, TABLES, median_of

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "figures"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS: dict[str, tuple[str, ...]] = {
    "step": ("step.py", "--in-turns", "--steps", "16"),
    "step-qwen2.5-0.5b": ("step.py", "--model", "qwen2.5-0.5b", "--sides", "deltaw-auto", "--repeats", "1"),
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
    "large": ("large.py", "llama-3.2-1b:nf4", "llama-3.2-1b:bf16", "llama-3.2-1b:int8", "llama-3.2-1b:q4_k",
              "llama-3.2-1b:peft-bf16", "llama-3.2-1b:peft-nf4", "llama-3.2-3b:nf4", "llama-3.1-8b:nf4",
              "qwen3-8b:nf4"),
}  # fmt: skip
TABLE = re.compile(r"<!-- figures: (\S+) -->\n.*?<!-- /figures -->", re.DOTALL)
VALUE = re.compile(r"<!-- figure: (\S+) (.+?) -->.*?<!-- /figure -->")


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
    for model, (file, side) in SIZES.items():
        results = stored(file)["results"]
        if file == "large":
            seconds = next(result["total"] for result in results if result["side"] == side)
        else:
            seconds = 256_000 / median_of(results[side], "tokens_per_second")
        rows.append([model, *plans[model][:2], long_time(seconds)])
    return markdown(rows)


def long_time(seconds: float) -> str:
    """Return minutes, or hours from two hours on."""
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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


if __name__ == "__main__":
    main()
