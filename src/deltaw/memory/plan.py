"""What a run will need, part by part, before it starts: tensors, and the process around them.

Tensors are known from a dry run on fake tensors (:mod:`deltaw.memory.simulation`). The process holds more:
the interpreter with its libraries, the rows, kernels that the matrix library builds for the shapes it meets,
and what an allocator cannot give back at once. And it goes through phases: reading tokenizer and rows,
loading the weights, training, saving. The largest of them is the peak. Knows numbers alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

# A run's tensors at their peak, part by part. Knows numbers alone.


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
        held_bytes: freed memory that the allocator keeps at the resident peak. Blocks below
            :data:`deltaw.machine.memory.LARGEST_KEPT` stay in the heap when they are freed. A larger block never
            reuses them.
    """

    peak_bytes: int
    parts: Mapping[str, int]
    phase: str
    module: str
    activations_by_module: Mapping[str, int] = field(default_factory=dict)
    timeline: tuple[tuple[str, int], ...] = ()
    steady_bytes: int = 0
    arena_bytes: int = 0
    held_bytes: int = 0


def coarse(line: list[tuple[int, int]], points: int = 400) -> tuple[tuple[str, int], ...]:
    """A run's (phase number, bytes) after each operator in at most ``points`` points, each the highest of
    its stretch."""
    stretch = max(1, -(-len(line) // points))
    highest = (max(line[i : i + stretch], key=lambda p: p[1]) for i in range(0, len(line), stretch))
    return tuple((PHASES[phase], size) for phase, size in highest)


# Of what comes and goes within a step, the share that the allocator holds beside it: holes between blocks of
# many sizes. It belongs to glibc's way of cutting blocks, not to a version or a processor.
SLACK = 0.06
# The share of a process's memory that few long rows must take to be worth a word.
WORTH = 0.15
# What a process goes through. The parts of its memory are those of the training, with what another phase
# takes beyond it under that phase's name.
PROCESS_PHASES = ("reading", "loading", "training", "rollouts", "saving")


@dataclass(frozen=True)
class Plan:
    """The memory of one run.

    Attributes:
        method: its name.
        total_parameters: N, of the model. trained_parameters: M.
        peak_bytes: the most that tensors take at one time; ``parts`` tells its kinds, and adds up to it.
        peak_resident_bytes: the most main memory that the process holds; ``resident`` tells its parts, and
            adds up to it.
        phase, module: where in a step the peak of the tensors falls.
        activations: bytes by the module that made them, the largest first.
        tokens: of the largest microbatch. rows: of a step.
        timeline: (phase, bytes) along two steps.
        precision: of the frozen weights.
        operations: floating-point operations of a step, and the number of ``operators`` that compute them.
        phases: the process's peak in each of :data:`PROCESS_PHASES` that the run has.
        arithmetic: the variant of the kernels, and how products are computed, by the type of stored weights.
        disk_bytes: of features that the run keeps in the cache folder.
        block_bytes: of the frozen weights of all blocks, and of the largest block.
        long_rows: where few rows set the peak: how many ``rows`` to train on, ``of`` how many, are longer than
            ``max_length`` tokens, and about how many bytes of the peak would be saved without them (``saves``).
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
    phases: Mapping[str, int] = field(default_factory=dict)
    arithmetic: Mapping[str, str] = field(default_factory=dict)
    disk_bytes: int = 0
    block_bytes: tuple[int, int] = (0, 0)
    long_rows: Mapping[str, int] = field(default_factory=dict)

    def without_long_rows(self, max_length: int, rows: int, of: int, tokens: int) -> Plan:
        """With ``long_rows``, where shorter rows would save much.

        What a microbatch takes grows with its tokens, as attention is computed in tiles.

        Args:
            tokens: of the largest microbatch of the other rows.
        """
        share = 1 - tokens / max(1, self.tokens)
        held = sum(self.parts[part] for part in ("activations", "logits", "batch", "workspace"))
        training = self.phases["training"] - int(share * (1 + SLACK) * held)
        saves = self.peak_resident_bytes - max(
            training, *(size for phase, size in self.phases.items() if phase != "training")
        )
        if saves < WORTH * self.peak_resident_bytes:
            return self
        found = {"max_length": max_length, "rows": rows, "of": of, "saves": saves}
        return dataclasses.replace(self, long_rows=found)

    def of_process(self, processes: int, *, divided: bool) -> Plan:
        """The plan of one of several processes that train together.

        Beside what a process needs that trains its rows alone, it holds the vector in which the gradients of
        all are added up.

        Args:
            divided: whether the blocks' weights are divided among them. Then a process holds its share, and
                one block as a whole.
        """
        blocks, largest = self.block_bytes
        saved = blocks - min(blocks, -(-blocks // processes) + largest) if divided else 0
        vector = 4 * self.trained_parameters
        weights = self.parts["weights"] - saved
        tensors = {**self.resident, "tensors": self.resident["tensors"] - saved + vector}
        loading = self.phases["loading"]
        if divided:  # files are open for one block at a time
            loading = min(loading - saved, self.resident["process"] + weights)
        phases = {phase: size if phase == "reading" else size - saved + vector for phase, size in self.phases.items()}
        phases["loading"] = loading
        resident = _with_excess({k: v for k, v in tensors.items() if k not in PROCESS_PHASES}, phases)
        return dataclasses.replace(
            self,
            peak_bytes=self.peak_bytes - saved + vector,
            peak_resident_bytes=sum(resident.values()),
            parts={**self.parts, "weights": weights, "gradients": self.parts["gradients"] + vector},
            resident=resident,
            timeline=tuple((phase, size - saved + vector) for phase, size in self.timeline),
            phases=phases,
        )

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        values = self.kept()
        for name in ("method", "timeline", "operators", "block_bytes"):
            del values[name]
        renamed = {"tokens": "tokens_per_pass", "rows": "rows_per_step", "operations": "operations_per_step"}
        return {renamed.get(name, name): value for name, value in values.items()}

    def kept(self) -> dict[str, object]:
        """Every field, ready for JSON; :meth:`from_kept` is the way back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_kept(cls, values: Mapping[str, object]) -> Plan:
        """A plan from what :meth:`kept` gave.

        Raises:
            TypeError: the fields are those of another version.
        """
        line = values.get("timeline")
        points = tuple((str(phase), int(size)) for phase, size in line) if isinstance(line, list) else ()
        blocks = values.get("block_bytes")
        sizes = tuple(map(int, blocks)) if isinstance(blocks, list) else (0, 0)
        return cls(**{**values, "timeline": points, "block_bytes": sizes})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Fitting:
    """Settings that fit, what they need, and how long a step takes relative to the fastest of them."""

    method: str
    rank: int | None
    tokens_per_pass: int
    checkpointing: bool
    precision: str
    plan: Plan
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("plan", "seconds")}
        needs = ("peak_resident_bytes", "peak_bytes", "trained_parameters")
        of_plan = {name: getattr(self.plan, name) for name in needs}
        return {**values, **of_plan, "estimated_seconds_per_step": self.seconds}


def resident_parts(
    footprint: Footprint,
    *,
    process_bytes: int,
    kernel_bytes: int = 0,
    feature_bytes: int = 0,
    reading_bytes: int = 0,
    mapped_bytes: int = 0,
    saving_bytes: int = 0,
    unread_bytes: int = 0,
    decoder_bytes: int = 0,
    rollout_bytes: int = 0,
) -> tuple[dict[str, int], dict[str, int]]:
    """The parts of the process's main memory at its peak, which add up to it, and the peak of each phase.

    Args:
        process_bytes: what the process holds before the model is loaded.
        kernel_bytes: what the matrix library builds for the shapes that it meets; the arenas of the compiled
            kernels, which the footprint knows, are added to it.
        feature_bytes: of a mapped file that a run goes through; the system may take their memory back.
        reading_bytes: the process's peak while tokenizer and rows were read.
        mapped_bytes: of files that stay mapped while weights of another type are made from them.
        saving_bytes: what writing the tokenizer takes for a moment, with the model loaded.
        unread_bytes: of weights that are mapped from a file and never touched.
        decoder_bytes: of weights that a decoder has as copies, over the whole training.
        rollout_bytes: what writing completions takes between steps; 0 where none are written.
    """
    kinds = footprint.parts
    lasting = sum(kinds[kind] for kind in ("weights", "trained", "optimizer", "gradients"))
    training = {
        "process": process_bytes,
        "tensors": footprint.peak_bytes - unread_bytes,
        "kernels": kernel_bytes + footprint.arena_bytes,
        "features": feature_bytes,
        "allocator": footprint.held_bytes + int(SLACK * (footprint.peak_bytes - lasting)),
        "decoder": decoder_bytes,
    }
    weights = kinds["weights"] - unread_bytes
    phases = {
        "reading": max(reading_bytes, process_bytes),
        "loading": process_bytes + weights + mapped_bytes,
        "training": sum(training.values()),
        "saving": process_bytes + weights + kinds["trained"] + saving_bytes,
    }
    if rollout_bytes:
        # Gradients are freed after a step, before text is generated.
        kept = process_bytes + lasting - kinds["gradients"] - unread_bytes + training["kernels"] + decoder_bytes
        phases["rollouts"] = kept + int((1 + SLACK) * rollout_bytes)
    return _with_excess(training, phases), phases


def _with_excess(training: Mapping[str, int], phases: Mapping[str, int]) -> dict[str, int]:
    """The parts of the training, with what the highest phase takes beyond it."""
    highest = max(phases, key=lambda name: phases[name])
    excess = {name: 0 for name in phases if name != "training"}
    if highest != "training":
        excess[highest] = phases[highest] - phases["training"]
    return {**training, **excess}
