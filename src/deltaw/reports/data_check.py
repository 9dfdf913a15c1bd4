"""The outcome of a check of the data, for a person: a histogram of lengths, the findings, the verdict."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from deltaw.data.check import Check, Finding, Lengths

# Characters of the longest bar, and what a bar may end in, by eighths.
_WIDTH = 36
_EIGHTHS = " ▏▎▍▌▋▊▉"
_STYLES = {"error": "red", "warning": "yellow", "note": "default"}
_VERDICTS = {
    "fine": "no problem was found in this data",
    "warnings": "it can be trained on; look at the warnings first",
    "unusable": "training would fail or be pointless",
}


def check_lines(check: Check) -> Iterator[Text]:
    """All of it, at most 80 columns wide but for the user's own text."""
    template = f" ({check.template} template)" if check.template else ""
    yield Text(f"{check.source}: {check.rows:,} rows read as {check.form}{template}")
    if check.label_tokens is not None and check.tokens:
        share = check.label_tokens / check.tokens
        yield Text(
            f"{check.examples:,} examples: {check.tokens:,} tokens, {check.label_tokens:,} of them labels "
            f"({share:.1%})"
        )
    if check.class_counts:
        shown = [f"{name} {count:,}" for name, count in list(check.class_counts.items())[:12]]
        more = f", and {len(check.class_counts) - 12:,} more" if len(check.class_counts) > 12 else ""
        yield Text(f"{len(check.class_counts)} classes, rows of each: {', '.join(shown)}{more}")
    if check.ends:
        shown = [f"{name} in {count:,} examples" for name, count in check.ends.items()]
        yield Text(f"trained to end with {', '.join(shown)}")
    if check.lengths is not None:
        yield from _length_lines(check.lengths)
    if check.findings:
        yield Text("")
    for finding in check.findings:
        yield from _finding_lines(finding)
    yield Text("")
    yield Text(
        f"{check.verdict}: {_VERDICTS[check.verdict]}",
        style={"fine": "green", "warnings": "yellow", "unusable": "red"}[check.verdict],
    )


def _length_lines(lengths: Lengths) -> Iterator[Text]:
    yield Text(
        f"tokens: {lengths.shortest:,} to {lengths.longest:,}, median {lengths.median:,}, "
        f"mean {lengths.mean:,}, 95 % up to {lengths.p95:,}"
    )
    most = max(count for _, _, count in lengths.bins)
    labels = [f"{low:,} – {high:,}" if high > low else f"{low:,}" for low, high, _ in lengths.bins]
    width = max(map(len, labels))
    for label, (_, _, count) in zip(labels, lengths.bins, strict=True):
        yield Text(f"  {label:>{width}}  {_bar(count / most)} {count:,}")


def _bar(share: float) -> str:
    eighths = round(share * _WIDTH * 8)
    if share > 0:
        eighths = max(1, eighths)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")


def _finding_lines(finding: Finding) -> Iterator[Text]:
    line = Text(f"{finding.level}: ", style=_STYLES[finding.level])
    line.append(finding.text, style="default")
    yield line
    if finding.hint:
        yield Text(f"  hint:  {finding.hint}")
    for row in finding.rows:
        yield Text(f"  {row}", style="dim")
