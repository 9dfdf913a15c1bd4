"""Predicted memory of a run by part: its tensors, and the rest of the process. Predicted time. Arguments of plans.

On CUDA, a plan describes the memory of the device. Main memory is a single number (``host_bytes``).

Tensors are known from a dry run on fake tensors (:mod:`deltaw.memory.simulation`). The process also contains the
interpreter with its libraries, the rows, kernels compiled by the matrix library, and memory that the allocator cannot
return. A run has several phases (see :data:`PROCESS_PHASES`), and its peak is that of the largest.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltaw.errors import UserError
from deltaw.machine.cards import card_memory, context_bytes, workspace_bytes
from deltaw.machine.memory import free_memory_bytes

KINDS = (
    "weights",  # frozen parameters and buffers
    "trained",  # trainable parameters, and low-precision copies of them that the model computes with
    "gradients",
    "optimizer",
    "activations",  # saved for the backward pass, or recomputed in it
    "logits",
    "batch",
    "workspace",  # all other tensors: temporary results, and buffers inside operators
)
PHASES = ("forward", "backward", "optimizer")
# Memory fragmentation, relative to the tensors that are allocated and freed within a step. It is a property of glibc's
# allocation strategy and does not depend on version or processor.
ALLOCATOR_SLACK = 0.06
# A few long rows are reported if they cause at least this share of the process's memory.
LONG_ROWS_SHARE = 0.15
# Phases of a process. The parts of its memory are those of the training phase. If another phase needs more, the excess
# is a part with the name of that phase.
PROCESS_PHASES = ("reading", "loading", "training", "rollouts", "saving")


@dataclass(frozen=True)
class Footprint:
    """Peak memory of a run's tensors.

    Attributes:
        peak_bytes: Maximum bytes of all tensors.
        parts: Bytes by kind (all of :data:`KINDS`) at the peak. They add up to ``peak_bytes``.
        phase: Phase of the peak, one of :data:`PHASES`.
        module: Innermost module that was running at the peak.
        activations_by_module: Bytes of activations at the peak by the module that allocated them, largest first.
        timeline: (phase, bytes) along the run, downsampled to a few hundred points that include every peak.
        steady_bytes: Bytes of tensors that are alive at the end.
        arena_bytes: Maximum bytes of the compiled kernels' arenas, which are not tensors.
        retained_bytes: Freed memory that the allocator retains at the resident peak. Blocks below
            :data:`deltaw.machine.memory.MAX_RETAINED_BYTES` stay in the heap when they are freed. Larger blocks never
            reuse them. On CUDA, the bytes of all segments above the peak of the tensors.
    """

    peak_bytes: int
    parts: Mapping[str, int]
    phase: str
    module: str
    activations_by_module: Mapping[str, int] = field(default_factory=dict)
    timeline: tuple[tuple[str, int], ...] = ()
    steady_bytes: int = 0
    arena_bytes: int = 0
    retained_bytes: int = 0


def downsample(timeline: list[tuple[int, int]], points: int = 400) -> tuple[tuple[str, int], ...]:
    """Reduce a run's (phase number, bytes) after each operator to at most ``points`` points, each the maximum of an
    interval.
    """
    interval = max(1, -(-len(timeline) // points))
    highest = (max(timeline[i : i + interval], key=lambda p: p[1]) for i in range(0, len(timeline), interval))
    return tuple((PHASES[phase], size) for phase, size in highest)


@dataclass(frozen=True)
class Plan:
    """Predicted memory of one run.

    Attributes:
        method: Name of the method.
        total_parameters: Number of parameters of the model.
        trained_parameters: Number of trainable parameters.
        peak_bytes: Maximum bytes of all tensors.
        peak_resident_bytes: Maximum main memory of the process in bytes. On CUDA, the maximum of the device's memory
            that torch allocates (``torch.cuda.max_memory_allocated``).
        parts: Bytes of the tensors by kind. They add up to ``peak_bytes``.
        resident: Bytes of the process's memory by part. They add up to ``peak_resident_bytes``.
        phase: Phase of a step in which the tensors reach their peak.
        module: Module in which the tensors reach their peak.
        activations: Bytes of activations by the module that allocated them, largest first.
        tokens: Tokens of the largest microbatch.
        rows: Rows of a step.
        timeline: (phase, bytes) along two steps.
        precision: Precision of the frozen weights.
        operations: Floating-point operations of a step.
        operators: Number of operator calls of a step.
        phases: Peak of the process in each of its :data:`PROCESS_PHASES`.
        arithmetic: Kernel variant, and the arithmetic of products by the storage type of the weights.
        disk_bytes: Bytes of features that the run stores in the cache folder.
        block_bytes: Bytes of the frozen weights of all blocks, and of the largest block.
        long_rows: Set if a few long rows determine the peak: ``rows`` of the ``of`` training rows exceed ``max_length``
            tokens, and leaving them out ``saves`` about that many bytes. Otherwise empty.
        workload: Work of the run (:class:`deltaw.training.planning.run_time.Workload`), from which its time is
            predicted. Empty if unknown.
        seconds_per_step: Predicted mean duration of an optimizer step, or None if unknown.
        seconds: Predicted duration of the run, or None if unknown.
        seconds_by_phase: Predicted seconds of each phase. They add up to ``seconds``.
        time_uncertain: Reason why the predicted time is uncertain or unknown. Empty if it is reliable.
        device: Device of the run.
        overhead: Bytes of the device's memory that are not allocated: unused parts of the allocator's segments
            (``allocator``, an estimate from the simulated steps) and the CUDA context (``context``). Empty on the CPU.
        host_bytes: Maximum main memory of a run on CUDA, when it loads the weights.
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
    workload: Mapping[str, object] = field(default_factory=dict, compare=False)
    seconds_per_step: float | None = None
    seconds: float | None = None
    seconds_by_phase: Mapping[str, float] = field(default_factory=dict)
    time_uncertain: str = ""
    device: str = "cpu"
    overhead: Mapping[str, int] = field(default_factory=dict)
    host_bytes: int = 0

    @property
    def required_bytes(self) -> int:
        """Memory of the device that must be available, in bytes."""
        return self.peak_resident_bytes + sum(self.overhead.values())

    def without_long_rows(self, max_length: int, rows: int, of: int, tokens: int) -> Plan:
        """Return the plan with ``long_rows`` set if leaving long rows out would save a significant share of the memory.

        The memory of a microbatch grows linearly with its tokens, because attention is computed in tiles.

        Args:
            max_length: Length in tokens above which a row counts as long.
            rows: Number of long rows.
            of: Number of training rows.
            tokens: Tokens of the largest microbatch of the other rows.
        """
        share = 1 - tokens / max(1, self.tokens)
        microbatch_bytes = sum(self.parts[part] for part in ("activations", "logits", "batch", "workspace"))
        training = self.phases["training"] - int(
            share * (1 + ALLOCATOR_SLACK * (self.device == "cpu")) * microbatch_bytes
        )
        others = [size for phase, size in self.phases.items() if phase != "training"]
        saves = self.peak_resident_bytes - max(training, *others)
        if saves < LONG_ROWS_SHARE * self.peak_resident_bytes:
            return self
        long_rows = {"max_length": max_length, "rows": rows, "of": of, "saves": saves}
        return dataclasses.replace(self, long_rows=long_rows)

    def per_process(self, processes: int, sharding: str) -> Plan:
        """Return the plan of one of several processes that train together, given the plan of one with its rows.

        In addition to the memory of a process that trains alone, each has a vector in which gradients are summed.

        Args:
            processes: Number of processes.
            sharding: Value of ``train.sharding``. With ``base``, each process stores its shard of the blocks' weights
                and one complete block.
        """
        if processes == 1:
            return self
        sharded = sharding == "base" and self.method == "lora"
        blocks, largest = self.block_bytes
        saved = blocks - min(blocks, -(-blocks // processes) + largest) if sharded else 0
        vector = 4 * self.trained_parameters
        weights = self.parts["weights"] - saved
        tensors = {**self.resident, "tensors": self.resident["tensors"] - saved + vector}
        loading = self.phases["loading"]
        if sharded:  # files are open for one block at a time
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
            workload={},
        )

    def as_dict(self) -> dict[str, object]:
        """Return the plan as JSON-serializable output for users."""
        values = self.to_fields()
        for name in ("method", "timeline", "operators", "block_bytes", "workload"):
            del values[name]
        renamed = {"tokens": "tokens_per_pass", "rows": "rows_per_step", "operations": "operations_per_step"}
        return {renamed.get(name, name): value for name, value in values.items()}

    def to_fields(self) -> dict[str, object]:
        """Return all fields, JSON-serializable. :meth:`from_fields` restores the plan."""
        return dataclasses.asdict(self)

    @classmethod
    def from_fields(cls, values: Mapping[str, object]) -> Plan:
        """Restore a plan from the result of :meth:`to_fields`.

        Raises:
            TypeError: if the fields are those of another version.
        """
        timeline = values.get("timeline")
        points = tuple((str(phase), int(size)) for phase, size in timeline) if isinstance(timeline, list) else ()
        blocks = values.get("block_bytes")
        sizes = tuple(map(int, blocks)) if isinstance(blocks, list) else (0, 0)
        return cls(**{**values, "timeline": points, "block_bytes": sizes})  # type: ignore[arg-type]


@dataclass(frozen=True)
class FittingPlan:
    """Settings that fit into a memory budget, with their plan and estimated time.

    Attributes:
        seconds: Estimated time of a step, comparable only between settings.
    """

    method: str
    rank: int | None
    tokens_per_pass: int
    checkpointing: bool
    precision: str
    plan: Plan
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Return the settings and their main figures, JSON-serializable."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("plan", "seconds")}
        names = ("peak_resident_bytes", "peak_bytes", "trained_parameters")
        figures = {name: getattr(self.plan, name) for name in names}
        return {**values, **figures, "estimated_seconds_per_step": self.seconds}


@dataclass(frozen=True)
class FittingTime:
    """Settings with which a run takes at most a given time, with their plan.

    Attributes:
        precision: Precision of the frozen weights.
        tokens_per_pass: Value of ``train.tokens_per_pass``.
        checkpointing: Value of ``train.checkpointing``.
        steps: Number of optimizer steps.
        epochs: Value of ``train.epochs``.
        rows: Value of ``data.rows``, or None for all rows.
        seconds: Predicted duration of the run.
        plan: Plan of the run with all of its steps.
    """

    precision: str
    tokens_per_pass: int | str
    checkpointing: bool | int
    steps: int
    epochs: float
    rows: int | None
    seconds: float
    plan: Plan

    def as_dict(self) -> dict[str, object]:
        """Return the settings and their predicted costs, JSON-serializable."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "plan"}
        names = ("seconds_per_step", "time_uncertain", "peak_resident_bytes")
        return {**values, **{name: getattr(self.plan, name) for name in names}}


def available_bytes(memory: str | None, device: str) -> int | None:
    """Return the memory that a run may use: on CUDA the setting ``memory``, else the free memory of the device.

    Returns:
        None if the device is a card that is not on this machine and ``memory`` is not set.
    """
    if device == "cpu":
        return free_memory_bytes()
    if memory is not None:
        return parse_bytes(memory, location="memory")
    # The context already exists when the free memory is read, and plans contain it.
    return None if (card := card_memory(device)) is None else card[0] + context_bytes()


@dataclass(frozen=True)
class OtherBytes:
    """Memory of a run in bytes, in addition to its tensors and its process before the model is loaded.

    Attributes:
        kernels: Kernels that the matrix library compiles. Arenas of the compiled kernels are added from the footprint.
        features: Mapped file of stored features that the run reads. The system can reclaim this memory.
        reading: Peak of the process while tokenizer and rows are read.
        mapped: Files that stay mapped while their weights are converted to another type.
        saving: Temporary memory for writing the tokenizer, with the model loaded.
        unread: Mapped weights that are never read.
        decoder: Copies of weights that the decoding engine needs during training.
        rollouts: Memory for generating completions between steps, or 0 without rollouts.
    """

    kernels: int = 0
    features: int = 0
    reading: int = 0
    mapped: int = 0
    saving: int = 0
    unread: int = 0
    decoder: int = 0
    rollouts: int = 0


def resident_parts(
    footprint: Footprint, process_bytes: int, other: OtherBytes, device: str = "cpu"
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the process's main memory by part at its peak, and the peak of each phase.

    Args:
        footprint: Footprint of the run's tensors.
        process_bytes: Memory of the process before the model is loaded.
        other: Further memory.
        device: Device of the run.

    Returns:
        Bytes by part, which add up to the peak, and bytes by phase.
    """
    kinds = footprint.parts
    slack = ALLOCATOR_SLACK * (device == "cpu")
    permanent = sum(kinds[kind] for kind in ("weights", "trained", "optimizer", "gradients"))
    training = {
        "process": process_bytes,
        "tensors": footprint.peak_bytes - other.unread,
        "kernels": other.kernels + footprint.arena_bytes,
        "features": other.features,
        "allocator": footprint.retained_bytes + int(slack * (footprint.peak_bytes - permanent)),
        "decoder": other.decoder,
    }
    weights = kinds["weights"] - other.unread
    phases = {
        "reading": max(other.reading, process_bytes),
        "loading": process_bytes + weights + other.mapped,
        "training": sum(training.values()),
        "saving": process_bytes + weights + kinds["trained"] + other.saving,
    }
    if other.rollouts:
        # Gradients are freed after a step, before text is generated.
        base_bytes = process_bytes + permanent - kinds["gradients"] - other.unread + training["kernels"] + other.decoder
        phases["rollouts"] = base_bytes + int((1 + slack) * other.rollouts)
    return _with_excess(training, phases), phases


def memory_fields(footprint: Footprint, process_bytes: int, other: OtherBytes, device: str) -> dict[str, Any]:
    """Return the fields of a plan that describe the memory of a run, by name.

    Args:
        footprint: Footprint of the run's tensors.
        process_bytes: Main memory of the process before the model is loaded.
        other: Further memory.
        device: Device of the run.
    """
    fields: dict[str, Any] = {"parts": footprint.parts, "phase": footprint.phase, "module": footprint.module}
    fields |= {"activations": footprint.activations_by_module, "timeline": footprint.timeline, "device": device}
    if device != "cpu":
        weights = footprint.parts["weights"] + other.mapped + other.features
        fields["host_bytes"] = max(other.reading, process_bytes + weights)
        fields["overhead"] = {"allocator": footprint.retained_bytes, "context": context_bytes()}
        footprint = dataclasses.replace(footprint, retained_bytes=0)
        process_bytes = 0
        other = OtherBytes(decoder=other.decoder, rollouts=other.rollouts, kernels=workspace_bytes(device))
    resident, phases = resident_parts(footprint, process_bytes, other, device)
    sizes = {"peak_bytes": footprint.peak_bytes, "peak_resident_bytes": sum(resident.values())}
    return {**fields, **sizes, "resident": resident, "phases": phases}


def _with_excess(training: Mapping[str, int], phases: Mapping[str, int]) -> dict[str, int]:
    """Return the parts of the training phase, plus the excess of the highest phase over training."""
    highest = max(phases, key=lambda name: phases[name])
    excess = {name: 0 for name in phases if name != "training"}
    if highest != "training":
        excess[highest] = phases[highest] - phases["training"]
    return {**training, **excess}


_PREFIXES = "kmgt"
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate(_PREFIXES, 1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate(_PREFIXES, 1)}


def parse_bytes(text: str, location: str = "--fit-memory") -> int:
    """Parse ``6GB``, ``512 MiB`` or a plain number of bytes.

    Raises:
        UserError: if the text is not a size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"'{text}' is not a valid size", location=location, hint="write 6GB, 512MB or 8GiB")
    return int(float(match[1]) * _UNITS[match[2]])
