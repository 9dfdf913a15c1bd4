"""The task ``embedding``: vectors of texts, near each other where the texts belong together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
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
from deltaw.runtime.packed import can_pack, packed_rows, padded_rows
from deltaw.task_settings import EmbeddingSettings
from deltaw.training.callbacks import Say
from deltaw.training.embedding.losses import loss_for, loss_of_step
from deltaw.training.embedding.objective import EmbeddingObjective, TextBatcher, key_of_text, texts_of
from deltaw.training.embedding.pooling import layout_of
from deltaw.training.evaluation.base import Evaluation, bootstrap_interval, check_finite, spearman
from deltaw.training.evaluation.retrieval import nearest, pair_accuracy, retrieval_evaluation
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.tasks.base import Batched, Classes, ModelFiles, Predictions, Rows, Task
from deltaw.training.tasks.causal_batcher import choose_apart_batcher, choose_causal_batcher
from deltaw.training.tasks.labels import choose_label_batcher, text_positions
from deltaw.working import working

# Held-out rows whose loss is computed together.
_TOGETHER = 64
_RANKS = 10


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
        if not self._inputs.has_both:
            return {"embedding": [of_row[0] if len(of_row) == 1 else of_row for of_row in found]}
        passages = [of_row[1] if len(of_row) == 2 else of_row[1:] for of_row in found]
        return {"query_embedding": [of_row[0] for of_row in found], "passage_embedding": passages}

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

    def running(self, model: PreTrainedModel, batcher: AnyBatcher) -> AbstractContextManager[None]:
        if getattr(batcher, "padded", True):
            return padded_rows(model)
        return packed_rows(model, apart=getattr(batcher, "apart", False))

    def write_beside(self, model: PreTrainedModel, folder: Path) -> None:
        """The files that sentence-transformers reads."""
        limits = [limit for limit in (self._max_length, text_positions(model)) if limit is not None]
        layout = replace(self.layout(model), max_length=min(limits, default=None))
        write_layout(folder, layout, int(model.config.get_text_config().hidden_size))

    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        assert isinstance(objective, EmbeddingObjective)
        return evaluate_embeddings(objective, rows, batcher)


@torch.no_grad()
def evaluate_embeddings(objective: EmbeddingObjective, rows: Sequence[TextGroup], batcher: AnyBatcher) -> Evaluation:
    """The mean loss of rows, and what their vectors are good for.

    Of rows with a right passage: nDCG, MRR and recall of each query over all passages of the rows, further ones among
    them; of scored pairs: the correlation of ranks with the scores; of texts with classes: the share whose nearest text
    has the same class.

    Raises:
        UserError: a vector is not finite.
    """
    settings = objective.settings.model_copy(update={"loss": loss_for(rows, objective.settings)})
    scaled = settings.usual_similarity == "cosine" or objective.layout.normalize
    with working("embedding held-out texts"):
        vectors = embedded(objective, rows, batcher)
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
    ranked = _of_ranks(rows, vectors)
    metrics = {**loss, **ranked.metrics}
    if any(len(row.rows) > 2 for row in rows):
        metrics["accuracy"] = float(np.mean([_accuracy(row, vectors) for row in rows if len(row.rows) > 2]))
    return replace(ranked, metrics=metrics)


def embedded(objective: EmbeddingObjective, rows: Sequence[TextGroup], batcher: AnyBatcher) -> dict[bytes, Tensor]:
    """The vectors of all texts by :func:`key_of_text`."""
    vectors: dict[bytes, Tensor] = {}
    for batch in batcher.batches(rows):
        vectors.update(zip(map(key_of_text, texts_of(batch)), objective.evaluate_rows(batch).cpu(), strict=True))
    return vectors


def _of_ranks(rows: Sequence[TextGroup], vectors: dict[bytes, Tensor]) -> Evaluation:
    passages: dict[bytes, int] = {}
    queries: dict[bytes, int] = {}
    relevant: list[set[int]] = []
    for row in rows:
        query, right, *others = (key_of_text(text) for text in row.rows)
        if query not in queries:
            queries[query] = len(queries)
            relevant.append(set())
        relevant[queries[query]].add(passages.setdefault(right, len(passages)))
        for other in others:
            passages.setdefault(other, len(passages))
    asked, there = (torch.stack([vectors[key] for key in keys]).float() for keys in (queries, passages))
    found = retrieval_evaluation(nearest(asked, there, _RANKS)[1].numpy(), relevant, cutoffs=(1, _RANKS))
    shown = (f"ndcg@{_RANKS}", f"mrr@{_RANKS}", "recall@1", f"recall@{_RANKS}")
    intervals = {name: bounds for name, bounds in found.intervals.items() if name in shown}
    return replace(found, metrics={name: found.metrics[name] for name in shown}, intervals=intervals)


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
