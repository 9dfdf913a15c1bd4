"""Models that read text and write none: encoders' vectors, and classes or scores of classifiers with their adapters.

Rows of all callers that are waiting go through a model together, padded, by one thread: models are not made
for several. A classifier's adapters each have a model of their own whose frozen weights are the same tensors.
Knows tokens and models; not HTTP.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaw import tasks
from deltaw.data.example import LabeledExample
from deltaw.data.images import LabelBatch
from deltaw.data.report import quoted
from deltaw.data.reranking import PairEncoder
from deltaw.errors import UserError
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import load, read_config
from deltaw.hub.sentence_layout import SentenceLayout, pooling_named, read_layout, told_use
from deltaw.machine.choices import choose_device, choose_precision
from deltaw.runtime.packed import padded_rows
from deltaw.settings import DEFAULT_TASK
from deltaw.training.callbacks import Say
from deltaw.training.embedding.pooling import layout_of, vectors_of
from deltaw.training.origin import InferenceSession, is_adapter, open_run, read_folder
from deltaw.training.tasks.embedding import EmbeddingTask
from deltaw.training.tasks.labels import LabelObjective, choose_label_batcher, own_outputs, text_positions

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Rows that are taken together; more wait for the next round, so that a long request does not hold up others.
ROWS_AT_ONCE = 256


# Tokens, with what else a model reads of a pair of texts.
Row: TypeAlias = "np.ndarray | LabeledExample"


class RowModel:
    """A model that gives each row of tokens a vector of fp32 numbers.

    Attributes:
        limit: the most tokens of a row; None where there is no limit. vocabulary: token ids are below it.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, width: int) -> None:
        self.limit = text_positions(model)
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self._model, self._tokenizer, self.width = model, tokenizer, width

    def tokens(self, text: str) -> np.ndarray:
        """A text as the model reads it, special tokens included: int32 (length,)."""
        encoded = self._tokenizer(text, return_attention_mask=False, verbose=False)
        return np.asarray(encoded["input_ids"], dtype=np.int32)

    def outputs(self, rows: Sequence[Row]) -> Tensor:
        """(rows, width) fp32, by padded microbatches whose attention and blocks run compiled."""
        whole = [row if isinstance(row, LabeledExample) else LabeledExample(0, row, 0) for row in rows]
        examples = [self.seen(replace(row, row=place)) for place, row in enumerate(whole)]
        model, tokenizer = self._model, self._tokenizer
        batcher, _ = choose_label_batcher(model, examples, device=str(model.device), tokenizer=tokenizer)
        found = torch.empty(len(rows), self.width)
        with torch.no_grad(), padded_rows(model):
            for batch in batcher.batches(examples):
                found[[example.row for example in batch.examples]] = self.of_batch(batch).cpu()
        return found

    def seen(self, example: LabeledExample) -> Any:
        """The example as the model sees it."""
        return example

    def of_batch(self, batch: LabelBatch) -> Tensor:
        """The outputs of a batch, in fp32."""
        raise NotImplementedError


class Embedder(RowModel):
    """Vectors of texts.

    Args:
        model: without a head. tokenizer: its own. layout: how it embeds a text.

    Attributes:
        nested: lengths at which a vector's beginning is one too (Matryoshka training, arXiv 2205.13147).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layout: SentenceLayout,
        nested: Sequence[int] = (),
    ) -> None:
        config = model.config
        super().__init__(model, tokenizer, int(config.get_text_config().hidden_size))
        self.layout = layout
        self.nested = tuple(nested or getattr(config, "matryoshka_dimensions", None) or ())

    def tokens(self, text: str) -> np.ndarray:
        """A text as the model reads it, truncated where the model's folder says so, as sentence-transformers does."""
        return self._cut(text, self.layout.max_length)[0]

    def vectors(self, texts: Sequence[str]) -> tuple[Tensor, int]:
        """(texts, width) fp32, and how many texts were truncated to the model's limit or to its folder's.

        Raises:
            UserError: a text has no tokens.
        """
        limits = [limit for limit in (self.limit, self.layout.max_length) if limit is not None]
        rows, cut = [], 0
        for text in texts:
            row, was_cut = self._cut(text, min(limits, default=None))
            if not len(row):
                raise UserError("the model's tokenizer reads no token in a text", where=quoted(text, 40))
            rows.append(row)
            cut += was_cut
        return self.outputs(rows), cut

    def _cut(self, text: str, limit: int | None) -> tuple[np.ndarray, bool]:
        """A text's tokens, at most ``limit``, and whether it has more."""
        row = super().tokens(text)
        if limit is None or len(row) <= limit:
            return row, False
        how: Any = {"truncation": True, "max_length": limit, "return_attention_mask": False}
        return np.asarray(self._tokenizer(text, **how)["input_ids"], np.int32), True

    def of_batch(self, batch: LabelBatch) -> Tensor:
        vectors = vectors_of(self._model, batch, self.layout.pooling or "mean")[1].float()
        return torch.nn.functional.normalize(vectors, dim=-1) if self.layout.normalize else vectors


