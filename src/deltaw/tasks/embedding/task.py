"""The task ``embedding``: vectors of texts, similar for texts that belong together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.example import LabeledExample
from deltaw.data.row_reader import RunData
from deltaw.errors import UserError
from deltaw.hub.sentence_layout import SentenceLayout, read_layout, write_layout
from deltaw.hub.skeletons import has_values
from deltaw.inference.pooling import choose_layout
from deltaw.machine.choices import Choice
from deltaw.progress import LogFunction, track_progress
from deltaw.runtime.packing_checks import can_pack
from deltaw.settings.data import DataSettings
from deltaw.tasks.embedding.losses import select_loss, step_loss
from deltaw.tasks.embedding.objective import EmbeddingObjective, TextMicroBatcher, text_key
from deltaw.tasks.embedding.rows import EmbeddingReader, TextGroup
from deltaw.tasks.embedding.settings import EmbeddingSettings
from deltaw.training.batcher import Batcher
from deltaw.training.batchers import BatcherOptions, choose_label_batcher, choose_packed_batcher, text_positions
from deltaw.training.evaluation.base import Evaluation, Outcomes, RowOutcome, bootstrap_interval, check_finite, spearman
from deltaw.training.evaluation.general_prompts import DRIFT_PROMPTS, REHEARSAL_PROMPTS
from deltaw.training.evaluation.neighbors import neighbor_agreement
from deltaw.training.evaluation.retrieval import pair_accuracy, retrieval_evaluation
from deltaw.training.evaluation.vector_search import nearest, nearest_of_parts
from deltaw.training.rendered_rows import render_example
from deltaw.training.task import BatcherChoice, Classes, Measurement, ModelFiles, Rows, Task, TrainingSession

# Maximum number of passages that an evaluation during a run searches. `deltaw eval` searches all.
MAX_SEARCHED_PASSAGES = 10_000
# Number of evaluation rows per loss computation.
_LOSS_ROWS = 64
_RANKS = 10
# Groups of passages per embedding pass.
_GROUPS_AT_ONCE = 4096
# Number of steps and width of the vectors of the check for constant losses.
_CHECKED_STEPS = 1000
_MIN_WIDTH = 8
# Reasons for a constant loss by the name of the loss.
_CONSTANT = {
    "infonce": "no row has a negative, because all rows of a step have the same passage",
    "supcon": "no step has two rows of one class and a row of another one",
    "cosent": "all pairs of a step have the same score",
    "angle": "all pairs of a step have the same score",
    "margin-mse": "the loss does not depend on the texts",
    "kl": "the loss does not depend on the texts",
}


class EmbeddingTask(Task[EmbeddingObjective]):
    """Train text embeddings.

    Args:
        settings: The ``embedding:`` section.
        folder: Folder of the model.

    Attributes:
        max_searched_passages: Passages of a file that an evaluation searches, or None for all. A limited evaluation
            reports the number of passages that it searched.
    """

    name = "embedding"
    caches_features = False
    shares_evaluation = True
    max_searched_passages: int | None = MAX_SEARCHED_PASSAGES

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, log: LogFunction, settings: EmbeddingSettings, folder: Path
    ) -> None:
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.settings = settings
        self._folder = folder
        self._log = log
        self._max_length: int | None = None
        self._batcher: TextMicroBatcher | None = None
        self._layout: SentenceLayout | None = None
        self._reads_labels = True

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> EmbeddingTask:
        tokenizer = files.tokenizer()
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # sentence-transformers pads
        return cls(tokenizer, files.log, files.section or EmbeddingSettings(), files.folder)

    def reader(self, settings: DataSettings, classes: Classes = None, *, labeled: bool = True) -> EmbeddingReader:
        self._max_length = settings.max_length
        self._reads_labels = labeled
        layout = read_layout(self._folder)
        configured = (self.settings.query_prompt, self.settings.passage_prompt)
        defaults = ("", "") if layout is None else (layout.query_prompt, layout.passage_prompt)
        pairs = zip(configured, defaults, strict=True)
        query, passage = (default if prompt is None else prompt for prompt, default in pairs)
        return EmbeddingReader(
            settings,
            self.tokenizer,
            log=self._log,
            score_range=self.settings.score_range,
            labeled=labeled,
            prompts=(query, passage),
        )

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        data = super().read(settings, seed=seed)
        for rows in (data.train, *data.sets.values()):
            select_loss(rows, self.settings)
        return data

    def check_steps(self, rows: Rows, batch_size: int) -> None:
        """Reject rows whose loss is constant, computed for random vectors."""
        generator = torch.Generator().manual_seed(0)
        width = max([_MIN_WIDTH, *self.settings.dimensions])
        order = np.random.default_rng(0).permutation(len(rows))
        for start in range(0, len(rows), batch_size)[:_CHECKED_STEPS]:
            step_rows = [rows[index] for index in order[start : start + batch_size]]
            shape = sum(len(row.rows) for row in step_rows), width
            vectors = (0.01 * torch.randn(shape, generator=generator)).requires_grad_()  # short, against saturation
            loss = step_loss(vectors, step_rows, self.settings, normalize=False)
            (gradient,) = torch.autograd.grad(loss, vectors, allow_unused=True, materialize_grads=True)
            if gradient.any():
                return
        loss_name = select_loss(rows[:1], self.settings)
        if min(batch_size, len(rows)) == 1:
            message = f"a step has 1 row, and the loss '{loss_name}' compares the rows of a step"
            hint = "set train.batch_size to 16 or more, or add negatives to the rows"
            raise UserError(message, location="train.batch_size", hint=hint)
        raise UserError(f"training has no effect: {_CONSTANT[loss_name]}", location="data.train", hint="add other rows")

    def batcher(self, model: PreTrainedModel, examples: Rows, options: BatcherOptions) -> BatcherChoice:
        if options.virtual_tokens:
            message = "embedding models do not support virtual tokens"
            hint = "use another method, for example lora"
            raise UserError(message, location="method: prompt", hint=hint)
        width = int(model.config.get_text_config().hidden_size)
        if max(self.settings.dimensions, default=0) > width:
            message = f"the model's vectors have {width} numbers"
            hint = f"use at most {width}"
            raise UserError(message, location=f"embedding.dimensions: {self.settings.dimensions}", hint=hint)
        packed = choose_packed_batcher(model, examples, options)
        texts, batcher_choices = packed or choose_label_batcher(model, examples, options, self.tokenizer)
        batcher_choices.pop("train.share_prefixes", None)
        self._batcher = texts.with_class(TextMicroBatcher)
        # Evaluation rows may have a different format, and rows to predict have no loss.
        loss = select_loss(examples[:1], self.settings) if self._reads_labels else self.settings.loss
        resolved = self.settings.model_copy(update={"loss": loss})
        reason = "by what the rows have" if self.settings.loss == "auto" else "as requested"
        choices = {"embedding.loss": Choice(loss, reason)}
        if self.settings.temperature == "auto":
            choices["embedding.temperature"] = Choice(str(resolved.effective_temperature), f"usual for {loss}")
        return self._batcher, {**batcher_choices, **choices}

    def forward(self, objective: Any, batch: Any) -> None:
        objective.evaluate_rows(batch)

    def final_measurements(self, session: TrainingSession, evaluation: Evaluation) -> Iterator[tuple[str, Measurement]]:
        if (drift := neighbor_drift(session, self.tokenizer)) is not None:
            yield "drift", drift

    def objective(self, model: PreTrainedModel) -> EmbeddingObjective:
        return EmbeddingObjective(model, self.layout(model), self.settings, self._batcher)

    def layout(self, model: PreTrainedModel) -> SentenceLayout:
        """Return the layout of the model's vectors. The layout is verified once, before training and before packing.

        Raises:
            UserError: if the model's folder specifies an unsupported layout.
        """
        if self._layout is not None:
            return self._layout
        settings = self.settings
        has_weights = has_values(model)
        pooling: str = settings.pooling
        if pooling == "auto" and not has_weights:  # a dry run cannot test the model
            stored = read_layout(self._folder)
            default = "last" if can_pack(model).value else "mean"
            pooling = default if stored is None or stored.pooling is None else stored.pooling
        layout, _ = choose_layout(
            model,
            self._folder,
            pooling=pooling,
            normalize=settings.normalize,
            query_prompt=settings.query_prompt,
            passage_prompt=settings.passage_prompt,
            decoder="last",
        )
        if has_weights:
            self._layout = layout
        return layout

    def save_extra_files(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the files that sentence-transformers reads."""
        limits = [limit for limit in (self._max_length, text_positions(model)) if limit is not None]
        layout = replace(self.layout(model), max_length=min(limits, default=None))
        write_layout(folder, layout, int(model.config.get_text_config().hidden_size))

    def evaluate(
        self, objective: EmbeddingObjective, rows: Rows, batcher: Batcher, classes: Classes = None
    ) -> Evaluation:
        return evaluate_embeddings(objective, rows, batcher, self.max_searched_passages)

    def evaluated_rows(self, rows: Rows) -> Iterator[Rows]:
        return evaluation_parts(rows, searched_passages(rows, self.max_searched_passages))


