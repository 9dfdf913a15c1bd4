"""`deltaw compare` and `deltaw tune` from the command line: killed and gone on with, refused, interrupted."""

from __future__ import annotations

import json
import os
from unittest.mock import Mock

import psutil
import pytest
import yaml

from tests.cli.conftest import assert_refused, start
from tests.experiments.conftest import use_made_up_answers


@pytest.fixture
def file(settings, tmp_path):
    """A file of settings; its folder is the test's own."""
    made = settings(tmp_path / "run", train={"learning_rate": "auto", "drift": False})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of another kind")
def test_a_killed_comparison_goes_on_where_it_was(call, file, tmp_path, monkeypatch):
    flags = ["--methods", "lora,head", "--json"]
    piece = tmp_path / "run-compare" / "pieces" / "lora.json"
    with start("compare", file, *flags, "--train.epochs", "4", "--share", "1") as process:
        process.until(lambda: piece.exists() and json.loads(piece.read_text()).get("rates"))
        workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, "a worker outlived its study"
    known = json.loads(piece.read_text())["rates"]

    asked = use_made_up_answers(monkeypatch).asked
    ended = call("compare", file, *flags, "--train.epochs", "4", "--share", "1", status=0)
    told = json.loads(ended.out)
    rates = next(m["rates"] for m in told["methods"] if m["method"] == "lora")
    assert [pair for pair in rates if pair in known] == known
    assert asked.count("rate lora") == len(rates) - len(known)
    assert max(n for n, what in enumerate(asked) if what == "rate lora") < asked.index("rate head")
    assert not any(line.startswith(f"lora: learning rate {known[0][0]:g}:") for line in ended.err.splitlines())


def test_ctrl_c_says_how_to_go_on(call, file, monkeypatch):
    for verb in ("compare", "tune"):
        monkeypatch.setattr(f"deltaw.experiments.{verb}.{verb}", Mock(side_effect=KeyboardInterrupt))
        ended = call(verb, file)
        assert ended.status == 130 and f"run-{verb}" in ended.out and "resumes" in ended.out


REFUSED = {
    "compare --methods ,": ["no method is named"],
    "compare --methods lora --rates head=1e-3": ["'head'", "'lora'"],
    "compare --data.eval null": ["no rows are held out", "data.eval"],
    "compare --seeds 0": ["--seeds"],
    "compare --methods lora,head --reference hed": ["'hed'", "did you mean 'head'"],
    "compare --budget soon": ["train.time", "'soon'", "a duration such as 90s"],
    "tune --train.epoch 1": ["--train.epochs"],
}


def test_what_cannot_be_used_is_refused_before_anything_is_written(call, file, tmp_path):
    for command, words in REFUSED.items():
        verb, *flags = command.split()
        assert_refused(call(verb, file, *flags), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_seeds_reference_and_budget_from_the_command_line(call, file, tmp_path, monkeypatch):
    use_made_up_answers(monkeypatch)
    flags = ["--methods", "head,bias", "--rates", "head=1e-2", "--rates", "bias=1e-2", "--seeds", "2"]
    told = json.loads(call("compare", file, *flags, "--reference", "bias", "--budget", "1s", "--json", status=0).out)
    assert told["seeds"] == [0, 1] and told["asked_reference"] == "bias"
    assert [len(method["seeds"]) for method in told["methods"]] == [2, 2]
    stored = json.loads((tmp_path / "run-compare" / "pieces" / "head.json").read_text())
    assert stored["settings"]["train.time"] == "1s"


def test_a_search_from_the_command_line(call, file, tmp_path, monkeypatch):
    use_made_up_answers(monkeypatch)
    ended = call("tune", file, "--trials", "2", "--search", "train.learning_rate=1e-4..1e-2:log", "--json", status=0)
    told = json.loads(ended.out)
    assert len(told["trials"]) == 2 and told["best"] in (0, 1)
    assert "best settings:" in ended.err and "learning_rate:" in ended.err
    assert (tmp_path / "run-tune" / "best.yaml").is_file()
