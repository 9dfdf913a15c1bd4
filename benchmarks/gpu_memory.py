"""Planned and measured device memory of training runs on a simulated CUDA device.

The device of ``tests/fake_cuda`` computes on the CPU and allocates like torch's CUDA caching allocator, so the figures
are those of its allocator and not of a GPU. Each model is trained twice: by default, and on a card with ``--share`` of
the memory that the first plan requires. The second run has to choose smaller microbatches or activation checkpointing,
and fails if it allocates more than the card has.

    python benchmarks/gpu_memory.py                   # eight models, about 20 minutes on 1 core
    python benchmarks/gpu_memory.py --only llama      # models whose name matches a regular expression
    python benchmarks/gpu_memory.py --json out.json --models DIR
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
from memory import create_model_in_process, error, settings_of

# model, method, settings
RUNS: list[tuple[str, str, dict]] = [
    ("llama", "lora", {"train.batch_size": 32}),
    ("qwen2", "lora", {"train.batch_size": 16}),
    ("qwen3", "lora", {"train.batch_size": 16}),
    ("gemma2", "lora", {"train.batch_size": 16}),
    ("phi3", "lora", {"data": "sql", "train.batch_size": 4}),
    ("gpt2", "lora", {"train.batch_size": 32}),
    ("smollm2", "lora", {"train.batch_size": 16}),
    ("bert", "lora", {"train.batch_size": 32}),
    ("mixtral", "lora", {"train.batch_size": 16}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only models whose name matches this regular expression")
    parser.add_argument("--json", type=Path, default=None, help="write all results to this file")
    parser.add_argument("--models", type=Path, default=None, help="create the models in this folder and keep them")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each run")
    parser.add_argument("--share", type=float, default=0.8, help="memory of the smaller card")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(**json.load(sys.stdin))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        print_machine()
        print("simulated allocator, not a GPU; MB")
        print("| model | card | microbatches | checkpointing | planned | measured | error | reserved |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        rows: list[dict] = []
        for model, method, changes in RUNS:
            if not re.search(arguments.only, model):
                continue
            reference = create_model_in_process(model, arguments.models or Path(scratch) / "models")
            settings = settings_of(model, method, changes, reference, arguments.steps, Path(scratch) / "run")
            settings["device"], limit = "cuda", None
            for _ in range(2):
                row = {"model": model, "settings": changes, "limit": limit, **child(settings, limit)}
                shutil.rmtree(settings["output"], ignore_errors=True)
                rows.append(row)
                print(format_row(row), flush=True)
                limit = int(arguments.share * row["required"])
                settings["memory"] = str(limit)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(rows, indent=1))
    errors = [error(row["planned"], row["measured"]) for row in rows]
    print(f"{len(errors)} runs, off by {fmean(map(abs, errors)):.1%} on average, {max(map(abs, errors)):.1%} at worst")


def format_row(row: dict) -> str:
    """Format a result as a row of a table."""
    card = "24 GiB" if row["limit"] is None else f"{row['limit'] / 1e6:.0f}"
    sizes = f"{row['planned'] / 1e6:.1f} | {row['measured'] / 1e6:.1f} | {error(row['planned'], row['measured']):+.1%}"
    choices = f"{row['tokens']:,} | {row['checkpointing']}"
    return f"| {row['model']} | {card} | {choices} | {sizes} | {row['reserved'] / 1e6:.0f} |"


def child(settings: dict, limit: int | None) -> dict:
    """Measure one run in a new process."""
    command = [sys.executable, __file__, "--child"]
    order = json.dumps({"settings": settings, "limit": limit})
    done = subprocess.run(command, input=order, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    result: dict = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(settings: dict, limit: int | None) -> dict:
    """Train with these settings on a device with ``limit`` bytes, or 24 GiB (runs in the child process)."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.fake_cuda.device import configure, install

    install()
    import torch

    torch.cuda.init()
    if limit is not None:
        configure(total_memory=limit)
    from deltaw.runs.fit import fit
    from deltaw.settings.config import RunConfig

    result = fit(RunConfig.read(settings))
    assert result.plan is not None
    written = re.search(r"checkpointing: (\S+)", (result.output / "run.yaml").read_text())
    return {
        "planned": result.plan.peak_resident_bytes,
        "required": result.plan.required_bytes,
        "measured": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "tokens": result.plan.tokens,
        "checkpointing": "" if written is None else written[1],
    }


if __name__ == "__main__":
    main()
