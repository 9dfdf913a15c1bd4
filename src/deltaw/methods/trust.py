"""Trust rules for the folder of a run or an adapter.

A folder can refer to things outside of it: a base model, data files, a chat template, a tracker, Python code of the
model. Folders are shared between users, so a reference is followed only if the user named it before on this machine,
for example in the settings of the run, or if it is a model in a local cache. For any other reference, the caller must
pass the value. Remote code runs only if the caller passes ``trust_remote_code=True``. An error names the reference and
the option that allows it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from deltaw.errors import UserError
from deltaw.hub.folders import find_cached
from deltaw.hub.sentence_layout import detect_use, read_layout
from deltaw.lora.peft_format import base_reference
from deltaw.methods.base import ADAPTER_CONFIG
from deltaw.methods.files import read_config
from deltaw.platforms import shell_word
from deltaw.settings import task_registry
from deltaw.settings.config import SETTINGS, RunConfig
from deltaw.untrusted_paths import require_contained
from deltaw.user_references import record_reference, was_referenced

CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class AdapterFolder:
    """Folder of a run or an adapter.

    Attributes:
        folder: Path of the folder.
        adapter: Content of ``adapter_config.json``.
        run: Settings of the run, with its saved chat template and with the caller's ``trust_remote_code``. None if the
            adapter was not created by a deltaw run.
    """

    folder: Path
    adapter: Mapping[str, object]
    run: RunConfig | None

    @property
    def task(self) -> str:
        """Name of the task that the adapter was trained for."""
        if self.run is not None:
            return self.run.task
        if (entry := task_registry.entry_of_layout(detect_use(self.folder))) is not None:
            return entry.name
        return task_registry.name_of_adapter(self.adapter.get("task_type")) or task_registry.default_task()

    @property
    def section(self) -> Any:
        """Settings of the task, or None for the defaults."""
        if self.run is not None:
            return self.run.section
        settings = task_registry.entry_of(self.task).settings
        layout = None if settings is None else read_layout(self.folder)
        return None if settings is None or layout is None else settings.from_layout(layout)

    def base_name(self, model: str | None) -> str:
        """Return ``model`` if given, else the name of the base model in the folder.

        Raises:
            UserError: if neither names a base model.
        """
        stored_name = self.run.model if self.run is not None else base_reference(self.adapter)
        if model is None and not (isinstance(stored_name, str) and stored_name):
            message = "the adapter does not say which model it belongs to"
            hint = "name the base model with --model"
            raise UserError(message, location=str(self.folder / ADAPTER_CONFIG), hint=hint)
        return str(stored_name) if model is None else model

    def base(self, model: str | None) -> str:
        """Return the reference from which the base model is loaded.

        Args:
            model: Reference that the caller passes. It is always allowed.

        Raises:
            UserError: if the folder names no base model, or one that the caller has to allow.
        """
        name = self.base_name(model)
        if model is not None:
            record_reference("model", name)
            return name
        if was_referenced("model", name):
            return name
        if (local_path := find_cached(name)) is not None:
            return local_path
        raise _unapproved_error(self.folder / (ADAPTER_CONFIG if self.run is None else SETTINGS), {"model": name})

    def require_rows(self) -> None:
        """Check that the user named the run's data files on this machine before.

        Raises:
            UserError: if only the folder names them.
        """
        unapproved = {} if self.run is None else _unapproved_references(self.run, ("data.train", "data.eval"))
        if unapproved:
            raise _unapproved_error(self.folder / SETTINGS, unapproved, flag="--data FILE")

    def require_code(self) -> None:
        """Check that code named by the settings of the task is allowed to run.

        Raises:
            UserError: if only the folder names the code and remote code is not trusted.
        """
        if self.run is not None:
            _require_code(self.run, self.folder / SETTINGS, "--trust-remote-code")


def is_adapter(folder: Path) -> bool:
    """Return True if a folder contains a deltaw or PEFT adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_folder(folder: Path, *, trust_remote_code: bool | None) -> AdapterFolder:
    """Read the settings of a run or adapter folder without following the references in it.

    Args:
        folder: Folder to read.
        trust_remote_code: True if Python files of the base model may run. None if the base model is not loaded.

    Raises:
        UserError: if the folder has no adapter, has a link that leaves the folder or an unreadable file, or if the run
            needs remote code and ``trust_remote_code`` is False.
    """
    if not is_adapter(folder):
        raise _missing_adapter_error(folder)
    require_contained(folder)
    adapter = read_config(folder)
    settings = folder / SETTINGS
    if not settings.is_file():
        return AdapterFolder(folder, adapter, None)
    run = RunConfig.read(settings)
    if run.trust_remote_code and trust_remote_code is False:
        raise _remote_code_error(settings, run.model, "--trust-remote-code")
    run = _for_inference(run).model_copy(update={"trust_remote_code": bool(trust_remote_code)})
    return AdapterFolder(folder, adapter, _with_saved_template(run, folder, {}))


