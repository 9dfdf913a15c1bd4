"""Check whether a training made the model's text worse, by greedy answers before and after it.

Losses of preferences, rewards and distillation can improve while the model forgets the language: pair accuracy reaches
100 % on a model that answers every prompt with word salad. The check reads the text itself, so it needs neither the
loss nor the drift. Greedy decoding draws no random numbers, so training is not affected.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from deltaw.data.example import Example, RowGroup
from deltaw.runtime.generation import Completion, position_limit
from deltaw.training.distillation.feed import LessonFeed
from deltaw.training.evaluation.general import ANSWER_TOKENS, NoGeneralAnswers, check_size
from deltaw.training.evaluation.general_prompts import MEASURED
from deltaw.training.losses import RowLogProbs
from deltaw.training.seen import as_seen
from deltaw.training.session import Session
from deltaw.training.tasks.causal import has_prompt
from deltaw.training.tasks.causal_objective import CausalObjective
from deltaw.working import working

# Prompts of the data that are answered, rows that they are drawn from, and the random stream that draws them.
PROMPTS, POOL, _STREAM = 32, 4096, 13
# Bounds of the token limit of an answer. In between it is twice the longest expected answer.
LEAST_TOKENS, MOST_TOKENS = 16, 128
# Shortest answer, in tokens, that can be a loop or improbable text. An answer is a loop if fewer than this share of its
# 4-grams are distinct. It is improbable if its median log-probability per token under the base model is below this one.
LEAST_JUDGED, LEAST_DISTINCT, IMPROBABLE = 8, 0.5, -4.0
# Least changes that count, if they also exceed their 95 % interval over prompts: shares of prompts, and nats per token.
BROKEN, CUT, OVERLAP, LOG_PROB, GENERAL_LOG_PROB = 0.1, 0.2, 0.05, 0.5, 1.0
# Answers of each kind that a range test watches, and the fall of their mean log-probability that ends it.
WATCHED, WATCHED_FALL = 8, 0.3
# Answers are too short or too long if they differ by this factor from those before training and from the expected ones.
LENGTH = 4.0
WORSE, UNCLEAR, FINE = "worse", "unclear", "not worse"
# Names of the sets of prompts, as they appear in messages.
DATA, GENERAL = "prompts of the data", "general prompts"


def choose_rows(rows: Sequence[Any], count: int, *, seed: int, stream: int) -> list[Example]:
    """Return ``count`` rows that have a prompt, drawn by the seed, in the order of ``rows``.

    A pair is represented by its chosen answer.
    """
    first = (row.rows[0] if isinstance(row, RowGroup) else row for row in rows)
    prompts = [row for row in first if isinstance(row, Example) and has_prompt(row)]
    if count >= len(prompts):
        return prompts
    indices = np.random.default_rng([seed % 2**64, stream]).choice(len(prompts), size=count, replace=False)
    return [prompts[index] for index in sorted(indices.tolist())]


@dataclass(frozen=True)
class AnswerMetrics:
    """Metrics of greedy answers to the same prompts; each is an array over prompts, NaN where it is not defined.

    Attributes:
        length: tokens. cut: 1 if the answer reached the token limit.
        empty, loop, improbable, broken: 1 if the answer is empty, repeats itself, is text that the base model finds
            very unlikely, or any of these.
        exact_match, overlap: equality and F1 of words with the expected answer.
        log_prob: of the expected answer, or of the base model's own answer, in nats per token.
    """

    length: np.ndarray
    cut: np.ndarray
    empty: np.ndarray
    loop: np.ndarray
    improbable: np.ndarray
    broken: np.ndarray
    exact_match: np.ndarray
    overlap: np.ndarray
    log_prob: np.ndarray

    def means(self) -> dict[str, Any]:
        """Return the mean of each metric over the prompts for which it is defined, ready for JSON."""
        defined = {name: values[np.isfinite(values)] for name, values in vars(self).items()}
        return {name: float(values.mean()) if len(values) else None for name, values in defined.items()}


def answer_metrics(
    answers: Sequence[Completion],
    expected: Sequence[str | None],
    log_probs: Sequence[np.ndarray],
    base_log_probs: Sequence[np.ndarray] | None = None,
) -> AnswerMetrics:
    """Compute the metrics of greedy answers.

    Args:
        expected: Text that was to be written, or None.
        log_probs: Log-probabilities of the tokens of each prompt's reference text; empty without one.
        base_log_probs: Log-probabilities of each answer's tokens under the base model, or None if they are not known.
    """
    empty = np.array([not answer.text.strip() for answer in answers], float)
    loop = np.array([distinct_share(answer.tokens) < LEAST_DISTINCT for answer in answers], float)
    improbable = np.zeros(len(answers))
    for index, values in enumerate(base_log_probs or ()):
        improbable[index] = len(values) >= LEAST_JUDGED and np.median(values) < IMPROBABLE
    pairs = [(answer.text, text) for answer, text in zip(answers, expected, strict=True)]
    return AnswerMetrics(
        length=np.array([len(answer.tokens) for answer in answers], float),
        cut=np.array([not answer.stopped for answer in answers], float),
        empty=empty,
        loop=loop,
        improbable=improbable,
        broken=np.maximum.reduce([empty, loop, improbable]),
        exact_match=np.array([np.nan if b is None else a.strip() == b.strip() for a, b in pairs], float),
        overlap=np.array([np.nan if b is None else word_overlap(a, b) for a, b in pairs], float),
        log_prob=np.array([values.mean() if len(values) else np.nan for values in log_probs], float),
    )


def distinct_share(tokens: np.ndarray, size: int = 4) -> float:
    """Return the share of n-grams that are distinct; 1 for texts below ``LEAST_JUDGED`` tokens."""
    if len(tokens) < LEAST_JUDGED:
        return 1.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens, size)
    return len(np.unique(grams, axis=0)) / len(grams)


def word_overlap(text: str, expected: str) -> float:
    """Return the F1 of the words of two texts, case and order ignored."""
    words, others = Counter(text.lower().split()), Counter(expected.lower().split())
    common = sum((words & others).values())
    return 2 * common / max(1, sum(words.values()) + sum(others.values()))


@dataclass(frozen=True)
class AnswerComparison:
    """Answers to one set of prompts before and after training.

    Attributes:
        name: of the prompts, for messages. limit: token limit of an answer.
        expected_length: mean tokens of the answers that the run trains on; None if it does not train on answers.
        checks_cut: True if more answers that reach the limit mean a loss.
    """

    name: str
    limit: int
    before: AnswerMetrics
    after: AnswerMetrics
    expected_length: float | None = None
    checks_cut: bool = False

    @property
    def trained(self) -> bool:
        """True if the run trains on expected answers, so that missing them means a loss."""
        return self.expected_length is not None

    def change(self, metric: str) -> tuple[float, float]:
        """Return the mean paired change of a metric, and the half width of its 95 % interval."""
        values = getattr(self.after, metric) - getattr(self.before, metric)
        values = values[np.isfinite(values)]
        if not len(values):
            return 0.0, 0.0
        return float(values.mean()), 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0

    def rises(self, metric: str, least: float, sign: int = 1) -> bool:
        """Return True if a metric rises by at least ``least`` and beyond chance; with ``sign`` -1, if it falls."""
        mean, interval = self.change(metric)
        return sign * mean >= least and sign * mean > interval

    def reasons(self) -> list[str]:
        """Return in which respects the answers got worse beyond chance, in words."""
        before, after = self.before.means(), self.after.means()
        reasons, count = [], len(self.after.broken)
        if self.rises("broken", BROKEN):
            kinds = [name for name in ("empty", "loop", "improbable") if getattr(self.after, name).any()]
            words = {"empty": "empty", "loop": "repetition", "improbable": "word salad"}
            kind = ", ".join(words[name] for name in kinds)
            reasons.append(
                f"{self.after.broken.sum():.0f} of {count} answers to {self.name} are broken text ({kind}), "
                f"{self.before.broken.sum():.0f} before"
            )
        improved = self.trained and (self.rises("exact_match", 0) or self.rises("overlap", OVERLAP))
        limit = LOG_PROB if self.trained else GENERAL_LOG_PROB
        if self.rises("log_prob", limit, -1) and not improved:
            text = "the expected answers" if self.trained else "the base model's answers"
            change = f"from {before['log_prob']:.2f} to {after['log_prob']:.2f} nats per token"
            reasons.append(f"the log-probability of {text} to {self.name} fell {change}")
        for metric, least in (("exact_match", 0.0), ("overlap", OVERLAP)) if self.trained else ():
            if self.rises(metric, least, -1):
                reasons.append(self.fall(metric))
        if self.checks_cut and self.rises("cut", CUT):
            shares = f"{after['cut']:.0%} of the answers to {self.name} do not end within {self.limit} tokens"
            reasons.append(f"{shares}, {before['cut']:.0%} before")
        elif self.expected_length is not None:
            usual = [min(value, self.limit) for value in (before["length"], self.expected_length)]
            length = after["length"]
            if length > LENGTH * max(1.0, *usual) or LENGTH * max(1.0, length) < min(usual):
                reasons.append(f"the answers to {self.name} have {length:.0f} tokens, {before['length']:.0f} before")
        return reasons

    def fall(self, metric: str) -> str:
        """Describe the fall of a share."""
        before, after = getattr(self.before, metric), getattr(self.after, metric)
        text = {"exact_match": "exact match", "overlap": "word overlap"}[metric]
        shares = f"from {np.nanmean(before):.0%} to {np.nanmean(after):.0%}"
        return f"{text} with the expected answers to {len(after)} {self.name} fell {shares}"

    def as_dict(self) -> dict[str, object]:
        """Return the metrics ready for JSON."""
        counts = {"prompts": len(self.after.broken), "max_new_tokens": self.limit}
        return {**counts, "before": self.before.means(), "after": self.after.means()}


def verdict_of(comparisons: Sequence[AnswerComparison], hint: str = "") -> dict[str, object]:
    """Return the verdict over all prompts, a line that states it, and all metrics, ready for JSON."""
    reasons = [reason for comparison in comparisons for reason in comparison.reasons()]
    falls = [
        comparison.fall(metric)
        for comparison in comparisons
        for metric in ("exact_match", "overlap")
        if comparison.trained and comparison.change(metric)[0] < 0
    ]
    verdict, line = FINE, None
    if reasons:
        verdict, line = WORSE, f"generation got worse: {'; '.join(reasons)}"
    elif falls:
        verdict, line = UNCLEAR, f"answers may be worse: {falls[0]}, which may be chance"
    numbers = {comparison.name: comparison.as_dict() for comparison in comparisons}
    return {"verdict": verdict, "line": line, "hint": hint if reasons else None, **numbers}


def is_checked(session: Session) -> bool:
    """Return True if the run compares answers: its task requires it, and the model is not sharded."""
    return session.task.checks_generation and session.config.train.sharding == "none"


def prompts_of(session: Session) -> list[Example]:
    """Return held-out prompts of the data, with training prompts added up to ``PROMPTS``."""
    rows: list[Example] = []
    for part in (session.data.held_out, session.data.train):
        count = PROMPTS - len(rows)
        rows += choose_rows(part[:POOL], count, seed=session.config.train.seed, stream=_STREAM) if count > 0 else []
    return rows


def answer_limit(session: Session, rows: Sequence[Example]) -> int:
    """Return the token limit of an answer to a prompt of the data."""
    longest = max((row.label_count for row in rows), default=0)
    limit = max(LEAST_TOKENS, 2 * longest) if longest else session.written.tokens or MOST_TOKENS
    positions = position_limit(session.model) or 1 << 31
    room = positions - max((row.prompt_length for row in rows), default=0)
    return max(1, min(MOST_TOKENS, limit, room))


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are answered before and after training, as the base model sees them.

    Attributes:
        rows: each with a reference text as its labels: the expected answer, or the base model's answer. Rows of rewards
            have no labels.
        limit: token limit of an answer. checks_cut: see :class:`AnswerComparison`.
    """

    name: str
    rows: Sequence[Example]
    limit: int
    checks_cut: bool = False

    @property
    def expected_length(self) -> float | None:
        """Mean tokens of the answers that the run trains on; None if it does not train on answers."""
        lengths = [row.label_count for row in self.rows if row.label_count and self.name != GENERAL]
        return float(np.mean(lengths)) if lengths else None

    @property
    def expected(self) -> list[str | None]:
        """The expected answers; None if there is no expected answer."""
        return [row.answer if self.name != GENERAL and row.desired is not False else None for row in self.rows]


