"""Difference between the log-probabilities of the decoding engine and of the trainer for sampled tokens.

    python benchmarks/mismatch.py [--precision fp32 bf16 int8] [--activated] [--new 16 64 256]

SmolLM2-135M-Instruct with LoRA rank 16 on all linear layers after two training steps. The engine samples 8 completions
of each of 8 prompts for each length. The trainer computes log-probabilities of the same tokens with the same adapter.
For comparison, the difference between transformers' cached generation and its forward pass is measured on the first
completion of each prompt, without an adapter.
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
from deltaw.tasks.reward.losses import Rollout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16", "int8"], default=["fp32", "bf16", "int8"])
    parser.add_argument("--activated", action="store_true", help="use an adapter that is not active on the prompt")
    parser.add_argument(
        "--new", type=int, nargs="+", default=[16, 64, 256], help="maximum number of tokens of a completion"
    )
    args = parser.parse_args()
    table = ["| precision | tokens | engine from trainer | largest | transformers, generation from forward | ratio |"]
    table.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for precision in args.precision:
        rows = [row for new in args.new for row in sample_rollouts(precision, new, args.activated)]
        errors = np.concatenate([_completion_logprobs(row, row.old_logprobs) - _engine_logprobs(row) for row in rows])
        transformers_error = np.nan if precision == "int8" else np.abs(transformers_errors(rows[::8], precision)).mean()
        mean = np.abs(errors).mean()
        cells = (
            precision,
            f"{len(errors):,}",
            f"{mean:.2e}",
            f"{np.abs(errors).max():.2e}",
            f"{transformers_error:.2e}",
        )
        table.append(f"| {' | '.join(cells)} | {mean / transformers_error:.2f} |")
        print(table[-1], flush=True)
    print("\n".join(["", *table]))
    print_machine(choose_threads().value)


def sample_rollouts(precision: str, new: int, activated: bool) -> list[Rollout]:
    """Return completions sampled after two steps, with both log-probabilities of each token."""
    with tempfile.TemporaryDirectory() as work:
        rows, reward_file, output = (Path(work) / name for name in ("rows.jsonl", "reward.py", "run"))
        prompts = rows_of({"prompts": 8, "steps": 3})
        rows.write_text("".join(json.dumps(row) + "\n" for row in prompts))
        reward_file.write_text(
            "def lengths(completions, **columns):\n    return [len(text) % 10 / 10 for text in completions]\n"
        )
        lora = {"rank": RANK, "alpha": ALPHA, "target_modules": "all-linear"}
        settings = {
            "model": MODEL,
            "task": "rl",
            "data": {"train": str(rows), "eval": 0},
            "reward": {"functions": [f"{reward_file}:lengths"], "group": 8, "max_new_tokens": new, "updates": 2},
            "lora": lora | ({"active": "completion"} if activated else {}),
            "train": {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-3, "drift": False},
            "precision": precision,
            "output": str(output),
        }
        deltaw.fit(settings)
        return read_rollouts(output / "rollouts" / "1.json")


def read_rollouts(file: Path) -> list[Rollout]:
    """Read the completions of a round that a run with several updates per round stored in its folder."""
    rollouts = []
    for fields in json.loads(file.read_text()):
        stored = {name: value for name, value in fields.items() if isinstance(value, dict)}
        arrays = {name: np.array(value["values"], value["dtype"]) for name, value in stored.items()}
        rollouts.append(Rollout(**(fields | arrays)))
    return rollouts


def _engine_logprobs(row: Rollout) -> np.ndarray:
    assert row.engine_logprobs is not None
    return row.engine_logprobs


def _completion_logprobs(row: Rollout, values: np.ndarray | None) -> np.ndarray:
    """Return the values of the tokens that have an engine log-probability, which excludes the end token."""
    assert values is not None
    return values[: len(_engine_logprobs(row))]


@torch.no_grad()
def transformers_errors(rows: list[Rollout], precision: str) -> np.ndarray:
    """Return the absolute differences between log-probabilities of cached steps and of one forward pass."""
    model = load(MODEL, precision=precision, device="cpu", log=lambda line: None).model.eval()
    differences = []
    for row in rows:
        ids = torch.tensor(row.tokens)[None].long()
        start = row.prompt_length
        full = model(input_ids=ids).logits[0].float().log_softmax(-1)
        out = model(input_ids=ids[:, :start], use_cache=True)
        for position in range(start, start + len(_engine_logprobs(row))):
            step = out.logits[0, -1].float().log_softmax(-1)
            differences.append(float(step[ids[0, position]] - full[position - 1, ids[0, position]]))
            out = model(input_ids=ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
    return np.array(differences)


if __name__ == "__main__":
    main()
