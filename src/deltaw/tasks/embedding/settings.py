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
        when="Leave auto, which follows from the columns; supcon and infonce also apply to the same rows.",
    )
    temperature: Annotated[float, Field(gt=0, le=100)] | Auto = setting(
        "auto",
        "temperature that divides the similarities; auto: 0.05, for kl 1",
        when="Lower it to 0.02 for many easy negatives.",
    )
    symmetric: bool = setting(
        False,
        "symmetric loss that also retrieves the query of each passage (infonce)",
        when="Use true if queries and passages are of the same kind.",
    )
    mask_above: float | None = setting(
        None,
        "margin above the positive's similarity at which negatives of other rows are masked (infonce); null: mask "
        "only identical texts",
        when="Use 0.05 to 0.1 if many rows have the same meaning.",
        ge=-2,
        le=2,
    )
    dimensions: list[int] = setting(
        [],
        "Matryoshka dimensions: vector prefixes that the loss is also applied to",
        when="Set it, for example to [256, 128], if vectors will be truncated to save memory.",
    )
    similarity: Literal["auto", "cosine", "dot"] = setting(
        "auto", "similarity; auto: cosine; margin-mse, kl: dot", when="Use dot only if the database does."
    )
    pooling: Literal["auto", "mean", "first", "last", "weighted"] = setting(
        "auto",
        "pooling of token vectors; auto: from the model's folder, else mean, for decoders last",
        when="Leave auto for models with a pooling configuration; another pooling needs more rows.",
    )
    normalize: bool | Auto = setting(
        "auto",
        "normalize vectors to length 1; auto: from the model's folder",
        when="Set true for cosine search in a database that only has dot products.",
    )
    query_prompt: str | None = setting(
        None,
        "prefix of queries; null: from the model's folder",
        when="Set it to the prefix that the model was trained with, such as 'query: '.",
    )
    passage_prompt: str | None = setting(
        None,
        "prefix of passages; null: from the model's folder",
        when="Set it to the prefix that the model was trained with, such as 'passage: '.",
    )
    score_range: tuple[float, float] = setting(
        (-1.0, 1.0),
        "minimum and maximum score of a row",
        when="Set it to the scale of your scores, for example [0, 5].",
    )
    kept_tokens: Annotated[int, Field(ge=0)] | Auto = setting(
        "auto",
        "number of tokens per step whose activations are stored for the backward pass; activations of the other "
        "tokens are recomputed, which gives the same result with less memory",
        when="Lower it for very large batches if the plan exceeds the memory.",
    )

    @model_validator(mode="after")
    def _validate(self) -> EmbeddingSettings:
        require_range(self.score_range, "embedding.score_range")
        if self.loss not in ("auto", "infonce"):
            for name, value in (("symmetric", self.symmetric), ("mask_above", self.mask_above is not None)):
                if value:
                    message = f"the loss '{self.loss}' has no {name}"
                    hint = "remove it, or set embedding.loss: infonce"
                    raise UserError(message, location=f"embedding.{name}", hint=hint)
        if any(count < 1 for count in self.dimensions) or len(set(self.dimensions)) < len(self.dimensions):
            message = "dimensions must be different positive numbers"
            hint = "such as [384, 192, 96]"
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
