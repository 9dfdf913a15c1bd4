"""Settings of the tasks: losses and their data, sampling and scoring.

Each class is a section of a run's settings that only the task of the same name uses.
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

from deltaw.errors import UserError, did_you_mean, find_similar_files
from deltaw.local_names import Address, CodeName, LocalPath, Reference

Auto = Literal["auto"]
LossName = Literal["dpo", "ipo", "orpo", "simpo", "kto"]
# Losses that compare the model with a reference model, which is the base model.
WITH_REFERENCE = ("dpo", "ipo", "kto")
# Default beta per loss.
_USUAL_BETA = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}


def setting(default: Any, description: str, **constraints: Any) -> Any:
    """Return a pydantic field with a default, a description and constraints."""
    return Field(default, description=description, **constraints)


class PreferenceSettings(BaseModel):
    """The ``preference:`` section; for ``task: preference``.

    Raises:
        UserError: if a value is set that the loss does not use.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    loss: LossName = setting(
        "dpo", "preference loss; dpo, ipo, kto use the base model as reference; kto is for single labeled answers"
    )
    beta: Annotated[float, Field(gt=0)] | Auto = setting(
        "auto",
        "strength of the divergence penalty (dpo, ipo, kto), weight of the odds ratio (orpo), or reward scale "
        "(simpo); auto: 0.1, for simpo 2",
    )
    label_smoothing: float = setting(0.0, "assumed fraction of pairs with a wrong label (dpo, simpo)", ge=0, lt=0.5)
    gamma: float | None = setting(None, "target reward margin of a pair (simpo); null: 0.5", ge=0)
    desirable_weight: float = setting(1.0, "weight of the loss of desired answers (kto)", gt=0)
    undesirable_weight: float = setting(1.0, "weight of the loss of undesired answers (kto)", gt=0)

    @model_validator(mode="after")
    def _validate(self) -> PreferenceSettings:
        weight = (1, ("kto",), "weighs all answers alike", "set it to 1, or preference.loss: kto")
        unused = {
            "label_smoothing": (0, ("dpo", "simpo"), "has no label smoothing", "set it to 0, or preference.loss: dpo"),
            "gamma": (None, ("simpo",), "has no margin", "remove it, or set preference.loss: simpo"),
            "desirable_weight": weight,
            "undesirable_weight": weight,
        }
        for name, (neutral, losses, reason, hint) in unused.items():
            if getattr(self, name) != neutral and self.loss not in losses:
                raise UserError(f"the loss '{self.loss}' {reason}", location=f"preference.{name}", hint=hint)
        return self

    @property
    def effective_beta(self) -> float:
        """Value of ``beta``, with ``auto`` resolved to the default of the loss."""
        return _USUAL_BETA[self.loss] if self.beta == "auto" else float(self.beta)

    @property
    def effective_gamma(self) -> float:
        """Value of ``gamma``, with None resolved to 0.5 as in TRL."""
        return 0.5 if self.gamma is None else self.gamma

    @property
    def is_unpaired(self) -> bool:
        """True if the loss takes single labeled answers instead of pairs."""
        return self.loss == "kto"

    @property
    def has_reference(self) -> bool:
        """True if the loss needs the log-probabilities of the base model."""
        return self.loss in WITH_REFERENCE


