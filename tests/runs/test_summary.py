"""run.json is written at the start and at every kind of end, is small, and shows rows as trained."""

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
from deltaw.runs.folder import RunFolder, is_alive, process_identity
from deltaw.runs.summary import MAX_TEXT, example_rows, length_counts, next_commands, to_plain
from deltaw.training.callbacks import FunctionCallback
from tests.byte_models import byte_tokenizer
from tests.training.loops import example
from tests.training.runs import ADAPTER


def read_record(folder):
    return json.loads((folder / NAME).read_text())


def test_running_run_records_state_and_process(settings, tmp_path):
    run = tmp_path / "run"
    records = []
    result = fit(settings(run), callback=FunctionCallback(on_step=lambda step: records.append(read_record(run))))
    record = records[0]
    assert record["state"] == "running" and record["ended"] is None and "result" not in record
    assert record["process"]["id"] == os.getpid() and is_alive(record["process"]) is True
    assert record["total_steps"] == result.outcome.steps
    assert record["plan"]["peak_resident_bytes"] == result.plan.peak_resident_bytes
    assert record["chosen"]["device"] == {"value": "cpu", "why": "as requested"}
    assert record["data"]["counts"]["rows_read"] == 10 and "rows: 10 read" in record["data"]["lines"][0]
    assert record["versions"]["torch"] and record["machine"]["processors"] >= 1
    last = read_record(run)
    assert last["state"] == "finished" and last["result"] == result.as_dict()
    assert last["ended"] >= last["started"] == record["started"] and (run / NAME).stat().st_size < 200_000


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (UserError("no room", location="the disk", hint="free some"), "failed", "no room"),
        (RuntimeError("of a callback"), "failed", "RuntimeError: of a callback"),
    ],
)
def test_error_is_recorded_as_state(settings, tmp_path, error, state, message):
    with pytest.raises(type(error)):
        fit(settings(tmp_path / "run"), callback=FunctionCallback(on_step=mock.Mock(side_effect=error)))
    record = read_record(tmp_path / "run")
    assert record["state"] == state and record.get("error", {}).get("what") == message
    assert (tmp_path / "run" / ADAPTER).is_file() == (state == "failed")
    resumes = any("--resume" in entry["command"] for entry in record["commands"])
    assert resumes == any((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_unwritable_result_is_a_warning(settings, tmp_path, monkeypatch):
    note = RunFolder.note

    def fail_with_result(folder, values):
        if "result" in values:
            raise OSError("no room")
        note(folder, values)

    monkeypatch.setattr(RunFolder, "note", fail_with_result)
    with pytest.warns(UserWarning, match="could not be written"):
        assert fit(settings(tmp_path / "run")).outcome.steps == 3


def test_example_rows_contain_label_mask():
    tokenizer = byte_tokenizer()
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    tokens = np.array(tokenizer.encode(text), dtype=np.int32)
    virtual = np.r_[np.int32([len(tokenizer), len(tokenizer) + 1]), tokens]
    rows = [example(3, tokens, len(tokens) - 4), example(5, virtual, len(virtual) - 4)]
    first, second = example_rows(rows, tokenizer, None)
    assert (first["row"], first["tokens"], first["label_tokens"]) == (3, len(tokens), 4)
    assert "".join(piece["text"] for piece in first["pieces"]) == text
    end = {"text": "<|im_end|>", "trained": True, "special": True}
    assert [p for p in first["pieces"] if p["trained"]] == [{"text": "yes", "trained": True}, end]
    assert first["pieces"][0] == {"text": "<|im_start|>", "trained": False, "special": True}
    assert second["pieces"][0] == {"text": "[2 virtual tokens]", "trained": False, "special": True}
    assert second["why"] == "the longest row" and len(example_rows([RowGroup(tuple(rows))], tokenizer, None)) == 2
    assert example_rows([], tokenizer, None) == []


def test_example_rows_and_length_counts_are_bounded():
    tokenizer = byte_tokenizer()

    @functools.cache
    def row(length):
        return Example(1, np.full(length, 70, np.int32), np.arange(length) % 2 == 1, 0, None)

    class LazyRows:
        """A million rows, created on access."""

        num_reads = 0

        def __len__(self):
            return 1_000_000

        def __getitem__(self, index):
            self.num_reads += 1
            return row(5 + (index + 7) % 3000)

    rows = LazyRows()
    excerpts = example_rows(rows, tokenizer, None)
    assert len(excerpts) == 6 and rows.num_reads < 50_000
    assert {"the longest row", "the shortest row"} <= {entry["why"] for entry in excerpts}
    assert max(entry["tokens"] for entry in excerpts) > 2900 and min(entry["tokens"] for entry in excerpts) < 10
    for entry in excerpts:
        assert sum(len(piece["text"]) for piece in entry["pieces"]) < MAX_TEXT + 200
    counts = length_counts(rows)
    assert sum(counts["rows"]) == counts["sampled"] == 20_000 and counts["of"] == 1_000_000
    assert counts["edges"][0] == 5 and len(counts["edges"]) == len(counts["rows"]) + 1
    long = Example(1, row(10_000).tokens, np.zeros(10_000, bool), 0, None)
    (only,) = example_rows([long], tokenizer, None)
    assert "characters" in only["pieces"][0]["text"]


def test_to_plain_bounds_values():
    plain = to_plain({"a": float("nan"), "b": "x" * 10_000, "c": list(range(1000)), "d": {1: np.int64(3)}})
    assert plain["a"] is None and len(plain["b"]) == 4000
    assert len(plain["c"]) == 65 and plain["c"][-1] == "… and 936 more"
    json.dumps(plain, allow_nan=False)
    bounded = to_plain({str(n): n for n in range(1000)})
    assert len(bounded) == 65 and bounded["…"] == "and 936 more"


def test_ended_process_is_detected():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        identity = {**process_identity(), "id": process.pid, "begun": psutil.Process(process.pid).create_time()}
        assert is_alive(identity) is True
    assert is_alive(identity) is False
    own_identity = process_identity()
    assert is_alive(own_identity) is True
    assert is_alive({**own_identity, "begun": own_identity["begun"] - 60}) is False, "the number was used again"
    assert is_alive({**own_identity, "host": "elsewhere"}) is None and is_alive({}) is None


def test_next_commands_quote_folder(tmp_path):
    finished = (tmp_path / "a b", "finished", "lora", "causal-lm")
    commands = [entry["command"] for entry in next_commands(*finished, generates_text=True)]
    assert f"deltaw chat '{tmp_path}/a b'" in commands and f"deltaw serve '{tmp_path}/a b'" in commands
    assert f"deltaw merge '{tmp_path}/a b' --output '{tmp_path}/a b-merged'" in commands
    commands = [entry["command"] for entry in next_commands(*finished, generates_text=True, every=True)]
    assert f"deltaw export '{tmp_path}/a b' --format gguf --type q8_0 --output '{tmp_path}/a b-gguf'" in commands
    assert "chat" not in str(next_commands(tmp_path, "failed", "lora", "causal-lm", generates_text=True))
    (tmp_path / "adapter_config.json").write_text('{"modules_to_save": ["multi_modal_projector"]}')
    for method, folder in (("lora", tmp_path), ("input", tmp_path / "a b")):
        commands = str(next_commands(folder, "finished", method, "causal-lm", generates_text=True))
        assert "deltaw serve" not in commands and "deltaw merge" in commands
    for task, is_served in (("reranking", True), ("image-classification", False)):
        commands = str(next_commands(tmp_path, "finished", "head", task, generates_text=False))
        assert "chat" not in commands and ("deltaw serve" in commands) == is_served
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    for state, resume in (("finished", " --train.epochs N"), ("failed", "")):
        commands = [e["command"] for e in next_commands(tmp_path, state, "head", "regression", generates_text=False)]
        assert f"deltaw train --resume {tmp_path}{resume}" in commands
