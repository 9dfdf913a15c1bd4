"""A run's tensors at their peak, part by part. Knows numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = (
    "weights",  # frozen parameters and buffers
    "trained",  # what the optimizer changes, and low-precision copies of it that the model computes with
    "gradients",
    "optimizer",
    "activations",  # kept by a forward for its backward, or made again for it
    "logits",
    "batch",
    "workspace",  # everything else: what operators pass to one another and what they allocate inside
)
PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Footprint:
    """The peak of a run.

    Attributes:
        peak_bytes: the most that tensors take at one time.
        parts: bytes by kind (all of :data:`KINDS`) at that moment; they add up to ``peak_bytes``.
        phase: one of :data:`PHASES`, and ``module`` the innermost module, in which the peak falls.
        activations_by_module: bytes that each module made and a backward still needs then, largest first.
        timeline: (phase, bytes) along the run, some hundreds of points with every peak kept.
        steady_bytes: what still lives at the end.
        arena_bytes: the most that the compiled kernels' arenas hold; they are no tensors.
    """

    peak_bytes: int
    parts: Mapping[str, int]
    phase: str
    module: str
    activations_by_module: Mapping[str, int] = field(default_factory=dict)
    timeline: tuple[tuple[str, int], ...] = ()
    steady_bytes: int = 0
    arena_bytes: int = 0


def coarse(line: list[tuple[int, int]], points: int = 400) -> tuple[tuple[str, int], ...]:
    """A run's (phase number, bytes) after each operator in at most ``points`` points, each the highest of
    its stretch."""
    stretch = max(1, -(-len(line) // points))
    highest = (max(line[i : i + stretch], key=lambda p: p[1]) for i in range(0, len(line), stretch))
    return tuple((PHASES[phase], size) for phase, size in highest)
