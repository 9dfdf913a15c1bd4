"""The ``train:`` section of a run: how long and how fast it trains, what it evaluates, and what it keeps."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(BaseModel):
    """The ``train:`` section: how long, how fast, in which microbatches."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    # The bound keeps a single step from leaving the range of fp32, whatever the gradient.
    learning_rate: Annotated[float, Field(gt=0, le=1e6)] | Literal["auto", "search"] = Field(
        "auto",
        description="peak learning rate of AdamW; auto: the method's usual one; search: by a range test",
    )
    b_rate: float = Field(1.0, gt=0, le=1e4, description="LoRA+: factor on the learning rate of B")
    epochs: float = Field(1.0, gt=0, description="passes over the training rows; may be a fraction")
    max_steps: int | None = Field(
        None, ge=1, description="stop after so many optimizer steps, whatever epochs says"
    )
    time: str | None = Field(
        None,
        description="a time budget such as 30m or 2h: plans the number of steps and the schedule by measured "
        "speed, and stops in time",
    )
    batch_size: int = Field(16, ge=1, description="rows per optimizer step")
    tokens_per_pass: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="the most tokens in a microbatch; more needs more memory"
    )
    share_prefixes: bool | Literal["auto"] = Field(
        "auto",
        description="compute prefixes that rows share once; auto: unless lora.dropout",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="learning rate after the warm-up: constant, or decayed to zero"
    )
    warmup: float = Field(0.03, ge=0, description="steps of linear warm-up; below 1, a share of all steps")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's decay of its two moments")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip gradients to this norm; null: never")
    keep_features: bool | Literal["auto"] = Field(
        "auto",
        description="run the frozen layers below the lowest trained module once for each row, and keep their "
        "outputs on disk; auto: if rows are seen again",
    )
    checkpointing: bool | Annotated[int, Field(ge=1)] = Field(
        False,
        description="activation checkpointing of all blocks; a number: of so many blocks",
    )
    approximate: Literal["auto", "off"] = Field(
        "auto",
        description="with 16-bit and int8 weights, compute some products in int8 and sum a head's unlikely "
        "classes over rows; auto: what is faster here and was verified on the model and some rows; off: none",
    )
    sharding: Literal["none", "base"] = Field(
        "none",
        description="over several processes, base: each holds a share of the frozen weights of the model's "
        "blocks, and gathers a block while it runs (FSDP2); none: each holds all of them",
    )
    keep_general: float = Field(
        0.0,
        ge=0,
        le=1e3,
        description="weight of the loss of the base model's own general answers, one of which each step also "
        "learns; 0: none",
    )
    drift: bool | Literal["auto"] = Field(
        "auto",
        description="at the end, measure how far general answers moved from the base model's; auto: where a "
        "language model is large enough to give any",
    )
    eval_every: int | None = Field(
        None, ge=1, description="evaluate after every so many steps; always at the end"
    )
    eval_answers: int = Field(
        0,
        ge=0,
        description="at each evaluation, let the model answer so many held-out rows and compare the answers "
        "with the rows' own",
    )
    samples: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="held-out prompts whose answers are shown at each evaluation; auto: 2, where a language "
        "model is large enough to give any",
    )
    early_stopping: int | None = Field(
        None, ge=1, description="stop after so many evaluations in a row without improvement; null: never"
    )
    adapter: Literal["last", "best"] = Field(
        "last",
        description="which one the run's folder holds at the end: the last, or the one with the best "
        "evaluation, with the last beside it in last/",
    )
    checkpoint_every: int | None = Field(
        None, ge=1, description="write a checkpoint after every so many steps; null: by time alone"
    )
    checkpoint_minutes: float | None = Field(
        10.0, gt=0, description="write a checkpoint once so many minutes have passed; null: by steps alone"
    )
    keep_checkpoints: int = Field(2, ge=1, description="how many of the last checkpoints are kept")
    not_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="a step whose loss or gradient is not a finite number: stop with a diagnosis, or skip it",
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="of the initialization, the held-out rows and the order of rows"
    )

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
