"""The task ``reranking``: score the passages of a query with a classifier that has one output.

A language model without such a head gets one from its output layer: the logit of yes minus the logit of no after the
prompt (Qwen3 Embedding, arXiv 2506.05176, section 2).

The losses match those of sentence-transformers' cross-encoders. A loss takes the scores and labels of one query, fp32
or fp64 (passages,), and returns their sum. :data:`UNITS` defines the divisor of the sum over a step.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from transformers import PreTrainedModel

from deltaw.data.chat_template import with_date
from deltaw.data.packing import MicroBatch
from deltaw.data.rendering import FAULTS, render_conversation
from deltaw.data.report import PreparationReport
from deltaw.data.row_reader import RunData
from deltaw.errors import UserError
from deltaw.hub.empty_models import head_outputs, read_config
from deltaw.hub.sentence_layout import write_cross_encoder
from deltaw.hub.skeletons import has_values
from deltaw.machine.choices import Choice
from deltaw.settings.data import DataSettings
from deltaw.tasks.classification.objective import LabelObjective, check_outputs
from deltaw.tasks.classification.task import LabelTask, predict_rows
from deltaw.tasks.embedding.rows import TextGroup
from deltaw.tasks.reranking.rows import RerankReader, as_chat_template, prompt_of
from deltaw.tasks.reranking.settings import RerankingSettings
from deltaw.training.batcher import Batcher
from deltaw.training.batchers import BatcherOptions, text_positions
from deltaw.training.evaluation.base import Evaluation, mean_interval
from deltaw.training.evaluation.retrieval import MAIN_METRIC, retrieval_evaluation
from deltaw.training.task import BatcherChoice, Classes, ModelFiles, NamedParameters, Rows

Name: TypeAlias = Literal["binary", "pairwise", "listwise", "contrastive"]


def binary(scores: Tensor, labels: Tensor) -> Tensor:
    """−y log σ(s) − (1−y) log(1−σ(s)) of labels between 0 and 1, for passages of one or several queries."""
    return binary_cross_entropy_with_logits(scores, labels, reduction="sum")


def pairwise(scores: Tensor, labels: Tensor) -> Tensor:
    """−log₂ σ(s − s′) over pairs of passages whose first has the higher label (RankNet).

    Burges et al. 2005, "Learning to rank using gradient descent".
    """
    better = labels[:, None] > labels
    return -logsigmoid((scores[:, None] - scores)[better]).sum() / math.log(2)


def listwise(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of softmax(s) under softmax(y) (ListNet's top-one loss).

    Cao et al. 2007, "Learning to rank: from pairwise approach to listwise approach".
    """
    return -(labels.softmax(0) * scores.log_softmax(0)).sum()


