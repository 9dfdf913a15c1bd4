"""Predictions for rows without labels, whatever the task: labels, numbers, scores, vectors or completions.

Rows are read, computed and written a chunk at a time, in their order, so that memory does not grow with their number.
Each row gives one record: its number, its columns, the predictions, and an error if it cannot be used. The numbers are
those that an evaluation computes. Batches depend on their chunk alone, so that a resumed process gives the same bytes.
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

# Rows of a chunk; fewer if a text is written for each, which takes longer.
CHUNK_ROWS, WRITTEN_ROWS = 1024, 256
# Makes a request of a prompt's tokens, the adapter's name and the number of the row.
MakeRequest = Callable[..., Request]


class InputRows:
    """The rows of a reference, in chunks; also rows that cannot be read.

    Args:
        images: Read a folder of images, or tables of pixels, which are not read in chunks.
        most: The number of rows to read, or None for all.

    Attributes:
        name: The reference. columns: Names of the columns.
        count: Number of rows. several: True if they are in several files.
    """

    def __init__(self, reference: str, *, images: bool, most: int | None, max_bytes: int = MAX_ROW_BYTES) -> None:
        self.name = reference
        if images:
            self._rows, _ = image_rows(reference, max_bytes=max_bytes, labeled=False)
            self.columns, self.count = self._rows.columns, len(self._rows)
        else:
            self._stream = open_source(reference, lambda error, row: None, max_bytes=max_bytes)
            with working(f"reading {reference}"):
                self._stream.scan()
            self.columns, self.count = self._stream.columns, self._stream.rows + self._stream.bad
        self._images = images
        self.several = not images and self._stream.files > 1
        self.count = min(self.count, most or self.count)

    def chunks(self, size: int) -> Iterator[tuple[Rows, range]]:
        """Rows with the indices of at most ``size`` of them."""
        left = self.count
        for rows in [self._rows] if self._images else self._stream.chunks(unreadable=True):
            for start in range(0, min(len(rows), left), size):
                yield rows, range(start, min(start + size, len(rows), left))
            left -= min(len(rows), left)
            if not left:
                return

    def identity(self) -> object:
        """Differs for other content."""
        if not self._images:
            return self._stream.identity()
        path = Path(self.name)
        files = walk(path) if path.is_dir() else [path]
        return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.exists()]


def input_settings(session: InferenceSession, source: InputRows, given: Mapping[str, Any]) -> DataSettings:
    """How the rows are read: as the run read its own, except that columns of labels may be missing.

    Args:
        given: Settings of the caller.
    """
    own = session.data or DataSettings(train=source.name)
    columns = {ours: theirs for ours, theirs in own.columns.items() if theirs in source.columns}
    way = "error" if own.long_rows == "split" else own.long_rows
    return replace(own, **{"train": source.name, "columns": columns, "long_rows": way, **given})  # type: ignore[arg-type]


def identity_of_run(session: InferenceSession) -> list[object]:
    """Names the base model and the adapter."""
    folder = None if session.found is None else session.found.folder
    files = sorted(folder.glob("*.safetensors")) if folder else []
    weights = base_fingerprint(session.model)  # with the head that the adapter has, unlike session.identity
    return [weights, str(session.model.dtype), session.classes, *map(content_identity, files)]


class Predictor:
    """Predicts rows with one model.

    Args:
        request: Makes a request of a prompt, for a model that writes text.

    Raises:
        UserError: if the task has no predictions, or the rows lack a column.
    """

    def __init__(
        self, session: InferenceSession, settings: DataSettings, source: InputRows, request: MakeRequest, say: Say
    ) -> None:
        self._session, self._settings, self._request, self._say = session, settings, request, say
        mapped = settings.columns
        check_columns(source, mapped)  # type: ignore[arg-type]
        names = [name for name in source.columns if name not in mapped.values()] + [*mapped]
        self._reader = session.task.input_reader(replace(settings, bad_rows="skip"), names, session.classes)
        self.writes = session.task.writes_text
        self._engine = open_engine(session, say=say) if self.writes else None
        if self._engine is None:
            self._objective = session.task.objective(session.model)
            self._limit = text_positions(session.model)
        else:
            self._limit = self._engine.positions - 1

    def __call__(self, rows: Rows, indices: Sequence[int], first: int) -> list[tuple[Record, UserError | None]]:
        """The predictions of the rows at ``indices``, or the reason why there are none.

        Args:
            first: The number of rows before them, which seeds and separates completions.
        """
        reader = self._reader
        reader.bad, reader.errors = BadRows("skip"), {}
        errors: dict[int, UserError] = {i: r.error for i in indices if isinstance(r := rows[i][1], UnreadableRow)}
        usable = reader.usable(rows, [index for index in indices if index not in errors])
        read = zip(usable, reader.examples(rows, usable), strict=True)
        items = {index: item for index, item in read if item is not None}
        whole = dict(zip(items, reader.completed([*items.values()], 0), strict=True))
        seen = {index: self._session.example(item) for index, item in whole.items()}
        for index in indices:
            longest = max(map(len, rows_of(seen[index])), default=0) if index in seen else None
            if index in reader.errors:
                errors[index] = reader.errors[index]
            elif index not in errors and (longest is None or longest > (self._limit or longest)):
                most = min(self._settings.max_length, self._limit or self._settings.max_length)
                what = f"the row has more than {most:,} tokens" if longest != 0 else "the row is empty"
                errors[index] = BadRowError(what, reason=f"longer than {most:,} tokens", where=rows.place(index))
        kept = [index for index in seen if index not in errors]
        found: Predictions = {}
        if kept and self._engine is None:
            found = self._computed([seen[index] for index in kept])
        elif kept:
            prompts = [whole[index].tokens for index in kept]
            found = self._completed(prompts, [first + index - indices[0] for index in kept], first)
        values = {index: {name: column[n] for name, column in found.items()} for n, index in enumerate(kept)}
        return [(values.get(index, {}), errors.get(index)) for index in indices]

    def _computed(self, examples: Sequence[Any]) -> Predictions:
        session = self._session
        batcher = session.batcher(examples)
        with session.task.running(session.model, batcher):
            return session.task.predict(self._objective, examples, batcher, session.classes)

    def _completed(self, prompts: Sequence[Any], numbers: Sequence[int], first: int) -> Predictions:
        engine = self._engine
        assert engine is not None
        if not first and (line := self._session.not_invoked(prompts)) is not None:
            self._say(line)
        given = zip(prompts, numbers, strict=True)
        # An owner's prompts find no pages of earlier chunks, which a resumed process does not have.
        requests = [replace(self._request(p, engine.own_adapter, number=n), owner=first) for p, n in given]
        with working("writing", len(requests)) as advance:
            written = engine.write_all(requests, lambda done, _: advance(done))
        return {"completion": [one.text for one in written], "finish": [one.finish for one in written]}

    def close(self) -> None:
        """Stop the engine."""
        if self._engine is not None:
            self._engine.close(drain=False)


def predict_rows(
    predictor: Predictor, source: InputRows, output: PredictionFile | None, emit: Callable[[bytes], object], say: Say
) -> Progress:
    """Predict all rows of a source and write the records.

    Args:
        output: File to write, which may have records of an earlier process; None to ``emit`` JSON Lines.

    Raises:
        UserError: if no row can be used.
    """
    progress = Progress({}) if output is None else output.progress
    if progress.rows:
        say(f"resuming after {progress.rows:,} of {source.count:,} rows")
    lines = ProgressLines(say, f"predicting {source.name}", 0, rows=source.count, done=progress.rows)
    flat, several = output is not None and output.kind != ".jsonl", source.several
    head = ["row", *(["file"] if several else [])]
    head = [*(_new_name(name, source.columns) for name in head), *source.columns]
    columns, waiting = progress.columns, list[tuple[Record, Record, str | None]]()
    position = 0
    for rows, indices in source.chunks(WRITTEN_ROWS if predictor.writes else CHUNK_ROWS):
        first, position = position, position + len(indices)
        if position <= progress.rows:
            continue
        for index, (values, error) in zip(indices, predictor(rows, indices, first), strict=True):
            number, row = rows[index]
            place = [number, *([rows.file(index)] if several else [])]
            waiting.append(({**dict(zip(head, place, strict=False)), **row}, values, error and error.what))
            if error is not None:
                progress.errors[getattr(error, "reason", error.what)] += 1
                progress.first_error = progress.first_error or f"{error.where}: {error.what}"
        named = [{_new_name(name, source.columns): one for name, one in _flat(v, flat)} for _, v, _ in waiting]
        if not columns and (new := next(filter(None, named), None)) is not None:
            columns = [*head, *new, _new_name("error", source.columns)]
        if not columns:
            continue  # all rows so far have errors, and nothing says what columns the others will have
        empty = dict.fromkeys(columns[len(head) :])
        records = [
            {**row, **empty, **new, columns[-1]: error} for (row, _, error), new in zip(waiting, named, strict=True)
        ]
        waiting, progress.rows = [], position
        if output is None:
            emit(json_lines(records))
        else:
            output.write(records, columns)
        lines.at(progress.rows, 0)
    if not columns:
        raise UserError(f"no row can be used; the first error: {progress.first_error}", where=source.name)
    return progress


def _new_name(name: str, taken: Sequence[str]) -> str:
    """The name of a column that is added to those of the rows."""
    while name in taken:
        name = f"predicted_{name}"
    return name


def _flat(values: Record, flat: bool) -> Iterator[tuple[str, Any]]:
    """Predictions of a row; in a table each class has a column for its probability."""
    for name, value in values.items():
        if flat and isinstance(value, dict):
            yield from ((f"p_{key}", one) for key, one in value.items())
        else:
            yield name, value
