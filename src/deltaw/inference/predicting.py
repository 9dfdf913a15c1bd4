"""Predict rows without labels for any task, and write the predictions to a file that can be resumed.

Rows are read, computed and written in chunks, in their order, so memory does not grow with the number of rows. Each row
produces one record: its number, its columns, the predictions, and an error if it cannot be used. Predictions equal
those of an evaluation. Batches depend only on their chunk, so a resumed process writes the same bytes.

Records go to ``OUTPUT.partial``, as JSON Lines. The journal ``OUTPUT.partial.json`` contains the number of rows and
bytes on the disk, and the identity of the run, the file and the settings. The complete file is renamed to OUTPUT, or
converted to CSV or Parquet.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from filelock import FileLock, Timeout

from deltaw import platforms
from deltaw.atomic_files import atomic_path, sync_folder, write_text
from deltaw.data.bad_rows import BadRowError, BadRows
from deltaw.data.example import rows_of
from deltaw.data.formats import check_columns
from deltaw.data.pixels import image_rows
from deltaw.data.read_progress import ReadProgress as ProgressLines
from deltaw.data.row_stream import UnreadableRow, content_identity
from deltaw.data.rows import NumberedRows
from deltaw.data.sources import open_source, walk
from deltaw.decoding.engine import Engine
from deltaw.decoding.opening import open_engine
from deltaw.decoding.request import Request
from deltaw.errors import UserError
from deltaw.hub.packages import local_path
from deltaw.inference.opened_run import OpenedRun
from deltaw.lora.fingerprint import base_fingerprint
from deltaw.progress import LogFunction, track_progress
from deltaw.settings.columns import mapped_columns
from deltaw.settings.data import MAX_ROW_BYTES, DataSettings
from deltaw.settings.row_kinds import LABELS, NEGATIVES, PAIR_COLUMNS, PASSAGES, PROMPT_ANSWERS, SCORES
from deltaw.training.batchers import text_positions

# Rows per chunk, and rows per chunk of completions, which take longer.
CHUNK_ROWS = 1024
COMPLETION_ROWS = 256
# Predictions that ``name`` renames. It is the prefix of other columns.
_MAIN_PREDICTIONS = ("prediction", "completion", "score")
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
        self.name = reference
        self.several = False
        self._read: Callable[[], Any]
        self.identity: Sequence[object] | None = None
        path = local_path(reference)
        if images:
            rows = image_rows(reference, max_bytes=max_bytes, labeled=False)[0]
            self._read = lambda: [rows]
            self.columns = rows.columns
            count = len(rows)
            if path.is_dir():
                self.identity = [(str(file), file.stat().st_mtime_ns) for file in walk(path)]
        else:
            stream = open_source(reference, lambda error, row: None, max_bytes=max_bytes)
            with track_progress(f"reading {reference}"):
                stream.scan()
            self._read = functools.partial(stream.chunks, unreadable=True)
            self.columns = stream.columns
            count = stream.rows + stream.bad
            self.several = stream.files > 1
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


def input_settings(session: OpenedRun, source: InputRows, overrides: Mapping[str, Any]) -> DataSettings:
    """Return the settings with which the run read its rows, without labels and answers that the source does not have.

    Other missing columns remain, so that the predictor rejects the source instead of reading another column.
    """
    settings = session.data or DataSettings(train=source.name)
    optional = {*LABELS, *SCORES, *NEGATIVES, *PAIR_COLUMNS, "margin"}
    if session.task.generates_text:
        optional.update(PROMPT_ANSWERS)
    elif session.inference.outputs == "vectors":
        optional.update(PASSAGES)
    columns = {n: column for n, column in settings.columns.items() if column in source.columns or n not in optional}
    long_rows = "error" if settings.long_rows == "split" else settings.long_rows
    changes = {"train": source.name, "bad_rows": "skip", "columns": columns, "long_rows": long_rows, **overrides}
    return replace(settings, **changes)


def identity_of_run(session: OpenedRun) -> list[object]:
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
        flat: Write the probability of each class to a separate column.
        name: Name of the predictions, for files that already have predictions. None for the usual names.

    Raises:
        UserError: if the task has no predictions, a column is missing, or the source has a column of that name.
    """

    def __init__(
        self,
        session: OpenedRun,
        settings: DataSettings,
        source: InputRows,
        build_request: BuildRequest,
        log: LogFunction,
        *,
        flat: bool,
        name: str | None = None,
    ) -> None:
        self._name = name
        self._session = session
        self._source = source
        self._build_request = build_request
        self._log = log
        check_columns(source, settings.columns)  # type: ignore[arg-type]
        if name in source.columns:
            raise UserError(f"the file has a column '{name}'", location="--name", hint="use another name")
        columns = mapped_columns(source.columns, settings.columns)
        self._reader = session.inference.reader(settings, columns, session.classes)
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
        number_columns = {name: self._number_column(name) for name in (("row", "file") if source.several else ("row",))}
        end = 0
        for rows, indices in source.chunks(CHUNK_ROWS if self._engine is None else COMPLETION_ROWS):
            start = end
            end = end + len(indices)
            if end <= progress.rows:
                continue
            predictions, errors = self._predict(rows, indices, start)
            predicted = self._reader.predicts  # final after the first chunk
            if self._flat_classes is not None:
                predicted = (predicted[0], *(f"p_{name}" for name in self._flat_classes))
            names = [self._column(name) for name in (*predicted, "error")]
            progress.columns = [*filter(None, number_columns.values()), *source.columns, *names]
            records = []
            for index in indices:
                error = errors.get(index)
                values = [*predictions.get(index, [None] * (len(names) - 1)), error and error.message]
                numbers = {"row": rows.number(index), "file": rows.file(index)}
                numbered = {column: numbers[name] for name, column in number_columns.items() if column}
                records.append({**numbered, **rows[index][1], **dict(zip(names, values, strict=True))})
                if error is not None:
                    progress.errors[error.reason] += 1
                    progress.first_error = progress.first_error or f"{error.location}: {error.message}"
            if self._session.task.images is not None:
                self._session.task.images.clear()  # otherwise their features accumulate
            progress.rows = end
            write(json_lines(records))
            lines.update(progress.rows, 0)
        if not progress.predicted:
            raise UserError(f"no row can be used; the first error: {progress.first_error}", location=source.name)

    def _number_column(self, column: str) -> str:
        """Return the name of the column of row numbers or files, or '' if named predictions follow earlier ones."""
        return (
            "" if self._name is not None and column in self._source.columns else _unused(column, self._source.columns)
        )

    def _column(self, column: str) -> str:
        """Return the name of a column of predictions or errors."""
        if self._name is not None:
            column = self._name if column in _MAIN_PREDICTIONS else f"{self._name}_{column}"
        return _unused(column, self._source.columns)

    def _predict(
        self, rows: NumberedRows, indices: Sequence[int], start: int
    ) -> tuple[dict[int, Sequence[Any]], dict[int, BadRowError]]:
        """Return the predictions of the rows at ``indices``, and the error of each row without predictions.

        Args:
            start: Number of rows of earlier chunks; the seeds of completions depend on it.
        """
        reader = self._reader
        session = self._session
        errors = {i: row.error for i in indices if isinstance(row := rows[i][1], UnreadableRow)}
        reader.bad = BadRows("skip")
        reader.errors = errors
        readable = reader.select_usable(rows, [index for index in indices if index not in errors])
        examples = zip(readable, reader.examples(rows, readable), strict=True)
        usable = {index: item for index, item in examples if item is not None}
        items: dict[int, Any] = dict(zip(usable, reader.finalize([*usable.values()], 0), strict=True))
        inputs = {index: session.example(item) for index, item in items.items() if index not in errors}
        inputs = {i: item for i, item in inputs.items() if max(map(len, rows_of(item))) <= self._limit}
        for index in indices:
            if index not in inputs and index not in errors:
                message = f"the row is {self._too_long}"
                location = rows.row_location(index)
                errors[index] = BadRowError(message, reason=self._too_long, location=location)
        columns: Sequence[Sequence[Any]] = []
        if inputs and self._engine is not None:
            prompts = {start + i - indices[0]: items[i].tokens for i in inputs}
            columns = self._complete(self._engine, prompts, start)
        elif inputs:
            batched = [*inputs.values()]
            batcher = session.batcher(batched)
            with session.task.model_context(session.model, batcher):
                columns = session.inference.predict(self._objective, batched, batcher, session.classes)
            if self._flat_classes is not None:
                columns = [columns[0], *zip(*(row.values() for row in columns[1]), strict=True)]
        return dict(zip(inputs, zip(*columns, strict=True), strict=True)), errors

    def _complete(self, engine: Engine, prompts: Mapping[int, Any], start: int) -> Sequence[Sequence[Any]]:
        if not start and (line := self._session.invocation_warning([*prompts.values()])) is not None:
            self._log(line)
        built = (self._build_request(prompt, engine.session_adapter, number=n) for n, prompt in prompts.items())
        # One owner per chunk: a resumed process must not depend on the prefix cache of earlier chunks.
        requests = [replace(request, owner=start) for request in built]
        if (images := self._session.task.images) is not None:
            images.compute()
        with track_progress("writing", len(requests)) as advance:
            texts = engine.generate_all(requests, lambda done, _: advance(done))
        return [text.text for text in texts], [text.finish for text in texts]

    def close(self) -> None:
        """Stop the engine."""
        if self._engine is not None:
            self._engine.close(drain=False)


