"""How far the log-probabilities of the decoding engine are from the trainer's, for the tokens that it drew.

    python benchmarks/mismatch.py [--precision fp32 bf16 int8] [--activated] [--new 16 64 256]

SmolLM2-135M-Instruct, LoRA rank 16 on all linear layers that two steps have moved. The engine draws 8 completions of
each of 8 prompts for each length; its log-probability of a token is compared with what the trainer computes for the
same tokens with the same adapter. Beside it, for the first completion of each prompt, without an adapter: how far
transformers' cached generation is from its own forward pass.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from machine import print_machine
from rewards import ALPHA, MODEL, RANK, rows_of

import deltaw
from deltaw.hub.loading import load
from deltaw.machine.choices import choose_threads
from deltaw.training.rollouts.kept import rollouts_in
from deltaw.training.rollouts.losses import Rollout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16", "int8"], default=["fp32", "bf16", "int8"])
    parser.add_argument("--activated", action="store_true", help="an adapter that leaves the prompt to the base model")
    parser.add_argument("--new", type=int, nargs="+", default=[16, 64, 256], help="the most tokens of a completion")
    given = parser.parse_args()
    table = ["| precision | tokens | engine from trainer | largest | transformers, generation from forward | ratio |"]
    table.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for precision in given.precision:
        rows = [row for new in given.new for row in drawn(precision, new, given.activated)]
        off = np.concatenate([_written(row, row.old_logprobs) - _engine(row) for row in rows])
        theirs = np.nan if precision == "int8" else np.abs(of_transformers(rows[::8], precision)).mean()
        mean = np.abs(off).mean()
        cells = (precision, f"{len(off):,}", f"{mean:.2e}", f"{np.abs(off).max():.2e}", f"{theirs:.2e}")
        table.append(f"| {' | '.join(cells)} | {mean / theirs:.2f} |")
        print(table[-1], flush=True)
    print("\n".join(["", *table]))
    print_machine(choose_threads().value)


def drawn(precision: str, new: int, activated: bool) -> list[Rollout]:
    """Completions after two steps, with both log-probabilities of each token."""
    with tempfile.TemporaryDirectory() as work:
        rows, own, output = (Path(work) / name for name in ("rows.jsonl", "own.py", "run"))
        asked = rows_of({"prompts": 8, "steps": 3})
        rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
        own.write_text(
            "def lengths(completions, **columns):\n    return [len(text) % 10 / 10 for text in completions]\n"
        )
        lora = {"rank": RANK, "alpha": ALPHA, "target_modules": "all-linear"}
        settings = {
            "model": MODEL,
            "task": "reward",
            "data": {"train": str(rows), "eval": 0},
            "reward": {"functions": [f"{own}:lengths"], "group": 8, "max_new_tokens": new, "updates": 2},
            "lora": lora | ({"activation": "completion"} if activated else {}),
            "train": {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-3, "drift": False},
            "precision": precision,
            "output": str(output),
        }
        deltaw.fit(settings)
        return rollouts_in((output / "rollouts" / "1.json").read_text())


def _engine(row: Rollout) -> np.ndarray:
    assert row.engine_logprobs is not None
    return row.engine_logprobs


def _written(row: Rollout, values: np.ndarray | None) -> np.ndarray:
    """Of the tokens that the engine has a log-probability of: an end token is left out."""
    assert values is not None
    return values[: len(_engine(row))]


@torch.no_grad()
def of_transformers(rows: list[Rollout], precision: str) -> np.ndarray:
    """Differences of the log-probabilities of cached steps from those of one forward pass, row by row."""
    model = load(MODEL, precision=precision, device="cpu", say=lambda line: None).model.eval()
    found = []
    for row in rows:
        ids, begin = torch.tensor(row.tokens)[None].long(), row.prompt_length
        whole = model(input_ids=ids).logits[0].float().log_softmax(-1)
        out = model(input_ids=ids[:, :begin], use_cache=True)
        for place in range(begin, begin + len(_engine(row))):
            step = out.logits[0, -1].float().log_softmax(-1)
            found.append(float(step[ids[0, place]] - whole[place - 1, ids[0, place]]))
            out = model(input_ids=ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
    return np.array(found)


if __name__ == "__main__":
    main()
