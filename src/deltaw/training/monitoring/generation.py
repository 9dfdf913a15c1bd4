"""Check whether a training made the model's text worse, by greedy answers before and after it.

Losses of preferences, rewards and distillation can improve while the model forgets the language: pair accuracy reaches
100% on a model that answers every prompt with word salad. The check reads the text itself, so it needs neither the
loss nor the drift. Greedy decoding uses no random numbers, so training is not affected.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from deltaw.data.example import Example, RowGroup
from deltaw.decoding.generation import GeneratedCompletion, position_limit
from deltaw.progress import track_progress
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.evaluation.answers import has_prompt
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.general import MAX_ANSWER_TOKENS, NoGeneralAnswers, check_size
from deltaw.training.evaluation.general_prompts import DRIFT_PROMPTS
from deltaw.training.losses import RowLogProbs
from deltaw.training.monitoring.probe import Probe, ProbeResult
from deltaw.training.rendered_rows import render_example
from deltaw.training.session import Session

# Prompts of the data that are answered, rows that they are drawn from, and the random stream that draws them.
PROMPTS = 24
POOL = 4096
_STREAM = 13
# Bounds of the token limit of an answer. In between it is twice the longest expected answer.
MIN_ANSWER_TOKENS = 16
MAX_DATA_ANSWER_TOKENS = 96
# Shortest answer, in tokens, that can be a loop or improbable text. An answer is a loop if fewer than this share of its
# 4-grams are distinct. It is improbable if its median log-probability per token under the base model is below this one.
MIN_JUDGED_TOKENS = 8
MIN_DISTINCT_SHARE = 0.5
IMPROBABLE = -4.0
# Least changes that count, if they also exceed their 95% interval over prompts: shares of prompts, and nats per token.
BROKEN = 0.1
CUT = 0.2
OVERLAP = 0.05
LOG_PROB = 0.5
GENERAL_LOG_PROB = 1.0
# Answers are too short or too long if they differ by this factor from those before training and from the expected ones.
LENGTH = 4.0
# Answers of each kind that a range test watches, and the fall of their mean log-probability that ends it.
WATCHED = 8
WATCHED_FALL = 0.3
WORSE = "worse"
UNCLEAR = "unclear"
FINE = "not worse"
# Names of the sets of prompts, as they appear in messages.
DATA = "prompts of the data"
GENERAL = "general prompts"
# Kinds of broken text, in words.
_KINDS = {"empty": "empty", "loop": "repetition", "improbable": "word salad"}
# By name, a metric of each prompt; NaN if it is not defined for the prompt.
Metrics: TypeAlias = dict[str, np.ndarray]


def choose_rows(
    rows: Sequence[Any], count: int, seed: tuple[int, int], is_usable: Callable[[Example], bool] = has_prompt
) -> list[Example]:
    """Return ``count`` rows that have a prompt, drawn by the seed and its stream, in the order of ``rows``.

    A pair is represented by its chosen answer.
    """
    first = (row.rows[0] if isinstance(row, RowGroup) else row for row in rows)
    prompts = [row for row in first if isinstance(row, Example) and is_usable(row)]
    if count >= len(prompts):
        return prompts
    indices = np.random.default_rng([seed[0] % 2**64, seed[1]]).choice(len(prompts), size=count, replace=False)
    return [prompts[index] for index in sorted(indices.tolist())]


def answer_metrics(
    answers: Sequence[GeneratedCompletion],
    expected: Sequence[str | None],
    log_probs: Sequence[np.ndarray],
    base_log_probs: Sequence[np.ndarray] = (),
) -> Metrics:
    """Compute the metrics of greedy answers.

    Args:
        answers: Generated answers.
        expected: Expected text, if any.
        log_probs: Log-probabilities of the tokens of each prompt's reference text; empty without one.
        base_log_probs: Log-probabilities of each answer's tokens under the base model; empty if they are not known.

    Returns:
        ``length`` in tokens; ``cut``: 1 if the answer reached the token limit; ``empty``, ``loop``, ``improbable`` and
        ``broken``, which is any of the three; ``exact_match`` and ``overlap`` with the expected answer; ``log_prob``:
        mean over the tokens of the reference text, in nats.
    """
    pairs = [(answer.text, text) for answer, text in zip(answers, expected, strict=True)]
    values = {
        "length": [len(answer.tokens) for answer in answers],
        "cut": [not answer.stopped for answer in answers],
        "empty": [not answer.text.strip() for answer in answers],
        "loop": [distinct_share(answer.tokens) < MIN_DISTINCT_SHARE for answer in answers],
        "improbable": [len(v) >= MIN_JUDGED_TOKENS and np.median(v) < IMPROBABLE for v in base_log_probs]
        or [0] * len(pairs),
        "exact_match": [np.nan if right is None else text.strip() == right.strip() for text, right in pairs],
        "overlap": [np.nan if right is None else word_overlap(text, right) for text, right in pairs],
        "log_prob": [value.mean() if len(value) else np.nan for value in log_probs],
    }
    metrics = {name: np.array(numbers, float) for name, numbers in values.items()}
    return {**metrics, "broken": np.maximum.reduce([metrics[kind] for kind in _KINDS])}


def distinct_share(tokens: np.ndarray) -> float:
    """Return the share of 4-grams that are distinct; 1 for texts below ``MIN_JUDGED_TOKENS`` tokens."""
    if len(tokens) < MIN_JUDGED_TOKENS:
        return 1.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens, 4)
    return len(np.unique(grams, axis=0)) / len(grams)


def word_overlap(text: str, expected: str) -> float:
    """Return the F1 of the words of two texts, case and order ignored."""
    words = Counter(text.lower().split())
    expected_words = Counter(expected.lower().split())
    return 2 * sum((words & expected_words).values()) / max(1, sum(words.values()) + sum(expected_words.values()))


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
    before: Metrics
    after: Metrics
    expected_length: float | None = None
    checks_cut: bool = False

    @property
    def trained(self) -> bool:
        """True if the run trains on expected answers, so that missing them means a loss."""
        return self.expected_length is not None

    def rises(self, metric: str, min_change: float, sign: int = 1) -> bool:
        """Return True if a metric rises by at least ``min_change`` and beyond chance; with ``sign`` -1, if it falls."""
        change = sign * (self.after[metric] - self.before[metric])
        change = change[np.isfinite(change)]
        interval = 1.96 * change.std(ddof=1) / len(change) ** 0.5 if len(change) > 1 else 0.0
        return bool(len(change)) and bool(change.mean() >= min_change and change.mean() > interval)

    def means(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the means of the metrics before and after training; None for a metric that no prompt has."""
        before, after = (
            {name: float(np.nanmean(values)) if np.isfinite(values).any() else None for name, values in side.items()}
            for side in (self.before, self.after)
        )
        return before, after

    def fall(self, metric: str) -> str:
        """Describe the fall of matches with the expected answers."""
        before, after = self.means()
        text = metric.replace("_", " ")
        location = f"with the expected answers to {len(self.after['broken'])} {self.name}"
        return f"{text} {location} fell from {before[metric]:.0%} to {after[metric]:.0%}"

    def reasons(self) -> list[str]:
        """Return in which respects the answers got worse beyond chance, in words."""
        before, after = self.means()
        reasons = []
        if self.rises("broken", BROKEN):
            kinds = ", ".join(word for kind, word in _KINDS.items() if after[kind])
            counts = [side["broken"].sum() for side in (self.after, self.before)]
            count = f"{counts[0]:.0f} of {len(self.after['broken'])}"
            reasons.append(f"{count} answers to {self.name} are broken text ({kinds}), {counts[1]:.0f} before")
        improved = self.trained and self.rises("exact_match", 0)
        if self.rises("log_prob", LOG_PROB if self.trained else GENERAL_LOG_PROB, -1) and not improved:
            text = f"the {'expected' if self.trained else 'original'} answers to {self.name}"
            change = f"from {before['log_prob']:.2f} to {after['log_prob']:.2f} nats per token"
            reasons.append(f"the log-probability of {text} fell {change}")
        matches = {"exact_match": 0.0, "overlap": OVERLAP} if self.trained else {}
        reasons += [self.fall(metric) for metric, min_change in matches.items() if self.rises(metric, min_change, -1)]
        if self.checks_cut and self.rises("cut", CUT):
            share = f"{after['cut']:.0%} of the answers to {self.name} do not end within {self.limit} tokens"
            reasons.append(f"{share}, {before['cut']:.0%} before")
        elif self.expected_length is not None:
            reference_lengths = [max(1.0, min(n, self.limit)) for n in (before["length"], self.expected_length)]
            shortest = min(reference_lengths)
            longest = max(reference_lengths)
            if after["length"] > LENGTH * longest or LENGTH * max(1.0, after["length"]) < shortest:
                lengths = f"{after['length']:.0f} tokens, {before['length']:.0f} before"
                reasons.append(f"the answers to {self.name} have {lengths}")
        return reasons


