"""Models that read text without generating it: embedding models, classifiers and rerankers with their adapters.

One thread per server runs the models, because models are not thread-safe. It batches and pads the rows of concurrent
requests. Each adapter of a classifier has a separate model that shares the frozen weights.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.example import LabeledExample
from deltaw.data.packing import MicroBatch
from deltaw.data.report import quoted
from deltaw.errors import UserError
from deltaw.hub.empty_models import head_outputs, read_config
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import load
from deltaw.hub.sentence_layout import SentenceLayout, detect_use, parse_pooling, read_layout
from deltaw.inference.open_run import open_run
from deltaw.inference.opened_run import OpenedRun
from deltaw.inference.pooling import choose_layout, vectors_of
from deltaw.machine.choices import choose_device, choose_precision
from deltaw.methods.trust import is_adapter, read_folder
from deltaw.progress import LogFunction
from deltaw.runtime.padded import padded_rows
from deltaw.settings import task_registry
from deltaw.training.batchers import BatcherOptions, choose_label_batcher, text_positions

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Maximum number of rows of concurrent requests per round, so that a large request does not delay others.
MAX_BATCH_ROWS = 256


# Token ids, or a text pair with its segments.
Row: TypeAlias = "np.ndarray | LabeledExample"
OutputKind = Literal["text", "vectors", "classes", "numbers", "scores"]


class RowModel:
    """Model that computes an fp32 vector for each row of tokens.

    Attributes:
        limit: Maximum number of tokens of a row, or None.
        vocabulary: Number of token ids.
        width: Length of the output vector.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, width: int) -> None:
        self.limit = text_positions(model)
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self._model = model
        self._tokenizer = tokenizer
        self.width = width

    def tokens(self, text: str) -> np.ndarray:
        """Return the (length,) int32 token ids of a text, including special tokens."""
        return np.asarray(self._tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"], np.int32)

    def outputs(self, rows: Sequence[Row]) -> Tensor:
        """Return (rows, width) fp32 outputs, computed in padded microbatches with compiled attention and blocks."""
        labeled = [row if isinstance(row, LabeledExample) else LabeledExample(0, row, 0) for row in rows]
        examples = [self.prepare(replace(row, row=index)) for index, row in enumerate(labeled)]
        model = self._model
        tokenizer = self._tokenizer
        batcher, _ = choose_label_batcher(model, examples, BatcherOptions(str(model.device)), tokenizer)
        outputs = torch.empty(len(rows), self.width)
        with torch.no_grad(), padded_rows(model):
            for batch in batcher.batches(examples):
                outputs[[example.row for example in batch.examples]] = self.batch_outputs(batch).cpu()
        return outputs

    def prepare(self, example: LabeledExample) -> Any:
        """Convert an example to the model's input."""
        return example

    def batch_outputs(self, batch: MicroBatch) -> Tensor:
        """Return the fp32 outputs of a batch."""
        raise NotImplementedError


class Embedder(RowModel):
    """Embedding model.

    Args:
        model: Model without a head.
        tokenizer: Its tokenizer.
        layout: Pooling, normalization and prompts.
        nested: Lengths to which vectors may be truncated (Matryoshka training, arXiv 2205.13147). By default those of
            the model's configuration.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layout: SentenceLayout, nested: Sequence[int]
    ) -> None:
        super().__init__(model, tokenizer, int(model.config.get_text_config().hidden_size))
        self.layout = layout
        self.nested = tuple(nested or getattr(model.config, "matryoshka_dimensions", None) or ())

    def tokens(self, text: str) -> np.ndarray:
        """Return the (length,) int32 token ids of a text, truncated to the maximum length of the model's folder."""
        return self._truncate(text, self.layout.max_length)[0]

    def vectors(self, texts: Sequence[str]) -> tuple[Tensor, int]:
        """Return (texts, width) fp32 vectors, and the number of texts that were truncated.

        Raises:
            UserError: if a text has no tokens.
        """
        limits = [limit for limit in (self.limit, self.layout.max_length) if limit is not None]
        rows = []
        num_truncated = 0
        for text in texts:
            row, truncated = self._truncate(text, min(limits, default=None))
            if not len(row):
                raise UserError("a text has no tokens", location=quoted(text, 40))
            rows.append(row)
            num_truncated += truncated
        return self.outputs(rows), num_truncated

    def _truncate(self, text: str, limit: int | None) -> tuple[np.ndarray, bool]:
        """Return at most ``limit`` tokens of a text, and True if it was truncated."""
        row = super().tokens(text)
        if limit is None or len(row) <= limit:
            return row, False
        options: Any = {"truncation": True, "max_length": limit, "return_attention_mask": False}
        return np.asarray(self._tokenizer(text, **options)["input_ids"], np.int32), True

    def batch_outputs(self, batch: MicroBatch) -> Tensor:
        vectors = vectors_of(self._model, batch, self.layout.pooling or "mean").float()
        return torch.nn.functional.normalize(vectors, dim=-1) if self.layout.normalize else vectors


class SessionHead(RowModel):
    """Outputs of a model with a head, with or without an adapter.

    Attributes:
        kind: Outputs of supported models.
        output_name: Description of the outputs, for messages.

    Raises:
        UserError: if the model is for another task.
    """

    kind: OutputKind
    output_name = ""

    def __init__(self, session: OpenedRun, width: int) -> None:
        name = session.task.name
        if task_registry.entry_of(name).serves != self.kind:
            message = f"this is a model for {name}, which does not return {self.output_name}"
            raise UserError(message, location=session.loaded.reference, hint="use deltaw eval")
        super().__init__(session.model, session.tokenizer, width)
        if self.limit is not None:
            self.limit -= session.virtual_tokens
        self._session = session

    @functools.cached_property
    def _objective(self) -> Any:
        return self._session.task.objective(self._model)

    def prepare(self, example: LabeledExample) -> Any:
        return self._session.example(example)


class Classifier(SessionHead):
    """Class probabilities of one classifier."""

    kind = "classes"
    output_name = "classes of texts"

    def __init__(self, session: OpenedRun) -> None:
        self.classes = session.classes or ()
        super().__init__(session, len(self.classes))

    def batch_outputs(self, batch: MicroBatch) -> Tensor:
        logits = self._objective.predictions(batch).float()
        # A single output is a reward. Its sigmoid is between 0 and 1.
        return logits.softmax(-1) if logits.shape[-1] > 1 else logits.sigmoid()


class Reranker(SessionHead):
    """Relevance scores of passages between 0 and 1: the sigmoid of a reranker's output."""

    kind = "scores"
    output_name = "scores of passages"

    def __init__(self, session: OpenedRun) -> None:
        super().__init__(session, 1)

    def pair(self, query: str, passage: str) -> LabeledExample:
        """Encode a query and a passage."""
        return self._session.inference.encode_pair(query, passage)

    def batch_outputs(self, batch: MicroBatch) -> Tensor:
        return self._objective.predictions(batch).float().sigmoid()[:, None]


class Regressor(SessionHead):
    """Numbers of a regression, in the units of its labels."""

    kind = "numbers"
    output_name = "numbers"

    def __init__(self, session: OpenedRun) -> None:
        super().__init__(session, session.model.config.num_labels or 1)

    def batch_outputs(self, batch: MicroBatch) -> Tensor:
        return self._objective.predictions(batch).float().view(-1, self.width)


# Class of the models with a head, by their outputs.
_HEADS: dict[OutputKind, Callable[[OpenedRun], SessionHead]] = {
    "classes": Classifier,
    "numbers": Regressor,
    "scores": Reranker,
}


@dataclass
class _QueuedRows:
    name: str
    rows: list[Row]
    answer: Future[Tensor] = field(default_factory=Future)


class Encoders:
    """Row models by name, run by one thread.

    Args:
        models: Models by the names that requests use.
        max_rows: Maximum number of queued rows. Further requests are rejected.
    """

    def __init__(self, models: Mapping[str, RowModel], max_rows: int = 16_384) -> None:
        self.models = dict(models)
        self._max_rows = max_rows
        self._waiting: deque[_QueuedRows] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="encoders", daemon=True)
        self._thread.start()

    def submit(self, name: str, rows: Sequence[Row]) -> Future[Tensor] | None:
        """Queue rows. The future's result is (rows, width) in fp32.

        Returns:
            The future, or None if the queue is full.

        Raises:
            UserError: if a row is empty, too long or contains an unknown token.
        """
        model = self.models[name]
        for index, row in enumerate(rows):
            if not len(row) or (model.limit is not None and len(row) > model.limit):
                allowed = "at least one" if not len(row) else f"at most {model.limit:,}"
                raise UserError(f"a text has {len(row):,} tokens, and must have {allowed}", location=f"input {index}")
            max_id = int((row if isinstance(row, np.ndarray) else row.tokens).max())
            if max_id >= model.vocabulary:
                raise UserError(f"there is no token {max_id}", location=f"input {index}")
        request = _QueuedRows(name, list(rows))
        with self._changed:
            if self._closed or sum(len(w.rows) for w in self._waiting) + len(rows) > self._max_rows:
                return None
            self._waiting.append(request)
            self._changed.notify()
        return request.answer

    def close(self) -> None:
        """Process the queued requests, then stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (round_ := self._next_batch()) is not None:
            name = round_[0].name
            rows = [row for request in round_ for row in request.rows]
            try:
                outputs = self.models[name].outputs(rows)
            except Exception as error:
                for request in round_:
                    request.answer.set_exception(error)
                continue
            for request, part in zip(round_, outputs.split([len(request.rows) for request in round_]), strict=True):
                request.answer.set_result(part)

    def _next_batch(self) -> list[_QueuedRows] | None:
        """Wait for requests, and return the oldest with others for its model. None after :meth:`close`."""
        with self._changed:
            while True:
                while self._waiting and not self._waiting[0].answer.set_running_or_notify_cancel():
                    self._waiting.popleft()  # cancelled
                if self._waiting:
                    break
                if self._closed:
                    return None
                self._changed.wait()
            batch = [self._waiting.popleft()]
            rows = len(batch[0].rows)
            for request in list(self._waiting):
                if request.name == batch[0].name and rows + len(request.rows) <= MAX_BATCH_ROWS:
                    self._waiting.remove(request)
                    if request.answer.set_running_or_notify_cancel():
                        batch.append(request)
                        rows += len(request.rows)
            return batch


def share_weights(models: Sequence[PreTrainedModel]) -> int:
    """Replace tensors of later models by equal tensors of the first model.

    Returns:
        Number of bytes saved.
    """
    first = dict(models[0].named_parameters()) | dict(models[0].named_buffers())
    saved = 0
    for model in models[1:]:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            shared = first.get(name, tensor)
            can_share = shared is not tensor and not tensor.requires_grad and shared.dtype == tensor.dtype
            if can_share and shared.shape == tensor.shape and torch.equal(shared, tensor):
                saved += tensor.untyped_storage().nbytes()
                tensor.data = shared.data
    return saved


class EncoderOptions(TypedDict, total=False):
    """Options of loading a model."""

    precision: str
    device: str
    trust_remote_code: bool


def detect_output_kind(reference: str, **options: Unpack[EncoderOptions]) -> OutputKind:
    """Return the kind of outputs of a run or a model: text, vectors, classes, numbers or scores.

    Runs and adapters declare their task. A model is identified by the sentence-transformers files in its folder,
    otherwise by its architecture: models without a head, or with a head for masked words, return vectors.
    """
    folder = Path(reference)
    if is_adapter(folder):
        adapter_folder = read_folder(folder, trust_remote_code=options.get("trust_remote_code", False))
        return task_registry.entry_of(adapter_folder.task).output_kind or "classes"
    if (declared := detect_use(_folder(reference, **options))) is not None:
        return declared
    config = _config(reference, **options)
    architecture = str((getattr(config, "architectures", None) or [""])[0])
    if architecture.endswith("ForSequenceClassification"):
        problem = task_registry.entry_of(task_registry.task_serving("numbers")).config["problem_type"]
        return "numbers" if getattr(config, "problem_type", None) == problem else "classes"
    return "vectors" if architecture.endswith(("Model", "ForMaskedLM", "ForPreTraining")) else "text"


def read_embedder(
    source: str, *, pooling: str = "auto", normalize: bool = True, log: LogFunction, **options: Unpack[EncoderOptions]
) -> Embedder:
    """Load an embedding model.

    Raises:
        UserError: if it has no tokenizer, is an adapter for another task, or is a decoder without ``pooling``.
    """
    if is_adapter(folder := Path(source)):
        session = open_run(source, log=log, **options)
        model = session.model
        tokenizer = session.tokenizer
        task = session.task
        if task_registry.entry_of(task.name).serves != "vectors":
            hint = "specify an embedding model"
            reason_text = "which does not return vectors"
            raise UserError(f"this adapter is for {task.name}, {reason_text}", location=str(folder), hint=hint)
        layout = session.inference.layout(model)
        reason = "as it was trained"
        nested = session.inference.vector_lengths
        if (saved := read_layout(folder)) is not None:
            layout = replace(layout, max_length=saved.max_length)
        if pooling != "auto":
            layout = replace(layout, pooling=parse_pooling(pooling))
            reason = "as requested"
        layout = layout if normalize else replace(layout, normalize=False)
    else:
        loaded = load(source, task=task_registry.feature_task(), log=log, **options)
        if loaded.tokenizer is None:
            raise UserError("the model's folder has no tokenizer", location=source)
        model = loaded.model
        tokenizer = loaded.tokenizer
        nested = []
        nn.Module.to(model, str(loaded.choices["device"].value))  # not quantized
        layout, reason = choose_layout(model, loaded.folder, pooling=pooling, normalize="auto" if normalize else False)
    length = "of length 1" if layout.normalize else "not normalized"
    log(f"vectors: {layout.pooling} of a row's tokens ({reason}), {length}")
    return Embedder(model, tokenizer, layout, nested)


def open_classifiers(
    base: str,
    name: str,
    adapters: Mapping[str, str],
    *,
    model: str | None = None,
    log: LogFunction,
    **options: Unpack[EncoderOptions],
) -> Encoders:
    """Load a classifier or a reranker and its adapters, each under its name.

    Args:
        base: A model or a run. The adapter of a run is named ``name``.
        name: Name of the base model.
        adapters: Adapter folders of this base model, by name.
        model: Base model, if the folder of a run does not name it.
        log: Receives one line per model.

    Raises:
        UserError: if the model has no head for classes and no adapter with one, or an adapter is for another task.
    """
    is_run = is_adapter(Path(base))
    folders, model = ({name: base, **adapters}, model) if is_run else (dict(adapters), base)
    models: dict[str, RowModel] = {}
    opened = {name: open_run(folder, model=model, log=log, **options) for name, folder in folders.items()}
    kind = detect_output_kind(base, **options)
    kind = kind if kind in _HEADS else "classes"
    for adapter, session in opened.items():
        models[adapter] = head = _HEADS[kind](session)
        log(f"{adapter}: {', '.join(session.classes or (head.output_name,))}")
    if not is_run and head_outputs(_config(base, **options)) is not None:
        opened[name] = open_run(base, task=task_registry.task_serving(kind), log=log, **options)
        models[name] = _HEADS[kind](opened[name])
    if not models:
        raise UserError("the model has no head for classes", location=base, hint="add an --adapter name=folder")
    if saved := share_weights([session.model for session in opened.values()]):
        log(f"{len(opened)} classifiers share {saved / 2**20:,.0f} MB of weights")
    return Encoders(models)


def _config(reference: str, **options: Unpack[EncoderOptions]) -> PretrainedConfig:
    folder = _folder(reference, **options)
    trust = options.get("trust_remote_code", False)
    return read_config(folder, task_registry.default_task(), None, trust)


def _folder(reference: str, **options: Unpack[EncoderOptions]) -> Path:
    dtype = choose_precision(choose_device(options.get("device", "auto")).value, options.get("precision", "auto")).value
    return config_folder(reference, dtype, options.get("trust_remote_code", False))
