"""What became of the rows of a data set: every row that was read is accounted for.

Counts only; it knows neither files nor tokenizers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """The account of one preparation.

    ``rows_read = not_chosen + dropped_long + without_label + other_classes + rows_kept``, plus ``duplicates``
    where they were left out (not ``duplicates_kept``), plus ``held_out`` where those rows were drawn from the
    same file (``held_out_source`` is None).

    Attributes:
        source: the reference that the rows came from.
        form: what the rows were read as, such as "messages".
        template: "chat" or "plain"; empty for labelled rows, which no template renders.
        rows_read: rows in the file.
        not_chosen: rows skipped because ``data.rows`` asked for fewer.
        rows_kept: rows that are trained on (or evaluated, for an evaluation file).
        cut: kept rows that lost their end because of ``max_length``; ``tokens_cut`` is what they lost.
        dropped_long: rows left out because they are longer than ``max_length``.
        without_label: rows left out because nothing in them is to be learned.
        duplicates: rows with the same tokens and labels as an earlier one.
        duplicates_kept: whether those are kept all the same, as they are in an evaluation file.
        trailing_turns: rows that end with a turn that is not the assistant's; those turns are left out.
        held_out: rows kept from training for evaluation.
        held_out_source: the file that they came from; None where they were drawn from the training file.
        overlap: held-out rows that are in the training rows too; only a separate file can have any.
        tokens: tokens of the kept rows; ``label_tokens`` of them are predicted in the loss.
        longest: tokens of the longest row, kept or held out.
        group: the column whose value keeps rows together, where rows were drawn apart by it.
        groups: groups that are trained on; ``held_out_groups`` others are held out.
        class_counts: kept rows of each class, in the order of the classes; empty where there are none.
        other_classes: rows left out because their class is none of ``data.classes``.
        image_sizes: smallest and largest height and width of the images, where they differ.
        other_files: files of an image folder that are no images.
        unused_columns: columns of the file that nothing was taken from.
        evaluation: the account of the separate evaluation file, where there is one.
    """

    source: str
    form: str
    template: str
    rows_read: int
    rows_kept: int
    not_chosen: int = 0
    cut: int = 0
    tokens_cut: int = 0
    dropped_long: int = 0
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
    other_classes: int = 0
    image_sizes: tuple[int, int, int, int] | None = None
    other_files: int = 0
    unused_columns: tuple[str, ...] = ()
    evaluation: Report | None = None

    def lines(self) -> list[str]:
        """The account for a person: totals always, losses only where there are any."""
        template = f" ({self.template} template)" if self.template else ""
        sizes = f": {self.tokens:,} tokens"
        sizes += f", {self.label_tokens:,} of them labels" if self.template else ""
        sizes += f"; the longest row has {self.longest:,} tokens"
        lines = [
            f"{self.source}: {_rows(self.rows_read)} read as {self.form}{template}",
            f"{_rows(self.rows_kept)} kept" + ("" if self.form == "labelled images" else sizes),
        ]
        if self.held_out:
            origin = f"from {self.held_out_source}" if self.held_out_source else "drawn from the same file"
            lines.append(f"{_rows(self.held_out)} held out for evaluation, {origin}")
        lines += self._lines_of_labels()
        losses = [
            (self.not_chosen, "left aside, since data.rows asks for fewer"),
            (
                self.duplicates,
                "the same as an earlier row, " + ("kept" if self.duplicates_kept else "left out"),
            ),
            (self.dropped_long, "left out, longer than data.max_length"),
            (self.other_classes, "left out, of a class that is none of data.classes"),
            (self.without_label, "left out, with nothing to learn (an empty answer, or all of it cut)"),
            (self.cut, f"cut at data.max_length, {self.tokens_cut:,} tokens lost"),
            (self.trailing_turns, "ending with a turn that no assistant answers; that turn was left out"),
            (self.overlap, "of the evaluation file that are training rows too; the evaluation flatters"),
        ]
        lines += [f"{_rows(count)} {what}" for count, what in losses if count]
        if self.unused_columns:
            lines.append("columns not used: " + ", ".join(self.unused_columns))
        if self.evaluation:
            lines += self.evaluation.lines()
        return lines

    def _lines_of_labels(self) -> list[str]:
        """What concerns groups, classes and images."""
        lines = []
        if self.group:
            lines.append(
                f"rows of one '{self.group}' stay together: {self.groups:,} groups are trained on, "
                f"{self.held_out_groups:,} others held out"
            )
        if self.class_counts:
            shown = [f"{name} {count:,}" for name, count in list(self.class_counts.items())[:12]]
            more = f", and {len(self.class_counts) - 12:,} more" if len(self.class_counts) > 12 else ""
            lines.append(f"{len(self.class_counts)} classes, with their rows: {', '.join(shown)}{more}")
            few = [name for name, count in self.class_counts.items() if count < 2]
            if few and not self.duplicates_kept:
                lines.append(f"with one row or none to learn from: {', '.join(few[:12])}")
        if self.image_sizes:
            low_height, low_width, height, width = self.image_sizes
            lines.append(
                f"images of {low_height}×{low_width} to {height}×{width} pixels; the model's preprocessor "
                "makes them equal"
            )
        if self.other_files:
            what = "file that is no image was" if self.other_files == 1 else "files that are no images were"
            lines.append(f"{self.other_files:,} {what} passed over")
        return lines

    def as_dict(self) -> dict[str, object]:
        """Every count by name, ready for JSON."""
        return dataclasses.asdict(self)


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"
