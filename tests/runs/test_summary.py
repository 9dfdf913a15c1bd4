"""run.json: written at the beginning and at the end, however a run ends; small; its rows as trained."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import psutil
import pytest

from deltaw.data.example import Example, RowGroup
from deltaw.errors import UserError
from deltaw.runs.fit import fit
from deltaw.runs.folder import RUN as NAME
from deltaw.runs.folder import RunFolder, is_alive, this_process
from deltaw.runs.summary import TEXT, example_rows, length_counts, next_commands, plain
from deltaw.training.callbacks import Calling
from tests.byte_models import byte_tokenizer
from tests.training.loops import example
from tests.training.runs import ADAPTER


def read(folder):
    return json.loads((folder / NAME).read_text())


def test_a_run_that_goes_on_says_so_and_names_its_process(settings, tmp_path):
    run, seen = tmp_path / "run", []
    result = fit(settings(run), callback=Calling(on_step=lambda step: seen.append(read(run))))
    told = seen[0]
    assert told["state"] == "running" and told["ended"] is None and "result" not in told
    assert told["process"]["id"] == os.getpid() and is_alive(told["process"]) is True
    assert told["total_steps"] == result.outcome.steps
    assert told["plan"]["peak_resident_bytes"] == result.plan.peak_resident_bytes
    assert told["chosen"]["device"] == {"value": "cpu", "why": "as asked"}
    assert told["data"]["counts"]["rows_read"] == 10 and "rows: 10 read" in told["data"]["lines"][0]
    assert told["versions"]["torch"] and told["machine"]["processors"] >= 1
    last = read(run)
    assert last["state"] == "finished" and last["result"] == result.as_dict()
    assert last["ended"] >= last["started"] == told["started"]
    assert (run / NAME).stat().st_size < 200_000


@pytest.mark.parametrize(
    ("error", "state", "what"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (UserError("no room", where="the disk", hint="free some"), "failed", "no room"),
        (RuntimeError("of a callback"), "failed", "RuntimeError: of a callback"),
    ],
)
def test_an_error_is_the_runs_end(settings, tmp_path, error, state, what):
    with pytest.raises(type(error)):
        fit(settings(tmp_path / "run"), callback=Calling(on_step=mock.Mock(side_effect=error)))
    told = read(tmp_path / "run")
    assert told["state"] == state and told.get("error", {}).get("what") == what
    assert (tmp_path / "run" / ADAPTER).is_file() == (state == "failed")
    resumes = any("--resume" in entry["command"] for entry in told["commands"])
    assert resumes == any((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_result_that_cannot_be_written_at_the_end_is_a_warning(settings, tmp_path, monkeypatch):
    note = RunFolder.note

    def full(folder, **values):
        if "result" in values:
            raise OSError("no room")
        note(folder, **values)

    monkeypatch.setattr(RunFolder, "note", full)
    with pytest.warns(UserWarning, match="could not be written"):
        assert fit(settings(tmp_path / "run")).outcome.steps == 3


def test_rows_are_shown_with_the_mask_that_is_trained():
    tokenizer = byte_tokenizer()
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    tokens = np.array(tokenizer.encode(text), dtype=np.int32)
    virtual = np.r_[np.int32([len(tokenizer), len(tokenizer) + 1]), tokens]
    rows = [example(3, tokens, len(tokens) - 4), example(5, virtual, len(virtual) - 4)]
    first, second = example_rows(rows, tokenizer, None)
    assert (first["row"], first["tokens"], first["label_tokens"]) == (3, len(tokens), 4)
    assert "".join(piece["text"] for piece in first["pieces"]) == text
    assert [p for p in first["pieces"] if p["trained"]] == [
        {"text": "yes", "trained": True},
        {"text": "<|im_end|>", "trained": True, "special": True},
    ]
    assert first["pieces"][0] == {"text": "<|im_start|>", "trained": False, "special": True}
    assert second["pieces"][0] == {"text": "[2 virtual tokens]", "trained": False, "special": True}
    assert second["why"] == "the longest row"
    assert len(example_rows([RowGroup(tuple(rows))], tokenizer, None)) == 2
    assert example_rows([], tokenizer, None) == []


def test_rows_of_any_length_and_number_stay_small():
    tokenizer = byte_tokenizer()

    @functools.cache
    def row(length):
        return Example(1, np.full(length, 70, np.int32), np.arange(length) % 2 == 1, 0, None)

    class Many:
        """A million rows that are made when they are asked for."""

        asked = 0

        def __len__(self):
            return 1_000_000

        def __getitem__(self, place):
            self.asked += 1
            return row(5 + (place + 7) % 3000)

    many = Many()
    shown = example_rows(many, tokenizer, None)
    assert len(shown) == 6 and many.asked < 50_000
    assert {"the longest row", "the shortest row"} <= {entry["why"] for entry in shown}
    assert max(entry["tokens"] for entry in shown) > 2900 and min(entry["tokens"] for entry in shown) < 10
    for entry in shown:
        assert sum(len(piece["text"]) for piece in entry["pieces"]) < TEXT + 200
    counts = length_counts(many)
    assert sum(counts["rows"]) == counts["sampled"] == 20_000 and counts["of"] == 1_000_000
    assert counts["edges"][0] == 5 and len(counts["edges"]) == len(counts["rows"]) + 1
    long = Example(1, row(10_000).tokens, np.zeros(10_000, bool), 0, None)
    (only,) = example_rows([long], tokenizer, None)
    assert "characters" in only["pieces"][0]["text"]


def test_values_become_plain_and_bounded():
    told = plain({"a": float("nan"), "b": "x" * 10_000, "c": list(range(1000)), "d": {1: np.int64(3)}})
    assert told["a"] is None and len(told["b"]) == 4000
    assert len(told["c"]) == 65 and told["c"][-1] == "… and 936 more"
    json.dumps(told, allow_nan=False)
    many = plain({str(n): n for n in range(1000)})
    assert len(many) == 65 and many["…"] == "and 936 more"


def test_a_process_that_has_ended_is_known():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        told = {**this_process(), "id": process.pid, "begun": psutil.Process(process.pid).create_time()}
        assert is_alive(told) is True
    assert is_alive(told) is False
    own = this_process()
    assert is_alive(own) is True
    assert is_alive({**own, "begun": own["begun"] - 60}) is False, "the number was used again"
    assert is_alive({**own, "host": "elsewhere"}) is None and is_alive({}) is None


def test_commands_quote_the_folder(tmp_path):
    told = [
        entry["command"] for entry in next_commands(tmp_path / "a b", "finished", "lora", "causal-lm", writes_text=True)
    ]
    assert f"deltaw chat '{tmp_path}/a b'" in told and f"deltaw serve '{tmp_path}/a b'" in told
    assert f"deltaw merge '{tmp_path}/a b' --output '{tmp_path}/a b-merged'" in told
    told = [
        entry["command"]
        for entry in next_commands(tmp_path / "a b", "finished", "lora", "causal-lm", writes_text=True, every=True)
    ]
    assert f"deltaw export '{tmp_path}/a b' --format gguf --type q8_0 --output '{tmp_path}/a b-gguf'" in told
    assert "chat" not in str(next_commands(tmp_path, "failed", "lora", "causal-lm", writes_text=True))
    for task, is_served in (("reranking", True), ("image-classification", False)):
        told = str(next_commands(tmp_path, "finished", "head", task, writes_text=False))
        assert "chat" not in told and ("deltaw serve" in told) == is_served
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    for state, resume in (("finished", " --train.epochs N"), ("failed", "")):
        told = [entry["command"] for entry in next_commands(tmp_path, state, "head", "regression", writes_text=False)]
        assert f"deltaw train --resume {tmp_path}{resume}" in told
