"""Hard negatives: for each query, passages that a model takes for near and that do not answer it.

Candidates are ranked by exact search. A passage that scores almost as high as the query's own is taken for another
answer, and left out (Moreira et al. 2024, "NV-Retriever", arXiv 2407.15831). It knows texts and vectors; not files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.data.passages import text_key
from deltaw.durable import replacing
from deltaw.errors import UserError
from deltaw.machine.memory import free_memory_bytes
from deltaw.serving.encoders import Embedder
from deltaw.training.callbacks import Say
from deltaw.training.evaluation.retrieval import nearest
from deltaw.working import working

# Passages up to which all of them are compared, also where faiss is installed.
EXACT = 1_000_000
# Texts embedded, and queries searched for, at once.
_TEXTS, _QUERIES = 1024, 4096
# Of faiss's lists of passages, the share that a query is compared with.
_PROBED = 1 / 16

Pair = tuple[str, str]
Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MiningSettings:
    """Which passages are taken.

    Attributes:
        negatives: wanted for each query.
        from_rank, to_rank: the ranks that are considered, counted from 1 without the query's own passages.
        absolute_margin: by how much a negative must score below the query's own passage; None for no such bound.
        relative_margin: the same as a share of that passage's score. Of several own passages the lowest counts.
        max_score: the highest score of a negative.
        query_prompt, passage_prompt: put before each text; None: as the model says.

    Raises:
        UserError: fewer ranks are considered than negatives wanted.
    """

    negatives: int = 5
    from_rank: int = 1
    to_rank: int = 100
    absolute_margin: float | None = None
    relative_margin: float | None = 0.05
    max_score: float | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None

    def __post_init__(self) -> None:
        if self.to_rank - self.from_rank + 1 < self.negatives:
            ranks = f"from rank {self.from_rank} to {self.to_rank}"
            hint = "raise --to-rank, or ask for fewer --negatives"
            raise UserError(f"{self.negatives} negatives cannot be found {ranks}", hint=hint)

    def highest(self, own: float) -> tuple[float, float]:
        """The most that a negative may score by the margins, if its query's own passage scores ``own``; and at all."""
        margins = (self.absolute_margin, None if self.relative_margin is None else self.relative_margin * abs(own))
        below = min((own - margin for margin in margins if margin is not None), default=math.inf)
        return below, math.inf if self.max_score is None else self.max_score


@dataclass(frozen=True)
class MinedRow:
    """A query, its passage with its score, and negatives with theirs, the nearest first."""

    anchor: str
    positive: str
    score: float
    negatives: tuple[tuple[str, float], ...]

    def as_dict(self) -> dict[str, str]:
        """The columns as sentence-transformers names them; fewer if there are fewer negatives."""
        negatives = {f"negative_{number}": text for number, (text, _) in enumerate(self.negatives, start=1)}
        return {"anchor": self.anchor, "positive": self.positive, **negatives}


@dataclass(frozen=True)
class Mined:
    """What mining came to.

    Attributes:
        rows: one for each pair. wanted: negatives for each.
        passages: that were searched, different ones. queries: different ones.
        too_close: candidates that score too close to the query's own passage. too_high: above the highest score.
        truncated: texts that were longer than the model takes.
    """

    rows: Sequence[MinedRow]
    wanted: int
    passages: int
    queries: int
    too_close: int
    too_high: int
    truncated: int

    def complete(self) -> list[MinedRow]:
        """The rows with all negatives that were wanted."""
        return [row for row in self.rows if len(row.negatives) == self.wanted]

    def bare(self) -> int:
        """Rows that got no negative."""
        return sum(not row.negatives for row in self.rows)

    def as_dict(self) -> dict[str, object]:
        """Counts and mean scores, ready for JSON."""
        counts = {name: getattr(self, name) for name in ("passages", "queries", "too_close", "too_high", "truncated")}
        found: dict[str, object] = {"rows": len(self.rows), "complete": len(self.complete()), "bare": self.bare()}
        means = {name: float(scores.mean()) if len(scores) else None for name, scores in self.scores().items()}
        return {**found, **counts, "mean_scores": means}

    def scores(self) -> dict[str, np.ndarray]:
        """Those of the rows' own passages (``positive``) and of their negatives."""
        negatives = [score for row in self.rows for _, score in row.negatives]
        return {"positive": np.array([row.score for row in self.rows]), "negative": np.array(negatives)}


