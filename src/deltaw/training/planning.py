"""A run's plan: the run itself, carried out on tensors without values for the largest of its steps.

The same code assembles and trains here and in the run, so that what is planned is what is run: a change to
the loop, a method or the packing changes the plan with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltaw.config import RunConfig
from deltaw.memory.footprint import Footprint
from deltaw.memory.plan import Plan, resident_parts
from deltaw.memory.simulation import simulate, without_values
from deltaw.models.machine import choose_device, choose_precision, choose_threads, resident_bytes
from deltaw.models.skeleton import skeleton
from deltaw.training.loop import rows_of_step
from deltaw.training.session import Session, assemble
from deltaw.training.tasks import RunData, Task

# Steps that are looked at for the largest pass; of a longer run, so many of them, spread evenly.
STEPS_LOOKED_AT = 400


def plan_run(config: RunConfig, task: Task, data: RunData) -> Plan:
    """What a run of ``config`` on these rows will need.

    Raises:
        UserError: the method does not fit the model, or a row is too long for it.
    """
    device = choose_device(config.device).value
    dtype = choose_precision(device, config.precision).value
    with without_values():
        model = skeleton(
            config.model,
            dtype=dtype,
            task=config.task,
            num_labels=task.outputs(data),
            trust_remote_code=config.trust_remote_code,
        )
        total = sum(p.numel() for p in model.parameters())
        vocabulary = model.config.get_text_config().vocab_size if task.tokenizer is not None else 0
    made: list[Session] = []
    sizes: list[int] = []
    step_rows = 0

    def run() -> None:
        nonlocal step_rows
        session = assemble(config, task, data, model, device="cpu", new_modules=())
        made.append(session)
        rows, found = heaviest_step(session)
        sizes.extend(found)
        step_rows = len(rows)
        with session.running():
            session.train(rows=rows, batch_size=len(rows), total_steps=2)

    footprint = simulate(run, models=[model], vocabularies=[vocabulary] if vocabulary else [])
    (session,) = made
    with without_values():
        trained = sum(p.numel() for _, p in session.method.parameters(model))
    return _plan(config, footprint, total, trained, sizes, step_rows)


def heaviest_step(session: Session) -> tuple[Sequence[Any], list[int]]:
    """The rows of the step with the largest pass, and the tokens of each pass that was looked at."""
    settings = session.config.train
    total = session.total_steps
    stride = max(1, -(-total // STEPS_LOOKED_AT))
    best: tuple[int, int, Sequence[Any]] = (-1, 0, ())
    sizes: list[int] = []
    for step in range(0, total, stride):
        rows = rows_of_step(session.data.train, step, settings.batch_size, settings.seed)
        found = session.portions.sizes(rows)
        sizes += found
        rank = (max(found), sum(row.label_count for row in rows))
        if rank > best[:2]:
            best = (*rank, rows)
    return best[2], sizes


def _plan(
    config: RunConfig,
    footprint: Footprint,
    total: int,
    trained: int,
    sizes: Sequence[int],
    rows: int,
) -> Plan:
    resident = resident_parts(
        footprint,
        process_bytes=resident_bytes(),
        kernels=len(set(sizes)),
        threads=choose_threads(config.threads).value,
    )
    return Plan(
        method=config.method,
        total_parameters=total,
        trained_parameters=trained,
        peak_bytes=footprint.peak_bytes,
        peak_resident_bytes=sum(resident.values()),
        parts=footprint.parts,
        resident=resident,
        phase=footprint.phase,
        module=footprint.module,
        activations=footprint.activations_by_module,
        tokens=max(sizes, default=0),
        rows=rows,
        timeline=footprint.timeline,
    )
