"""Several processes that train as one: the same losses and factors for every kind of training, what travels, and
what becomes of the run where a process is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deltaw.errors import UserError
from deltaw.runs.fit import fit
from deltaw.training.parallel.group import deal
from deltaw.training.parallel.joining import told
from tests.conftest import RATES, write_rows
from tests.kernels.conftest import compiled_only
from tests.training.loops import example
from tests.training.parallel_runs import (
    assert_same_run,
    distance,
    ended,
    free_port,
    needs_gloo,
    newest_step,
    start,
    train,
    train_all,
    train_until_one_dies,
    trains_as_one,
)
from tests.training.runs import ADAPTER, adapter, metrics, stopped_run

ROOT = Path(__file__).resolve().parents[2]
pytestmark = needs_gloo


def test_rows_that_begin_alike_are_dealt_together_and_too_few_leave_processes_without():
    first, second = np.random.default_rng(0).integers(0, 99, (2, 40))
    rows = [example(1, [*(first, second)[n % 2], n, n, n], 1) for n in range(8)]
    assert sorted(deal(rows, 2, share=True)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert deal([example(1, [1, 2, 3], 1)], 3, share=True) == [[0], [], []]


def test_an_environment_that_is_not_whole_is_refused():
    two = {"WORLD_SIZE": "2"}
    for environment, message in [
        (two, "RANK is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        (two | {"RANK": "2"}, "no process 2 among 2"),
        (two | {"RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
    ]:
        with pytest.raises(UserError, match=message):
            told(environment)
    assert told({}) is None and told({"WORLD_SIZE": "1", "RANK": "0"}) is None


def test_a_call_in_python_does_not_train_once_in_each_process(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="trains in one process, but the environment sets"):
        fit(settings(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_two_processes_train_as_one_and_only_factors_travel(of, tmp_path):
    counted = tmp_path / "counted"
    said = trains_as_one(of(tmp_path / "one"), of(tmp_path / "two"), COUNTED=str(counted))
    assert "2 processes" in said
    sums = [json.loads(line) for line in counted.read_text().splitlines()]
    factors = sum(t.numel() * 4 for t in adapter(tmp_path / "one").values())
    ranges = [size for dtype, size in sums if dtype == "torch.float32"]
    assert sum(ranges) == factors * 2 * 6 and len(ranges) > 2 * 6  # both processes, six steps
    assert all(size <= 64 for dtype, size in sums if dtype == "torch.float64")


SEARCH = {"train": {"learning_rate": "search", "samples": 0}}
KINDS = {
    "four": {},  # though a step has fewer rows
    "accumulated": {"train": {"tokens_per_pass": 64}},
    "recomputed": {"train": {"checkpointing": True, "tokens_per_pass": 64}},
    "dora": {"lora": {"dora": True}},
    "prompt": {"method": "prompt", "prompt": {"length": 4}},
    "activated": {"lora": {"activation": "completion", "invocation_tokens": [85, 67, 91]}},  # "say"
    "random": {"method": "random", "random": {"weights": 0.05}},
    "modules": {"lora": {"train_modules": ["lm_head"]}},
    "search": SEARCH,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_several_processes_train_as_one(of, tmp_path, name):
    one, two = (of(tmp_path / output, **KINDS[name]) for output in ("one", "two"))
    trains_as_one(one, two, 4 if name == "four" else 2)
    if name == "search":
        ours, theirs = (json.loads((tmp_path / of / "learning_rate.json").read_text()) for of in ("two", "one"))
        assert ours["rates"] == theirs["rates"] and ours["chosen"] == theirs["chosen"] != theirs["usual"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2**-8), ("int8", 2e-2)])
def test_in_low_precision_they_agree_up_to_its_rounding(of, tmp_path, precision, tolerance):
    """Rows that meet in other microbatches are rounded otherwise: in bf16 by about 2^-8 of a value each time,
    in int8 gradients by about 2 % (docs/performance.md), of a loss that moves by less than itself."""

    def agree(two, one):
        for ours, theirs in zip(metrics(two), metrics(one), strict=True):
            assert ours.get("loss", 0.0) == pytest.approx(theirs.get("loss", 0.0), rel=tolerance)
            assert ours.get("label_tokens") == theirs.get("label_tokens")
        off, moved = distance(two, one, "lora_B")
        assert off <= 0.1 * moved

    one, two = (of(tmp_path / name, precision=precision) for name in ("one", "two"))
    trains_as_one(one, two, same=agree)


@pytest.mark.slow
def test_a_classifier_trains_and_is_evaluated_by_two_processes(settings, tmp_path):
    rows = [{"text": "word " * (1 + n % 7) + "no" * (n % 2), "label": "ab"[n % 2]} for n in range(14)]
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "eval": 5}
    train = {"batch_size": 4, "epochs": 2, "eval_every": 1, "adapter": "best"}
    made = settings(tmp_path / "one", task="sequence-classification", data=data, train=train)
    trains_as_one(made, made | {"output": str(tmp_path / "two")})
    assert "accuracy" in metrics(tmp_path / "one", "eval")[-1]["eval"]


@pytest.mark.parametrize("ends", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_step_that_is_not_finite_in_one_process_ends_all_or_is_left_out_by_all(of, tmp_path, ends):
    made = of(tmp_path / "run", train={} if ends else {"not_finite": "skip"})
    zero, one = train(made, of_rank={1: {"BREAKS_AT": "2"}})
    assert zero[0] == one[0] == (2 if ends else 0) and one[1:] == ("", ""), (zero, one)
    if ends:
        assert "step 3" in zero[2] and "Traceback" not in zero[2] and newest_step(tmp_path / "run") == 2
    else:
        skipped, counted = ([line["step"] for line in metrics(tmp_path / "run", key)] for key in ("skipped", "loss"))
        assert (skipped, counted) == ([3], [1, 2, 4, 5, 6])


def test_a_killed_process_leaves_a_checkpoint_and_another_number_goes_on(of, tmp_path):
    fit(of(tmp_path / "whole"))
    made = of(tmp_path / "run", train={"checkpoint_every": 1000})  # none is due before the process is lost
    train_until_one_dies(made, 3)
    assert newest_step(tmp_path / "run") == 3
    assert fit(made).resumed_from_step == 3
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert "finished" in train_all(made)[0]  # nothing is trained: all of them end


@pytest.mark.slow
def test_a_process_that_is_lost_in_the_search_ends_the_run_in_words(of, tmp_path):
    made = of(tmp_path / "run", **SEARCH)
    train_until_one_dies(made, 8)
    assert not (tmp_path / "run" / "learning_rate.json").exists()
    train_all(made)
    assert (tmp_path / "run" / "learning_rate.json").exists()


@pytest.mark.slow
def test_a_run_of_one_goes_on_with_two_processes(of, tmp_path):
    fit(of(tmp_path / "whole"))
    stopped_run(of(tmp_path / "run"), 2)
    train_all(of(tmp_path / "run"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def refused(told, *words):
    for status, _, said in told:
        assert status == 2 and all(word in said for word in words) and "Traceback" not in said, said


@pytest.mark.slow
def test_a_process_that_never_comes_and_one_that_was_told_otherwise(tmp_path):
    alone = [start(0, 2, free_port(), ["train", tmp_path / "run.yaml"], DELTAW_PEER_SECONDS="1")]
    refused(ended(alone), "1 did not come within 1 seconds")
    port = free_port()
    pair = [start(rank, size, port, ["train", tmp_path / "run.yaml"]) for rank, size in ((0, 2), (1, 3))]
    refused(ended(pair), "told that there are 3 processes, and process 0 2")
    refused(ended([start(0, 2, free_port(), ["tune", "run.yaml"])]), "'tune' runs in one process")


def test_a_port_in_use_is_an_error_in_words(tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        begun = time.monotonic()
        refused(ended([start(0, 2, port, ["train", tmp_path / "run.yaml"])]), f"port {port} is in use")
    assert time.monotonic() - begun < 100  # well before the time limit of 120 seconds


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal-lm", "preference"])
def test_rows_that_differ_between_processes_are_refused(settings, tmp_path, task):
    """As where each node has a file of its own."""
    made = settings(tmp_path / "run", task=task) | {"data": {"train": "rows.jsonl"}}
    (tmp_path / "run.yaml").write_text(json.dumps(made))
    port, both = free_port(), []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        answers = {"completion": str(rank)} if task == "causal-lm" else {"chosen": "a" * (rank + 1), "rejected": "b"}
        write_rows(tmp_path / str(rank) / "rows.jsonl", ({"prompt": f"a{n}", **answers} for n in range(9)))
        both.append(start(rank, 2, port, ["train", tmp_path / "run.yaml"], folder=tmp_path / str(rank)))
    zero, one = ended(both)
    assert one[0] == 2 and "process 1 of 2: it does not have the same rows as process 0" in one[2], (zero, one)
    assert zero[0] == 2 and "another of the 2 processes ended" in zero[2]


@compiled_only
def test_a_process_that_is_told_to_compute_otherwise_is_refused(of, tmp_path):
    zero, one = train(of(tmp_path / "run"), of_rank={1: {"DELTAW_KERNELS": "none"}})
    refused([one], "process 1 of 2: it computes with no kernels", "DELTAW_KERNELS=none is set there")
    assert zero[0] == 2 and not (tmp_path / "run").exists()


@pytest.mark.slow
@compiled_only
def test_all_processes_compute_as_the_first_from_the_start_and_later(of, tmp_path):
    """A processor that would choose other products takes those of process 0, which takes those that the run
    began with."""
    rates = RATES | {"bf16": {"dot": 100.0, "tiles": 90.0, "wide": 200.0, "torch": 90.0}}
    other = {"DELTAW_MEASURED": json.dumps({"*": rates})}

    def run(name: str, *measured: dict[str, str]) -> tuple[dict, bytes]:
        made = of(tmp_path / name, precision="bf16")
        said = train_all(made, flags=["--json"], of_rank=dict(enumerate(measured)))
        return json.loads(said[0])["arithmetic"], (tmp_path / name / ADAPTER).read_bytes()

    assert run("alike") == run("mixed", {}, other)
    whole = run("whole", other, other)
    assert whole[0]["bf16"] == "wide"
    died = {0: other, 1: other | {"DIES_AT": "2"}}
    assert train(of(tmp_path / "killed", precision="bf16"), of_rank=died)[1][0] == -signal.SIGKILL
    assert run("killed") == whole


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(of, tmp_path):
    run = tmp_path / "run"
    made = of(run, train={"epochs": 5000, "eval_every": None, "checkpoint_every": None, "samples": 0})
    (tmp_path / "run.yaml").write_text(json.dumps(made))
    port, begun = free_port(), time.monotonic()
    both = [start(rank, 2, port, ["train", tmp_path / "run.yaml"]) for rank in range(2)]
    while not ((run / "metrics.jsonl").exists() and metrics(run)) and time.monotonic() < begun + 60:
        time.sleep(0.1)
    both[1].terminate()
    zero, one = ended(both)
    assert zero[0] == 130 and one == (0, "", ""), (zero, one)
    steps = [line["step"] for line in metrics(run, "loss")]
    assert newest_step(run) == steps[-1] == len(steps)


@contextlib.contextmanager
def two_hosts():
    """Two network namespaces with an address each, joined by one cable: their names and their ends of it."""
    tag = os.getpid() % 10000
    hosts = [(f"dw{tag}{end}", f"v{tag}{end}") for end in "ab"]
    (first, cable), (second, other) = hosts
    commands = [f"netns add {first}", f"netns add {second}"]
    commands.append(f"link add {cable} netns {first} type veth peer {other} netns {second}")
    for number, (name, own) in enumerate(hosts, 1):
        commands.append(f"-n {name} addr add 10.213.7.{number}/24 dev {own}")
        commands += [f"-n {name} link set {device} up" for device in ("lo", own)]
    try:
        try:
            for command in commands:
                subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield hosts
    finally:
        for name, _ in hosts:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs the command ip, of Linux")
def test_two_hosts_started_by_torchrun_train_as_one(of, tmp_path):
    fit(of(tmp_path / "one"))
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(of(tmp_path / "two")))
    torchrun = f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr 10.213.7.1"
    both = []
    with two_hosts() as hosts:
        for rank, (name, cable) in enumerate(hosts):
            command = f"ip netns exec {name} {torchrun} --master-port 29511 --node-rank {rank} -m deltaw train {path}"
            environment = os.environ | {"GLOO_SOCKET_IFNAME": cable, "PYTHONPATH": str(ROOT / "src")}
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            both.append(subprocess.Popen(command.split(), env=environment, **streams))
        zero, one = ended(both)
    assert zero[0] == 0 and one[:2] == (0, ""), (zero, one)
    assert "2 processes, 1 of them here" in zero[1]
    assert_same_run(tmp_path / "two", tmp_path / "one")
