"""Tokens per second and peak memory of a training step, compared with PEFT and a lower bound.

    python benchmarks/step.py [--model qwen2.5-0.5b] [--repeats 3] [--sides deltaw-auto peft-fp32] [--avx2]
    python benchmarks/step.py --in-turns [--steps 40] [--sides deltaw-auto peft-bf16-compiled]
    python benchmarks/step.py --model lfm2.5-350m --length 8192 [--sides deltaw-auto peft-bf16-factors]

LoRA rank 16 on all linear layers, with a label at each token. The models are SmolLM2-135M-Instruct on 2 rows of 512
tokens, or random weights with the sizes of other models on 1 row of 512. Every side runs in its own process, and the
sides alternate. Each process reports the median of its steps. The table shows medians over the rounds, and medians of
the ratios within each round.

PEFT is represented by its fastest precision on this machine, compiled or not. The floor is a lower bound on the time of
a step in exact arithmetic: the time of its matrix products as torch computes them in bf16 or fp32, whichever is faster.
Attention and the low-rank update are counted at the same rate. Recurrences and convolutions are not counted.

With --in-turns, all sides are loaded at once and alternate every four steps, of which the first is not counted. On a
shared host, ratios of adjacent turns are more reliable. The floor is not measured then.

With --avx2, all sides are restricted to AVX2: torch and its libraries with their environment variables, deltaw's
kernels with DELTAW_KERNELS.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from machine import print_machine
from step_models import MODELS, config_of, parameter_count, prepare_model
from step_sides import STEPS_PER_TURN, run, run_in_turns, shape_of_step

SIDES: dict[str, dict[str, Any]] = {
    "floor-bf16": {"side": "floor", "precision": "bf16"},
    "floor-fp32": {"side": "floor", "precision": "fp32"},
    **{f"deltaw-{p}": {"side": "deltaw", "precision": p} for p in ("auto", "bf16", "fp32", "int8")},
    "deltaw-auto-checkpointing": {"side": "deltaw", "precision": "auto", "checkpointing": True},
    "deltaw-int8-checkpointing": {"side": "deltaw", "precision": "int8", "checkpointing": True},
    "peft-bf16": {"side": "peft", "precision": "bf16"},
    "peft-bf16-factors": {"side": "peft", "precision": "bf16", "bf16_factors": True},
    "peft-fp32": {"side": "peft", "precision": "fp32"},
    "peft-bf16-compiled": {"side": "peft", "precision": "bf16", "compiled": True},
    "peft-bf16-factors-compiled": {"side": "peft", "precision": "bf16", "bf16_factors": True, "compiled": True},
    "peft-fp32-compiled": {"side": "peft", "precision": "fp32", "compiled": True},
    "peft-bf16-checkpointing": {"side": "peft", "precision": "bf16", "checkpointing": True},
}
DEFAULT_SIDES = [
    *("floor-bf16", "floor-fp32", "deltaw-auto", "deltaw-int8"),
    *("peft-bf16", "peft-bf16-factors", "peft-fp32"),
    *("peft-bf16-compiled", "peft-bf16-factors-compiled", "peft-fp32-compiled"),
]
# Restrict torch, MKL and oneDNN to AVX2. bf16 is emulated then, and torch.compile may ignore the variables.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
AVX2_OF = {"floor": AVX2, "peft": AVX2, "deltaw": {**AVX2, "DELTAW_KERNELS": "avx2"}}
DEFAULT_AVX2_SIDES = ["floor-fp32", "deltaw-auto", "deltaw-fp32", "deltaw-int8", "peft-fp32"]
# Bytes per weight during loading and training, and a factor for activations.
BYTES = {"bf16": 2, "int8": 2, "fp32": 4, "auto": 4}
MEMORY_FACTOR = 1.3
MIN_QUARTILE_COUNT = 8  # minimum number of ratios for printing quartiles instead of extremes
Results = dict[str, list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--rows", type=int, default=None, help="rows of a step")
    parser.add_argument("--length", type=int, default=None, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all sides")
    parser.add_argument("--steps", type=int, default=6, help="steps of each side; the first is timed separately")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=None, metavar="SIDE")
    parser.add_argument("--avx2", action="store_true", help="confine all sides to AVX2")
    parser.add_argument("--in-turns", action="store_true", help="load all sides at once and alternate between them")
    parser.add_argument("--threads", type=int, default=0, help="0: chosen by deltaw")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "deltaw-benchmarks")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()

    if args.in_turns and args.steps < 2 * STEPS_PER_TURN:
        parser.error(f"--in-turns needs --steps of {2 * STEPS_PER_TURN} or more: the first turn does not count")

    from deltaw.machine.choices import choose_threads

    reference, folder = prepare_model(args.model, args.models)
    threads = args.threads or choose_threads().value
    names = args.sides or (DEFAULT_AVX2_SIDES if args.avx2 else DEFAULT_SIDES)
    if args.in_turns:
        names = [name for name in names if SIDES[name]["side"] != "floor"]
    names = [name for name in names if fits(name, args.model, names if args.in_turns else ())]
    if not names:
        parser.error("no side fits: name fewer with --sides, or a smaller --model")
    jobs = {
        name: {
            **SIDES[name],
            "model": args.model,
            "rows": args.rows,
            "length": args.length,
            "reference": reference,
            "folder": folder,
            "threads": threads,
            "steps": args.steps,
        }
        for name in names
    }
    environments = {name: AVX2_OF[job["side"]] if args.avx2 else {} for name, job in jobs.items()}
    all_results: Results = run_in_turns(jobs, environments) if args.in_turns else {}
    for round_number in range(0 if args.in_turns else args.repeats):
        for name, job in jobs.items():
            all_results.setdefault(name, []).append(run(job, environments[name]))
            speed = all_results[name][-1]["tokens_per_second"]
            print(f"round {round_number + 1}: {name:26} {speed:8.1f} tokens/s", flush=True)
    rows, length = shape_of_step(jobs[names[0]])
    restriction = ", all sides confined to AVX2" if args.avx2 else ""
    count_text = f"{len(all_results[names[0]])} {'turns' if args.in_turns else 'rounds'}"
    print(f"\n{args.model}, {rows} × {length} tokens{restriction}, {count_text}")
    print(*table(all_results), "", *summary(all_results), sep="\n")
    print_machine(threads)
    if args.json:
        args.json.write_text(json.dumps(all_results, indent=1))


def fits(name: str, model: str, loaded_together: Sequence[str] = ()) -> bool:
    """Return True if the weights of a side, or of all ``loaded_together``, fit into free memory. Prints if not."""

    def needed(side: dict[str, Any]) -> float:
        if side["side"] == "floor":
            return 0
        return MEMORY_FACTOR * BYTES[side["precision"]] * parameter_count(config_of(model))

    available = psutil.virtual_memory().available
    required = sum(needed(SIDES[side_name]) for side_name in loaded_together or [name])
    if required > available:
        print(f"{name} is skipped: {required / 1e9:.0f} GB are needed, {available / 1e9:.0f} GB are free")
    return required <= available


def median(all_results: Results, name: str, key: str = "tokens_per_second") -> float:
    return statistics.median(result[key] for result in all_results[name])


def best_of(all_results: Results, kind: str) -> str | None:
    """Return the fastest measured side of a kind without activation checkpointing."""
    names = [n for n in all_results if n.startswith(kind) and not n.endswith("checkpointing")]
    return max(names, key=lambda name: median(all_results, name), default=None)


def ratios(all_results: Results, name: str, reference: str) -> list[float]:
    """Return the speed ratios of two sides, round by round."""
    return [
        first["tokens_per_second"] / second["tokens_per_second"]
        for first, second in zip(all_results[name], all_results[reference], strict=True)
    ]


def table(all_results: Results) -> list[str]:
    """Return a Markdown table of medians and of ratios to PEFT's best and the floor."""
    floor = best_of(all_results, "floor")
    peer = best_of(all_results, "peft")
    lines = [
        "| | tokens/s | of the floor | times PEFT's best | peak resident | above the weights | first step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, results in all_results.items():
        floor_share = f"{statistics.median(ratios(all_results, name, floor)):.0%}" if floor else ""
        ratio = f"{statistics.median(ratios(all_results, name, peer)):.2f}" if peer else ""
        row = f"| {name} | {median(all_results, name):.1f} | {floor_share} |"
        if "peak_bytes" in results[0]:
            peak, above = (median(all_results, name, key) / 1e6 for key in ("peak_bytes", "above_bytes"))
            first = median(all_results, name, "first_step")
            row += f" {ratio} | {peak:,.0f} MB | {above:,.0f} MB | {first:.1f} s |"
        else:
            row += f" | | | {median(all_results, name, 'rate') / 1e9:.0f} GFLOP/s |"
        lines.append(row)
    return lines


def spread(values: Sequence[float]) -> str:
    """Format the range of the ratios, or the interquartile range if there are enough ratios."""
    if len(values) < MIN_QUARTILE_COUNT:
        return f"rounds {min(values):.2f} to {max(values):.2f}"
    low, _, high = statistics.quantiles(values, n=4)
    return f"half of the turns {low:.2f} to {high:.2f}"


def summary(all_results: Results) -> list[str]:
    """Return a line for each deltaw side: ratio to PEFT's best, share of the floor, and the arithmetic used."""
    floor = best_of(all_results, "floor")
    peer = best_of(all_results, "peft")
    lines = []
    for name in all_results:
        if not name.startswith("deltaw"):
            continue
        parts = []
        if peer:
            values = ratios(all_results, name, peer)
            parts.append(f"{statistics.median(values):.2f} times PEFT's best ({peer}; {spread(values)})")
        if floor:
            share = statistics.median(ratios(all_results, name, floor))
            parts.append(f"{share:.0%} of torch's best exact product rate ({floor})")
        lines.append(f"{name}: {'; '.join([*parts, all_results[name][-1]['how']])}")
    return lines


if __name__ == "__main__":
    main()
