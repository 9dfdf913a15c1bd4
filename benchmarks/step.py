"""One training step: tokens per second and peak memory, compared with PEFT's best and with the floor.

    python benchmarks/step.py [--model qwen2.5-0.5b] [--repeats 3] [--sides deltaw-auto peft-fp32] [--avx2]
    python benchmarks/step.py --in-turns [--steps 40] [--sides deltaw-auto peft-bf16-compiled]

LoRA rank 16 on all linear layers, a label at each token: SmolLM2-135M-Instruct on 2 rows of 512 tokens, or
random weights of the sizes of Qwen2.5-0.5B, Llama-3.2-1B or Llama-3.2-3B on 1 row of 512. Every side runs in
a process of its own, and the sides alternate. Each process reports the median of its steps; the table shows
medians over the rounds, and ratios are medians of the rounds' own ratios.

PEFT's side is the fastest of its precisions, compiled or not, on this machine. The floor is a lower bound on
the time of a step in exact arithmetic: the time of its matrix products alone, as torch computes them in bf16
or in fp32, whichever is faster here, with attention and the low-rank update counted at the same rate.

With --in-turns all sides are loaded at once and take turns of four steps, of which the first does not count:
on a host whose other guests come and go, ratios are those of neighboring turns. The floor is left out.

With --avx2 all sides are confined to AVX2: torch and its libraries by their own variables, deltaw's kernels
by DELTAW_KERNELS.
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
from step_models import MODELS, config_of, made, parameter_count
from step_sides import STEPS_OF_A_TURN, run, run_in_turns

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
USUAL = [
    *("floor-bf16", "floor-fp32", "deltaw-auto", "deltaw-int8"),
    *("peft-bf16", "peft-bf16-factors", "peft-fp32"),
    *("peft-bf16-compiled", "peft-bf16-factors-compiled", "peft-fp32-compiled"),
]
# What confines torch, MKL and oneDNN to AVX2; bf16 is emulated there, and the compiler may ignore them.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
AVX2_OF = {"floor": AVX2, "peft": AVX2, "deltaw": {**AVX2, "DELTAW_KERNELS": "avx2"}}
USUAL_AVX2 = ["floor-fp32", "deltaw-auto", "deltaw-fp32", "deltaw-int8", "peft-fp32"]
# Bytes of a weight while it is loaded and used, with some room for activations on top.
BYTES = {"bf16": 2, "int8": 2, "fp32": 4, "auto": 4}
ROOM = 1.3
MANY = 8  # from so many ratios on, their quartiles say more than their extremes
Found = dict[str, list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all sides")
    parser.add_argument("--steps", type=int, default=6, help="steps of each side; the first is timed apart")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=None, metavar="SIDE")
    parser.add_argument("--avx2", action="store_true", help="confine all sides to AVX2")
    parser.add_argument("--in-turns", action="store_true", help="all sides at once, some steps each in turn")
    parser.add_argument("--threads", type=int, default=0, help="0: the number that deltaw chooses")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "deltaw-benchmarks")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()

    if arguments.in_turns and arguments.steps < 2 * STEPS_OF_A_TURN:
        parser.error(f"--in-turns needs --steps of {2 * STEPS_OF_A_TURN} or more: the first turn does not count")

    from deltaw.machine.choices import choose_threads

    reference, folder = made(arguments.model, arguments.models)
    threads = arguments.threads or choose_threads().value
    names = arguments.sides or (USUAL_AVX2 if arguments.avx2 else USUAL)
    if arguments.in_turns:
        names = [name for name in names if SIDES[name]["side"] != "floor"]
    names = [name for name in names if fits(name, arguments.model, names if arguments.in_turns else ())]
    if not names:
        parser.error("no side fits: name fewer with --sides, or a smaller --model")
    jobs = {
        name: {
            **SIDES[name],
            "model": arguments.model,
            "reference": reference,
            "folder": folder,
            "threads": threads,
            "steps": arguments.steps,
        }
        for name in names
    }
    confined = {name: AVX2_OF[job["side"]] if arguments.avx2 else {} for name, job in jobs.items()}
    found: Found = run_in_turns(jobs, confined) if arguments.in_turns else {}
    for round_number in range(0 if arguments.in_turns else arguments.repeats):
        for name, job in jobs.items():
            found.setdefault(name, []).append(run(job, confined[name]))
            speed = found[name][-1]["tokens_per_second"]
            print(f"round {round_number + 1}: {name:26} {speed:8.1f} tokens/s", flush=True)
    size = MODELS[arguments.model]
    confined_to = ", all sides confined to AVX2" if arguments.avx2 else ""
    how_often = f"{len(found[names[0]])} {'turns' if arguments.in_turns else 'rounds'}"
    print(f"\n{arguments.model}, {size.rows} × {size.length} tokens{confined_to}, {how_often}")
    print(*table(found), "", *summary(found), sep="\n")
    print_machine(threads)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


def fits(name: str, model: str, together: Sequence[str] = ()) -> bool:
    """Whether a side's weights fit the free memory, or those of all sides that are there together with it;
    prints why not."""

    def needed(side: dict[str, Any]) -> float:
        if side["side"] == "floor":
            return 0
        return ROOM * BYTES[side["precision"]] * parameter_count(config_of(model))

    available = psutil.virtual_memory().available
    all_of_them = sum(needed(SIDES[each]) for each in together or [name])
    if all_of_them > available:
        print(f"{name} is skipped: {all_of_them / 1e9:.0f} GB are needed, {available / 1e9:.0f} GB are free")
    return all_of_them <= available


def median(found: Found, name: str, key: str = "tokens_per_second") -> float:
    return statistics.median(result[key] for result in found[name])


def best_of(found: Found, kind: str) -> str | None:
    """The fastest of the sides of a kind that were measured, without activation checkpointing."""
    names = [n for n in found if n.startswith(kind) and not n.endswith("checkpointing")]
    return max(names, key=lambda name: median(found, name), default=None)


def ratios(found: Found, name: str, other: str) -> list[float]:
    """The speed of one side over that of another, round by round."""
    return [
        one["tokens_per_second"] / two["tokens_per_second"] for one, two in zip(found[name], found[other], strict=True)
    ]


def table(found: Found) -> list[str]:
    """The medians as a Markdown table, with the best of PEFT and of the floors as 1 and 100 %."""
    floor, peer = best_of(found, "floor"), best_of(found, "peft")
    lines = [
        "| | tokens/s | of the floor | times PEFT's best | peak resident | above the weights | first step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, results in found.items():
        of_floor = f"{statistics.median(ratios(found, name, floor)):.0%}" if floor else ""
        times = f"{statistics.median(ratios(found, name, peer)):.2f}" if peer else ""
        row = f"| {name} | {median(found, name):.1f} | {of_floor} |"
        if "peak_bytes" in results[0]:
            peak, above = (median(found, name, key) / 1e6 for key in ("peak_bytes", "above_bytes"))
            first = median(found, name, "first_step")
            row += f" {times} | {peak:,.0f} MB | {above:,.0f} MB | {first:.1f} s |"
        else:
            row += f" | | | {median(found, name, 'rate') / 1e9:.0f} GFLOP/s |"
        lines.append(row)
    return lines


def spread(each: Sequence[float]) -> str:
    """Between what ratios lie: all of a few rounds, or the middle half of many turns."""
    if len(each) < MANY:
        return f"rounds {min(each):.2f} to {max(each):.2f}"
    low, _, high = statistics.quantiles(each, n=4)
    return f"half of the turns {low:.2f} to {high:.2f}"


def summary(found: Found) -> list[str]:
    """For each of deltaw's sides: times PEFT's best, share of the floor, and how it computed."""
    floor, peer = best_of(found, "floor"), best_of(found, "peft")
    lines = []
    for name in found:
        if not name.startswith("deltaw"):
            continue
        parts = []
        if peer:
            each = ratios(found, name, peer)
            parts.append(f"{statistics.median(each):.2f} times PEFT's best ({peer}; {spread(each)})")
        if floor:
            share = statistics.median(ratios(found, name, floor))
            parts.append(f"{share:.0%} of torch's best exact product rate ({floor})")
        lines.append(f"{name}: {'; '.join([*parts, found[name][-1]['how']])}")
    return lines


if __name__ == "__main__":
    main()
