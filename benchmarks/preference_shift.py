"""Effect of preference training on generated answers to held-out prompts.

    python examples/rows.py lower-case
    python -m deltaw train examples/lower-case.yaml
    python benchmarks/preference_shift.py runs/lower-case [--prompts 60]

The base model and the adapter answer the prompts of the run's held-out pairs with greedy decoding. Prints the fraction
of lower-case answers with 95 % intervals over prompts, the number of prompts for which only one of the models answers
in lower case, the fraction of held-out pairs whose chosen answer the adapter prefers, and the drift of general answers.
"""

from __future__ import annotations

import argparse

import numpy as np
from machine import print_machine

from deltaw.decoding.opening import SessionGenerator
from deltaw.inference.open_run import open_run
from deltaw.inference.run_drift import measure_run_drift
from deltaw.training.evaluation.base import mean_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--prompts", type=int, default=60, help="number of held-out prompts")
    parser.add_argument("--tokens", type=int, default=40, help="maximum number of tokens of an answer")
    args = parser.parse_args()
    adapted_model = open_run(args.run, log=print)
    assert adapted_model.config is not None
    held_out = adapted_model.task.read(adapted_model.config.data, seed=adapted_model.config.data_seed).held_out
    firsts = [pair.rows[0] for pair in held_out[: args.prompts]]
    prompts = [row.tokens[: row.prompt_length] for row in firsts]
    with adapted_model.base():
        base = [text.text for text in SessionGenerator(adapted_model, print)(prompts, args.tokens, 4096, None)]
    tuned = [text.text for text in SessionGenerator(adapted_model, print)(prompts, args.tokens, 4096, None)]
    lower = {"base": in_lower_case(base), "adapter": in_lower_case(tuned)}
    for name, values in lower.items():
        print(f"answers of the {name} in lower case: {share(values)}")
    wins = ((lower["adapter"] > lower["base"]).sum(), (lower["adapter"] < lower["base"]).sum())
    print(f"of {len(prompts)} prompts {wins[0]} go to the adapter, {wins[1]} to the base model")
    score = adapted_model.score(held_out).evaluation
    print(f"held-out pairs whose chosen answer the adapter prefers: {share(score.per_row)}")
    print(f"margin {score.metrics['margin']:.2f}, loss {score.metrics['loss']:.3f} (0.693 of the base model)")
    drift = measure_run_drift(adapted_model)
    if drift is not None:
        print(*drift.lines(), sep="\n")
    for prompt, text, tuned_text in list(zip(prompts, base, tuned, strict=True))[:3]:
        print(f"\n{adapted_model.tokenizer.decode(prompt[-30:])!r}\n  base:    {text!r}\n  adapter: {tuned_text!r}")
    print_machine()


def in_lower_case(texts: list[str]) -> np.ndarray:
    """Return (texts,) 1.0 for texts that contain letters but no capital letter."""
    return np.array([float(any(map(str.isalpha, text)) and text == text.lower()) for text in texts])


def share(values: np.ndarray) -> str:
    low, high = mean_interval(values)
    return f"{values.mean():.1%} ({low:.1%} to {high:.1%}, {len(values)})"


if __name__ == "__main__":
    main()
