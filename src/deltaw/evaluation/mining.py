"""Read passages and mine hard negatives: passages that a model ranks high for a query but that do not answer it.

Candidates come from exact search. Passages that score almost as high as the query's positive are assumed to be answers
too and are excluded (Moreira et al. 2024, "NV-Retriever", arXiv 2407.15831).
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

from deltaw.atomic_files import atomic_path
from deltaw.data.bad_rows import BadRowError, BadRows, too_long_error
from deltaw.data.compressed_files import COMPRESSED, DecompressedFile
from deltaw.data.formats import require
from deltaw.data.json_lines import decode
from deltaw.data.messages import cell_text
from deltaw.data.row_files import reading
from deltaw.data.sources import open_source, row_errors
from deltaw.errors import UserError, did_you_mean
from deltaw.machine.memory import free_memory_bytes
from deltaw.progress import LogFunction, track_progress
from deltaw.serving.encoders import Embedder
from deltaw.settings.columns import listed
from deltaw.settings.data import MAX_ROW_BYTES
from deltaw.settings.row_kinds import PASSAGES as POSITIVES
from deltaw.settings.row_kinds import QUERIES
from deltaw.training.evaluation.vector_search import nearest

# Maximum number of passages for exact search if faiss is installed.
MAX_EXACT_PASSAGES = 1_000_000
# Texts per embedding batch, and queries per search.
_TEXTS = 1024
_QUERIES = 4096
# Fraction of faiss's inverted lists that a query searches.
_PROBED = 1 / 16

Pair = tuple[str, str]
Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MiningSettings:
    """Selection of negatives.

    Attributes:
        negatives: Number of negatives per query.
        from_rank, to_rank: Range of candidate ranks, counted from 1 without the query's positives.
        absolute_margin: Minimum difference between the scores of the positive and a negative, or None.
        relative_margin: Minimum difference as a fraction of the positive's score, or None. If a query has several
            positives, the lowest score counts.
        max_score: Maximum score of a negative, or None.
        query_prompt: Prompt before each query, or None for the model's.
        passage_prompt: Prompt before each passage, or None for the model's.

    Raises:
        UserError: if the range of ranks is smaller than the number of negatives.
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
            message = f"{self.negatives} negatives cannot be found from rank {self.from_rank} to {self.to_rank}"
            raise UserError(message, hint="increase --to-rank, or use fewer --negatives")

    def score_limits(self, score: float) -> tuple[float, float]:
        """Return the maximum score of a negative by the margins, and the maximum score of any negative.

        Args:
            score: Score of the positive.
        """
        margins = (self.absolute_margin, None if self.relative_margin is None else self.relative_margin * abs(score))
        margin_limit = min((score - margin for margin in margins if margin is not None), default=math.inf)
        return margin_limit, math.inf if self.max_score is None else self.max_score


@dataclass(frozen=True)
class MinedRow:
    """Query, positive passage with its score, and negatives with their scores, highest first."""

    anchor: str
    positive: str
    score: float
    negatives: tuple[tuple[str, float], ...]

    def as_dict(self) -> dict[str, str]:
        """Return the columns in the format of sentence-transformers. Missing negatives have no column."""
        negatives = {f"negative_{index}": text for index, (text, _) in enumerate(self.negatives, start=1)}
        return {"anchor": self.anchor, "positive": self.positive, **negatives}


@dataclass(frozen=True)
class MiningResult:
    """Result of mining.

    Attributes:
        rows: One row per pair.
        num_negatives: Requested number of negatives per row.
        passages: Number of distinct passages.
        queries: Number of distinct queries.
        too_close: Number of candidates excluded by the margins.
        too_high: Number of candidates excluded by the maximum score.
        truncated: Number of texts longer than the model's limit.
    """

    rows: Sequence[MinedRow]
    num_negatives: int
    passages: int
    queries: int
    too_close: int
    too_high: int
    truncated: int

    def complete(self) -> list[MinedRow]:
        """Return the rows with the requested number of negatives."""
        return [row for row in self.rows if len(row.negatives) == self.num_negatives]

    def num_without_negatives(self) -> int:
        """Return the number of rows without negatives."""
        return sum(not row.negatives for row in self.rows)

    def as_dict(self) -> dict[str, object]:
        """Return counts and mean scores for JSON output."""
        counts = {name: getattr(self, name) for name in ("passages", "queries", "too_close", "too_high", "truncated")}
        totals = {"rows": len(self.rows), "complete": len(self.complete()), "bare": self.num_without_negatives()}
        means = {name: float(scores.mean()) if len(scores) else None for name, scores in self.scores().items()}
        return {**totals, **counts, "mean_scores": means}

    def scores(self) -> dict[str, np.ndarray]:
        """Return the scores of positives and of negatives, by column."""
        negatives = [score for row in self.rows for _, score in row.negatives]
        return {"positive": np.array([row.score for row in self.rows]), "negative": np.array(negatives)}


