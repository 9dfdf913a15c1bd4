"""Plan of a run's memory before its model is loaded."""

from __future__ import annotations

from typing import Any

from deltaw.data.row_reader import RunData
from deltaw.errors import UserError
from deltaw.machine.choices import choose_device
from deltaw.machine.memory import memory_limit_bytes
from deltaw.memory.plan import Plan, available_bytes
from deltaw.settings.config import RunConfig
from deltaw.training.callbacks import Callback
from deltaw.training.planning.budget import (
    PLANNED_DEVICES,
    count_blocks,
    fit_card,
    memory_budget,
    memory_limit_error,
    within_memory,
)
from deltaw.training.planning.plan_run import plan_run, with_time
from deltaw.training.reducer import SINGLE_PROCESS, Reducer
from deltaw.training.task import Task


def plan_memory(
    config: RunConfig,
    task: Task[Any],
    data: RunData,
    callback: Callback,
    *,
    processes: Reducer = SINGLE_PROCESS,
    resumed: bool = False,
) -> tuple[RunConfig, Plan | None]:
    """Plan the memory and the time of a run and return its settings, which ``memory`` may have changed.

    The plan is None if the model cannot run on fake tensors. It is the plan of each of ``processes``, which share the
    memory of their machine.

    Raises:
        UserError: If the available memory is insufficient and ``force`` is not set, or if the ``memory`` limit cannot
            be met.
    """
    device = choose_device(config.device).value
    budget = memory_budget(config.memory, device)
    if not device.startswith(PLANNED_DEVICES):
        return config, None
    limit = memory_limit_bytes().value // processes.local_size
    try:
        plan = plan_run(config, task, data, processes=processes.size)
        if device != "cpu":
            sizes = [available_bytes(memory, device) for memory in (config.memory, None)]
            limit = min((size for size in sizes if size is not None), default=limit)
            if not config.force:
                config, plan = fit_card(config, task, data, plan, limit, callback.on_line, processes.size)
        elif budget is not None:
            blocks = count_blocks(config, task, callback.on_line)
            config, plan = within_memory(config, task, data, plan, budget, blocks, processes.size)
            if checkpointed := config.train.checkpointing:
                num_checkpointed = f"all {blocks}" if checkpointed is True else f"{checkpointed} of {blocks}"
                callback.on_line(f"memory {config.memory}: activation checkpointing in {num_checkpointed} blocks")
    except UserError:
        raise
    except Exception as error:  # a custom model may fail on fake tensors and still train
        brief = f"{type(error).__name__}: {str(error)[:100]}"
        if budget is not None:
            raise memory_limit_error(brief) from error
        callback.on_line(f"no memory plan: the dry run on fake tensors failed ({brief})")
        return config, None
    if processes.size == 1 and not resumed:  # the time of the remaining steps is not predicted
        plan = with_time(plan, config, task, data)
    callback.on_plan(plan, limit)
    if plan.required_bytes > limit and not config.force:
        message = f"the run needs {plan.required_bytes:,} bytes of memory, but only {limit:,} are available"
        alternatives = "lower train.tokens_per_pass, set train.checkpointing, or train anyway with --force true"
        raise UserError(message, location="the plan", hint=f"see 'deltaw plan --fit-memory', {alternatives}")
    return config, plan
