"""Kill a run of a model with billions of parameters in each phase, resume it, and compare it with an uninterrupted run.

    python benchmarks/large_killed.py [--model llama-3.1-8b] [--precision nf4] [--folder FOLDER]

The run is killed with SIGKILL while it loads the model, quantizes the weights, computes a step and writes a checkpoint,
and is started again each time. Adapter and metrics must then be equal to the bit, and no partial file may be left. The
model has random weights (``models.py``) and remains in ``--folder``.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from killed import outcome_of
from large import write_rows
from machine import print_machine
from models import SHAPES, write_model

QUANTIZING = {"nf4": "rounding the weights to NF4", "int8": "quantizing the weights to int8"}
POLL = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", choices=list(SHAPES))
    parser.add_argument("--precision", default="nf4", choices=list(QUANTIZING))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "deltaw-large")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the kill times")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print_machine()
    model = write_model(args.model, args.folder / f"{args.model}-bf16", "bf16")
    rows = write_rows(args.folder / "rows.jsonl")
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        is_equal = check(args, model, rows, Path(scratch))
    sys.exit(0 if is_equal else 1)


def check(args: argparse.Namespace, model: Path, rows: Path, scratch: Path) -> bool:
    """Train without interruption and with kills. Return True if both are equal and no partial file is left."""
    generator = random.Random(args.seed)
    # Results that runs store for later ones are not shared, so that both runs compute them.
    whole = Launch(args, model, rows, scratch / "whole", scratch / "cache-whole")
    whole.wait()
    print(f"uninterrupted: {whole.seconds:.0f} s, quantization begins after {whole.quantizing:.0f} s", flush=True)
    for phase in ("loading", "quantization", "step", "checkpoint"):
        launch = Launch(args, model, rows, scratch / "killed", scratch / "cache-killed")
        seconds = launch.kill(phase, generator.random(), whole.quantizing)
        print(f"killed in phase {phase} after {seconds:.0f} s", flush=True)
    resumed = Launch(args, model, rows, scratch / "killed", scratch / "cache-killed")
    resumed.wait()
    (adapter, metrics), expected = outcome_of(scratch / "killed"), outcome_of(scratch / "whole")
    partial = [str(path) for path in scratch.rglob("*") if "partial" in path.name or path.name.endswith(".tmp")]
    print(f"resumed: {resumed.seconds:.0f} s, {len(metrics)} lines of metrics")
    print(f"adapter equal to the bit: {adapter == expected[0]}, metrics: {metrics == expected[1]}")
    print(f"partial files: {', '.join(partial) or 'none'}")
    return (adapter, metrics) == expected and not partial


class Launch:
    """One start of the run, on a pseudoterminal, which shows the progress of quantization."""

    def __init__(self, args: argparse.Namespace, model: Path, rows: Path, run: Path, cache: Path) -> None:
        options = {
            "model": model, "data.train": rows, "data.rows": 16, "data.eval": "null", "data.max_length": 32,
            "data.long_rows": "cut", "precision": args.precision, "lora.rank": 16, "lora.target_modules": "all-linear",
            "train.batch_size": 2, "train.epochs": 1, "train.drift": "false", "train.checkpoint_every": 1,
            "output": run,
        }  # fmt: skip
        arguments = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        self._metrics = run / "metrics.jsonl"
        self._checkpoints = run / "checkpoints"
        self._marker = QUANTIZING[args.precision]
        self._started = time.monotonic()
        self._text = ""
        self.quantizing = 0.0
        self.seconds = 0.0
        self._terminal, side = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deltaw", "train", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=side,
            stderr=side,
            env={**os.environ, "DELTAW_CACHE": str(cache), "TERM": "xterm"},
        )
        os.close(side)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait(self) -> None:
        """Wait for the end of the run."""
        code = self._process.wait()
        self._reader.join()
        os.close(self._terminal)
        self.seconds = time.monotonic() - self._started
        if code:
            sys.exit(f"status {code}: {self._text[-3000:]}")

    def kill(self, phase: str, share: float, quantizing: float) -> float:
        """Kill the run in a phase.

        Args:
            phase: ``loading``, ``quantization``, ``step`` or ``checkpoint``.
            share: Random number in 0..1.
            quantizing: Seconds from the start to quantization in the uninterrupted run.

        Returns:
            Seconds from the start to the kill.
        """
        steps_before = self._count_steps()
        while True:
            if self._process.poll() is not None:
                sys.exit(f"the run ended before phase {phase}: {self._text[-3000:]}")
            elapsed = time.monotonic() - self._started
            if phase == "loading" and elapsed > quantizing * (0.2 + 0.4 * share):
                break
            if phase == "quantization" and self.quantizing:
                time.sleep(1 + 3 * share)
                break
            if phase == "step" and self._count_steps() > steps_before:
                time.sleep(2 * share)
                break
            if phase == "checkpoint" and any(self._checkpoints.glob(".partial-*")):
                time.sleep(0.05 * share)
                break
            time.sleep(POLL)
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        os.close(self._terminal)
        if phase == "loading" and self.quantizing:
            sys.exit("the run quantized weights before it could be killed while loading")
        return time.monotonic() - self._started

    def _count_steps(self) -> int:
        if not self._metrics.exists():
            return 0
        return sum(
            "loss" in json.loads(line) for line in self._metrics.read_text().splitlines(True) if line[-1] == "\n"
        )

    def _read(self) -> None:
        """Collect the output, and record when quantization is first shown."""
        while True:
            try:
                data = os.read(self._terminal, 65536)
            except OSError:  # the last process that has the other side open has ended
                return
            if not data:
                return
            self._text += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode(errors="replace"))
            if not self.quantizing and self._marker in self._text:
                self.quantizing = time.monotonic() - self._started


if __name__ == "__main__":
    main()
