"""What all processes of a run must have alike: the settings travel; model, precision and rows are compared.

Each process reads the model and the rows from its own machine's files, so that they may differ there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from deltaw.config import RunConfig
from deltaw.errors import UserError
from deltaw.hub.loading import LoadedModel
from deltaw.kernels import loader, variants
from deltaw.kernels.arithmetic import STORED, Arithmetic
from deltaw.training.parallel.group import Group
from deltaw.training.parallel.reducer import Reducer
from deltaw.training.resuming import digest_of_rows, rows_facts
from deltaw.training.session import Session, assemble
from deltaw.training.tasks.base import RunData, Task

_ROWS = "give each machine the same files of rows, or a folder that all of them see"
_HINTS = {
    "precision": "set precision to one that all machines have",
    "rows": _ROWS,
    "evaluation sets": _ROWS,
    "model": "give each machine the same model",
}


def send_settings(config: RunConfig, processes: Reducer) -> None:
    """From process 0 to all others, where there are any."""
    if isinstance(processes, Group):
        processes.send_text(config.model_dump_json())


def receive_settings(group: Group) -> RunConfig:
    """Those of process 0."""
    return RunConfig.read(json.loads(group.receive_text()))


def assemble_alike(
    config: RunConfig,
    task: Task,
    data: RunData,
    loaded: LoadedModel,
    processes: Reducer,
    *,
    begun: Sequence[str] | None = None,
) -> Session:
    """The session of a run, in each process; what must be alike is compared with process 0.

    Args:
        begun: what a training that goes on computed approximately, as process 0 has it from its state.

    Raises:
        UserError: something differs.
    """
    if isinstance(processes, Group):  # before anything is computed together
        _compare(_facts_of_rows(data, loaded), processes)
        begun = _compute_alike(begun, processes)
    session = assemble(
        config,
        task,
        data,
        loaded.model,
        device=str(loaded.choices["device"].value),
        new_modules=loaded.new_modules,
        offered=() if loaded.kernels is None else loaded.kernels.approximations,
        begun=begun,
        processes=processes,
    )
    if isinstance(processes, Group):
        _compare({"model": session.identity}, processes)
        # From here on process 0 does things by itself.
        processes.together = False
    return session


def _compute_alike(begun: Sequence[str] | None, group: Group) -> Sequence[str] | None:
    """Let each process compute products as process 0 does.

    Returns:
        ``begun`` of process 0.

    Raises:
        UserError: one cannot, or is told not to.
    """
    ours = loader.arithmetic()
    if group.rank == 0:
        group.send_text(json.dumps([ours.as_dict(), begun]))
        return begun
    told, begun = json.loads(group.receive_text())
    theirs = Arithmetic.read(told)
    if theirs != ours:
        forced = variants.asked()
        reason = f"{forced.said} is set there" if forced.said else None
        try:
            if reason is None:
                loader.compute_with(theirs)
        except (UserError, OSError, RuntimeError, ValueError) as error:
            reason = error.what if isinstance(error, UserError) else str(error)
        if reason is not None:
            raise UserError(
                f"it computes with {_named(ours)} and process 0 with {_named(theirs)}: {reason}",
                where=f"the processor of process {group.rank}",
                hint=f"set {variants.VARIABLE} in every process to kernels that all processors have",
            )
    return begun


def _named(arithmetic: Arithmetic) -> str:
    ways = ", ".join(f"{stored} {arithmetic.of(stored)}" for stored in STORED)
    return f"{arithmetic.kernels or 'no'} kernels ({ways})"


def _facts_of_rows(data: RunData, loaded: LoadedModel) -> dict[str, Any]:
    return {
        "precision": str(loaded.choices["precision"].value),
        "rows": dict(rows_facts(data.train, data.held_out)),
        "evaluation sets": {name: digest_of_rows(rows) for name, rows in data.eval_sets.items()},
    }


def _compare(facts: dict[str, Any], group: Group) -> None:
    """Process 0 sends its facts, and the others compare them with their own."""
    if group.rank == 0:
        group.send_text(json.dumps(facts))
        return
    theirs = json.loads(group.receive_text())
    for name, ours in json.loads(json.dumps(facts)).items():
        if ours != theirs[name]:
            raise UserError(
                f"it does not have the same {name} as process 0",
                where=f"{name}: {_brief(ours)} instead of {_brief(theirs[name])}",
                hint=_HINTS[name],
            )


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 120 else text[:117] + "..."
