"""Probes: measurements of the base model and the trained model, in addition to the metrics of the training.

A run and its monitor call all probes of the run at the same points and record their results. Probes use greedy
decoding or no decoding, so they use no random numbers, and they do not change the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from deltaw.progress import LogFunction
from deltaw.training.evaluation.base import Evaluation

# Adds a line to a run's metrics.
WriteLine: TypeAlias = Callable[[Mapping[str, object]], None]


@dataclass(frozen=True)
class ProbeResult:
    """Result of a probe.

    Attributes:
        metrics: JSON values for the metrics file, by name.
        line: Message for the user, if any.
        fields: Fields of the run's result.
    """

    metrics: Mapping[str, object] = field(default_factory=dict)
    line: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self, step: int) -> dict[str, object]:
        """Return the line of the metrics file."""
        return {"step": step, **self.metrics}

    def record(self, step: int, write: WriteLine, log: LogFunction) -> None:
        """Write the metrics and log the message."""
        if self.metrics:
            write(self.as_dict(step))
        if self.line is not None:
            log(self.line)


class Probe:
    """Base class of probes. The methods are listed in the order in which they are called, and measure nothing."""

    def before(self) -> None:
        """Measure the base model before a run starts or resumes. Called outside of ``session.running``."""

    def evaluate(self, step: int) -> Iterator[ProbeResult]:
        """Measure the model at an evaluation after ``step`` steps, within ``session.running``.

        Also called with step 0 before a run starts or resumes, outside of ``session.running``.
        """
        return iter(())

    def verify(self, evaluation: Evaluation) -> Iterator[ProbeResult]:
        """Check the evaluation after the last step, within ``session.running``."""
        return iter(())

    def after(self, evaluation: Evaluation) -> Iterator[ProbeResult]:
        """Measure the saved adapter of a run that was not interrupted. Called outside of ``session.running``.

        Args:
            evaluation: Evaluation of the adapter.
        """
        return iter(())

    def state(self) -> dict[str, Any]:
        """Return JSON values for a checkpoint, by names that no other probe uses."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state`, after :meth:`before`."""