def read_run_settings(folder: Path, overrides: Mapping[str, object], *, resume: bool = False) -> RunConfig:
    """Read a run's settings to resume the run, or to read its rows.

    Args:
        folder: Folder of the run.
        overrides: Nested settings that override those of the folder.
        resume: True to resume this run. All files of the folder are then checked, and all its references must be
            allowed, including the model revision and the chat template.

    Raises:
        UserError: if the settings contain a reference that the user did not name, or need remote code that the caller
            does not trust.
    """
    require_contained(folder, recursive=resume)
    settings = folder / SETTINGS
    config = RunConfig.read(settings, overrides)
    if config.trust_remote_code and not overrides.get("trust_remote_code"):
        raise _remote_code_error(settings, config.model, "--trust_remote_code true")
    _require_code(config, settings, "--trust_remote_code true")
    keys = ["model", "data.train", "data.eval", "track"]
    if resume:
        keys += ["data.chat_template", "start_from", *_section_keys(config, "training_keys")]
    else:
        config = _with_saved_template(_for_inference(config), folder, overrides)
    references = _unapproved_references(config, keys).items()
    unapproved = {key: value for key, value in references if not _is_overridden(overrides, key)}
    if not resume and "model" in unapproved and (local_path := find_cached(config.model)) is not None:
        config = config.model_copy(update={"model": local_path})
        del unapproved["model"]
    if unapproved:
        raise _unapproved_error(settings, unapproved)
    return config


def _for_inference(config: RunConfig) -> RunConfig:
    """Return the settings without the references of the task's section that only training uses."""
    if config.section is None:
        return config
    return config.model_copy(update={str(config.section_name): config.section.for_inference()})


def _section_keys(config: RunConfig, attribute: Literal["code_keys", "training_keys"]) -> list[str]:
    """Return keys of the task's section (:class:`deltaw.settings.fields.TaskSettings`) as dotted keys."""
    return [f"{config.section_name}.{key}" for key in getattr(config.section, attribute, ())]


def _with_saved_template(config: RunConfig, folder: Path, overrides: Mapping[str, object]) -> RunConfig:
    """Return the settings with the chat template saved by the run instead of the original file.

    Raises:
        UserError: if the folder contains no template and only the folder names the original file.
    """
    key = "data.chat_template"
    saved = folder / CHAT_TEMPLATE
    if config.data.chat_template is None:
        return config
    if saved.is_file():
        return config.model_copy(update={"data": replace(config.data, chat_template=str(saved))})
    if not _is_overridden(overrides, key) and (unapproved := _unapproved_references(config, (key,))):
        raise _unapproved_error(
            folder / SETTINGS, unapproved, flag=f"--data.chat_template FILE, or copy it to {folder / CHAT_TEMPLATE}"
        )
    return config


def _require_code(config: RunConfig, settings: Path, flag: str) -> None:
    code = {} if config.trust_remote_code else _unapproved_references(config, _section_keys(config, "code_keys"))
    if code:
        raise _unapproved_error(settings, code, flag=flag)


def _unapproved_references(config: RunConfig, keys: Sequence[str]) -> dict[str, object]:
    """Return the settings among ``keys`` whose values the user did not name on this machine before."""
    references = {key: value for key, value in config.external_references().items() if key in keys}
    return {key: value for key, value in references.items() if not was_referenced(key.partition(".")[0], value)}


def _is_overridden(overrides: Mapping[str, object], key: str) -> bool:
    section, _, leaf = key.rpartition(".")
    section_overrides = overrides.get(section) if section else overrides
    if isinstance(section_overrides, str | list):  # `data: rows.jsonl` is short for `data: {train: rows.jsonl}`
        return leaf == "train"
    return isinstance(section_overrides, Mapping) and leaf in section_overrides


def _unapproved_error(file: Path, references: Mapping[str, object], *, flag: str | None = None) -> UserError:
    """Return the error for references that only a folder names.

    Args:
        file: File that contains the references.
        references: References by dotted settings key.
        flag: Option that allows them, if it differs from the flags of the settings.
    """
    as_json = functools.partial(json.dumps, ensure_ascii=False, default=str)
    texts = {key: value if isinstance(value, str) else as_json(value) for key, value in references.items()}
    flags = flag or " ".join(f"--{key} {shell_word(text)}" for key, text in texts.items())
    listed = " and ".join(f"{key} {text!r}" for key, text in texts.items())
    message = f"the folder refers to {listed}, which you have not named on this machine before"
    reason = "deltaw does not open a reference only because a folder contains it"
    return UserError(f"{message}; {reason}", location=str(file), hint=f"to allow it, name it yourself: {flags}")


def _missing_adapter_error(folder: Path) -> UserError:
    if (folder / SETTINGS).is_file():
        hint = f"train it again: deltaw train {folder / SETTINGS}"
        return UserError("the run has no adapter: it stopped early", location=str(folder), hint=hint)
    hint = "give the folder of a run or of an adapter"
    return UserError(f"no adapter in '{folder}'", location=str(folder), hint=hint)


def _remote_code_error(settings: Path, model: str, flag: str) -> UserError:
    message = f"the run needs Python code of its base model, '{model}'"
    hint = f"read the code; if you trust it, add {flag} (in Python: trust_remote_code=True)"
    return UserError(message, location=f"trust_remote_code in {settings}", hint=hint)
