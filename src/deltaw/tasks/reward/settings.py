"""Settings of the task ``rl``: the ``reward:`` section."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal
from urllib.parse import urljoin

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from deltaw.errors import UserError, did_you_mean
from deltaw.settings.fields import TaskSettings, setting
from deltaw.settings.local_names import Address, CodeName, LocalPath, Reference


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
        try:
            re.compile(self.pattern or "")
        except (re.error, OverflowError) as error:
            message = f"the pattern is not a regular expression: {error}"
            hint = "write a backslash before characters such as ( and +"
            raise UserError(message, location="reward.functions", hint=hint) from error
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
    pending = [schema]
    bases = [""]
    references = []
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


class RewardSettings(TaskSettings):
    """The ``reward:`` section; for ``task: rl``."""

    functions: list[RewardFunction] = setting(
        [],
        "reward functions, by name, with optional weights",
        when="Begin with one function that is cheap and hard to cheat, and read sampled completions early.",
    )
    environment: CodeName | None = setting(
        None,
        "environment that replies to the model and rewards it: FILE.py:CLASS",
        when="Use it if the model must act in several turns, such as with tools or in games.",
    )
    turns: int = setting(
        8,
        "maximum number of model turns in the environment",
        when="Lower it if rollouts run out of tokens before the end.",
        ge=1,
        le=1000,
    )
    environment_tokens: int = setting(
        256,
        "maximum number of environment tokens per rollout, over all turns",
        when="Raise it if replies of the environment are cut.",
        ge=1,
    )
    seconds: float = setting(
        30.0,
        "time limit of an environment step in seconds",
        when="Raise it for tests that run long; a slow reward delays the whole rollout.",
        gt=0,
        le=3600,
    )
    loss: Literal["grpo", "dr_grpo", "dapo", "cispo", "gspo", "rloo"] = setting(
        "dapo",
        "policy-gradient loss",
        when="Use dapo first; rloo needs no clipping range, and gspo suits long completions.",
    )
    group: int = setting(
        8,
        "number of completions per prompt",
        when="Use 4 for quick trials and 16 if rewards are rare; the time of a rollout grows in proportion.",
        ge=2,
        le=256,
    )
    max_new_tokens: int = setting(
        128,
        "maximum number of tokens per completion; in an environment, per turn",
        when="Set it slightly above the longest good answer; most of the time is spent here.",
        ge=1,
    )
    temperature: float = setting(
        1.0,
        "sampling temperature; the loss uses temperature 1",
        when="Raise it if completions of a group are equal, lower it if they are nonsense.",
        gt=0,
        le=10,
    )
    top_p: float = setting(
        1.0,
        "cumulative probability of the most likely tokens to sample from",
        when="Leave 1: cut distributions bias the gradient.",
        gt=0,
        le=1,
    )
    top_k: int = setting(
        0,
        "number of most likely tokens to sample from; 0: all",
        when="Leave 0: cut distributions bias the gradient.",
        ge=0,
    )
    epsilon: float = setting(
        0.2,
        "lower clipping range of the probability ratio: 1 - epsilon",
        when="Raise it only together with reward.updates above 1.",
        ge=0,
        lt=1,
    )
    epsilon_high: float | None = setting(
        None,
        "upper clipping range; null: equal to epsilon; for cispo the upper bound itself, default 5",
        when="Use 0.28 to let rare tokens grow faster (DAPO).",
        ge=0,
    )
    beta: float = setting(
        0.0,
        "weight of the KL divergence from the base model",
        when="Use 0.01 to 0.1 if answers outside the reward get worse; the reference model costs one more pass.",
        ge=0,
    )
    updates: int = setting(
        1,
        "number of optimizer steps per rollout",
        when="Use 2 to 4 if sampling takes most of the time; completions become older than the model.",
        ge=1,
        le=64,
    )
    mask_cut: bool = setting(
        False,
        "mask the loss of completions truncated at max_new_tokens",
        when="Use true if good answers are sometimes cut; otherwise the model is punished for length.",
    )
    overlong: int = setting(
        0,
        "number of tokens before max_new_tokens over which a length penalty rises to 1",
        when="Set it to a quarter of max_new_tokens if completions grow until they are cut.",
        ge=0,
    )
    redraw: int = setting(
        0,
        "maximum number of times to resample a group of equally rewarded completions",
        when="Use 1 or 2 if most groups have equal rewards; each redraw samples again.",
        ge=0,
        le=16,
    )
    correct_above: float | None = setting(
        0.5,
        "log-probability mismatch of the sampler above which tokens get importance weights; null: never",
        when="Leave it unless the run reports a mismatch in most rollouts.",
        ge=0,
    )

    code_keys: ClassVar[tuple[str, ...]] = ("functions", "environment")

    def check_run(self, config: Any) -> None:
        if not self.functions and self.environment is None:
            hint = "set for example reward.functions: [exact], or use your own function: [rewards.py:name]"
            raise UserError(f"the task '{config.task}' needs a reward", location="reward.functions", hint=hint)

    def external_references(self) -> Mapping[str, object]:
        external = [function for function in self.functions if function.uses_external_resources]
        functions = [f.model_dump(mode="json", by_alias=True, exclude_defaults=True) for f in external]
        return {"functions": functions or None, "environment": self.environment}

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
