"""Settings of the task ``distill``: the ``distill:`` section."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from deltaw.errors import UserError
from deltaw.settings.fields import TaskSettings, TextOrFile, TextSource, setting
from deltaw.settings.local_names import Reference


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


class DistillSettings(TaskSettings):
    """The ``distill:`` section; for ``task: distill``.

    Raises:
        UserError: if a value is set that the divergence does not use.
    """

    prompt: TextOrFile = setting(
        None,
        "prompt, or file with a prompt, that only the teacher receives; {text: …} or {file: …} to be explicit",
        when="Set it to move a long instruction into the weights.",
    )
    teachers: list[TeacherSettings] = setting(
        [],
        "teachers, averaged by weight; empty: the base model",
        when="Set it to learn from larger models with the same tokenizer; their memory is part of the plan.",
    )
    on_policy: float = setting(
        0.0,
        "fraction of rows whose completion the current student generates",
        when="Use 0.5 if the student's own answers go wrong; generation multiplies the time of a step.",
        ge=0,
        le=1,
    )
    answers: Literal["given", "teacher"] = setting(
        "given",
        "completions of the other rows: given, or by the teacher",
        when="Use teacher if rows have only prompts.",
    )
    divergence: Literal["forward", "reverse", "jsd"] = setting(
        "forward",
        "divergence; forward: KL(teacher || student); reverse: KL(student || teacher); jsd: interpolated by beta",
        when="Use reverse if the student should give one good answer instead of covering all.",
    )
    beta: float = setting(
        0.5,
        "teacher's weight in the mixture (jsd); near 0: forward, near 1: reverse",
        when="Change it only with divergence: jsd.",
        gt=0,
        lt=1,
    )
    temperature: float = setting(
        1.0,
        "temperature that divides the logits of teacher and student",
        when="Raise it to 2 if the teacher is almost certain of each token.",
        gt=0,
        le=100,
    )
    top_k: int | None = setting(
        None,
        "number of most likely teacher tokens to cache on disk, with the rest as one class; null: no cache",
        when="Use 32 to 64 if the teacher is slow and rows are seen several times.",
        ge=1,
    )
    max_new_tokens: int = setting(
        128,
        "maximum number of tokens of a generated completion",
        when="Set it slightly above the longest useful answer.",
        ge=1,
    )
    sampling_temperature: float = setting(
        1.0,
        "temperature of the student's completions; 0: greedy",
        when="Lower it if the student's samples are nonsense early in a run.",
        ge=0,
        le=10,
    )
    chunk: int | None = setting(
        None,
        "number of tokens whose logits are computed at once; null: automatic",
        when="Lower it if the plan exceeds the memory because of the logits.",
        ge=1,
    )

    @model_validator(mode="after")
    def _validate(self) -> DistillSettings:
        if self.divergence != "jsd" and self.beta != 0.5:
            message = f"the divergence '{self.divergence}' has no beta"
            hint = "remove it, or set distill.divergence: jsd"
            raise UserError(message, location="distill.beta", hint=hint)
        return self

    training_keys: ClassVar[tuple[str, ...]] = ("prompt", "teachers")

    def check_run(self, config: Any) -> None:
        if not self.prompt and all(teacher.is_base for teacher in self.teachers):
            message = "the teacher would be identical to the student's base model"
            hint = "set a teacher prompt, distill.prompt: FILE, or another teacher, distill.teachers: [{model: …}]"
            raise UserError(message, location="distill", hint=hint)

    def external_references(self) -> dict[str, object]:
        teachers = [name for teacher in self.teachers for name in (teacher.model, teacher.adapter) if name]
        return {"prompt": self.prompt and self.prompt.file, "teachers": teachers or None}

    def for_inference(self) -> DistillSettings:
        return self.model_copy(update={"prompt": TextSource(text="as it was trained"), "teachers": []})

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