def _unused(name: str, columns: Sequence[str]) -> str:
    while name in columns:
        name = f"predicted_{name}"
    return name


SUFFIXES = (".jsonl", ".csv", ".parquet")
# Rows of a row group in Parquet.
GROUP_ROWS = 4096
# The JSON escape of an unpaired surrogate, which tables cannot contain, after any escaped backslashes.
_SURROGATE = re.compile(r"(?<!\\)((?:\\\\)*)\\ud[89a-f]..")


@dataclass
class PredictionProgress:
    """Records written by this process and earlier ones.

    Attributes:
        identity: Identity of the run, the file and the settings, by name.
        columns: Names of all columns. Empty before the first record.
        rows: Number of records.
        bytes: Length of the partial file.
        errors: Number of rows without predictions, by reason.
        first_error: Message of the first error.
    """

    identity: Mapping[str, Any] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_error: str = ""

    @property
    def predicted(self) -> int:
        """Number of rows with predictions."""
        return self.rows - sum(self.errors.values())


def check_output(output: Path, reference: str, *, force: bool) -> None:
    """Reject an output that cannot be written.

    Raises:
        UserError: if its type is unknown, it exists, or it is the input file.
    """
    platforms.reject_reserved_names(output)
    if output.suffix.lower() not in SUFFIXES:
        hint = f"use a file name that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise UserError(f"predictions cannot be written as '{output.suffix}'", location=str(output), hint=hint)
    if output.exists() and Path(reference).exists() and output.samefile(reference):
        raise UserError("the output is the input file", location=str(output), hint="use another --output")
    if output.is_dir() or (output.exists() and not force):
        raise UserError("the output exists", location=str(output), hint="use another --output or add --force")


