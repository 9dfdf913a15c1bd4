"""Model of the communication cost of data-parallel training, and the tables of docs/scaling.md.

    python benchmarks/communication.py [--latency 25e-6] [--bandwidth 12.5e9] [--rate 400e12]

Nothing is measured. ``benchmarks/processes.py`` compares reductions of 2 and 4 processes with :func:`ring`.

A ring all-reduce of B bytes over P processes has 2 (P - 1) sequential rounds. In each round, every process sends B / P
bytes, which takes the latency a plus B / P divided by the bandwidth b of a process (Patarasuk and Yuan, 2009).
Gathering B bytes that are sharded among P processes has P - 1 such rounds. Training factors over frozen weights takes 4
N operations per token for a base of N parameters: 2 N forward and 2 N backward.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

# The same values as in deltaw/training/parallel/group.py.
PART_BYTES = 256 * 1024
MAX_RANGES = 8
PROCESSES = (8, 64, 1024)


@dataclass(frozen=True)
class Base:
    """Sizes of a Llama-like model: parameters, blocks, hidden size, key size and MLP size."""

    name: str
    parameters: float
    blocks: int
    width: int
    key_width: int
    inner: int

    def factors(self, rank: int) -> int:
        """Return the trained parameters of LoRA on all linear layers: rank · (in + out) for each."""
        attention = 2 * (2 * self.width) + 2 * (self.width + self.key_width)
        return rank * self.blocks * (attention + 3 * (self.width + self.inner))


BASES = (
    Base("SmolLM2 135M", 134.5e6, 30, 576, 192, 1536),
    Base("Llama 3.1 8B", 8.03e9, 32, 4096, 1024, 14336),
    Base("Llama 3.1 70B", 70.6e9, 80, 8192, 1024, 28672),
    Base("Llama 3.1 405B", 405.9e9, 126, 16384, 1024, 53248),
)


def ring(processes: int, size: float, latency: float, bandwidth: float, *, shared: bool = False) -> float:
    """Return the seconds of an all-reduce of ``size`` bytes.

    Args:
        shared: True if all processes share ``bandwidth``, as on one machine.
    """
    at_once = processes if shared else 1
    return 2 * (processes - 1) * (latency + at_once * size / processes / bandwidth)


def gather(processes: int, size: float, latency: float, bandwidth: float) -> float:
    """Return the seconds of gathering ``size`` bytes that are sharded among the processes."""
    return (processes - 1) * (latency + size / processes / bandwidth)


def ranges(processes: int, size: float) -> int:
    """Return the number of ranges that the gradient vector is split into if no parameter is larger than a range."""
    return max(1, min(MAX_RANGES, int(size // (PART_BYTES * processes))))


def reduction_times(
    processes: int, size: float, backward: float, latency: float, bandwidth: float
) -> tuple[float, float]:
    """Return the seconds of a step's reductions, and the seconds of them after the backward pass.

    Each of n ranges is sent when its n-th part of the last microbatch's backward pass is done and the previous range
    has arrived.

    Args:
        backward: Seconds of that backward pass.
    """
    count = ranges(processes, size)
    range_seconds = ring(processes, size / count, latency, bandwidth)
    arrived = 0.0
    for index in range(1, count + 1):
        arrived = max(arrived, index / count * backward) + range_seconds
    return count * range_seconds, arrived - backward


def min_tokens(bytes_each: float, rate: float, bandwidth: float) -> float:
    """Return the tokens per microbatch for which computation takes as long as gathering the base.

    The base is gathered for the forward and the backward pass. 4 N T / rate = 2 s N / bandwidth holds for any size N of
    the base.
    """
    return bytes_each * rate / (2 * bandwidth)


def tables(rank: int, tokens: int, latency: float, bandwidth: float, rate: float) -> list[str]:
    """Return the tables of docs/scaling.md as lines."""
    lines = [
        f"Rank {rank} on all linear layers; {tokens:,} tokens a process and step at {rate / 1e12:.0f} "
        f"TFLOP/s; {latency * 1e6:.0f} µs and {bandwidth / 1e9:g} GB/s a process. Milliseconds of sums, and "
        "of them after the backward:",
        "",
        "| base | trained | vector | compute | " + " | ".join(f"P = {p:,}" for p in PROCESSES) + " |",
        "|---|---|---|---|" + "---|" * len(PROCESSES),
    ]
    for base in BASES:
        trained = base.factors(rank)
        compute = 4 * base.parameters * tokens / rate
        cells = []
        for processes in PROCESSES:
            total, after = reduction_times(processes, 4 * trained, compute / 2, latency, bandwidth)
            cells.append(f"{total * 1e3:,.3g}, {after * 1e3:,.3g}")
        row = f"| {base.name} | {trained / 1e6:,.1f} M | {4 * trained / 1e6:,.0f} MB | {compute * 1e3:,.0f} | "
        lines.append(row + " | ".join(cells) + " |")
    lines += [
        "",
        "A sharded base: what each process stores of it, and seconds of gathering it twice for a microbatch:",
        "",
        "| base | stored | " + " | ".join(f"P = {p:,}" for p in PROCESSES) + " | tokens that take as long |",
        "|---|---|" + "---|" * (len(PROCESSES) + 1),
    ]
    for base in BASES[1:]:
        for name, bytes_each in (("bf16", 2.0), ("int8", 1.0)):
            size = bytes_each * base.parameters
            cells = []
            for processes in PROCESSES:
                seconds = 2 * base.blocks * gather(processes, size / base.blocks, latency, bandwidth)
                cells.append(f"{size / processes / 1e9:,.3g} GB, {seconds:,.3g} s")
            hidden = min_tokens(bytes_each, rate, bandwidth)
            lines.append(f"| {base.name} | {name} | " + " | ".join(cells) + f" | {hidden:,.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per process and step")
    parser.add_argument("--latency", type=float, default=25e-6, help="seconds per message")
    parser.add_argument("--bandwidth", type=float, default=12.5e9, help="bytes per second of one process")
    parser.add_argument("--rate", type=float, default=400e12, help="operations per second of one process")
    args = parser.parse_args()
    print("\n".join(tables(args.rank, args.tokens, args.latency, args.bandwidth, args.rate)))


if __name__ == "__main__":
    main()
