"""The plan turned round: which settings fit into so much memory, and which of them is fastest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from deltaw.config import RunConfig
from deltaw.errors import UserError
from deltaw.memory.plan import Fitting, Plan
from deltaw.training.callbacks import Say, silent
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.tasks.tasks import RunData, Task

# The share of a budget that is left free for what a plan may be off by.
LEFT_FREE = 0.04
TOKENS = (1024, 512, 256, 128)
RANKS = (16, 8, 4)
# What an operator costs before it computes anything, and what the machine computes in that time, roughly:
# only the order of settings hangs on them.
SECONDS_PER_OPERATOR = 12e-6
OPERATIONS_PER_SECOND = {"bf16": 4e11, "fp16": 4e11, "fp32": 1.5e11, "int8": 6e11}


def fitting_settings(
    config: RunConfig, task: Task, data: RunData, budget: int, methods: Sequence[str], *, say: Say = silent
) -> list[Fitting]:
    """Settings whose process stays within ``budget`` bytes, the fastest first.

    For each method (and, for LoRA, each rank) passes become shorter until one fits, without and with
    activation checkpointing: what is shorter still would only be slower.

    Raises:
        UserError: nothing fits; the message says what the least would need.
    """
    found: list[Fitting] = []
    smallest: list[Plan] = []

    def planned(settings: RunConfig, tokens: int) -> Fitting | None:
        train = settings.train.model_copy(update={"tokens_per_pass": tokens})
        trial = settings.model_copy(update={"train": train})
        plan = plan_run(trial, task, data)
        smallest.append(plan)
        return _fitting(trial, plan) if plan.peak_resident_bytes <= budget else None

    def try_out(settings: RunConfig) -> Fitting | None:
        longest, *between, shortest = TOKENS
        if (best := planned(settings, longest)) is not None:
            return best
        if (least := planned(settings, shortest)) is None:
            return None  # nor would anything between
        return next(filter(None, (planned(settings, tokens) for tokens in between)), least)

    for method in methods:
        say(f"planning {method}")
        try:
            for rank in _ranks(config, method):
                settings = config.model_copy(
                    update={"method": method, "lora": dataclasses.replace(config.lora, rank=rank)}
                )
                plain = try_out(_with_checkpointing(settings, False))
                found += [plain] if plain is not None else []
                if plain is not None and plain.tokens_per_pass == TOKENS[0]:
                    break  # recomputing blocks, or a smaller rank, saves memory that is there
                recomputed = try_out(_with_checkpointing(settings, True))
                found += [recomputed] if recomputed is not None else []
                if plain is not None or recomputed is not None:
                    break
        except UserError as error:
            say(f"{method}: {error.what}")
        except Exception as error:  # whatever a foreign model raises when it is run on fake tensors
            brief = f"{type(error).__name__}: {str(error)[:100]}"
            say(f"{method}: the model cannot be run without values ({brief})")
    if not found:
        least = min((plan.peak_resident_bytes for plan in smallest), default=None)
        need = "nothing can be planned" if least is None else f"the least needs {least:,} bytes"
        raise UserError(
            f"no settings fit into {budget:,} bytes: {need}",
            where="--budget",
            hint="allow more memory, try other methods with --methods, or take a smaller model",
        )
    return sorted(found, key=lambda fitting: fitting.seconds)


def within_memory(
    config: RunConfig, task: Task, data: RunData, plan: Plan, budget: int, blocks: int
) -> tuple[RunConfig, Plan]:
    """Settings under which the run stays within ``budget`` bytes: as few blocks computed again as will do.

    Plans are right to a few per cent: where something has to be given up, some of the budget is left free for
    that, as far as computing all blocks again allows.

    Args:
        plan: of the settings as they are. blocks: how many the model has.

    Raises:
        UserError: computing all of them again does not suffice.
    """
    if plan.peak_resident_bytes <= budget * (1 - LEFT_FREE):
        return config, plan

    def planned(count: bool | int) -> tuple[RunConfig, Plan]:
        settings = _with_checkpointing(config, count)
        return settings, plan_run(settings, task, data)

    least = planned(True)
    if least[1].peak_resident_bytes > budget:
        raise UserError(
            f"the run needs {least[1].peak_resident_bytes:,} bytes with every block computed again, "
            f"and memory allows {budget:,}",
            where="memory",
            hint="allow more, lower train.tokens_per_pass or lora.rank, or take precision int8",
        )
    budget = max(int(budget * (1 - LEFT_FREE)), least[1].peak_resident_bytes)
    saved = (plan.peak_resident_bytes - least[1].peak_resident_bytes) / blocks
    count = max(1, math.ceil((plan.peak_resident_bytes - budget) / max(1.0, saved)))
    for more in range(count, blocks):
        settings, plan = planned(more)
        if plan.peak_resident_bytes <= budget:
            return settings, plan
    return least


def _ranks(config: RunConfig, method: str) -> list[int]:
    """The rank asked for, and smaller ones where the method has a rank."""
    own = config.lora.rank
    return [own, *(rank for rank in RANKS if rank < own)] if method == "lora" else [own]


def _with_checkpointing(config: RunConfig, on: bool | int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"checkpointing": on})})


def _fitting(config: RunConfig, plan: Plan) -> Fitting:
    rate = OPERATIONS_PER_SECOND.get(plan.precision, OPERATIONS_PER_SECOND["fp32"])
    return Fitting(
        method=config.method,
        rank=config.lora.rank if config.method == "lora" else None,
        tokens_per_pass=int(config.train.tokens_per_pass),
        checkpointing=bool(config.train.checkpointing),
        precision=plan.precision,
        plan=plan,
        seconds=plan.operations / rate + plan.operators * SECONDS_PER_OPERATOR,
    )
