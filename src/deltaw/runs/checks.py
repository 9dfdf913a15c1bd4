"""Checks of a run before its weights are loaded.

``deltaw train`` runs them first. ``deltaw plan`` and ``deltaw data check`` run the same ones, so that all three reject
the same settings.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from deltaw.data.check import DataCheck, DataFinding
from deltaw.data.row_reader import RunData
from deltaw.errors import UserError, first_line
from deltaw.machine.choices import choose_device, choose_precision
from deltaw.runs.folder import CHECKPOINT_FOLDER, Run, check_output
from deltaw.runs.record import decide_start
from deltaw.runs.tracking import check_installed
from deltaw.settings import RunConfig
from deltaw.training.callbacks import ignore_line
from deltaw.training.monitoring.monitor import check_evaluation_settings
from deltaw.training.planning.budget import memory_budget
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.process import preserved_process_state
from deltaw.training.rewards import load_reward
from deltaw.training.rewards.base import require_file
from deltaw.training.session import method_for, read_data
from deltaw.training.tasks.base import Task


def check_settings(config: RunConfig) -> None:
    """Check everything that needs no rows: tracker, device, precision, memory limit and reward functions.

    Raises:
        UserError: If a setting cannot be used on this machine.
    """
    if config.track is not None:
        check_installed(config.track)
    device = choose_device(config.device).value
    choose_precision(device, config.precision)
    memory_budget(config.memory, device)
    if config.task != "rl":
        return
    for function in config.reward.functions:
        if ":" in function.name:
            require_file(function.name, f"reward.functions, {function.name}")
        elif function.name != "model":
            load_reward(function)
    if config.reward.environment is not None:
        require_file(config.reward.environment, "reward.environment")


def check_rows(config: RunConfig, task: Task, data: RunData) -> None:
    """Check that the settings fit the rows and the task.

    Raises:
        UserError: If they do not.
    """
    check_evaluation_settings(config, task, data)
    method_for(task, config)


def check_folder(config: RunConfig) -> None:
    """Check that ``deltaw train`` could write to the output folder.

    Raises:
        UserError: If the folder cannot be written to, or contains a run with other settings.
    """
    output = Path(os.path.expanduser(config.output))
    check_output(output, is_resumed=Run(output).training is not None)
    if (output / CHECKPOINT_FOLDER).is_dir():
        decide_start(output, config, False, ignore_line)


def with_refusal(check: DataCheck, config: RunConfig, *, folder: bool) -> DataCheck:
    """Return a check of rows with the error that ``deltaw train`` would raise before it loads weights, if any.

    Args:
        check: Check of the rows. It is returned unchanged if it contains an error already.
        folder: Check the output folder, too.
    """
    if not check.usable:
        return check
    try:
        check_settings(config)
        with preserved_process_state():
            task, data = read_data(config, ignore_line)
            check_rows(config, task, data)
            try:
                plan_run(config, task, data)
            except UserError:
                raise
            except Exception as error:  # the dry run of a custom model may fail although the model trains
                text = f"the dry run failed, so the model was not checked: {first_line(error)}"
                check = replace(check, findings=(*check.findings, DataFinding("not_checked", "note", 1, text)))
        if folder:
            check_folder(config)
    except UserError as error:
        locations = () if error.location is None else (error.location,)
        text = f"deltaw train refuses: {error.message}"
        refusal = DataFinding("training_refused", "error", 1, text, error.hint, locations)
        return replace(check, findings=(refusal, *check.findings))
    return check
