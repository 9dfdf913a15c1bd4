"""The task `reranking`: a score for each passage of a query, by a classifier with one output.

A language model without such a head gets one from its own output layer: by how much it would rather answer yes than
no after the prompt (Qwen3 Embedding, arXiv 2506.05176, section 2).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.data.chat_template import with_date
from deltaw.data.example import LabeledExample
from deltaw.data.images import LabelBatch
from deltaw.data.rendering import FAULTS, rendered
from deltaw.data.report import Report
from deltaw.data.reranking import RerankReader, as_chat_template, prompt_of
from deltaw.data.retrieval import TextGroup
from deltaw.data.row_reader import RunData
from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from deltaw.hub.loading import has_values, read_config
from deltaw.hub.sentence_layout import write_cross_encoder
from deltaw.machine.choices import Choice
from deltaw.task_settings import RerankingSettings
from deltaw.training.evaluation.base import Evaluation, mean_interval
from deltaw.training.evaluation.retrieval import MAIN, retrieval_evaluation
from deltaw.training.microbatches import AnyBatcher, AnyObjective
from deltaw.training.ranking_losses import UNITS, Name, loss_of_queries
from deltaw.training.tasks.base import Batched, Classes, ModelFiles, Named, Predictions, Rows
from deltaw.training.tasks.labels import (
    LabelObjective,
    LabelTask,
    check_one_output,
    own_outputs,
    predicted,
    text_positions,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEADS = ("lm_head.weight", "model.lm_head.weight", "output.weight", "embed_out.weight")
_ASKS = "Query: {query}\n\nPassage: {passage}\n\nDoes the passage answer the query? Answer yes or no."
# Templates that write the date get always the same one, since a score should not depend on the day.
_DATE = "2024-07-26"


class RerankingObjective(LabelObjective):
    """Sum of a batch's losses over queries.

    Args:
        model: with a head of one output. settings: of the task. loss: that the rows have, which is not ``auto``.

    Raises:
        UserError: the head has more outputs, or the output for a row depends on padding.
    """

    def __init__(self, model: PreTrainedModel, settings: RerankingSettings, loss: Name) -> None:
        check_one_output(model.config.num_labels, "reranker")
        super().__init__(model, "regression")
        self.loss = loss
        self._low, high = settings.score_range
        self._width = high - self._low

    def __call__(self, batch: LabelBatch) -> Tensor:
        return self.of_scores(self.predictions(batch), batch.targets, batch.sizes)

    def of_scores(self, scores: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
        """The sum of losses, a scalar.

        Args:
            scores, labels: (passages,), a query's one after the other. sizes: passages of each query.
        """
        labels = labels.to(scores.dtype)
        return loss_of_queries(self.loss, scores, self.graded(labels) if self.loss == "binary" else labels, sizes)

    def graded(self, labels: Tensor) -> Tensor:
        """Labels from 0 to 1."""
        return (labels - self._low) / self._width

    def units(self, rows: Rows) -> int:
        """Passages, pairs of passages, or queries."""
        return sum(UNITS[self.loss](labels_of(item)) for item in rows)


def labels_of(item: TextGroup) -> list[float]:
    """Of each passage of a row."""
    return [cast(LabeledExample, row).label for row in item.rows]


@dataclass(eq=False)
class RerankingTask(LabelTask):
    """Score the passages of a query.

    Args, beside those of every task with labels:
        settings: the ``reranking:`` section. folder: of the model.
        answers: whether the model is a language model, which gets its head from the answers yes and no.

    Attributes:
        loss: of the rows that were read first. max_length: tokens of a row at most.
    """

    settings: RerankingSettings = field(default_factory=RerankingSettings)
    folder: Path = Path()
    answers: bool = False
    loss: Name | None = None
    max_length: int | None = None

    @classmethod
    def open(cls, name: str, files: ModelFiles) -> RerankingTask:
        settings = files.section or RerankingSettings()
        made_for = str((getattr(files.config, "architectures", None) or [""])[0])
        answers = made_for.endswith(("ForCausalLM", "LMHeadModel"))
        tokenizer = files.tokenizer()
        if settings.template is not None or (answers and prompt_of(tokenizer) is None):
            tokenizer = copy.copy(tokenizer)
            prompt = _question(tokenizer) if settings.template is None else _begun(tokenizer, settings.template)
            tokenizer.chat_template = as_chat_template(prompt)
        config = read_config(files.folder, "sequence-classification", None, files.trust_remote_code)
        known: dict[str, Any] = {"settings": settings, "folder": files.folder, "answers": answers}
        return cls(name, tokenizer, None, None, own_outputs(config), files.reference, **known)

    def reader(self, settings: DataSettings, classes: Classes = None, **how: Any) -> RerankReader:  # type: ignore[override]
        self.max_length = settings.max_length
        how |= {"loss": self.loss or self.settings.loss, "score_range": self.settings.score_range}
        return RerankReader(settings, self.tokenizer, **how)

    def input_reader(self, settings: DataSettings, columns: Sequence[str], classes: Classes) -> RerankReader:
        return self.reader(settings, labeled=False)

    def predict(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes) -> Predictions:
        """The logistic of each passage's score; of a row with several passages also their places, the best first."""
        found = predicted(objective, rows, batcher).astype(np.float64)  # type: ignore[arg-type]
        scores, ranking = [], []
        for part in np.split(found, np.cumsum([len(row.rows) for row in rows])[:-1]):
            chances = (1 / (1 + np.exp(-part))).tolist()
            several = len(part) > 1
            scores.append(chances if several else chances[0])
            ranking.append(np.argsort(-part, kind="stable").tolist() if several else None)
        return scores, ranking

    def read(self, settings: DataSettings, *, seed: int) -> RunData:
        if self.own_outputs is not None:
            check_one_output(self.own_outputs, "reranker", self.model)
        reader = self.reader(settings)
        data = reader.prepared(seed)
        self.loss = cast(Name, reader.loss)
        return data

    def read_file(self, reference: str, settings: DataSettings, classes: Classes) -> tuple[Sequence[Any], Report]:
        reader = self.reader(replace(settings, train=reference))
        found = reader.file(reference)
        self.loss = cast(Name, reader.loss)
        return found

    def outputs(self, data: RunData) -> int:
        return 1

    def batcher(self, model: PreTrainedModel, examples: Rows, **how: Any) -> Batched:
        batcher, chosen = super().batcher(model, examples, **how)
        why = "by the rows" if self.settings.loss == "auto" else "as asked"
        return batcher, {**chosen, "reranking.loss": Choice(self.loss or self.settings.loss, why)}

    def trained(self, named: Named, rows: Rows) -> Named:
        """A bias of one number drops out of differences of scores."""
        return named if self.loss == "binary" else [one for one in named if one[1].numel() > 1]

    def objective(self, model: PreTrainedModel) -> RerankingObjective:
        return RerankingObjective(model, self.settings, self.loss or "binary")

    def initialize_head(self, model: PreTrainedModel, new_modules: Sequence[str], rows: Rows) -> None:
        """The head of a language model scores as its answers do.

        Raises:
            UserError: an answer is not one token.
        """
        heads = [model.get_submodule(name) for name in new_modules]
        heads = [head for head in heads if getattr(head, "out_features", None) == 1]
        if not (self.answers and heads and has_values(model)):
            return
        yes, no = (self._token(name) for name in ("yes", "no"))
        with torch.no_grad():
            of_yes, of_no = _output_rows(model, self.folder, [yes, no]).float()
            heads[-1].weight.copy_((of_yes - of_no)[None])  # type: ignore[union-attr, operator]

    def _token(self, name: str) -> int:
        answer = getattr(self.settings, name)
        assert self.tokenizer is not None  # texts are not read without one
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            hint = "write another word; a space at its beginning counts"
            raise UserError(f"the answer {answer!r} is {len(ids)} tokens", where=f"reranking.{name}", hint=hint)
        return int(ids[0])

    def write_beside(self, model: PreTrainedModel, folder: Path) -> None:
        assert self.tokenizer is not None
        pad, in_prompt = self.tokenizer.pad_token_id, prompt_of(self.tokenizer) is not None
        limits = [limit for limit in (self.max_length, text_positions(model)) if limit is not None]
        pad_id, most = pad if isinstance(pad, int) else None, min(limits, default=None)
        write_cross_encoder(folder, most, in_prompt=in_prompt, pad_id=pad_id)

    def evaluate(self, objective: AnyObjective, rows: Rows, batcher: AnyBatcher, classes: Classes = None) -> Evaluation:
        return evaluate_scores(objective, rows, batcher)  # type: ignore[arg-type]


