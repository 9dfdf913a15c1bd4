"""Agreement of processes that train together.

Settings are sent by process 0. Each process reads the model and the rows from local files, so their identities and the
precision are compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from deltaw.data.row_reader import RunData
from deltaw.data.row_store import digest_of_rows
from deltaw.errors import UserError
from deltaw.hub.loading import LoadedModel
from deltaw.kernels import loader, variants
from deltaw.kernels.arithmetic import WEIGHT_TYPES, Arithmetic
from deltaw.runs.resuming import row_digests
from deltaw.settings.config import RunConfig
from deltaw.training.parallel.group import Group
from deltaw.training.reducer import Reducer
from deltaw.training.session import Session, assemble
from deltaw.training.task import Task

_SAME_FILES = "use the same data files on each machine, or a shared folder"
_HINTS = {
    "rows": _SAME_FILES,
    "evaluation sets": _SAME_FILES,
    "precision": "set precision to a value that all machines support",
    "model": "use the same model on each machine",
    "start": "use the same adapter in start_from on each machine",
}


def send_settings(config: RunConfig | None, processes: Reducer) -> None:
    """Send the settings from process 0 to all other processes. None means that no training takes place."""
    if isinstance(processes, Group):
        processes.start_run()
        processes.send_text("null" if config is None else config.model_dump_json())


def receive_settings(group: Group) -> RunConfig | None:
    """Receive the settings of process 0."""
    group.start_run()
    received = json.loads(group.receive_text())
    return None if received is None else RunConfig.read(received)


def assemble_session(
    config: RunConfig,
    task: Task[Any],
    data: RunData,
    loaded: LoadedModel,
    processes: Reducer,
    resumed: Sequence[str] | None,
) -> Session:
    """Create the session of a run, and check that it is consistent with process 0.

    Args:
        resumed: Approximations of the resumed training, as restored by process 0.

    Raises:
        UserError: If the processes are inconsistent.
    """
    if isinstance(processes, Group):  # before the first joint computation
        sets = {name: digest_of_rows(rows) for name, rows in data.eval_sets.items()}
        rows = row_digests(data.train, data.held_out)
        precision = str(loaded.choices["precision"].value)
        _compare({"precision": precision, "rows": rows, "evaluation sets": sets}, processes)
        resumed = _share_arithmetic(resumed, processes)
    session = assemble(
        config,
        task,
        data,
        loaded.model,
        device=str(loaded.choices["device"].value),
        new_modules=loaded.new_modules,
        candidates=() if loaded.kernels is None else loaded.kernels.approximations,
        resumed=resumed,
        processes=processes,
    )
    if isinstance(processes, Group):
        _compare({"model": session.identity, "start": session.start and session.start.fingerprint}, processes)
        # From here on, process 0 also works independently.
        processes.synchronized = False
    return session


def _share_arithmetic(approximations: Sequence[str] | None, group: Group) -> Sequence[str] | None:
    """Let all processes compute products with the arithmetic of process 0.

    Returns:
        ``approximations`` of process 0.

    Raises:
        UserError: If a process does not support it, or its environment forces another one.
    """
    local = loader.arithmetic()
    if group.rank == 0:
        group.send_text(json.dumps([local.as_dict(), approximations]))
        return approximations
    received, approximations = json.loads(group.receive_text())
    remote = Arithmetic.from_dict(received)
    if remote != local:
        forced = variants.kernel_overrides()
        reason = f"{forced.source} is set there" if forced.source else None
        try:
            if reason is None:
                loader.use_arithmetic(remote)
        except (UserError, OSError, RuntimeError, ValueError) as error:
            reason = error.message if isinstance(error, UserError) else str(error)
        if reason is not None:
            message = f"it uses {_describe_arithmetic(local)}, process 0 uses {_describe_arithmetic(remote)}: {reason}"
            hint = f"set {variants.VARIABLE} in every process to kernels that all CPUs support"
            raise UserError(message, location=f"the CPU of process {group.rank}", hint=hint)
    return approximations


def _describe_arithmetic(arithmetic: Arithmetic) -> str:
    products = ", ".join(f"{stored} {arithmetic.for_type(stored)}" for stored in WEIGHT_TYPES)
    return f"{arithmetic.kernels or 'no'} kernels ({products})"


def _compare(values: dict[str, Any], group: Group) -> None:
    """Compare values with those of process 0, which sends them.

    Raises:
        UserError: If a value differs.
    """
    if group.rank == 0:
        group.send_text(json.dumps(values))
        return
    remote = json.loads(group.receive_text())
    for name, value in json.loads(json.dumps(values)).items():
        if value != (other := remote[name]):
            message = f"it does not have the same {name} as process 0"
            raise UserError(message, location=f"{name}: {_brief(value)} instead of {_brief(other)}", hint=_HINTS[name])


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 120 else text[:117] + "..."