def verdict_of(comparisons: Sequence[AnswerComparison], hint: str = "") -> dict[str, object]:
    """Return the verdict over all prompts, a line that states it, and all metrics, ready for JSON."""
    reasons = [reason for comparison in comparisons for reason in comparison.reasons()]
    matches = [compared for compared in comparisons if compared.trained]
    falls = [m.fall("exact_match") for m in matches if np.nansum(m.after["exact_match"] - m.before["exact_match"]) < 0]
    verdict = FINE
    line = None
    if reasons:
        verdict = WORSE
        line = f"generation got worse: {'; '.join(reasons)}"
    elif falls:
        verdict = UNCLEAR
        line = f"answers may be worse: {falls[0]}, which may be chance"
    numbers = {
        compared.name: {"prompts": len(compared.after["broken"]), "max_new_tokens": compared.limit}
        | dict(zip(("before", "after"), compared.means(), strict=True))
        for compared in comparisons
    }
    return {"verdict": verdict, "line": line, "hint": hint if reasons else None, **numbers}


def is_checked(session: Session) -> bool:
    """Return True if the run compares answers: its task requires it, and the model is not sharded."""
    return session.task.checks_generation and session.config.train.sharding == "none"


def prompts_of(session: Session) -> list[Example]:
    """Return held-out prompts of the data, with training prompts added up to ``PROMPTS``."""
    rows = list[Example]()
    seed = (session.config.train.seed, _STREAM)
    for part in (session.data.held_out, session.data.train):
        rows += choose_rows(part[:POOL], PROMPTS - len(rows), seed, lambda row: row.prompt_length > 0)
    return rows


