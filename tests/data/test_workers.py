"""Parallel processes produce the same results as one process, in order, and exit with the parent."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest

from deltaw.data import parallel_map, stored_rows
from deltaw.data.bad_rows import BadRowError
from deltaw.data.parallel_map import in_order, num_processes
from deltaw.data.row_cache import RowWriter
from deltaw.data.stored_rows import TextReader
from deltaw.settings.data import DataSettings
from tests.data.conftest import make_tokenizer, refusal

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_are_in_the_order_of_the_items(count: int) -> None:
    def work(item: int) -> tuple[int, int]:
        time.sleep(0.02 * (item % 3 == 0))
        return item, os.getpid()

    results = list(in_order(range(20), work, count))
    assert [item for item, _ in results] == list(range(20))
    assert (os.getpid() in {process for _, process in results}) == (count == 1)


def test_items_are_consumed_lazily() -> None:
    items = iter(range(100))
    results = in_order(items, lambda item: item, 2)
    assert next(results) == 0 and next(items) <= 6
    results.close()


def test_worker_error_has_its_type_location_and_reason() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise BadRowError("it is bad", reason="badness", location="row 3", hint="remove it")
        return item

    error = refusal(list, in_order(range(9), work, 2))
    assert isinstance(error, BadRowError) and error.reason == "badness"
    assert (error.message, error.location, error.hint) == ("it is bad", "row 3", "remove it")
    assert "it is bad" in str(error) and "row 3" in str(error)
    with pytest.raises(ZeroDivisionError) as raised:
        list(in_order(range(3), lambda item: item // 0, 2))
    assert "ZeroDivisionError" in str(raised.value.__cause__)
    error = refusal(list, in_order(range(3), lambda item: os.kill(os.getpid(), signal.SIGKILL), 2))
    assert "killed" in error.message and "TOKENIZERS_PARALLELISM" in str(error.hint)


def test_closing_terminates_all_processes() -> None:
    results = in_order(range(100), lambda item: os.getpid(), 2)
    started = [next(results), next(results)]
    results.close()
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_tokenizers_parallelism_variable_disables_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_map, "usable_processors", lambda: {0, 1, 2})
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    assert num_processes() == 3
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert num_processes() == 1


def test_parallel_rows_equal_sequential_rows(write, monkeypatch):
    rows = [{"prompt": f"q {n % 90}", "completion": f"a {n % 90}" if n % 10 else 3, "g": n % 7} for n in range(100)]
    path = write("".join(json.dumps(row) + "\n" for row in rows) + "{bad\n")
    monkeypatch.setattr("deltaw.data.row_stream.CHUNK_ROWS", 9)
    monkeypatch.setattr("deltaw.data.row_stream.MEMORY_BYTES", 0)
    settings = DataSettings(path, eval=0.2, group="g", bad_rows="skip", rows=70)
    single = TextReader(settings, make_tokenizer()).prepare()
    monkeypatch.setattr(stored_rows, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(parallel_map, "num_processes", lambda: 3)
    added: list[int] = []
    add = RowWriter.add
    monkeypatch.setattr(RowWriter, "add", lambda self, *args: added.append(len(args[0])) or add(self, *args))
    parallel = TextReader(settings, make_tokenizer()).prepare()
    assert len(added) > 3 and parallel.report == single.report and parallel.report.bad_rows["not JSON"] == 1
    assert list(parallel.skipped.lines()) == list(single.skipped.lines())
    for actual, expected in ((parallel.train, single.train), (parallel.held_out, single.held_out)):
        assert [e.row for e in actual] == [e.row for e in expected] and actual.digest() == expected.digest()


def test_long_rows_are_counted_across_processes(write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write([{"text": "x" * n} for n in range(1, 60)])
    monkeypatch.setattr("deltaw.data.row_stream.CHUNK_ROWS", 7)
    monkeypatch.setattr(stored_rows, "PARALLEL_BYTES", 0)
    messages = []
    for count in (1, 3):
        monkeypatch.setattr(parallel_map, "num_processes", lambda count=count: count)
        messages.append(str(refusal(TextReader(DataSettings(path, max_length=20), make_tokenizer()).prepare)))
    assert messages[0] == messages[1] and "row 20" in messages[0]
