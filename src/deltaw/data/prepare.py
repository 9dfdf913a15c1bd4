"""A data set becomes examples: read, rendered, limited in length, deduplicated, and split.

Rows go through in chunks: none of this needs more memory for more rows, beside a few numbers for each. The
report counts every row that is skipped, truncated or dropped. This module does not know batches, packing or
training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.check import Check, check_facts, collect
from deltaw.data.chunk import Account, ChunkReader
from deltaw.data.formats import Form, choose_form
from deltaw.data.messages import read_prompt
from deltaw.data.mixture import Source, shown, sources_of, weighted
from deltaw.data.pieces import pieces
from deltaw.data.report import BadRows, Report, Say, silent
from deltaw.data.row_reader import UNLIMITED, RunData, ShownExample, ShownRow
from deltaw.data.row_store import RowView
from deltaw.data.rows import Rows
from deltaw.data.settings import DataSettings
from deltaw.data.sources import divide, evaluated, open_source, skipping_named
from deltaw.data.stored_rows import read_stored
from deltaw.data.templates import Encoder, TemplateName
from deltaw.hub.terminators import terminators_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@skipping_named()
def prepare(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, say: Say = silent) -> RunData:
    """Read and render the data of a run.

    Args:
        settings: the ``data:`` section.
        tokenizer: of the model to be trained.
        seed: for choosing rows (``rows``), holding rows out, and drawing fractions of a source.
        say: told how far a long reading is.

    Raises:
        UserError: the data cannot be used; the message names the file and the row.
    """
    sources = sources_of(settings.train)
    bad = BadRows(settings.bad_rows)
    read = read_stored(sources, settings, tokenizer, bad, seed=seed, say=say)
    ordinals = read.rows.ordinals()

    def read_apart(reference: str) -> tuple[RowView, np.ndarray, Report]:
        held_out, evaluation = prepare_file(reference, settings, tokenizer, bad, say=say)
        return held_out, held_out.store.keys(), evaluation

    train, held_out, report = divide(
        RowView(read.rows, np.arange(len(read.rows))),
        read.rows.keys(),
        read.rows.groups(),
        replace(read.report, source=shown(settings.train)),
        settings,
        seed=seed,
        read_apart=read_apart,
        linked=ordinals if (np.diff(ordinals) == 0).any() else None,  # examples that one row became
        weigh=lambda places: weighted(places, read.source_of(places), [source.weight for source in sources], seed),
    )
    if len(sources) > 1:
        places = train.places  # type: ignore[attr-defined]
        counts = np.bincount(read.source_of(places), minlength=len(sources)).tolist()
        told = zip(sources, counts, strict=True)
        by_source = {source.reference: {"weight": source.weight, "rows": count} for source, count in told}
        report = replace(report, sources=by_source)
    return RunData(train, held_out, report, bad)


@skipping_named()
def prepare_file(
    reference: str,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows | None = None,
    *,
    say: Say = silent,
) -> tuple[RowView, Report]:
    """Read and render one file as evaluation data, with all its rows, duplicates included.

    It ignores ``train``, ``eval``, ``duplicates``, ``group`` and ``rows`` of ``settings``.

    Args:
        bad: also told of rows that cannot be used.

    Raises:
        UserError: the data cannot be used; the message names the file and the row.
    """
    settings = replace(settings, rows=None, group=None)
    bad = BadRows(settings.bad_rows) if bad is None else bad
    read = read_stored([Source(reference)], settings, tokenizer, bad, say=say)
    examples = RowView(read.rows, np.arange(len(read.rows)))
    return examples, evaluated(examples, read.report, read.rows.keys())


@dataclass(frozen=True)
class TextReader:
    """The rows of a causal model, see :class:`deltaw.data.row_reader.Reader`.

    Args:
        folder: of the model, which names the tokens that end a text.
    """

    settings: DataSettings
    tokenizer: PreTrainedTokenizerBase
    folder: Path | None = None
    say: Say = silent

    def prepared(self, seed: int = 0) -> RunData:
        return prepare(self.settings, self.tokenizer, seed=seed, say=self.say)

    def file(self, reference: str) -> tuple[RowView, Report]:
        return prepare_file(reference, self.settings, self.tokenizer, say=self.say)

    def check(self, apart: Sequence[str]) -> Check:
        settings, tokenizer = self.settings, self.tokenizer
        ends = terminators_in(self.folder, tokenizer) if self.folder else [int(tokenizer.eos_token_id)]
        names = {end: str(tokenizer.convert_ids_to_tokens(end)) for end in ends}
        facts = collect(settings.train, settings, tokenizer, ends)
        held_out = [(name, collect(name, settings, tokenizer, ends)) for name in apart]
        return check_facts(facts, settings, shown(settings.train), end_names=names, held_out=held_out)

    def rows(self, bad: BadRows) -> Iterator[ShownRow]:
        settings = self.settings
        encoder = Encoder(self.tokenizer, settings.template, settings.labels, settings.date)
        for source in sources_of(settings.train):
            stream = open_source(source.reference, bad.add, max_bytes=settings.max_row_bytes)
            stream.scan()
            own = replace(settings, columns=settings.columns if source.columns is None else source.columns)
            for chunk in stream.chunks():
                form = choose_form(chunk, source.form or settings.form, own.columns)
                for index in range(len(chunk)):
                    yield self._row(encoder, form, own, chunk, index)

    def _row(self, encoder: Encoder, form: Form, settings: DataSettings, rows: Rows, index: int) -> ShownRow:
        refuses, bad = settings.long_rows == "error", BadRows("skip")
        reader = ChunkReader(encoder, form, replace(settings, max_length=UNLIMITED) if refuses else settings, bad)
        (examples,) = reader.read(rows, [index])
        found = []
        for example in examples:
            parts = tuple(pieces(example.tokens, example.is_label, self.tokenizer))
            found.append(ShownExample(len(example), example.label_count, parts))
        done = "refused" if settings.bad_rows == "error" else "skipped"
        notes = [f"{done}: {line['error']}" for line in bad.lines()]
        if any(len(example) > settings.max_length for example in examples):
            notes.append(f"refused: longer than data.max_length ({settings.max_length:,} tokens)")
        notes += _notes_of(reader.account, settings.max_length)
        return ShownRow(rows.number(index), rows.place(index), tuple(found), tuple(notes))


def encode_prompt(
    prompt: str | list[dict[str, object]],
    settings_or_template: DataSettings | TemplateName,
    tokenizer: PreTrainedTokenizerBase,
) -> np.ndarray:
    """The tokens of ``prompt``, rendered as in training, for a model to answer: int32 (length,).

    Args:
        prompt: a question, or a conversation that ends with one.
        settings_or_template: the run's data settings, or "auto", "chat" or "plain".
        tokenizer: of the model.

    Raises:
        UserError: the conversation is out of order, or the template does not take it.
    """
    settings = settings_or_template
    if isinstance(settings, DataSettings):
        template: TemplateName = "plain" if settings.form == "text" else settings.template
        date = settings.date
    else:
        template, date = settings, None
    messages = prompt if isinstance(prompt, str) else read_prompt(prompt, "the prompt")
    return np.asarray(Encoder(tokenizer, template, date=date).prompt(messages), dtype=np.int32)


def _notes_of(account: Account, limit: int) -> list[str]:
    """What is said of a row by what became of it."""
    notes = {
        "unrolled": "{unrolled_examples} examples, since the template rewrites earlier turns",
        "split": "divided into {split_examples} examples of at most {limit:,} tokens",
        "cut": "truncated to {limit:,} tokens: {tokens_cut:,} lost, {labels_cut:,} of them labels",
        "dropped_long": "dropped: longer than data.max_length ({limit:,} tokens), {labels_dropped:,} labels lost",
        "without_label": "dropped: no label",
        "trailing_turns": "truncated after the assistant's last turn: nothing answers what follows",
    }
    counts = Counter({**account, "limit": limit})
    return [note.format_map(counts) for name, note in notes.items() if account[name]]