class PredictionFile:
    """File of predictions that can be resumed.

    Args:
        output: Final name of the file.
        identity: Identity of the run, the file and the settings, by the name for messages.
        force: Discard an unfinished file with another identity.

    Raises:
        UserError: if the folder cannot be written to, another process writes the file, or an unfinished file has
            another identity.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], *, force: bool) -> None:
        self.output = output
        self._partial, self._journal = (output.with_name(f"{output.name}.partial{end}") for end in ("", ".json"))
        self._lock = FileLock(f"{self._partial}.lock")
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError("another process is writing this file", location=str(output)) from None
        except OSError as error:
            message = f"cannot write '{output.name}': {error.strerror or error}"
            raise UserError(message, location=str(output.parent), hint="choose a folder you may write to") from error
        identity = json.loads(json.dumps(identity, default=str))
        self.progress = self._read_journal(identity, force) or PredictionProgress(identity)
        self._file = self._partial.open("r+b" if self.progress.rows else "wb")
        self._file.truncate(self.progress.bytes)
        self._file.seek(self.progress.bytes)

    def _read_journal(self, identity: Mapping[str, Any], force: bool) -> PredictionProgress | None:
        """Return the progress of an unfinished file, or None if it cannot be resumed."""
        try:
            progress = PredictionProgress(**json.loads(self._journal.read_text(encoding="utf-8")))
            complete = self._partial.stat().st_size >= progress.bytes
            progress.errors = Counter(progress.errors)
        except (OSError, ValueError, TypeError):
            return None
        changed = [name for name in identity if identity[name] != progress.identity.get(name)]
        if changed and not force:
            message = f"an unfinished file exists, and {' and '.join(changed)} changed since then"
            hint = "repeat the original command to resume, or discard the file with --force"
            raise UserError(message, location=str(self._partial), hint=hint)
        return progress if complete and not changed else None

    def write(self, lines: bytes) -> None:
        """Append the records of a chunk, which :attr:`progress` includes."""
        self._file.write(lines)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.progress.bytes = self._file.tell()
        write_text(self._journal, json.dumps(vars(self.progress)))

    def finish(self) -> None:
        """Replace the output by the complete file."""
        self._file.close()
        convert = {".csv": to_csv, ".parquet": to_parquet}.get(self.output.suffix.lower())
        if convert is None:
            platforms.rename_path(self._partial, self.output)
            sync_folder(self.output.parent)
        else:
            with atomic_path(self.output) as temporary:
                convert(self._partial, temporary, self.progress.columns)
        self._discard()

    def _discard(self) -> None:
        for path in (self._journal, self._partial):
            platforms.remove_path(path)

    def close(self) -> None:
        """Release the lock, and remove a file without predictions."""
        self._file.close()
        if not self.progress.predicted:
            self._discard()
        self._lock.release()
        platforms.remove_path(Path(self._lock.lock_file))


def json_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Return records as JSON Lines.

    NaN and infinity become null. Byte strings are replaced by their length. An unpaired surrogate is written as its
    JSON escape.
    """
    # The copy is needed because JSON has no NaN, and parse_constant is the only hook for it.
    copies = (json.loads(json.dumps(r, default=_display_value), parse_constant=lambda _: None) for r in records)
    return "".join(f"{json_text(copy)}\n" for copy in copies).encode("utf-8", "backslashreplace")


