"""The settings of a task: what a row's loss is, and how what it needs is had.

Each class is a section of a run's settings, which only the task of its name has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urljoin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from deltaw.errors import UserError, did_you_mean, files_near
from deltaw.local_names import Address, CodeName, LocalPath, Reference

Auto = Literal["auto"]
LossName = Literal["dpo", "ipo", "orpo", "simpo", "kto"]
# Those that measure the model against a reference: the base model.
WITH_REFERENCE = ("dpo", "ipo", "kto")
# Values of beta that the losses' authors and users begin with.
_USUAL_BETA = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}


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

    name: CodeName = setting(..., "a built-in reward, or FILE.py:FUNCTION", min_length=1)
    weight: float = setting(1.0, "what its rewards are multiplied with")
    seconds: float = setting(30.0, "the most that a call may take", gt=0, le=3600)
    column: str | None = setting(None, "the row's column with the right answer, or the tests; null: the row's own")
    pattern: str | None = setting(None, "of regex: what the whole completion must match")
    schema_: LocalPath | dict[str, Any] | None = Field(
        None, alias="schema", description="json-schema: the schema itself, or a path to it"
    )
    tolerance: float = setting(1e-6, "of number: how far off it may be", ge=0)
    target: int | None = setting(None, "of length: how many words", ge=1)
    tests: str | None = setting(None, "of unit-tests: those of all rows; null: of the column")
    all_tests: bool = setting(False, "of unit-tests: 1 if all pass, else 0; false: the share that passes")
    cpu_seconds: int = setting(5, "of unit-tests: the most processor time of a completion", ge=1, le=600)
    megabytes: int = setting(1024, "of unit-tests: the most memory of a completion", ge=64)
    url: Address | None = setting(
        None, "of judge: OpenAI's API, such as http://localhost:8000/v1", pattern="^https?://"
    )
    model: Reference | None = setting(None, "of judge: its name there; of model: a reward model's folder")
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
        if isinstance(self.schema_, dict):
            refuse_remote_references(self.schema_, "reward.functions")
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
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_REWARD_NEEDS: Mapping[str, tuple[str, ...]] = {
    "regex": ("pattern",),
    "json-schema": ("schema",),
    "length": ("target",),
    "judge": ("url", "model"),
    "model": ("model",),
}


def refuse_remote_references(schema: Any, where: str) -> None:
    """Reject a JSON schema with external references. The drafts of json-schema.org are allowed.

    Raises:
        UserError: if a reference leads to another file or address.
    """
    pending, bases, references = [schema], [""], []
    while pending:
        if isinstance(part := pending.pop(), dict):
            references += [text for key, text in part.items() if key in _REFERENCES and isinstance(text, str)]
            bases += [text for key in ("$id", "id") if isinstance(text := part.get(key), str)]
        pending += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    root = bases[min(1, len(bases) - 1)]
    inside = {urljoin(root, base).partition("#")[0] for base in bases} | set(bases)
    for reference in references:
        target = urljoin(root, reference.partition("#")[0])
        if target not in inside and not re.match(r"https?://json-schema\.org/draft[-/]", target):
            hint = "copy the definition into '$defs', and refer to it as '#/$defs/NAME'"
            raise UserError(
                f"the schema refers to '{reference}'; external references are not fetched", where=where, hint=hint
            )


class RewardSettings(BaseModel):
    """The ``reward:`` section; for ``task: reward``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    functions: list[RewardFunction] = setting([], "rewards of completions, by name, each with a weight")
    environment: CodeName | None = setting(None, "FILE.py:CLASS, what answers the model's texts and rewards them")
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

    model: Reference | None = setting(None, "folder, hub id or file.gguf; null: the run's own model", min_length=1)
    adapter: Reference | None = setting(None, "folder of an adapter for it", min_length=1)
    quantize: Literal["int8", "nf4", "gguf"] | None = setting(None, "of the teacher's weights; null: as they are")
    weight: float = setting(1.0, "its share of the teachers' common distribution, before they are normalized", gt=0)

    @property
    def is_base(self) -> bool:
        """Whether it is the model that is trained, without what is trained on it."""
        return self.model is None and self.adapter is None


