"""A LoRA step on a CUDA device: tokens per second and the allocator's peak, compared with PEFT.

    python benchmarks/gpu.py [--model llama-3.2-1b] [--rows 8] [--length 1024] [--prefix 768] [--repeats 3]

LoRA rank 16 on all linear layers, bf16 weights, a label at each token. The rows of a step share their first
--prefix tokens. Every side runs in a process of its own, and the sides alternate; medians over the rounds are
printed. Tokens are those of the rows, before sharing. Without a CUDA device it prints a message and ends.
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
from step_models import MODELS, config_of, made

RANK, ALPHA = 16, 32
SIDES: dict[str, dict[str, Any]] = {
    "deltaw": {"side": "deltaw"},
    "deltaw, attention in tiles": {"side": "deltaw", "tiles": True},
    "PEFT": {"side": "peft"},
    "PEFT, bf16 factors": {"side": "peft", "bf16_factors": True},
    "PEFT, compiled": {"side": "peft", "compiled": True},
}
# Steps that compile, check and warm up, before those that are timed.
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
    parser.add_argument("--device", default="cuda", help="cpu only tries the benchmark itself")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "deltaw-benchmarks")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print("RESULT " + json.dumps(child(json.loads(given.child))), flush=True)
        return
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device found: nothing to measure")
        return
    reference, folder = made(given.model, given.models)
    about = {key: getattr(given, key) for key in ("model", "rows", "length", "prefix", "steps", "device")}
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(given.repeats):
        for name in given.sides:
            job = {**SIDES[name], **about, "reference": reference, "folder": folder}
            found.setdefault(name, []).append(run(job))
            print(f"{name:28} {found[name][-1]['tokens_per_second']:10,.0f} tokens/s", flush=True)
    report(found, f"{given.model}, {given.rows} × {given.length} tokens, {given.prefix} of them shared")
    print_machine()
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One side in a new process."""
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--child", json.dumps(job)], capture_output=True, text=True
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    sys.exit(f"{job}\n{done.stderr[-3000:]}")


def report(found: dict[str, list[dict[str, Any]]], title: str) -> None:
    """The medians as a Markdown table."""
    medians = {
        name: {key: statistics.median(r[key] for r in results) for key in ("tokens_per_second", "peak_bytes")}
        for name, results in found.items()
    }
    peers = [m["tokens_per_second"] for name, m in medians.items() if name.startswith("PEFT")]
    print(f"\n| {title} | tokens/s | times PEFT's best | peak of the allocator |")
    print("| --- | ---: | ---: | ---: |")
    for name, m in medians.items():
        times = f"{m['tokens_per_second'] / max(peers):.2f}" if peers else ""
        print(f"| {name} | {m['tokens_per_second']:,.0f} | {times} | {m['peak_bytes'] / 1e9:.2f} GB |")
    for name, results in found.items():
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
    from deltaw.kernels import attention
    from deltaw.lora import LoRAConfig, adapter_parameters, attach
    from deltaw.runtime.packed import packed_rows
    from deltaw.training.loop import train
    from deltaw.training.tasks.causal_batcher import choose_causal_batcher
    from deltaw.training.tasks.causal_objective import CausalObjective

    if job.get("tiles"):
        attention.DEVICES = ()
    model = load(job["reference"], precision="bf16", device=job["device"], say=lambda line: None).model
    labels = np.ones(tokens.shape[1], bool)
    rows = [Example(n, row.numpy().astype(np.int32), labels, 0, None) for n, row in enumerate(tokens)]
    batcher, _ = choose_causal_batcher(model, rows, device=job["device"], share=job["prefix"] > 0)
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
    return seconds, attention.notes()


def peft_seconds(job: dict[str, Any], tokens: torch.Tensor) -> tuple[list[float], list[str]]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.bfloat16).to(job["device"])
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings, autocast_adapter_dtype=not job.get("bf16_factors")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    there = tokens.to(job["device"])
    forward = torch.compile(model) if job.get("compiled") else model

    def step() -> None:
        forward(input_ids=there, labels=there).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return [timed(step, job["device"]) for _ in range(WARM + job["steps"])], []


def timed(step: Callable[[], None], device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
