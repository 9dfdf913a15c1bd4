"""Time of a gradient reduction: measured with 2 and 4 processes, and according to the model in docs/scaling.md.

    python benchmarks/processes.py [--megabytes 0.1 1 10 40]

The model is the one of ``benchmarks/communication.py``. Processes on one machine share its bandwidth. Both constants
are fitted to the times with 2 processes. The times with 4 processes show the error of the model. Rounds with 2 and 4
processes alternate, and the time of a size is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from communication import ring
from machine import machine_lines

REPEATS = 15


def measure(megabytes: list[float]) -> list[float]:
    """Return the median seconds of a reduction of each size (runs in each process)."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    medians = []
    for size in megabytes:
        bucket = torch.zeros(max(1, int(size * 1e6 / 4)))
        times = []
        for _ in range(REPEATS):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(bucket)
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times))
    dist.destroy_process_group()
    return medians


def run_processes(processes: int, megabytes: list[float]) -> list[float]:
    """Return the medians of the slowest process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1"}
    sizes = [str(size) for size in megabytes]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", "--megabytes", *sizes],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    measurements = [json.loads(process.communicate(timeout=300)[0]) for process in workers]
    return [max(times) for times in zip(*measurements, strict=True)]


def fit_constants(megabytes: list[float], times: list[float]) -> tuple[float, float]:
    """Fit latency in seconds and bandwidth in bytes per second to times with 2 processes, using relative errors."""
    sizes = np.array(megabytes) * 1e6
    durations = np.array(times)
    coefficients = 2 * np.stack([np.ones_like(sizes), sizes], axis=1) / durations[:, None]
    latency, inverse = np.linalg.lstsq(coefficients, np.ones_like(durations), rcond=None)[0]
    return max(0.0, float(latency)), 1 / float(inverse)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0.1, 1.0, 10.0, 40.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.megabytes)))
        return
    print("\n".join(machine_lines(1)))
    rounds = [[run_processes(processes, args.megabytes) for processes in (2, 4)] for _ in range(args.rounds)]
    two, four = (
        [statistics.median(times) for times in zip(*(measurement[index] for measurement in rounds), strict=True)]
        for index in (0, 1)
    )
    latency, bandwidth = fit_constants(args.megabytes, two)
    print(f"fitted with 2 processes: {latency * 1e6:.0f} us a message, {bandwidth / 1e9:.2f} GB/s for all")
    for size, at_two, at_four in zip(args.megabytes, two, four, strict=True):
        expected = ring(4, size * 1e6, latency, bandwidth, shared=True)
        print(
            f"{size:g} MB: 2 processes {at_two * 1e3:.2f} ms, 4 processes {at_four * 1e3:.2f} ms "
            f"(model {expected * 1e3:.2f} ms, ratio {at_four / expected:.2f})"
        )


if __name__ == "__main__":
    main()
