"""Rows for rerankers: a query with each passage, as a text pair or in a prompt.

A prompt is a chat template with the roles ``query`` and ``document``, as in sentence-transformers.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaw.data.bad_rows import BadRowError
from deltaw.data.data_findings import DataFinding
from deltaw.data.rendering import FAULTS, render_conversation
from deltaw.data.row_reader import ExamplePreview
from deltaw.data.rows import NumberedRows, Row
from deltaw.errors import UserError
from deltaw.settings.data import DataSettings
from deltaw.tasks.classification.rows import tokenize_texts
from deltaw.tasks.embedding.rows import EmbeddingStarter, Encoded, RetrievalReader, RowTexts, TextGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDERS = re.compile(r"(\{query\}|\{passage\})")
_ROLES = {"query": "query", "passage": "document"}
_ROLE = '{%% set %s = messages | selectattr("role", "equalto", "%s") | map(attribute="content") | first %%}'


def as_chat_template(prompt: str) -> str:
    """Return a chat template that renders a prompt text with ``{query}`` and ``{passage}``."""
    roles = "".join(_ROLE % names for names in _ROLES.items())
    pieces = (
        f"{{{{ {piece[1:-1] if _PLACEHOLDERS.fullmatch(piece) else json.dumps(piece, ensure_ascii=False)} }}}}"
        for piece in _PLACEHOLDERS.split(prompt)
        if piece
    )
    return roles + "".join(pieces)


def prompt_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the prompt text of a tokenizer's chat template, with ``{query}`` and ``{passage}``. None if the template
    does not have these roles.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or not all(re.search(rf"(['\"]){role}\1", template) for role in _ROLES.values()):
        return None
    messages = [{"role": role, "content": f"{{{name}}}"} for name, role in _ROLES.items()]
    try:
        prompt = render_conversation(template, messages, generation=False, variables=tokenizer.special_tokens_map)
    except FAULTS:
        return None
    return prompt if set(_PLACEHOLDERS.findall(prompt)) == {"{query}", "{passage}"} else None


class PairEncoder:
    """Tokenizes pairs of a query and a passage."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.prompt = prompt_of(tokenizer)

    def __call__(self, pairs: Sequence[tuple[str, str]], limit: int | None = None) -> list[Encoded]:
        """Return the tokens of each pair, including special tokens, truncated to ``limit`` tokens without removing the
        end of the prompt.

        Raises:
            UserError: if the limit leaves no space for the texts.
        """
        if self.prompt is None:
            return tokenize_texts(self._tokenizer, pairs, limit)
        token_ids = [np.asarray(ids, np.int32) for ids in self._of_prompts(pairs)]
        if limit is None:
            return [(ids, None) for ids in token_ids]
        num_kept = limit - len(self._end)
        if num_kept < 1:
            message = f"data.max_length is {limit}, and the prompt ends with {len(self._end)} tokens"
            raise UserError(message, location="data.max_length", hint="raise it, or shorten reranking.template")
        return [(np.concatenate([ids[:num_kept], self._end]) if len(ids) > limit else ids, None) for ids in token_ids]

    def _of_prompts(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        assert self.prompt is not None
        pieces = _PLACEHOLDERS.split(self.prompt)
        texts = []
        for query, passage in pairs:
            values = {"{query}": query, "{passage}": passage}
            texts.append("".join(values.get(piece, piece) for piece in pieces))
        options = {"return_attention_mask": False, "add_special_tokens": False, "verbose": False}
        return self._tokenizer(texts, **options)["input_ids"]

    @functools.cached_property
    def _end(self) -> np.ndarray:
        """Return the tokens at the end of every prompt."""
        first, second = (ids[::-1] for ids in self._of_prompts([("0", "0"), ("1 2 3", "4 5 6")]))
        same = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
        return np.array([token for token, _ in same][::-1], np.int32)


class RerankReader(RetrievalReader):
    """Reads files for a reranker.

    Args:
        loss: Loss as in the settings. Losses that compare passages require several per query.

    Attributes:
        loss: The loss, resolved from ``auto`` when rows are read.
    """

    columns_task = "reranking"
    predicts = ("score", "ranking")
    _range_setting = "reranking.score_range"

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        score_range: tuple[float, float] = (-math.inf, math.inf),
        labeled: bool = True,
        loss: str = "auto",
    ) -> None:
        super().__init__(settings, tokenizer, score_range=score_range, labeled=labeled)
        assert self.tokenizer is not None  # the base class rejects a model without a tokenizer
        self._encode = PairEncoder(self.tokenizer)
        self._configured_loss = self.loss = loss

    def encode(self, rows: Sequence[RowTexts], limit: int | None) -> list[list[Encoded]]:
        pairs = [(row.query, passage) for row in rows for passage in row.passages]
        encoded = iter(self._encode(pairs, limit))
        return [[next(encoded) for _ in row.passages] for row in rows]

    def select_usable(self, rows: NumberedRows, chosen: Sequence[int]) -> Sequence[int]:
        chosen = super().select_usable(rows, chosen)
        columns = self._columns
        if not self.labeled:
            if columns.query is None or columns.passage is None:
                message = "the rows have no query with a passage"
                hint = "name the columns 'query' and 'passage'"
                raise UserError(message, location=rows.name, hint=hint + ", or map them with data.columns")
            return chosen
        usual = "contrastive" if columns.negatives else "binary"
        first = self.row(rows, chosen[0]) if len(chosen) else {}
        if isinstance(first.get(columns.passage or ""), list):
            usual = "listwise"
        self.loss = usual if self._configured_loss == "auto" else self._configured_loss
        return chosen

    def row_texts(self, row: Row, location: str) -> RowTexts:
        texts = super().row_texts(row, location)
        if not self.labeled:
            return texts
        scores = texts.scores or (1.0, *[0.0] * (len(texts.passages) - 1))
        if len(scores) != len(texts.passages):
            message = f"the row has {len(texts.passages)} passages and one score"
            raise BadRowError(message, reason="scores that do not fit", location=location, hint="score each passage")
        if self.loss != "binary" and len(scores) < 2:
            message = "the query has one passage, and the loss compares several"
            hint = "write a query's passages into one row, or set reranking.loss: binary"
            raise BadRowError(message, reason="a single passage", location=location, hint=hint)
        if self.loss == "pairwise" and len(set(scores)) < 2:
            message = "no passage is better than another"
            hint = "remove the row, or set reranking.loss: binary"
            raise BadRowError(message, reason="passages with equal scores", location=location, hint=hint)
        if self.loss == "contrastive" and (min(scores) < 0 or not max(scores) > 0):
            message = "no passage of the row is right, or a label is negative"
            hint = "set reranking.loss: listwise, or remove the row"
            raise BadRowError(message, reason="no right passage", location=location, hint=hint)
        return replace(texts, scores=scores)

    def show(self, row: Any, item: TextGroup) -> ExamplePreview:
        return replace(super().show(row, item), label=f"{row.label:g}")

    def findings(self, items: Sequence[TextGroup], report: Any) -> list[DataFinding]:
        """Return no findings, because a passage may belong to several queries."""
        return []


class RerankStarter(EmbeddingStarter):
    """Starter of the task."""

    min_batch_size = 1
    reader_class = RerankReader
