"""Rows that belong together fall on one side, whatever else happens to them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

from hypothesis import given
from hypothesis import strategies as st

from deltaw.data import DataSettings, prepare
from deltaw.data.report import Report
from deltaw.data.sources import divide, group_keys, keys_of
from deltaw.errors import UserError
from tests.data.conftest import refusal


@dataclass(frozen=True)
class Row:
    """An example of one label, which is another's copy where its content is the same."""

    content: str
    group: object = None
    label_count: ClassVar[int] = 1

    def __len__(self) -> int:
        return 1

    def key(self) -> bytes:
        return self.content.encode()


def divided(rows: list[Row], *, seed: int = 3, **settings):
    report = Report("f", "text", "plain", rows_read=len(rows), rows_kept=len(rows))
    keys, groups = keys_of(rows, Row.key), group_keys([row.group for row in rows])
    apart = [], keys[:0], report
    return divide(rows, keys, groups, report, DataSettings("f", **settings), seed=seed, read_apart=lambda name: apart)


@given(
    st.lists(st.builds(Row, st.text("abc", min_size=1), st.sampled_from([None, 1, 2, 3, 4])), min_size=2),
    st.sampled_from(["drop", "keep"]),
    st.integers(0, 5),
)
def test_copies_and_groups_are_never_on_both_sides(rows, duplicates, seed):
    try:
        train, held_out, report = divided(rows, seed=seed, eval=0.4, duplicates=duplicates, group="g")
    except UserError as error:
        assert "into one group" in error.what
        return
    for of in (Row.key, lambda row: row.group):
        assert not {of(row) for row in train} & {of(row) for row in held_out} - {None}
    left_out = report.duplicates if duplicates == "drop" else 0
    assert train and len(train) + len(held_out) + left_out == len(rows)


def test_no_group_is_divided_and_about_the_share_is_held_out():
    rows = [Row(str(index), index // 5) for index in range(500)]
    train, held_out, report = divided(rows, eval=0.2, group="film")
    assert not {row.group for row in train} & {row.group for row in held_out}
    assert (len(held_out), report.group, report.groups, report.held_out_groups) == (100, "film", 80, 20)
    assert "rows with the same 'film' stay together: 80 groups to train on, 20 held out" in report.lines()


def test_a_group_is_held_out_whole_only_where_that_comes_nearer():
    sizes = [30, 1, 1, 1, 1]
    rows = [Row(f"{group} {i}", group) for group, size in enumerate(sizes) for i in range(size)]
    for seed, wanted in itertools.product(range(8), (1, 2, 3)):
        _, held_out, _ = divided(rows, seed=seed, eval=wanted, group="g")
        # The group of 30 is taken only where it is drawn first, since something must be.
        assert len(held_out) == 30 or 1 <= len(held_out) <= wanted


def test_one_group_alone_cannot_be_held_out():
    rows = [Row("a", 1), Row("b", 1), Row("c", 1)]
    assert "'g' links all rows" in refusal(divided, rows, eval=0.3, group="g").what


def test_groups_hold_for_text_that_is_generated_too_and_a_column_that_is_not_there_names_the_nearest(write, tokenizer):
    path = write([{"text": f"line {i}", "film": i // 4} for i in range(40)])
    prepared = prepare(DataSettings(train=path, eval=0.25, group="film"), tokenizer)
    sides = [{(example.row - 1) // 4 for example in side} for side in (prepared.train, prepared.held_out)]
    assert not sides[0] & sides[1] and len(prepared.held_out) in (8, 12)
    assert prepared.report.unused_columns == ()
    refused = refusal(prepare, DataSettings(train=path, group="films"), tokenizer)
    assert "no column 'films'" in refused.what and "'film'" in str(refused.hint)


def test_the_same_rows_are_held_out_without_groups_as_with_a_group_for_each_row():
    without = divided([Row(str(i)) for i in range(50)], eval=7)[1]
    alone = divided([Row(str(i), i) for i in range(50)], eval=7, group="g")[1]
    assert [row.content for row in without] == [row.content for row in alone]
