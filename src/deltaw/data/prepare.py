"""Preparation of language model data: reading, rendering, limiting the length, deduplicating and splitting.

Rows are processed in chunks, so that memory is constant except for small arrays. The report counts every row that is
skipped, truncated or dropped.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.bad_rows import BadRows
from deltaw.data.check import DataCheck, build_check
from deltaw.data.chunk import Account, ChunkReader
from deltaw.data.data_statistics import collect_statistics
from deltaw.data.example import token_spans
from deltaw.data.formats import RowFormat, choose_form
from deltaw.data.messages import read_prompt
from deltaw.data.report import PreparationReport
from deltaw.data.row_images import ImagePlacer, take_images, without_markers
from deltaw.data.row_reader import UNLIMITED, ExamplePreview, RowPreview, RunData
from deltaw.data.row_selection import split_rows, with_eval_counts
from deltaw.data.row_store import RowView
from deltaw.data.rows import NO_FOLDER, NumberedRows, Row, RowFolder
from deltaw.data.sources import open_source, row_errors
from deltaw.data.stored_rows import read_stored
from deltaw.data.templates import Encoder
from deltaw.errors import UserError
from deltaw.hub.terminators import terminators_in
from deltaw.progress import LogFunction, ignore_line
from deltaw.settings.data import DataSettings, TemplateName
from deltaw.settings.mixture import MixtureSource, format_sources, sources_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@row_errors()
def prepare(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    log: LogFunction = ignore_line,
    images: ImagePlacer | None = None,
) -> RunData:
    """Read and tokenize the data of a run.

    Args:
        settings: The ``data:`` section.
        tokenizer: Tokenizer of the model.
        seed: Seed for choosing rows (``data.rows``), holding rows out, and sampling fractions of sources.
        log: Receives progress lines.
        images: See :class:`deltaw.data.templates.Encoder`.

    Raises:
        UserError: if the data cannot be used. The message names the file and the row.
    """
    sources = sources_of(settings.train)
    bad = BadRows(settings.bad_rows)
    read = read_stored(sources, settings, tokenizer, bad, seed=seed, log=log, images=images)
    ordinals = read.rows.ordinals()

    def read_eval(reference: str) -> tuple[RowView, np.ndarray, PreparationReport]:
        rows, evaluation = prepare_file(reference, settings, tokenizer, bad, log=log, images=images)
        return rows, rows.store.keys(), evaluation

    train, eval_rows, report = split_rows(
        RowView(read.rows, np.arange(len(read.rows))),
        read.rows.keys(),
        read.rows.groups(),
        replace(read.report, source=format_sources(settings.train)),
        settings,
        seed=seed,
        read_eval=read_eval,
        linked=ordinals if (np.diff(ordinals) == 0).any() else None,  # examples that one row became
        weigh=lambda row_indices: apply_weights(
            row_indices, read.source_of(row_indices), [source.weight for source in sources], seed
        ),
    )
    if len(sources) > 1:
        row_indices = train.indices  # type: ignore[attr-defined]
        counts = np.bincount(read.source_of(row_indices), minlength=len(sources)).tolist()
        source_counts = zip(sources, counts, strict=True)
        by_source = {source.reference: {"weight": source.weight, "rows": count} for source, count in source_counts}
        report = replace(report, sources=by_source)
    return RunData(train, eval_rows, report, bad)


@row_errors()
def prepare_file(
    reference: str,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows | None = None,
    *,
    log: LogFunction = ignore_line,
    images: ImagePlacer | None = None,
) -> tuple[RowView, PreparationReport]:
    """Read and tokenize one file as evaluation data, with all rows including duplicates.

    The settings ``train``, ``eval``, ``duplicates``, ``group`` and ``rows`` are ignored.

    Args:
        bad: Collects unusable rows.
        images: See :class:`deltaw.data.templates.Encoder`.

    Raises:
        UserError: if the data cannot be used. The message names the file and the row.
    """
    settings = replace(settings, rows=None, group=None)
    bad = BadRows(settings.bad_rows) if bad is None else bad
    read = read_stored([MixtureSource(reference)], settings, tokenizer, bad, log=log, images=images)
    examples = RowView(read.rows, np.arange(len(read.rows)))
    return examples, with_eval_counts(examples, read.report, read.rows.keys())


@dataclass(frozen=True)
class TextReader:
    """Reader for causal language models, see :class:`deltaw.data.row_reader.Reader`.

    Attributes:
        folder: Model folder, which defines the tokens that end a text.
        bad: Collects the unusable rows of :meth:`file`, or None.
        images: See :class:`deltaw.data.templates.Encoder`.
    """

    settings: DataSettings
    tokenizer: PreTrainedTokenizerBase
    folder: Path | None = None
    log: LogFunction = ignore_line
    bad: BadRows | None = None
    images: ImagePlacer | None = None

    def prepare(self, seed: int = 0) -> RunData:
        return prepare(self.settings, self.tokenizer, seed=seed, log=self.log, images=self.images)

    def file(self, reference: str) -> tuple[RowView, PreparationReport]:
        return prepare_file(reference, self.settings, self.tokenizer, self.bad, log=self.log, images=self.images)

    def check(self, eval_files: Sequence[str]) -> DataCheck:
        settings = self.settings
        tokenizer = self.tokenizer
        end_tokens = terminators_in(self.folder, tokenizer) if self.folder else [int(tokenizer.eos_token_id)]
        names = {end: str(tokenizer.convert_ids_to_tokens(end)) for end in end_tokens}
        collect = functools.partial(
            collect_statistics, settings=settings, tokenizer=tokenizer, end_tokens=end_tokens, images=self.images
        )
        statistics = collect(settings.train)
        eval_sets = [(name, collect(name)) for name in eval_files]
        return build_check(statistics, settings, format_sources(settings.train), end_names=names, eval_sets=eval_sets)

    def rows(self, bad: BadRows) -> Iterator[RowPreview]:
        settings = self.settings
        encoder = Encoder(self.tokenizer, settings.template, settings.labels, settings.date, self.images)
        for source in sources_of(settings.train):
            stream = open_source(source.reference, bad.add, max_bytes=settings.max_row_bytes)
            stream.scan()
            source_settings = replace(settings, columns=settings.columns if source.columns is None else source.columns)
            for chunk in stream.chunks():
                form = choose_form(chunk, source.form or settings.form, source_settings.columns)
                for index in range(len(chunk)):
                    yield self._row(encoder, form, source_settings, chunk, index)

    def _row(
        self, encoder: Encoder, form: RowFormat, settings: DataSettings, rows: NumberedRows, index: int
    ) -> RowPreview:
        rejects_long = settings.long_rows == "error"
        bad = BadRows("skip")
        reader = ChunkReader(encoder, form, replace(settings, max_length=UNLIMITED) if rejects_long else settings, bad)
        (examples,) = reader.read(rows, [index])
        previews = []
        for example in examples:
            parts = tuple(token_spans(example.tokens, example.is_label, self.tokenizer))
            previews.append(ExamplePreview(len(example), example.label_count, parts))
        action = "refused" if settings.bad_rows == "error" else "skipped"
        notes = [f"{action}: {line['error']}" for line in bad.lines()]
        if any(len(example) > settings.max_length for example in examples):
            notes.append(f"refused: longer than data.max_length ({settings.max_length:,} tokens)")
        notes += _notes_of(reader.account, settings.max_length)
        return RowPreview(rows.number(index), rows.row_location(index), tuple(previews), tuple(notes))


def encode_prompt(
    prompt: str | list[dict[str, object]],
    settings: DataSettings | TemplateName,
    tokenizer: PreTrainedTokenizerBase,
    *,
    images: ImagePlacer | None = None,
    image_folder: RowFolder = NO_FOLDER,
    attached: Sequence[object] = (),
) -> np.ndarray:
    """Return the (length,) int32 tokens of ``prompt``, rendered as in training.

    Args:
        prompt: A question, or a conversation that ends with one.
        settings: Data settings of the run, or "auto", "chat" or "plain".
        tokenizer: Tokenizer of the model.
        images: See :class:`deltaw.data.templates.Encoder`.
        image_folder: Folder of relative paths of images. By default, paths are rejected.
        attached: Images as in the column ``images`` of a row. Without any, markers in the prompt are ordinary text.

    Raises:
        UserError: if the conversation is out of order, the template rejects it, or an image cannot be read.
    """
    if isinstance(settings, DataSettings):
        template: TemplateName = "plain" if settings.form == "text" else settings.template
        date = settings.date
    else:
        template = settings
        date = None
    location = "the prompt"
    encoder = Encoder(tokenizer, template, date=date, images=images)
    if images is None and attached:
        hint = "use a vision-language model, or remove the images"
        raise UserError("the model reads text only", location=location, hint=hint)
    if images is not None and not attached:
        prompt = without_markers(prompt, images)
    row: Row = {"prompt" if isinstance(prompt, str) else "messages": prompt, "images": attached}
    row, row_images = (row, ()) if images is None else take_images(row, image_folder, location)
    messages = str(row["prompt"]) if "prompt" in row else read_prompt(row["messages"], location)
    return np.asarray(encoder.prompt(messages, images=row_images), dtype=np.int32)


def _notes_of(account: Account, limit: int) -> list[str]:
    """Return remarks about a row, derived from its counts."""
    notes = {
        "unrolled": "{unrolled_examples} examples, since the template rewrites earlier turns",
        "split": "divided into {split_examples} examples of at most {limit:,} tokens",
        "cut": "truncated to {limit:,} tokens: {tokens_cut:,} lost, {labels_cut:,} of them labels",
        "dropped_long": "dropped: longer than data.max_length ({limit:,} tokens), {labels_dropped:,} labels lost",
        "without_label": "dropped: no label",
        "trailing_turns": "truncated after the assistant's last turn",
    }
    counts = Counter({**account, "limit": limit})
    return [note.format_map(counts) for name, note in notes.items() if account[name]]


_WEIGHING = 3  # selects a random stream of the data seed


def apply_weights(rows: np.ndarray, source_of: np.ndarray, weights: Sequence[float], seed: int) -> np.ndarray:
    """Return the rows of an epoch: rows of a source with weight 2 twice, half of the rows of a source with weight 0.5.

    Args:
        rows: (n,) indices of the training rows, ascending.
        source_of: (n,) source of each row.
        weights: Weight of each source.
        seed: Seed for sampling fractions. The sample is the same in all epochs.

    Returns:
        Ascending indices, repeated as often as they occur in an epoch.
    """
    if all(weight == 1 for weight in weights):
        return rows
    random = np.random.default_rng([seed % 2**64, _WEIGHING])
    parts = []
    for number, weight in enumerate(weights):
        source_rows = rows[source_of == number]
        repeats = math.floor(weight)
        num_sampled = round((weight - repeats) * len(source_rows))
        parts += [np.repeat(source_rows, repeats), random.choice(source_rows, size=num_sampled, replace=False)]
    return np.sort(np.concatenate(parts))
