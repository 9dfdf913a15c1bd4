"""Generated answers to the prompts of rows, and their comparison with the expected answers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.example import Example, rows_of
from deltaw.data.prompts import TokenizedPrompt
from deltaw.data.report import quoted
from deltaw.decoding.generation import Progress, TextGenerator, common_prefix_length
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.general import GreedyDecoder


@dataclass(frozen=True)
class EvaluatedAnswer:
    """A generated answer and the expected one.

    Attributes:
        row: Number of the row.
        question: Last user turn of the prompt.
        expected: Answer in the data, or an empty string.
        output: Generated answer.
        reward: Reward of the answer, for tasks that reward completions.
        passed: True if the reward reaches the threshold.
    """

    row: int
    question: str
    expected: str
    output: str
    reward: float | None = None
    passed: bool = False

    @property
    def exact(self) -> bool:
        """True if the answer passed, or without a reward, if it equals the expected one, ignoring white space."""
        if self.reward is not None:
            return self.passed
        return self.output.strip() == self.expected.strip()

    @property
    def first_difference(self) -> int | None:
        """Index of the first character that differs from the expected answer, ignoring white space at the start.

        None if the answer is correct, or no answer is expected.
        """
        if self.exact or not self.expected:
            return None
        return common_prefix_length(self.output.strip(), self.expected.strip())

    def as_dict(self) -> dict[str, object]:
        """Return the generated answer for JSON."""
        reward = {} if self.reward is None else {"reward": self.reward}
        return {"text": self.output, "correct": self.exact, "first_difference": self.first_difference, **reward}


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int | None = None,
    batch_tokens: int = 4096,
    on_progress: Progress = None,
    writer: TextGenerator | None = None,
) -> list[EvaluatedAnswer]:
    """Generate greedy completions of the examples that have a prompt, in order.

    Args:
        max_new_tokens: By default slightly more than the longest expected answer.
        batch_tokens: Maximum number of tokens in a decoding batch.
        writer: Generates the completions. By default, or if it returns None, transformers is used.
    """
    prompted = [e for e in examples if has_prompt(e)]
    if not prompted:
        return []
    prompts = [e.tokens[: e.prompt_length] for e in prompted]
    count = max_new_tokens or 4 + max(len(e.tokens) - e.prompt_length for e in prompted)
    completions = GreedyDecoder(model, tokenizer, None, writer, batch_tokens).complete(prompts, count, on_progress)
    pairs = zip(prompted, completions, strict=True)
    return [EvaluatedAnswer(e.row, question_of(tokenizer, e), e.answer or "", c.text) for e, c in pairs]


# Rows with an exact match that is verified by generation, and the maximum length of their answers in tokens.
_MAX_VERIFIED = 8
_MAX_VERIFIED_TOKENS = 128


def exact_match_warning(
    rows: Sequence[Any], evaluation: Evaluation, tokenizer: PreTrainedTokenizerBase, complete: TextGenerator
) -> str | None:
    """Return a warning if the model does not generate the answers of rows that count as exact matches.

    Only a sample of the rows is generated.

    Args:
        rows: Evaluated rows as the model receives them.
        complete: Generates greedy completions.
    """
    if evaluation.main != "exact_match" or evaluation.per_row is None:
        return None
    answered = (row for item in rows for row in rows_of(item) if row.answer is not None)
    exact = (row for row, share in zip(answered, evaluation.per_row, strict=True) if share == 1 and has_prompt(row))
    short = (row for row in exact if len(row) - row.prompt_length <= _MAX_VERIFIED_TOKENS)
    if not (sample := list(itertools.islice(short, _MAX_VERIFIED))):
        return None
    count = 1 + max(len(row) - row.prompt_length for row in sample)
    completions = complete([row.tokens[: row.prompt_length] for row in sample], count, 4096, None)
    different = []
    for row, completion in zip(sample, completions or (), strict=False):
        label = str(tokenizer.decode(row.tokens[row.prompt_length :], skip_special_tokens=True))
        expected = label.rpartition("</think>")[2].strip()
        is_complete = not row.answer.strip().startswith(expected) or expected == row.answer.strip()
        is_answer = expected.startswith(row.answer.strip()) and completion.text.strip() == label.strip()
        if is_complete and not is_answer:
            different.append(f"row {row.row}: {quoted(completion.text, 60)} instead of {quoted(row.answer, 60)}")
    if not different:
        return None
    return (
        f"exact match is not confirmed: {len(different)} of {len(sample)} generated answers to rows that count as "
        f"correct differ. {different[0]}"
    )


def has_prompt(row: Example) -> bool:
    """True if a row has a prompt that a model can answer."""
    return row.prompt_length > 0 and (row.answer is not None or isinstance(row, TokenizedPrompt))


def question_of(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """Return the last user turn of the prompt as plain text.

    Chat templates put the speaker's name on a line by itself.
    """
    prompt = example.tokens[: example.prompt_length]
    prompt = prompt[prompt < len(tokenizer)]  # a soft prompt has no text
    text = str(tokenizer.decode(prompt, skip_special_tokens=True)).rstrip()
    lines = text.removesuffix("assistant").rstrip().splitlines()
    speaker = max((n for n, line in enumerate(lines) if line.strip().lower() == "user"), default=-1)
    return "\n".join(lines[speaker + 1 :])
