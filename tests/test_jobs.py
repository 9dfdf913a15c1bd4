"""The example job files are valid for their schedulers, and start valid deltaw commands."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deltaw.cli import group
from deltaw.training.parallel.joining import read_launch_environment

JOBS = Path(__file__).parent.parent / "examples" / "jobs"
SCRIPTS = sorted(JOBS.glob("*.sbatch"))
BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None, reason="needs bash")


@needs_bash
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    assert subprocess.run([BASH, "-n", script], capture_output=True, check=False).stderr == b""
    directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert directives and all(line.startswith("#SBATCH --") for line in directives)
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if checker is not None:
        result = subprocess.run([checker, script], capture_output=True, text=True, check=False)
        assert result.stdout == ""


@pytest.fixture
def cluster(tmp_path):
    """Fake cluster commands that record their calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    call_log = tmp_path / "called"
    srun = f'echo "$OMP_NUM_THREADS srun $*" >> {call_log}'
    commands = {"scontrol": "printf 'node7\\nnode8\\n'", "sleep": "true", "srun": srun, "deltaw": "exit 9"}
    for name, body in commands.items():
        (folder / name).write_text(f"#!{BASH}\n{body}\n")
        (folder / name).chmod(0o755)

    def run(script, *arguments, **extra):
        slurm = {"JOB_ID": "20123", "JOB_NODELIST": "node[7-8]", "JOB_NUM_NODES": "2", "CPUS_PER_TASK": "16", **extra}
        environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": ""}
        environment |= {f"SLURM_{name}": value for name, value in slurm.items()} | {"VERB": "compare"}
        command = [BASH, JOBS / script, *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return result, call_log.read_text().splitlines() if call_log.exists() else []

    return run


@needs_bash
@pytest.mark.parametrize(("extra", "processes", "threads"), [({}, "2", "8"), ({"GPUS_ON_NODE": "4"}, "4", "4")])
def test_train_script_starts_torchrun_on_every_node(cluster, extra, processes, threads):
    result, (line,) = cluster("train.sbatch", "run.yaml", "--train.epochs", "2", **extra)
    assert result.returncode == 0, result.stderr
    thread_count, _, *words = line.split()
    options = {"--nnodes": "2", "--nproc-per-node": processes, "--rdzv-endpoint": "node7:20123", "-m": "deltaw"}
    assert thread_count == threads and dict(itertools.pairwise(words)).items() >= options.items()
    assert words[-4:] == ["train", "run.yaml", "--train.epochs", "2"]


@needs_bash
def test_tune_script_starts_and_uses_a_ray_cluster(cluster):
    result, lines = cluster("tune.sbatch", "run.yaml", "--trials", "40")
    assert result.returncode == 0, result.stderr
    # Background commands may log in any order.
    order = {line: 0 if "--head" in line else 1 if "--address" in line else 2 for line in lines}
    head, member, command = (line.split(" srun ")[1] for line in sorted(lines, key=order.__getitem__))
    assert "ray start --head --port=20123" in head and "--nodelist=node7" in head
    assert "ray start --address=node7:20123" in member and "--nodes=1" in member and "--exclude=node7" in member
    assert command.endswith("deltaw compare run.yaml --ray node7:20123 --trials 40")


@needs_bash
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_without_settings_fails_with_a_message(cluster, script):
    result, lines = cluster(script.name)
    assert result.returncode != 0 and "name the settings" in result.stderr and lines == []


def test_verbs_accept_the_flags_of_the_scripts():
    for verb in ("tune", "compare"):
        flags = {flag for parameter in group.get_command(None, verb).params for flag in parameter.opts}
        assert {"--ray", "--ray-cpus"} <= flags


def documents() -> list[dict]:
    return list(yaml.safe_load_all((JOBS / "kubernetes.yaml").read_text()))


def test_kubernetes_pods_can_reach_each_other():
    service, job = documents()
    spec = job["spec"]
    pod = spec["template"]["spec"]
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completions"] == spec["parallelism"] and spec["completionMode"] == "Indexed"
    (container,) = pod["containers"]
    port = service["spec"]["ports"][0]["port"]
    assert f"--nnodes={spec['completions']}" in container["args"]
    assert f"--rdzv-endpoint={name}-0.{pod['subdomain']}:{port}" in container["args"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["args"][-4:-1] == ["-m", "deltaw", "train"]


def test_kubernetes_job_matches_its_schema():
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for document in documents():
        validate.validate(document, validate.latest_version(), strict=True)


def test_torchrun_flags_are_valid():
    from torch.distributed.run import get_args_parser

    (container,) = documents()[1]["spec"]["template"]["spec"]["containers"]
    parsed, rest = get_args_parser().parse_known_args(container["args"])
    assert rest == [] and parsed.nnodes == "2" and parsed.training_script == "deltaw" and parsed.module
    assert parsed.training_script_args == ["train", "/settings/run.yaml"]
    # torchrun sets the variables that deltaw reads.
    environment = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "pod", "MASTER_PORT": "29500"}
    assert read_launch_environment(environment).size == 2