def answer_limit(session: Session, rows: Sequence[Example]) -> int:
    """Return the token limit of an answer to a prompt of the data."""
    max_label_count = max((row.label_count for row in rows), default=0)
    limit = max(MIN_ANSWER_TOKENS, 2 * max_label_count)
    if not max_label_count:
        limit = session.generation_limits.max_new_tokens or MAX_DATA_ANSWER_TOKENS
    room = (position_limit(session.model) or 1 << 31) - max((row.prompt_length for row in rows), default=0)
    return max(1, min(MAX_DATA_ANSWER_TOKENS, limit, room))


def max_new_tokens(session: Session) -> int:
    """Return an upper bound of the tokens that both models generate in the check."""
    rows = prompts_of(session) if is_checked(session) else []
    return 2 * len(rows) * answer_limit(session, rows) + (len(DRIFT_PROMPTS) * MAX_ANSWER_TOKENS if rows else 0)


@dataclass(frozen=True)
class ReferenceAnswers:
    """Prompts with the answers of the reference model, as it sees them.

    Attributes:
        rows: each with a reference text as its labels: the expected answer, or the base model's answer. Rows of rewards
            have no labels.
        log_probs: log-probabilities of the reference texts. checks_cut: see :class:`AnswerComparison`.
    """

    name: str
    limit: int
    rows: Sequence[Example]
    answers: Sequence[GeneratedCompletion]
    log_probs: Sequence[np.ndarray]
    checks_cut: bool = False


class GenerationProbe(Probe):
    """Answers prompts before and after the training of a session.

    The answers before training are those of the reference model: the adapter of ``start_from`` or the base model. If
    it can be restored after training, all prompts are answered at the end. Otherwise it answers first.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._keeps_base = session.method.can_restore_base(session.model) and not session.uses_start_reference
        self._references: Sequence[ReferenceAnswers] = ()

    def before(self) -> None:
        """Answer with the reference model if it cannot be restored after training."""
        if not self._keeps_base:
            self._references = self._reference_answers()

    def after(self, evaluation: Evaluation) -> Iterator[ProbeResult]:
        yield ProbeResult(fields={"generation": self.measure()})

    def measure(self) -> dict[str, object]:
        """Compare the answers of the trained model with those before training; empty if the run is not checked.

        Call it outside of ``session.running``.
        """
        session = self._session
        with track_progress("comparing answers before and after training"):
            if self._keeps_base:
                self._references = self._reference_answers()
            rows = [render_example(row, session.method) for reference in self._references for row in reference.rows]
            if not rows:
                return {}
            # One call, because a decoder is prepared and verified for each.
            limit = max(reference.limit for reference in self._references)
            answers = iter(session.complete([row.tokens[: row.prompt_length] for row in rows], limit))
            comparisons = [self._compared(reference, answers) for reference in self._references]
        rate = f"{session.learning_rate / 3:.1g}"
        return verdict_of(comparisons, f"lower train.learning_rate, for example to {rate}, or train fewer steps")

    def _compared(self, reference: ReferenceAnswers, answers: Iterator[GeneratedCompletion]) -> AnswerComparison:
        """Compare the answers of the reference model with the trained model's, which are taken from ``answers``."""
        session = self._session
        rows = reference.rows
        of_data = reference.name == DATA
        after = [_truncated(next(answers), reference.limit) for _ in rows]
        log_probs = self._log_probs([render_example(row, session.method) for row in rows])
        base_scores = []
        if self._keeps_base:
            with session.method.base_model_active(session.model):
                base_scores = self._log_probs(list(map(_with_answer, rows, after)))
        expected = [row.answer if of_data and row.desired is not False else None for row in rows]
        lengths = [row.label_count for row in rows if row.label_count and of_data]
        before = answer_metrics(reference.answers, expected, reference.log_probs)
        metrics = before, answer_metrics(after, expected, log_probs, base_scores)
        length = float(np.mean(lengths)) if lengths else None
        return AnswerComparison(reference.name, reference.limit, *metrics, length, reference.checks_cut)

    def _reference_answers(self) -> list[ReferenceAnswers]:
        """Answer the prompts of the data and the general prompts with the reference model."""
        session = self._session
        sets = {}
        if not is_checked(session):
            return []
        rows: list[Any] = prompts_of(session)
        if rows:
            sets[DATA] = list(session.feed.with_answers(rows))
        with contextlib.suppress(NoGeneralAnswers):
            check_size(session.model)
            sets[GENERAL] = session.general_answers(DRIFT_PROMPTS)[::2]
        with session.method.base_model_active(session.model) if self._keeps_base else contextlib.nullcontext():
            return [self._answered(name, rows) for name, rows in sets.items()]

    def _answered(self, name: str, rows: Sequence[Example]) -> ReferenceAnswers:
        session = self._session
        is_base = not session.uses_start_reference
        if name == GENERAL and is_base:  # their labels are the answers
            pairs = [(row.tokens[row.prompt_length :], row.answer or "") for row in rows]
            answers = [GeneratedCompletion(t, text, len(t) < MAX_ANSWER_TOKENS) for t, text in pairs]
            return ReferenceAnswers(name, MAX_ANSWER_TOKENS, rows, answers, self._log_probs(rows))
        limit = MAX_ANSWER_TOKENS if name == GENERAL else answer_limit(session, rows)
        rows = [_without_undesired(row.without_prefix(session.method.virtual_tokens)) for row in rows]
        seen = rows if is_base else [render_example(row, session.method) for row in rows]
        answers = session.complete([row.tokens[: row.prompt_length] for row in seen], limit, of_base=is_base)
        has_known_length = any(row.label_count for row in rows) or limit == session.generation_limits.max_new_tokens
        checks_cut = name == DATA and has_known_length
        return ReferenceAnswers(name, limit, rows, answers, self._log_probs(seen), checks_cut)

    def _log_probs(self, rows: Sequence[Example]) -> list[np.ndarray]:
        with self._session.running():
            return label_log_probs(self._session, rows)


