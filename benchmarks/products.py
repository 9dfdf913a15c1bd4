"""Rates of deltaw's matrix products by kernel variant and arithmetic, compared with torch and the processor's peak.

    python benchmarks/products.py [--kernels auto avx2 avx512_bf16:wide] [--models smollm2] [--kinds fp32]

Measures the products of a training step: the forward pass and the input gradient of each linear layer, and those of the
output head for 256 labels. deltaw's products run through its operator, in a separate process for each value of
--kernels: a value of DELTAW_KERNELS, "auto" for deltaw's choice, or "all" for every variant that was built and runs on
this machine. torch's products have the same type. For int8, torch only multiplies two int8 matrices, while deltaw also
quantizes its input and applies the scales. Both alternate on the same operands. Several copies of the weights are used
in turn so that they are not cached. The rate of a model is the number of operations of all its layers divided by their
time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import kernels_text, print_machine
from peak import Peak, peaks
from step_models import MODELS, config_of, linear_shapes

KINDS = ("fp32", "bf16", "int8")
HEAD_ROWS = 256
# Total bytes of the copies of a weight, and the maximum number of copies.
COLD_BYTES = 96 * 2**20
COPIES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=["auto"], metavar="VARIANT[:ARITHMETIC]")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["smollm2", "qwen2.5-0.5b"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all kernels")
    parser.add_argument("--calls", type=int, default=5, help="timed calls of each product in a round")
    parser.add_argument("--threads", type=int, default=0, help="0: chosen by deltaw")
    parser.add_argument("--shapes", action="store_true", help="also print the rates of each shape")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT " + json.dumps(child(json.loads(args.child))), flush=True)
        return

    from deltaw.machine.choices import choose_threads

    threads = args.threads or choose_threads().value
    peak_rates = peaks(threads)
    results: dict[str, dict[str, Any]] = {}
    for model in args.models:
        job = {"model": model, "kinds": args.kinds, "calls": args.calls, "threads": threads}
        rounds_by_name: dict[str, list[dict[str, Any]]] = {}
        for _ in range(args.repeats):
            for name in expand_kernels(args.kernels):
                result = run(job, name)
                if result is not None:
                    rounds_by_name.setdefault(name, []).append(result)
        results[model] = {name: merge_rounds(rounds) for name, rounds in rounds_by_name.items()}
        print(*table(model, results[model], peak_rates, args.kinds), sep="\n")
        if args.shapes:
            print(*shapes_table(results[model], args.kinds), sep="\n")
        print(flush=True)
    for kind in args.kinds:
        why = peak_rates[kind].why
        rate_text = f"{peak_rates[kind].rate / 1e9:,.0f} GOP/s" if peak_rates[kind].rate else "the best rate measured"
        print(f"peak of {kind}: {rate_text} ({why})")
    print_machine(threads)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def expand_kernels(values: list[str]) -> list[str]:
    """Return the values of DELTAW_KERNELS to measure, with "all" expanded."""
    if "all" not in values:
        return values
    from deltaw.kernels.processor import processor_flags
    from deltaw.kernels.variants import allowed, file_of

    built = [v.name for v in allowed(processor_flags()) if file_of(v).is_file()]
    return [name for value in values for name in (built if value == "all" else [value])]


def run(job: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return the rates with this value of DELTAW_KERNELS, measured in a new process.

    Prints the reason and returns None if the process fails.
    """
    variables = {} if name == "auto" else {"DELTAW_KERNELS": name}
    process = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--child", json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, **variables, "OMP_NUM_THREADS": str(job["threads"])},
    )
    for line in process.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    print(f"{name}: not measured: {(process.stderr.strip().splitlines() or ['no output'])[-1][:200]}", flush=True)
    return None


