"""Statistics of rows for data checks. Texts are stored as 8-byte hashes, so that each example takes about 50 bytes."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.bad_rows import BadRowError, BadRows
from deltaw.data.data_findings import MAX_LOCATIONS
from deltaw.data.example import Example, special_tokens
from deltaw.data.formats import Pair, Record, RowFormat, Text, choose_form, read_records, unused_columns, with_system
from deltaw.data.long_rows import would_split_image
from deltaw.data.report import LabelNumbers
from deltaw.data.row_images import MARKER, ImagePlacer
from deltaw.data.row_selection import ReadResult
from deltaw.data.rows import NumberedRows
from deltaw.data.sources import open_source
from deltaw.data.templates import Encoder
from deltaw.settings.data import DataSettings
from deltaw.settings.mixture import Train, sources_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Unicode replacement character, written by a decoder in place of invalid bytes.
_REPLACEMENT = "\ufffd"
_NO_LETTERS = re.compile(r"[\W_]+")

# Per example: row number, token count, label count and number of labels beyond ``data.max_length`` (lost). Hashes of
# tokens and labels (key), of the prompt (0 if it is empty), of the answer, and of the text without case, spacing and
# punctuation (text). Items of other rows have their content in place of a prompt, and their key in place of an answer.
_HASHES = [(name, "u8") for name in ("key", "prompt", "answer", "text")]
_NUMBERS = np.dtype([("row", "i8"), ("length", "i4"), ("labels", "i4"), ("lost", "i4"), *_HASHES])


@dataclass
class DataStatistics:
    """Statistics of the examples of text rows, or of the items of other rows, of one or several sources.

    Attributes:
        form: Row format, as in the preparation report.
        template: Template, as in the preparation report.
        rows: Number of usable rows.
        rows_read: Number of all rows.
        bad: Rows that cannot be used.
        lengths: Numbers of tokens. Empty if rows have no tokens.
        label_tokens: Number of label tokens, or None if rows have one label each.
        class_counts: Number of items of each class.
        label_numbers: Distribution of each target of a regression.
        ends: Number of examples that each end token ends, by its name, or None if rows have one label each.
        read: Rows in memory, if they are kept.
        unrolled: Number of rows that became several examples.
        unused_columns: Columns that are not read.
        end_tokens: For each end token, the number of examples with it as last label.
        num_terminated: Number of examples with an end token as last label.
        remark_locations: Locations of the first rows with each remark.
        counts: Number of rows with each remark.
    """

    form: str = ""
    template: str = ""
    rows: int = 0
    rows_read: int = 0
    bad: BadRows = field(default_factory=lambda: BadRows("skip"))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    label_tokens: int | None = None
    class_counts: Mapping[str, int] = field(default_factory=dict)
    label_numbers: Sequence[LabelNumbers] = ()
    ends: Mapping[str, int] | None = None
    read: ReadResult | None = None
    unrolled: int = 0
    unused_columns: set[str] = field(default_factory=set)
    end_tokens: Counter[int] = field(default_factory=Counter)
    num_terminated: int = 0
    remark_locations: dict[str, list[str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    _numbers: bytearray = field(default_factory=bytearray)
    _starts: list[int] = field(default_factory=list)
    _files: list[str] = field(default_factory=list)

    @property
    def examples(self) -> np.ndarray:
        """Return (n,) records of the examples, see :data:`_NUMBERS`."""
        return np.frombuffer(bytes(self._numbers), _NUMBERS)

    def first_examples(self) -> np.ndarray:
        """Return the indices of the first example of each row."""
        return np.union1d(np.flatnonzero(np.diff(self.examples["row"])) + 1, self._starts).astype(np.int64)

    def locations(self, examples: np.ndarray) -> tuple[str, ...]:
        """Return the locations of the first of these examples."""
        examples = examples[:MAX_LOCATIONS]
        files = [self._files[part - 1] for part in np.searchsorted(self._starts, examples, side="right")]
        rows = self.examples["row"][examples]
        return tuple(dict.fromkeys(f"{file}, row {row}" for file, row in zip(files, rows, strict=True)))

    def duplicates(self) -> np.ndarray:
        """Return the indices of examples with labels that are equal to an earlier one."""
        labeled = np.flatnonzero(self.examples["labels"])
        return labeled[repeated_indices(self.examples["key"][labeled])]

    def contradictions(self) -> tuple[np.ndarray, int]:
        """Return the indices of examples whose prompt has different answers, and the number of these prompts."""
        with_prompt = np.flatnonzero((self.examples["prompt"] != 0) & (self.examples["labels"] > 0))
        prompts = self.examples["prompt"][with_prompt]
        answers = self.examples["answer"][with_prompt]
        order = np.lexsort((answers, prompts))
        same_prompt = prompts[order][1:] == prompts[order][:-1]
        different_answer = answers[order][1:] != answers[order][:-1]
        contradicted = np.unique(prompts[order][1:][same_prompt & different_answer])
        return with_prompt[np.isin(prompts, contradicted)], len(contradicted)

    def add_remark(self, remark: str, location: str) -> None:
        """Count a row with a remark."""
        self.counts[remark] += 1
        locations = self.remark_locations.setdefault(remark, [])
        if len(locations) < MAX_LOCATIONS:
            locations.append(location)

    def add(self, example: Example, location: str, text: int, max_length: int, end_tokens: frozenset[int]) -> None:
        """Add one example.

        Args:
            text: Hash of the normalized text of the row.
            end_tokens: Tokens that end a text.
        """
        tokens = example.tokens
        labels = np.flatnonzero(example.is_label)
        prompt = tokens[: example.prompt_length]
        answer = tokens[example.prompt_length :]
        lengths = len(example), len(labels), int((labels >= max_length).sum())
        key = digest_of(tokens.tobytes(), np.packbits(example.is_label).tobytes())
        hashes = key, digest_of(prompt.tobytes()) if len(prompt) else 0, digest_of(answer.tobytes()), text
        self._append(location.rpartition(", row ")[0], example.row, *lengths, *hashes)
        last = int(tokens[labels[-1]]) if len(labels) else -1
        if last in end_tokens:
            self.num_terminated += 1
            self.end_tokens[last] += 1

    def add_item(self, row: int, file: str, length: int, *, key: bytes, content: bytes) -> None:
        """Add one item of rows that are not text.

        Args:
            key: Bytes that are equal for duplicates.
            content: Bytes that are equal for items that contradict each other if their keys differ.
        """
        key_hash = digest_of(key)
        self._append(file, row, length, 1, 0, key_hash, digest_of(content), key_hash, 0)

    def _append(self, file: str, *numbers: int) -> None:
        if not self._files or self._files[-1] != file:
            self._starts.append(len(self._numbers) // _NUMBERS.itemsize)
            self._files.append(file)
        self._numbers += np.array(numbers, _NUMBERS).tobytes()


def collect_statistics(
    train: Train,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: Sequence[int],
    images: ImagePlacer | None = None,
) -> DataStatistics:
    """Collect statistics of all rows of ``train`` (see ``data.train``), regardless of their length.

    Args:
        end_tokens: Tokens that end a text.
        images: See :class:`deltaw.data.templates.Encoder`.

    Raises:
        UserError: if a file does not exist or cannot be read, or if no format fits its columns.
    """
    statistics = DataStatistics()
    encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date, images)
    names = sorted(set(special_tokens(tokenizer).values()) - {""}, key=len, reverse=True)
    names = [name for name in names if len(name) > 2]  # shorter ones occur in ordinary text
    special = re.compile("|".join(map(re.escape, names))) if names else None
    for source in sources_of(train):
        stream = open_source(source.reference, statistics.bad.add, max_bytes=settings.max_row_bytes)
        stream.scan()
        columns = settings.columns if source.columns is None else source.columns
        form: RowFormat | None = None
        for chunk in stream.chunks():
            form = form or choose_form(chunk, source.form or settings.form, columns)
            statistics.form = form.name
            statistics.unused_columns |= {*unused_columns(stream, form, columns, images=images is not None)}
            statistics.template = "plain" if form.name == "text" else encoder.template
            encoded = _encode_chunk(chunk, form, columns, settings.system, encoder, statistics.bad)
            for location, record, examples in encoded:
                statistics.rows += 1
                statistics.unrolled += len(examples) > 1
                divided = any(would_split_image(example.tokens, settings, images) for example in examples)
                remarks = ["no_image"] * (images is not None and not getattr(record, "images", ()))
                for remark in (*_remarks(record, special), *remarks, *(["divided_image"] if divided else [])):
                    statistics.add_remark(remark, location)
                text = "\0".join(text for text, _ in _texts_of(record))
                normalized = _NO_LETTERS.sub(" ", text.casefold()).strip().encode("utf-8", "replace")
                text_hash = digest_of(normalized, *(b"" if images is None else _image_ids(e, images) for e in examples))
                for example in examples:
                    statistics.add(example, location, text_hash, settings.max_length, frozenset(end_tokens))
    statistics.rows_read = statistics.rows + len(statistics.bad)
    statistics.lengths = statistics.examples["length"]
    statistics.label_tokens = int(statistics.examples["labels"].sum())
    return statistics


def _image_ids(example: Example, images: ImagePlacer) -> bytes:
    return example.tokens[example.tokens >= images.first_id].tobytes()


def _encode_chunk(
    rows: NumberedRows, form: RowFormat, columns: Mapping[str, str], system: str | None, encoder: Encoder, bad: BadRows
) -> Iterator[tuple[str, Record, list[Example]]]:
    """Yield the location, the record and the examples of each usable row."""
    locations = [rows.row_location(index) for index in range(len(rows))]
    rejected: set[int] = set()

    def on_bad(index: int, error: BadRowError) -> None:
        rejected.add(index)
        bad.add(error, rows[index][1])

    with_images = encoder.images is not None
    read = read_records(rows, range(len(rows)), form, columns, on_bad, images=with_images)
    records = [with_system(record, system) for record in read]
    for index, (record, parts) in enumerate(zip(records, encoder.encode(records, locations, on_bad), strict=True)):
        if record is not None and index not in rejected:
            yield locations[index], record, [part.example(rows.number(index)) for part in parts]


def _texts_of(record: Record) -> list[tuple[str, bool]]:
    """Return the texts of a record, each with True if it is an answer."""
    if isinstance(record, Text):
        return [(record.text, False)]
    if isinstance(record, Pair):
        return [(record.system or "", False), (record.prompt, False), (record.completion, True)]
    return [(str(m["content"]), m["role"] == "assistant") for m in record.messages]


def _remarks(record: Record, special: re.Pattern[str] | None) -> list[str]:
    """Return the names of the findings that apply to a record.

    Args:
        special: Matches special tokens in text.
    """
    texts = _texts_of(record)
    remarks = []
    if getattr(record, "images", ()):
        texts = [(text.replace(MARKER, ""), is_answer) for text, is_answer in texts]
    if not any(text.strip() for text, _ in texts):
        remarks.append("blank")
    answers = [text for text, is_answer in texts if is_answer]
    calls = any(m.get("tool_calls") for m in getattr(record, "messages", ()))
    if answers and not calls and not any(c.isalnum() for c in answers[-1]):
        remarks.append("empty_answer" if not answers[-1].strip() else "answer_without_letters")
    if any(_REPLACEMENT in text for text, _ in texts):
        remarks.append("lost_characters")
    if special and any(special.search(text) for text, _ in texts):
        remarks.append("special_tokens_in_text")
    return remarks


def digest_of(*parts: bytes) -> int:
    """Return a 64-bit hash that is never 0."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") or 1


def repeated_indices(keys: np.ndarray) -> np.ndarray:
    """Return the indices of keys that occurred before, in ascending order."""
    return np.setdiff1d(np.arange(len(keys)), np.unique(keys, return_index=True)[1])
