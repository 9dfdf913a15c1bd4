"""Feed that generates rows with the model that is being trained, for example completions of prompts.

A run that is interrupted between several steps on the same generated rows cannot generate them again, because its
weights have changed. Therefore these rows are stored in the run's folder.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.atomic_files import write_text
from deltaw.data.example import Example
from deltaw.decoding.generation import SampledCompletion
from deltaw.errors import UserError
from deltaw.hub.skeletons import has_values
from deltaw.training.batcher import Batcher
from deltaw.training.feed import Feed
from deltaw.training.objective import Objective
from deltaw.training.reducer import SINGLE_PROCESS, Reducer

_HINT = "restore the folder from a copy, or start over with --fresh"


class RolloutFeed(Feed):
    """Feeds rows that are generated before a step and used for ``steps_per_round`` steps.

    A subclass implements :meth:`generate` and :meth:`worst_case_rows`. If the generated rows depend only on the
    weights, the rows and the step, a resumed run has the same result as an uninterrupted one.

    Args:
        objective: Objective of the generated rows.
        batcher: Batcher of the generated rows.
        processes: Processes of the training.

    Attributes:
        row_class: Dataclass of the generated rows, which may have fields with arrays, numbers and texts.
    """

    generates_rows = True
    row_class: type[Any]

    def __init__(self, objective: Objective, batcher: Batcher, processes: Reducer = SINGLE_PROCESS) -> None:
        super().__init__(objective, batcher)
        self.processes = processes
        self._folder: Path | None = None
        self._round: tuple[int, Sequence[Any]] = (-1, [])

    @abc.abstractmethod
    def generate(self, rows: Sequence[Any], round_index: int) -> Sequence[Any]:
        """Return the rows to train on for these rows of a step. All processes must return the same rows.

        Implementations can set :attr:`step_metrics`.

        Args:
            round_index: Index of the step divided by ``steps_per_round``.
        """

    @abc.abstractmethod
    def worst_case_rows(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Return the largest rows that :meth:`generate` can return."""

    def has_gradient(self, row: Any) -> bool:
        """Return True if the loss of a generated row has a gradient. Other rows are not computed."""
        return True

    def counts_for_check(self, row: Any) -> bool:
        """Return True if a step with this row counts for :class:`deltaw.training.trained_check.TrainedCheck`."""
        return self.has_gradient(row)

    def is_generated(self, row: Any) -> bool:
        """Return False for a row that :meth:`generate` would replace."""
        return isinstance(row, self.row_class)

    def complete(self, prompt: Example, completion: SampledCompletion, **fields: Any) -> Any:
        """Return a row of a prompt and its completion. Generated tokens and the terminator are labels.

        Args:
            fields: Further fields of ``row_class``, a subclass of :class:`deltaw.data.example.Example`.
        """
        tokens = completion.tokens
        generated = completion.is_generated
        prompt_tokens = prompt.tokens if completion.prompt is None else completion.prompt
        generated = np.ones(len(tokens), bool) if generated is None else generated
        terminator = [] if completion.terminator is None else [completion.terminator]
        tokens = np.concatenate([prompt_tokens, tokens, terminator]).astype(np.int32)
        is_label = np.concatenate([np.zeros(len(prompt_tokens), bool), generated, np.ones(len(terminator), bool)])
        fields |= {"answer": completion.text, "active_from": prompt.active_from}
        return self.row_class(prompt.row, tokens, is_label, len(prompt_tokens), **fields)

    def expand(self, rows: Sequence[Any], step: int) -> tuple[Sequence[Any], bool]:
        if not has_values(self.objective.model):
            return self.worst_case_rows(rows), True
        index = step // self.steps_per_round
        if self._round[0] != index:
            is_new = step % self.steps_per_round == 0
            self._round = index, self.generate(rows, index) if is_new else self._load(step)
            if self._folder is not None and self.steps_per_round > 1:
                self._save()
        generated = self._round[1]
        return generated, any(map(self.counts_for_check, generated))

    def set_run_folder(self, folder: Path) -> None:
        self._folder = folder

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        rows = self._generated(rows)
        return super().batches([row for row in rows if self.has_gradient(row)] or list(rows[:1]))

    def cost_rows(self, rows: Sequence[Any]) -> Sequence[Any]:
        return super().cost_rows([row if self.has_gradient(row) else row.truncate(1) for row in rows])

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        return super().shapes(self._generated(rows))

    def _generated(self, rows: Sequence[Any]) -> list[Any]:
        """Replace rows that are not generated by their worst case. Only dry runs have such rows."""
        return [r for row in rows for r in ([row] if self.is_generated(row) else self.worst_case_rows([row]))]

    def _save(self) -> None:
        """Store the rows of the round, and delete rows that no checkpoint needs."""
        assert self._folder is not None
        index, rows = self._round
        folder = self._folder / "rollouts"
        folder.mkdir(exist_ok=True)
        write_text(folder / f"{index}.json", "[" + ",\n".join(json.dumps(_plain(row)) for row in rows) + "]\n")
        steps = (path.name.removeprefix("step-") for path in self._folder.glob("checkpoints/step-*"))
        needed = {index} | {int(step) // self.steps_per_round for step in steps if step.isdecimal()}
        for path in folder.glob("*.json"):
            if path.stem.isdecimal() and int(path.stem) not in needed:
                path.unlink(missing_ok=True)

    def _load(self, step: int) -> list[Any]:
        """Return the rows that process 0 stored for a step.

        Raises:
            UserError: if they are missing or invalid.
        """
        file = f"rollouts/{step // self.steps_per_round}.json"
        text = ""
        if self._folder is not None and (self._folder / file).is_file():
            text = (self._folder / file).read_text(encoding="utf-8")
        first = self.processes.texts(text)[0]
        if not first:
            message = f"the stored completions for step {step + 1} are missing from the run's folder"
            raise UserError(message, location="rollouts", hint=_HINT)
        try:
            return [self._row(values) for values in json.loads(first)]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            message = f"the stored completions for step {step + 1} are corrupted"
            raise UserError(message, location="rollouts", hint=_HINT) from error

    def _row(self, values: dict[str, Any]) -> Any:
        arrays = {name: np.array(v["values"], v["dtype"]) for name, v in values.items() if isinstance(v, dict)}
        return self.row_class(**{**values, **arrays})


def _plain(row: Any) -> dict[str, Any]:
    """Return the fields of a row as JSON values, arrays with their type."""
    values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    return values | {name: {"dtype": str(array.dtype), "values": array.tolist()} for name, array in arrays.items()}