class RewardFunction(BaseModel):
    """Entry of ``reward.functions``.

    Raises:
        UserError: if a setting is unknown or does not apply to this function, or if a required setting is missing.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, populate_by_name=True)

    name: CodeName = setting(..., "name of a built-in reward, or FILE.py:FUNCTION", min_length=1)
    weight: float = setting(1.0, "weight of the reward in the total")
    seconds: float = setting(30.0, "time limit of a call in seconds", gt=0, le=3600)
    column: str | None = setting(None, "column with the reference answer or the tests; null: that of the row format")
    pattern: str | None = setting(None, "regular expression that the entire completion must match (regex)")
    schema_: LocalPath | dict[str, Any] | None = Field(
        None, alias="schema", description="JSON schema, or the path of a file with one (json-schema)"
    )
    tolerance: float = setting(1e-6, "tolerance of the comparison (number)", ge=0)
    target: int | None = setting(None, "target number of words (length)", ge=1)
    tests: str | None = setting(None, "tests used for all rows (unit-tests); null: the tests in the column")
    all_tests: bool = setting(False, "reward 1 only if all tests pass (unit-tests); false: the fraction that pass")
    cpu_seconds: int = setting(5, "limit of CPU seconds per completion (unit-tests)", ge=1, le=600)
    megabytes: int = setting(1024, "memory limit per completion in MB (unit-tests)", ge=64)
    url: Address | None = setting(
        None, "base URL of an OpenAI-compatible API, such as http://localhost:8000/v1 (judge)", pattern="^https?://"
    )
    model: Reference | None = setting(None, "model name on the server (judge), or folder of a reward model (model)")
    template: str | None = setting(None, "prompt template with {prompt}, {completion} and {answer} (judge)")
    scale: tuple[float, float] = setting((0.0, 10.0), "minimum and maximum score (judge)")
    key_from: str | None = setting(None, "environment variable with the API key (judge)")
    retries: int = setting(3, "number of retries of a failed request (judge)", ge=0, le=20)
    dataset: str | None = setting(None, "name of the dataset (reasoning-gym); null: from the row's metadata")

    @model_validator(mode="before")
    @classmethod
    def _parse_entry(cls, values: Any) -> Any:
        values = {"name": values} if isinstance(values, str) else values
        if not isinstance(values, Mapping) or not isinstance(name := values.get("name"), str):
            return values
        allowed = cls._option_names(name)
        for key in values if allowed else ():
            if str(key).rstrip("_") not in allowed:
                message = f"the reward '{name}' has no setting '{key}'"
                raise UserError(message, location="reward.functions", hint=did_you_mean(str(key), allowed))
        return values

    @model_validator(mode="after")
    def _validate_options(self) -> RewardFunction:
        for required in _REWARD_NEEDS.get(self.name, ()):
            if getattr(self, "schema_" if required == "schema" else required) is None:
                hint = f"write {{name: {self.name}, {required}: …}}"
                raise UserError(f"the reward '{self.name}' needs '{required}'", location="reward.functions", hint=hint)
        if isinstance(self.schema_, dict):
            refuse_remote_references(self.schema_, "reward.functions")
        if self.scale[0] >= self.scale[1]:
            raise UserError("the judge's scale is empty", location="reward.functions", hint="write scale: [0, 10]")
        return self

    @model_serializer(mode="wrap")
    def _serialize_options(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Drop the settings of other functions."""
        allowed = self._option_names(self.name)
        return {key: value for key, value in dump(self).items() if not allowed or key.rstrip("_") in allowed}

    @staticmethod
    def _option_names(name: str) -> tuple[str, ...]:
        """Return the settings of a function, or an empty tuple if its name is unknown. Unknown names are rejected at
        lookup.
        """
        if name not in _REWARD_OPTIONS and ":" not in name:
            return ()
        return ("name", "weight", "seconds", *_REWARD_OPTIONS.get(name, ()))

    @property
    def uses_external_resources(self) -> bool:
        """True if the function runs code, or reads a file, model or address named in the settings."""
        return ":" in self.name or self.name in ("unit-tests", "judge", "model") or isinstance(self.schema_, str)

    def timeout_for(self, completions: int) -> float:
        """Return the time limit in seconds of a call with this number of completions, including their unit tests."""
        return self.seconds + (completions * self.wall_seconds if self.name == "unit-tests" else 0)

    @property
    def wall_seconds(self) -> float:
        """Wall-clock limit in seconds for the tests of one completion."""
        return 2.0 * self.cpu_seconds + 1


# Settings of each built-in reward in addition to name, weight and seconds. _REWARD_NEEDS lists the required ones.
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


def refuse_remote_references(schema: Any, location: str) -> None:
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
            raise UserError(f"the external reference '{reference}' is not fetched", location=location, hint=hint)


