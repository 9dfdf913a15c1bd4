"""What all processes of a run must have alike: the settings travel; model, precision and rows are compared.

Each process reads the model and the rows from its own machine's files, so that they may differ there.
"""

from __future__ import annotations

import json
from typing import Any

from deltaw.config import RunConfig
from deltaw.errors import UserError
from deltaw.hub.loading import LoadedModel
from deltaw.training.parallel.group import Group
from deltaw.training.parallel.reducer import Reducer
from deltaw.training.resuming import rows_facts
from deltaw.training.session import Session

_HINTS = {
    "precision": "set precision to one that all machines have",
    "rows": "give each machine the same files of rows, or a folder that all of them see",
    "model": "give each machine the same model",
}


def send_settings(config: RunConfig, processes: Reducer) -> None:
    """From process 0 to all others, where there are any."""
    if isinstance(processes, Group):
        processes.send_text(config.model_dump_json())


def receive_settings(group: Group) -> RunConfig:
    """Those of process 0."""
    return RunConfig.read(json.loads(group.receive_text()))


def send_facts(session: Session, loaded: LoadedModel, processes: Reducer) -> None:
    """From process 0 to all others, which compare them with their own."""
    if isinstance(processes, Group):
        # All assembled alike; from here on process 0 does things by itself.
        processes.together = False
        processes.send_text(json.dumps(_facts(session, loaded)))


def check_facts(session: Session, loaded: LoadedModel, group: Group) -> None:
    """Compare with what process 0 sent.

    Raises:
        UserError: something differs.
    """
    theirs = json.loads(group.receive_text())
    for name, ours in json.loads(json.dumps(_facts(session, loaded))).items():
        if ours != theirs[name]:
            raise UserError(
                f"it does not have the same {name} as process 0",
                where=f"{name}: {_brief(ours)} instead of {_brief(theirs[name])}",
                hint=_HINTS[name],
            )


def _facts(session: Session, loaded: LoadedModel) -> dict[str, Any]:
    return {
        "precision": str(loaded.choices["precision"].value),
        "model": session.identity,
        "rows": dict(rows_facts(session.data.train, session.data.held_out)),
    }


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 120 else text[:117] + "..."
