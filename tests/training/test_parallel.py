"""Several processes that train as one: the same losses and factors, what travels, and what becomes of the
run where a process is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deltaw.data.example import Example
from deltaw.errors import UserError
from deltaw.training.fit import fit
from deltaw.training.parallel.group import deal
from deltaw.training.parallel.joining import told
from tests.conftest import write_rows
from tests.kernels.conftest import compiled_only
from tests.training.parallel_runs import (
    assert_same_run,
    ended,
    free_port,
    needs_gloo,
    start,
    train,
    train_all,
    train_two,
    trains_as_one,
    write_settings,
)
from tests.training.runs import ADAPTER, Told, adapter, metrics

ROOT = Path(__file__).resolve().parents[2]
pytestmark = needs_gloo


def example(tokens) -> Example:
    given = np.array(tokens, np.int32)
    return Example(1, given, np.arange(len(given)) > 0, 0, None)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("share", [True, False])
def test_each_row_is_dealt_once_and_no_process_has_much_more(parts, share):
    draw = np.random.default_rng(0)
    rows = [example(draw.integers(0, 99, draw.integers(2, 60))) for _ in range(30)]
    dealt = deal(rows, parts, share=share)
    assert sorted(place for part in dealt for place in part) == list(range(30)) and len(dealt) == parts
    loads = [sum(len(rows[place]) for place in part) for part in dealt]
    assert max(loads) - min(loads) <= max(len(row) for row in rows)


def test_rows_that_begin_alike_are_dealt_together():
    draw = np.random.default_rng(0)
    first, second = draw.integers(0, 99, (2, 40))
    rows = [example([*(first, second)[n % 2], n, n, n]) for n in range(8)]
    assert deal(rows, 2, share=True) in ([[0, 2, 4, 6], [1, 3, 5, 7]], [[1, 3, 5, 7], [0, 2, 4, 6]])


def test_fewer_rows_than_processes_leave_the_others_none():
    dealt = deal([example([1, 2, 3])], 3, share=True)
    assert dealt == [[0], [], []]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "no process 2 among 2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
    ],
)
def test_an_environment_that_is_not_whole_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        told(environment)


def test_one_process_is_told_of_none():
    assert told({}) is None and told({"WORLD_SIZE": "1", "RANK": "0"}) is None


def test_a_call_in_python_does_not_train_once_in_each_process(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="trains in one process, but the environment sets"):
        fit(settings(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_two_processes_train_as_one_and_only_factors_travel(of, tmp_path):
    fit(of(tmp_path / "one"))
    counted = tmp_path / "counted"
    path = write_settings(tmp_path / "run.yaml", of(tmp_path / "two"))
    zero, one = train(path, 2, COUNTED=str(counted))
    assert zero[0] == 0 and one == (0, "", ""), (zero, one)
    assert "2 processes" in zero[1]
    assert_same_run(tmp_path / "two", tmp_path / "one")
    sums = [json.loads(line) for line in counted.read_text().splitlines()]
    factors = sum(t.numel() * 4 for t in adapter(tmp_path / "one").values())
    ranges = [size for dtype, size in sums if dtype == "torch.float32"]
    assert sum(ranges) == factors * 2 * 6 and len(ranges) > 2 * 6  # both processes, six steps
    assert all(size <= 64 for dtype, size in sums if dtype == "torch.float64")


@pytest.mark.slow
def test_four_processes_train_as_one_though_a_step_has_fewer_rows(of, tmp_path):
    trains_as_one(of(tmp_path / "one"), of(tmp_path / "four"), 4)


def test_a_killed_process_leaves_a_checkpoint_and_another_number_goes_on(of, tmp_path):
    fit(of(tmp_path / "whole"))
    made = of(tmp_path / "run", train={"checkpoint_every": 1000})  # none is due before the process is lost
    path = write_settings(tmp_path / "run.yaml", made)
    zero, one = train_two(path, DIES_AT="3")
    assert one[0] == -9 and zero[0] == 2, (zero, one)
    assert "another of the 2 processes ended" in zero[2] and "Traceback" not in zero[2]
    assert max(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")) == "step-000003"
    result = fit(made)
    assert result.resumed_from_step == 3
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_of_one_goes_on_with_two_processes(of, tmp_path):
    fit(of(tmp_path / "whole"))
    made = of(tmp_path / "run")
    assert fit(made, callback=Told(stop_after=2)).interrupted
    train_all(write_settings(tmp_path / "run.yaml", made))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_process_that_never_comes_and_one_that_was_told_otherwise(settings, tmp_path):
    path = write_settings(tmp_path / "run.yaml", settings(tmp_path / "run"))
    port = free_port()
    ((status, _, said),) = ended([start(0, 2, port, ["train", path], DELTAW_PEER_SECONDS="1")])
    assert status == 2 and "1 did not come within 1 seconds" in said and "Traceback" not in said
    port = free_port()
    pair = ended([start(0, 2, port, ["train", path]), start(1, 3, port, ["train", path])])
    for status, _, said in pair:
        assert status == 2 and "told that there are 3 processes, and process 0 2" in said
        assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_an_error_in_words(settings, tmp_path):
    path = write_settings(tmp_path / "run.yaml", settings(tmp_path / "run"))
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        begun = time.monotonic()
        ((status, _, said),) = ended([start(0, 2, port, ["train", path])])
    assert status == 2 and f"port {port} is in use" in said and "Traceback" not in said
    assert time.monotonic() - begun < 100  # well before the time limit of 120 seconds


@pytest.mark.slow
def test_other_verbs_are_refused_by_name(settings, tmp_path):
    port = free_port()
    ((status, _, said),) = ended([start(0, 2, port, ["tune", "run.yaml"])])
    assert status == 2 and "'tune' runs in one process" in said


@pytest.mark.slow
def test_rows_that_differ_between_processes_are_refused(settings, tmp_path):
    """As where each node has a file of its own."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write_rows(
            tmp_path / str(rank) / "rows.jsonl", [{"prompt": f"a{n}", "completion": str(rank)} for n in range(9)]
        )
    made = settings(tmp_path / "run") | {"data": {"train": "rows.jsonl"}}
    path = write_settings(tmp_path / "run.yaml", made)
    port = free_port()
    zero, one = ended([start(rank, 2, port, ["train", path], folder=tmp_path / str(rank)) for rank in range(2)])
    assert one[0] == 2 and "process 1 of 2: it does not have the same rows as process 0" in one[2], (zero, one)
    assert zero[0] == 2 and "another of the 2 processes ended" in zero[2]