def searched_passages(rows: Sequence[TextGroup], max_passages: int | None = None) -> dict[bytes, Any]:
    """Return the passages that the queries of ``rows`` search, by :func:`text_key`.

    The passages of the rows are first, then further relevant passages, then the remaining passages of the file.

    Args:
        max_passages: Maximum number of passages, or None for all. If the file has more, the remainder is a fixed random
            sample.
    """
    passages = {text_key(text): text for row in rows for text in row.rows[1:]}
    if not rows or rows[0].scores or rows[0].label is not None:
        return passages
    queries = {text_key(row.rows[0]) for row in rows}
    file_rows = rows[0].file_rows
    for row in file_rows:
        if text_key(row.rows[0]) in queries:
            passages.setdefault(text_key(row.rows[1]), row.rows[1])
    remaining = {key: text for row in file_rows for text in row.rows[1:] if (key := text_key(text)) not in passages}
    if max_passages is not None and len(passages) + len(remaining) > max_passages:
        sampled = np.random.default_rng(0).permutation(len(remaining))[: max(0, max_passages - len(passages))]
        items = list(remaining.items())
        remaining = dict(items[index] for index in np.sort(sampled))
    return passages | remaining


def evaluation_parts(rows: Sequence[TextGroup], passages: dict[bytes, Any]) -> Iterator[Sequence[TextGroup]]:
    """Yield the rows, then the remaining passages in groups of the size of a row."""
    yield rows
    row_keys = {text_key(text) for row in rows for text in row.rows[1:]}
    size = len(rows[0].rows) if rows else 1
    texts = list(passages.values())[len(row_keys) :]
    groups = [TextGroup(tuple(texts[start : start + size])) for start in range(0, len(texts), size)]
    for start in range(0, len(groups), _GROUPS_AT_ONCE):
        yield groups[start : start + _GROUPS_AT_ONCE]


