"""Several processes come to what one comes to, in its order, and end with it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest

from deltaw.data import DataSettings, prepare, stored_rows
from deltaw.data.report import BadRowError
from deltaw.data.stored_rows import RowWriter, in_order, processes
from tests.data.conftest import make_tokenizer, refusal

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(count: int) -> None:
    def work(item: int) -> tuple[int, int]:
        time.sleep(0.02 * (item % 3 == 0))
        return item, os.getpid()

    found = list(in_order(range(20), work, count))
    assert [item for item, _ in found] == list(range(20))
    assert (os.getpid() in {process for _, process in found}) == (count == 1)


def test_items_are_taken_as_they_are_needed() -> None:
    items = iter(range(100))
    results = in_order(items, lambda item: item, 2)
    assert next(results) == 0 and next(items) <= 6
    results.close()


def test_an_error_keeps_its_kind_place_and_reason() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise BadRowError("it is bad", reason="badness", where="row 3", hint="remove it")
        return item

    error = refusal(list, in_order(range(9), work, 2))
    assert isinstance(error, BadRowError) and error.reason == "badness"
    assert (error.what, error.where, error.hint) == ("it is bad", "row 3", "remove it")
    assert "it is bad" in str(error) and "row 3" in str(error)
    with pytest.raises(ZeroDivisionError) as failed:
        list(in_order(range(3), lambda item: item // 0, 2))
    assert "ZeroDivisionError" in str(failed.value.__cause__)
    error = refusal(list, in_order(range(3), lambda item: os.kill(os.getpid(), signal.SIGKILL), 2))
    assert "ended" in error.what and "TOKENIZERS_PARALLELISM" in str(error.hint)


def test_no_process_is_left_behind() -> None:
    results = in_order(range(100), lambda item: os.getpid(), 2)
    started = [next(results), next(results)]
    results.close()
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_the_usual_variable_forbids_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "usable_processors", lambda: {0, 1, 2})
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    assert processes() == 3
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert processes() == 1


def test_rows_read_by_several_processes_are_the_rows_read_by_one(write, monkeypatch):
    rows = [{"prompt": f"q {n % 90}", "completion": f"a {n % 90}" if n % 10 else 3, "g": n % 7} for n in range(100)]
    path = write("".join(json.dumps(row) + "\n" for row in rows) + "{bad\n")
    monkeypatch.setattr("deltaw.data.row_stream.CHUNK_ROWS", 9)
    monkeypatch.setattr("deltaw.data.row_stream.KEPT_BYTES", 0)
    settings = DataSettings(path, eval=0.2, group="g", bad_rows="skip", rows=70)
    one = prepare(settings, make_tokenizer())
    monkeypatch.setattr(stored_rows, "SEVERAL_BYTES", 0)
    monkeypatch.setattr(stored_rows, "processes", lambda: 3)
    added: list[int] = []
    add = RowWriter.add
    monkeypatch.setattr(RowWriter, "add", lambda self, *told: added.append(len(told[0])) or add(self, *told))
    several = prepare(settings, make_tokenizer())
    assert len(added) > 3
    assert several.report == one.report and several.report.bad_rows["not JSON"] == 1
    assert list(several.skipped.lines()) == list(one.skipped.lines())
    for mine, theirs in ((several.train, one.train), (several.held_out, one.held_out)):
        assert [e.row for e in mine] == [e.row for e in theirs]
        assert mine.digest() == theirs.digest()


def test_too_long_rows_are_counted_over_all_processes(write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write([{"text": "x" * n} for n in range(1, 60)])
    monkeypatch.setattr("deltaw.data.row_stream.CHUNK_ROWS", 7)
    monkeypatch.setattr(stored_rows, "SEVERAL_BYTES", 0)
    said = []
    for count in (1, 3):
        monkeypatch.setattr(stored_rows, "processes", lambda count=count: count)
        said.append(str(refusal(prepare, DataSettings(path, max_length=20), make_tokenizer())))
    assert said[0] == said[1] and "row 20" in said[0]