def _display_value(value: object) -> str:
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else re.sub(" at 0x[0-9a-fA-F]+", "", str(value))


def json_text(value: object) -> str:
    """Return a value as JSON."""
    return json.dumps(value, ensure_ascii=False)


def to_csv(lines: Path, path: Path, columns: Sequence[str]) -> None:
    """Convert JSON Lines to CSV. Lists and objects are written as JSON."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for table in _tables(lines, columns):
            writer.writerows(zip(*map(_as_text, table.values()), strict=True))


def to_parquet(lines: Path, path: Path, columns: Sequence[str]) -> None:
    """Convert JSON Lines to Parquet in constant memory. Columns with values of several types become text."""
    types: dict[str, Any] = dict.fromkeys(columns, pyarrow.null())
    for table in _tables(lines, columns):
        types = {name: _common_type(types[name], values) for name, values in table.items()}
    for name, kind in types.items():
        if kind == pyarrow.list_(pyarrow.float64()) and name.endswith("embedding"):
            types[name] = pyarrow.list_(pyarrow.float32())
        elif kind == pyarrow.null() or "struct<>" in str(kind):  # Parquet has no empty structs
            types[name] = pyarrow.string()
    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema(types.items())) as writer:
        for table in _tables(lines, columns):
            texts = {name: _as_text(table[name]) for name, kind in types.items() if kind == pyarrow.string()}
            arrays = [pyarrow.array((table | texts)[name], kind) for name, kind in types.items()]
            writer.write_table(pyarrow.table(arrays, names=columns))


def _common_type(kind: Any, values: list[Any]) -> Any:
    """Return the Arrow type of values and of earlier values of type ``kind``."""
    try:
        schemas = [pyarrow.schema({"": type_}) for type_ in (kind, pyarrow.array(values).type)]
        return pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pyarrow.ArrowException, OverflowError):
        return pyarrow.string()


def _tables(lines: Path, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """Yield the values of each column, for some rows at a time."""
    with lines.open(encoding="utf-8", newline="\n") as file:
        while records := [json.loads(_SURROGATE.sub("\\1\ufffd", line)) for line in islice(file, GROUP_ROWS)]:
            yield {name: [record.get(name) for record in records] for name in columns}


def _as_text(values: list[Any]) -> list[str | None]:
    return [value if value is None or isinstance(value, str) else json_text(value) for value in values]
