"""An evaluation shared among processes: microbatches in turn, their outputs gathered in process 0.

All lay out the same microbatches; number n is computed by process n mod P. Process 0 goes through them as if
it were alone, and receives what it does not compute. So metrics are those of one process, and all values of
single rows are there.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaw.training.parallel.group import EVALUATE, Group

if TYPE_CHECKING:
    from deltaw.training.session import Session


def shared_objective(session: Session, rows: Sequence[Any]) -> Any:
    """In process 0: what an evaluation of these rows asks. The others are told to do their part where the
    rows are one of the run's sets; else it is the objective itself, and they wait.

    Where they take part, the one method that an evaluation asks (``Task.evaluation_asks``) is to be asked of each
    microbatch once and in order.
    """
    group, objective = session.processes, session.objective
    if not isinstance(group, Group) or not session.task.shares_evaluation:
        return objective
    sets = enumerate(session.data.sets.values())
    number = next((number for number, known in sets if known is rows), None)
    if number is None:
        return objective
    group.order(EVALUATE, number)
    group.share_parameters([parameter for _, parameter in session.method.parameters(session.model)])
    asked, turns = getattr(objective, session.task.evaluation_asks), itertools.count()

    def in_turn(batch: Any) -> Tensor | tuple[Tensor, ...]:
        owner = next(turns) % group.size
        if owner:
            given = tuple(group.receive(owner) for _ in range(int(group.receive(owner))))
            return given if len(given) > 1 else given[0]
        group.together = True
        try:
            return asked(batch)
        finally:
            group.together = False

    shared = copy.copy(objective)
    setattr(shared, session.task.evaluation_asks, in_turn)
    return shared


@torch.no_grad()
def take_part(session: Session, number: int) -> None:
    """In a process from 1 on: compute the own microbatches of a set with the parameters of process 0, which
    may be others than the last ones, and send what they gave."""
    group = session.processes
    assert isinstance(group, Group)
    group.share_parameters([parameter for _, parameter in session.method.parameters(session.model)])
    session.method.after_step(session.model)
    rows = list(session.data.sets.values())[number]
    asked = getattr(session.objective, session.task.evaluation_asks)
    with session.method.evaluating(session.model):
        count, batch = 0, None
        for place, batch in enumerate(session.task.evaluation_batches(rows, session.feed)):
            count = place + 1
            if place % group.size == group.rank:
                found = asked(batch)
                given = found if isinstance(found, tuple) else (found,)
                for tensor in (torch.tensor(len(given)), *given):
                    group.send(tensor)
        if group.sharded and 0 < count % group.size <= group.rank:
            asked(batch)  # the others compute one more, and need this one's rows