@torch.no_grad()
def evaluate_embeddings(
    objective: EmbeddingObjective, rows: Sequence[TextGroup], batcher: Batcher, max_passages: int | None = None
) -> Evaluation:
    """Compute the mean loss of rows and retrieval metrics of their vectors.

    The metrics depend on the rows. Queries with a relevant passage: nDCG, MRR and recall over all passages of their
    file. Scored pairs: Spearman's correlation with the scores. Texts with classes: the share of texts whose nearest
    neighbor has the same class.

    Args:
        max_passages: Maximum number of searched passages, see :func:`searched_passages`.

    Raises:
        UserError: if a vector is not finite.
    """
    settings = objective.settings.model_copy(update={"loss": select_loss(rows, objective.settings)})
    scaled = settings.effective_similarity == "cosine" or objective.layout.normalize
    passages = searched_passages(rows, max_passages)
    parts = evaluation_parts(rows, passages)
    with track_progress("embedding held-out texts"):
        vectors = embed_texts(objective, next(parts), batcher)
    total = 0.0
    for start in range(0, len(rows), _LOSS_ROWS):
        part = rows[start : start + _LOSS_ROWS]
        row_vectors = torch.stack([vectors[text_key(text)] for row in part for text in row.rows])
        total += len(part) * float(step_loss(row_vectors, part, settings, normalize=objective.layout.normalize))
    loss = {"loss": total / len(rows)}
    check_finite("the loss of the evaluated rows is", loss["loss"])
    if scaled:
        vectors = {key: functional.normalize(vector, dim=0) for key, vector in vectors.items()}
    first = rows[0]
    if first.label is not None:
        return _evaluate_classes(rows, vectors, loss)
    if first.scores:
        return _evaluate_scores(rows, vectors, loss)

    def embedded_passages() -> Iterator[Tensor]:
        of_rows = dict.fromkeys(text_key(text) for row in rows for text in row.rows[1:])
        yield torch.stack([vectors[key] for key in of_rows]).float()
        with track_progress("embedding the passages of the file"):
            for part in parts:
                part_vectors = embed_texts(objective, part, batcher, scaled=scaled)
                yield torch.stack([part_vectors[text_key(text)] for group in part for text in group.rows]).float()

    query_vectors = torch.stack([vectors[key] for key in dict.fromkeys(text_key(row.rows[0]) for row in rows)]).float()
    ranked = _evaluate_ranking(rows, passages, query_vectors, embedded_passages())
    metrics = {**loss, **ranked.metrics}
    if max_passages is not None and len(passages) >= max_passages:
        metrics["passages_in_file"] = float(len(searched_passages(rows)))
    if any(len(row.rows) > 2 for row in rows):
        metrics["accuracy"] = float(np.mean([_accuracy(row, vectors) for row in rows if len(row.rows) > 2]))
    return replace(ranked, metrics=metrics)