class TextSource(BaseModel):
    """A text, or a file that contains it.

    A plain string is classified once, when the settings are loaded. Saved settings store the result explicitly, so that
    a text is never reinterpreted as a path.

    Raises:
        ValueError: if not exactly one of ``text`` and ``file`` is given.
    """

    model_config = ConfigDict(extra="forbid")

    text: str | None = None
    file: LocalPath | None = None

    @model_validator(mode="after")
    def _check_exactly_one(self) -> TextSource:
        if (self.text is None) == (self.file is None):
            raise ValueError("Input should be a text, {text: …} or {file: …}")
        return self

    @model_serializer
    def _serialize(self) -> dict[str, str]:
        return {"text": self.text} if self.text is not None else {"file": str(self.file)}

    @classmethod
    def of(cls, given: str) -> TextSource | None:
        """Parse a plain string.

        Return a file source if it names an existing file or looks like a path, otherwise a text source. Return None if
        it is blank.
        """
        if not given.strip():
            return None
        could_be_path = "\n" not in given and len(given) <= 1024
        is_file = could_be_path and (_FILE_NAME.fullmatch(given) or Path(os.path.expanduser(given)).is_file())
        return cls(file=given) if is_file else cls(text=given)

    def read(self, where: str) -> str:
        """Return the text without white space at its ends.

        Raises:
            UserError: if the file cannot be read or is empty.
        """
        if self.file is None:
            return (self.text or "").strip()
        path = Path(os.path.expanduser(self.file))
        try:
            content = path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            near = ", ".join(files_near(path, lambda file: file.suffix == path.suffix)[:3])
            hint = f"there is: {near}" if near else "write {text: …}, or name a file in UTF-8"
            raise UserError(f"the prompt cannot be read: {error}", where=f"{where}: {path}", hint=hint) from error
        if not content:
            raise UserError("the prompt file is empty", where=f"{where}: {path}", hint="add the prompt to it")
        return content


_FILE_NAME = re.compile(r"\S+\.(?:txt|md|jinja|json|text)|(?:~|\.{1,2})?/\S+/\S*|(?:~|\.{1,2})/\S+")
_ONE_TEXT = {"minProperties": 1, "maxProperties": 1, "additionalProperties": {"type": "string"}}
_TEXT_OR_FILE_SCHEMA = {"type": "object", "propertyNames": {"enum": ["text", "file"]}, **_ONE_TEXT}
_TextOrFile = Annotated[
    TextSource | None,
    BeforeValidator(lambda given: TextSource.of(given) if isinstance(given, str) else given),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXT_OR_FILE_SCHEMA, {"type": "null"}]}),
]


class DistillSettings(BaseModel):
    """The ``distill:`` section; for ``task: distill``.

    Raises:
        UserError: a value is given that the divergence does not use, or the student's teacher is the student.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: _TextOrFile = setting(
        None,
        "text, or a file of it, that the teacher is given and the student is not; {text: …} and {file: …} say which",
    )
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
    def prompt_text(self) -> str:
        """The text that the teacher gets; empty for none.

        Raises:
            UserError: if the file cannot be read or is empty.
        """
        return "" if self.prompt is None else self.prompt.read("distill.prompt")


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
    temperature: Annotated[float, Field(gt=0, le=100)] | Auto = setting(
        "auto", "what similarities are divided by; auto: 0.05, and 1 of kl"
    )
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
    normalize: bool | Auto = setting("auto", "scale vectors to length 1; auto: as the model's folder says")
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

    @property
    def usual_temperature(self) -> float:
        """``temperature``, or what stands for it."""
        if self.temperature == "auto":
            return 1.0 if self.loss == "kl" else 0.05
        return float(self.temperature)

    @property
    def usual_similarity(self) -> str:
        """``similarity``, or what stands for it."""
        if self.similarity == "auto":
            return "dot" if self.loss in ("margin-mse", "kl") else "cosine"
        return self.similarity


class RerankingSettings(BaseModel):
    """The ``reranking:`` section; for ``task: reranking``.

    Raises:
        UserError: a range is empty, or the template lacks a place.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    loss: Literal["auto", "binary", "pairwise", "listwise", "contrastive"] = setting(
        "auto",
        "binary: cross-entropy of each score; pairwise: which of two is better; listwise: scores in proportion to "
        "labels; contrastive: the right passage among all of a query; auto: contrastive of rows with negatives, "
        "listwise of lists, else binary",
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
