"""A JSON list is read as it is parsed, row by row."""

from __future__ import annotations

import json
import random

import pytest

from deltaw.data import json_list
from deltaw.data.json_values import LEVELS
from deltaw.data.sources import read_rows
from tests.data.conftest import refusal


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_json_list_rows_do_not_depend_on_the_block_size(block, write, monkeypatch):
    monkeypatch.setattr(json_list, "_CHARACTERS", block)
    pick = random.Random(block)
    values = [None, True, -1.5e-9, 12345, 'é\\"\n\u2028', [], {"a": [1, {"b": "]}"}]}, float("-inf")]
    for _ in range(30):
        rows = [{f"k{n}": pick.choice(values) for n in range(pick.randrange(4))} for _ in range(5)]
        text = json.dumps(rows, ensure_ascii=pick.random() < 0.5, indent=pick.choice([None, 1]))
        path = write("\ufeff" * (block % 2) + text + " \n", "d.json")
        assert [row for _, row in read_rows(path)] == rows


@pytest.mark.parametrize(
    ("text", "message", "location"),
    [
        ('[{"a": 1},\n {"a": tru}]', "Expecting value", "row 2 (line 2)"),
        ('[{"a": 1}\n {"a": 2}]', "Expecting ',' delimiter", "row 1 (line 2)"),
        ('[{"a": 1},', "Expecting value", "row 2 (line 1)"),
        ('[{"a": 1}, {"a": "b', "Unterminated string", "row 2 (line 1)"),
        ('[{"a": 1}]\n\n{"a": 2}', "Extra data", "(line 3)"),
        ('[{"a": ' + "[" * 5000 + "]" * 5000 + "}]", f"more than {LEVELS} levels", "row 1 (line 1)"),
        ('[{"a": ' + "[" * 200 + "]" * 200 + "}]", f"more than {LEVELS} levels", "row 1 (line 1)"),
        ('[{"a": ' + "9" * 5000 + "}]", "integer string conversion", "row 1 (line 1)"),
    ],
)
@pytest.mark.parametrize("block", [1, 2**18])
def test_json_list_error_has_a_row_location(text, message, location, block, write, monkeypatch):
    monkeypatch.setattr(json_list, "_CHARACTERS", block)
    error = refusal(read_rows, write(text, "d.json"))
    assert message in error.message and location in str(error.location)
