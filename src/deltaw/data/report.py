"""Row counts of data preparation."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deltaw.data.bad_rows import BadRows
from deltaw.data.class_names import almost_equal_text, merge_setting, similar_text
from deltaw.errors import UserError
from deltaw.progress import Detail
from deltaw.settings.row_kinds import IMAGE_NAME


def class_counts_line(counts: Mapping[str, int]) -> str:
    """Return a line with the number of rows of the first classes."""
    class_counts = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:12])
    more = f", and {len(counts) - 12:,} more" if len(counts) > 12 else ""
    return f"{len(counts)} classes with row counts: {class_counts}{more}"


@dataclass(frozen=True)
class LabelNumbers:
    """Distribution of the numbers of a target."""

    mean: float
    standard_deviation: float
    minimum: float
    maximum: float


def label_number_lines(targets: Sequence[LabelNumbers]) -> list[str]:
    """Return a line about the labels of each target."""
    return [
        f"labels{f' of target {index}' if len(targets) > 1 else ''}: mean {target.mean:.6g}, "
        f"standard deviation {target.standard_deviation:.6g}, from {target.minimum:.6g} to {target.maximum:.6g}"
        for index, target in enumerate(targets, 1)
    ]


@dataclass(frozen=True)
class PreparationReport:
    """Row counts of a data preparation.

    ``rows_read + added`` is the sum of ``not_selected``, ``not_sampled``, ``skipped``, ``dropped_long``,
    ``without_label``, ``other_classes`` and ``rows_kept``, plus ``duplicates`` if they were dropped (not
    ``duplicates_kept``), plus ``held_out`` if those rows are from the same file (``held_out_source`` is None). A row
    that becomes several examples is counted once in ``rows_read``. Its additional examples are in ``added``, and all
    other counts treat each example as a row.

    Attributes:
        source: Reference of the rows.
        form: Row format, for example "messages".
        template: "chat" or "plain". Empty for labeled rows.
        date: Date that the template writes into rows, or None.
        added_prefix: Role header that is added to prompts, see :attr:`deltaw.data.templates.Encoder.added_prefix`.
        rows_read: Number of rows in the file.
        not_selected: Rows skipped because of ``data.rows``.
        rows_kept: Rows to train on, or to evaluate on for an evaluation file.
        bad_rows: Number of skipped unusable rows per reason.
        unrolled: Rows that became several examples (``unrolled_examples``) because the template renders earlier turns
            differently when more turns follow.
        split: Rows longer than ``max_length`` that were divided into ``split_examples`` examples.
        cut: Rows that were truncated to ``max_length``, which removed ``tokens_cut`` tokens.
        labels_cut: Label tokens removed by truncation, including those of rows that lost all labels.
        dropped_long: Rows dropped because they are longer than ``max_length``, with ``labels_dropped`` label tokens.
        without_label: Rows dropped because they have no label.
        duplicates: Rows with the same tokens and labels as an earlier one.
        duplicates_kept: True if duplicates are used, as in an evaluation file.
        trailing_turns: Rows with turns after the last assistant turn. These turns are dropped.
        held_out: Rows held out for evaluation.
        held_out_source: File of the held-out rows, or None if they are from the training file.
        overlap: Rows of a separate evaluation file that are also training rows.
        tokens: Tokens of the training rows, of which ``label_tokens`` are labels.
        longest: Number of tokens of the longest row, training or evaluation.
        group: Column whose values are not divided between training and evaluation.
        groups: Groups in the training rows. ``held_out_groups`` other groups are held out.
        class_counts: Training rows per class, in the order of the classes. Empty without classes.
        label_numbers: Distribution of each target of a regression. Empty for other tasks.
        other_classes: Rows dropped because their class is not in ``data.classes``.
        matched_labels: Class of each label of an evaluation file that is not a class but almost equal to one.
        image_sizes: Minimum height and width, then maximum height and width of the images. None if all sizes are equal.
        other_files: Files in an image folder that are not images.
        unused_columns: Columns of the file that were not read.
        repeated: Additional occurrences of rows in an epoch because of source weights above 1.
        not_sampled: Rows left out because of a fractional source weight.
        sources: For several sources, the ``weight`` and the ``rows`` per epoch of each reference.
        system: System message of at least 90% of the rows, or None.
        system_rows: Number of rows with a system message.
        evaluation: Report of the separate evaluation file, if any.
    """

    source: str
    form: str
    template: str
    rows_read: int
    rows_kept: int
    not_selected: int = 0
    bad_rows: dict[str, int] = field(default_factory=dict)
    unrolled: int = 0
    unrolled_examples: int = 0
    split: int = 0
    split_examples: int = 0
    cut: int = 0
    tokens_cut: int = 0
    labels_cut: int = 0
    dropped_long: int = 0
    labels_dropped: int = 0
    without_label: int = 0
    duplicates: int = 0
    duplicates_kept: bool = False
    trailing_turns: int = 0
    held_out: int = 0
    held_out_source: str | None = None
    overlap: int = 0
    tokens: int = 0
    label_tokens: int = 0
    longest: int = 0
    group: str | None = None
    groups: int = 0
    held_out_groups: int = 0
    class_counts: dict[str, int] = field(default_factory=dict)
    label_numbers: tuple[LabelNumbers, ...] = ()
    other_classes: int = 0
    matched_labels: dict[str, str] = field(default_factory=dict)
    image_sizes: tuple[int, int, int, int] | None = None
    other_files: int = 0
    unused_columns: tuple[str, ...] = ()
    date: str | None = None
    added_prefix: str | None = None
    repeated: int = 0
    not_sampled: int = 0
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    system: str | None = None
    system_rows: int = 0
    evaluation: PreparationReport | None = None

    @property
    def skipped(self) -> int:
        """Return the number of unusable rows."""
        return sum(self.bad_rows.values())

    @property
    def added(self) -> int:
        """Return the number of examples in addition to one per row."""
        return self.unrolled_examples - self.unrolled + self.split_examples - self.split

    def lines(self) -> list[str]:
        """Return the report as text lines: totals, and other counts if they are not zero."""
        template = f" ({self.template} template)" if self.template else ""
        sizes = f": {self.tokens:,} tokens"
        sizes += f", {self.label_tokens:,} of them labels" if self.template else ""
        sizes += f"; the longest row has {self.longest:,} tokens"
        origin = f" from {self.held_out_source}" if self.held_out_source else ""
        held_out = f", {self.held_out:,} held out{origin}" if self.held_out else ""
        lines: list[str] = [
            f"rows: {self.rows_read:,} read from {self.source}, {self.rows_kept:,} kept{held_out}",
            Detail(f"read as {self.form}{template}" + ("" if self.form == "labeled images" else sizes)),
            *self._lines_of_labels(),
        ]
        if self.system and not self.duplicates_kept:
            lines.append(f"system prompt, stored with the run: {quoted(self.system, 36)}")
        unrolled = f"became {self.unrolled_examples:,} examples, since the template rewrites earlier turns"
        action = "kept" if self.duplicates_kept else "dropped"
        lost_tokens = f"{self.tokens_cut:,} tokens lost, {self.labels_cut:,} of them labels"
        split = f"{self.split_examples:,} examples; no label is lost"
        losses = [
            (self.unrolled, f"{unrolled}: each turn is trained as it is written"),
            (self.split, f"longer than data.max_length became {split}"),
            (self.skipped, f"skipped: {', '.join(self.bad_rows)}"),
            (self.not_selected, "skipped: data.rows asks for fewer"),
            (self.duplicates, f"{action}: the same as an earlier row"),
            (self.dropped_long, f"dropped: longer than data.max_length ({self.labels_dropped:,} labels lost)"),
            (self.other_classes, "dropped: their class is not in data.classes"),
            (self.without_label, "dropped: no label (an empty or completely truncated answer)"),
            (self.cut, f"truncated to data.max_length: {lost_tokens}"),
            (self.trailing_turns, "truncated after the assistant's last turn"),
            (self.repeated, "more in an epoch: their source has a weight above 1"),
            (self.not_sampled, "left out: their source has a fractional weight"),
            (self.overlap, "of the evaluation file are also training rows, which inflates its scores"),
        ]
        lines += [f"{count_of(count)} {description}" for count, description in losses if count]
        for reference, counts in self.sources.items():
            weight = f"weight {counts['weight']:g}, {count_of(int(counts['rows']))} in an epoch"
            lines.append(Detail(f"{reference}: {weight}"))
        if self.date:
            lines.append(Detail(f"the template writes the date into each row: {self.date} (data.date sets it)"))
        if self.added_prefix:
            use = "is added to prompts; other programs need a template that adds it"
            lines.append(f"the chat template ignores add_generation_prompt: {quoted(self.added_prefix, 40)} {use}")
        if self.unused_columns:
            unused = "unused columns: " + ", ".join(self.unused_columns)
            lines.append(unused if any(map(IMAGE_NAME.search, self.unused_columns)) else Detail(unused))
        if self.evaluation:
            lines += replace(self.evaluation, added_prefix=None).lines()[1:]
        return lines

    def _lines_of_labels(self) -> list[str]:
        """Return the lines about groups, classes and images."""
        lines: list[str] = []
        if self.group:
            sides = f"{self.groups:,} groups to train on, {self.held_out_groups:,} held out"
            lines.append(Detail(f"rows with the same '{self.group}' stay together: {sides}"))
        lines += map(Detail, label_number_lines(self.label_numbers))
        if self.class_counts:
            lines.append(Detail(class_counts_line(self.class_counts)))
            rare = [name for name, count in self.class_counts.items() if count < 2]
            if rare and not self.duplicates_kept:
                lines.append(f"classes with fewer than 2 training rows: {', '.join(rare[:12])}")
            if not self.duplicates_kept:
                lines += self._lines_of_similar_classes()
        if self.matched_labels:
            labels = ", ".join(f"{label!r} as {name!r}" for label, name in list(self.matched_labels.items())[:12])
            lines.append(f"labels that are almost equal to a class count as the class: {labels}")
        if self.image_sizes:
            low_height, low_width, height, width = self.image_sizes
            sizes = f"{low_height}×{low_width} to {height}×{width} pixels"
            lines.append(Detail(f"images of {sizes}, resized by the model's preprocessor"))
        if self.other_files:
            noun = "file that is not an image" if self.other_files == 1 else "files that are not images"
            lines.append(f"{self.other_files:,} {noun} skipped")
        return lines

    def _lines_of_similar_classes(self) -> list[str]:
        """Return lines about almost equal or misspelled classes, with the setting that merges them."""
        lines = []
        for text, merged in (almost_equal_text(self.class_counts), similar_text(self.class_counts)):
            if text:
                lines += [text, f"to merge them: {merge_setting(merged)}"]
        return lines

    def as_dict(self) -> dict[str, object]:
        """Return the counts for JSON output."""
        return dataclasses.asdict(self)


def quoted(text: str, max_chars: int) -> str:
    """Return a text in quotes on one line, without control characters, truncated to ``max_chars`` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * max_chars]).split())
    return f'"{line}"' if len(line) <= max_chars else f'"{line[: max_chars - 1].rstrip()}…"'


