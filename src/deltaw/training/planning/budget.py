"""Search for settings that fit into a memory budget or a time budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from deltaw.data.row_reader import RunData
from deltaw.errors import UserError
from deltaw.hub.empty_models import check_architecture
from deltaw.hub.folders import config_folder
from deltaw.machine.choices import choose_device, choose_precision
from deltaw.machine.kernel_choice import planning_rates
from deltaw.memory.plan import FittingPlan, FittingTime, Plan, available_bytes, parse_bytes
from deltaw.progress import LogFunction, ignore_line
from deltaw.settings.config import RunConfig
from deltaw.settings.data import eval_size
from deltaw.training.optimizer import count_steps
from deltaw.training.planning.plan_run import dry_run_errors, plan_run, with_time
from deltaw.training.task import Task

# Share of a budget that is reserved for errors of the plan.
FREE_SHARE = 0.04
# Devices on which the memory of runs is planned.
PLANNED_DEVICES = ("cpu", "cuda")
TOKENS_PER_PASS = (1024, 512, 256, 128)
RANKS = (16, 8, 4)
# Sizes of microbatches on a card, and the size that is assumed to fill it (not measured).
CARD_TOKENS_PER_PASS = (4096, 2048, 1024, 512)
FILLING_TOKENS = 2048
# Precisions that a search under a time budget compares for ``precision: auto``.
FIT_PRECISIONS = ("bf16", "fp32", "int8")
# Maximum tokens of a microbatch in a search under a time budget, if the settings do not fit into memory.
FIT_TOKENS_PER_PASS = 512
# Share of a time budget that is reserved for errors of the prediction.
FREE_TIME_SHARE = 0.05


def memory_budget(memory: str | None, device: str) -> int | None:
    """Return the setting ``memory`` in bytes, or None if it is not set.

    Raises:
        UserError: if it is not a size, or the memory of the device is not planned.
    """
    if memory is None:
        return None
    size = parse_bytes(memory, location="memory")
    if not device.startswith(PLANNED_DEVICES):
        hint = "leave memory out and set train.checkpointing or train.tokens_per_pass, or use device: cpu"
        raise UserError(f"the memory of {device} is not planned", location="memory", hint=hint)
    return size


def memory_limit_error(reason: str) -> UserError:
    """Return the error for a run with a ``memory`` limit that cannot be planned."""
    message = f"memory cannot be enforced: the dry run on fake tensors failed, so there is no plan ({reason})"
    hint = "leave memory out and set train.checkpointing or train.tokens_per_pass"
    return UserError(message, location="memory", hint=hint)


def fitting_settings(
    config: RunConfig,
    task: Task[Any],
    data: RunData,
    budget: int,
    methods: Sequence[str],
    *,
    log: LogFunction = ignore_line,
    processes: int = 1,
) -> list[FittingPlan]:
    """Return settings that need at most ``budget`` bytes, the fastest first.

    For each method and LoRA rank, the microbatch size is reduced until the run fits, without and with activation
    checkpointing. Smaller sizes would only be slower.

    Args:
        config: Settings of the run.
        task: Training task.
        data: Rows.
        budget: Maximum memory in bytes.
        methods: Methods to try.
        log: Receives messages.
        processes: Number of processes.

    Raises:
        UserError: if no settings fit. The message states the minimum that was found.
    """
    plans_that_fit: list[FittingPlan] = []
    all_plans: list[Plan] = []

    def planned(settings: RunConfig, tokens: int) -> FittingPlan | None:
        trial = settings.with_train(tokens_per_pass=tokens)
        plan = plan_run(trial, task, data, processes=processes)
        all_plans.append(plan)
        return _fitting_plan(trial, plan) if plan.required_bytes <= budget else None

    def try_out(settings: RunConfig) -> FittingPlan | None:
        largest, *between, shortest = TOKENS_PER_PASS
        if (best := planned(settings, largest)) is not None:
            return best
        if (minimum := planned(settings, shortest)) is None:
            return None  # larger sizes need more
        return next(filter(None, (planned(settings, tokens) for tokens in between)), minimum)

    config = config.model_copy(update={"force": True})  # the budget may be that of a larger machine
    for method in methods:
        log(f"planning {method}")
        try:
            configured = config.lora.rank
            # smaller ranks, if the method has a rank
            for rank in (configured, *(r for r in RANKS if r < configured and method == "lora")):
                lora = dataclasses.replace(config.lora, rank=rank)
                settings = config.model_copy(update={"method": method, "lora": lora})
                plain = try_out(settings.with_train(checkpointing=False))
                plans_that_fit += [plain] if plain is not None else []
                if plain is not None and plain.tokens_per_pass == TOKENS_PER_PASS[0]:
                    break  # saving more memory is not necessary
                recomputed = try_out(settings.with_train(checkpointing=True))
                plans_that_fit += [recomputed] if recomputed is not None else []
                if plain is not None or recomputed is not None:
                    break
        except UserError as error:
            log(f"{method}: {error.message}")
        except Exception as error:  # a third-party model can raise any error on fake tensors
            log(f"{method}: the model cannot be run on fake tensors ({type(error).__name__}: {str(error)[:100]})")
    if not plans_that_fit:
        least = min((plan.required_bytes for plan in all_plans), default=None)
        need = "no plan could be computed" if least is None else f"the minimum is {least:,} bytes"
        hint = "allow more memory, try other methods with --methods, or take a smaller model"
        raise UserError(f"no settings fit into {budget:,} bytes: {need}", location="--fit-memory", hint=hint)
    return sorted(plans_that_fit, key=lambda fitting: fitting.seconds)


def fitting_times(
    config: RunConfig, task: Task[Any], data: RunData, budget: float, memory: int, *, log: LogFunction = ignore_line
) -> list[FittingTime]:
    """Return settings with which a run takes at most ``budget`` seconds, those with the most steps first.

    For each precision, the microbatch size and activation checkpointing are changed until the run fits into the memory.
    Then the number of epochs is reduced until the run fits into the time, and the number of rows if one epoch does not.

    Args:
        config: Settings of the run.
        task: Training task.
        data: Rows.
        budget: Maximum duration of the run in seconds.
        memory: Maximum memory in bytes.
        log: Receives messages.

    Raises:
        UserError: if no settings fit. The message states the minimum that was found.
    """
    results: list[FittingTime] = []
    shortest: list[float] = []
    smallest: list[int] = []
    tokens = config.train.tokens_per_pass
    smaller = {"tokens_per_pass": FIT_TOKENS_PER_PASS if tokens == "auto" else min(int(tokens), FIT_TOKENS_PER_PASS)}
    attempts: tuple[dict[str, Any], ...] = ({}, smaller, {**smaller, "checkpointing": True})
    for precision in FIT_PRECISIONS if config.precision == "auto" else (config.precision,):
        log(f"planning precision {precision}")
        for changes in attempts:
            trial = config.with_train(**changes).model_copy(update={"precision": precision})
            try:
                plan = with_time(plan_run(trial, task, data), trial, task, data)
            except UserError as error:
                log(f"{precision}: {error.message}")
                break
            except Exception as error:  # a third-party model can raise any error on fake tensors
                log(
                    f"{precision}: the model cannot be run on fake tensors ({type(error).__name__}: {str(error)[:100]})"
                )
                break
            smallest.append(plan.required_bytes)
            if plan.required_bytes > memory:
                continue
            if plan.seconds is None or plan.seconds_per_step is None:
                log(f"{precision}: time {plan.time_uncertain or 'unknown'}")
                break
            shortest.append(plan.seconds - plan.seconds_by_phase.get("training", 0.0) + plan.seconds_per_step)
            fitting = _within_time(trial, data, plan, budget)
            results += [] if fitting is None else [fitting]
            break
    if not results:
        need = "no plan could be computed"
        if shortest:
            need = f"a run of one step takes {min(shortest):.0f} seconds"
        elif smallest and min(smallest) > memory:
            need = f"the minimum needs {min(smallest):,} bytes, and {memory:,} are available"
        hint = "allow more time, hold out fewer rows, or take a smaller model"
        raise UserError(f"no settings fit into {budget:.0f} seconds: {need}", location="--fit-time", hint=hint)
    return sorted(results, key=lambda fitting: (-fitting.steps, fitting.seconds))


def _within_time(config: RunConfig, data: RunData, plan: Plan, budget: float) -> FittingTime | None:
    """Return the largest number of epochs, or of rows in one epoch, that fits into a time budget."""
    assert plan.seconds is not None and plan.seconds_per_step is not None
    train = config.train
    rows = len(data.train)
    total = count_steps(rows, train.batch_size, train.epochs, train.max_steps)
    per_epoch = -(-rows // train.batch_size)
    fixed = plan.seconds - plan.seconds_by_phase.get("training", 0.0)
    available = budget * (1 - FREE_TIME_SHARE) - fixed
    steps = min(total, int(available / max(1e-9, plan.seconds_per_step)))
    if steps < 1:
        return None
    num_rows: int | None = None
    if steps < min(total, per_epoch):
        num_rows = steps * train.batch_size
        held_out = eval_size(config.data.eval)
        # Held-out rows are taken from these rows, as a share or as a number.
        num_rows = math.floor(num_rows / (1 - held_out)) if held_out < 1 else num_rows + int(held_out)
    epochs = train.epochs if steps == total else max(1.0, int(100 * steps / per_epoch) / 100)
    seconds = fixed + steps * plan.seconds_per_step
    execution = plan.precision, train.tokens_per_pass, train.checkpointing
    return FittingTime(*execution, steps, epochs, num_rows, seconds, plan)


def within_memory(
    config: RunConfig, task: Task[Any], data: RunData, plan: Plan, budget: int, blocks: int, processes: int = 1
) -> tuple[RunConfig, Plan]:
    """Return settings that need at most ``budget`` bytes, with the smallest number of checkpointed blocks.

    Plans are accurate to a few percent. If checkpointing is necessary, part of the budget is reserved for errors, as
    far as checkpointing of all blocks allows.

    Args:
        config: Settings of the run.
        task: Training task.
        data: Rows.
        plan: Plan of these settings.
        budget: Maximum memory in bytes.
        blocks: Number of blocks in the model.
        processes: Number of processes.

    Raises:
        UserError: if checkpointing all blocks does not suffice.
    """
    if plan.required_bytes <= budget * (1 - FREE_SHARE):
        return config, plan

    def planned(count: bool | int) -> tuple[RunConfig, Plan]:
        settings = config.with_train(checkpointing=count)
        return settings, plan_run(settings, task, data, processes=processes)

    minimum = planned(True)
    if minimum[1].required_bytes > budget:
        need = f"{minimum[1].required_bytes:,} bytes with activation checkpointing in every block"
        hint = "allow more, lower train.tokens_per_pass or lora.rank, or take precision int8 or nf4"
        raise UserError(f"the run needs {need}, and memory allows {budget:,}", location="memory", hint=hint)
    budget = max(int(budget * (1 - FREE_SHARE)), minimum[1].required_bytes)
    saved = (plan.required_bytes - minimum[1].required_bytes) / blocks
    count = max(1, math.ceil((plan.required_bytes - budget) / max(1.0, saved)))
    for num_blocks in range(count, blocks):
        settings, plan = planned(num_blocks)
        if plan.required_bytes <= budget:
            return settings, plan
    return minimum


def fit_card(
    config: RunConfig, task: Task[Any], data: RunData, plan: Plan, limit: int, log: LogFunction, processes: int = 1
) -> tuple[RunConfig, Plan]:
    """Return settings that need at most ``limit`` bytes of a card's memory, and log those that differ.

    The order of attempts assumes that microbatches of ``FILLING_TOKENS`` or more have about equal speed: first smaller
    microbatches down to this size, then checkpointing of as few blocks as necessary, then still smaller microbatches.

    Raises:
        UserError: if no settings fit.
    """
    target = limit * (1 - FREE_SHARE)
    blocks = count_blocks(config, task)
    error = None
    if plan.required_bytes <= target:
        return config, plan
    tokens = config.train.tokens_per_pass
    sizes: list[Any] = [size for size in CARD_TOKENS_PER_PASS if size < plan.tokens] if tokens == "auto" else []
    microbatch_bytes = sum(plan.parts[part] for part in ("activations", "logits", "batch", "workspace"))
    for size in sizes or [tokens]:
        is_filling = size in sizes and int(size) > FILLING_TOKENS
        if is_filling and plan.required_bytes - microbatch_bytes * (1 - int(size) / plan.tokens) > target:
            continue
        settings = config.with_train(tokens_per_pass=size)
        fitting = plan_run(settings, task, data, processes=processes)
        try:
            if fitting.required_bytes > target and not is_filling:
                settings, fitting = within_memory(settings, task, data, fitting, limit, blocks, processes)
        except UserError as too_large:
            error = too_large
            continue
        if fitting.required_bytes <= limit:
            checkpointing = str(settings.train.checkpointing).lower()
            log(f"to fit the card: microbatches of {size} tokens, train.checkpointing: {checkpointing}")
            return settings, fitting
    assert error is not None  # the last size is small
    raise error


def settings_for_card(
    config: RunConfig, task: Task[Any], data: RunData, log: LogFunction, processes: int = 1
) -> tuple[RunConfig, Plan | None]:
    """Return the settings that ``deltaw train`` would choose for a run on a card, and their plan. The settings are
    unchanged if none fit.

    Other runs keep their settings, without a plan. An error in the plan of another size of the microbatches is logged.

    Raises:
        UserError: if the run cannot be planned.
    """
    device = choose_device(config.device).value
    limit = available_bytes(config.memory, device) if device.startswith("cuda") else None
    if limit is None:
        return config, None
    with dry_run_errors():
        plan = plan_run(config, task, data, processes=processes)
        try:
            return fit_card(config, task, data, plan, limit, log, processes)
        except Exception as error:  # the first plan is valid
            if not isinstance(error, UserError):
                log(f"no other microbatches were planned: {type(error).__name__}: {error}")
            return config, plan


def count_blocks(config: RunConfig, task: Task[Any], log: LogFunction = ignore_line) -> int:
    """Return the number of transformer blocks in the model's configuration."""
    dtype = choose_precision(choose_device(config.device).value, config.precision).value
    folder = config_folder(config.model, dtype, config.trust_remote_code, log=log)
    text = check_architecture(folder, task.name, config.trust_remote_code).get_text_config()
    return int(getattr(text, "num_hidden_layers", 1))


def _fitting_plan(config: RunConfig, plan: Plan) -> FittingPlan:
    rates = planning_rates(plan.precision)
    return FittingPlan(
        method=config.method,
        rank=config.lora.rank if config.method == "lora" else None,
        tokens_per_pass=int(config.train.tokens_per_pass),
        checkpointing=bool(config.train.checkpointing),
        precision=plan.precision,
        plan=plan,
        seconds=plan.operations / rates.operations_per_second + plan.operators * rates.seconds_per_operator,
    )
