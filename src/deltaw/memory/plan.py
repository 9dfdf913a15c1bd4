"""What a run will need, part by part, before it starts: tensors, and the process around them.

Tensors are known from a simulation (:mod:`deltaw.memory.simulation`). The process holds more than they are:
the interpreter with its libraries, the rows, kernels that the matrix library builds for the shapes it meets,
and what an allocator cannot give back at once. Knows numbers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deltaw.memory.footprint import Footprint

# What a thread of the matrix library and of torch's own pool holds beside the tensors.
BYTES_PER_THREAD = 4 * 2**20
# A kernel that the CPU's matrix library builds for a shape it has not met.
BYTES_PER_KERNEL = 600 * 2**10
# Of what comes and goes within a step, the share that the allocator holds beside it.
SLACK = 0.06


@dataclass(frozen=True)
class Plan:
    """The memory of one run.

    Attributes:
        method: its name.
        total_parameters: N, of the model. trained_parameters: M.
        peak_bytes: the most that tensors take at one time; ``parts`` tells its kinds, and adds up to it.
        peak_resident_bytes: the most main memory that the process holds; ``resident`` tells its parts.
        phase, module: where in a step the peak of the tensors falls.
        activations: bytes by the module that made them, the largest first.
        tokens: of the largest pass. rows: of a step.
        timeline: (phase, bytes) along two steps.
    """

    method: str
    total_parameters: int
    trained_parameters: int
    peak_bytes: int
    peak_resident_bytes: int
    parts: Mapping[str, int]
    resident: Mapping[str, int]
    phase: str
    module: str
    activations: Mapping[str, int] = field(default_factory=dict)
    tokens: int = 0
    rows: int = 0
    timeline: tuple[tuple[str, int], ...] = ()

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {
            "total_parameters": self.total_parameters,
            "trained_parameters": self.trained_parameters,
            "peak_bytes": self.peak_bytes,
            "peak_resident_bytes": self.peak_resident_bytes,
            "parts": dict(self.parts),
            "resident": dict(self.resident),
            "phase": self.phase,
            "module": self.module,
            "activations": dict(self.activations),
            "tokens_per_pass": self.tokens,
            "rows_per_step": self.rows,
        }


def resident_parts(
    footprint: Footprint, *, process_bytes: int, kernels: int, threads: int
) -> dict[str, int]:
    """The parts of the process's main memory at its peak.

    Args:
        process_bytes: what the process holds before the model is loaded.
        kernels: how many different shapes the matrix library will meet.
    """
    lasting = sum(footprint.parts[kind] for kind in ("weights", "trained", "optimizer", "gradients"))
    passing = footprint.peak_bytes - lasting
    return {
        "process": process_bytes,
        "tensors": footprint.peak_bytes,
        "kernels": kernels * BYTES_PER_KERNEL,
        "threads": threads * BYTES_PER_THREAD,
        "allocator": int(SLACK * passing),
    }
