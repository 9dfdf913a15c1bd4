"""Examples on disk equal the written examples, and damage is detected."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.data.example import Example
from deltaw.data.row_cache import RowWriter
from deltaw.data.row_store import DamagedRowsError, DiskRows, MemoryRows, RowView, schema
from tests.data.conftest import refusal
from tests.data.hostile_files import write_arrow


def example(number: int, tokens: list[int], labels: list[bool], answer: str | None) -> Example:
    return Example(number, np.asarray(tokens, np.int32), np.asarray(labels, bool), min(3, len(tokens)), answer)


EXAMPLES = st.lists(
    st.builds(
        lambda number, pairs, answer: example(number, [t for t, _ in pairs], [b for _, b in pairs], answer),
        st.integers(1, 2**40),
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=20),
        st.none() | st.text("aé😀\n", max_size=5),
    ),
    min_size=1,
    max_size=12,
)


def write_rows_file(batches: list[list[Example]], path: Path, group: bytes | None = None) -> DiskRows:
    with path.open("wb") as file, pyarrow.ipc.new_file(file, schema()) as writer:
        count = 0
        for batch in batches:
            rows = MemoryRows()
            numbers = range(count, count + len(batch))
            rows.add(batch, list(numbers), [] if group is None else [group] * len(batch))
            writer.write_batch(rows.batch())
            count += len(batch)
    return DiskRows(path.open("rb"), str(path), grouped=group is not None)


def fields_of(row: Example) -> tuple[object, ...]:
    arrays = [(array.dtype, array.tolist()) for array in (row.tokens, row.is_label)]
    return (row.row, row.prompt_length, row.answer, *arrays)


@settings(max_examples=20, deadline=None)
@given(EXAMPLES, EXAMPLES)
def test_rows_read_equal_rows_written(first, second):
    all_examples = first + second
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows_file([first, second], Path(folder) / "r.arrow", group=b"g" * 16)
    memory = MemoryRows()
    memory.add(all_examples, list(range(len(all_examples))), [b"g" * 16] * len(all_examples))
    assert [fields_of(rows.example(n)) for n in range(len(rows))] == [fields_of(row) for row in all_examples]
    for name in ("lengths", "label_counts", "keys", "groups", "ordinals", "used_tokens"):
        np.testing.assert_array_equal(getattr(rows, name)(), getattr(memory, name)())
    indices = np.arange(len(all_examples))[::-1]
    assert RowView(rows, indices).digest() == RowView(memory, indices).digest()


def test_file_is_readable_with_pyarrow(tmp_path: Path) -> None:
    rows = write_rows_file([[example(4, [5, 6, 7], [False, True, True], "é")]], tmp_path / "r.arrow")
    rows.example(0).tokens[0] = 7  # torch.from_numpy requires writable tokens
    with pyarrow.memory_map(str(tmp_path / "r.arrow")) as file:
        (row,) = pyarrow.ipc.open_file(file).read_all().to_pylist()
    assert (row["row"], row["tokens"], row["label_spans"]) == (4, [5, 6, 7], [1, 3])
    assert bytes(row["answer"]).decode() == "é"


def test_view_behaves_like_a_sequence(tmp_path: Path) -> None:
    all_examples = [example(n, [n] * (n + 1), [True] * (n + 1), None) for n in range(6)]
    view = RowView(write_rows_file([all_examples], tmp_path / "r.arrow"), np.array([4, 1, 1, 5]))
    assert [row.row for row in view] == [4, 1, 1, 5]
    assert [row.row for row in view[1:]] == [1, 1, 5] and view[-1].row == 5
    assert [row.row for row in view.select(np.array([3, 0]))] == [5, 4]
    assert view.lengths.tolist() == view.label_counts.tolist() == [5, 2, 2, 6]
    with pytest.raises(IndexError):
        view[4]


@pytest.mark.parametrize("location", ["tokens", "label_spans", "key"])
def test_damaged_row_raises(location: str, tmp_path: Path) -> None:
    path = tmp_path / "r.arrow"
    damage: list[bool] = []
    write_rows_file([[example(n, [n] * 9, [False] * 5 + [True] * 4, "a") for n in range(3)]], path)
    rows = DiskRows(path.open("rb"), str(path), grouped=False, on_damage=lambda: damage.append(True))
    offset = int(rows._value_offsets[location][0])
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x03")
    assert "damaged" in refusal(rows.example, 0).message and damage and rows.example(1).tokens.tolist() == [1] * 9


@pytest.mark.parametrize("kind", ["cut", "empty", "no Arrow", "other columns"])
def test_invalid_file_is_rejected(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "r.arrow"
    write_rows_file([[example(1, [1, 2], [False, True], None)]], path)
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-20], "empty": b""}.get(kind, b"x" * len(content)))
    if kind == "other columns":
        write_arrow(path, pyarrow.table({"text": ["a"]}))
    with pytest.raises(DamagedRowsError):
        DiskRows(path.open("rb"), str(path), grouped=False)


def test_rows_above_the_limit_spill_to_disk() -> None:
    all_examples = [example(n, [n, 1], [False, True], str(n)) for n in range(50)]
    for spill, kind in ((10**9, MemoryRows), (2000, DiskRows)):
        with RowWriter(spill=spill) as writer:
            for start in range(0, 50, 10):
                writer.add(all_examples[start : start + 10], list(range(start, start + 10)), [])
            rows = writer.finish("about", {}, store=False)
        assert type(rows) is kind
        assert [fields_of(rows.example(n)) for n in range(50)] == [fields_of(row) for row in all_examples]
        assert rows.groups() is None
