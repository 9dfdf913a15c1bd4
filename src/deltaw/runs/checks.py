"""Checks of a run before its weights are loaded.

``deltaw train`` runs them first. ``deltaw plan`` and ``deltaw data check`` run the same ones, so that all three reject
the same settings.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from deltaw.data.check import Check, Finding
from deltaw.data.row_reader import RunData
from deltaw.errors import UserError, first_line
from deltaw.machine.choices import choose_device, choose_precision
from deltaw.runs.folder import FOLDER, Run, check_output
from deltaw.runs.record import decide_start
from deltaw.runs.tracking import check_installed
from deltaw.settings import RunConfig
from deltaw.training.callbacks import silent
from deltaw.training.monitoring.monitor import check_monitored
from deltaw.training.planning.budget import memory_budget
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.process import guest
from deltaw.training.rewards import reward_of
from deltaw.training.rewards.base import require_file
from deltaw.training.session import method_for, read_data
from deltaw.training.tasks.base import Task


def check_settings(config: RunConfig) -> None:
    """Check what needs no rows: tracker, device, precision, memory limit and reward functions.

    Raises:
        UserError: a setting cannot be used on this machine.
    """
    if config.track is not None:
        check_installed(config.track)
    device = choose_device(config.device).value
    choose_precision(device, config.precision)
    memory_budget(config.memory, device)
    if config.task != "reward":
        return
    for function in config.reward.functions:
        if ":" in function.name:
            require_file(function.name, f"reward.functions, {function.name}")
        elif function.name != "model":
            reward_of(function)
    if config.reward.environment is not None:
        require_file(config.reward.environment, "reward.environment")


def check_rows(config: RunConfig, task: Task, data: RunData) -> None:
    """Check that the settings fit the rows and the task.

    Raises:
        UserError: they do not.
    """
    check_monitored(config, task, data)
    method_for(task, config)


def check_folder(config: RunConfig) -> None:
    """Check that ``deltaw train`` could write to the output folder.

    Raises:
        UserError: the folder cannot be written to, or contains a run with other settings.
    """
    output = Path(os.path.expanduser(config.output))
    check_output(output, goes_on=Run(output).training is not None)
    if (output / FOLDER).is_dir():
        decide_start(output, config, False, silent)


def with_refusal(found: Check, config: RunConfig, *, folder: bool) -> Check:
    """Return a check of rows with the error that ``deltaw train`` would raise before it loads weights, if any.

    Args:
        found: Check of the rows. It is returned unchanged if it contains an error already.
        folder: Check the output folder, too.
    """
    if not found.usable:
        return found
    try:
        check_settings(config)
        with guest():
            task, data = read_data(config, silent)
            check_rows(config, task, data)
            try:
                plan_run(config, task, data)
            except UserError:
                raise
            except Exception as error:  # the dry run of a foreign model may fail although the model trains
                text = f"the dry run failed, so the model was not checked: {first_line(error)}"
                found = replace(found, findings=(*found.findings, Finding("not_checked", "note", 1, text)))
        if folder:
            check_folder(config)
    except UserError as error:
        places = () if error.where is None else (error.where,)
        refusal = Finding("training_refused", "error", 1, f"deltaw train refuses: {error.what}", error.hint, places)
        return replace(found, findings=(refusal, *found.findings))
    return found