def mine(
    pairs: Sequence[Pair], passages: Sequence[str], embedder: Embedder, settings: MiningSettings, log: LogFunction
) -> MiningResult:
    """Find negatives for each pair of a query and its positive passage.

    Texts that differ only in case and spacing are treated as equal. A passage is never a negative of a query that it
    equals or that it belongs to in any row.

    Args:
        pairs: Queries with their positives.
        passages: Passages to search.
        embedder: Embedding model.
        settings: Selection of negatives.
        log: Receives progress lines.

    Raises:
        UserError: if the vectors do not fit into memory.
    """
    corpus: dict[str, str] = {}
    for text in passages:
        corpus.setdefault(text_key(text), text)
    corpus_index = {key: index for index, key in enumerate(corpus)}
    texts = list(corpus.values())
    layout = embedder.layout
    query_prefix = layout.query_prompt if settings.query_prompt is None else settings.query_prompt
    passage_prefix = layout.passage_prompt if settings.passage_prompt is None else settings.passage_prompt
    query_texts = [query_prefix + query for query, _ in pairs]
    positive_texts = [passage_prefix + passage for _, passage in pairs]
    unique = list(dict.fromkeys([*(passage_prefix + text for text in texts), *positive_texts, *query_texts]))
    vectors, truncated = _embed(unique, embedder)
    index_by_text = {text: index for index, text in enumerate(unique)}
    query_rows, positive_rows = ([index_by_text[text] for text in part] for part in (query_texts, positive_texts))
    scores = _inner_products(vectors, query_rows, positive_rows)
    positives: dict[str, set[int]] = {}
    lowest: dict[str, float] = {}
    for (query, passage), score in zip(pairs, scores, strict=True):
        key = text_key(query)
        matches = (corpus_index.get(text_key(text)) for text in (query, passage))
        positives.setdefault(key, set()).update(index for index in matches if index is not None)
        lowest[key] = min(score, lowest.get(key, math.inf))
    queries = {row: text_key(query) for (query, _), row in zip(pairs, query_rows, strict=True)}
    ranked = _rank_candidates(vectors, queries, positives, len(texts), settings.to_rank, log)
    too_close = too_high = 0
    negatives: dict[int, tuple[tuple[str, float], ...]] = {}
    for index, candidates in ranked:
        margin_limit, score_limit = settings.score_limits(lowest[queries[index]])
        selected: list[tuple[str, float]] = []
        for candidate, score in candidates[settings.from_rank - 1 :]:
            if len(selected) == settings.negatives:
                break
            if score > margin_limit or score > score_limit:
                too_close = too_close + (score > margin_limit)
                too_high = too_high + (score <= margin_limit)
            else:
                selected.append((texts[candidate], score))
        negatives[index] = tuple(selected)
    row_data = zip(pairs, scores, query_rows, strict=True)
    rows = [MinedRow(query, passage, score, negatives[row]) for (query, passage), score, row in row_data]
    return MiningResult(rows, settings.negatives, len(texts), len(queries), too_close, too_high, truncated)


