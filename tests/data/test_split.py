"""Rows that belong together are on one side of the split."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

from hypothesis import given
from hypothesis import strategies as st

from deltaw.data.report import PreparationReport
from deltaw.data.row_selection import ReadResult, group_keys, keys_of, split_rows
from deltaw.data.stored_rows import TextReader
from deltaw.errors import UserError
from deltaw.settings.data import DataSettings
from tests.data.conftest import refusal


@dataclass(frozen=True)
class Row:
    """An example with one label, which duplicates examples of equal content."""

    content: str
    group: object = None
    label_count: ClassVar[int] = 1

    def __len__(self) -> int:
        return 1

    def key(self) -> bytes:
        return self.content.encode()


def split_examples(rows: list[Row], *, seed: int = 3, **settings):
    report = PreparationReport("f", "text", "plain", rows_read=len(rows), rows_kept=len(rows))
    keys = keys_of(rows, Row.key)
    groups = group_keys([row.group for row in rows])
    options = {"seed": seed, "read_eval": lambda name: ReadResult([], keys[:0], None, report)}
    return split_rows(ReadResult(rows, keys, groups, report), DataSettings("f", **settings), **options)


@given(
    st.lists(st.builds(Row, st.text("abc", min_size=1), st.sampled_from([None, 1, 2, 3, 4])), min_size=2),
    st.sampled_from(["drop", "keep"]),
    st.integers(0, 5),
)
def test_duplicates_and_groups_are_on_one_side(rows, duplicates, seed):
    try:
        train, held_out, report = split_examples(rows, seed=seed, eval=0.4, duplicates=duplicates, group="g")
    except UserError as error:
        assert "into one group" in error.message
        return
    for key_of in (Row.key, lambda row: row.group):
        assert not {key_of(row) for row in train} & {key_of(row) for row in held_out} - {None}
    left_out = report.duplicates if duplicates == "drop" else 0
    assert train and len(train) + len(held_out) + left_out == len(rows)


def test_groups_are_not_divided_and_the_share_is_approximated():
    rows = [Row(str(index), index // 5) for index in range(500)]
    train, held_out, report = split_examples(rows, eval=0.2, group="film")
    assert not {row.group for row in train} & {row.group for row in held_out}
    assert (len(held_out), report.group, report.groups, report.held_out_groups) == (100, "film", 80, 20)
    assert "rows with the same 'film' stay together: 80 groups to train on, 20 held out" in report.lines()


def test_large_group_is_selected_only_if_drawn_first():
    sizes = [30, 1, 1, 1, 1]
    rows = [Row(f"{group} {i}", group) for group, size in enumerate(sizes) for i in range(size)]
    for seed, requested in itertools.product(range(8), (1, 2, 3)):
        _, held_out, _ = split_examples(rows, seed=seed, eval=requested, group="g")
        # The group of 30 is selected only if it is drawn first, because the split must not be empty.
        assert len(held_out) == 30 or 1 <= len(held_out) <= requested


def test_single_group_cannot_be_split():
    rows = [Row("a", 1), Row("b", 1), Row("c", 1)]
    assert "'g' links all rows" in refusal(split_examples, rows, eval=0.3, group="g").message


def test_groups_apply_to_text_rows_and_missing_columns_suggest_names(write, tokenizer):
    path = write([{"text": f"line {i}", "film": i // 4} for i in range(40)])
    prepared = TextReader(DataSettings(train=path, eval=0.25, group="film"), tokenizer).prepare()
    sides = [{(example.row - 1) // 4 for example in side} for side in (prepared.train, prepared.held_out)]
    assert not sides[0] & sides[1] and len(prepared.held_out) in (8, 12) and prepared.report.unused_columns == ()
    error = refusal(TextReader(DataSettings(train=path, group="films"), tokenizer).prepare)
    assert "no column 'films'" in error.message and "'film'" in str(error.hint)


def test_ungrouped_split_equals_single_row_groups():
    ungrouped = split_examples([Row(str(i)) for i in range(50)], eval=7)[1]
    single_groups = split_examples([Row(str(i), i) for i in range(50)], eval=7, group="g")[1]
    assert [row.content for row in ungrouped] == [row.content for row in single_groups]
