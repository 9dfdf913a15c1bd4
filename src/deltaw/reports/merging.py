"""Format the result of a merge for the terminal and as JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.experiments.comparison import without_nan

if TYPE_CHECKING:
    from deltaw.export.as_adapter import AdapterResult
    from deltaw.export.merge import MergeResult

_MAX_ERRORS = 5


def merge_lines(result: MergeResult) -> list[str]:
    """Return the lines about a merged model."""
    lines = []
    if result.error is not None:
        lines += _error_lines(result.errors, result.error)
    if result.dropped:
        example = f"such as '{result.dropped[0]}'"
        lines.append(f"dropped {len(result.dropped)} tensors of the base that this model does not use, {example}")
    size, seconds = result.bytes / 1e9, result.seconds
    files = "1 file" if len(result.files) == 1 else f"{len(result.files)} files"
    cost = f"{size:.2f} GB in {files}, {seconds:.1f} s ({size / max(seconds, 1e-9):.2f} GB/s)"
    return [*lines, f"merged {len(result.changed)} of {result.tensors} tensors into {result.output}: {cost}"]


def adapter_lines(result: AdapterResult) -> list[str]:
    """Return the lines about a written adapter."""
    size = f"{result.parameters:,} parameters, {result.bytes / 1e6:.2f} MB"
    summary = f"wrote an adapter of rank {result.rank} into {result.output}: {size}"
    return [*_error_lines(result.errors, result.error), summary]


def as_dict(result: MergeResult | AdapterResult) -> dict[str, object]:
    """Return plain values for JSON. Non-finite numbers become None."""
    values = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    return {key: _plain(value) for key, value in values.items()}


def _error_lines(errors: dict[str, float], total: float) -> list[str]:
    lines = [f"relative error of ΔW: {total:.3g} over all layers"]
    worst = sorted(errors.items(), key=lambda entry: -entry[1])[:_MAX_ERRORS]
    if worst and worst[0][1] > 0:
        lines.append("  largest: " + ", ".join(f"{name} {error:.3g}" for name, error in worst))
    return lines


def _plain(value: object) -> object:
    if hasattr(value, "as_dict"):
        return _plain(value.as_dict())
    return str(value) if isinstance(value, Path) else without_nan(value)
