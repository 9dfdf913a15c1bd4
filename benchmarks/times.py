"""Predicted and measured time of training runs.

Each run is executed with ``deltaw train`` in a new process. The prediction is made by the run itself after it has read
the rows, before it loads the weights. The measured time is that of the entire run. Models and rows are those of
``memory.py``: random weights with the vocabulary and tokenizer sizes of published models, and SmolLM2.

    python benchmarks/times.py                     # about 20 minutes on 2 cores
    python benchmarks/times.py --held-out          # architectures that the prediction was not developed with
    python benchmarks/times.py --only gpt2         # runs whose line matches a regular expression
    python benchmarks/times.py --json out.json --models DIR   # store the results and the models
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from machine import print_machine
from memory import DPO, EMBED, create_model_in_process, error, format_settings, settings_of

# Model, method, settings: long rows, short rows, tasks, precisions, and activation checkpointing.
RUNS: list[tuple[str, str, dict]] = [
    ("smollm2", "lora", {"train.batch_size": 16}),
    ("smollm2", "lora", {"data": "sql", "train.batch_size": 4}),
    ("smollm2", "lora", {"train.batch_size": 16, "precision": "int8"}),
    ("smollm2", "lora", {"train.batch_size": 8, "precision": "nf4"}),
    ("smollm2", "lora", {"train.batch_size": 8, "precision": "fp32", "train.checkpointing": True}),
    ("smollm2", "lora", {"train.batch_size": 4, **DPO}),
    ("llama", "lora", {"data": "sql", "train.batch_size": 8, "train.checkpointing": True}),
    ("llama", "lora", {"train.batch_size": 32, "lora.layers": "6-"}),
    ("gpt2", "lora", {"train.batch_size": 32}),
    ("neox", "full", {"train.batch_size": 16}),
    ("qwen3", "lora", {"train.batch_size": 8}),
    ("gemma3", "lora", {"train.batch_size": 8, "data": "sql"}),
    ("olmo2", "lora", {"train.batch_size": 8, "data": "sql"}),
    ("mixtral", "lora", {"train.batch_size": 8}),
    ("qwen3.5", "lora", {"train.batch_size": 8}),
    ("lfm2", "lora", {"train.batch_size": 8, "data": "sql"}),
    ("granite-h", "lora", {"train.batch_size": 16}),
    ("qwen3-moe", "lora", {"train.batch_size": 8}),
    ("bert", "lora", {"train.batch_size": 64}),
    ("roberta", "lora", {"train.batch_size": 32, **EMBED}),
    ("minilm", "lora", {"train.batch_size": 64}),
    ("vit", "lora", {"train.batch_size": 64}),
]
# Architectures that the prediction was not developed with.
HELD_OUT: list[tuple[str, str, dict]] = [
    ("mistral", "lora", {"train.batch_size": 8, "data": "sql"}),
    ("mistral", "lora", {"train.batch_size": 16, "precision": "nf4"}),
    ("phi3", "lora", {"train.batch_size": 16, "precision": "int8"}),
    ("falcon", "lora", {"train.batch_size": 32}),
    ("gemma2", "lora", {"train.batch_size": 8}),
    ("granite", "lora", {"train.batch_size": 8, "data": "sql", "train.checkpointing": True}),
    ("granite", "lora", {"train.batch_size": 4, **DPO}),
    ("bloom", "lora", {"train.batch_size": 16}),
    ("cohere", "lora", {"train.batch_size": 8, "data": "sql"}),
    ("qwen2", "lora", {"train.batch_size": 16, "precision": "fp32"}),
    ("opt", "lora", {"train.batch_size": 16}),
    ("opt", "full", {"train.batch_size": 16}),
    ("falcon-h1", "lora", {"train.batch_size": 8, "data": "sql"}),
    ("electra", "lora", {"train.batch_size": 32}),
    ("mpnet", "lora", {"train.batch_size": 32, **EMBED}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only lines that match this regular expression")
    parser.add_argument("--json", type=Path, default=None, help="write all results to this file")
    parser.add_argument("--models", type=Path, default=None, help="create the models in this folder and keep them")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each run")
    parser.add_argument("--held-out", action="store_true", help="run other architectures")
    arguments = parser.parse_args()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        models = arguments.models or Path(scratch) / "models"
        print_machine()
        print(f"{'model':8} {'method':7} {'settings':52} {'seconds':>24} {'per step':>22}")
        for model, method, changes in HELD_OUT if arguments.held_out else RUNS:
            label = f"{model:8} {method:7} {format_settings(changes):52}"
            if not re.search(arguments.only, label):
                continue
            reference = create_model_in_process(model, models)
            settings = settings_of(model, method, changes, reference, arguments.steps, Path(scratch) / "run")
            measured = run(settings)
            shutil.rmtree(settings["output"], ignore_errors=True)
            rows.append({"model": model, "method": method, "settings": changes, **measured})
            print(f"{label} {compare(measured, 'seconds'):>24} {compare(measured, 'seconds_per_step'):>22}", flush=True)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(rows, indent=1))
    for name in ("seconds", "seconds_per_step"):
        errors = [abs(error(row[f"planned_{name}"], row[name])) for row in rows]
        if errors:
            print(f"{name}: {len(errors)} runs, off by {fmean(errors):.1%} on average, {max(errors):.1%} at worst")


def run(settings: dict) -> dict:
    """Return the predicted and the measured time of a run in a new process."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(settings, file)  # JSON is YAML too
        file.flush()
        command = [sys.executable, "-m", "deltaw", "train", file.name, "--json"]
        process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode != 0:
        sys.exit(f"{format_settings(settings)}\n{process.stderr[-3000:]}")
    result = json.loads(process.stdout)
    record = json.loads((Path(settings["output"]) / "run.json").read_text())
    plan = record["plan"]
    return {
        "planned_seconds": result["planned_seconds"],
        "seconds": result["total_seconds"],
        "planned_seconds_per_step": plan["seconds_per_step"],
        "seconds_per_step": result["seconds"] / result["steps"],
        "uncertain": plan["time_uncertain"],
        "parts": result["seconds_by_part"],
        "planned_parts": plan["seconds_by_phase"],
    }


def compare(measured: dict, name: str) -> str:
    """Format a predicted time, the measured time and the relative error."""
    planned = measured[f"planned_{name}"]
    seconds = measured[name]
    return f"{planned:7.2f} {seconds:7.2f} {error(planned, seconds):+6.1%}"


if __name__ == "__main__":
    main()
