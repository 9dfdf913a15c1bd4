"""Registry of training tasks.

Settings, flags and model loading are derived from the entries. The built-in tasks are registered in
:mod:`deltaw.tasks`. Installed packages provide tasks as entry points of the group ``deltaw.tasks``. Classes that are
slow to import are named as strings, so that this module requires neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from deltaw.settings.registry import Registry, import_object

if TYPE_CHECKING:
    from deltaw.settings.fields import TaskSettings
    from deltaw.settings.row_kinds import RowKind


@dataclass(frozen=True)
class TaskEntry:
    """Registered task.

    Attributes:
        name: Value of the setting ``task``.
        implementation: Subclass of :class:`deltaw.training.task.Task`, or ``"package.module:Class"``, which is imported
            on first use. None if models can be loaded but not trained.
        auto_model: Auto class of transformers that loads the model.
        capability: Ability of such a model as a verb phrase, used in messages such as "does not …".
        new_head: True if a model without a matching head gets a new head, which is fully trained.
        outputs: Number of outputs of the head, if it is the same for every model.
        config: Values for the model's configuration.
        peft_type: ``task_type`` of an adapter for this task.
        settings: Class of the task's section, a subclass of :class:`deltaw.settings.fields.TaskSettings`, or None.
        section: Name of the section. By default the name of the task.
        description: Topic of the section, for ``--help``.
        row_kinds: Kinds of rows that the task accepts, the most typical one first.
        aliases: Other values of the setting ``task``, each with the values that it implies in the section.
        supports_sharding: True if the base model can be sharded over processes.
        supports_range_test: True if a learning rate can be searched before training, which needs labeled rows.
        pipeline: Tag of the task on the Hugging Face hub.
        layout_use: Use of model folders that other tools save for this task (:mod:`deltaw.hub.sentence_layout`).
        serves: Output of ``deltaw serve`` for a task that does not generate text: "classes", "numbers", "vectors"
            (requires ``layout`` of ``inference``) or "scores" (requires ``encode_pair``). None if it is not served.
        scores_against_base: True if evaluations compare the model with its base model.
        trains_on_answers: True if the labels are the expected answer, so that a generated answer is right or wrong.
        starter: Subclass of :class:`deltaw.data.starter.TaskStarter`, which writes the parts of a settings file that
            depend on the task, or ``"package.module:Class"``. None derives them from the row kinds.
        inference: Subclass of :class:`deltaw.inference.task_inference.TaskInference`, or ``"package.module:Class"``:
            evaluation of a loaded model, predictions and serving. None completes prompts if the task generates text.
            Other tasks then have no predictions.
        goal: Goal of the training as a verb phrase, for the comments of a new settings file.
    """

    name: str
    implementation: Any
    auto_model: str
    capability: str
    new_head: bool = False
    outputs: int | None = None
    config: Mapping[str, int | str] = field(default_factory=dict)
    peft_type: str | None = None
    settings: type[TaskSettings] | None = None
    section: str = ""
    description: str = ""
    row_kinds: tuple[RowKind, ...] = ()
    aliases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    supports_sharding: bool = False
    supports_range_test: bool = True
    pipeline: str | None = None
    layout_use: str | None = None
    serves: Literal["vectors", "classes", "numbers", "scores"] | None = None
    scores_against_base: bool = False
    trains_on_answers: bool = False
    starter: Any = None
    inference: Any = None
    goal: str = ""

    @property
    def generates_text(self) -> bool:
        """True if models of this task generate text."""
        return self.auto_model == "AutoModelForCausalLM"

    @property
    def output_kind(self) -> Literal["text", "vectors", "classes", "numbers", "scores"] | None:
        """Output of ``deltaw serve``, or None if it rejects models of this task."""
        return "text" if self.generates_text else self.serves

    @property
    def section_name(self) -> str | None:
        """Name of the settings section, or None if the task has no settings."""
        return None if self.settings is None else self.section or self.name

    def load(self) -> Any:
        """Return the task's class."""
        return import_object(self.implementation)

    def load_inference(self) -> Any:
        """Return the class of the use of a loaded model, or None for the default."""
        return import_object(self.inference)


def _check(entry: TaskEntry) -> None:
    if not re.fullmatch(r"\w+(-\w+)*", entry.name):
        raise ValueError(f"{entry.name!r} cannot name a task")
    if entry.settings is not None and not str(entry.section_name).isidentifier():
        raise ValueError(f"'{entry.section_name}' cannot name a settings section")
    others = [other for other in registered() if other.name != entry.name]
    taken = {name for other in others for name in (other.name, *other.aliases)}
    if conflicts := taken & {entry.name, *entry.aliases}:
        raise ValueError(f"'{min(conflicts)}' is already the name or an alias of a task")


_registry: Registry[TaskEntry] = Registry("task", TaskEntry, "deltaw.tasks", _check)
register = _registry.register
unregister = _registry.unregister
listen = _registry.listen
registered = _registry.registered
load_plugins = _registry.load_plugins
entries = _registry.entries
entry_of = _registry.entry_of
is_built_in = _registry.is_built_in
broken = _registry.broken


def find(name: str) -> TaskEntry | None:
    """Return the entry with this name, or None if it is not registered."""
    return next((entry for entry in entries() if entry.name == name), None)


def names() -> tuple[str, ...]:
    """Return the names of all tasks that a model can be trained for."""
    return tuple(entry.name for entry in entries() if entry.implementation is not None)


def default_task() -> str:
    """Return the name of the default task, which is the first one registered."""
    return entries()[0].name


def feature_task() -> str:
    """Return the name of the task of models that are only used for their features."""
    return next(entry.name for entry in entries() if entry.implementation is None)


def task_serving(outputs: str) -> str:
    """Return the name of the first task with these served outputs."""
    return next(entry.name for entry in entries() if entry.serves == outputs)


def aliases() -> dict[str, tuple[TaskEntry, Mapping[str, str]]]:
    """Return the task and the implied values of its section by alias."""
    return {alias: (entry, values) for entry in entries() for alias, values in entry.aliases.items()}


def name_of(task: str) -> str:
    """Return the name of a task that is given by its name or an alias. Unknown names are returned unchanged."""
    entry, _ = aliases().get(task.lower(), (None, {}))
    return task if entry is None or find(task) is not None else entry.name


def name_of_adapter(task_type: object) -> str | None:
    """Return the task of an adapter with this ``task_type``, or None."""
    return next((e.name for e in entries() if e.peft_type is not None and e.peft_type == task_type), None)


def entry_of_layout(use: str | None) -> TaskEntry | None:
    """Return the task of a model folder with this use, or None."""
    return next((e for e in entries() if use is not None and e.layout_use == use), None)