class OfSession(RowModel):
    """What a model with a head gives, with or without an adapter.

    Attributes:
        task: of the models that it takes. gives: what these give.

    Raises:
        UserError: the model is for another task.
    """

    task, gives = "", ""

    def __init__(self, session: InferenceSession, width: int) -> None:
        name = session.task.name
        if name != self.task:
            what = f"this is a model for {name}, which gives no {self.gives}"
            raise UserError(what, where=session.loaded.reference, hint="use deltaw eval")
        super().__init__(session.model, session.tokenizer, width)
        if self.limit is not None:
            self.limit -= session.virtual_tokens
        self._session = session

    @functools.cached_property
    def _objective(self) -> LabelObjective:
        return self._session.task.objective(self._model)  # type: ignore[return-value]

    def seen(self, example: LabeledExample) -> Any:
        return self._session.example(example)


class Classifier(OfSession):
    """Probabilities of classes by one classifier."""

    task, gives = "sequence-classification", "classes of texts"

    def __init__(self, session: InferenceSession) -> None:
        self.classes = session.classes or ()
        super().__init__(session, len(self.classes))

    def of_batch(self, batch: LabelBatch) -> Tensor:
        logits = self._objective.predictions(batch).float()
        # One output is a reward, whose logistic is between 0 and 1.
        return logits.softmax(-1) if logits.shape[-1] > 1 else logits.sigmoid()


class Reranker(OfSession):
    """Scores of passages between 0 and 1, the logistic of what a reranker gives."""

    task, gives = "reranking", "scores of passages"

    def __init__(self, session: InferenceSession) -> None:
        super().__init__(session, 1)
        self._encode = PairEncoder(session.tokenizer)

    def pair(self, query: str, passage: str) -> LabeledExample:
        """A query and a passage as the model reads them."""
        ((ids, segments),) = self._encode([(query, passage)])
        return LabeledExample(0, ids, 0, segments)

    def of_batch(self, batch: LabelBatch) -> Tensor:
        return self._objective.predictions(batch).float().sigmoid()[:, None]


@dataclass
class _Waiting:
    name: str
    rows: list[Row]
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

    def submit(self, name: str, rows: Sequence[Row]) -> Future[Tensor] | None:
        """Queue rows; the future's result is (rows, width) fp32. None where too many are waiting.

        Raises:
            UserError: a row is empty, too long, or has tokens that the model does not know.
        """
        model = self.models[name]
        for place, row in enumerate(rows):
            if not len(row) or (model.limit is not None and len(row) > model.limit):
                most = "at least one" if not len(row) else f"at most {model.limit:,}"
                raise UserError(f"a text has {len(row):,} tokens, and must have {most}", where=f"input {place}")
            most_id = int((row if isinstance(row, np.ndarray) else row.tokens).max())
            if most_id >= model.vocabulary:
                raise UserError(f"there is no token {most_id}", where=f"input {place}")
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
            for one, part in zip(round_, found.split([len(one.rows) for one in round_]), strict=True):
                one.answer.set_result(part)

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
            if kept is None or kept is tensor or tensor.requires_grad or kept.dtype != tensor.dtype:
                continue
            if kept.shape == tensor.shape and torch.equal(kept, tensor):
                saved += tensor.untyped_storage().nbytes()
                tensor.data = kept.data
    return saved


Serves = Literal["text", "vectors", "classes", "scores"]
_SERVES: Mapping[str, Serves] = {EmbeddingTask.name: "vectors", Reranker.task: "scores"}


class How(TypedDict, total=False):
    """How a model is loaded."""

    precision: str
    device: str
    trust_remote_code: bool


