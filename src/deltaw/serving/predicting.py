"""Predict rows without labels for any task: labels, numbers, scores, vectors or completions.

Rows are read, computed and written in chunks, in their order, so memory does not grow with the number of rows. Each row
produces one record: its number, its columns, the predictions, and an error if it cannot be used. Predictions equal
those of an evaluation. Batches depend only on their chunk, so a resumed process writes the same bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deltaw.data.columns import mapped_columns
from deltaw.data.example import rows_of
from deltaw.data.formats import check_columns
from deltaw.data.pixels import image_rows
from deltaw.data.report import MAX_ROW_BYTES, BadRowError, BadRows
from deltaw.data.report import ReadProgress as ProgressLines
from deltaw.data.row_stream import UnreadableRow, content_identity
from deltaw.data.rows import NumberedRows
from deltaw.data.settings import DataSettings
from deltaw.data.sources import open_source, walk
from deltaw.errors import UserError
from deltaw.hub.packages import local_path
from deltaw.lora.fingerprint import base_fingerprint
from deltaw.progress import track_progress
from deltaw.serving.engine import Engine
from deltaw.serving.opening import open_engine
from deltaw.serving.prediction_file import PredictionProgress, json_lines
from deltaw.serving.request import Request
from deltaw.training.callbacks import LogFunction
from deltaw.training.open_run import AdaptedModel
from deltaw.training.tasks.labels import text_positions

# Rows per chunk, and rows per chunk of completions, which take longer.
CHUNK_ROWS, COMPLETION_ROWS = 1024, 256
# Builds the request for the tokens of a prompt, the name of an adapter and the number of a row.
BuildRequest = Callable[..., Request]


class InputRows:
    """Rows of a reference in chunks, including rows that cannot be read.

    Args:
        reference: Path or reference of the rows.
        images: Read a folder of images or tables of pixels. All of them are loaded at once.
        limit: Number of rows to read, or None for all.
        max_bytes: Maximum number of bytes of a row in its file.

    Attributes:
        name: The reference.
        columns: Names of the columns.
        count: Number of rows.
        several: True if the rows are in several files.
        identity: Value that changes with the content.
    """

    def __init__(self, reference: str, *, images: bool, limit: int | None, max_bytes: int = MAX_ROW_BYTES) -> None:
        self.name, self.several = reference, False
        self._read: Callable[[], Any]
        self.identity: Sequence[object] | None = None
        path = local_path(reference)
        if images:
            rows = image_rows(reference, max_bytes=max_bytes, labeled=False)[0]
            self._read, self.columns, count = lambda: [rows], rows.columns, len(rows)
            if path.is_dir():
                self.identity = [(str(file), file.stat().st_mtime_ns) for file in walk(path)]
        else:
            stream = open_source(reference, lambda error, row: None, max_bytes=max_bytes)
            with track_progress(f"reading {reference}"):
                stream.scan()
            self._read, self.columns = functools.partial(stream.chunks, unreadable=True), stream.columns
            count, self.several = stream.rows + stream.bad, stream.files > 1
        self.identity = self.identity or open_source(reference).identity()
        self.count = min(count, limit or count)

    def chunks(self, size: int) -> Iterator[tuple[NumberedRows, range]]:
        """Yield rows with the indices of at most ``size`` of them."""
        remaining = self.count
        for rows in self._read():
            for start in range(0, min(len(rows), remaining), size):
                yield rows, range(start, min(start + size, len(rows), remaining))
            remaining -= min(len(rows), remaining)
            if not remaining:
                return


def input_settings(session: AdaptedModel, source: InputRows, overrides: Mapping[str, Any]) -> DataSettings:
    """Return the settings with which the run read its rows, without columns that the source does not have."""
    settings = session.data or DataSettings(train=source.name)
    columns = {name: column for name, column in settings.columns.items() if column in source.columns}
    long_rows = "error" if settings.long_rows == "split" else settings.long_rows
    changes = {"train": source.name, "bad_rows": "skip", "columns": columns, "long_rows": long_rows, **overrides}
    return replace(settings, **changes)


def identity_of_run(session: AdaptedModel) -> list[object]:
    """Return a value that changes with the model and the adapter."""
    files = sorted(session.adapter_folder.folder.glob("*.safetensors")) if session.adapter_folder else []
    weights = base_fingerprint(session.model)  # after the adapter's head is loaded, unlike session.identity
    return [weights, str(session.model.dtype), session.classes, *map(content_identity, files)]


class Predictor:
    """Predicts rows with one model.

    Args:
        session: Session of the model.
        settings: Settings for reading the rows.
        source: The rows.
        build_request: Builds the request for a prompt.
        log: Receives progress lines.
        flat: Write the probability of each class to a column of its own.

    Raises:
        UserError: if the task has no predictions, or a column is missing.
    """

    def __init__(
        self,
        session: AdaptedModel,
        settings: DataSettings,
        source: InputRows,
        build_request: BuildRequest,
        log: LogFunction,
        *,
        flat: bool,
    ) -> None:
        self._session, self._source, self._build_request, self._log = session, source, build_request, log
        check_columns(source, settings.columns)  # type: ignore[arg-type]
        columns = mapped_columns(source.columns, settings.columns)
        self._reader = session.task.input_reader(settings, columns, session.classes)
        self._flat_classes = session.classes if flat and "probabilities" in self._reader.predicts else None
        self._engine = open_engine(session, log=log) if session.task.generates_text else None
        self._objective: Any = session.task.objective(session.model) if self._engine is None else None
        limit = text_positions(session.model) if self._engine is None else self._engine.positions - 1
        self._limit = settings.max_length if limit is None else limit
        self._too_long = f"longer than {min(settings.max_length, self._limit):,} tokens"

    def run(self, progress: PredictionProgress, write: Callable[[bytes], object]) -> None:
        """Predict all rows and write their records as JSON Lines.

        Args:
            progress: Records of an earlier process, which are skipped.

        Raises:
            UserError: if no row can be used.
        """
        source = self._source
        if progress.rows:
            self._log(f"resuming after {progress.rows:,} of {source.count:,} rows")
        lines = ProgressLines(self._log, f"predicting {source.name}", 0, rows=source.count, done=progress.rows)
        number_columns = [_unused_name(n, source.columns) for n in (("row", "file") if source.several else ("row",))]
        end = 0
        for rows, indices in source.chunks(CHUNK_ROWS if self._engine is None else COMPLETION_ROWS):
            start, end = end, end + len(indices)
            if end <= progress.rows:
                continue
            predictions, errors = self._predict(rows, indices, start)
            predicted = self._reader.predicts  # final after the first chunk
            if self._flat_classes is not None:
                predicted = (predicted[0], *(f"p_{name}" for name in self._flat_classes))
            names = [_unused_name(name, source.columns) for name in (*predicted, "error")]
            progress.columns, records = [*number_columns, *source.columns, *names], []
            for index in indices:
                error = errors.get(index)
                values = [*predictions.get(index, [None] * (len(names) - 1)), error and error.message]
                numbered = dict(zip(number_columns, (rows.number(index), rows.file(index)), strict=False))
                records.append({**numbered, **rows[index][1], **dict(zip(names, values, strict=True))})
                if error is not None:
                    progress.errors[error.reason] += 1
                    progress.first_error = progress.first_error or f"{error.location}: {error.message}"
            progress.rows = end
            write(json_lines(records))
            lines.update(progress.rows, 0)
        if not progress.predicted:
            raise UserError(f"no row can be used; the first error: {progress.first_error}", location=source.name)

    def _predict(
        self, rows: NumberedRows, indices: Sequence[int], start: int
    ) -> tuple[dict[int, Sequence[Any]], dict[int, BadRowError]]:
        """Return the predictions of the rows at ``indices``, and the error of each row without predictions.

        Args:
            start: Number of rows of earlier chunks; the seeds of completions depend on it.
        """
        reader, session = self._reader, self._session
        errors = {i: row.error for i in indices if isinstance(row := rows[i][1], UnreadableRow)}
        reader.bad, reader.errors = BadRows("skip"), errors
        readable = reader.select_usable(rows, [index for index in indices if index not in errors])
        examples = zip(readable, reader.examples(rows, readable), strict=True)
        usable = {index: item for index, item in examples if item is not None}
        items: dict[int, Any] = dict(zip(usable, reader.finalize([*usable.values()], 0), strict=True))
        inputs = {index: session.example(item) for index, item in items.items() if index not in errors}
        inputs = {i: item for i, item in inputs.items() if max(map(len, rows_of(item))) <= self._limit}
        for index in indices:
            if index not in inputs and index not in errors:
                message, location = f"the row is {self._too_long}", rows.row_location(index)
                errors[index] = BadRowError(message, reason=self._too_long, location=location)
        columns: Sequence[Sequence[Any]] = []
        if inputs and self._engine is not None:
            prompts = {start + i - indices[0]: items[i].tokens for i in inputs}
            columns = self._complete(self._engine, prompts, start)
        elif inputs:
            batched = [*inputs.values()]
            batcher = session.batcher(batched)
            with session.task.model_context(session.model, batcher):
                columns = session.task.predict(self._objective, batched, batcher, session.classes)
            if self._flat_classes is not None:
                columns = [columns[0], *zip(*(row.values() for row in columns[1]), strict=True)]
        return dict(zip(inputs, zip(*columns, strict=True), strict=True)), errors

    def _complete(self, engine: Engine, prompts: Mapping[int, Any], start: int) -> Sequence[Sequence[Any]]:
        if not start and (line := self._session.invocation_warning([*prompts.values()])) is not None:
            self._log(line)
        built = (self._build_request(prompt, engine.session_adapter, number=n) for n, prompt in prompts.items())
        # One owner per chunk: a resumed process must not depend on the prefix cache of earlier chunks.
        requests = [replace(request, owner=start) for request in built]
        with track_progress("writing", len(requests)) as advance:
            texts = engine.generate_all(requests, lambda done, _: advance(done))
        return [text.text for text in texts], [text.finish for text in texts]

    def close(self) -> None:
        """Stop the engine."""
        if self._engine is not None:
            self._engine.close(drain=False)


def _unused_name(name: str, columns: Sequence[str]) -> str:
    while name in columns:
        name = f"predicted_{name}"
    return name