class RewardSettings(BaseModel):
    """The ``reward:`` section; for ``task: rl``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    functions: list[RewardFunction] = setting([], "reward functions, by name, with optional weights")
    environment: CodeName | None = setting(None, "environment that replies to the model and rewards it: FILE.py:CLASS")
    turns: int = setting(8, "maximum number of model turns in the environment", ge=1, le=1000)
    environment_tokens: int = setting(256, "maximum number of environment tokens per rollout, over all turns", ge=1)
    seconds: float = setting(30.0, "time limit of an environment step in seconds", gt=0, le=3600)
    loss: Literal["grpo", "dr_grpo", "dapo", "cispo", "gspo", "rloo"] = setting("dapo", "policy-gradient loss")
    group: int = setting(8, "number of completions per prompt", ge=2, le=256)
    max_new_tokens: int = setting(128, "maximum number of tokens per completion; in an environment, per turn", ge=1)
    temperature: float = setting(1.0, "sampling temperature; the loss uses temperature 1", gt=0, le=10)
    top_p: float = setting(1.0, "cumulative probability of the most likely tokens to sample from", gt=0, le=1)
    top_k: int = setting(0, "number of most likely tokens to sample from; 0: all", ge=0)
    epsilon: float = setting(0.2, "lower clipping range of the probability ratio: 1 - epsilon", ge=0, lt=1)
    epsilon_high: float | None = setting(
        None, "upper clipping range; null: equal to epsilon; for cispo the upper bound itself, default 5", ge=0
    )
    beta: float = setting(0.0, "weight of the KL divergence from the base model", ge=0)
    updates: int = setting(1, "number of optimizer steps per rollout", ge=1, le=64)
    mask_cut: bool = setting(False, "mask the loss of completions truncated at max_new_tokens")
    overlong: int = setting(0, "number of tokens before max_new_tokens over which a length penalty rises to 1", ge=0)
    redraw: int = setting(0, "maximum number of times to resample a group of equally rewarded completions", ge=0, le=16)
    correct_above: float | None = setting(
        0.5, "log-probability mismatch of the sampler above which tokens get importance weights; null: never", ge=0
    )

    @property
    def max_completion_tokens(self) -> int:
        """Maximum number of tokens that the model generates for a prompt, over all turns."""
        return self.max_new_tokens * (1 if self.environment is None else self.turns)

    @property
    def max_response_tokens(self) -> int:
        """Maximum number of tokens after a prompt, including those of the environment."""
        return self.max_completion_tokens + (0 if self.environment is None else self.environment_tokens)

    @property
    def upper_epsilon(self) -> float:
        """Value of ``epsilon_high``, with None resolved to the default of the loss."""
        if self.epsilon_high is not None:
            return self.epsilon_high
        return 5.0 if self.loss == "cispo" else self.epsilon


class TeacherSettings(BaseModel):
    """Entry of ``distill.teachers``. With neither model nor adapter, the teacher is the base model."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: Reference | None = setting(None, "folder, hub id or file.gguf; null: the run's model", min_length=1)
    adapter: Reference | None = setting(None, "folder of an adapter for the teacher", min_length=1)
    quantize: Literal["int8", "nf4", "gguf"] | None = setting(None, "quantization of the teacher's weights; null: none")
    weight: float = setting(1.0, "weight in the mixture of the teachers' distributions, before normalization", gt=0)

    @property
    def is_base(self) -> bool:
        """True if the teacher is the student's base model."""
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
    def of(cls, value: str) -> TextSource | None:
        """Parse a plain string.

        Return a file source if it names an existing file or looks like a path, otherwise a text source. Return None if
        it is blank.
        """
        if not value.strip():
            return None
        could_be_path = "\n" not in value and len(value) <= 1024
        is_file = could_be_path and (_FILE_NAME.fullmatch(value) or Path(os.path.expanduser(value)).is_file())
        return cls(file=value) if is_file else cls(text=value)

    def read(self, location: str) -> str:
        """Return the text without leading and trailing white space.

        Raises:
            UserError: if the file cannot be read or is empty.
        """
        if self.file is None:
            return (self.text or "").strip()
        path = Path(os.path.expanduser(self.file))
        try:
            content = path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            similar_files = ", ".join(find_similar_files(path, lambda file: file.suffix == path.suffix)[:3])
            hint = f"did you mean: {similar_files}?" if similar_files else "write {text: …}, or give a UTF-8 file"
            raise UserError(f"the prompt cannot be read: {error}", location=f"{location}: {path}", hint=hint) from error
        if not content:
            raise UserError("the prompt file is empty", location=f"{location}: {path}", hint="add the prompt to it")
        return content


