"""How well a model does on examples: loss and perplexity, and exact match of what it writes itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.example import Example
from deltaw.data.packing import Batch
from deltaw.errors import UserError
from deltaw.models.forest import flat_rows
from deltaw.models.generation import generate
from deltaw.training.objective import CausalObjective
from deltaw.training.portions import Portions


@dataclass(frozen=True)
class Answer:
    """What the model wrote where ``expected`` stands in the data."""

    row: int
    question: str
    expected: str
    written: str

    @property
    def exact(self) -> bool:
        """Equal but for white space at both ends."""
        return self.written.strip() == self.expected.strip()


def loss_and_perplexity(
    objective: Callable[[Batch], Tensor], examples: Sequence[Example], portions: Portions
) -> dict[str, float]:
    """Mean cross-entropy over all label tokens (nats), and e to its power.

    Raises:
        UserError: the loss is not finite.
    """
    total, labels = 0.0, 0
    with torch.no_grad():
        for batch in portions.batches(examples):
            total += float(objective(batch))
            labels += batch.label_tokens
    loss = total / labels
    if not math.isfinite(loss):
        raise UserError(
            f"the loss of the evaluated rows is {loss}",
            mend="if the adapter was trained, train it again with a lower train.learning_rate",
        )
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Greedy completions of the examples that have an answer, in their order.

    Args:
        max_new_tokens: by default as many as the longest answer has, and a few more.
    """
    asked = [e for e in examples if e.answer is not None]
    if not asked:
        return []
    longest = max(len(e.tokens) - e.prompt_length for e in asked)
    completions = generate(
        model,
        tokenizer,
        [e.tokens[: e.prompt_length] for e in asked],
        max_new_tokens=max_new_tokens or longest + 4,
        on_progress=on_progress,
    )
    return [
        Answer(
            row=e.row,
            question=_question(tokenizer, e),
            expected=e.answer or "",
            written=c.text,
        )
        for e, c in zip(asked, completions, strict=True)
    ]


def _question(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The last turn of the prompt as a person would read it: templates put each speaker's name on a line."""
    text = str(tokenizer.decode(example.tokens[: example.prompt_length], skip_special_tokens=True)).rstrip()
    lines = text.removesuffix("assistant").rstrip().splitlines()
    speaker = max((n for n, line in enumerate(lines) if line.strip().lower() == "user"), default=-1)
    return "\n".join(lines[speaker + 1 :])


def exact_match(given: Sequence[Answer]) -> float:
    """Share of answers equal to what the data says."""
    return sum(a.exact for a in given) / len(given)


@dataclass(frozen=True)
class Score:
    """``metrics``: loss, perplexity and, where rows have answers, exact_match; and the answers themselves."""

    metrics: dict[str, float]
    answers: list[Answer]


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    portions: Portions,
    *,
    max_new_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Everything that ``deltaw eval`` says of a model."""
    objective = CausalObjective(model)
    with contextlib.nullcontext() if portions.padded else flat_rows(model):
        metrics = loss_and_perplexity(objective, examples, portions)
    given = answers(model, tokenizer, examples, max_new_tokens=max_new_tokens, on_progress=on_progress)
    if given:
        metrics["exact_match"] = exact_match(given)
    return Score(metrics, given)
