"""Detection of constant answers, and the score of the best constant answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deltaw.training.evaluation.base import Evaluation, format_numbers

# Predicted numbers are a constant answer if their range is below this share of the labels' standard deviation.
MAX_RELATIVE_SPREAD = 0.01
# Minimum share of rows with the most frequent answer for a constant baseline.
MIN_ANSWER_SHARE = 0.1


def single_answer(result: Evaluation, examples: Sequence[Any], decode: Callable[[np.ndarray], str] = str) -> str | None:
    """Return the model's answer if it is the same for all rows, although the expected answers differ. Otherwise None.

    A language model's answer is its most likely token at each label, truncated to the length of the shortest answer.

    Args:
        decode: Converts tokens to text.
    """
    if result.predictions is not None:
        truth = np.array([example.label for example in examples])
        if result.confusion is None:
            close = (np.ptp(result.predictions, 0) <= MAX_RELATIVE_SPREAD * np.std(truth, 0)).all()
            return format_numbers(result.predictions.mean(0), 4) if close and np.ptp(truth) > 0 else None
        chosen = result.predictions.argmax(1)
        is_constant = len(set(chosen.tolist())) == 1 < len(set(truth.tolist()))
        return str(result.classes[chosen[0]]) if is_constant else None
    if not result.predicted:
        return None
    shortest = min(len(predicted) for predicted, _ in result.predicted)
    columns = zip(*result.predicted, strict=True)
    actual, expected = ({answer[:shortest].tobytes() for answer in answers} for answers in columns)
    return decode(result.predicted[0][0]).strip() if len(actual) == 1 < len(expected) else None


def best_constant_answer(evaluation: Evaluation, examples: Sequence[Any]) -> tuple[str, np.ndarray] | None:
    """Return the best constant answer and its score per row, or None.

    It is the most frequent class or answer of these rows, or the mean of their numbers, so it uses the labels.
    """
    if evaluation.predictions is not None:
        truth = np.array([example.label for example in examples])
        if evaluation.confusion is None:
            return None if truth.ndim > 1 else (f"{truth.mean():.4g}", (truth - truth.mean()) ** 2)
        majority = int(np.bincount(truth).argmax())
        return str(evaluation.classes[majority]), (truth == majority).astype(np.float64)
    if not evaluation.predicted:
        return None
    texts = [example.answer for example in examples if getattr(example, "answer", None) is not None]
    answer, count = Counter(texts).most_common(1)[0]
    if len(texts) != len(evaluation.predicted) or count < MIN_ANSWER_SHARE * len(texts):
        return None
    return answer.strip(), np.array([float(text == answer) for text in texts])
