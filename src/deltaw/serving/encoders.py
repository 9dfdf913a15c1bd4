"""Models that read text and write none: vectors of encoders, and classes of classifiers with their adapters.

Rows of all callers that are waiting go through a model together, padded, by one thread: models are not made
for several. A classifier's adapters each have a model of their own whose frozen weights are the same tensors.
Knows tokens and models; not HTTP.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.label_batches import LabelBatch
from deltaw.data.labels import LabeledExample
from deltaw.errors import UserError, did_you_mean
from deltaw.runtime.padded import padded_rows
from deltaw.serving.pooling import Pooling, pooled
from deltaw.training.inference import InferenceSession
from deltaw.training.tasks.label_batcher import choose_label_batcher, text_positions
from deltaw.training.tasks.label_objective import LabelObjective

# Rows that are taken together; more wait for the next round, so that a long request does not hold up others.
ROWS_AT_ONCE = 256


class RowModel(Protocol):
    """A model that gives each row of tokens a vector of fp32 numbers."""

    @property
    def limit(self) -> int | None:
        """The most tokens of a row."""

    @property
    def vocabulary(self) -> int:
        """Token ids are below it."""

    def tokens(self, text: str) -> np.ndarray:
        """A text as the model reads it, special tokens included: int32 (length,)."""

    def outputs(self, rows: Sequence[np.ndarray]) -> Tensor:
        """(rows, width) fp32."""


class Embedder:
    """Vectors of texts by an encoder.

    Args:
        model: without a head. tokenizer: its own.
        pooling: how the vectors of a row's tokens become one.
        normalize: scale each vector to length 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: Pooling = "mean",
        normalize: bool = True,
    ) -> None:
        config = model.config
        self._model = model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model
        self._tokenizer = tokenizer
        self._pooling = pooling
        self._normalize = normalize
        self.limit = text_positions(model)
        self.vocabulary = int(config.get_text_config().vocab_size)
        self.width = int(config.get_text_config().hidden_size)
        # Lengths at which a vector's beginning is one too (Matryoshka training, arXiv 2205.13147).
        told = getattr(config, "matryoshka_dimensions", None)
        self.nested: tuple[int, ...] = tuple(told or ())

    def tokens(self, text: str) -> np.ndarray:
        return _tokens(self._tokenizer, text)

    def outputs(self, rows: Sequence[np.ndarray]) -> Tensor:
        vectors = torch.empty(len(rows), self.width)
        for batch in _batches(self._model, self._tokenizer, rows):
            hidden = self._model(**batch.inputs).last_hidden_state
            found = pooled(hidden.float(), batch.inputs["attention_mask"], self._pooling)
            vectors[[example.row for example in batch.examples]] = found.cpu()
        return torch.nn.functional.normalize(vectors, dim=-1) if self._normalize else vectors


class Classifier:
    """Probabilities of classes by one classifier, with or without an adapter.

    Raises:
        UserError: the model gives no classes of texts.
    """

    def __init__(self, session: InferenceSession) -> None:
        if session.task.name != "sequence-classification":
            raise UserError(
                f"this is a model for {session.task.name}, which gives no classes of texts",
                where=session.loaded.reference,
                hint="use deltaw eval",
            )
        self._session = session
        self.classes = session.classes or ()
        self.limit = text_positions(session.model)
        self.vocabulary = int(session.model.config.get_text_config().vocab_size)
        if self.limit is not None:
            self.limit -= session.virtual_tokens
        self._objective: LabelObjective | None = None

    def tokens(self, text: str) -> np.ndarray:
        return _tokens(self._session.tokenizer, text)

    def outputs(self, rows: Sequence[np.ndarray]) -> Tensor:
        session = self._session
        if self._objective is None:
            self._objective = LabelObjective(session.model, session.task.name)
        found = torch.empty(len(rows), len(self.classes))
        for batch in _batches(session.model, session.tokenizer, rows, session.example):
            logits = self._objective.predictions(batch).float()
            # One output is a reward, whose logistic is between 0 and 1.
            told = logits.softmax(-1) if logits.shape[-1] > 1 else logits.sigmoid()
            found[[example.row for example in batch.examples]] = told.cpu()
        return found


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    encoded = tokenizer(text, return_attention_mask=False, verbose=False)
    return np.asarray(encoded["input_ids"], dtype=np.int32)