def count_of(count: int, noun: str = "row") -> str:
    """Return ``1 row`` or ``2 rows``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


# Counts of :class:`PreparationReport` by field name.
Account = Counter[str]
# Number of rows per system message. "" counts rows without one, or with a rare or very long one.
Systems = Counter[str]
# Share of rows that must have the same system message to store it with the run, and its maximum number of characters.
SHARED = 0.9
MAX_SYSTEM_CHARS = 32_768
# Number of system messages that are counted separately, because each row may have another one.
_SYSTEMS = 8


def count_system(systems: Systems, text: str) -> None:
    """Count the system message of one row, which is empty for a row without one."""
    systems[text if text.strip() and len(text) <= MAX_SYSTEM_CHARS else ""] += 1


def frequent(systems: Systems) -> Systems:
    """Return the counts of the most frequent system messages, and count all other rows as ""."""
    most_common = Systems(dict(systems.most_common(_SYSTEMS)))
    most_common[""] += systems.total() - most_common.total()
    return most_common


def shared_system(systems: Systems) -> dict[str, Any]:
    """Return ``system`` and ``system_rows`` of :class:`PreparationReport`."""
    nonempty = Systems({text: count for text, count in systems.items() if text})
    text, count = next(iter(nonempty.most_common(1)), (None, 0))
    return {"system": text if count >= SHARED * systems.total() else None, "system_rows": nonempty.total()}


def no_rows_error(name: str, account: Account, bad: BadRows, skipped: int, hint: str) -> UserError:
    """Return the error for a file without usable rows. It contains the first reason if rows are unusable."""
    long = account["dropped_long"]
    unlabeled = account["without_label"]
    invalid = f", {skipped:,} invalid" if skipped else ""
    message = f"no usable rows: {long:,} too long, {unlabeled:,} without a label{invalid}"
    if skipped and (first := next(bad.lines(), None)) is not None:
        hint = f"correct the rows; the first error is in {first['where']}: {first['error']}"
    return UserError(message, location=name, hint=hint)