def what_it_serves(reference: str, **how: Unpack[How]) -> Serves:
    """What a run or a model gives: text, vectors of texts, classes of texts, or scores of passages.

    A run and an adapter say it by their task, a model by sentence-transformers' files in its folder, or else by the
    name of its architecture: what has no head, or a head for filling in masked words, gives vectors.
    """
    folder = Path(reference)
    if is_adapter(folder):
        task = read_folder(folder, trust_remote_code=how.get("trust_remote_code", False)).task
        if (serves := _SERVES.get(task)) is not None:
            return serves
        return "text" if tasks.entry_of(task).writes_text else "classes"
    if (told := told_use(_folder(reference, **how))) is not None:
        return told
    config = _config(reference, **how)
    named = str((getattr(config, "architectures", None) or [""])[0])
    if named.endswith("ForSequenceClassification"):
        return "classes"
    return "vectors" if named.endswith(("Model", "ForMaskedLM", "ForPreTraining")) else "text"


def read_embedder(
    reference: str, *, pooling: str = "auto", normalize: bool = True, say: Say, **how: Unpack[How]
) -> Embedder:
    """An encoder of texts.

    Raises:
        UserError: it has no tokenizer, is an adapter for another task, or is a decoder and no pooling is asked for.
    """
    if is_adapter(folder := Path(reference)):
        session = open_run(reference, say=say, **how)
        model, tokenizer, task = session.model, session.tokenizer, session.task
        if not isinstance(task, EmbeddingTask):
            hint, what = "name the model that embeds texts", "which gives no vectors of texts"
            raise UserError(f"this adapter is for {task.name}, {what}", where=str(folder), hint=hint)
        layout, why, nested = task.layout(model), "as it was trained", task.settings.dimensions
        if (saved := read_layout(folder)) is not None:
            layout = replace(layout, max_length=saved.max_length)
        if pooling != "auto":
            layout, why = replace(layout, pooling=pooling_named(pooling)), "as asked"
        layout = layout if normalize else replace(layout, normalize=False)
    else:
        loaded = load(reference, task="features", say=say, **how)
        if loaded.tokenizer is None:
            raise UserError("the model's folder holds no tokenizer", where=reference)
        model, tokenizer, nested = loaded.model, loaded.tokenizer, []
        layout, why = layout_of(model, loaded.folder, pooling=pooling, normalize="auto" if normalize else False)
    length = "of length 1" if layout.normalize else "not normalized"
    say(f"vectors: {layout.pooling} of a row's tokens ({why}), {length}")
    return Embedder(model, tokenizer, layout, nested)


def open_embedder(
    reference: str, name: str, *, pooling: str = "auto", normalize: bool = True, say: Say, **how: Unpack[How]
) -> Encoders:
    """An encoder under its name, as :func:`read_embedder` reads it."""
    return Encoders({name: read_embedder(reference, pooling=pooling, normalize=normalize, say=say, **how)})


def open_classifiers(
    base: str, name: str, adapters: Mapping[str, str], *, model: str | None = None, say: Say, **how: Unpack[How]
) -> Encoders:
    """A classifier or a reranker and its adapters, each under its name.

    Args:
        base: a model or a run; a run's adapter is called ``name``, or as in ``adapters``.
        adapters: folders by name, all for this base model.
        model: the base model, where a run's folder does not name it.

    Raises:
        UserError: nothing of it classifies texts: a model without a head needs an adapter that brings one; or an
            adapter is for another task than the run.
    """
    is_run = is_adapter(Path(base))
    folders = {name: base, **adapters} if is_run else dict(adapters)
    model = model if is_run else base
    models: dict[str, RowModel] = {}
    opened = {name: open_run(folder, model=model, say=say, **how) for name, folder in folders.items()}
    scores = opened[name].task.name == Reranker.task if is_run else told_use(_folder(base, **how)) == "scores"
    for adapter, session in opened.items():
        models[adapter] = Reranker(session) if scores else Classifier(session)
        say(f"{adapter}: {'scores of passages' if scores else ', '.join(session.classes or ())}")
    if not is_run and own_outputs(_config(base, **how)) is not None:
        opened[name] = open_run(base, task=Reranker.task if scores else Classifier.task, say=say, **how)
        models[name] = Reranker(opened[name]) if scores else Classifier(opened[name])
    if not models:
        hint = "name an adapter with --adapter name=folder"
        raise UserError("the model has no head for classes", where=base, hint=hint)
    if saved := share_weights([session.model for session in opened.values()]):
        say(f"{len(opened)} classifiers share {saved / 2**20:,.0f} MB of weights")
    return Encoders(models)


def _config(reference: str, **how: Unpack[How]) -> PretrainedConfig:
    return read_config(_folder(reference, **how), DEFAULT_TASK, None, how.get("trust_remote_code", False))


def _folder(reference: str, **how: Unpack[How]) -> Path:
    dtype = choose_precision(choose_device(how.get("device", "auto")).value, how.get("precision", "auto")).value
    return config_folder(reference, dtype, how.get("trust_remote_code", False))