def _question(tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt of a language model that was not made for this: a question, in its chat template if it has one."""
    template = tokenizer.chat_template
    if isinstance(template, str):
        messages = [{"role": "user", "content": _ASKS}]
        variables = {**tokenizer.special_tokens_map, "enable_thinking": False}
        try:
            return rendered(with_date(template, _DATE), messages, generation=True, variables=variables)
        except FAULTS as error:
            what = f"the model's chat template cannot be used: {error}"
            raise UserError(what, where="model", hint="write reranking.template") from error
    return _begun(tokenizer, f"{_ASKS}\n")


def _begun(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt after the token with which the tokenizer begins every text, if there is one."""
    start, ids = tokenizer.bos_token, tokenizer("")["input_ids"]
    begins = isinstance(start, str) and ids[:1] == [tokenizer.bos_token_id] and not prompt.startswith(start)
    return f"{start}{prompt}" if begins else prompt


def _output_rows(model: PreTrainedModel, folder: Path, tokens: Sequence[int]) -> Tensor:
    """(tokens, width) a language model's output layer; its input embeddings where these are the same."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                if found := [name for name in _HEADS if name in file.keys()]:  # noqa: SIM118
                    rows = file.get_slice(found[0])
                    return torch.cat([rows[token : token + 1] for token in tokens])
    return model.get_input_embeddings().weight[list(tokens)]  # type: ignore[index, no-any-return]


def evaluate_scores(objective: RerankingObjective, rows: Sequence[TextGroup], batcher: AnyBatcher) -> Evaluation:
    """The mean loss; of queries whose passages, in all rows with the query, differ in their labels, nDCG@10, MRR@10 and
    the share of pairs in the right order; else the share of passages whose score is on the right side of 0.

    Of equal scores the wrong passage comes first.

    Raises:
        UserError: a score is not finite.
    """
    scores = predicted(objective, rows, batcher).astype(np.float64)  # type: ignore[arg-type]
    labels = np.array([label for item in rows for label in labels_of(item)])
    sizes = [len(item.rows) for item in rows]
    told = torch.from_numpy(scores), torch.from_numpy(labels)
    metrics = {"loss": float(objective.of_scores(*told, sizes)) / objective.units(rows)}
    grades = objective.graded(told[1]).numpy()
    of_query: dict[bytes, list[int]] = defaultdict(list)
    for place, query in enumerate(item.group for item in rows for _ in item.rows):
        of_query[query].append(place)
    queries = [np.array(places) for places in of_query.values() if np.ptp(grades[places]) > 0]
    if not queries:
        right = ((scores > 0) == (grades > 0.5)).astype(np.float64)
        return Evaluation.of_rows({**metrics, "accuracy": float(right.mean())}, "accuracy", right)
    ranked = [places[np.lexsort((grades[places], -scores[places]))] for places in queries]
    table = np.full((len(queries), max(map(len, ranked))), -1)
    for row, places in zip(table, ranked, strict=True):
        row[: len(places)] = places
    found = retrieval_evaluation(table, [dict(zip(p.tolist(), grades[p].tolist(), strict=True)) for p in queries])
    pairs = np.array([_in_order(scores[places], grades[places]) for places in queries])
    metrics |= {name: found.metrics[name] for name in (MAIN, "mrr@10")} | {"pair_accuracy": float(pairs.mean())}
    bounds = {"mrr@10": found.intervals.get("mrr@10"), "pair_accuracy": mean_interval(pairs)}
    intervals = {name: (bound[0], min(1.0, bound[1])) for name, bound in bounds.items() if bound is not None}
    return Evaluation(metrics, MAIN, per_row=found.per_row, interval=found.interval, intervals=intervals)


def _in_order(scores: np.ndarray, grades: np.ndarray) -> float:
    """The share of pairs of passages with different grades whose scores are in their order; equal ones count half."""
    better = grades[:, None] > grades
    return float((np.sign(scores[:, None] - scores)[better] / 2 + 0.5).mean())
