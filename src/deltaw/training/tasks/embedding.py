"""The task ``embedding``: vectors of texts, near each other where the texts belong together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.embedding import EmbeddingReader
from deltaw.data.retrieval import TextGroup
from deltaw.data.row_reader import RunData
from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from deltaw.hub.loading import has_values
from deltaw.hub.sentence_layout import SentenceLayout, read_layout, write_layout
from deltaw.machine.choices import Choice
from deltaw.runtime.packed import can_pack
from deltaw.task_settings import EmbeddingSettings
from deltaw.training.callbacks import Say
from deltaw.training.embedding.losses import loss_for, loss_of_step
from deltaw.training.embedding.objective import EmbeddingObjective, TextBatcher, key_of_text, texts_of
from deltaw.training.embedding.pooling import layout_of
from deltaw.training.evaluation.base import Evaluation, Outcomes, RowOutcome, bootstrap_interval, check_finite, spearman
from deltaw.training.evaluation.retrieval import nearest, nearest_of_parts, pair_accuracy, retrieval_evaluation
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.tasks.base import Batched, Classes, ModelFiles, Predictions, Rows, Task
from deltaw.training.tasks.causal_batcher import choose_apart_batcher, choose_causal_batcher
from deltaw.training.tasks.labels import choose_label_batcher, text_positions
from deltaw.working import working

# Held-out rows whose loss is computed together.
_TOGETHER = 64
_RANKS = 10
# Groups of passages whose vectors are in memory together.
_GROUPS_AT_ONCE = 4096


class EmbeddingTask(Task):
    """Embed texts.

    Args:
        settings: the ``embedding:`` section. folder: of the model.
    """

    name = "embedding"
    sees_steps = True
    shares_evaluation = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, say: Say, settings: EmbeddingSettings, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.settings, self._folder, self._say = settings, folder, say
        self._max_length: int | None = None
        self._batcher: TextBatcher | None = None
        self._layout: SentenceLayout | None = None
        self._inputs: EmbeddingReader | None = None

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> EmbeddingTask:
        tokenizer = files.tokenizer()
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # sentence-transformers pads
        return cls(tokenizer, files.say, files.section or EmbeddingSettings(), files.folder)

    def input_reader(self, settings: DataSettings, columns: Sequence[str], classes: Classes) -> EmbeddingReader:
        self._inputs = self.reader(settings, labeled=False)
        return self._inputs

    @torch.no_grad()
    def predict(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes) -> Predictions:
        """The vector of each text, of length 1 if the model says so; of several passages a list of vectors."""
        assert isinstance(objective, EmbeddingObjective) and self._inputs is not None
        vectors = embedded(objective, rows, batcher)
        if objective.layout.normalize:
            vectors = {key: functional.normalize(one, dim=0) for key, one in vectors.items()}
        numbers = {key: [float(str(value)) for value in one.float().numpy()] for key, one in vectors.items()}
        check_finite("the vectors are", np.array([*numbers.values()]))
        found = [[numbers[key_of_text(text)] for text in row.rows] for row in rows]
        queries = [[of_row.pop(0) for of_row in found]] if len(self._inputs.predicts) == 2 else []
        return [*queries, [of_row[0] if len(of_row) == 1 else of_row for of_row in found]]

    def reader(self, settings: DataSettings, classes: Classes = None, **how: Any) -> EmbeddingReader:
        self._max_length = settings.max_length
        found = read_layout(self._folder)
        given = (self.settings.query_prompt, self.settings.passage_prompt)
        usual = ("", "") if found is None else (found.query_prompt, found.passage_prompt)
        query, passage = (own if one is None else one for one, own in zip(given, usual, strict=True))
        how |= {"prompts": (query, passage), "score_range": self.settings.score_range}
        return EmbeddingReader(settings, self.tokenizer, say=self._say, **how)

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        data = super().read(settings, seed=seed)
        for rows in (data.train, *data.sets.values()):
            loss_for(rows, self.settings)
        return data

    def batcher(self, model: PreTrainedModel, examples: Rows, **how: Any) -> Batched:
        if how.get("virtual_tokens"):
            what, hint = "an embedding model's texts have no virtual tokens before them", "choose another, such as lora"
            raise UserError(what, where="method: prompt", hint=hint)
        width = int(model.config.get_text_config().hidden_size)
        if max(self.settings.dimensions, default=0) > width:
            what, hint = f"the model's vectors have {width} numbers", "ask for fewer"
            raise UserError(what, where=f"embedding.dimensions: {self.settings.dimensions}", hint=hint)
        known = {name: how[name] for name in ("device", "tokens_per_pass") if name in how}
        chosen: dict[str, Choice]
        if can_pack(model).value:
            inner, chosen = choose_causal_batcher(model, examples, **how)
            chosen = {name: choice for name, choice in chosen.items() if name != "train.share_prefixes"}
            self._batcher = TextBatcher(inner)
        elif (packed := choose_apart_batcher(model, examples, text_positions(model), **known)) is not None:
            self._batcher, chosen = TextBatcher(packed[0], True), packed[1]
        else:
            padded, chosen = choose_label_batcher(model, examples, tokenizer=self.tokenizer, **known)
            self._batcher = TextBatcher(padded)
        # Held-out rows may be of another kind, and rows to predict have no loss.
        loss = self.settings.loss if self._inputs is not None else loss_for(examples[:1], self.settings)
        resolved = self.settings.model_copy(update={"loss": loss})
        choices = {
            "embedding.loss": Choice(loss, "by what the rows have" if self.settings.loss == "auto" else "as asked")
        }
        if self.settings.temperature == "auto":
            choices["embedding.temperature"] = Choice(str(resolved.usual_temperature), f"usual for {loss}")
        return self._batcher, {**chosen, **choices}

    def objective(self, model: PreTrainedModel) -> EmbeddingObjective:
        return EmbeddingObjective(model, self.layout(model), self.settings, self._batcher)

    def layout(self, model: PreTrainedModel) -> SentenceLayout:
        """How the model embeds a text, which is tried once, before it is trained or takes packed rows.

        Raises:
            UserError: its folder says something that is not possible here.
        """
        if self._layout is not None:
            return self._layout
        asked, real = self.settings, has_values(model)
        pooling: str = asked.pooling
        if pooling == "auto" and not real:  # a dry run cannot try it
            known = read_layout(self._folder)
            usual = "last" if can_pack(model).value else "mean"
            pooling = usual if known is None or known.pooling is None else known.pooling
        how: dict[str, Any] = {name: getattr(asked, name) for name in ("normalize", "query_prompt", "passage_prompt")}
        found, _ = layout_of(model, self._folder, pooling=pooling, decoder="last", **how)
        if real:
            self._layout = found
        return found

    def write_beside(self, model: PreTrainedModel, folder: Path) -> None:
        """The files that sentence-transformers reads."""
        limits = [limit for limit in (self._max_length, text_positions(model)) if limit is not None]
        layout = replace(self.layout(model), max_length=min(limits, default=None))
        write_layout(folder, layout, int(model.config.get_text_config().hidden_size))

    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        assert isinstance(objective, EmbeddingObjective)
        return evaluate_embeddings(objective, rows, batcher, self.most_searched)

    def evaluated_rows(self, rows: Rows) -> Iterator[Rows]:
        return evaluation_parts(rows, searched_passages(rows, self.most_searched))


def searched_passages(rows: Sequence[TextGroup], most: int | None = None) -> dict[bytes, Any]:
    """Return the passages that the queries of ``rows`` search, by :func:`key_of_text`.

    Those of the rows come first, then the other right ones, then the rest of the rows' file.

    Args:
        most: Passages to search, or None for all. If the file has more, the rest is a fixed random sample.
    """
    found = {key_of_text(text): text for row in rows for text in row.rows[1:]}
    if not rows or rows[0].scores or rows[0].label is not None:
        return found
    queries, file_rows = {key_of_text(row.rows[0]) for row in rows}, rows[0].file_rows
    for row in file_rows:
        if key_of_text(row.rows[0]) in queries:
            found.setdefault(key_of_text(row.rows[1]), row.rows[1])
    others = {key: text for row in file_rows for text in row.rows[1:] if (key := key_of_text(text)) not in found}
    if most is not None and len(found) + len(others) > most:
        chosen = np.random.default_rng(0).permutation(len(others))[: max(0, most - len(found))]
        kept = list(others.items())
        others = dict(kept[place] for place in np.sort(chosen))
    return found | others


def evaluation_parts(rows: Sequence[TextGroup], passages: dict[bytes, Any]) -> Iterator[Sequence[TextGroup]]:
    """Yield the rows, then the other passages in groups as large as a row."""
    yield rows
    known, size = {key_of_text(text) for row in rows for text in row.rows[1:]}, len(rows[0].rows) if rows else 1
    texts = list(passages.values())[len(known) :]
    groups = [TextGroup(tuple(texts[start : start + size])) for start in range(0, len(texts), size)]
    for start in range(0, len(groups), _GROUPS_AT_ONCE):
        yield groups[start : start + _GROUPS_AT_ONCE]


@torch.no_grad()
def evaluate_embeddings(
    objective: EmbeddingObjective, rows: Sequence[TextGroup], batcher: AnyBatcher, most: int | None = None
) -> Evaluation:
    """Compute the mean loss of rows and a metric of their vectors.

    The metrics depend on the rows. Queries with a right passage: nDCG, MRR and recall over all passages of their file.
    Scored pairs: Spearman's correlation with the scores. Texts with classes: the share of texts whose nearest text has
    the same class.

    Args:
        most: Passages to search, see :func:`searched_passages`.

    Raises:
        UserError: if a vector is not finite.
    """
    settings = objective.settings.model_copy(update={"loss": loss_for(rows, objective.settings)})
    scaled = settings.usual_similarity == "cosine" or objective.layout.normalize
    passages = searched_passages(rows, most)
    parts = evaluation_parts(rows, passages)
    with working("embedding held-out texts"):
        vectors = embedded(objective, next(parts), batcher)
    total = 0.0
    for start in range(0, len(rows), _TOGETHER):
        part = rows[start : start + _TOGETHER]
        every = torch.stack([vectors[key_of_text(text)] for row in part for text in row.rows])
        total += len(part) * float(loss_of_step(every, part, settings, normalize=objective.layout.normalize))
    loss = {"loss": total / len(rows)}
    check_finite("the loss of the evaluated rows is", loss["loss"])
    if scaled:
        vectors = {key: functional.normalize(one, dim=0) for key, one in vectors.items()}
    first = rows[0]
    if first.label is not None:
        return _of_classes(rows, vectors, loss)
    if first.scores:
        return _of_scores(rows, vectors, loss)

    def embedded_passages() -> Iterator[Tensor]:
        of_rows = dict.fromkeys(key_of_text(text) for row in rows for text in row.rows[1:])
        yield torch.stack([vectors[key] for key in of_rows]).float()
        with working("embedding the passages of the file"):
            for part in parts:
                found = embedded(objective, part, batcher, scaled=scaled)
                yield torch.stack([found[key_of_text(text)] for group in part for text in group.rows]).float()

    asked = torch.stack([vectors[key] for key in dict.fromkeys(key_of_text(row.rows[0]) for row in rows)]).float()
    ranked = _of_ranks(rows, passages, asked, embedded_passages())
    metrics = {**loss, **ranked.metrics}
    if most is not None and len(passages) >= most:
        metrics["passages_in_file"] = float(len(searched_passages(rows)))
    if any(len(row.rows) > 2 for row in rows):
        metrics["accuracy"] = float(np.mean([_accuracy(row, vectors) for row in rows if len(row.rows) > 2]))
    return replace(ranked, metrics=metrics)


def embedded(
    objective: EmbeddingObjective, rows: Sequence[TextGroup], batcher: AnyBatcher, *, scaled: bool = False
) -> dict[bytes, Tensor]:
    """Return the vectors of all texts by :func:`key_of_text`, scaled to length 1 if ``scaled``."""
    vectors: dict[bytes, Tensor] = {}
    for batch in batcher.batches(rows):
        found = objective.evaluate_rows(batch).cpu()
        found = functional.normalize(found, dim=1) if scaled else found
        vectors.update(zip(map(key_of_text, texts_of(batch)), found, strict=True))
    return vectors


def _of_ranks(
    rows: Sequence[TextGroup], passages: dict[bytes, Any], asked: Tensor, parts: Iterator[Tensor]
) -> Evaluation:
    """Rank the passages for each query of the rows.

    A passage is right for a query if any row of the file pairs them. A passage with the query's own text is ranked last
    unless it is right.

    Args:
        asked: (queries, width) vectors of the different queries, in the order of the rows.
        parts: (n, width) vectors of the passages, in their order.
    """
    places = nearest_of_parts(asked, parts, _RANKS + 1)[1].numpy()
    numbers = {key: number for number, key in enumerate(passages)}
    queries = {key_of_text(row.rows[0]): row.rows[0] for row in rows}
    relevant: dict[bytes, set[int]] = {key: set() for key in queries}
    for row in itertools.chain(rows, rows[0].file_rows):
        if (query := key_of_text(row.rows[0])) in relevant:
            relevant[query].add(numbers[key_of_text(row.rows[1])])
    own = [-1 if (number := numbers.get(key, -1)) in relevant[key] else number for key in queries]
    order = np.argsort(places == np.array(own)[:, None], axis=1, kind="stable")
    places, right = np.take_along_axis(places, order, 1)[:, :_RANKS], list(relevant.values())
    found = retrieval_evaluation(places, right, cutoffs=(1, _RANKS))
    shown = (f"ndcg@{_RANKS}", f"mrr@{_RANKS}", "recall@1", f"recall@{_RANKS}")
    metrics = {name: found.metrics[name] for name in shown} | {"passages_searched": float(len(passages))}
    intervals = {name: bounds for name, bounds in found.intervals.items() if name in shown}
    texts, asking, per_query = list(passages.values()), list(queries.values()), np.asarray(found.per_row)

    def of_query(number: int) -> RowOutcome:
        best, expected = texts[places[number, 0]], texts[min(right[number])]
        return asking[number], expected, best, float(per_query[number])

    outcomes = Outcomes.of_errors(found.main, 1 - per_query, of_query)
    return replace(found, metrics=metrics, intervals=intervals, outcomes=outcomes)


def _of_scores(rows: Sequence[TextGroup], vectors: dict[bytes, Tensor], loss: dict[str, float]) -> Evaluation:
    similar = [_similar(row, vectors) for row in rows]
    if len(rows[0].scores) < len(similar[0]):
        return Evaluation.of_rows(
            {**loss, "accuracy": float(np.mean([_accuracy(row, vectors) for row in rows]))},
            "accuracy",
            np.array([_accuracy(row, vectors) for row in rows]),
        )
    given = np.concatenate([row.scores for row in rows])
    columns = np.concatenate(similar), given
    interval = bootstrap_interval(spearman, *columns)
    return Evaluation({**loss, "spearman": spearman(*columns)}, "spearman", interval=interval)


def _of_classes(rows: Sequence[TextGroup], vectors: dict[bytes, Tensor], loss: dict[str, float]) -> Evaluation:
    texts = torch.stack([vectors[key_of_text(row.rows[0])] for row in rows]).float()
    labels = np.array([row.label for row in rows])
    if len(rows) < 2:
        return Evaluation(loss, "loss", higher_is_better=False)
    places = nearest(texts, texts, 2)[1].numpy()
    other = np.where(places[:, 0] == np.arange(len(rows)), places[:, 1], places[:, 0])
    right = (labels[other] == labels).astype(np.float64)
    return Evaluation.of_rows({**loss, "accuracy": float(right.mean())}, "accuracy", right)


def _similar(row: TextGroup, vectors: dict[bytes, Tensor]) -> np.ndarray:
    """(passages,) similarities of a row's query."""
    query, *passages = (vectors[key_of_text(text)] for text in row.rows)
    return torch.stack([query @ passage for passage in passages]).double().numpy()


def _accuracy(row: TextGroup, vectors: dict[bytes, Tensor]) -> float:
    """The share of a row's further passages that are less similar than its first."""
    similar = _similar(row, vectors)
    return float(pair_accuracy(similar[:1], similar[None, 1:])[0])
