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
# What libraries take when they are first used: their own code and tables, modules that a model imports.
FIRST_USE = 32 * 2**20
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
        precision: of the frozen weights.
        operations: floating-point operations of a step, and ``operators`` that carry them out.
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
    precision: str = ""
    operations: int = 0
    operators: int = 0

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
            "precision": self.precision,
            "operations_per_step": self.operations,
        }


@dataclass(frozen=True)
class Fitting:
    """Settings that fit, what they need, and how long a step takes beside the fastest of them."""

    method: str
    rank: int | None
    tokens_per_pass: int
    checkpointing: bool
    precision: str
    plan: Plan
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {
            "method": self.method,
            "rank": self.rank,
            "tokens_per_pass": self.tokens_per_pass,
            "checkpointing": self.checkpointing,
            "precision": self.precision,
            "peak_resident_bytes": self.plan.peak_resident_bytes,
            "peak_bytes": self.plan.peak_bytes,
            "trained_parameters": self.plan.trained_parameters,
            "estimated_seconds_per_step": self.seconds,
        }


def resident_parts(
    footprint: Footprint, *, process_bytes: int, kernel_bytes: int, threads: int, feature_bytes: int = 0
) -> dict[str, int]:
    """The parts of the process's main memory at its peak.

    Args:
        process_bytes: what the process holds before the model is loaded.
        kernel_bytes: what the matrix library builds for the shapes that it meets.
        feature_bytes: of a mapped file that a run goes through; the system may take their memory back.
    """
    lasting = sum(footprint.parts[kind] for kind in ("weights", "trained", "optimizer", "gradients"))
    passing = footprint.peak_bytes - lasting
    return {
        "process": process_bytes,
        "tensors": footprint.peak_bytes,
        "kernels": kernel_bytes,
        "features": feature_bytes,
        "libraries": FIRST_USE,
        "threads": threads * BYTES_PER_THREAD,
        "allocator": int(SLACK * passing),
    }
