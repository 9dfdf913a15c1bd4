"""Ctrl-C and SIGTERM in the midst of a training: the adapter is saved, whole, and the status says so."""

from __future__ import annotations

import json
import os
import signal

import pytest

from deltaw.training.origin import open_run
from tests.cli.conftest import start

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of another kind")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_training_saves_the_adapter(flags, tmp_path, number):
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    with start("train", *flags(run, train__epochs=100000), "--json") as process:
        process.until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted after" in err and str(run) in err and "Traceback" not in err
    told = json.loads(out)
    assert told["interrupted"] is True and told["steps"] >= 3 and told["eval"] is None
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, told["steps"] + 1))
    assert "interrupted before its last step" in (run / "README.md").read_text()
    assert not [p for p in run.iterdir() if p.name.startswith(".")]
    opened = open_run(str(run), precision="fp32", device="cpu", say=lambda line: None)
    assert any(bool(p.any()) for n, p in opened.model.named_parameters() if n.endswith("lora_B"))
