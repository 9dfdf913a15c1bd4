"""Rows for embedding models: separate texts, with the prompts of queries and passages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deltaw.data.retrieval import Encoded, RetrievalReader, RowTexts


class EmbeddingReader(RetrievalReader):
    """Reads files for an embedding model.

    Args:
        prompts: Prefixes of queries and passages. Symmetric rows (scored pairs, texts with classes) get no prefix.
    """

    columns_task = "embedding"

    def __init__(self, *args: Any, prompts: tuple[str, str] = ("", ""), **options: Any) -> None:
        super().__init__(*args, **options)
        self._prompts = prompts

    @property
    def predicts(self) -> tuple[str, ...]:  # type: ignore[override]
        has_both = self._columns.query is not None and self._columns.passage is not None
        return ("query_embedding", "passage_embedding") if has_both else ("embedding",)

    def encode(self, rows: Sequence[RowTexts], limit: int | None) -> list[list[Encoded]]:
        texts: list[str] = []
        for row in rows:
            both_ways = self._columns.text is not None or (len(row.passages) == 1 and row.scores)
            query, passage = ("", "") if both_ways else self._prompts
            texts += [*([query + row.query] if row.query else []), *(passage + text for text in row.passages)]
        assert self.tokenizer is not None
        cut: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit}
        ids = self.tokenizer(texts, return_attention_mask=False, verbose=False, **cut)["input_ids"]
        tokens = iter(ids)
        counts = (bool(row.query) + len(row.passages) for row in rows)
        return [[(np.asarray(next(tokens), np.int32), None) for _ in range(count)] for count in counts]
