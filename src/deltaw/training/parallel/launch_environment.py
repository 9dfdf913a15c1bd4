"""Process settings in the environment variables of torchrun."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchEnvironment:
    """Process settings read from torchrun's environment variables.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.
        local_rank: Rank of this process on its machine.
        local_size: Number of processes on its machine.
        address: Address of process 0.
        port: Port of process 0.
        agent: True if torchrun's agent provides the store.
        attempt: Number of restarts by torchrun.
        seconds: Time limit of collective operations.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    agent: bool
    attempt: str
    seconds: float
