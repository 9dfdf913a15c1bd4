"""The tasks that exist: what a model can be trained to do. Each registers once, at the end of this module.

Settings, flags and the loading of models follow from an entry. Other code registers its own the same way,
before it reads any settings; an installed package names its entry as an entry point of the group
``deltaw.tasks``. An entry names its class by text where that is slow to import: this module needs
neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltaw.registry import Registry, imported


@dataclass(frozen=True)
class TaskEntry:
    """One task, as it is registered.

    Attributes:
        name: the value of the setting ``task``.
        implementation: the class, a :class:`deltaw.training.tasks.base.Task` with a class method ``open(name,
            files)``, or ``"package.module:Class"``, imported at first use; None for what models can be loaded
            for and not be trained on.
        auto_model: the class of transformers that loads its models.
        does: what such a model does, as in "does not ...".
        new_head: whether a model without a head of the kind gets a new one, which is trained whole.
        outputs: of the head, where every model has as many.
        config: what the model's configuration is told.
        peft_type: what an adapter's ``task_type`` calls it.
    """

    name: str
    implementation: Any
    auto_model: str
    does: str
    new_head: bool = False
    outputs: int | None = None
    config: Mapping[str, int | str] = field(default_factory=dict)
    peft_type: str | None = None

    @property
    def writes_text(self) -> bool:
        """Whether its models answer in text."""
        return self.auto_model == "AutoModelForCausalLM"

    def load(self) -> Any:
        """The task's class."""
        return imported(self.implementation)


_registry: Registry[TaskEntry] = Registry("task", TaskEntry, "deltaw.tasks")
register = _registry.register
unregister = _registry.unregister
listen = _registry.listen
registered = _registry.registered
load_plugins = _registry.load_plugins
entries = _registry.entries
entry_of = _registry.entry_of


def names() -> tuple[str, ...]:
    """The tasks that a model can be trained on."""
    return tuple(entry.name for entry in entries() if entry.implementation is not None)


def name_of_adapter(task_type: object) -> str | None:
    """The task of an adapter that carries this ``task_type``."""
    return next((e.name for e in entries() if e.peft_type is not None and e.peft_type == task_type), None)


_CAUSAL, _LABELS = "deltaw.training.tasks.causal", "deltaw.training.tasks.labels:LabelTask"
_TEXT, _CLASSES = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
_SCORE: Mapping[str, int | str] = {"num_labels": 1, "problem_type": "regression"}
for _entry in (
    TaskEntry("causal-lm", f"{_CAUSAL}:CausalTask", _TEXT, "generate text", peft_type="CAUSAL_LM"),
    TaskEntry("preference", f"{_CAUSAL}:PreferenceTask", _TEXT, "generate text", peft_type="CAUSAL_LM"),
    TaskEntry("reward", "deltaw.training.tasks.reward:RewardTask", _TEXT, "generate text", peft_type="CAUSAL_LM"),
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
