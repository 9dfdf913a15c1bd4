"""What a preference run changes: the answers a model writes to held-out prompts, before and after.

    python examples/rows.py lower-case
    python -m deltaw train examples/lower-case.yaml
    python benchmarks/preference_shift.py runs/lower-case [--prompts 60]

The base model and the adapter answer the prompts of the run's held-out pairs, greedily. Printed are the
shares of answers in lower case, with 95 % intervals over prompts; how often an answer of the adapter is in
lower case where the base model's is not, and the other way round; how often the adapter prefers the chosen
answer of a held-out pair; and how far general answers moved.
"""

from __future__ import annotations

import argparse

import numpy as np
from machine import print_machine

from deltaw.serving.opening import SessionWriter
from deltaw.training.drift import drift_of
from deltaw.training.evaluation.base import mean_interval
from deltaw.training.origin import open_run, score_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--prompts", type=int, default=60, help="held-out prompts that are answered")
    parser.add_argument("--tokens", type=int, default=40, help="the most tokens of an answer")
    given = parser.parse_args()
    opened = open_run(given.run, say=print)
    assert opened.config is not None
    held_out = opened.task.read(opened.config.data, seed=opened.config.data_seed).held_out
    firsts = [pair.rows[0] for pair in held_out[: given.prompts]]
    prompts = [row.tokens[: row.prompt_length] for row in firsts]
    with opened.base():
        base = [one.text for one in SessionWriter(opened, print)(prompts, given.tokens, 4096, None)]
    tuned = [one.text for one in SessionWriter(opened, print)(prompts, given.tokens, 4096, None)]
    lower = {"base": in_lower_case(base), "adapter": in_lower_case(tuned)}
    for name, found in lower.items():
        print(f"answers of the {name} in lower case: {share(found)}")
    wins = ((lower["adapter"] > lower["base"]).sum(), (lower["adapter"] < lower["base"]).sum())
    print(f"of {len(prompts)} prompts {wins[0]} go to the adapter, {wins[1]} to the base model")
    score = score_run(opened, held_out).evaluation
    print(f"held-out pairs whose chosen answer the adapter prefers: {share(score.per_row)}")
    print(f"margin {score.metrics['margin']:.2f}, loss {score.metrics['loss']:.3f} (0.693 of the base model)")
    drift = drift_of(opened)
    if drift is not None:
        print(*drift.lines(), sep="\n")
    for prompt, one, two in list(zip(prompts, base, tuned, strict=True))[:3]:
        print(f"\n{opened.tokenizer.decode(prompt[-30:])!r}\n  base:    {one!r}\n  adapter: {two!r}")
    print_machine()


def in_lower_case(texts: list[str]) -> np.ndarray:
    """(texts,) 1 where a text has letters and none of them is a capital."""
    return np.array([float(any(map(str.isalpha, text)) and text == text.lower()) for text in texts])


def share(values: np.ndarray) -> str:
    low, high = mean_interval(values)
    return f"{values.mean():.1%} ({low:.1%} to {high:.1%}, {len(values)})"


if __name__ == "__main__":
    main()
