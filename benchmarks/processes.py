"""What a sum of gradients takes: measured at 2 and 4 processes, and by the model of docs/scaling.md.

    python benchmarks/processes.py [--megabytes 0.1 1 10 40]

The model is that of ``benchmarks/communication.py``. Where all processes are on one machine, they share its
bandwidth. Both constants are fitted to the times at 2 processes; those at 4 say how far the model is off.
Rounds of 2 and of 4 processes take turns, and a size's time is the median over rounds.
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
    """In each process: the median seconds of a sum of each size."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    found = []
    for size in megabytes:
        bucket = torch.zeros(max(1, int(size * 1e6 / 4)))
        times = []
        for _ in range(REPEATS):
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(bucket)
            times.append(time.perf_counter() - begun)
        found.append(statistics.median(times))
    dist.destroy_process_group()
    return found


def started(processes: int, megabytes: list[float]) -> list[float]:
    """The slowest process's medians."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1"}
    sizes = [str(size) for size in megabytes]
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", "--megabytes", *sizes],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    told = [json.loads(process.communicate(timeout=300)[0]) for process in running]
    return [max(times) for times in zip(*told, strict=True)]


def fitted(megabytes: list[float], times: list[float]) -> tuple[float, float]:
    """Latency in seconds and bandwidth in bytes a second, of times at 2 processes, each weighted alike."""
    sizes = np.array(megabytes) * 1e6
    taken = np.array(times)
    left = 2 * np.stack([np.ones_like(sizes), sizes], axis=1) / taken[:, None]
    latency, inverse = np.linalg.lstsq(left, np.ones_like(taken), rcond=None)[0]
    return max(0.0, float(latency)), 1 / float(inverse)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0.1, 1.0, 10.0, 40.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measure(given.megabytes)))
        return
    print("\n".join(machine_lines(1)))
    rounds = [[started(processes, given.megabytes) for processes in (2, 4)] for _ in range(given.rounds)]
    two, four = (
        [statistics.median(times) for times in zip(*(one[side] for one in rounds), strict=True)] for side in (0, 1)
    )
    latency, bandwidth = fitted(given.megabytes, two)
    print(f"fitted at 2 processes: {latency * 1e6:.0f} us a message, {bandwidth / 1e9:.2f} GB/s for all")
    for size, at_two, at_four in zip(given.megabytes, two, four, strict=True):
        expected = ring(4, size * 1e6, latency, bandwidth, shared=True)
        print(
            f"{size:g} MB: 2 processes {at_two * 1e3:.2f} ms, 4 processes {at_four * 1e3:.2f} ms "
            f"(model {expected * 1e3:.2f} ms, ratio {at_four / expected:.2f})"
        )


if __name__ == "__main__":
    main()