_FILE_NAME = re.compile(r"\S+\.(?:txt|md|jinja|json|text)|(?:~|\.{1,2})?/\S+/\S*|(?:~|\.{1,2})/\S+")
_SINGLE_STRING = {"minProperties": 1, "maxProperties": 1, "additionalProperties": {"type": "string"}}
_TEXT_OR_FILE_SCHEMA = {"type": "object", "propertyNames": {"enum": ["text", "file"]}, **_SINGLE_STRING}
_TextOrFile = Annotated[
    TextSource | None,
    BeforeValidator(lambda given: TextSource.of(given) if isinstance(given, str) else given),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXT_OR_FILE_SCHEMA, {"type": "null"}]}),
]


class DistillSettings(BaseModel):
    """The ``distill:`` section; for ``task: distill``.

    Raises:
        UserError: if a value is set that the divergence does not use.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: _TextOrFile = setting(
        None, "prompt, or file with a prompt, that only the teacher receives; {text: …} or {file: …} to be explicit"
    )
    teachers: list[TeacherSettings] = setting([], "teachers, averaged by weight; empty: the base model")
    on_policy: float = setting(0.0, "fraction of rows whose completion the current student generates", ge=0, le=1)
    answers: Literal["given", "teacher"] = setting("given", "completions of the other rows: given, or by the teacher")
    divergence: Literal["forward", "reverse", "jsd"] = setting(
        "forward",
        "divergence; forward: KL(teacher || student); reverse: KL(student || teacher); jsd: interpolated by beta",
    )
    beta: float = setting(0.5, "teacher's weight in the mixture (jsd); near 0: forward, near 1: reverse", gt=0, lt=1)
    temperature: float = setting(1.0, "temperature that divides the logits of teacher and student", gt=0, le=100)
    top_k: int | None = setting(
        None, "number of most likely teacher tokens to cache on disk, with the rest as one class; null: no cache", ge=1
    )
    max_new_tokens: int = setting(128, "maximum number of tokens of a generated completion", ge=1)
    sampling_temperature: float = setting(1.0, "temperature of the student's completions; 0: greedy", ge=0, le=10)
    chunk: int | None = setting(None, "number of tokens whose logits are computed at once; null: automatic", ge=1)

    @model_validator(mode="after")
    def _validate(self) -> DistillSettings:
        if self.divergence != "jsd" and self.beta != 0.5:
            message = f"the divergence '{self.divergence}' has no beta"
            hint = "remove it, or set distill.divergence: jsd"
            raise UserError(message, location="distill.beta", hint=hint)
        return self

    @property
    def mixture_weight(self) -> float:
        """Weight of the teacher in the mixture that both models are compared with: 0 is forward KL, 1 is reverse KL."""
        return {"forward": 0.0, "reverse": 1.0}.get(self.divergence, self.beta)

    @property
    def all_teachers(self) -> list[TeacherSettings]:
        """Teachers, with the base model as the default."""
        return list(self.teachers) or [TeacherSettings()]

    @property
    def prompt_text(self) -> str:
        """Prompt that only the teacher receives, or an empty string.

        Raises:
            UserError: if the file cannot be read or is empty.
        """
        return "" if self.prompt is None else self.prompt.read("distill.prompt")


# Sections that apply only to the task of the same name.
TASK_SECTIONS = {"rl": "reward"} | {name: name for name in ("preference", "distill", "embedding", "reranking")}


class EmbeddingSettings(BaseModel):
    """The ``embedding:`` section; for ``task: embedding``.

    Raises:
        UserError: if a setting is set that the loss does not use, or a range is empty.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    loss: Literal["auto", "infonce", "cosent", "angle", "supcon", "margin-mse", "kl"] = setting(
        "auto",
        "embedding loss; auto: infonce for pairs, cosent for scored pairs, supcon for texts with classes, margin-mse "
        "for a score per positive and negative, kl for several scores",
    )
    temperature: Annotated[float, Field(gt=0, le=100)] | Auto = setting(
        "auto", "temperature that divides the similarities; auto: 0.05, for kl 1"
    )
    symmetric: bool = setting(False, "symmetric loss that also retrieves the query of each passage (infonce)")
    mask_above: float | None = setting(
        None,
        "margin above the positive's similarity at which negatives of other rows are masked (infonce); null: mask "
        "only identical texts",
        ge=-2,
        le=2,
    )
    dimensions: list[int] = setting([], "Matryoshka dimensions: vector prefixes that the loss is also applied to")
    similarity: Literal["auto", "cosine", "dot"] = setting("auto", "similarity; auto: cosine; margin-mse, kl: dot")
    pooling: Literal["auto", "mean", "first", "last", "weighted"] = setting(
        "auto", "pooling of token vectors; auto: from the model's folder, else mean, for decoders last"
    )
    normalize: bool | Auto = setting("auto", "normalize vectors to length 1; auto: from the model's folder")
    query_prompt: str | None = setting(None, "prefix of queries; null: from the model's folder")
    passage_prompt: str | None = setting(None, "prefix of passages; null: from the model's folder")
    score_range: tuple[float, float] = setting((-1.0, 1.0), "minimum and maximum score of a row")
    kept_tokens: Annotated[int, Field(ge=0)] | Auto = setting(
        "auto",
        "number of tokens per step whose activations are stored for the backward pass; activations of the other "
        "tokens are recomputed, which gives the same result with less memory",
    )

    @model_validator(mode="after")
    def _validate(self) -> EmbeddingSettings:
        _require_range(self.score_range, "embedding.score_range")
        if self.loss not in ("auto", "infonce"):
            for name, value in (("symmetric", self.symmetric), ("mask_above", self.mask_above is not None)):
                if value:
                    message, hint = f"the loss '{self.loss}' has no {name}", "remove it, or set embedding.loss: infonce"
                    raise UserError(message, location=f"embedding.{name}", hint=hint)
        if any(count < 1 for count in self.dimensions) or len(set(self.dimensions)) < len(self.dimensions):
            message, hint = "dimensions must be different positive numbers", "such as [384, 192, 96]"
            raise UserError(message, location="embedding.dimensions", hint=hint)
        return self

    @property
    def effective_temperature(self) -> float:
        """Value of ``temperature``, with ``auto`` resolved."""
        if self.temperature == "auto":
            return 1.0 if self.loss == "kl" else 0.05
        return float(self.temperature)

    @property
    def effective_similarity(self) -> str:
        """Value of ``similarity``, with ``auto`` resolved."""
        if self.similarity == "auto":
            return "dot" if self.loss in ("margin-mse", "kl") else "cosine"
        return self.similarity


