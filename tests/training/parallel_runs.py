"""Several processes that train as one, started as ``torchrun`` does, and compared with one process."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import yaml

from deltaw.runs.fit import fit
from tests import processes
from tests.training.runs import adapter, metrics

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(rank: int, size: int, port: int, arguments, folder=None, **extra: str) -> processes.Process:
    ranks = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DELTAW_PEER_SECONDS": 120}
    environment = {name: str(value) for name, value in {**ranks, **address, **extra}.items()}
    return processes.start("-m", "tests.training.parallel_worker", *arguments, cwd=folder, env=environment)


def ended(started) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each; none is left behind."""
    try:
        told = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(started, told, strict=True)]


def train(
    made: dict, size: int = 2, *, flags: Sequence[str] = (), of_rank: Mapping[int, Mapping] | None = None, **extra
) -> list[tuple[int, str, str]]:
    """What several processes that train one run came to; some may have more in their environment."""
    path = Path(made["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(made))
    port, told = free_port(), ["train", path, *flags]
    return ended([start(rank, size, port, told, **extra, **(of_rank or {}).get(rank, {})) for rank in range(size)])


def train_all(made: dict, size: int = 2, **how) -> list[str]:
    """What each of several processes said that all came to their end."""
    told = train(made, size, **how)
    assert [status for status, *_ in told] == [0] * size, told
    return [said for _, said, _ in told]


def train_until_one_dies(made: dict, step: int, killed: int = 1) -> None:
    """Of two processes one is killed in a step (counted from 0), and the other says so."""
    told = train(made, of_rank={killed: {"DIES_AT": str(step)}})
    status, _, said = told[1 - killed]
    assert told[killed][0] == -signal.SIGKILL and status == 2, told
    assert "another of the 2 processes ended" in said and "Traceback" not in said


def newest_step(run: Path) -> int:
    """The step of a run's newest checkpoint."""
    return max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def distance(run: Path, other: Path, part: str = "") -> tuple[float, float]:
    """The norm of the difference of two runs' adapters, or of a part of them, and of the second."""
    factors, expected = adapter(run), adapter(other)
    assert factors.keys() == expected.keys()
    ours, theirs = (torch.cat([of[n].double().flatten() for n in expected if part in n]) for of in (factors, expected))
    return float((ours - theirs).norm()), float(theirs.norm())


def assert_same_run(one: Path, other: Path, counts: Sequence[str] = ("step", "rows", "tokens", "label_tokens")) -> None:
    """Losses, evaluations and factors agree up to the order of sums in fp32, and ``counts`` are equal."""
    ours, theirs = metrics(one), metrics(other)
    assert [sorted(line) for line in ours] == [sorted(line) for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in {"loss", "gradient_norm", "learning_rate", "eval"} & b.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-5)
        for key in counts:
            assert a.get(key) == b.get(key)
    off, norm = distance(one, other)
    assert off <= 1e-5 * norm


def trains_as_one(
    one: dict, several: dict, size: int = 2, same: Callable[[Path, Path], None] = assert_same_run, **extra: str
) -> str:
    """One process and several come to the same run; what the first of these said."""
    fit(one)
    said = train_all(several, size, **extra)
    same(Path(several["output"]), Path(one["output"]))
    return said[0]
