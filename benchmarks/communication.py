"""What several processes pay for talking: a model of it, and the tables of docs/scaling.md.

    python benchmarks/communication.py [--latency 25e-6] [--bandwidth 12.5e9] [--rate 400e12]

Nothing here is measured; ``benchmarks/processes.py`` compares sums at 2 and 4 processes with :func:`ring`.

A ring's sum of B bytes over P processes is 2 (P - 1) rounds, one after another; in each, every process sends
B / P bytes, which takes the latency a and B / P at the bandwidth b of a process (Patarasuk and Yuan, 2009).
Gathering B bytes that are divided among P processes is P - 1 such rounds. Training factors over frozen
weights takes 4 N operations a token for a base of N parameters: 2 N forward, 2 N backward.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

# As GradientSum of deltaw/training/parallel/group.py cuts a vector.
PART_BYTES, MOST_RANGES = 256 * 1024, 8
PROCESSES = (8, 64, 1024)


@dataclass(frozen=True)
class Base:
    """A Llama-like model: its parameters, blocks, width, width of keys, width of the MLP."""

    name: str
    parameters: float
    blocks: int
    width: int
    key_width: int
    inner: int

    def factors(self, rank: int) -> int:
        """Trained parameters of LoRA on all linear layers: rank · (in + out) for each."""
        attention = 2 * (2 * self.width) + 2 * (self.width + self.key_width)
        return rank * self.blocks * (attention + 3 * (self.width + self.inner))


BASES = (
    Base("SmolLM2 135M", 134.5e6, 30, 576, 192, 1536),
    Base("Llama 3.1 8B", 8.03e9, 32, 4096, 1024, 14336),
    Base("Llama 3.1 70B", 70.6e9, 80, 8192, 1024, 28672),
    Base("Llama 3.1 405B", 405.9e9, 126, 16384, 1024, 53248),
)


def ring(processes: int, size: float, latency: float, bandwidth: float, *, shared: bool = False) -> float:
    """Seconds of a sum of ``size`` bytes.

    Args:
        shared: whether ``bandwidth`` is that of one machine which all processes share.
    """
    at_once = processes if shared else 1
    return 2 * (processes - 1) * (latency + at_once * size / processes / bandwidth)


def gather(processes: int, size: float, latency: float, bandwidth: float) -> float:
    """Seconds until a process has ``size`` bytes, of which each has its part."""
    return (processes - 1) * (latency + size / processes / bandwidth)


def ranges(processes: int, size: float) -> int:
    """Into how many ranges the vector of gradients is cut, where no single parameter is larger than one."""
    return max(1, min(MOST_RANGES, int(size // (PART_BYTES * processes))))


def waited(processes: int, size: float, backward: float, latency: float, bandwidth: float) -> tuple[float, float]:
    """Seconds of a step's sums, and how many of them come after the backward.

    Each of n ranges leaves when its n-th part of the backward (of the last microbatch) is done, and once the
    one before it has arrived.

    Args:
        backward: seconds of that backward.
    """
    count = ranges(processes, size)
    each = ring(processes, size / count, latency, bandwidth)
    arrived = 0.0
    for number in range(1, count + 1):
        arrived = max(arrived, number / count * backward) + each
    return count * each, arrived - backward


def least_tokens(bytes_each: float, rate: float, bandwidth: float) -> float:
    """Tokens of a microbatch whose computation takes as long as gathering the base for it, at any size of the
    base: 4 N T / rate = 2 s N / bandwidth, since it is gathered for the forward and for the backward."""
    return bytes_each * rate / (2 * bandwidth)


def tables(rank: int, tokens: int, latency: float, bandwidth: float, rate: float) -> list[str]:
    """As they stand in docs/scaling.md."""
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
            whole, after = waited(processes, 4 * trained, compute / 2, latency, bandwidth)
            cells.append(f"{whole * 1e3:,.3g}, {after * 1e3:,.3g}")
        shown = f"| {base.name} | {trained / 1e6:,.1f} M | {4 * trained / 1e6:,.0f} MB | {compute * 1e3:,.0f} | "
        lines.append(shown + " | ".join(cells) + " |")
    lines += [
        "",
        "A sharded base: what each process stores of it, and seconds of gathering it twice for a microbatch:",
        "",
        "| base | stored | " + " | ".join(f"P = {p:,}" for p in PROCESSES) + " | tokens that take as long |",
        "|---|---|" + "---|" * (len(PROCESSES) + 1),
    ]
    for base in BASES[1:]:
        for name, each in (("bf16", 2.0), ("int8", 1.0)):
            size = each * base.parameters
            cells = []
            for processes in PROCESSES:
                seconds = 2 * base.blocks * gather(processes, size / base.blocks, latency, bandwidth)
                cells.append(f"{size / processes / 1e9:,.3g} GB, {seconds:,.3g} s")
            hidden = least_tokens(each, rate, bandwidth)
            lines.append(f"| {base.name} | {name} | " + " | ".join(cells) + f" | {hidden:,.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192, help="that a process computes in a step")
    parser.add_argument("--latency", type=float, default=25e-6, help="seconds of a message")
    parser.add_argument("--bandwidth", type=float, default=12.5e9, help="bytes a second of one process")
    parser.add_argument("--rate", type=float, default=400e12, help="operations a second of one process")
    given = parser.parse_args()
    print("\n".join(tables(given.rank, given.tokens, given.latency, given.bandwidth, given.rate)))


if __name__ == "__main__":
    main()
