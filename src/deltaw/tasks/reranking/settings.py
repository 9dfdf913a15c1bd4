"""Settings of the task ``reranking``: the ``reranking:`` section."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from deltaw.errors import UserError
from deltaw.settings.fields import TaskSettings, require_range, setting


class RerankingSettings(TaskSettings):
    """The ``reranking:`` section; for ``task: reranking``.

    Raises:
        UserError: if a range is empty or the template lacks ``{query}`` or ``{passage}``.
    """

    loss: Literal["auto", "binary", "pairwise", "listwise", "contrastive"] = setting(
        "auto",
        "ranking loss; binary: cross-entropy of each score; pairwise: better of two passages; listwise: softmax over "
        "scored lists; contrastive: positive against the query's negatives; auto: contrastive for rows with "
        "negatives, listwise for lists, else binary",
        when="Leave auto, which follows from the rows.",
    )
    score_range: tuple[float, float] = setting(
        (0.0, 1.0), "minimum and maximum score of a row", when="Set it to the scale of your scores, for example [0, 3]."
    )
    template: str | None = setting(
        None,
        "prompt of a decoder with {query} and {passage}; null: from the model's chat template, or a yes/no question; "
        "for encoders a sentence pair",
        when="Set it to the question that your program asks a language model.",
    )
    yes: str = setting(
        "yes",
        "token that means a relevant passage, for language models without a classification head",
        when="Set it if the template asks in another language.",
    )
    no: str = setting(
        "no", "token that means an irrelevant passage", when="Set it if the template asks in another language."
    )

    @model_validator(mode="after")
    def _validate(self) -> RerankingSettings:
        require_range(self.score_range, "reranking.score_range")
        if self.template is not None and not all(part in self.template for part in ("{query}", "{passage}")):
            hint = "add both {query} and {passage} to the template"
            raise UserError("the template lacks {query} or {passage}", location="reranking.template", hint=hint)
        return self
