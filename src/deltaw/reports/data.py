"""Format the results of `deltaw data` commands: data checks, rendered rows and mined negatives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rich.text import Text

from deltaw.data.check import DataCheck, Lengths
from deltaw.data.report import class_counts_line, label_number_lines
from deltaw.reports.tables import wrap_line

# Width of the longest bar in characters, and the last character of a bar by eighths.
_WIDTH = 36
_EIGHTHS = " ▏▎▍▌▋▊▉"
_STYLES = {"error": "red", "warning": "yellow", "note": "default"}
_VERDICTS = {
    "fine": ("no problems found", "green"),
    "warnings": ("the data can be trained on; review the warnings first", "yellow"),
    "unusable": ("training would fail or learn nothing", "red"),
}


def check_lines(check: DataCheck) -> Iterator[Text]:
    """Yield the lines of a data check, at most 80 columns wide except for user text."""
    template = f" ({check.template} template)" if check.template else ""
    yield Text(f"{check.source}: {check.rows:,} rows read as {check.form}{template}")
    if check.label_tokens is not None and check.tokens:
        labels = f"{check.label_tokens:,} of them labels ({check.label_tokens / check.tokens:.1%})"
        yield Text(f"{check.examples:,} examples: {check.tokens:,} tokens, {labels}")
    if check.class_counts:
        yield Text(wrap_line(class_counts_line(check.class_counts)))
    yield from map(Text, map(wrap_line, label_number_lines(check.label_numbers)))
    if check.ends:
        endings = [f"{name} in {count:,} examples" for name, count in check.ends.items()]
        yield Text(wrap_line(f"examples end with {', '.join(endings)}"))
    if check.lengths is not None:
        yield from _length_lines(check.lengths)
    for finding, following in itertools.zip_longest(check.findings, check.findings[1:]):
        is_single = finding.name == "bad_rows" and finding.count == 1  # the row's line already contains the reason
        text = finding.rows[0].removeprefix(f"{check.source}, ") if is_single else finding.text
        line = Text(wrap_line(f"{finding.level}: {text}"))
        line.stylize(_STYLES[finding.level], 0, len(finding.level) + 1)
        yield line
        for row in finding.rows[is_single:]:
            yield Text(wrap_line(f"  {row}"), style="dim")
        if finding.hint and (following is None or following.hint != finding.hint):
            yield Text(wrap_line(f"  hint:  {finding.hint}"))
    verdict, style = _VERDICTS[check.verdict]
    yield Text(f"{check.verdict}: {verdict}", style=style)


def _length_lines(lengths: Lengths) -> Iterator[Text]:
    yield Text(
        f"tokens: {lengths.shortest:,} to {lengths.longest:,}, median {lengths.median:,}, "
        f"mean {lengths.mean:,}, 95 % up to {lengths.p95:,}"
    )
    largest = max(count for _, _, count in lengths.bins)
    labels = [f"{low:,} – {high:,}" if high > low else f"{low:,}" for low, high, _ in lengths.bins]
    width = max(map(len, labels))
    for label, (_, _, count) in zip(labels, lengths.bins, strict=True):
        if count:
            yield Text(f"  {label:>{width}}  {_bar(count / largest)} {count:,}")


def _bar(share: float) -> str:
    full, eighths = divmod(max(int(share > 0), round(share * _WIDTH * 8)), 8)
    return "█" * full + (_EIGHTHS[eighths] if eighths else "")
