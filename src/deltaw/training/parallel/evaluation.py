"""An evaluation shared among processes: microbatches in turn, their outputs gathered in process 0.

All lay out the same microbatches; number n is computed by process n mod P. Process 0 goes through them as if
it were alone, and receives what it does not compute. So metrics are those of one process, and all values of
single rows are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaw.training.parallel.group import EVALUATE, Group

if TYPE_CHECKING:
    from deltaw.training.session import Session


class SharedObjective:
    """An objective as process 0 asks it, each microbatch once and in order.

    Args:
        objective: that of this process.
    """

    def __init__(self, objective: Any, group: Group) -> None:
        self._objective = objective
        self._group = group
        self._next = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def evaluate_rows(self, batch: Any) -> tuple[Tensor, ...]:
        """As the objective's own."""
        return self._asked("evaluate_rows", batch, 2)

    def predictions(self, batch: Any) -> Tensor:
        """As the objective's own."""
        return self._asked("predictions", batch, 1)[0]

    def token_log_probs(self, batch: Any) -> Tensor:
        """As the objective's own."""
        return self._asked("token_log_probs", batch, 1)[0]

    def _asked(self, method: str, batch: Any, count: int) -> tuple[Tensor, ...]:
        owner = self._next % self._group.size
        self._next += 1
        if owner:
            return tuple(self._group.receive(owner) for _ in range(count))
        self._group.together = True
        try:
            given = getattr(self._objective, method)(batch)
        finally:
            self._group.together = False
        return given if isinstance(given, tuple) else (given,)


def shared_objective(session: Session, rows: Sequence[Any], objective: Any) -> Any:
    """In process 0: what an evaluation of these rows asks. The others are told to do their part where the
    rows are one of the run's sets; else it is the objective itself, and they wait."""
    group = session.processes
    if not isinstance(group, Group) or not session.task.shares_evaluation:
        return objective
    sets = enumerate(session.data.sets.values())
    number = next((number for number, known in sets if known is rows), None)
    if number is None:
        return objective
    group.order(EVALUATE, number)
    group.share_parameters([parameter for _, parameter in session.method.parameters(session.model)])
    return SharedObjective(objective, group)


@torch.no_grad()
def take_part(session: Session, number: int) -> None:
    """In a process from 1 on: compute the own microbatches of a set with the parameters of process 0, which
    may be others than the last ones, and send what they gave."""
    group, way = session.processes, session.prefix or session
    assert isinstance(group, Group)
    group.share_parameters([parameter for _, parameter in session.method.parameters(session.model)])
    session.method.after_step(session.model)
    rows = list(session.data.sets.values())[number]
    method = session.task.evaluation_asks
    with session.method.evaluating(session.model):
        count, batch = 0, None
        for place, batch in enumerate(session.task.evaluation_batches(rows, way.batcher)):
            count = place + 1
            if place % group.size == group.rank:
                given = getattr(way.objective, method)(batch)
                for tensor in given if isinstance(given, tuple) else (given,):
                    group.send(tensor)
        if group.sharded and 0 < count % group.size <= group.rank:
            getattr(way.objective, method)(batch)  # the others compute one more, and need this one's rows
