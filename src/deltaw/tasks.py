"""Registry of training tasks.

Settings, flags and model loading are derived from the entries. Other code registers tasks before it reads settings.
Installed packages provide tasks as entry points of the group ``deltaw.tasks``. Classes that are slow to import are
named as strings, so that this module requires neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltaw.registry import Registry, import_object


@dataclass(frozen=True)
class TaskEntry:
    """Registered task.

    Attributes:
        name: Value of the setting ``task``.
        implementation: Subclass of :class:`deltaw.training.tasks.base.Task` with a class method ``open(name, files)``,
            or
            ``"package.module:Class"``, which is imported on first use. None if models can be loaded but not trained.
        auto_model: Auto class of transformers that loads the model.
        capability: Ability of such a model as a verb phrase, used in messages such as "does not …".
        new_head: True if a model without a matching head gets a new head, which is fully trained.
        outputs: Number of outputs of the head, if it is the same for every model.
        config: Values for the model's configuration.
        peft_type: ``task_type`` of an adapter for this task.
    """

    name: str
    implementation: Any
    auto_model: str
    capability: str
    new_head: bool = False
    outputs: int | None = None
    config: Mapping[str, int | str] = field(default_factory=dict)
    peft_type: str | None = None

    @property
    def generates_text(self) -> bool:
        """True if models of this task generate text."""
        return self.auto_model == "AutoModelForCausalLM"

    def load(self) -> Any:
        """Return the task's class."""
        return import_object(self.implementation)


_registry: Registry[TaskEntry] = Registry("task", TaskEntry, "deltaw.tasks")
register = _registry.register
unregister = _registry.unregister
listen = _registry.listen
registered = _registry.registered
load_plugins = _registry.load_plugins
entries = _registry.entries
entry_of = _registry.entry_of


def names() -> tuple[str, ...]:
    """Return the names of all tasks that a model can be trained for."""
    return tuple(entry.name for entry in entries() if entry.implementation is not None)


def name_of_adapter(task_type: object) -> str | None:
    """Return the task of an adapter with this ``task_type``, or None."""
    return next((e.name for e in entries() if e.peft_type is not None and e.peft_type == task_type), None)


_CAUSAL, _LABELS = "deltaw.training.tasks.causal", "deltaw.training.tasks.labels:LabelTask"
_TEXT, _CLASSES = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
_SCORE: Mapping[str, int | str] = {"num_labels": 1, "problem_type": "regression"}
for _entry in (
    TaskEntry("causal-lm", f"{_CAUSAL}:CausalTask", _TEXT, "generate text", peft_type="CAUSAL_LM"),
    TaskEntry("preference", f"{_CAUSAL}:PreferenceTask", _TEXT, "generate text", peft_type="CAUSAL_LM"),
    TaskEntry("rl", "deltaw.training.tasks.reward:RewardTask", _TEXT, "generate text", peft_type="CAUSAL_LM"),
    TaskEntry("distill", "deltaw.training.tasks.distill:DistillTask", _TEXT, "generate text", peft_type="CAUSAL_LM"),
    TaskEntry("sequence-classification", _LABELS, _CLASSES, "classify text", new_head=True, peft_type="SEQ_CLS"),
    TaskEntry("regression", _LABELS, _CLASSES, "score text", new_head=True, outputs=1, config=_SCORE),
    TaskEntry("image-classification", _LABELS, "AutoModelForImageClassification", "classify images", new_head=True),
    TaskEntry(
        "embedding",
        "deltaw.training.tasks.embedding:EmbeddingTask",
        "AutoModel",
        "embed text",
        peft_type="FEATURE_EXTRACTION",
    ),
    TaskEntry(
        "reranking",
        "deltaw.training.tasks.reranking:RerankingTask",
        _CLASSES,
        "score passages",
        new_head=True,
        outputs=1,
        config={"num_labels": 1},
        peft_type="SEQ_CLS",
    ),
    TaskEntry("features", None, "AutoModel", "compute features"),
):
    register(_entry)