@compiled_only
def test_a_process_that_is_told_to_compute_otherwise_is_refused(of, tmp_path):
    path = write_settings(tmp_path / "run.yaml", of(tmp_path / "run"))
    zero, one = train_two(path, DELTAW_KERNELS="none")
    assert one[0] == 2 and "process 1 of 2: it computes with no kernels" in one[2], (zero, one)
    assert "DELTAW_KERNELS=none is set there" in one[2] and "Traceback" not in one[2]
    assert zero[0] == 2 and not (tmp_path / "run").exists()


@pytest.mark.slow
@compiled_only
def test_all_processes_compute_as_the_first_from_the_start_and_later(of, tmp_path):
    """A processor that would choose other products takes those of process 0, which takes those that the run
    began with."""
    rates = {
        "fp32": {"dot": 200.0, "torch": 100.0},
        "bf16": {"dot": 100.0, "tiles": 90.0, "wide": 200.0, "torch": 90.0},
        "int8": {"dot": 800.0, "tiles": 700.0, "torch": 50.0},
    }
    otherwise = json.dumps({"*": rates})

    def run(name: str, measured: list[dict[str, str]], **extra: str) -> dict:
        made = of(tmp_path / name, precision="bf16")
        path = write_settings(tmp_path / f"{name}.yaml", made)
        port = free_port()
        pair = [start(rank, 2, port, ["train", path, "--json"], **env, **extra) for rank, env in enumerate(measured)]
        zero, one = ended(pair)
        return {"status": (zero[0], one[0]), "said": zero[2] + one[2], "result": zero[1]}

    usual, other = {}, {"DELTAW_MEASURED": otherwise}
    alike = run("alike", [usual, usual])
    mixed = run("mixed", [usual, other])
    assert alike["status"] == mixed["status"] == (0, 0), (alike, mixed)
    bits = [(tmp_path / name / ADAPTER).read_bytes() for name in ("alike", "mixed")]
    assert bits[0] == bits[1]
    whole = run("whole", [other, other])
    assert json.loads(whole["result"])["arithmetic"]["bf16"] == "wide"
    died = run("killed", [other, other], DIES_AT="2")
    assert died["status"] != (0, 0)
    went_on = run("killed", [usual, usual])
    assert went_on["status"] == (0, 0), went_on
    assert json.loads(went_on["result"])["arithmetic"] == json.loads(whole["result"])["arithmetic"]
    assert (tmp_path / "killed" / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(of, tmp_path):
    rarely = {"epochs": 5000, "eval_every": None, "checkpoint_every": None, "samples": 0}
    made = of(tmp_path / "run", train=rarely)
    path = write_settings(tmp_path / "run.yaml", made)
    port = free_port()
    both = [start(rank, 2, port, ["train", path]) for rank in range(2)]
    for _ in range(600):
        if (tmp_path / "run" / "metrics.jsonl").exists() and metrics(tmp_path / "run"):
            break
        time.sleep(0.1)
    both[1].terminate()
    zero, one = ended(both)
    assert zero[0] == 130 and one == (0, "", ""), (zero, one)
    newest = max(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    steps = [line["step"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert int(newest.removeprefix("step-")) == steps[-1] == len(steps)


@pytest.mark.slow
def test_a_classifier_trains_and_is_evaluated_by_two_processes(settings, tmp_path):
    rows = [{"text": "word " * (1 + n % 7) + "no" * (n % 2), "label": "ab"[n % 2]} for n in range(14)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    made = settings(tmp_path / "one", task="sequence-classification")
    made["data"] = {"train": str(file), "eval": 5}
    made["train"] |= {"batch_size": 4, "epochs": 2, "eval_every": 1, "adapter": "best"}
    trains_as_one(made, made | {"output": str(tmp_path / "two")})
    assert "accuracy" in metrics(tmp_path / "one", "eval")[-1]["eval"]


@contextlib.contextmanager
def two_hosts():
    """Two network namespaces with an address each, joined by one cable."""
    tag = f"{os.getpid() % 10000}"
    names, cables = (f"dw{tag}a", f"dw{tag}b"), (f"v{tag}a", f"v{tag}b")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", cables[1], "netns", names[1])
        for number, (name, cable) in enumerate(zip(names, cables, strict=True)):
            ip("-n", name, "addr", "add", f"10.213.7.{number + 1}/24", "dev", cable)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", cable, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        yield list(zip(names, cables, strict=True))
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs the command ip, of Linux")
def test_two_hosts_started_by_torchrun_train_as_one(of, tmp_path):
    fit(of(tmp_path / "one"))
    path = write_settings(tmp_path / "run.yaml", of(tmp_path / "two"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    with two_hosts() as hosts:
        both = [
            subprocess.Popen(
                [
                    *("ip", "netns", "exec", name, *torchrun, "--node-rank", str(rank)),
                    *("--master-addr", "10.213.7.1", "--master-port", "29511"),
                    *("-m", "deltaw", "train", str(path)),
                ],
                env=os.environ | {"GLOO_SOCKET_IFNAME": cable, "PYTHONPATH": str(ROOT / "src")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, (name, cable) in enumerate(hosts)
        ]
        zero, one = ended(both)
    assert zero[0] == 0 and one[:2] == (0, ""), (zero, one)
    assert "2 processes, 1 of them here" in zero[1]
    assert_same_run(tmp_path / "two", tmp_path / "one")