def embed_texts(
    objective: EmbeddingObjective, rows: Sequence[TextGroup], batcher: Batcher, *, scaled: bool = False
) -> dict[bytes, Tensor]:
    """Return the vectors of all texts by :func:`text_key`, scaled to length 1 if ``scaled``."""
    vectors: dict[bytes, Tensor] = {}
    for batch in batcher.batches(rows):
        batch_vectors = objective.evaluate_rows(batch).cpu()
        batch_vectors = functional.normalize(batch_vectors, dim=1) if scaled else batch_vectors
        vectors.update(zip(map(text_key, batch.examples), batch_vectors, strict=True))
    return vectors


def _evaluate_ranking(
    rows: Sequence[TextGroup], passages: dict[bytes, Any], query_vectors: Tensor, parts: Iterator[Tensor]
) -> Evaluation:
    """Rank the passages for each query of the rows.

    A passage is relevant to a query if any row of the file pairs them. A passage with the same text as the query is
    ranked last unless it is relevant.

    Args:
        query_vectors: (queries, width) vectors of the distinct queries, in the order of the rows.
        parts: (n, width) vectors of the passages, in order.
    """
    ranking = nearest_of_parts(query_vectors, parts, _RANKS + 1)[1].numpy()
    passage_indices = {key: index for index, key in enumerate(passages)}
    queries = {text_key(row.rows[0]): row.rows[0] for row in rows}
    relevant: dict[bytes, set[int]] = {key: set() for key in queries}
    for row in itertools.chain(rows, rows[0].file_rows):
        if (query := text_key(row.rows[0])) in relevant:
            relevant[query].add(passage_indices[text_key(row.rows[1])])
    own_passage = [-1 if (index := passage_indices.get(key, -1)) in relevant[key] else index for key in queries]
    order = np.argsort(ranking == np.array(own_passage)[:, None], axis=1, kind="stable")
    ranking = np.take_along_axis(ranking, order, 1)[:, :_RANKS]
    relevant_lists = list(relevant.values())
    evaluation = retrieval_evaluation(ranking, relevant_lists, cutoffs=(1, _RANKS))
    reported = (f"ndcg@{_RANKS}", f"mrr@{_RANKS}", "recall@1", f"recall@{_RANKS}")
    metrics = {name: evaluation.metrics[name] for name in reported} | {"passages_searched": float(len(passages))}
    intervals = {name: bounds for name, bounds in evaluation.intervals.items() if name in reported}
    texts = list(passages.values())
    query_texts = list(queries.values())
    per_query = np.asarray(evaluation.per_row)

    def outcome(index: int) -> RowOutcome:
        best = texts[ranking[index, 0]]
        expected = texts[min(relevant_lists[index])]
        return query_texts[index], expected, best, float(per_query[index])

    outcomes = Outcomes.of_errors(evaluation.main, 1 - per_query, outcome)
    return replace(evaluation, metrics=metrics, intervals=intervals, outcomes=outcomes)


