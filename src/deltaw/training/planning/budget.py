"""A search for settings under a memory budget: which of them fit, and which of those is fastest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from deltaw.errors import UserError
from deltaw.machine.kernel_choice import measured_rates
from deltaw.memory.plan import Fitting, Plan
from deltaw.settings import RunConfig
from deltaw.training.callbacks import Say, silent
from deltaw.training.planning.asked import parse_bytes
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.tasks.base import RunData, Task

# The share of a budget that is left free for what a plan may be off by.
LEFT_FREE = 0.04
TOKENS = (1024, 512, 256, 128)
RANKS = (16, 8, 4)


def memory_budget(memory: str | None, device: str) -> int | None:
    """The setting ``memory`` in bytes; None where it is not set.

    Raises:
        UserError: it is not a size, or the run is not on the processor: what a run takes of another device's
            memory is not planned, so the limit could not be enforced.
    """
    if memory is None:
        return None
    size = parse_bytes(memory, where="memory")
    if device != "cpu":
        hint = "leave memory out and set train.checkpointing or train.tokens_per_pass, or use device: cpu"
        raise UserError(f"memory limits main memory, and this run is on {device}", where="memory", hint=hint)
    return size


def no_plan_to_keep(why: str) -> UserError:
    """The refusal of a run that is to keep within ``memory`` and that cannot be planned."""
    what = f"memory cannot be enforced: the dry run on fake tensors failed, so there is no plan ({why})"
    return UserError(what, where="memory", hint="leave memory out and set train.checkpointing or train.tokens_per_pass")


def fitting_settings(
    config: RunConfig,
    task: Task,
    data: RunData,
    budget: int,
    methods: Sequence[str],
    *,
    say: Say = silent,
    processes: int = 1,
) -> list[Fitting]:
    """Settings whose process stays within ``budget`` bytes, the fastest first.

    For each method (and, for LoRA, each rank) microbatches become shorter until one fits, without and with
    activation checkpointing: what is shorter still would only be slower.

    Raises:
        UserError: nothing fits; the message says what the least would need.
    """
    found: list[Fitting] = []
    smallest: list[Plan] = []

    def planned(settings: RunConfig, tokens: int) -> Fitting | None:
        trial = settings.with_train(tokens_per_pass=tokens)
        plan = plan_run(trial, task, data, processes=processes)
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
                lora = dataclasses.replace(config.lora, rank=rank)
                settings = config.model_copy(update={"method": method, "lora": lora})
                plain = try_out(settings.with_train(checkpointing=False))
                found += [plain] if plain is not None else []
                if plain is not None and plain.tokens_per_pass == TOKENS[0]:
                    break  # checkpointing, or a smaller rank, saves memory that is there
                recomputed = try_out(settings.with_train(checkpointing=True))
                found += [recomputed] if recomputed is not None else []
                if plain is not None or recomputed is not None:
                    break
        except UserError as error:
            say(f"{method}: {error.what}")
        except Exception as error:  # whatever a foreign model raises when it is run on fake tensors
            brief = f"{type(error).__name__}: {str(error)[:100]}"
            say(f"{method}: the model cannot be run on fake tensors ({brief})")
    if not found:
        least = min((plan.peak_resident_bytes for plan in smallest), default=None)
        need = "nothing can be planned" if least is None else f"the least needs {least:,} bytes"
        hint = "allow more memory, try other methods with --methods, or take a smaller model"
        raise UserError(f"no settings fit into {budget:,} bytes: {need}", where="--budget", hint=hint)
    return sorted(found, key=lambda fitting: fitting.seconds)


def within_memory(
    config: RunConfig, task: Task, data: RunData, plan: Plan, budget: int, blocks: int, processes: int = 1
) -> tuple[RunConfig, Plan]:
    """Settings under which the run stays within ``budget`` bytes, with activation checkpointing in as few
    blocks as will do.

    Plans are right to a few per cent: where something has to be given up, some of the budget is left free for
    that, as far as checkpointing all blocks allows.

    Args:
        plan: of the settings as they are. blocks: how many the model has. processes: that train together.

    Raises:
        UserError: checkpointing all of them does not suffice.
    """
    if plan.peak_resident_bytes <= budget * (1 - LEFT_FREE):
        return config, plan

    def planned(count: bool | int) -> tuple[RunConfig, Plan]:
        settings = config.with_train(checkpointing=count)
        return settings, plan_run(settings, task, data, processes=processes)

    least = planned(True)
    if least[1].peak_resident_bytes > budget:
        need = f"{least[1].peak_resident_bytes:,} bytes with activation checkpointing in every block"
        hint = "allow more, lower train.tokens_per_pass or lora.rank, or take precision int8 or nf4"
        raise UserError(f"the run needs {need}, and memory allows {budget:,}", where="memory", hint=hint)
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


def _fitting(config: RunConfig, plan: Plan) -> Fitting:
    rates = measured_rates(plan.precision)
    return Fitting(
        method=config.method,
        rank=config.lora.rank if config.method == "lora" else None,
        tokens_per_pass=int(config.train.tokens_per_pass),
        checkpointing=bool(config.train.checkpointing),
        precision=plan.precision,
        plan=plan,
        seconds=plan.operations / rates.operations_per_second + plan.operators * rates.seconds_per_operator,
    )
