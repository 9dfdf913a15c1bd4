"""Tokens per second and allocator peak of a LoRA step on a CUDA device, compared with PEFT.

    python benchmarks/gpu.py [--model llama-3.2-1b] [--rows 8] [--length 1024] [--prefix 768] [--repeats 3]

LoRA rank 16 on all linear layers, bf16 weights, a label at each token. The rows of a step share their first --prefix
tokens. Every side runs in its own process, and the sides alternate. Prints medians over rounds. Tokens are counted
before sharing prefixes. Without a CUDA device, it prints a message and exits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import print_machine
from step_models import MODELS, config_of, prepare_model

RANK, ALPHA = 16, 32
SIDES: dict[str, dict[str, Any]] = {
    "deltaw": {"side": "deltaw"},
    "deltaw, attention in tiles": {"side": "deltaw", "tiles": True},
    "PEFT": {"side": "peft"},
    "PEFT, bf16 factors": {"side": "peft", "bf16_factors": True},
    "PEFT, compiled": {"side": "peft", "compiled": True},
}
# Number of untimed steps for compilation, checks and warm-up.
WARM = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--prefix", type=int, default=0, help="first tokens that all rows share")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), metavar="SIDE")
    parser.add_argument("--device", default="cuda", help="cpu is only for testing the benchmark")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "deltaw-benchmarks")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT " + json.dumps(child(json.loads(args.child))), flush=True)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device found: nothing to measure")
        return
    reference, folder = prepare_model(args.model, args.models)
    settings = {key: getattr(args, key) for key in ("model", "rows", "length", "prefix", "steps", "device")}
    results: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.repeats):
        for name in args.sides:
            job = {**SIDES[name], **settings, "reference": reference, "folder": folder}
            results.setdefault(name, []).append(run(job))
            print(f"{name:28} {results[name][-1]['tokens_per_second']:10,.0f} tokens/s", flush=True)
    report(results, f"{args.model}, {args.rows} × {args.length} tokens, {args.prefix} of them shared")
    print_machine()
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Run one side in a new process."""
    process = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--child", json.dumps(job)], capture_output=True, text=True
    )
    for line in process.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    sys.exit(f"{job}\n{process.stderr[-3000:]}")


def report(all_results: dict[str, list[dict[str, Any]]], title: str) -> None:
    """Print the medians as a Markdown table."""
    medians = {
        name: {key: statistics.median(r[key] for r in results) for key in ("tokens_per_second", "peak_bytes")}
        for name, results in all_results.items()
    }
    peers = [m["tokens_per_second"] for name, m in medians.items() if name.startswith("PEFT")]
    print(f"\n| {title} | tokens/s | times PEFT's best | peak of the allocator |")
    print("| --- | ---: | ---: | ---: |")
    for name, m in medians.items():
        ratio = f"{m['tokens_per_second'] / max(peers):.2f}" if peers else ""
        print(f"| {name} | {m['tokens_per_second']:,.0f} | {ratio} | {m['peak_bytes'] / 1e9:.2f} GB |")
    for name, results in all_results.items():
        for note in results[-1]["notes"]:
            print(f"{name}: {note}")


def child(job: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config_of(job["model"]).vocab_size, (job["rows"], job["length"]), generator=generator)
    tokens[:, : job["prefix"]] = tokens[0, : job["prefix"]]
    side = {"deltaw": deltaw_seconds, "peft": peft_seconds}[job["side"]]
    seconds, notes = side(job, tokens)
    peak = torch.cuda.max_memory_allocated() if job["device"] == "cuda" else 0
    speed = tokens.numel() / statistics.median(seconds[WARM:] or seconds)
    return {"tokens_per_second": speed, "peak_bytes": peak, "seconds": seconds, "notes": notes}


def deltaw_seconds(job: dict[str, Any], tokens: torch.Tensor) -> tuple[list[float], list[str]]:
    import numpy as np

    from deltaw.data.example import Example
    from deltaw.hub.loading import load
    from deltaw.kernels import gpu_attention
    from deltaw.lora import LoRAConfig, adapter_parameters, attach
    from deltaw.runtime.packed import packed_rows
    from deltaw.training.batchers import BatcherOptions, choose_causal_batcher
    from deltaw.training.causal_objective import CausalObjective
    from deltaw.training.loop import train

    if job.get("tiles"):
        gpu_attention.DEVICES = ()
    model = load(job["reference"], precision="bf16", device=job["device"], log=lambda line: None).model
    labels = np.ones(tokens.shape[1], bool)
    rows = [Example(n, row.numpy().astype(np.int32), labels, 0, None) for n, row in enumerate(tokens)]
    batcher, _ = choose_causal_batcher(model, rows, BatcherOptions(job["device"], share=job["prefix"] > 0))
    attach(model, LoRAConfig(rank=RANK, alpha=ALPHA), seed=0)
    objective, seconds = CausalObjective(model), []
    with packed_rows(model):
        train(
            objective,
            [p for _, p in adapter_parameters(model)],
            rows,
            batcher,
            learning_rate=1e-4,
            total_steps=WARM + job["steps"],
            batch_size=len(rows),
            on_step=lambda step: seconds.append(step.seconds),
        )
    return seconds, gpu_attention.notes()


def peft_seconds(job: dict[str, Any], tokens: torch.Tensor) -> tuple[list[float], list[str]]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.bfloat16).to(job["device"])
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings, autocast_adapter_dtype=not job.get("bf16_factors")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    device_tokens = tokens.to(job["device"])
    forward = torch.compile(model) if job.get("compiled") else model

    def step() -> None:
        forward(input_ids=device_tokens, labels=device_tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return [timed(step, job["device"]) for _ in range(WARM + job["steps"])], []


def timed(step: Callable[[], None], device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
