"""Settings of the task ``embedding``: the ``embedding:`` section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from deltaw.errors import UserError
from deltaw.settings.fields import Auto, TaskSettings, require_range, setting

if TYPE_CHECKING:
    from deltaw.hub.sentence_layout import SentenceLayout


class EmbeddingSettings(TaskSettings):
    """The ``embedding:`` section; for ``task: embedding``.

    Raises:
        UserError: if a setting is set that the loss does not use, or a range is empty.
    """

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
        require_range(self.score_range, "embedding.score_range")
        if self.loss not in ("auto", "infonce"):
            for name, value in (("symmetric", self.symmetric), ("mask_above", self.mask_above is not None)):
                if value:
                    message, hint = f"the loss '{self.loss}' has no {name}", "remove it, or set embedding.loss: infonce"
                    raise UserError(message, location=f"embedding.{name}", hint=hint)
        if any(count < 1 for count in self.dimensions) or len(set(self.dimensions)) < len(self.dimensions):
            message, hint = "dimensions must be different positive numbers", "such as [384, 192, 96]"
            raise UserError(message, location="embedding.dimensions", hint=hint)
        return self

    @classmethod
    def from_layout(cls, layout: SentenceLayout) -> EmbeddingSettings:
        options = {name: getattr(layout, name) for name in ("normalize", "query_prompt", "passage_prompt")}
        return cls.model_validate({"pooling": layout.pooling or "auto", **options})

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
