"""Rates of deltaw's matrix products, by kernels and arithmetic, beside torch's and the processor's peak.

    python benchmarks/products.py [--kernels auto avx2 avx512_bf16:wide] [--models smollm2] [--kinds fp32]

The products of a training step: each linear layer's forward and its gradient of the inputs, and those of the
output head for 256 labels. deltaw's go through its own operator, in a process of its own for each entry of
--kernels: a value of DELTAW_KERNELS, "auto" for what deltaw chooses, or "all" for every variant that was
built and runs here. torch's are its own products of the same type, for int8 the bare product of two int8
matrices; deltaw's int8 products also round their input and apply the scales. Both alternate on the same
operands, with weights that take turns, so that they are not in the cache. A rate is that of a whole model:
the operations of all its layers over their time.
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
# Bytes of weights of one shape that take turns, and the most copies of one.
COLD_BYTES, COPIES = 96 * 2**20, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=["auto"], metavar="VARIANT[:ARITHMETIC]")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["smollm2", "qwen2.5-0.5b"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all kernels")
    parser.add_argument("--calls", type=int, default=5, help="timed calls of each product in a round")
    parser.add_argument("--threads", type=int, default=0, help="0: the number that deltaw chooses")
    parser.add_argument("--shapes", action="store_true", help="print each shape's rates too")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print("RESULT " + json.dumps(child(json.loads(arguments.child))), flush=True)
        return

    from deltaw.machine.choices import choose_threads

    threads = arguments.threads or choose_threads().value
    known = peaks(threads)
    results: dict[str, dict[str, Any]] = {}
    for model in arguments.models:
        job = {"model": model, "kinds": arguments.kinds, "calls": arguments.calls, "threads": threads}
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(arguments.repeats):
            for name in every(arguments.kernels):
                result = run(job, name)
                if result is not None:
                    found.setdefault(name, []).append(result)
        results[model] = {name: merged(rounds) for name, rounds in found.items()}
        print(*table(model, results[model], known, arguments.kinds), sep="\n")
        if arguments.shapes:
            print(*shapes_table(results[model], arguments.kinds), sep="\n")
        print(flush=True)
    for kind in arguments.kinds:
        why = known[kind].why
        rate_text = f"{known[kind].rate / 1e9:,.0f} GOP/s" if known[kind].rate else "the best rate measured"
        print(f"peak of {kind}: {rate_text} ({why})")
    print_machine(threads)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def every(asked: list[str]) -> list[str]:
    """The values of DELTAW_KERNELS to measure, "all" written out."""
    if "all" not in asked:
        return asked
    from deltaw.kernels.processor import processor_flags
    from deltaw.kernels.variants import allowed, file_of

    built = [v.name for v in allowed(processor_flags()) if file_of(v).is_file()]
    return [name for given in asked for name in (built if given == "all" else [given])]


def run(job: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The rates with DELTAW_KERNELS set so, in a new process; None, with a line that says why, if refused."""
    chosen = {} if name == "auto" else {"DELTAW_KERNELS": name}
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--child", json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, **chosen, "OMP_NUM_THREADS": str(job["threads"])},
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    print(f"{name}: not measured: {(done.stderr.strip().splitlines() or ['no output'])[-1][:200]}", flush=True)
    return None


