"""Training steps beside other programs: tokens per second of deltaw and PEFT with Python loops beside them.

    python benchmarks/busy.py [--loops 0 1 2 4] [--sides deltaw-auto peft-bf16] [--model smollm2] [--steps 12]

Sides and models are those of ``step.py``. Each side runs in its own process. A fair share of N cores beside K loops is
N / (N + K) of the speed without loops, if the side's N threads get as much time as each loop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from machine import print_machine
from step import SIDES
from step_models import MODELS, prepare_model
from step_sides import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--loops", nargs="+", type=int, default=[0, 1, 2, 4])
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=["deltaw-auto", "peft-bf16"], metavar="SIDE")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=0, help="0: chosen by deltaw")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "deltaw-benchmarks")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()

    from deltaw.machine.choices import choose_threads

    reference, folder = prepare_model(args.model, args.models)
    threads = args.threads or choose_threads().value
    options = {"model": args.model, "rows": None, "length": None, "reference": reference, "folder": folder}
    speeds: dict[str, dict[int, float]] = {name: {} for name in args.sides}
    for count in args.loops:
        for name in args.sides:
            job = {**SIDES[name], **options, "threads": threads, "steps": args.steps}
            with busy_loops(count):
                speeds[name][count] = run(job, {})["tokens_per_second"]
            print(f"{count} loops: {name:26} {speeds[name][count]:8.1f} tokens/s", flush=True)
    print("\n| loops | fair share |", " | ".join(args.sides), "|")
    print("| ---: | ---: |", " | ".join("---:" for _ in args.sides), "|")
    for count in args.loops:
        cells = [f"{speeds[name][count] / speeds[name][args.loops[0]]:.0%}" for name in args.sides]
        print(f"| {count} | {threads / (threads + count):.0%} |", " | ".join(cells), "|")
    print_machine(threads)
    if args.json:
        args.json.write_text(json.dumps(speeds, indent=1))


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Run Python processes that compute within the block."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


if __name__ == "__main__":
    main()