def _batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[np.ndarray],
    seen: Callable[[Any], Any] = lambda example: example,
) -> Iterator[LabelBatch]:
    """Padded microbatches of rows, each row's number in its example; attention and blocks run compiled."""
    examples = [seen(LabeledExample(place, row, 0)) for place, row in enumerate(rows)]
    batcher, _ = choose_label_batcher(model, examples, device=str(model.device), tokenizer=tokenizer)
    with torch.no_grad(), padded_rows(model):
        yield from batcher.batches(examples)


@dataclass
class _Waiting:
    name: str
    rows: list[np.ndarray]
    answer: Future[Tensor] = field(default_factory=Future)


class Encoders:
    """Row models by name, computed by one thread.

    Args:
        models: by the name that requests give.
        most_rows: that may wait; more are refused.
    """

    def __init__(self, models: Mapping[str, RowModel], most_rows: int = 16_384) -> None:
        self.models = dict(models)
        self._most = most_rows
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="encoders", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        with self._changed:
            return sum(len(one.rows) for one in self._waiting)

    def model(self, name: str) -> RowModel:
        """The model of this name.

        Raises:
            UserError: there is none.
        """
        if name not in self.models:
            raise UserError(f"there is no model '{name}'", hint=did_you_mean(name, self.models))
        return self.models[name]

    def submit(self, name: str, rows: Sequence[np.ndarray]) -> Future[Tensor] | None:
        """Queue rows; the future's result is (rows, width) fp32. None where too many are waiting.

        Raises:
            UserError: a row is empty, too long, or has tokens that the model does not know.
        """
        model = self.model(name)
        for place, row in enumerate(rows):
            if not len(row) or (model.limit is not None and len(row) > model.limit):
                most = "at least one" if not len(row) else f"at most {model.limit:,}"
                raise UserError(
                    f"a text has {len(row):,} tokens, and must have {most}", where=f"input {place}"
                )
            if int(row.max()) >= model.vocabulary:
                raise UserError(f"there is no token {int(row.max())}", where=f"input {place}")
        one = _Waiting(name, list(rows))
        with self._changed:
            if self._closed or sum(len(w.rows) for w in self._waiting) + len(rows) > self._most:
                return None
            self._waiting.append(one)
            self._changed.notify()
        return one.answer

    def close(self) -> None:
        """Answer what waits, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (round_ := self._next()) is not None:
            name = round_[0].name
            rows = [row for one in round_ for row in one.rows]
            try:
                found = self.models[name].outputs(rows)
            except Exception as error:  # told to those who asked
                for one in round_:
                    one.answer.set_exception(error)
                continue
            place = 0
            for one in round_:
                one.answer.set_result(found[place : place + len(one.rows)])
                place += len(one.rows)

    def _next(self) -> list[_Waiting] | None:
        """The longest waiting request and others for its model, as many as go together; None at the end."""
        with self._changed:
            while True:
                while self._waiting and not self._waiting[0].answer.set_running_or_notify_cancel():
                    self._waiting.popleft()  # whoever asked went away
                if self._waiting:
                    break
                if self._closed:
                    return None
                self._changed.wait()
            taken = [self._waiting.popleft()]
            rows = len(taken[0].rows)
            for one in list(self._waiting):
                if one.name == taken[0].name and rows + len(one.rows) <= ROWS_AT_ONCE:
                    self._waiting.remove(one)
                    if one.answer.set_running_or_notify_cancel():
                        taken.append(one)
                        rows += len(one.rows)
            return taken


def share_weights(models: Sequence[PreTrainedModel]) -> int:
    """Let later models use the first one's tensors where theirs are equal to the bit.

    Returns:
        bytes that are held once instead of several times.
    """
    first = dict(models[0].named_parameters()) | dict(models[0].named_buffers())
    saved = 0
    for model in models[1:]:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            kept = first.get(name)
            if (
                kept is not None
                and kept is not tensor
                and not tensor.requires_grad
                and kept.dtype == tensor.dtype
                and kept.shape == tensor.shape
                and torch.equal(kept, tensor)
            ):
                saved += tensor.untyped_storage().nbytes()
                tensor.data = kept.data
    return saved
