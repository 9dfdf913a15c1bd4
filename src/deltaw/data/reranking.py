"""Rows for a reranker: a query with each of its passages, as the two texts of a pair or in a prompt.

A prompt is a chat template that has the roles ``query`` and ``document``, as sentence-transformers writes it. Knows
no models.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaw.data.check import Finding
from deltaw.data.labels import tokenized
from deltaw.data.rendering import FAULTS, rendered
from deltaw.data.report import BadRowError
from deltaw.data.retrieval import Encoded, RetrievalReader, RowTexts, TextGroup
from deltaw.data.row_reader import ShownExample
from deltaw.data.rows import Row, Rows
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACES = re.compile(r"(\{query\}|\{passage\})")
_ROLES = {"query": "query", "passage": "document"}
_ROLE = '{%% set %s = messages | selectattr("role", "equalto", "%s") | map(attribute="content") | first %%}'


def as_chat_template(prompt: str) -> str:
    """The chat template that writes a prompt, a text with ``{query}`` and ``{passage}``."""
    roles = "".join(_ROLE % names for names in _ROLES.items())
    pieces = (
        f"{{{{ {piece[1:-1] if _PLACES.fullmatch(piece) else json.dumps(piece, ensure_ascii=False)} }}}}"
        for piece in _PLACES.split(prompt)
        if piece
    )
    return roles + "".join(pieces)


def prompt_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The prompt that a tokenizer's chat template writes, with ``{query}`` and ``{passage}``; None where it has no
    such roles."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or not all(re.search(rf"(['\"]){role}\1", template) for role in _ROLES.values()):
        return None
    messages = [{"role": role, "content": f"{{{name}}}"} for name, role in _ROLES.items()]
    try:
        found = rendered(template, messages, generation=False, variables=tokenizer.special_tokens_map)
    except FAULTS:
        return None
    return found if set(_PLACES.findall(found)) == {"{query}", "{passage}"} else None


class PairEncoder:
    """A query and a passage as tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.prompt = prompt_of(tokenizer)

    def __call__(self, pairs: Sequence[tuple[str, str]], limit: int | None = None) -> list[Encoded]:
        """Of each pair its tokens, special ones included; at most ``limit``, of which the end of a prompt is kept.

        Raises:
            UserError: there is no room for the texts.
        """
        if self.prompt is None:
            return tokenized(self._tokenizer, pairs, limit)
        found = [np.asarray(ids, np.int32) for ids in self._of_prompts(pairs)]
        if limit is None:
            return [(ids, None) for ids in found]
        kept = limit - len(self._end)
        if kept < 1:
            what = f"data.max_length is {limit}, and the prompt ends with {len(self._end)} tokens"
            raise UserError(what, where="data.max_length", hint="raise it, or shorten reranking.template")
        return [(np.concatenate([ids[:kept], self._end]) if len(ids) > limit else ids, None) for ids in found]

    def _of_prompts(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        assert self.prompt is not None
        pieces = _PLACES.split(self.prompt)
        texts = []
        for query, passage in pairs:
            of_place = {"{query}": query, "{passage}": passage}
            texts.append("".join(of_place.get(piece, piece) for piece in pieces))
        how = {"return_attention_mask": False, "add_special_tokens": False, "verbose": False}
        return self._tokenizer(texts, **how)["input_ids"]  # type: ignore[arg-type, return-value]

    @functools.cached_property
    def _end(self) -> np.ndarray:
        """The tokens with which every prompt ends."""
        left, right = (ids[::-1] for ids in self._of_prompts([("0", "0"), ("1 2 3", "4 5 6")]))
        same = takewhile(lambda both: both[0] == both[1], zip(left, right, strict=False))
        return np.array([token for token, _ in same][::-1], np.int32)


class RerankReader(RetrievalReader):
    """Reads files for a reranker.

    Args, beside those of every reader for retrieval:
        loss: as in the settings; one that compares passages needs several of a query.

    Attributes:
        loss: the same, and not ``auto`` once rows are read.
    """

    columns_task = "reranking"
    predicts = ("score", "ranking")
    _range_setting = "reranking.score_range"

    def __init__(self, *args: Any, loss: str = "auto", **how: Any) -> None:
        super().__init__(*args, **how)
        assert self.tokenizer is not None  # the super class refuses a model without one
        self._encode = PairEncoder(self.tokenizer)
        self._asked = self.loss = loss

    def encode(self, rows: Sequence[RowTexts], limit: int | None) -> list[list[Encoded]]:
        pairs = [(row.query, passage) for row in rows for passage in row.passages]
        found = iter(self._encode(pairs, limit))
        return [[next(found) for _ in row.passages] for row in rows]

    def usable(self, rows: Rows, chosen: Sequence[int]) -> Sequence[int]:
        chosen, columns = super().usable(rows, chosen), self._columns
        if not self.labeled:
            if columns.query is None or columns.passage is None:
                what, hint = "the rows have no query with a passage", "name the columns 'query' and 'passage'"
                raise UserError(what, where=rows.name, hint=hint + ", or map them with data.columns")
            return chosen
        usual = "contrastive" if columns.negatives else "binary"
        first = self.row(rows, chosen[0]) if len(chosen) else {}
        if isinstance(first.get(columns.passage or ""), list):
            usual = "listwise"
        self.loss = usual if self._asked == "auto" else self._asked
        return chosen

    def row_texts(self, row: Row, where: str) -> RowTexts:
        found = super().row_texts(row, where)
        if not self.labeled:
            return found
        scores = found.scores or (1.0, *[0.0] * (len(found.passages) - 1))
        if len(scores) != len(found.passages):
            what = f"the row has {len(found.passages)} passages and one score"
            raise BadRowError(what, reason="scores that do not fit", where=where, hint="give each passage a score")
        if self.loss != "binary" and len(scores) < 2:
            what = "the query has one passage, and the loss compares several"
            hint = "write a query's passages into one row, or set reranking.loss: binary"
            raise BadRowError(what, reason="a single passage", where=where, hint=hint)
        if self.loss == "pairwise" and len(set(scores)) < 2:
            what, hint = "no passage is better than another", "remove the row, or set reranking.loss: binary"
            raise BadRowError(what, reason="passages with equal scores", where=where, hint=hint)
        if self.loss == "contrastive" and (min(scores) < 0 or not max(scores) > 0):
            what = "no passage of the row is right, or a label lies below 0"
            hint = "set reranking.loss: listwise, or remove the row"
            raise BadRowError(what, reason="no right passage", where=where, hint=hint)
        return replace(found, scores=scores)

    def show(self, row: Any, item: TextGroup) -> ShownExample:
        return replace(super().show(row, item), label=f"{row.label:g}")

    def findings(self, items: Sequence[TextGroup], report: Any) -> list[Finding]:
        """Nothing: a passage may go with several queries."""
        return []