@torch.no_grad()
def label_log_probs(session: Session, rows: Sequence[Example]) -> list[np.ndarray]:
    """Return the log-probabilities of each row's labels under the model as it is, in nats.

    Call it within ``session.running``.
    """
    labeled = [row for row in rows if row.label_count]
    by_row = dict[int, np.ndarray]()
    with session.method.evaluating(session.model):
        objective = CausalObjective(session.model)
        for batch in session.batcher.batches(labeled) if labeled else ():
            values = RowLogProbs.of(batch, objective.token_log_probs(batch))
            labels = values.values[values.index].float().cpu().numpy()
            owners = values.row.cpu().numpy()
            by_row |= {id(row): labels[owners == index] for index, row in enumerate(values.rows)}
    return [by_row.get(id(row), np.empty(0)) for row in rows]


def text_watch(session: Session) -> Callable[[], bool]:
    """Return a function that is True once general or chosen answers are much less likely than now.

    It costs a forward pass over at most ``2 * WATCHED`` answers per call. Call it within ``session.running``.
    """
    sets = [prompts_of(session)[:WATCHED] if is_checked(session) else []]
    with contextlib.suppress(NoGeneralAnswers):
        check_size(session.model)
        general = session.general_answers(DRIFT_PROMPTS)[:: len(DRIFT_PROMPTS) // WATCHED] if sets[0] else []
        sets.append([render_example(row, session.method) for row in general])

    def means() -> list[float]:
        return [float(np.concatenate([*label_log_probs(session, rows), [0.0]]).mean()) for rows in sets if rows]

    start = means()
    return lambda: any(before - now > WATCHED_FALL for before, now in zip(start, means(), strict=True))


def _truncated(answer: GeneratedCompletion, limit: int) -> GeneratedCompletion:
    """Return the first ``limit`` tokens of an answer."""
    if len(answer.tokens) <= limit:
        return answer
    return replace(answer, tokens=answer.tokens[:limit], stopped=False, terminator=None)


def _with_answer(row: Example, answer: GeneratedCompletion) -> Example:
    """Return the row's prompt with this answer as its labels."""
    end = [] if answer.terminator is None else [answer.terminator]
    tokens = np.concatenate([row.tokens[: row.prompt_length], answer.tokens, end]).astype(np.int32)
    return replace(row, tokens=tokens, is_label=np.arange(len(tokens)) >= row.prompt_length)


def _without_undesired(row: Example) -> Example:
    """Return the row without labels if its answer is undesired."""
    return replace(row, is_label=np.zeros_like(row.is_label)) if row.desired is False else row
