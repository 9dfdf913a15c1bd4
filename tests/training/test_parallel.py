"""Data-parallel runs match a single-process run, transfer only the factors, and survive the loss of a process."""

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

from deltaw.runs.fit import fit
from deltaw.training.parallel.joining import read_launch_environment
from deltaw.training.parallel.row_distribution import distribute_rows
from tests.conftest import RATES, refusal, write_rows
from tests.kernels.conftest import compiled_only
from tests.training.loops import example
from tests.training.parallel_runs import (
    assert_same_as_one_process,
    assert_same_run,
    distance,
    free_port,
    needs_gloo,
    newest_step,
    start,
    train,
    train_all,
    train_until_killed,
    wait_all,
)
from tests.training.runs import ADAPTER, adapter, metrics, stopped_run

ROOT = Path(__file__).resolve().parents[2]
pytestmark = needs_gloo


def test_rows_with_shared_prefix_are_distributed_together():
    first, second = np.random.default_rng(0).integers(0, 99, (2, 40))
    rows = [example(1, [*(first, second)[n % 2], n, n, n], 1) for n in range(8)]
    assert sorted(distribute_rows(rows, 2, share=True)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert distribute_rows([example(1, [1, 2, 3], 1)], 3, share=True) == [[0], [], []]


def test_incomplete_launch_environment_raises():
    two_processes = {"WORLD_SIZE": "2"}
    for environment, message in [
        (two_processes, "RANK is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        (two_processes | {"RANK": "2"}, "rank 2 is out of range for 2"),
        (two_processes | {"RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
    ]:
        refusal(read_launch_environment, environment, match=message)
    assert read_launch_environment({}) is None and read_launch_environment({"WORLD_SIZE": "1", "RANK": "0"}) is None


def test_fit_in_python_rejects_multiprocess_environment(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    refusal(fit, settings(tmp_path / "run"), match="trains in one process, but the environment sets")
    assert not (tmp_path / "run").exists()


def test_two_processes_match_one_and_transfer_only_factors(make_config, tmp_path):
    sums_file = tmp_path / "counted"
    single, several = (make_config(tmp_path / name) for name in ("one", "two"))
    output = assert_same_as_one_process(single, several, COUNTED=str(sums_file))
    assert "2 processes" in output
    sums = [json.loads(line) for line in sums_file.read_text().splitlines()]
    factors = sum(t.numel() * 4 for t in adapter(tmp_path / "one").values())
    ranges = [size for dtype, size in sums if dtype == "torch.float32"]
    assert sum(ranges) == factors * 2 * 6 and len(ranges) > 2 * 6  # two processes, six steps
    assert all(size <= 64 for dtype, size in sums if dtype == "torch.float64")


SEARCH = {"train": {"learning_rate": "search", "samples": 0}}
KINDS = {
    "four": {},  # more processes than some steps have rows for
    "accumulated": {"train": {"tokens_per_pass": 64}},
    "recomputed": {"train": {"checkpointing": True, "tokens_per_pass": 64}},
    "dora": {"lora": {"dora": True}},
    "prompt": {"method": "prompt", "prompt": {"length": 4}},
    "activated": {"lora": {"active": "completion", "invocation_tokens": [85, 67, 91]}},  # "say"
    "random": {"method": "random", "random": {"weights": 0.05}},
    "modules": {"lora": {"train_modules": ["lm_head"]}},
    "search": SEARCH,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_several_processes_match_one(make_config, tmp_path, name):
    single, several = (make_config(tmp_path / output, **KINDS[name]) for output in ("one", "two"))
    assert_same_as_one_process(single, several, 4 if name == "four" else 2)
    if name == "search":
        ours, theirs = (json.loads((tmp_path / folder / "learning_rate.json").read_text()) for folder in ("two", "one"))
        assert ours["rates"] == theirs["rates"] and ours["chosen"] == theirs["chosen"] != theirs["usual"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)


@pytest.mark.slow
def test_several_processes_rehearse_each_general_answer_once(make_config, long_context_folder, tmp_path):
    train = {"keep_general": 1, "tokens_per_pass": 64, "learning_rate": 1e-2}
    changes = {"model": str(long_context_folder), "train": train}
    assert_same_as_one_process(*(make_config(tmp_path / output, **changes) for output in ("one", "two")))
    assert metrics(tmp_path / "two", "learning_rate")[-1]["general_loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2**-8), ("int8", 2e-2)])
def test_low_precision_runs_agree_up_to_rounding(make_config, tmp_path, precision, tolerance):
    """Different microbatches round differently: by about 2^-8 of a value in bf16 and about 2 % in int8 gradients
    (docs/performance.md).
    """

    def agree(several, single):
        for ours, theirs in zip(metrics(several), metrics(single), strict=True):
            assert ours.get("loss", 0.0) == pytest.approx(theirs.get("loss", 0.0), rel=tolerance)
            assert ours.get("label_tokens") == theirs.get("label_tokens")
        difference, norm = distance(several, single, "lora_B")
        assert difference <= 0.1 * norm

    single, several = (make_config(tmp_path / name, precision=precision) for name in ("one", "two"))
    assert_same_as_one_process(single, several, compare=agree)


@pytest.mark.slow
def test_two_processes_train_and_evaluate_classifier(settings, tmp_path):
    rows = [{"text": "word " * (1 + n % 7) + "no" * (n % 2), "label": "ab"[n % 2]} for n in range(14)]
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "eval": 5}
    train = {"batch_size": 4, "epochs": 2, "eval_every": 1, "saved_adapter": "best"}
    config = settings(tmp_path / "one", task="sequence-classification", data=data, train=train)
    assert_same_as_one_process(config, config | {"output": str(tmp_path / "two")})
    assert "accuracy" in metrics(tmp_path / "one", "eval")[-1]["eval"]


@pytest.mark.parametrize("stops", [pytest.param(True, marks=pytest.mark.slow), False])
def test_non_finite_step_of_one_process_stops_or_is_skipped_by_all(make_config, tmp_path, stops):
    config = make_config(tmp_path / "run", train={} if stops else {"not_finite": "skip"})
    first, second = train(config, env_by_rank={1: {"BREAKS_AT": "2"}})
    assert first[0] == second[0] == (2 if stops else 0) and second[1:] == ("", ""), (first, second)
    if stops:
        assert "step 3" in first[2] and "Traceback" not in first[2] and newest_step(tmp_path / "run") == 2
    else:
        skipped, trained = ([line["step"] for line in metrics(tmp_path / "run", key)] for key in ("skipped", "loss"))
        assert (skipped, trained) == ([3], [1, 2, 4, 5, 6])


@pytest.mark.slow
def test_run_with_killed_process_resumes_with_another_process_count(make_config, tmp_path):
    fit(make_config(tmp_path / "whole"))
    config = make_config(tmp_path / "run", train={"checkpoint_every": 1000})  # no checkpoint is due before the kill
    train_until_killed(config, 3)
    assert newest_step(tmp_path / "run") == 3 and fit(config).resumed_from_step == 3
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert "finished" in train_all(config)[0]  # all processes exit without training


@pytest.mark.slow
def test_process_killed_during_rate_search_is_reported(make_config, tmp_path):
    config = make_config(tmp_path / "run", **SEARCH)
    train_until_killed(config, 8)
    assert not (tmp_path / "run" / "learning_rate.json").exists()
    train_all(config)
    assert (tmp_path / "run" / "learning_rate.json").exists()


@pytest.mark.slow
def test_single_process_run_resumes_with_two_processes(make_config, tmp_path):
    fit(make_config(tmp_path / "whole"))
    stopped_run(make_config(tmp_path / "run"), 2)
    train_all(make_config(tmp_path / "run"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def assert_errors(results, *words):
    for status, _, output in results:
        assert status == 2 and all(word in output for word in words) and "Traceback" not in output, output


@pytest.mark.slow
def test_missing_process_and_different_process_count_are_reported(tmp_path):
    workers = [start(0, 2, free_port(), ["train", tmp_path / "run.yaml"], DELTAW_PEER_SECONDS="1")]
    assert_errors(wait_all(workers), "1 did not connect within 1 seconds")
    port = free_port()
    pair = [start(rank, size, port, ["train", tmp_path / "run.yaml"]) for rank, size in ((0, 2), (1, 3))]
    assert_errors(wait_all(pair), "expects 3 processes, and process 0 2")
    assert_errors(wait_all([start(0, 2, free_port(), ["tune", "run.yaml"])]), "'tune' runs in one process")


def test_port_in_use_is_reported(tmp_path):
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        port = server.getsockname()[1]
        start_time = time.monotonic()
        assert_errors(wait_all([start(0, 2, port, ["train", tmp_path / "run.yaml"])]), f"port {port} is in use")
    assert time.monotonic() - start_time < 100  # well before the time limit of 120 seconds


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal-lm", "preference"])
def test_different_rows_between_processes_are_rejected(settings, tmp_path, task):
    """Each node may read a different file."""
    config = settings(tmp_path / "run", task=task) | {"data": {"train": "rows.jsonl"}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    port = free_port()
    processes = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        answers = {"completion": str(rank)} if task == "causal-lm" else {"chosen": "a" * (rank + 1), "rejected": "b"}
        write_rows(tmp_path / str(rank) / "rows.jsonl", ({"prompt": f"a{n}", **answers} for n in range(9)))
        processes.append(start(rank, 2, port, ["train", tmp_path / "run.yaml"], folder=tmp_path / str(rank)))
    first, second = wait_all(processes)
    assert second[0] == 2 and "process 1 of 2: it does not have the same rows as process 0" in second[2], (
        first,
        second,
    )
    assert first[0] == 2 and "another of the 2 processes ended" in first[2]


@compiled_only
def test_process_with_different_kernels_is_rejected(make_config, tmp_path):
    first, second = train(make_config(tmp_path / "run"), env_by_rank={1: {"DELTAW_KERNELS": "none"}})
    assert_errors([second], "process 1 of 2: it uses no kernels", "DELTAW_KERNELS=none is set there")
    assert first[0] == 2 and not (tmp_path / "run").exists()


@pytest.mark.slow
@compiled_only
def test_all_processes_use_arithmetic_of_first_process(make_config, tmp_path):
    """A process that would select other products uses those of process 0, which uses those stored in the run."""
    rates = RATES | {"bf16": {"dot": 100.0, "tiles": 90.0, "wide": 200.0, "torch": 90.0}}
    other_env = {"DELTAW_MEASURED": json.dumps({"*": rates})}

    def run(name: str, *measured: dict[str, str]) -> tuple[dict, bytes]:
        config = make_config(tmp_path / name, precision="bf16")
        output = train_all(config, flags=["--json"], env_by_rank=dict(enumerate(measured)))
        return json.loads(output[0])["arithmetic"], (tmp_path / name / ADAPTER).read_bytes()

    assert run("alike") == run("mixed", {}, other_env)
    expected = run("whole", other_env, other_env)
    assert expected[0]["bf16"] == "wide"
    env_by_rank = {0: other_env, 1: other_env | {"DIES_AT": "2"}}
    assert train(make_config(tmp_path / "killed", precision="bf16"), env_by_rank=env_by_rank)[1][0] == -signal.SIGKILL
    assert run("killed") == expected


@pytest.mark.slow
def test_signal_to_one_process_stops_all_after_same_step(make_config, tmp_path):
    run = tmp_path / "run"
    config = make_config(run, train={"epochs": 5000, "eval_every": None, "checkpoint_every": None, "samples": 0})
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    port = free_port()
    start_time = time.monotonic()
    processes = [start(rank, 2, port, ["train", tmp_path / "run.yaml"]) for rank in range(2)]
    while not ((run / "metrics.jsonl").exists() and metrics(run, "loss")) and time.monotonic() < start_time + 60:
        time.sleep(0.1)
    processes[1].terminate()
    first, second = wait_all(processes)
    assert first[0] == 130 and (second[0], second[2]) == (0, ""), (first, second)
    steps = [line["step"] for line in metrics(run, "loss")]
    assert newest_step(run) == steps[-1] == len(steps)


@contextlib.contextmanager
def two_hosts():
    """Create two connected network namespaces and yield their names and devices. Skips without permission."""
    tag = os.getpid() % 10000
    hosts = [(f"dw{tag}{end}", f"v{tag}{end}") for end in "ab"]
    (first, cable), (second, other_cable) = hosts
    commands = [f"netns add {first}", f"netns add {second}"]
    commands.append(f"link add {cable} netns {first} type veth peer {other_cable} netns {second}")
    for number, (name, link) in enumerate(hosts, 1):
        commands.append(f"-n {name} addr add 10.213.7.{number}/24 dev {link}")
        commands += [f"-n {name} link set {device} up" for device in ("lo", link)]
    try:
        try:
            for command in commands:
                subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be created: {error}")
        yield hosts
    finally:
        for name, _ in hosts:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs the Linux command ip")
def test_two_hosts_started_by_torchrun_match_one_process(make_config, tmp_path):
    fit(make_config(tmp_path / "one"))
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(make_config(tmp_path / "two")))
    torchrun = f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr 10.213.7.1"
    processes = []
    with two_hosts() as hosts:
        for rank, (name, cable) in enumerate(hosts):
            command = f"ip netns exec {name} {torchrun} --master-port 29511 --node-rank {rank} -m deltaw train {path}"
            environment = os.environ | {"GLOO_SOCKET_IFNAME": cable, "PYTHONPATH": str(ROOT / "src")}
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command.split(), env=environment, **streams))
        first, second = wait_all(processes)
    assert first[0] == second[0] == 0, (first, second)
    assert not second[1]
    assert "2 processes, 1 of them here" in first[1]
    assert_same_run(tmp_path / "two", tmp_path / "one")