class RerankingSettings(BaseModel):
    """The ``reranking:`` section; for ``task: reranking``.

    Raises:
        UserError: if a range is empty or the template lacks ``{query}`` or ``{passage}``.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    loss: Literal["auto", "binary", "pairwise", "listwise", "contrastive"] = setting(
        "auto",
        "ranking loss; binary: cross-entropy of each score; pairwise: better of two passages; listwise: softmax over "
        "scored lists; contrastive: positive against the query's negatives; auto: contrastive for rows with "
        "negatives, listwise for lists, else binary",
    )
    score_range: tuple[float, float] = setting((0.0, 1.0), "minimum and maximum score of a row")
    template: str | None = setting(
        None,
        "prompt of a decoder with {query} and {passage}; null: from the model's chat template, or a yes/no question; "
        "for encoders a sentence pair",
    )
    yes: str = setting("yes", "token that means a relevant passage, for language models without a classification head")
    no: str = setting("no", "token that means an irrelevant passage")

    @model_validator(mode="after")
    def _validate(self) -> RerankingSettings:
        _require_range(self.score_range, "reranking.score_range")
        if self.template is not None and not all(part in self.template for part in ("{query}", "{passage}")):
            hint = "add both {query} and {passage} to the template"
            raise UserError("the template lacks {query} or {passage}", location="reranking.template", hint=hint)
        return self


def _require_range(bounds: tuple[float, float], location: str) -> None:
    if bounds[0] >= bounds[1]:
        raise UserError("the range is empty", location=location, hint=f"write {location}: [0, 1]")