def child(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(job["threads"])
    config, size = config_of(job["model"]), MODELS[job["model"]]
    rows = size.rows * size.length
    shapes = [(rows, i, o, count) for (i, o), count in linear_shapes(config).items()]
    shapes.append((HEAD_ROWS, config.hidden_size, config.vocab_size, max(1, rows // HEAD_ROWS)))
    measured = []
    for kind in job["kinds"]:
        for m, i, o, count in shapes:
            ours, theirs = product_seconds(kind, m, i, o, job["calls"])
            measured.append({"kind": kind, "shape": [m, i, o], "count": count, "deltaw": ours, "torch": theirs})
    return {"products": measured, "notes": [kernels_text()]}


def product_seconds(kind: str, rows: int, inputs: int, outputs: int, calls: int) -> tuple[float, float]:
    """Median seconds of a product and of its gradient together: deltaw's and torch's."""
    import torch

    from deltaw.kernels import linear as products

    torch.manual_seed(0)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    x, grad = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
    if kind == "int8":
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        x_int8, grad_int8 = (torch.randint(-127, 128, t.shape, dtype=torch.int8) for t in (x, grad))
        scale = torch.full((outputs,), 0.01)
    else:
        weight, scale, x_int8, grad_int8 = torch.randn(outputs, inputs).to(dtype), None, x, grad
    copies = min(COPIES, max(2, COLD_BYTES // (weight.numel() * weight.element_size())))
    weights = [weight.clone() for _ in range(copies)]
    multiply: Callable[..., Any] = torch._int_mm if kind == "int8" else torch.mm

    def deltaws(w: torch.Tensor) -> None:
        products.linear(x, products.Product(w, scale=scale))
        products.linear_backward(grad, products.Product(w, scale=scale))

    def torchs(w: torch.Tensor) -> None:
        multiply(x_int8, w.t())
        multiply(grad_int8, w)

    found: dict[str, list[float]] = {"deltaw": [], "torch": []}
    for call in range(calls + 1):
        for name, both in (("deltaw", deltaws), ("torch", torchs)):
            begun = time.perf_counter()
            both(weights[(2 * call + (name == "torch")) % copies])
            found[name].append(time.perf_counter() - begun)
    ours, theirs = (statistics.median(found[name][1:]) for name in ("deltaw", "torch"))
    return ours, theirs


def merged(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds' medians, product by product."""
    products = []
    for same in zip(*(r["products"] for r in rounds), strict=True):
        seconds = {side: statistics.median(p[side] for p in same) for side in ("deltaw", "torch")}
        products.append({**same[0], **seconds})
    return {"products": products, "notes": rounds[-1]["notes"]}


def operations(product: dict[str, Any]) -> int:
    rows, inputs, outputs = product["shape"]
    return 4 * rows * inputs * outputs


def rate(result: dict[str, Any], kind: str, side: str) -> float:
    """Operations a second over a whole model."""
    chosen = [p for p in result["products"] if p["kind"] == kind]
    done = sum(p["count"] * operations(p) for p in chosen)
    return done / sum(p["count"] * p[side] for p in chosen)


def table(model: str, results: dict[str, Any], known: dict[str, Peak], kinds: list[str]) -> list[str]:
    """A line for each kernels and kind of number; exact are fp32 and bf16, whichever torch does faster."""
    if not results:
        return [f"{model}: nothing was measured"]
    lines = [
        f"\n| {model} | type | deltaw, GOP/s | torch, same type | torch's best exact | the peak |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    exact = [kind for kind in kinds if kind != "int8"]
    for name, result in results.items():
        best = max((rate(result, kind, "torch") for kind in exact), default=0.0)
        for kind in kinds:
            ours, theirs = rate(result, kind, "deltaw"), rate(result, kind, "torch")
            row = f"| {name} | {kind} | {ours / 1e9:,.0f} | {ours / theirs:.0%} of {theirs / 1e9:,.0f} |"
            row += f" {ours / best:.0%} of {best / 1e9:,.0f} |" if best else " |"
            top = top_rate(results, kind, known)
            lines.append(f"{row} {ours / top:.0%} of {top / 1e9:,.0f} |")
    return [*lines, *(f"{name}: {note}" for name, result in results.items() for note in result["notes"])]


def top_rate(results: dict[str, Any], kind: str, known: dict[str, Peak]) -> float:
    """The peak of a kind, or the best rate of a whole model that was measured where no peak is known."""
    measured = (rate(result, kind, side) for result in results.values() for side in ("deltaw", "torch"))
    return known[kind].rate or max(measured)


def shapes_table(results: dict[str, Any], kinds: list[str]) -> list[str]:
    """A line for each product."""
    lines = [
        "\n| | type | rows × inputs × outputs | deltaw, GOP/s | torch, same type |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for name, result in results.items():
        for product in result["products"]:
            if product["kind"] not in kinds:
                continue
            done = operations(product) / 1e9
            shape = " × ".join(f"{size:,}" for size in product["shape"])
            lines.append(
                f"| {name} | {product['kind']} | {shape} | {done / product['deltaw']:,.0f} "
                f"| {done / product['torch']:,.0f} |"
            )
    return lines


if __name__ == "__main__":
    main()