def child(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(job["threads"])
    config = config_of(job["model"])
    size = MODELS[job["model"]]
    rows = size.rows * size.length
    shapes = [(rows, i, o, count) for (i, o), count in linear_shapes(config).items()]
    shapes.append((HEAD_ROWS, config.hidden_size, config.vocab_size, max(1, rows // HEAD_ROWS)))
    measured = []
    for kind in job["kinds"]:
        for m, i, o, count in shapes:
            deltaw_seconds, torch_seconds = product_seconds(kind, m, i, o, job["calls"])
            measured.append(
                {"kind": kind, "shape": [m, i, o], "count": count, "deltaw": deltaw_seconds, "torch": torch_seconds}
            )
    return {"products": measured, "notes": [kernels_text()]}


def product_seconds(kind: str, rows: int, inputs: int, outputs: int, calls: int) -> tuple[float, float]:
    """Return the median seconds of a product and its gradient, of deltaw and of torch."""
    import torch

    from deltaw.kernels import linear as products

    torch.manual_seed(0)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    x = torch.randn(rows, inputs).to(dtype)
    grad = torch.randn(rows, outputs).to(dtype)
    if kind == "int8":
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        x_int8, grad_int8 = (torch.randint(-127, 128, t.shape, dtype=torch.int8) for t in (x, grad))
        scale = torch.full((outputs,), 0.01)
    else:
        weight = torch.randn(outputs, inputs).to(dtype)
        scale = None
        x_int8 = x
        grad_int8 = grad
    copies = min(COPIES, max(2, COLD_BYTES // (weight.numel() * weight.element_size())))
    weights = [weight.clone() for _ in range(copies)]
    multiply: Callable[..., Any] = torch._int_mm if kind == "int8" else torch.mm

    def deltaw_products(w: torch.Tensor) -> None:
        products.linear(x, products.LinearProduct(w, scale=scale))
        products.linear_backward(grad, products.LinearProduct(w, scale=scale))

    def torch_products(w: torch.Tensor) -> None:
        multiply(x_int8, w.t())
        multiply(grad_int8, w)

    durations: dict[str, list[float]] = {"deltaw": [], "torch": []}
    for call in range(calls + 1):
        for name, products_of_side in (("deltaw", deltaw_products), ("torch", torch_products)):
            start = time.perf_counter()
            products_of_side(weights[(2 * call + (name == "torch")) % copies])
            durations[name].append(time.perf_counter() - start)
    deltaw_seconds, torch_seconds = (statistics.median(durations[name][1:]) for name in ("deltaw", "torch"))
    return deltaw_seconds, torch_seconds


def merge_rounds(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over rounds for each product."""
    products = []
    for measurements in zip(*(r["products"] for r in rounds), strict=True):
        seconds = {side: statistics.median(p[side] for p in measurements) for side in ("deltaw", "torch")}
        products.append({**measurements[0], **seconds})
    return {"products": products, "notes": rounds[-1]["notes"]}


def operations(product: dict[str, Any]) -> int:
    rows, inputs, outputs = product["shape"]
    return 4 * rows * inputs * outputs


def rate(result: dict[str, Any], kind: str, side: str) -> float:
    """Return the operations per second over a model."""
    selected = [p for p in result["products"] if p["kind"] == kind]
    operation_count = sum(p["count"] * operations(p) for p in selected)
    return operation_count / sum(p["count"] * p[side] for p in selected)


def table(model: str, results: dict[str, Any], peak_rates: dict[str, Peak], kinds: list[str]) -> list[str]:
    """Return a line for each kernel variant and number type. The exact types are fp32 and bf16, whichever is faster in
    torch.
    """
    if not results:
        return [f"{model}: no results"]
    lines = [
        f"\n| {model} | type | deltaw, GOP/s | torch, same type | torch's best exact | the peak |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    exact = [kind for kind in kinds if kind != "int8"]
    for name, result in results.items():
        best = max((rate(result, kind, "torch") for kind in exact), default=0.0)
        for kind in kinds:
            deltaw_rate = rate(result, kind, "deltaw")
            torch_rate = rate(result, kind, "torch")
            row = f"| {name} | {kind} | {deltaw_rate / 1e9:,.0f} "
            row += f"| {deltaw_rate / torch_rate:.0%} of {torch_rate / 1e9:,.0f} |"
            row += f" {deltaw_rate / best:.0%} of {best / 1e9:,.0f} |" if best else " |"
            top = top_rate(results, kind, peak_rates)
            lines.append(f"{row} {deltaw_rate / top:.0%} of {top / 1e9:,.0f} |")
    return [*lines, *(f"{name}: {note}" for name, result in results.items() for note in result["notes"])]


def top_rate(results: dict[str, Any], kind: str, peak_rates: dict[str, Peak]) -> float:
    """Return the peak of a type, or the best measured rate if the peak is unknown."""
    measured = (rate(result, kind, side) for result in results.values() for side in ("deltaw", "torch"))
    return peak_rates[kind].rate or max(measured)


def shapes_table(results: dict[str, Any], kinds: list[str]) -> list[str]:
    """Return a line for each product."""
    lines = [
        "\n| | type | rows × inputs × outputs | deltaw, GOP/s | torch, same type |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for name, result in results.items():
        for product in result["products"]:
            if product["kind"] not in kinds:
                continue
            giga_operations = operations(product) / 1e9
            shape = " × ".join(f"{size:,}" for size in product["shape"])
            lines.append(
                f"| {name} | {product['kind']} | {shape} | {giga_operations / product['deltaw']:,.0f} "
                f"| {giga_operations / product['torch']:,.0f} |"
            )
    return lines


if __name__ == "__main__":
    main()
