"""How well a model does on examples: loss and perplexity, and exact match of what it writes itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.example import Example
from deltaw.data.packing import Item, rows_of
from deltaw.errors import UserError
from deltaw.runtime.generation import generate
from deltaw.runtime.packed import packed_rows
from deltaw.training.evaluation.base import Evaluation, mean_interval
from deltaw.training.losses import label_places
from deltaw.training.microbatches import AnyBatcher
from deltaw.training.tasks.causal_batcher import ROWS_AT_ONCE
from deltaw.training.tasks.causal_objective import CausalObjective


class Writer(Protocol):
    """Writes greedy completions; what an evaluation is given instead of transformers' decoding."""

    def __call__(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        on_progress: Callable[[int, int], None] | None,
    ) -> list[str]:
        """The texts behind prompts of token ids, virtual ones among them, in their order."""


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


def evaluate_causal(objective: CausalObjective, examples: Sequence[Item], batcher: AnyBatcher) -> Evaluation:
    """Loss and perplexity over all label tokens, and, where rows have answers, the share of exact ones.

    A row's answer counts as exact where every label of it, its end mark too, is the likeliest token after
    the ones before: greedy decoding would then write it, and no other. That takes one forward pass and no
    decoding.

    Raises:
        UserError: the loss is not finite.
    """
    total, labels = 0.0, 0
    losses: list[float] = []
    predicted: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(examples), ROWS_AT_ONCE):
        part = list(examples[start : start + ROWS_AT_ONCE])
        found: dict[int, tuple[float, tuple[np.ndarray, np.ndarray]]] = {}
        for batch in batcher.batches(part):
            each, likeliest = (tensor.cpu().numpy() for tensor in objective.evaluate_rows(batch))
            targets = batch.targets.cpu().numpy()
            index, owner = label_places(batch)
            for number, member in enumerate(batch.members):
                at = index[owner == number]
                found[id(member.example)] = float(each[at].mean()), (likeliest[at], targets[at])
                total += float(each[at].sum())
                labels += len(at)
        rows_alone = [row for item in part for row in rows_of(item)]
        losses += [found[id(row)][0] for row in rows_alone]
        predicted += [found[id(row)][1] for row in rows_alone if row.answer is not None]
    metrics = _loss_metrics(total / labels)
    if predicted:
        rows = np.array([np.array_equal(*pair) for pair in predicted], dtype=np.float64)
        metrics["exact_match"] = float(rows.mean())
        return Evaluation(metrics, "exact_match", True, rows, mean_interval(rows), predicted=predicted)
    rows = np.array(losses)
    return Evaluation(metrics, "loss", False, rows, mean_interval(rows))


def _loss_metrics(loss: float) -> dict[str, float]:
    """Mean cross-entropy in nats, and e to its power."""
    if not math.isfinite(loss):
        raise UserError(
            f"the loss of the evaluated rows is {loss}",
            hint="if the adapter was trained, train it again with a lower train.learning_rate",
        )
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int | None = None,
    batch_tokens: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
    writer: Writer | None = None,
) -> list[Answer]:
    """Greedy completions of the examples that have an answer, in their order.

    Args:
        max_new_tokens: by default as many as the longest answer has, and a few more.
        batch_tokens: the most tokens that are decoded together.
        writer: writes them; None for transformers.
    """
    asked = [e for e in examples if e.answer is not None]
    if not asked:
        return []
    longest = max(len(e.tokens) - e.prompt_length for e in asked)
    prompts = [e.tokens[: e.prompt_length] for e in asked]
    count = max_new_tokens or longest + 4
    if writer is not None:
        written = writer(prompts, count, on_progress)
    else:
        how = {"batch_tokens": batch_tokens, "on_progress": on_progress}
        completions = generate(model, tokenizer, prompts, max_new_tokens=count, **how)  # type: ignore[arg-type]
        written = [completion.text for completion in completions]
    return [
        Answer(
            row=e.row,
            question=_question(tokenizer, e),
            expected=e.answer or "",
            written=text,
        )
        for e, text in zip(asked, written, strict=True)
    ]


def _question(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The last turn of the prompt as a person would read it: templates put each speaker's name on a line."""
    prompt = example.tokens[: example.prompt_length]
    prompt = prompt[prompt < len(tokenizer)]  # a soft prompt has no text
    text = str(tokenizer.decode(prompt, skip_special_tokens=True)).rstrip()
    lines = text.removesuffix("assistant").rstrip().splitlines()
    speaker = max((n for n, line in enumerate(lines) if line.strip().lower() == "user"), default=-1)
    return "\n".join(lines[speaker + 1 :])


def exact_match(given: Sequence[Answer]) -> float:
    """Share of answers equal to what the data says."""
    return sum(a.exact for a in given) / len(given)


@dataclass(frozen=True)
class Score:
    """What a model came to on examples, and, where it writes text, the answers that it wrote.

    ``metrics`` are the evaluation's; where rows have answers, ``exact_match`` is that of the written ones.
    """

    evaluation: Evaluation
    answers: list[Answer]

    @property
    def metrics(self) -> dict[str, float]:
        return self.evaluation.metrics


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batcher: AnyBatcher,
    *,
    max_new_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    writer: Writer | None = None,
) -> Score:
    """Everything that ``deltaw eval`` says of a causal language model."""
    objective = CausalObjective(model)
    padded = getattr(batcher, "padded", False)
    with contextlib.nullcontext() if padded else packed_rows(model):
        evaluation = evaluate_causal(objective, examples, batcher)
    how = {"max_new_tokens": max_new_tokens, "on_progress": on_progress, "writer": writer}
    given = answers(model, tokenizer, examples, **how)  # type: ignore[arg-type]
    if given:
        exact = np.array([answer.exact for answer in given], dtype=np.float64)
        metrics = {**evaluation.metrics, "exact_match": exact_match(given)}
        evaluation = replace(evaluation, metrics=metrics, per_row=exact, interval=mean_interval(exact))
    return Score(evaluation, given)
