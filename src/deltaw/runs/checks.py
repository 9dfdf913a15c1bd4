"""Checks of a run and its rows before weights are loaded.

``deltaw train`` runs them first. ``deltaw data check`` runs the same ones, so that both reject the same settings, and
``deltaw plan`` all except that of the output folder.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deltaw.data.check import DataCheck
from deltaw.data.data_findings import DataFinding
from deltaw.data.row_reader import RunData
from deltaw.errors import UserError, first_line
from deltaw.hub.folders import config_folder, resolve
from deltaw.hub.parameter_names import match_names
from deltaw.hub.skeletons import skeleton
from deltaw.hub.weight_digests import folder_digests, record_stored_digests
from deltaw.lora.fingerprint import base_fingerprint
from deltaw.machine.choices import choose_device, choose_precision
from deltaw.methods.start import StartAdapter, open_start
from deltaw.progress import LogFunction, ignore_line
from deltaw.runs.data_checks import check_data
from deltaw.runs.decision import decide_start
from deltaw.runs.folder import CHECKPOINT_FOLDER, Run, check_output
from deltaw.runs.tracking import check_installed
from deltaw.settings import task_registry
from deltaw.settings.config import RunConfig
from deltaw.training.monitoring.monitor import check_evaluation_settings
from deltaw.training.planning.budget import memory_budget
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.process import preserved_process_state
from deltaw.training.session import method_for, read_data
from deltaw.training.task import Task


def check_settings(config: RunConfig) -> None:
    """Check everything that needs no rows: tracker, device, precision, memory limit and the section of the
    task.

    Raises:
        UserError: If a setting cannot be used on this machine.
    """
    if config.track is not None:
        check_installed(config.track)
    device = choose_device(config.device).value
    choose_precision(device, config.precision)
    memory_budget(config.memory, device)
    task_registry.entry_of(config.task).load().check_settings(config.section)


def check_start_folders(config: RunConfig, output: Path) -> None:
    """Check that the output folder, which a new run moves, contains no adapter of ``start_from``.

    Raises:
        UserError: If it does.
    """
    start = open_start(config)
    for source in start.sources if start is not None else ():
        if output.resolve() in (source.folder.resolve(), *source.folder.resolve().parents):
            message = f"the output folder contains the adapter of start_from: {source.folder}"
            raise UserError(message, location="output", hint="set 'output' to another folder")


def check_rows(config: RunConfig, task: Task[Any], data: RunData) -> None:
    """Check that the settings fit the rows and the task.

    Raises:
        UserError: If they do not.
    """
    check_evaluation_settings(config, task, data)
    method_for(task, config)
    task.check_steps(data.train, config.train.batch_size)
    if (start := open_start(config)) is not None:
        start.require_classes(data.classes)
        start.require_tokenizer(task.tokenizer, has_template=config.data.chat_template is not None)
        _check_start_base(config, task, data, start)


def _check_start_base(config: RunConfig, task: Task[Any], data: RunData, start: StartAdapter) -> None:
    """Check that the files of the base model are those that the adapters of ``start_from`` were trained on.

    Fingerprints of files with converted weights, such as .gguf, and of models with new or trained modules, are checked
    after loading.
    """
    if task.trains_head or start.has_modules or resolve(config.model).kind == "gguf":
        return
    with torch.device("meta"):
        model = skeleton(config.model, dtype="fp32", task=config.task, trust_remote_code=config.trust_remote_code)
    if record_file_digests(model, config):
        start.require_base(base_fingerprint(model))


def record_file_digests(model: PreTrainedModel, config: RunConfig) -> bool:
    """Record the digests of the base model's files on a model whose values are missing.

    Returns:
        False if the weights are not in safetensors files, or are converted when they are loaded.
    """
    dtype = choose_precision(choose_device(config.device).value, config.precision).value
    folder = config_folder(config.model, dtype, config.trust_remote_code)
    if resolve(config.model).kind == "gguf" or not any(folder.glob("*.safetensors")):
        return False
    digests = folder_digests(folder)
    if match_names(model, digests).converted:
        return False
    record_stored_digests(model, digests)
    return True


def check_folder(config: RunConfig) -> None:
    """Check that ``deltaw train`` could write to the output folder.

    Raises:
        UserError: If the folder cannot be written to, or contains a run with other settings.
    """
    output = Path(os.path.expanduser(config.output))
    check_output(output, is_resumed=Run(output).training is not None)
    if (output / CHECKPOINT_FOLDER).is_dir():
        decide_start(output, config, False, ignore_line)


def read_and_check_data(config: RunConfig, log: LogFunction = ignore_line) -> tuple[Task[Any], RunData]:
    """Check the settings, read the rows, and check that they fit: everything that needs no model.

    Raises:
        UserError: If ``deltaw train`` would reject the run.
    """
    check_settings(config)
    task, data = read_data(config, log)
    check_rows(config, task, data)
    return task, data


def check_data_and_run(
    config: RunConfig, log: LogFunction = ignore_line, *, folder: bool, dry_run: bool = True
) -> DataCheck:
    """Check the rows, and add the error that ``deltaw train`` would raise before it loads weights, if any.

    Args:
        config: Settings of the run.
        log: Receives messages.
        folder: Check the output folder, too.
        dry_run: Also compute the plan of the run, which reports errors of the model.

    Raises:
        UserError: if the data cannot be read.
    """
    check = check_data(config, log)
    if not check.usable:
        return check
    try:
        with preserved_process_state():
            task, data = read_and_check_data(config)
            try:
                if dry_run:
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
