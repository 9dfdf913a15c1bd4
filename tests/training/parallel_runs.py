"""Start several processes as ``torchrun`` does and compare their run with a run of one process."""

from __future__ import annotations

import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import yaml

from deltaw.runs.fit import fit
from tests import processes
from tests.training.runs import adapter, metrics

HAS_GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()
needs_gloo = pytest.mark.skipif(not HAS_GLOO, reason="this torch has no gloo")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(rank: int, size: int, port: int, arguments, folder=None, **extra: str) -> processes.Process:
    ranks = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DELTAW_PEER_SECONDS": 120}
    environment = {name: str(value) for name, value in {**ranks, **address, **extra}.items()}
    return processes.start("-m", "tests.training.parallel_worker", *arguments, cwd=folder, env=environment)


def wait_all(workers) -> list[tuple[int, str, str]]:
    """Return exit status, output and errors of each process. Kills processes that do not finish."""
    try:
        outputs = [process.communicate(timeout=240) for process in workers]
    finally:
        for process in workers:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(workers, outputs, strict=True)]


def train(
    settings: dict,
    size: int = 2,
    *,
    flags: Sequence[str] = (),
    env_by_rank: Mapping[int, Mapping] | None = None,
    **extra,
) -> list[tuple[int, str, str]]:
    """Train one run in several processes. ``env_by_rank`` adds environment variables to single processes."""
    path = Path(settings["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    port = free_port()
    arguments = ["train", path, *flags]
    return wait_all([start(r, size, port, arguments, **extra, **(env_by_rank or {}).get(r, {})) for r in range(size)])


def train_all(settings: dict, size: int = 2, **options) -> list[str]:
    """Train one run in several processes that must all succeed, and return their outputs."""
    results = train(settings, size, **options)
    assert [status for status, *_ in results] == [0] * size, results
    return [output for _, output, _ in results]


def train_until_killed(settings: dict, step: int, killed: int = 1) -> None:
    """Kill one of two processes in a step (counted from 0). Process 0 must report the loss of the other one. If it is
    killed itself, torchrun reports it.
    """
    results = train(settings, env_by_rank={killed: {"DIES_AT": str(step)}})
    status, _, message = results[1 - killed]
    assert results[killed][0] == -signal.SIGKILL and status == 2, results
    assert ("another of the 2 processes ended" in message) == (killed != 0) and "Traceback" not in message


def newest_step(run: Path) -> int:
    """Return the step of a run's newest checkpoint."""
    return max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def distance(run: Path, other: Path, part: str = "") -> tuple[float, float]:
    """Return the norm of the difference between the adapters of two runs, and the norm of the second adapter.

    ``part`` selects the tensors by their names.
    """
    actual = adapter(run)
    expected = adapter(other)
    assert actual.keys() == expected.keys()
    ours, theirs = (torch.cat([t[n].double().flatten() for n in expected if part in n]) for t in (actual, expected))
    return float((ours - theirs).norm()), float(theirs.norm())


def assert_same_run(run: Path, other: Path, counts: Sequence[str] = ("step", "rows", "tokens", "label_tokens")) -> None:
    """Check that losses, evaluations and factors agree up to fp32 summation order, and that ``counts`` are equal."""
    ours = metrics(run)
    theirs = metrics(other)
    assert [sorted(line) for line in ours] == [sorted(line) for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in {"loss", "gradient_norm", "learning_rate", "eval"} & b.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-5)
        for key in counts:
            assert a.get(key) == b.get(key)
    difference, norm = distance(run, other)
    assert difference <= 1e-5 * norm


def assert_same_as_one_process(single: dict, several: dict, size=2, compare=assert_same_run, **extra: str) -> str:
    """Check that one process and several produce the same run, and return the output of rank 0."""
    fit(single)
    outputs = train_all(several, size, flags=["--verbose"], **extra)
    compare(Path(several["output"]), Path(single["output"]))
    return outputs[0]