@dataclass(frozen=True)
class BaseAnswers:
    """The base model's answers to prompts, and its log-probabilities of their reference texts."""

    prompts: PromptSet
    answers: Sequence[Completion]
    log_probs: Sequence[np.ndarray]


def max_new_tokens(session: Session) -> int:
    """Return an upper bound of the tokens that both models generate in the check."""
    if not is_checked(session):
        return 0
    rows = prompts_of(session)
    return 2 * len(rows) * answer_limit(session, rows) + len(MEASURED) * ANSWER_TOKENS


class GenerationCheck:
    """Answers prompts before and after the training of a session. Create it before the first step.

    If the method keeps the base model, all prompts are answered at the end. Otherwise the base model answers first.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        keeps_base = session.method.keeps_base(session.model)
        self._references = None if keeps_base else self._base_answers()

    def measure(self) -> dict[str, object]:
        """Compare the answers of the trained model with those before training; empty if the run is not checked.

        Call it outside of ``session.running``.
        """
        session = self._session
        with working("comparing answers before and after training"):
            references = self._references if self._references is not None else self._base_answers()
            rows = [as_seen(row, session.method) for reference in references for row in reference.prompts.rows]
            inputs = [row.tokens[: row.prompt_length] for row in rows]
            if not inputs:
                return {}
            # One call, because a decoder is prepared and verified for each.
            answers = iter(session.complete(inputs, max(reference.prompts.limit for reference in references)))
            comparisons = [self._compared(reference, answers) for reference in references]
        rate = f"{session.learning_rate / 3:.1g}"
        return verdict_of(comparisons, f"lower train.learning_rate, for example to {rate}, or train fewer steps")

    def _compared(self, reference: BaseAnswers, answers: Iterator[Completion]) -> AnswerComparison:
        """Compare the base model's answers with the trained model's, which are taken from ``answers``."""
        session, prompts = self._session, reference.prompts
        after = [_truncated(next(answers), prompts.limit) for _ in prompts.rows]
        log_probs = self._log_probs([as_seen(row, session.method) for row in prompts.rows])
        base_log_probs = None
        if self._references is None:
            with session.method.without(session.model):
                base_log_probs = self._log_probs(list(map(_with_answer, prompts.rows, after)))
        return AnswerComparison(
            prompts.name,
            prompts.limit,
            answer_metrics(reference.answers, prompts.expected, reference.log_probs),
            answer_metrics(after, prompts.expected, log_probs, base_log_probs),
            prompts.expected_length,
            prompts.checks_cut,
        )

    def _base_answers(self) -> list[BaseAnswers]:
        """Let the base model answer all prompts, and compute its log-probabilities of the reference texts."""
        session = self._session
        if not is_checked(session):
            return []
        keeps_base, results = session.method.keeps_base(session.model), []
        with session.method.without(session.model) if keeps_base else contextlib.nullcontext():
            for prompts in self._prompt_sets():
                if prompts.name == GENERAL:
                    answers = [_reference_answer(row) for row in prompts.rows]
                else:
                    inputs = [row.tokens[: row.prompt_length] for row in prompts.rows]
                    answers = session.complete(inputs, prompts.limit, of_base=True)
                results.append(BaseAnswers(prompts, answers, self._log_probs(prompts.rows)))
        return results

    def _prompt_sets(self) -> Iterator[PromptSet]:
        """Yield the prompts of the data, and the general prompts if the model is large enough to answer these."""
        session = self._session
        rows = prompts_of(session)
        if isinstance(session.feed, LessonFeed):
            rows = session.feed.with_answers(rows)
        if rows:
            limit = answer_limit(session, rows)
            bare = [_without_undesired(row.without_first(session.method.virtual_tokens)) for row in rows]
            yield PromptSet(DATA, bare, limit, any(row.label_count for row in bare) or limit == session.written.tokens)
        with contextlib.suppress(NoGeneralAnswers):
            check_size(session.model)
            yield PromptSet(GENERAL, session.general_answers(MEASURED)[::2], ANSWER_TOKENS)

    def _log_probs(self, rows: Sequence[Example]) -> list[np.ndarray]:
        with self._session.running():
            return label_log_probs(self._session, rows)


@torch.no_grad()
def label_log_probs(session: Session, rows: Sequence[Example]) -> list[np.ndarray]:
    """Return the log-probabilities of each row's labels under the model as it is, in nats.

    Call it within ``session.running``.
    """
    labeled = [row for row in rows if row.label_count]
    by_row: dict[int, np.ndarray] = {}
    with session.method.evaluating(session.model):
        objective = CausalObjective(session.model)
        for batch in session.batcher.batches(labeled) if labeled else ():
            values = RowLogProbs.of(batch, objective.token_log_probs(batch))
            labels, owners = values.values[values.index].float().cpu().numpy(), values.row.cpu().numpy()
            by_row |= {id(row): labels[owners == index] for index, row in enumerate(values.rows)}
    return [by_row.get(id(row), np.empty(0)) for row in rows]


def text_watch(session: Session) -> Callable[[], bool]:
    """Return a function that is True once general or chosen answers are much less likely than now.

    It costs a forward pass over at most ``2 * WATCHED`` answers per call. Call it within ``session.running``.
    """
    if not is_checked(session):
        return lambda: False
    sets = [prompts_of(session)[:WATCHED]]
    with contextlib.suppress(NoGeneralAnswers):
        check_size(session.model)
        general = session.general_answers(MEASURED)
        sets.append([as_seen(row, session.method) for row in general[:: -(-len(general) // WATCHED)]])

    def means() -> list[float]:
        return [float(np.concatenate([*label_log_probs(session, rows), [0.0]]).mean()) for rows in sets]

    start = means()
    return lambda: any(before - now > WATCHED_FALL for before, now in zip(start, means(), strict=True))


def _reference_answer(row: Example) -> Completion:
    """Return the labels of a general prompt, which are the base model's answer."""
    tokens = row.tokens[row.prompt_length :]
    return Completion(tokens, row.answer or "", len(tokens) < ANSWER_TOKENS)


def _truncated(answer: Completion, limit: int) -> Completion:
    """Return the first ``limit`` tokens of an answer."""
    if len(answer.tokens) <= limit:
        return answer
    return replace(answer, tokens=answer.tokens[:limit], stopped=False, terminator=None)


def _with_answer(row: Example, answer: Completion) -> Example:
    """Return the row's prompt with this answer as its labels."""
    end = [] if answer.terminator is None else [answer.terminator]
    tokens = np.concatenate([row.tokens[: row.prompt_length], answer.tokens, end]).astype(np.int32)
    return replace(row, tokens=tokens, is_label=np.arange(len(tokens)) >= row.prompt_length)


def _without_undesired(row: Example) -> Example:
    """Return the row without labels if its answer is undesired."""
    return replace(row, is_label=np.zeros_like(row.is_label)) if row.desired is False else row
