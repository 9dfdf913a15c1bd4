"""Predict rows without labels for any task: labels, numbers, scores, vectors or completions.

Rows are read, computed and written in chunks, in their order, so that memory does not grow with the number of rows.
Each row gives one record: its number, its columns, the predictions, and an error if it cannot be used. The numbers are
the same that an evaluation computes. Batches depend only on their chunk, so a resumed process writes the same bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deltaw.data.columns import named_columns
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
from deltaw.hub.packages import local_path
from deltaw.lora.fingerprint import base_fingerprint
from deltaw.serving.engine import Engine
from deltaw.serving.opening import open_engine
from deltaw.serving.prediction_file import Progress, json_lines
from deltaw.serving.request import Request
from deltaw.training.callbacks import Say
from deltaw.training.origin import InferenceSession
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
        max_bytes: The most bytes of a row in its file.

    Attributes:
        name: The reference. columns: Names of the columns.
        count: Number of rows. several: True if the rows are in several files.
        identity: Changes with the content.
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
            with working(f"reading {reference}"):
                stream.scan()
            self._read, self.columns = functools.partial(stream.chunks, unreadable=True), stream.columns
            count, self.several = stream.rows + stream.bad, stream.files > 1
        self.identity = self.identity or open_source(reference).identity()
        self.count = min(count, limit or count)

    def chunks(self, size: int) -> Iterator[tuple[Rows, range]]:
        """Yield rows with the indices of at most ``size`` of them."""
        remaining = self.count
        for rows in self._read():
            for start in range(0, min(len(rows), remaining), size):
                yield rows, range(start, min(start + size, len(rows), remaining))
            remaining -= min(len(rows), remaining)
            if not remaining:
                return


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
        flat: Give the probability of each class a column.

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
        *,
        flat: bool,
    ) -> None:
        self._session, self._source, self._build_request, self._say = session, source, build_request, say
        check_columns(source, settings.columns)  # type: ignore[arg-type]
        columns = named_columns(source.columns, settings.columns)
        self._reader = session.task.input_reader(settings, columns, session.classes)
        self._flat_classes = session.classes if flat and "probabilities" in self._reader.predicts else None
        self._engine = open_engine(session, say=say) if session.task.writes_text else None
        self._objective: Any = session.task.objective(session.model) if self._engine is None else None
        limit = text_positions(session.model) if self._engine is None else self._engine.positions - 1
        self._limit = settings.max_length if limit is None else limit
        self._too_long = f"longer than {min(settings.max_length, self._limit):,} tokens"

    def run(self, progress: Progress, write: Callable[[bytes], object]) -> None:
        """Predict all rows and write their records as JSON Lines.

        Args:
            progress: Records of an earlier process, which are skipped.

        Raises:
            UserError: if no row can be used.
        """
        source = self._source
        if progress.rows:
            self._say(f"resuming after {progress.rows:,} of {source.count:,} rows")
        lines = ProgressLines(self._say, f"predicting {source.name}", 0, rows=source.count, done=progress.rows)
        place = [_unused_name(name, source.columns) for name in (("row", "file") if source.several else ("row",))]
        end = 0
        for rows, indices in source.chunks(CHUNK_ROWS if self._engine is None else COMPLETION_ROWS):
            start, end = end, end + len(indices)
            if end <= progress.rows:
                continue
            predictions, errors = self._predict(rows, indices, start)
            predicted = self._reader.predicts  # which the reader knows after it has read a chunk
            if self._flat_classes is not None:
                predicted = (predicted[0], *(f"p_{name}" for name in self._flat_classes))
            names = [_unused_name(name, source.columns) for name in (*predicted, "error")]
            progress.columns, records = [*place, *source.columns, *names], []
            for index in indices:
                error = errors.get(index)
                values = [*predictions.get(index, [None] * (len(names) - 1)), error and error.what]
                numbered = dict(zip(place, (rows.number(index), rows.file(index)), strict=False))
                records.append({**numbered, **rows[index][1], **dict(zip(names, values, strict=True))})
                if error is not None:
                    progress.errors[error.reason] += 1
                    progress.first_error = progress.first_error or f"{error.where}: {error.what}"
            progress.rows = end
            write(json_lines(records))
            lines.at(progress.rows, 0)
        if not progress.predicted:
            raise UserError(f"no row can be used; the first error: {progress.first_error}", where=source.name)

    def _predict(
        self, rows: Rows, indices: Sequence[int], start: int
    ) -> tuple[dict[int, Sequence[Any]], dict[int, BadRowError]]:
        """Return the predictions of the rows at ``indices``, and the error of each row without predictions.

        Args:
            start: Number of rows of earlier chunks; the seeds of completions depend on it.
        """
        reader, session = self._reader, self._session
        errors = {i: row.error for i in indices if isinstance(row := rows[i][1], UnreadableRow)}
        reader.bad, reader.errors = BadRows("skip"), errors
        readable = reader.usable(rows, [index for index in indices if index not in errors])
        examples = zip(readable, reader.examples(rows, readable), strict=True)
        found = {index: item for index, item in examples if item is not None}
        items: dict[int, Any] = dict(zip(found, reader.completed([*found.values()], 0), strict=True))
        inputs = {index: session.example(item) for index, item in items.items() if index not in errors}
        inputs = {i: item for i, item in inputs.items() if max(map(len, rows_of(item))) <= self._limit}
        for index in indices:
            if index not in inputs and index not in errors:
                what, where = f"the row is {self._too_long}", rows.place(index)
                errors[index] = BadRowError(what, reason=self._too_long, where=where)
        columns: Sequence[Sequence[Any]] = []
        if inputs and self._engine is not None:
            prompts = {start + i - indices[0]: items[i].tokens for i in inputs}
            columns = self._complete(self._engine, prompts, start)
        elif inputs:
            batched = [*inputs.values()]
            batcher = session.batcher(batched)
            with session.task.running(session.model, batcher):
                columns = session.task.predict(self._objective, batched, batcher, session.classes)
            if self._flat_classes is not None:
                columns = [columns[0], *zip(*(row.values() for row in columns[1]), strict=True)]
        return dict(zip(inputs, zip(*columns, strict=True), strict=True)), errors

    def _complete(self, engine: Engine, prompts: Mapping[int, Any], start: int) -> Sequence[Sequence[Any]]:
        if not start and (line := self._session.not_invoked([*prompts.values()])) is not None:
            self._say(line)
        built = (self._build_request(prompt, engine.own_adapter, number=n) for n, prompt in prompts.items())
        # Another owner for each chunk: no prefix cache of an earlier chunk, which a resumed process would not have.
        requests = [replace(request, owner=start) for request in built]
        with working("writing", len(requests)) as advance:
            texts = engine.write_all(requests, lambda done, _: advance(done))
        return [text.text for text in texts], [text.finish for text in texts]

    def close(self) -> None:
        """Stop the engine."""
        if self._engine is not None:
            self._engine.close(drain=False)


def _unused_name(name: str, columns: Sequence[str]) -> str:
    while name in columns:
        name = f"predicted_{name}"
    return name
