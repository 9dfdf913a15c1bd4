"""Whether a model learned to tell rows apart: one answer to every row, and what such an answer would score.

It knows evaluations and their rows, no models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.labels import LabelEvaluation

# Numbers that are predicted with less than this share of the labels' spread count as one answer.
SPREAD = 0.01
# The share of rows that must have the same answer for it to be something to compare with.
FREQUENT = 0.1


def one_answer(
    evaluation: Evaluation, examples: Sequence[Any], decode: Callable[[np.ndarray], str] = str
) -> str | None:
    """The answer that the model gives to every row; None where answers differ, or where all rows have the
    same answer anyway.

    A language model's answer is what is likeliest at each label. Answers of several lengths are compared as
    far as the shortest goes.

    Args:
        decode: text of tokens.
    """
    if isinstance(evaluation, LabelEvaluation):
        truth = np.array([example.label for example in examples])
        if evaluation.confusion is None:
            close = np.ptp(evaluation.predictions) <= SPREAD * np.std(truth)
            return f"{evaluation.predictions.mean():.4g}" if close and np.ptp(truth) > 0 else None
        chosen = evaluation.predictions.argmax(1)
        if len(set(chosen.tolist())) > 1 or len(set(truth.tolist())) == 1:
            return None
        return str(evaluation.classes[chosen[0]])
    if not evaluation.predicted:
        return None
    shortest = min(len(predicted) for predicted, _ in evaluation.predicted)
    given = {predicted[:shortest].tobytes() for predicted, _ in evaluation.predicted}
    expected = {truth[:shortest].tobytes() for _, truth in evaluation.predicted}
    if len(given) > 1 or len(expected) == 1:
        return None
    return decode(evaluation.predicted[0][0]).strip()


def constant_scores(evaluation: Evaluation, examples: Sequence[Any]) -> tuple[str, np.ndarray] | None:
    """The best answer to give to every row, and what it scores row by row; None where there is none.

    It is the most frequent class or answer of these very rows, or the mean of their numbers, so it knows more
    than a model could.
    """
    if isinstance(evaluation, LabelEvaluation):
        truth = np.array([example.label for example in examples])
        if evaluation.confusion is None:
            return f"{truth.mean():.4g}", (truth - truth.mean()) ** 2
        most = int(np.bincount(truth).argmax())
        return str(evaluation.classes[most]), (truth == most).astype(np.float64)
    if not evaluation.predicted:
        return None
    texts = [example.answer for example in examples if getattr(example, "answer", None) is not None]
    answer, count = Counter(texts).most_common(1)[0]
    if len(texts) != len(evaluation.predicted) or count < FREQUENT * len(texts):
        return None
    return answer.strip(), np.array([float(text == answer) for text in texts])
