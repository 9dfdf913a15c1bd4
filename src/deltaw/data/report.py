"""What became of the rows of a data set: every row that was read is accounted for.

Counts only; it knows neither files nor tokenizers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """The account of one preparation.

    ``rows_read = not_chosen + dropped_long + without_label + rows_kept``, plus ``duplicates`` where they were
    left out (not ``duplicates_kept``), plus ``held_out`` where those rows were drawn from the same file
    (``held_out_source`` is None).

    Attributes:
        source: the reference that the rows came from.
        form: what the rows were read as, such as "messages".
        template: "chat" or "plain".
        rows_read: rows in the file.
        not_chosen: rows passed over because ``data.rows`` asked for fewer.
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
    unused_columns: tuple[str, ...] = ()
    evaluation: Report | None = None

    def lines(self) -> list[str]:
        """The account for a person: totals always, losses only where there are any."""
        lines = [
            f"{self.source}: {_rows(self.rows_read)} read as {self.form} ({self.template} template)",
            f"{_rows(self.rows_kept)} kept: {self.tokens:,} tokens, {self.label_tokens:,} of them labels; "
            f"the longest row has {self.longest:,} tokens",
        ]
        if self.held_out:
            origin = f"from {self.held_out_source}" if self.held_out_source else "drawn from the same file"
            lines.append(f"{_rows(self.held_out)} held out for evaluation, {origin}")
        losses = [
            (self.not_chosen, "left aside, since data.rows asks for fewer"),
            (
                self.duplicates,
                "the same as an earlier row, " + ("kept" if self.duplicates_kept else "left out"),
            ),
            (self.dropped_long, "left out, longer than data.max_length"),
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

    def as_dict(self) -> dict[str, object]:
        """Every count by name, ready for JSON."""
        return dataclasses.asdict(self)


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"