def mining_output(file: str, output: Path | None, corpus: str | None, *, force: bool) -> Path:
    """Return the output file: ``output``, or by default a file next to the input.

    The default folder is the current one if the input is not a local file.

    Raises:
        UserError: if the output exists or is an input file.
    """
    if output is None:
        folder = Path(file).parent if Path(file).exists() else Path()
        name = re.sub(r"[^\w.-]+", "_", Path(file).stem)
        output = folder / f"{name}.mined.jsonl"
    if any(output.exists() and Path(read).exists() and output.samefile(read) for read in (file, corpus) if read):
        raise UserError("the output is an input file", location=str(output), hint="use another --output")
    if output.is_dir() or (output.exists() and not force):
        raise UserError("the output exists", location=str(output), hint="use another --output or add --force")
    return output


def write_mined(rows: Sequence[MinedRow], path: Path) -> None:
    """Write rows to a JSON Lines file atomically."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in rows)


def _embed(texts: Sequence[str], embedder: Embedder) -> tuple[Tensor, int]:
    """Return (texts, width) fp32 vectors and the number of truncated texts. Texts of similar length share a batch."""
    size = 4 * len(texts) * embedder.width
    free = free_memory_bytes()
    if size > free:
        message = f"the vectors of {len(texts):,} texts need {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
        raise UserError(message, location="--corpus", hint="use fewer passages")
    vectors = torch.empty(len(texts), embedder.width)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    truncated = 0
    with track_progress(f"embedding {len(texts):,} texts", len(texts)) as advance:
        for start in range(0, len(order), _TEXTS):
            indices = order[start : start + _TEXTS]
            vectors[indices], num_truncated = embedder.vectors([texts[index] for index in indices])
            truncated += num_truncated
            advance(start + len(indices))
    return vectors, truncated


def _inner_products(vectors: Tensor, left: Sequence[int], right: Sequence[int]) -> list[float]:
    """Return the inner products of pairs of vectors."""
    products: list[float] = []
    for start in range(0, len(left), _TEXTS):
        parts = (vectors[list(side[start : start + _TEXTS])] for side in (left, right))
        products += torch.linalg.vecdot(*parts).tolist()
    return products


def _rank_candidates(
    vectors: Tensor, keys: Mapping[int, str], positives: Mapping[str, set[int]], count: int, top: int, log: LogFunction
) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """Yield for each query the nearest ``top`` passages that are not its positives, with their scores.

    Args:
        vectors: Vectors of all texts, those of passages first.
        keys: Key of each query, by its index in ``vectors``.
        positives: Positives of each key.
        count: Number of passages.
        top: Number of candidates per query.
        log: Receives progress lines.
    """
    search = _search(vectors[:count], log)
    # Sorting by the number of positives minimizes the additional candidates per search.
    order = sorted(keys, key=lambda query: len(positives[keys[query]]))
    with track_progress(f"searching {count:,} passages", len(order)) as advance:
        for start in range(0, len(order), _QUERIES):
            batch = order[start : start + _QUERIES]
            scores, passages = search(vectors[batch], top + max(len(positives[keys[query]]) for query in batch))
            for query, query_scores, query_passages in zip(batch, scores.tolist(), passages.tolist(), strict=True):
                excluded = positives[keys[query]]
                pairs = zip(query_passages, query_scores, strict=True)
                yield query, [pair for pair in pairs if pair[0] >= 0 and pair[0] not in excluded][:top]
            advance(start + len(batch))


def _search(passages: Tensor, log: LogFunction) -> Search:
    """Return an exact search, or an approximate one for many passages if faiss is installed."""
    if len(passages) <= MAX_EXACT_PASSAGES or find_spec("faiss") is None:
        if len(passages) > MAX_EXACT_PASSAGES:
            log(f"exact search over {len(passages):,} passages is slow:")
            log("pip install 'deltaw[search]' for a faster approximate search")
        return lambda queries, count: nearest(queries, passages, count)
    import faiss

    lists = 4 * math.isqrt(len(passages))
    index: Any = faiss.index_factory(passages.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.nprobe = math.ceil(lists * _PROBED)
    log(f"approximate search by faiss: {index.nprobe:,} of {lists:,} lists of {len(passages):,} passages")
    with track_progress("building an index"):
        index.train(passages.numpy())
        index.add(passages.numpy())

    def search(queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        scores, indices = index.search(queries.numpy(), min(count, len(passages)))
        return torch.from_numpy(scores), torch.from_numpy(indices)

    return search


# Common names of passage columns, in order of preference.
PASSAGES = ("text", "passage", "document", "content", "positive", "answer", "completion", "body")


def read_pairs(
    reference: str, bad: BadRows, *, columns: Sequence[str | None] = (None, None), max_bytes: int = MAX_ROW_BYTES
) -> list[tuple[str, str]]:
    """Read queries and their passages, in row order.

    Args:
        reference: File or data set.
        bad: Collects unusable rows.
        columns: Columns of query and passage. None selects the first column with a common name.
        max_bytes: Maximum size of a row in its file.

    Raises:
        UserError: if the file cannot be read, lacks a column, or has no usable row.
    """
    roles = (("query", columns[0], QUERIES), ("positive", columns[1], POSITIVES))
    return [(texts[0], texts[1]) for texts in _read(reference, roles, bad, max_bytes)]


@row_errors()
def read_passages(
    reference: str, bad: BadRows, *, column: str | None = None, max_bytes: int = MAX_ROW_BYTES
) -> list[str]:
    """Read passages in row order. In a ``.txt`` file, which may be compressed, each nonblank line is a passage.

    ``column`` is the column of the passage, or None to select the first column with a common name. The other arguments
    and the errors are those of :func:`read_pairs`.
    """
    suffixes = [suffix.lower() for suffix in Path(reference).suffixes if suffix.lower() not in COMPRESSED]
    if suffixes[-1:] == [".txt"] and Path(reference).is_file():
        passages = list(_lines(Path(reference), reference, bad, max_bytes))
        if not passages:
            raise UserError("the file has no passages", location=reference)
        return passages
    return [texts[0] for texts in _read(reference, (("passage", column, PASSAGES),), bad, max_bytes)]


def text_key(text: str) -> str:
    """Normalize case and spacing for comparisons of texts."""
    return " ".join(text.split()).casefold()


@row_errors()
def _read(
    reference: str, roles: Sequence[tuple[str, str | None, Sequence[str]]], bad: BadRows, max_bytes: int
) -> list[list[str]]:
    """Read columns of each usable row.

    Args:
        roles: For each column, its role, its name or None, and its common names.
    """
    stream = open_source(reference, bad.add if bad.mode == "skip" else None, max_bytes=max_bytes)
    stream.scan()
    columns = [_column(reference, stream.columns, *role) for role in roles]
    if len(set(columns)) < len(columns):
        raise UserError(f"'{columns[0]}' is both query and passage", location=reference, hint="name different columns")
    texts: list[list[str]] = []
    for rows in stream.chunks():
        for index, (_, row) in enumerate(rows):
            location = rows.row_location(index)
            try:
                require(row, columns, location, f"every row needs {listed(columns)}")
                texts.append([cell_text(row[column], column, location) for column in columns])
            except BadRowError as error:
                bad.add(error, row)
    if not texts:
        raise UserError("the file has no usable row", location=reference, hint=f"every row needs {listed(columns)}")
    return texts


def _column(reference: str, available: Sequence[str], role: str, requested: str | None, common: Sequence[str]) -> str:
    if requested is not None and requested not in available:
        raise UserError(f"no column '{requested}'", location=reference, hint=did_you_mean(requested, available))
    column = requested or next((name for name in common if name in available), None)
    if column is None and role == "passage" and len(available) == 1:
        column = available[0]
    if column is None:
        location = f"{reference}, whose columns are {listed(available)}"
        flag = f"--{role}-column"
        hint = f"name it with {flag}; common names are {listed(common)}"
        raise UserError(f"no column with the {role} was found", location=location, hint=hint)
    return column


def _lines(path: Path, name: str, bad: BadRows, max_bytes: int) -> Iterator[str]:
    number = 0
    with reading(name), DecompressedFile(path) as opened:
        while line := opened.file.readline(max_bytes + 1):
            number += 1
            if len(line) > max_bytes:
                raise too_long_error(f"line {number}", max_bytes, location=f"{name}, line {number}").of_file()
            try:
                text = decode(line, name, first_line=number).strip()
            except BadRowError as error:
                bad.add(error, line)
                continue
            if text:
                yield text