def _evaluate_scores(rows: Sequence[TextGroup], vectors: dict[bytes, Tensor], loss: dict[str, float]) -> Evaluation:
    similar = [_similar(row, vectors) for row in rows]
    if len(rows[0].scores) < len(similar[0]):
        accuracies = [_accuracy(row, vectors) for row in rows]
        metrics = {**loss, "accuracy": float(np.mean(accuracies))}
        return Evaluation.of_rows(metrics, "accuracy", np.array(accuracies))
    scores = np.concatenate([row.scores for row in rows])
    columns = np.concatenate(similar), scores
    interval = bootstrap_interval(spearman, *columns)
    return Evaluation({**loss, "spearman": spearman(*columns)}, "spearman", interval=interval)


def _evaluate_classes(rows: Sequence[TextGroup], vectors: dict[bytes, Tensor], loss: dict[str, float]) -> Evaluation:
    texts = torch.stack([vectors[text_key(row.rows[0])] for row in rows]).float()
    labels = np.array([row.label for row in rows])
    if len(rows) < 2:
        return Evaluation(loss, "loss", higher_is_better=False)
    neighbors = nearest(texts, texts, 2)[1].numpy()
    nearest_other = np.where(neighbors[:, 0] == np.arange(len(rows)), neighbors[:, 1], neighbors[:, 0])
    is_correct = (labels[nearest_other] == labels).astype(np.float64)
    return Evaluation.of_rows({**loss, "accuracy": float(is_correct.mean())}, "accuracy", is_correct)


def _similar(row: TextGroup, vectors: dict[bytes, Tensor]) -> np.ndarray:
    """Return (passages,) similarities to the query of a row."""
    query, *passages = (vectors[text_key(text)] for text in row.rows)
    return torch.stack([query @ passage for passage in passages]).double().numpy()


def _accuracy(row: TextGroup, vectors: dict[bytes, Tensor]) -> float:
    """Return the share of a row's negatives that are less similar than its first passage."""
    similar = _similar(row, vectors)
    return float(pair_accuracy(similar[:1], similar[None, 1:])[0])


NEIGHBORS = 10


@dataclass(frozen=True)
class NeighborDrift:
    """Drift on general sentences.

    Attributes:
        agreement: Mean share of each sentence's nearest neighbors that are the same as for the base model.
        neighbors: Number of nearest neighbors.
        sentences: Number of compared sentences.
    """

    agreement: float
    neighbors: int
    sentences: int

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        nearest = f"the {self.neighbors} nearest neighbors of {self.sentences} general sentences"
        return f"drift: of {nearest}, {self.agreement:.0%} are those of the base model"


@torch.no_grad()
def neighbor_drift(session: TrainingSession, tokenizer: PreTrainedTokenizerBase) -> NeighborDrift | None:
    """Return the drift of a run's adapter.

    Returns None if drift is disabled or the base model cannot be restored.
    """
    objective = session.objective
    method = session.method
    model = session.model
    if session.config.train.drift is False or not method.can_restore_base(model):
        return None
    limit = text_positions(model)
    truncation = {} if limit is None else {"truncation": True, "max_length": limit - method.virtual_tokens}
    ids = tokenizer([*DRIFT_PROMPTS, *REHEARSAL_PROMPTS], return_attention_mask=False, **truncation)["input_ids"]
    rows = [LabeledExample(number, np.asarray(token_ids, np.int32), 0) for number, token_ids in enumerate(ids)]
    with session.running(), method.evaluating(model), track_progress("comparing general sentences"):
        after = _vectors(session, objective, [render_example(row, method) for row in rows])
        with method.base_model_active(model):
            before = _vectors(session, objective, rows)
    return NeighborDrift(neighbor_agreement(before, after, NEIGHBORS), NEIGHBORS, len(rows))


def _vectors(session: TrainingSession, objective: EmbeddingObjective, rows: Sequence[Any]) -> Tensor:
    """Return (rows, width) normalized vectors."""
    vectors: dict[bytes, Tensor] = {}
    for batch in session.batcher.batches(rows):
        vectors.update(zip(map(text_key, batch.examples), objective.evaluate_rows(batch).cpu(), strict=True))
    return functional.normalize(torch.stack([vectors[text_key(row)] for row in rows]).float(), dim=1)
