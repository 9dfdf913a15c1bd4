"""A data set becomes examples: read, rendered, limited in length, deduplicated, and split.

The report counts every row that is skipped, truncated or dropped. This module does not know batches, packing
or training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.bad_rows import BadRows
from deltaw.data.chunk import ChunkReader
from deltaw.data.example import Example
from deltaw.data.formats import choose_form, unused_columns
from deltaw.data.messages import read_prompt
from deltaw.data.report import Report
from deltaw.data.settings import DataSettings
from deltaw.data.sources import Rows, read_rows
from deltaw.data.split import check_group, choose, divide, evaluated, groups_of
from deltaw.data.templates import Encoder, TemplateName
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 4096  # rows tokenized at once: enough for all of the tokenizer's threads, few enough for memory


@dataclass(frozen=True)
class Prepared:
    """Examples to train on, examples held out for evaluation, and the report on all rows."""

    train: list[Example]
    held_out: list[Example]
    report: Report
    skipped: BadRows


def prepare(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> Prepared:
    """Read and render the data of a run.

    Args:
        settings: the ``data:`` section.
        tokenizer: of the model to be trained.
        seed: for choosing rows (``rows``) and holding rows out.

    Raises:
        UserError: the data cannot be used; the message names the file and the row.
    """
    encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date)
    rows = read_rows(settings.train)
    check_group(rows, settings.group)
    chosen = choose(len(rows), settings.rows, seed)
    bad = BadRows(settings.bad_rows)
    examples, kept, report = _examples(rows, chosen, settings, encoder, bad)
    train, held_out, report = divide(
        examples,
        groups_of(rows, kept, settings.group),
        report,
        settings,
        seed=seed,
        key=_key,
        read_apart=lambda reference: prepare_file(reference, settings, tokenizer),
    )
    return Prepared(train, held_out, report, bad)


def prepare_file(
    reference: str, settings: DataSettings, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], Report]:
    """Read and render one file as evaluation data, with all its rows, duplicates included.

    It ignores ``train``, ``eval``, ``duplicates`` and ``rows`` of ``settings``.

    Raises:
        UserError: the data cannot be used; the message names the file and the row.
    """
    encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date)
    rows = read_rows(reference)
    bad = BadRows(settings.bad_rows)
    examples, _, report = _examples(rows, range(len(rows)), settings, encoder, bad)
    return examples, evaluated(examples, report, _key)


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


def _examples(
    rows: Rows, chosen: Sequence[int], settings: DataSettings, encoder: Encoder, bad: BadRows
) -> tuple[list[Example], list[int], Report]:
    """The rows at ``chosen`` as examples of at most ``max_length`` tokens that have labels, and their indices
    in ``rows``."""
    form = choose_form(rows, settings.form, settings.columns)
    template = "plain" if form.name == "text" else encoder.template
    reader = ChunkReader(encoder, form, settings, bad)
    examples: list[Example] = []
    kept: list[int] = []
    for start in range(0, len(chosen), _CHUNK):
        indices = chosen[start : start + _CHUNK]
        for index, found in zip(indices, reader.read(rows, indices), strict=True):
            examples += found
            kept += [index] * len(found)
    reader.check()
    account = reader.account
    if not examples:
        raise _nothing_left(rows, account.dropped_long, account.without_label)
    unused = unused_columns(rows, form, settings.columns)
    return (
        examples,
        kept,
        Report(
            source=rows.name,
            form=form.name,
            template=template,
            rows_read=len(rows),
            rows_kept=len(examples),
            not_chosen=len(rows) - len(chosen),
            bad_rows=dict(bad.counts),
            **account.as_dict(),
            unused_columns=tuple(column for column in unused if column != settings.group),
        ),
    )


def _key(example: Example) -> bytes:
    """Equal for duplicates: rows with the same tokens and labels."""
    digest = hashlib.blake2b(example.tokens.tobytes(), digest_size=16)
    digest.update(np.packbits(example.is_label).tobytes())
    return digest.digest()


def _nothing_left(rows: Rows, dropped: int, without_label: int) -> UserError:
    return UserError(
        f"no row is left to train on: {dropped:,} are too long, and {without_label:,} have no label",
        where=rows.name,
        hint="raise data.max_length, or check the answers: empty and truncated ones have no label",
    )
