"""Checks of all stages of a chain before the first one is trained.

Each stage is assembled on fake tensors by the code that assembles its run. Until earlier stages are trained, later ones
start from placeholders of their adapters: folders with the same files, whose tensors have names, types and shapes, but
no values. A stage is therefore rejected by the same code as a separate run, and with the same message.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaw.data.row_reader import RunData
from deltaw.errors import UserError
from deltaw.memory.simulation import simulate
from deltaw.methods.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from deltaw.methods.start import open_start, resolve_start
from deltaw.progress import LogFunction, ignore_line, track_progress, use_listener
from deltaw.runs.checks import check_folder, check_start_folders, read_and_check_data, record_file_digests
from deltaw.runs.folder import FINISHED, Run, settings_text
from deltaw.runs.memory_check import plan_memory
from deltaw.runs.save_adapter import save_adapter
from deltaw.settings.config import SETTINGS, RunConfig
from deltaw.settings.stages import Chain, Stage, at_stage, map_references
from deltaw.training.callbacks import Callback
from deltaw.training.planning.fake_model import FakeModel
from deltaw.training.task import Task


@dataclass(frozen=True)
class CheckedStage:
    """A stage with usable settings.

    Attributes:
        config: Settings, completed with those of the adapters that the stage starts from.
        planned: Settings to plan. A stage that starts from adapters that do not exist yet is planned with a new adapter
            of the same size.
    """

    config: RunConfig
    planned: RunConfig


@contextlib.contextmanager
def located(chain: Chain, stage: Stage, replace: tuple[str, str] = ("", "")) -> Iterator[None]:
    """Context in which errors name the stage.

    Args:
        chain: The chain.
        stage: The stage.
        replace: Path to replace in messages, and its replacement.
    """

    def translate(text: str | None) -> str | None:
        return text.replace(*replace) if text and replace[0] else text

    try:
        yield
    except UserError as error:
        message = str(translate(error.message))
        translated = UserError(message, location=translate(error.location), hint=translate(error.hint))
        raise at_stage(translated, chain.location, stage.name, translated.location) from error


def check_stages(
    chain: Chain, log: LogFunction = ignore_line, *, skip_finished: bool = True, call_functions: bool = False
) -> dict[str, CheckedStage]:
    """Check all stages before the first one is trained: settings, rows, models, and adapters to start from.

    Args:
        chain: The chain.
        log: Receives a message if a stage cannot be checked completely.
        skip_finished: Use the adapters of finished stages, and do not read their rows.
        call_functions: Call the user's functions, such as rewards, as the start of each stage does.

    Returns:
        The stages by name.

    Raises:
        UserError: If a stage is invalid.
    """
    with tempfile.TemporaryDirectory(prefix="deltaw-chain-") as temporary:
        checks = _ChainChecks(
            chain, Path(temporary).resolve(), log, skip_finished=skip_finished, call_functions=call_functions
        )
        for stage in chain.stages:
            with located(chain, stage, (str(checks.placeholders), str(chain.folder))):
                checks.check(stage)
    return checks.checked


class _ChainChecks:
    """Checks the stages in order, and keeps the adapter of each.

    Args:
        chain: The chain.
        placeholders: Folder for the placeholders.
        log: Receives a message if a stage cannot be checked completely.
        skip_finished: Use the adapters of finished stages.
        call_functions: Call the user's functions.

    Attributes:
        checked: The stages so far by name.
    """

    def __init__(
        self, chain: Chain, placeholders: Path, log: LogFunction, *, skip_finished: bool, call_functions: bool
    ) -> None:
        self.placeholders = placeholders
        self.checked: dict[str, CheckedStage] = {}
        self._chain = chain
        self._log = log
        self._skip_finished = skip_finished
        self._call_functions = call_functions
        self._adapters: dict[str, Path | None] = {}

    def check(self, stage: Stage) -> None:
        """Check a stage, and save its adapter or a placeholder of it for later stages.

        Raises:
            UserError: If the stage is invalid.
        """
        output = self._chain.folder / stage.name
        is_finished = self._skip_finished and Run(output).state == FINISHED
        parents = {str(self._chain.folder / name): self._adapters[name] for name in stage.parents}
        if None in parents.values():  # a parent cannot be run on fake tensors, so its adapter is not known
            self._adapters[stage.name] = output if is_finished else None
            planned = stage.config.model_copy(update={"start_from": None})
            self.checked[stage.name] = CheckedStage(stage.config, planned)
            self._check_without_model(planned)
            return
        start_from = map_references(stage.config.start_from, lambda text: str(parents.get(text, text)))
        config = resolve_start(stage.config.model_copy(update={"start_from": start_from}))
        resolved = config.model_copy(update={"start_from": stage.config.start_from})
        is_ready = all(path == Path(folder) for folder, path in parents.items())
        self.checked[stage.name] = CheckedStage(resolved, resolved if is_ready else _without_start(config))
        check_start_folders(config, output)
        if self._skip_finished:
            check_folder(resolved)
        if is_finished:
            require_adapter(output)
            self._adapters[stage.name] = output
            return
        task, data = self._check_without_model(config)
        if config.memory is not None:
            plan_memory(self.checked[stage.name].planned, task, data, Callback())
        with track_progress(f"checking stage '{stage.name}'"), use_listener(None):
            self._adapters[stage.name] = self._save_placeholder(stage, config, task, data)

    def _check_without_model(self, config: RunConfig) -> tuple[Task[Any], RunData]:
        with track_progress("checking the rows"):
            task, data = read_and_check_data(config)
            if self._call_functions:
                task.check(data, call=True)
        return task, data

    def _save_placeholder(self, stage: Stage, config: RunConfig, task: Task[Any], data: RunData) -> Path | None:
        """Assemble a stage on fake tensors, and save its adapter, whose values are missing.

        Returns:
            Folder of the adapter, or None if the model cannot run on fake tensors.

        Raises:
            UserError: If the method or the adapters to start from do not fit the model.
        """
        folder = self.placeholders / stage.name
        try:
            fake = FakeModel.of(config, task, data)
            fake.require_memory(config, processes=1)
            if any(stage.name in other.parents for other in self._chain.stages):
                record_file_digests(fake.model, config)

            def save() -> None:
                session = fake.assemble(config, task, data)
                save_adapter(session, folder)

            simulate(save, models=[fake.model], device=fake.device)
        except UserError:
            raise
        except Exception as error:  # a custom model may fail on fake tensors and still train
            reason = f"{type(error).__name__}: {str(error)[:100]}"
            self._log(f"stage '{stage.name}' was checked only in part: the model cannot run on fake tensors ({reason})")
            return None
        (folder / SETTINGS).write_text(settings_text(stage.config, {}), encoding="utf-8")
        if task.tokenizer is not None:
            task.tokenizer.save_pretrained(folder)
        return folder


def _without_start(config: RunConfig) -> RunConfig:
    """Return the settings of a run with a new adapter of the same size."""
    changes: dict[str, object] = {"start_from": None}
    if config.method == "lora":
        start = open_start(config)
        assert start is not None
        with torch.device("meta"):
            _, changes["lora"] = start.lora(config.lora, dry_run=True)
    return config.model_copy(update=changes)


def require_adapter(folder: Path) -> None:
    """Check that a finished stage has an adapter, which could have been deleted.

    Raises:
        UserError: If it has none.
    """
    if not all((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
        hint = "restore its files, or delete the folder to train the stage again"
        raise UserError("the stage is finished, and its adapter is missing", location=str(folder), hint=hint)
