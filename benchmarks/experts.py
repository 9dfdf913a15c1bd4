"""Time and memory of the routed experts of one layer, compared with the implementations of transformers.

    python benchmarks/experts.py [--models qwen3-30b-a3b] [--tokens 64 512 2048] [--types bf16 fp32] [--lora RANK]

Measures forward and backward of the experts module with frozen weights: the gradients of its input and of the router
weights, and with --lora those of low-rank factors of both parameters. Tokens choose experts at random. Each side and
type runs in its own process. Memory is the peak during a step beyond the memory before it. The share of the peak counts
the products of the chosen experts with the frozen weights, in the forward pass and for the input gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import print_machine
from peak import peaks

# Hidden size, inner size, experts and experts per token of the layers of published models.
MODELS = {
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "granite-4.0-h-tiny": (1536, 512, 64, 6),
    "olmoe-1b-7b": (2048, 1024, 64, 8),
}
SIDES = ("deltaw", "eager", "grouped_mm", "batched_mm")
# Maximum bytes of the copies of weights that batched_mm makes, one for each chosen expert of each token.
MAX_COPIED_BYTES = 6e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 512, 2048])
    parser.add_argument("--types", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="also train factors of the experts")
    parser.add_argument("--seconds", type=float, default=4.0, help="time per measurement, after the first step")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT " + json.dumps(child(json.loads(args.child))), flush=True)
        return

    from deltaw.machine.choices import choose_threads

    threads = choose_threads().value
    peak_rates = peaks(threads)
    print("| layer | type | tokens | side | ms | times transformers' fastest | memory, MB | of the peak |")
    print("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for model in args.models:
        for kind in args.types:
            job = {"model": model, "type": kind, "tokens": args.tokens, "lora": args.lora}
            job |= {"seconds": args.seconds, "threads": threads}
            results = {side: run(job | {"side": side}) for side in args.sides}
            for tokens in args.tokens:
                print(*table(model, kind, tokens, results, peak_rates[kind].rate), sep="\n", flush=True)
    print_machine(threads)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Return seconds and bytes by number of tokens, measured in a new process."""
    process = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--child", json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(job["threads"])},
    )
    for line in process.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    print(f"{job}: {(process.stderr.strip().splitlines() or ['no output'])[-1][:200]}", file=sys.stderr, flush=True)
    return {}


def child(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    hidden, inner, count, chosen = MODELS[job["model"]]
    dtype = torch.bfloat16 if job["type"] == "bf16" else torch.float32
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=count)
    config.num_experts_per_tok = chosen
    config._experts_implementation = "grouped_mm" if job["side"] == "deltaw" else job["side"]
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config).to(dtype)
    experts = experts.to_empty(device="cpu").requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(0, 0.02)
    factors = adapt(experts, job["lora"], job["side"]) if job["lora"] else []
    if job["side"] == "deltaw":
        from deltaw.runtime.experts import FusedExperts, experts_form

        form = experts_form(experts)
        assert form is not None
        experts.forward = FusedExperts(experts, form)
    results = {}
    for tokens in job["tokens"]:
        copied = tokens * chosen * 3 * hidden * inner * dtype.itemsize
        if job["side"] == "batched_mm" and copied > MAX_COPIED_BYTES:
            continue
        x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
        scores, index = torch.randn(tokens, count).softmax(-1).topk(chosen)
        weights = (scores / scores.sum(-1, keepdim=True)).to(dtype).requires_grad_()
        grad = torch.randn(tokens, hidden, dtype=dtype)
        durations: list[float] = []
        peak_bytes = 0
        while len(durations) < 3 or sum(durations) < job["seconds"]:
            before = reset_peak()
            start = time.perf_counter()
            experts(x, index, weights).backward(grad)
            durations.append(time.perf_counter() - start)
            peak_bytes = max(peak_bytes, status("VmHWM") - before) if len(durations) > 1 else 0
            for tensor in (x, weights, *factors):
                tensor.grad = None
        results[str(tokens)] = [statistics.median(durations[1:]), peak_bytes]
    return results


def adapt(experts: Any, rank: int, side: str) -> list[Any]:
    """Adapt both parameters with deltaw or PEFT, and return the factors."""
    import peft
    import torch

    holder = torch.nn.ModuleDict({"experts": experts})
    names = ["experts.gate_up_proj", "experts.down_proj"]
    if side == "deltaw":
        from deltaw.lora import LoRAConfig, attach

        attach(holder, LoRAConfig(rank=rank, target_modules=[], target_parameters=names))
    else:
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, target_modules=[], target_parameters=names), holder)
    return [p for p in holder.parameters() if p.requires_grad]


def status(name: str) -> int:
    """Return a size of /proc/self/status in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def reset_peak() -> int:
    """Reset the peak of resident memory, and return the resident memory."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def table(model: str, kind: str, tokens: int, results: dict[str, dict[str, Any]], peak_rate: float | None) -> list[str]:
    """Return a line for each side."""
    hidden, inner, _, chosen = MODELS[model]
    operations = 12 * tokens * chosen * hidden * inner
    measured = {side: result[str(tokens)] for side, result in results.items() if str(tokens) in result}
    fastest = min((seconds for side, (seconds, _) in measured.items() if side != "deltaw"), default=None)
    lines = []
    for side, (seconds, peak_bytes) in measured.items():
        ratio = "" if fastest is None else f"{fastest / seconds:.2f}"
        share = f"{operations / seconds / peak_rate:.0%}" if peak_rate else ""
        cells = (model, kind, tokens, side, f"{1e3 * seconds:,.0f}", ratio, f"{peak_bytes / 1e6:,.0f}", share)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


if __name__ == "__main__":
    main()