def mine(
    pairs: Sequence[Pair], passages: Sequence[str], embedder: Embedder, settings: MiningSettings, say: Say
) -> Mined:
    """Find negatives for each pair of a query and its passage.

    Texts that are the same but for case and spacing are one: a passage is never a negative of a query that it, or
    an equal text, belongs to in any row, or that is itself the query.

    Args:
        passages: to be searched.

    Raises:
        UserError: the vectors do not fit into memory.
    """
    corpus: dict[str, str] = {}
    for text in passages:
        corpus.setdefault(text_key(text), text)
    places = {key: place for place, key in enumerate(corpus)}
    texts = list(corpus.values())
    layout = embedder.layout
    before_query = layout.query_prompt if settings.query_prompt is None else settings.query_prompt
    before = layout.passage_prompt if settings.passage_prompt is None else settings.passage_prompt
    asked = [before_query + query for query, _ in pairs]
    answers = [before + passage for _, passage in pairs]
    unique = list(dict.fromkeys([*(before + text for text in texts), *answers, *asked]))
    vectors, truncated = _embedded(unique, embedder)
    at = {text: place for place, text in enumerate(unique)}
    scores = _products(vectors, [at[text] for text in asked], [at[text] for text in answers])
    own: dict[str, set[int]] = {}
    lowest: dict[str, float] = {}
    for (query, passage), score in zip(pairs, scores, strict=True):
        key = text_key(query)
        found = (places.get(text_key(text)) for text in (query, passage))
        own.setdefault(key, set()).update(place for place in found if place is not None)
        lowest[key] = min(score, lowest.get(key, math.inf))
    queries = {at[text]: text_key(query) for (query, _), text in zip(pairs, asked, strict=True)}
    ranked = _ranked(vectors, queries, own, len(texts), settings.to_rank, say)
    too_close = too_high = 0
    negatives: dict[int, tuple[tuple[str, float], ...]] = {}
    for place, candidates in ranked:
        below, most = settings.highest(lowest[queries[place]])
        kept: list[tuple[str, float]] = []
        for found_at, score in candidates[settings.from_rank - 1 :]:
            if len(kept) == settings.negatives:
                break
            if score > below or score > most:
                too_close, too_high = too_close + (score > below), too_high + (score <= below)
            else:
                kept.append((texts[found_at], score))
        negatives[place] = tuple(kept)
    rows = [
        MinedRow(query, passage, score, negatives[at[text]])
        for (query, passage), score, text in zip(pairs, scores, asked, strict=True)
    ]
    return Mined(rows, settings.negatives, len(texts), len(queries), too_close, too_high, truncated)


def mined_file(file: str, output: Path | None, corpus: str | None, *, force: bool) -> Path:
    """Where mined rows are written: ``output``, else beside the file, or here if that is not on this machine.

    Raises:
        UserError: it is there, or is what is read.
    """
    if output is None:
        folder, name = (Path(file).parent if Path(file).exists() else Path()), re.sub(r"[^\w.-]+", "_", Path(file).stem)
        output = folder / f"{name}.mined.jsonl"
    if any(output.exists() and Path(read).exists() and output.samefile(read) for read in (file, corpus) if read):
        raise UserError("the output is one of the files that are read", where=str(output), hint="name another --output")
    if output.is_dir() or (output.exists() and not force):
        hint = "name another with --output, or overwrite it with --force"
        raise UserError("the output exists", where=str(output), hint=hint)
    return output


def write_mined(rows: Sequence[MinedRow], path: Path) -> None:
    """Write rows as JSON Lines, completely or not at all."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in rows)


def _embedded(texts: Sequence[str], embedder: Embedder) -> tuple[Tensor, int]:
    """(texts, width) fp32, and how many texts were truncated; each is computed once, those of like length together."""
    size, free = 4 * len(texts) * embedder.width, free_memory_bytes()
    if size > free:
        what = f"the vectors of {len(texts):,} texts need {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
        raise UserError(what, where="--corpus", hint="give fewer passages")
    vectors = torch.empty(len(texts), embedder.width)
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    truncated = 0
    with working(f"embedding {len(texts):,} texts", len(texts)) as advance:
        for start in range(0, len(order), _TEXTS):
            part = order[start : start + _TEXTS]
            vectors[part], cut = embedder.vectors([texts[place] for place in part])
            truncated += cut
            advance(start + len(part))
    return vectors, truncated


def _products(vectors: Tensor, left: Sequence[int], right: Sequence[int]) -> list[float]:
    """The inner products of pairs of vectors."""
    found: list[float] = []
    for start in range(0, len(left), _TEXTS):
        parts = (vectors[list(side[start : start + _TEXTS])] for side in (left, right))
        found += torch.linalg.vecdot(*parts).tolist()
    return found


def _ranked(
    vectors: Tensor, queries: Mapping[int, str], own: Mapping[str, set[int]], count: int, depth: int, say: Say
) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """For each query its ``depth`` nearest passages that are not its own, with their scores.

    Args:
        vectors: of all texts, those of the passages first. queries: the key of each, by its place in ``vectors``.
        own: passages of each key. count: of all passages.
    """
    search = _search(vectors[:count], say)
    # Those with many passages of their own together, since as many more candidates are found for all.
    several = sorted(queries, key=lambda place: len(own[queries[place]]))
    with working(f"searching {count:,} passages", len(several)) as advance:
        for start in range(0, len(several), _QUERIES):
            part = several[start : start + _QUERIES]
            most = depth + max(len(own[queries[place]]) for place in part)
            scores, places = search(vectors[part], most)
            for place, of_one, at in zip(part, scores.tolist(), places.tolist(), strict=True):
                mine = own[queries[place]]
                others = [found for found in zip(at, of_one, strict=True) if found[0] >= 0 and found[0] not in mine]
                yield place, others[:depth]
            advance(start + len(part))


def _search(passages: Tensor, say: Say) -> Search:
    """Exact search; of very many passages approximate search, if faiss is installed."""
    if len(passages) <= EXACT or find_spec("faiss") is None:
        if len(passages) > EXACT:
            say(f"all {len(passages):,} passages are compared with each query, which takes long:")
            say("pip install 'deltaw[search]' finds almost the same ones faster")
        return lambda queries, count: nearest(queries, passages, count)
    import faiss

    lists = 4 * math.isqrt(len(passages))
    index: Any = faiss.index_factory(passages.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.nprobe = math.ceil(lists * _PROBED)
    say(f"approximate search by faiss: {index.nprobe:,} of {lists:,} lists of {len(passages):,} passages")
    with working("building an index"):
        index.train(passages.numpy())
        index.add(passages.numpy())

    def found(queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        scores, places = index.search(queries.numpy(), min(count, len(passages)))
        return torch.from_numpy(scores), torch.from_numpy(places)

    return found
