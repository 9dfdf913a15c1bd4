"""Cause of a loss or gradient that is not finite."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.atomic_files import write_text
from deltaw.data.example import rows_of
from deltaw.errors import first_names
from deltaw.tensor_files import save_tensors
from deltaw.training.session import Session
from deltaw.training.state import NotFinite

# Maximum number of row numbers in a message.
_MAX_ROWS = 12


class StepDiagnosis:
    """Finds the cause of a non-finite loss or gradient, and saves the rows of the step.

    The rows are run again with hooks on every module. The first non-finite parameter, module output, loss or gradient
    is reported.

    Args:
        session: Session within :meth:`Session.running`, in its state before the step.
        folder: Folder for the saved rows.
    """

    def __init__(self, session: Session, folder: Path) -> None:
        self._session = session
        self._folder = folder

    def __call__(self, event: NotFinite) -> list[str]:
        """Return the lines that describe the failed step."""
        items = [self._session.data.train[index] for index in event.rows]
        rows = [row for item in items for row in rows_of(item)]
        try:
            lines = [self.first_nonfinite(items)]
        except Exception as error:  # must not hide the error of the step
            lines = [f"its rows could not be run again ({type(error).__name__}: {str(error)[:100]})"]
        numbers = ", ".join(str(row.row) for row in rows[:_MAX_ROWS]) + (", …" if len(rows) > _MAX_ROWS else "")
        lines.append(f"rows of the step: {numbers}")
        name = f"failed_step-{event.step:06d}"
        try:
            self._save(name, event, rows, lines)
        except OSError as error:
            return [*lines, f"they could not be saved: {error.strerror or error}"]
        return [*lines, f"saved as {name}.json and {name}.safetensors in {self._folder}"]

    def first_nonfinite(self, items: Sequence[Any]) -> str:
        """Run the rows and describe the first non-finite value."""
        session = self._session
        broken = [name for name, p in session.model.named_parameters() if not _is_finite(p)]
        if broken:
            return f"the weights were not finite before the step: {first_names([repr(name) for name in broken])}"
        units = session.objective.units(items)
        trained = [(name, p) for name, p in session.model.named_parameters() if p.requires_grad]
        for batch in session.batcher.batches(items):
            with _record_nonfinite_output(session.model) as first:
                loss = session.objective(batch)
            if first:
                return f"first not finite: the output of '{first[0]}'"
            if not _is_finite(loss):
                return "the outputs of all modules are finite, and the loss is not"
            gradients = torch.autograd.grad(loss / units, [p for _, p in trained], allow_unused=True)
            pairs = zip(trained, gradients, strict=True)
            failing = [name for (name, _), g in pairs if g is not None and not _is_finite(g)]
            if failing:
                # The backward pass computes gradients of the last layers first.
                count = f" ({len(failing)} of {len(trained)} parameters)" if len(failing) > 1 else ""
                return f"the loss is finite, but the gradient of '{failing[-1]}' is not{count}"
        return "each microbatch is finite when run again, so only their sum overflows"

    def _save(self, name: str, event: NotFinite, rows: Sequence[Any], lines: Sequence[str]) -> None:
        tensors: dict[str, Tensor] = {}
        for index, row in enumerate(rows):
            for key, value in _array_fields(row).items():
                tensors[f"{index}/{key}"] = torch.from_numpy(np.ascontiguousarray(value))
        save_tensors(self._folder / f"{name}.safetensors", tensors, {"format": "pt"})
        content = {
            "step": event.step,
            "loss": str(event.loss),
            "gradient_norm": str(event.gradient_norm),
            "learning_rate": event.learning_rate,
            "rows": [row.row for row in rows],
            "places": [int(index) for index in event.rows],
            "diagnosis": list(lines),
        }
        write_text(self._folder / f"{name}.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _record_nonfinite_output(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that receives the name of the first module with a non-finite output."""
    first: list[str] = []

    def check_output(name: str, module: nn.Module, inputs: object, output: object) -> None:
        if not first and not all(_is_finite(t) for t in _tensors_in(output)):
            first.append(name)

    named = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_hook(functools.partial(check_output, name)) for name, module in named]
    try:
        yield first
    finally:
        for hook in hooks:
            hook.remove()


def _tensors_in(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    inner = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for value in inner for tensor in _tensors_in(value)]


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _array_fields(row: Any) -> dict[str, np.ndarray]:
    if not dataclasses.is_dataclass(row):
        return {}
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
