"""The example job files: valid for their schedulers, and what they start is what deltaw takes."""

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
from deltaw.training.parallel.joining import told

JOBS = Path(__file__).parent.parent / "examples" / "jobs"
SCRIPTS = sorted(JOBS.glob("*.sbatch"))
BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None, reason="needs bash")


@needs_bash
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    assert subprocess.run([BASH, "-n", script], capture_output=True, check=False).stderr == b""
    directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert directives and all(line.startswith("#SBATCH --") for line in directives)
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if checker is not None:
        found = subprocess.run([checker, script], capture_output=True, text=True, check=False)
        assert found.stdout == ""


@pytest.fixture
def cluster(tmp_path):
    """Commands of a cluster that write down how they were called; sleeping takes no time."""
    folder = tmp_path / "bin"
    folder.mkdir()
    called = tmp_path / "called"
    srun = f'echo "$OMP_NUM_THREADS srun $*" >> {called}'
    does_by_name = {"scontrol": "printf 'node7\\nnode8\\n'", "sleep": "true", "srun": srun, "deltaw": "exit 9"}
    for name, does in does_by_name.items():
        (folder / name).write_text(f"#!{BASH}\n{does}\n")
        (folder / name).chmod(0o755)

    def run(script, *arguments, **extra):
        slurm = {"JOB_ID": "20123", "JOB_NODELIST": "node[7-8]", "JOB_NUM_NODES": "2", "CPUS_PER_TASK": "16", **extra}
        environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": ""}
        environment |= {f"SLURM_{name}": value for name, value in slurm.items()} | {"VERB": "compare"}
        command = [BASH, JOBS / script, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done, called.read_text().splitlines() if called.exists() else []

    return run


@needs_bash
@pytest.mark.parametrize(("extra", "processes", "threads"), [({}, "2", "8"), ({"GPUS_ON_NODE": "4"}, "4", "4")])
def test_a_training_starts_torchrun_on_every_node(cluster, extra, processes, threads):
    done, (line,) = cluster("train.sbatch", "run.yaml", "--train.epochs", "2", **extra)
    assert done.returncode == 0, done.stderr
    own, _, *words = line.split()
    options = {"--nnodes": "2", "--nproc-per-node": processes, "--rdzv-endpoint": "node7:20123", "-m": "deltaw"}
    assert own == threads and dict(itertools.pairwise(words)).items() >= options.items()
    assert words[-4:] == ["train", "run.yaml", "--train.epochs", "2"]


@needs_bash
def test_a_search_starts_a_cluster_and_uses_it(cluster):
    done, lines = cluster("tune.sbatch", "run.yaml", "--trials", "40")
    assert done.returncode == 0, done.stderr
    # Those in the background may write in any order.
    place = {line: 0 if "--head" in line else 1 if "--address" in line else 2 for line in lines}
    head, member, command = (line.split(" srun ")[1] for line in sorted(lines, key=place.__getitem__))
    assert "ray start --head --port=20123" in head and "--nodelist=node7" in head
    assert "ray start --address=node7:20123" in member and "--nodes=1" in member and "--exclude=node7" in member
    assert command.endswith("deltaw compare run.yaml --ray node7:20123 --trials 40")


@needs_bash
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_job_without_settings_says_so(cluster, script):
    done, lines = cluster(script.name)
    assert done.returncode != 0 and "name the settings" in done.stderr and lines == []


def test_the_verbs_know_the_flags_that_the_scripts_give():
    for verb in ("tune", "compare"):
        flags = {flag for parameter in group.get_command(None, verb).params for flag in parameter.opts}
        assert {"--ray", "--ray-cpus"} <= flags


def documents() -> list[dict]:
    return list(yaml.safe_load_all((JOBS / "kubernetes.yaml").read_text()))


def test_the_job_of_kubernetes_has_pods_that_find_each_other():
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


def test_the_job_of_kubernetes_fits_its_schema():
    validate = pytest.importorskip("kubernetes_validate", reason="the package kubernetes-validate is not there")
    for document in documents():
        validate.validate(document, validate.latest_version(), strict=True)


def test_torchruns_flags_are_those_that_torch_has():
    from torch.distributed.run import get_args_parser

    (container,) = documents()[1]["spec"]["template"]["spec"]["containers"]
    known, rest = get_args_parser().parse_known_args(container["args"])
    assert rest == [] and known.nnodes == "2" and known.training_script == "deltaw" and known.module
    assert known.training_script_args == ["train", "/settings/run.yaml"]
    # What torchrun then sets is what deltaw reads.
    environment = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "pod", "MASTER_PORT": "29500"}
    assert told(environment).size == 2