def contrastive(scores: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(s) of the positive passage, or the label-weighted mean over several.

    Localized contrastive estimation, arXiv 2101.08751, eq. 3.
    """
    return -(labels / labels.sum() * scores.log_softmax(0)).sum()


LOSSES: dict[Name, Callable[[Tensor, Tensor], Tensor]] = {"binary": binary, "pairwise": pairwise}
LOSSES |= {"listwise": listwise, "contrastive": contrastive}
# Units of a query: its passages, its pairs of passages with different labels, or the query itself.
UNITS: dict[Name, Callable[[Sequence[float]], int]] = {"binary": len, "listwise": lambda labels: 1}
UNITS |= {"pairwise": lambda labels: sum(one > other for one in labels for other in labels)}
UNITS |= {"contrastive": lambda labels: 1}


def loss_of_queries(name: Name, scores: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the summed loss over queries, a scalar.

    Args:
        name: Name of the loss.
        scores: (passages,) scores, query by query.
        labels: (passages,) labels in the same order.
        sizes: Number of passages of each query.
    """
    if name == "binary":
        return binary(scores, labels)
    parts = zip(scores.split(list(sizes)), labels.split(list(sizes)), strict=True)
    return torch.stack([LOSSES[name](*part) for part in parts]).sum()


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEADS = ("lm_head.weight", "model.lm_head.weight", "output.weight", "embed_out.weight")
_PROMPT = "Query: {query}\n\nPassage: {passage}\n\nDoes the passage answer the query? Answer yes or no."
# Templates that include the date always get this one, so that scores do not depend on the day.
_DATE = "2024-07-26"


class RerankingObjective(LabelObjective):
    """Sum of the losses of the queries in a batch.

    Args:
        model: Model with one output.
        settings: Settings of the task.
        loss: Loss function of the rows, already resolved from ``auto``.

    Raises:
        UserError: if the head has more than one output, or the output of a row depends on padding.
    """

    def __init__(self, model: PreTrainedModel, settings: RerankingSettings, loss: Name) -> None:
        check_outputs(model.config.num_labels, 1, "reranker")
        super().__init__(model, "regression")
        self.loss = loss
        self._low, high = settings.score_range
        self._width = high - self._low

    def __call__(self, batch: MicroBatch) -> Tensor:
        return self.of_scores(self.predictions(batch), batch.targets, batch.sizes)

    def of_scores(self, scores: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the sum of the losses, a scalar.

        Args:
            scores: (passages,) grouped by query.
            labels: (passages,) grouped by query.
            sizes: Number of passages of each query.
        """
        labels = labels.to(scores.dtype)
        return loss_of_queries(self.loss, scores, self.graded(labels) if self.loss == "binary" else labels, sizes)

    def graded(self, labels: Tensor) -> Tensor:
        """Scale labels to the range 0 to 1."""
        return (labels - self._low) / self._width

    def units(self, rows: Rows) -> int:
        """Return the number of passages, pairs of passages, or queries, depending on the loss."""
        return sum(UNITS[self.loss](labels_of(item)) for item in rows)


def labels_of(item: TextGroup) -> list[float]:
    """Return the labels of the passages of a row."""
    return [row.label for row in item.rows]


@dataclass(eq=False)
class RerankingTask(LabelTask):
    """Train a model to score the passages of a query.

    Args:
        settings: The ``reranking:`` section.
        answers: True for a language model. Its head is initialized from the answers yes and no.

    Attributes:
        loss: Loss function of the rows that were read first.
        max_length: Maximum number of tokens of a row.

    The other arguments are those of :class:`LabelTask`.
    """

    settings: RerankingSettings = field(default_factory=RerankingSettings)
    answers: bool = False
    loss: Name | None = None
    max_length: int | None = None

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> RerankingTask:
        settings = files.section or RerankingSettings()
        architecture = str((getattr(files.config, "architectures", None) or [""])[0])
        answers = architecture.endswith(("ForCausalLM", "LMHeadModel"))
        tokenizer = files.tokenizer()
        if settings.template is not None or (answers and prompt_of(tokenizer) is None):
            tokenizer = copy.copy(tokenizer)
            prompt = _question(tokenizer) if settings.template is None else _with_bos(tokenizer, settings.template)
            tokenizer.chat_template = as_chat_template(prompt)
        config = read_config(files.folder, "sequence-classification", None, files.trust_remote_code)
        outputs = head_outputs(config)
        return cls(name, tokenizer, None, None, outputs, files.reference, files.folder, settings, answers)

    def reader(self, settings: DataSettings, classes: Classes = None, *, labeled: bool = True) -> RerankReader:
        self.max_length = settings.max_length
        loss = self.loss or self.settings.loss
        score_range = self.settings.score_range
        return RerankReader(settings, self.tokenizer, score_range=score_range, labeled=labeled, loss=loss)

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        if self.head_outputs is not None:
            check_outputs(self.head_outputs, 1, "reranker", self.model)
        reader = self.reader(settings)
        data = reader.prepare(seed)
        self.loss = cast(Name, reader.loss)
        return data

    def read_file(self, file: str, settings: DataSettings, classes: Classes) -> tuple[Sequence[Any], PreparationReport]:
        reader = self.reader(replace(settings, train=file))
        result = reader.file(file)
        self.loss = cast(Name, reader.loss)
        return result

    def num_outputs(self, data: RunData) -> int:
        return 1

    def batcher(self, model: PreTrainedModel, examples: Rows, options: BatcherOptions) -> BatcherChoice:
        batcher, choices = super().batcher(model, examples, options)
        why = "by the rows" if self.settings.loss == "auto" else "as requested"
        return batcher, {**choices, "reranking.loss": Choice(self.loss or self.settings.loss, why)}

    def trainable_parameters(self, parameters: NamedParameters, rows: Rows) -> NamedParameters:
        """Exclude scalar biases for losses of score differences, which do not depend on them."""
        return parameters if self.loss == "binary" else [p for p in parameters if p[1].numel() > 1]

    def objective(self, model: PreTrainedModel) -> RerankingObjective:
        return RerankingObjective(model, self.settings, self.loss or "binary")

    def initialize_head(self, model: PreTrainedModel, new_modules: Sequence[str], rows: Rows) -> None:
        """Initialize the head of a language model with the difference of the output rows of yes and no.

        Raises:
            UserError: if an answer is not a single token.
        """
        heads = [model.get_submodule(name) for name in new_modules]
        heads = [head for head in heads if getattr(head, "out_features", None) == 1]
        if not (self.answers and heads and has_values(model)):
            return
        yes, no = (self._token(name) for name in ("yes", "no"))
        with torch.no_grad():
            yes_row, no_row = _output_rows(model, self.folder, [yes, no]).float()
            heads[-1].weight.copy_((yes_row - no_row)[None])  # type: ignore[operator]

    def _token(self, name: str) -> int:
        answer = getattr(self.settings, name)
        assert self.tokenizer is not None
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            hint = "use another word; a leading space counts"
            raise UserError(f"the answer {answer!r} is {len(ids)} tokens", location=f"reranking.{name}", hint=hint)
        return int(ids[0])

    def save_extra_files(self, model: PreTrainedModel, folder: Path) -> None:
        assert self.tokenizer is not None
        pad = self.tokenizer.pad_token_id
        in_prompt = prompt_of(self.tokenizer) is not None
        limits = [limit for limit in (self.max_length, text_positions(model)) if limit is not None]
        pad_id = pad if isinstance(pad, int) else None
        max_length = min(limits, default=None)
        write_cross_encoder(folder, max_length, in_prompt=in_prompt, pad_id=pad_id)

    def evaluate(self, objective: LabelObjective, rows: Rows, batcher: Batcher, classes: Classes = None) -> Evaluation:
        assert isinstance(objective, RerankingObjective)
        return evaluate_scores(objective, rows, batcher)


def _question(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt for a language model that was not trained for reranking, in its chat template if it has one."""
    template = tokenizer.chat_template
    if isinstance(template, str):
        messages = [{"role": "user", "content": _PROMPT}]
        variables = {**tokenizer.special_tokens_map, "enable_thinking": False}
        try:
            return render_conversation(with_date(template, _DATE), messages, generation=True, variables=variables)
        except FAULTS as error:
            message = f"the model's chat template cannot be used: {error}"
            raise UserError(message, location="model", hint="write reranking.template") from error
    return _with_bos(tokenizer, f"{_PROMPT}\n")


def _with_bos(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return the prompt, preceded by the token that the tokenizer adds to every text, if any."""
    start = tokenizer.bos_token
    ids = tokenizer("")["input_ids"]
    adds_bos = isinstance(start, str) and ids[:1] == [tokenizer.bos_token_id] and not prompt.startswith(start)
    return f"{start}{prompt}" if adds_bos else prompt


def _output_rows(model: PreTrainedModel, folder: Path, tokens: Sequence[int]) -> Tensor:
    """Return rows (tokens, width) of a language model's output layer, or of its input embeddings if they are tied."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                if names := [name for name in _HEADS if name in file.keys()]:  # noqa: SIM118
                    rows = file.get_slice(names[0])
                    return torch.cat([rows[token : token + 1] for token in tokens])
    return model.get_input_embeddings().weight[list(tokens)]  # type: ignore[index]


def evaluate_scores(objective: RerankingObjective, rows: Sequence[TextGroup], batcher: Batcher) -> Evaluation:
    """Evaluate the ranking of passages.

    The metrics are the mean loss, nDCG@10, MRR@10 and the accuracy of pairs, over queries whose passages have different
    labels in any row. Without such queries, they are the loss and the share of scores with the correct sign. If scores
    are equal, the irrelevant passage counts as ranked first.

    Raises:
        UserError: if a score is not finite.
    """
    scores = predict_rows(objective, rows, batcher).astype(np.float64)
    labels = np.array([label for item in rows for label in labels_of(item)])
    sizes = [len(item.rows) for item in rows]
    tensors = torch.from_numpy(scores), torch.from_numpy(labels)
    metrics = {"loss": float(objective.of_scores(*tensors, sizes)) / objective.units(rows)}
    grades = objective.graded(tensors[1]).numpy()
    query_indices: dict[bytes, list[int]] = defaultdict(list)
    for index, query in enumerate(item.group for item in rows for _ in item.rows):
        query_indices[query].append(index)
    queries = [np.array(indices) for indices in query_indices.values() if np.ptp(grades[indices]) > 0]
    if not queries:
        is_correct = ((scores > 0) == (grades > 0.5)).astype(np.float64)
        return Evaluation.of_rows({**metrics, "accuracy": float(is_correct.mean())}, "accuracy", is_correct)
    ranked = [indices[np.lexsort((grades[indices], -scores[indices]))] for indices in queries]
    table = np.full((len(queries), max(map(len, ranked))), -1)
    for row, indices in zip(table, ranked, strict=True):
        row[: len(indices)] = indices
    evaluation = retrieval_evaluation(table, [dict(zip(p.tolist(), grades[p].tolist(), strict=True)) for p in queries])
    pairs = np.array([_in_order(scores[indices], grades[indices]) for indices in queries])
    metrics |= {n: evaluation.metrics[n] for n in (MAIN_METRIC, "mrr@10")} | {"pair_accuracy": float(pairs.mean())}
    bounds = {"mrr@10": evaluation.intervals.get("mrr@10"), "pair_accuracy": mean_interval(pairs)}
    intervals = {name: (bound[0], min(1.0, bound[1])) for name, bound in bounds.items() if bound is not None}
    interval = evaluation.interval
    return Evaluation(metrics, MAIN_METRIC, per_row=evaluation.per_row, interval=interval, intervals=intervals)


def _in_order(scores: np.ndarray, grades: np.ndarray) -> float:
    """Return the share of passage pairs with different grades that the scores order correctly.

    Equal scores count half.
    """
    better = grades[:, None] > grades
    return float((np.sign(scores[:, None] - scores)[better] / 2 + 0.5).mean())
