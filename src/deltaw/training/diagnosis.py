"""Where numbers stopped being finite: the step's rows are run again, and every module is watched.

What is found first is named: a parameter, a module's output, the loss, or a parameter's gradient. The rows
are saved, so that the step can be looked at again elsewhere. Knows a session and a step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.data.packing import rows_of
from deltaw.durable import write_text
from deltaw.tensor_files import save_tensors
from deltaw.training.not_finite import NotFinite
from deltaw.training.session import Session

# Row numbers that a line shows.
_SHOWN = 12


class Diagnosis:
    """Finds out what is wrong with a step's rows, and saves them.

    Args:
        session: within :meth:`Session.running`, as it was before the step.
        folder: that the rows are saved in.
    """

    def __init__(self, session: Session, folder: Path) -> None:
        self._session = session
        self._folder = folder

    def __call__(self, found: NotFinite) -> list[str]:
        """What is known of the step, in lines."""
        items = [self._session.data.train[place] for place in found.rows]
        numbers = [row.row for item in items for row in rows_of(item)]
        try:
            lines = [self.first_place(items)]
        except Exception as error:  # whatever a model in this state raises; the step's own error comes first
            lines = [f"its rows could not be run again ({type(error).__name__}: {str(error)[:100]})"]
        shown = ", ".join(map(str, numbers[:_SHOWN])) + (", …" if len(numbers) > _SHOWN else "")
        lines.append(f"rows of the step: {shown}")
        name = f"failed_step-{found.step:06d}"
        try:
            self._save(name, found, items, numbers, lines)
        except OSError as error:
            return [*lines, f"they could not be saved: {error.strerror or error}"]
        return [*lines, f"saved as {name}.json and {name}.safetensors in {self._folder}"]

    def first_place(self, items: Sequence[Any]) -> str:
        """The first thing that is not finite when these rows are run, in words."""
        session = self._session
        broken = [name for name, p in session.model.named_parameters() if not _finite(p)]
        if broken:
            return f"the weights were not finite before the step: {_listed(broken)}"
        units = session.objective.units(items)
        trained = [(name, p) for name, p in session.model.named_parameters() if p.requires_grad]
        for batch in session.batcher.batches(items):
            with _watched(session.model) as first:
                loss = session.objective(batch)
            if first:
                return f"first not finite: the output of '{first[0]}'"
            if not _finite(loss):
                return "the outputs of all modules are finite, and the loss is not"
            gradients = torch.autograd.grad(loss / units, [p for _, p in trained], allow_unused=True)
            failing = [
                name
                for (name, _), g in zip(trained, gradients, strict=True)
                if g is not None and not _finite(g)
            ]
            if failing:
                # A backward comes to the last layers first.
                return f"the loss is finite, and not the gradient, first of '{failing[-1]}'" + (
                    f" ({len(failing)} of {len(trained)} parameters)" if len(failing) > 1 else ""
                )
        return "run again, the rows give finite numbers: they are too large only when added up"

    def _save(
        self,
        name: str,
        found: NotFinite,
        items: Sequence[Any],
        numbers: Sequence[int],
        lines: Sequence[str],
    ) -> None:
        rows = [row for item in items for row in rows_of(item)]
        tensors: dict[str, Tensor] = {}
        for place, row in enumerate(rows):
            for key, value in _arrays_of(row).items():
                tensors[f"{place}/{key}"] = torch.from_numpy(np.ascontiguousarray(value))
        save_tensors(self._folder / f"{name}.safetensors", tensors, {"format": "pt"})
        facts = {
            "step": found.step,
            "loss": str(found.loss),
            "gradient_norm": str(found.gradient_norm),
            "learning_rate": found.learning_rate,
            "rows": list(numbers),
            "places": [int(place) for place in found.rows],
            "diagnosis": list(lines),
        }
        write_text(self._folder / f"{name}.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """While open, the name of the first module whose output is not finite is added to the list."""
    first: list[str] = []
    hooks = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: object, output: object) -> None:
            if not first and not all(_finite(t) for t in _tensors_in(output)):
                first.append(name)

        return look

    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_hook(watch(name)))
    try:
        yield first
    finally:
        for hook in hooks:
            hook.remove()


def _tensors_in(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in _tensors_in(value)]
    if isinstance(output, list | tuple):
        return [t for value in output for t in _tensors_in(value)]
    return []


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _arrays_of(row: Any) -> dict[str, np.ndarray]:
    if not dataclasses.is_dataclass(row):
        return {}
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
