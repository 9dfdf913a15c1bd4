"""Predict rows without labels for any task: labels, numbers, scores, vectors or completions.

Rows are read, computed and written in chunks, in their order, so that memory does not grow with the number of rows.
Each row gives one record: its number, its columns, the predictions, and an error if it cannot be used. The numbers are
the same that an evaluation computes. Batches depend only on their chunk, so a resumed process writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaw.data.example import rows_of
from deltaw.data.formats import check_columns
from deltaw.data.pixels import image_rows
from deltaw.data.report import MAX_ROW_BYTES, BadRowError, BadRows
from deltaw.data.report import Progress as ProgressLines
from deltaw.data.row_stream import UnreadableRow, content_identity
from deltaw.data.rows import Rows
from deltaw.data.settings import DataSettings
from deltaw.data.sources import open_source, walk
from deltaw.errors import UserError
from deltaw.lora.fingerprint import base_fingerprint
from deltaw.serving.opening import open_engine
from deltaw.serving.prediction_file import PredictionFile, Progress, Record, json_lines
from deltaw.serving.request import Request
from deltaw.training.callbacks import Say
from deltaw.training.origin import InferenceSession
from deltaw.training.tasks.base import Predictions
from deltaw.training.tasks.labels import text_positions
from deltaw.working import working

# Rows of a chunk; fewer for completions, which take longer.
CHUNK_ROWS, COMPLETION_ROWS = 1024, 256
# Builds the request for the tokens of a prompt, the name of an adapter and the number of a row.
BuildRequest = Callable[..., Request]


class InputRows:
    """Rows of a reference in chunks, including rows that cannot be read.

    Args:
        images: Read a folder of images, or tables of pixels, which are loaded at once.
        limit: Number of rows to read, or None for all.
        max_bytes: The most bytes of a row in its file, or None for the default.

    Attributes:
        name: The reference. columns: Names of the columns.
        count: Number of rows. several: True if the rows are in several files.
    """

    def __init__(self, reference: str, *, images: bool, limit: int | None, max_bytes: int | None = None) -> None:
        self.name = reference
        max_bytes = max_bytes or MAX_ROW_BYTES
        self._images = image_rows(reference, max_bytes=max_bytes, labeled=False)[0] if images else None
        if self._images is not None:
            self.columns, count, self.several = self._images.columns, len(self._images), False
        else:
            self._stream = open_source(reference, lambda error, row: None, max_bytes=max_bytes)
            with working(f"reading {reference}"):
                self._stream.scan()
            self.columns, self.several = self._stream.columns, self._stream.files > 1
            count = self._stream.rows + self._stream.bad
        self.count = min(count, limit or count)

    def chunks(self, size: int) -> Iterator[tuple[Rows, range]]:
        """Yield rows with the indices of at most ``size`` of them."""
        remaining = self.count
        for rows in self._stream.chunks(unreadable=True) if self._images is None else [self._images]:
            for start in range(0, min(len(rows), remaining), size):
                yield rows, range(start, min(start + size, len(rows), remaining))
            remaining -= min(len(rows), remaining)
            if not remaining:
                return

    def identity(self) -> object:
        """Return a value that changes with the content."""
        if self._images is None:
            return self._stream.identity()
        path = Path(self.name)
        return [(str(file), file.stat().st_mtime_ns) for file in [path, *(walk(path) if path.is_dir() else ())]]


def input_settings(session: InferenceSession, source: InputRows, overrides: Mapping[str, Any]) -> DataSettings:
    """Return the settings by which the run read its rows, without the columns that the source does not have."""
    settings = session.data or DataSettings(train=source.name)
    columns = {name: column for name, column in settings.columns.items() if column in source.columns}
    long_rows = "error" if settings.long_rows == "split" else settings.long_rows
    changes = {"train": source.name, "bad_rows": "skip", "columns": columns, "long_rows": long_rows, **overrides}
    return replace(settings, **changes)


def identity_of_run(session: InferenceSession) -> list[object]:
    """Return a value that changes with the model and the adapter."""
    files = sorted(session.found.folder.glob("*.safetensors")) if session.found else []
    weights = base_fingerprint(session.model)  # after the adapter's head is loaded, unlike session.identity
    return [weights, str(session.model.dtype), session.classes, *map(content_identity, files)]


class Predictor:
    """Predicts rows with one model.

    Args:
        build_request: Builds the request for a prompt.

    Raises:
        UserError: if the task has no predictions, or a column is missing.
    """

    def __init__(
        self,
        session: InferenceSession,
        settings: DataSettings,
        source: InputRows,
        build_request: BuildRequest,
        say: Say,
    ) -> None:
        self._session, self._build_request, self._say = session, build_request, say
        self._max_length = settings.max_length
        check_columns(source, settings.columns)  # type: ignore[arg-type]
        columns = [name for name in source.columns if name not in settings.columns.values()]
        self._reader = session.task.input_reader(settings, [*columns, *settings.columns], session.classes)
        self._engine = open_engine(session, say=say) if session.task.writes_text else None
        self.chunk_rows = CHUNK_ROWS if self._engine is None else COMPLETION_ROWS
        limit = text_positions(session.model) if self._engine is None else self._engine.positions - 1
        self._limit = settings.max_length if limit is None else limit
        if self._engine is None:
            self._objective = session.task.objective(session.model)

    def __call__(self, rows: Rows, indices: Sequence[int], start: int) -> list[tuple[Record, UserError | None]]:
        """Return the predictions of the rows at ``indices``, or the error of each row without predictions.

        Args:
            start: Number of rows of earlier chunks; the seeds of completions depend on it.
        """
        reader = self._reader
        reader.bad, reader.errors = BadRows("skip"), {}
        errors: dict[int, UserError] = {i: r.error for i in indices if isinstance(r := rows[i][1], UnreadableRow)}
        readable = reader.usable(rows, [index for index in indices if index not in errors])
        examples = zip(readable, reader.examples(rows, readable), strict=True)
        items = {index: item for index, item in examples if item is not None}
        items = dict(zip(items, reader.completed([*items.values()], 0), strict=True))
        inputs = {index: self._session.example(item) for index, item in items.items()}
        errors |= reader.errors
        for index in indices:
            if index in errors:
                inputs.pop(index, None)
            elif index not in inputs or max(map(len, rows_of(inputs[index]))) > self._limit:
                reason = f"longer than {min(self._max_length, self._limit):,} tokens"
                errors[index] = BadRowError(f"the row is {reason}", reason=reason, where=rows.place(index))
                inputs.pop(index, None)
        columns: Predictions = {}
        if inputs and self._engine is None:
            columns = self._compute([*inputs.values()])
        elif inputs:
            columns = self._complete({start + i - indices[0]: items[i].tokens for i in inputs}, start)
        predictions = {i: {name: column[n] for name, column in columns.items()} for n, i in enumerate(inputs)}
        return [(predictions.get(index, {}), errors.get(index)) for index in indices]

    def _compute(self, examples: Sequence[Any]) -> Predictions:
        session = self._session
        batcher = session.batcher(examples)
        with session.task.running(session.model, batcher):
            return session.task.predict(self._objective, examples, batcher, session.classes)

    def _complete(self, prompts: Mapping[int, Any], start: int) -> Predictions:
        engine = self._engine
        assert engine is not None
        if not start and (line := self._session.not_invoked([*prompts.values()])) is not None:
            self._say(line)
        built = (self._build_request(prompt, engine.own_adapter, number=n) for n, prompt in prompts.items())
        # Another owner for each chunk: no prefix cache of an earlier chunk, which a resumed process would not have.
        requests = [replace(request, owner=start) for request in built]
        with working("writing", len(requests)) as advance:
            texts = engine.write_all(requests, lambda done, _: advance(done))
        return {"completion": [text.text for text in texts], "finish": [text.finish for text in texts]}

    def close(self) -> None:
        """Stop the engine."""
        if self._engine is not None:
            self._engine.close(drain=False)


def predict_rows(
    predictor: Predictor, source: InputRows, output: PredictionFile | None, emit: Callable[[bytes], object], say: Say
) -> Progress:
    """Predict all rows of a source and write the records.

    Args:
        output: File to write, which may contain records of an earlier process. If None, call ``emit`` with JSON Lines.

    Raises:
        UserError: if no row can be used.
    """
    progress = Progress({}) if output is None else output.progress
    if progress.rows:
        say(f"resuming after {progress.rows:,} of {source.count:,} rows")
    lines = ProgressLines(say, f"predicting {source.name}", 0, rows=source.count, done=progress.rows)
    flat = output is not None and output.suffix != ".jsonl"
    row_column, file_column, error_column = (_unused_name(n, source.columns) for n in ("row", "file", "error"))
    inputs = [row_column, *([file_column] if source.several else []), *source.columns]
    pending: list[tuple[Record, Record, str | None]] = []
    end = 0
    for rows, indices in source.chunks(predictor.chunk_rows):
        start, end = end, end + len(indices)
        if end <= progress.rows:
            continue
        for index, (predictions, error) in zip(indices, predictor(rows, indices, start), strict=True):
            number, row = rows[index]
            place = {row_column: number} | ({file_column: rows.file(index)} if source.several else {})
            named = {_unused_name(name, source.columns): value for name, value in _columns_of(predictions, flat)}
            pending.append((place | dict(row), named, None if error is None else error.what))
            if error is not None:
                progress.errors[getattr(error, "reason", error.what)] += 1
                progress.first_error = progress.first_error or f"{error.where}: {error.what}"
        if not progress.columns:
            progress.columns = next(([*inputs, *named, error_column] for _, named, _ in pending if named), [])
        if not progress.columns:
            continue  # no prediction yet, so the names of its columns are unknown
        empty = dict.fromkeys(progress.columns[len(inputs) :])
        records = [{**row, **empty, **named, error_column: error} for row, named, error in pending]
        pending, progress.rows = [], end
        if output is None:
            emit(json_lines(records))
        else:
            output.write(records)
        lines.at(progress.rows, 0)
    if not progress.columns:
        raise UserError(f"no row can be used; the first error: {progress.first_error}", where=source.name)
    return progress


def _unused_name(name: str, columns: Sequence[str]) -> str:
    while name in columns:
        name = f"predicted_{name}"
    return name


def _columns_of(predictions: Record, flat: bool) -> Iterator[tuple[str, Any]]:
    """Yield names and values; in a table, one column for the probability of each class."""
    for name, value in predictions.items():
        if flat and isinstance(value, dict):
            yield from ((f"p_{key}", probability) for key, probability in value.items())
        else:
            yield name, value
