"""LoRA training of models with 1 to 8 billion parameters: memory and time against the plan, and beside PEFT.

    python benchmarks/large.py llama-3.1-8b:nf4 qwen3-8b:nf4                 # 20 measured steps each
    python benchmarks/large.py llama-3.2-1b:bf16 llama-3.2-1b:q4_k llama-3.2-1b:peft-bf16 llama-3.2-1b:peft-nf4

A case is a model of ``models.py`` and its precision. ``int8`` and ``nf4`` start from a bf16 folder, which the run
quantizes, and ``q4_k`` from a GGUF file. Models are written to ``--folder`` and removed after the model's last case.
Each step trains on 4 rows of 256 random words, with LoRA rank 16 on all linear layers. The first step is a warm-up.
Peaks are resident memory of the whole process. The limit of the machine is the time of a step's operations at the rate
of one product of bf16 matrices of the model's size. PEFT computes in bf16 with gradient checkpointing, over
bitsandbytes' NF4 in ``peft-nf4``. Every side runs in its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figure_tables import LARGE_HEAD, large_row
from machine import print_machine
from models import SHAPES, write_model

BATCH = 4
TOKENS = 256
ROWS = 1000
RANK = 16
PEFT_STEPS = 3
# Formats of models.py from which a precision starts.
STORED = {"bf16": "bf16", "int8": "bf16", "nf4": "bf16", "q4_k": "q4_k", "peft-bf16": "bf16", "peft-nf4": "nf4"}
WORDS = ("river", "stone", "cloud", "seven", "winter", "paper", "green", "north", "glass", "music", "bridge", "lamp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="MODEL:PRECISION")
    parser.add_argument("--steps", type=int, default=20, help="measured steps after the first")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "deltaw-large")
    parser.add_argument("--keep", action="store_true", help="do not remove the models")
    parser.add_argument("--json", type=Path, default=None, help="append the results to the list in this file")
    args = parser.parse_args()
    cases = [tuple(case.split(":")) for case in args.cases]
    for name, precision in cases:
        if name not in SHAPES or precision not in STORED:
            parser.error(f"unknown case {name}:{precision}")
    args.folder.mkdir(parents=True, exist_ok=True)
    print_machine()
    print("|", " | ".join(LARGE_HEAD), "|", flush=True)
    print(f"| --- |{' ---: |' * (len(LARGE_HEAD) - 1)}", flush=True)
    names = list(dict.fromkeys(name for name, _ in cases))
    for name in names:
        written = {}
        for _, precision in (case for case in cases if case[0] == name):
            kind = STORED[precision]
            path = args.folder / (f"{name}.gguf" if kind == "q4_k" else f"{name}-{kind}")
            written[kind] = write_model(name, path, kind)
            side = peft_side if precision.startswith("peft") else deltaw_side
            report(args, side(args, name, precision, path))
        if not args.keep:
            for path in written.values():
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print a line of the table, and store the result."""
    print("|", " | ".join(large_row(result)), "|", flush=True)
    if args.json:
        results = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else []
        args.json.write_text(json.dumps([*results, result], indent=1), encoding="utf-8")


def deltaw_side(args: argparse.Namespace, name: str, precision: str, source: Path) -> dict[str, Any]:
    """Train with deltaw and return the results, with the prediction of ``deltaw plan`` for 1,000 rows."""
    rows = write_rows(args.folder / "rows.jsonl")
    run = args.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    options = {
        "model": source, "data.train": rows, "data.eval": "null", "data.max_length": TOKENS, "data.long_rows": "cut",
        "lora.rank": RANK, "lora.target_modules": "all-linear", "train.batch_size": BATCH, "train.epochs": 1,
        "train.drift": "false", "output": run,
    }  # fmt: skip
    if precision != "q4_k":
        options["precision"] = precision
    arguments = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    deltaw = [sys.executable, "-m", "deltaw"]
    plans, _, _ = measured([*deltaw, "plan", *arguments, "--json"])
    plan = plans["lora"]
    measured_rows = ["--data.rows", str(BATCH * (args.steps + 1))]
    result, peak, wall = measured([*deltaw, "train", *arguments, *measured_rows, "--json"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [line["seconds"] for line in lines if "loss" in line and "seconds" in line]
    step = statistics.median(seconds[1:])
    outside = wall - sum(seconds)
    steps = ROWS // BATCH
    return {
        "side": f"deltaw {name} {precision}",
        "peak": max(peak, result["peak_memory_bytes"]),
        "planned_peak": result["planned_memory_bytes"],
        "step": step,
        "tokens_per_second": BATCH * TOKENS / step,
        "planned_step": plan["seconds_per_step"],
        "steps": len(seconds) - 1,
        "limit_seconds": plan["operations_per_step"] / product_rate(SHAPES[name].hidden, SHAPES[name].mlp),
        "total": outside + steps * step,
        "planned_total": plan["seconds"],
        "planned_run": result["planned_seconds"],
        "run": result["total_seconds"],
        "wall": wall,
        "parts": result["seconds_by_part"],
        "waited": result["waited_seconds"],
        "operations": plan["operations_per_step"],
    }


def peft_side(args: argparse.Namespace, name: str, precision: str, source: Path) -> dict[str, Any]:
    """Train with PEFT and return the results."""
    job = json.dumps({"folder": str(source), "vocabulary": SHAPES[name].vocabulary})
    result, peak, wall = measured([sys.executable, os.path.abspath(__file__), "--side", job])
    step = statistics.median(result["seconds"][1:])
    total = wall - sum(result["seconds"]) + ROWS // BATCH * step
    return {
        "side": f"PEFT {name} {precision.removeprefix('peft-')}",
        "peak": peak,
        "step": step,
        "tokens_per_second": BATCH * TOKENS / step,
        "steps": PEFT_STEPS,
        "total": total,
    }


def train_peft(job: dict[str, Any]) -> None:
    """Train with PEFT in this process, and print the seconds of the steps."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.bfloat16)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(0, job["vocabulary"], (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(PEFT_STEPS + 1):
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds}))


def measured(command: list[str]) -> tuple[dict[str, Any], int, float]:
    """Run a command and return its JSON output, its peak of resident memory in bytes, and its seconds."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, text=True)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - start
        output.seek(0)
        text = output.read()
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)}\n{text[-2000:]}{errors.read()[-3000:]}")
    return json.loads(text[text.index("{") :]), usage.ru_maxrss * 1024, wall


def product_rate(hidden: int, mlp: int) -> float:
    """Return the operations per second of x·Wᵀ and grad·W with the kernels, for the largest bf16 matrix of a block."""
    import torch

    from deltaw.kernels.linear import LinearProduct, linear, linear_backward

    product = LinearProduct(torch.randn(mlp, hidden).bfloat16())
    x = torch.randn(BATCH * TOKENS, hidden).bfloat16()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        y, _ = linear(x, product)
        linear_backward(y, product)
        seconds.append(time.perf_counter() - start)
    return 4 * BATCH * TOKENS * hidden * mlp / statistics.median(seconds[1:])


def write_rows(path: Path) -> Path:
    """Write texts that are longer than a row."""
    generator = random.Random(0)
    texts = (" ".join(generator.choices(WORDS, k=2 * TOKENS)) for _ in range(ROWS))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        train_peft(json.loads(sys.argv[2]))
    else:
        main()
