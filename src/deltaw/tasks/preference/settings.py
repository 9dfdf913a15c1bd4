"""Settings of the task ``preference``: the ``preference:`` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from deltaw.errors import UserError
from deltaw.settings.fields import Auto, TaskSettings, setting

LossName = Literal["dpo", "ipo", "orpo", "simpo", "kto"]
# Losses that compare the model with a reference model, which is the base model.
WITH_REFERENCE = ("dpo", "ipo", "kto")
# Default beta per loss.
_USUAL_BETA = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}


class PreferenceSettings(TaskSettings):
    """The ``preference:`` section; for ``task: preference``.

    Raises:
        UserError: if a value is set that the loss does not use.
    """

    loss: LossName = setting(
        "dpo",
        "preference loss; dpo, ipo, kto use the reference_model; kto is for single labeled answers",
        when="Use kto if answers are rated one by one, and orpo or simpo to save the reference model's pass.",
    )
    beta: Annotated[float, Field(gt=0)] | Auto = setting(
        "auto",
        "strength of the divergence penalty (dpo, ipo, kto), weight of the odds ratio (orpo), or reward scale "
        "(simpo); auto: 0.1, for simpo 2",
        when="Raise it to stay closer to the reference model, lower it if preferences hardly change.",
    )
    label_smoothing: float = setting(
        0.0,
        "assumed fraction of pairs with a wrong label (dpo, simpo)",
        when="Use 0.1 if raters often disagree.",
        ge=0,
        lt=0.5,
    )
    gamma: float | None = setting(
        None,
        "target reward margin of a pair (simpo); null: 0.5",
        when="Raise it if the margin between answers stays small.",
        ge=0,
    )
    desirable_weight: float = setting(
        1.0,
        "weight of the loss of desired answers (kto)",
        when="Raise it if desired answers are much rarer than undesired ones.",
        gt=0,
    )
    undesirable_weight: float = setting(
        1.0,
        "weight of the loss of undesired answers (kto)",
        when="Raise it if undesired answers are much rarer than desired ones.",
        gt=0,
    )

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
