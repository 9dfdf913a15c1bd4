"""The ``preference:`` section of a run: which loss answers are trained with, and its numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deltaw.errors import UserError

LossName = Literal["dpo", "ipo", "orpo", "simpo", "kto"]
# Those that measure the model against a reference: the base model.
WITH_REFERENCE = ("dpo", "ipo", "kto")
# Values of beta that the losses' authors and users begin with.
_USUAL_BETA = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}


class PreferenceSettings(BaseModel):
    """The ``preference:`` section; for ``task: preference``.

    Raises:
        UserError: a value is given that the loss does not use.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    loss: LossName = Field(
        "dpo",
        description="of a pair of answers: dpo, ipo (against the base model), orpo, simpo (without it); of "
        "single answers with a label: kto (against the base model)",
    )
    beta: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="the strength: of dpo, ipo and kto how closely the model stays with the base model, of "
        "orpo the weight of the odds ratio, of simpo the scale of rewards; auto: 0.1, and 2 for simpo",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="of dpo and simpo: the share of pairs that are taken to be labeled the wrong way"
    )
    gamma: Annotated[float, Field(ge=0)] | None = Field(
        None, description="of simpo: the margin that the rewards of a pair should have; null: 0.5"
    )
    desirable_weight: Annotated[float, Field(gt=0)] = Field(
        1.0, description="of kto: what the loss of a desired answer is multiplied with"
    )
    undesirable_weight: Annotated[float, Field(gt=0)] = Field(
        1.0, description="of kto: what the loss of an undesired answer is multiplied with"
    )

    @model_validator(mode="after")
    def _fits(self) -> PreferenceSettings:
        if self.label_smoothing and self.loss not in ("dpo", "simpo"):
            raise UserError(
                f"the loss '{self.loss}' has no label smoothing",
                where="preference.label_smoothing",
                hint="set it to 0, or preference.loss: dpo",
            )
        if self.gamma is not None and self.loss != "simpo":
            raise UserError(
                f"the loss '{self.loss}' has no margin",
                where="preference.gamma",
                hint="remove it, or set preference.loss: simpo",
            )
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) != 1 and self.loss != "kto":
                raise UserError(
                    f"the loss '{self.loss}' weighs all answers alike",
                    where=f"preference.{name}",
                    hint="set it to 1, or preference.loss: kto",
                )
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
