"""What a search for settings came to: its best trials, what matters, and what to do next.

It knows numbers alone, and nothing of how trials are made or chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import yaml

from deltaw.experiments.comparison import duration

# Trials whose loss is within this part of the best are about as good.
ALIKE = 0.01


@dataclass(frozen=True)
class TrialResult:
    """One trial.

    Attributes:
        number: from 0. values: by dotted key.
        loss: on the validation rows; None where there is none.
        end: ``done``, ``ended early``, ``diverged`` or ``failed``. note: why it failed.
        seconds: that it took.
    """

    number: int
    values: Mapping[str, object]
    loss: float | None
    end: str
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Tuning:
    """A whole search.

    Attributes:
        folder: where it is written. method: that was tuned.
        space: what was searched, by dotted key, as text.
        trials: in the order they were made.
        first: the number of the trial with the settings as they were, if there is one.
        weights: by key, the part of the differences that it accounts for; None where it cannot be told.
        edges: by key, ``low`` or ``high`` where the best lies at that end of what was searched.
        best_settings: the best trial's values as nested settings.
        training_rows, validation_rows, steps: of a trial.
    """

    folder: str
    method: str
    space: Mapping[str, str]
    trials: Sequence[TrialResult]
    first: int | None
    weights: Mapping[str, float | None]
    edges: Mapping[str, str]
    best_settings: Mapping[str, object] = field(default_factory=dict)
    training_rows: int = 0
    validation_rows: int = 0
    steps: int = 0

    @property
    def ranked(self) -> list[TrialResult]:
        """The trials that came to their end, the best first."""
        done = [trial for trial in self.trials if trial.end == "done"]
        return sorted(done, key=lambda trial: (trial.loss or 0.0, trial.number))

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        best = self.ranked[0].number if self.ranked else None
        return {**asdict(self), "best": best, "lessons": lessons(self)}


def best_yaml(tuning: Tuning) -> str:
    """The best settings, to be laid into a file of settings."""
    return yaml.safe_dump(dict(tuning.best_settings), sort_keys=False).rstrip()


def lessons(tuning: Tuning) -> list[str]:
    """What the search says, in sentences."""
    ranked = tuning.ranked
    if not ranked:
        return []
    best = ranked[0]
    assert best.loss is not None
    said = ", ".join(f"{key} {_value(value)}" for key, value in best.values.items())
    lines = [f"Trial {best.number} is best: loss {best.loss:.4f} with {said}."]
    before = next((t for t in ranked if t.number == tuning.first and t.loss is not None), None)
    if before is best:
        lines.append("These are the settings as they were: nothing that was tried is better.")
    elif before is not None and before.loss:
        less = 1 - best.loss / before.loss
        lines.append(f"The settings as they were gave {before.loss:.4f}: the best has {less:.1%} less.")
    alike = [t for t in ranked[1:] if t.loss is not None and t.loss <= best.loss * (1 + ALIKE)]
    if alike:
        lines.append(
            f"{len(alike)} of the other {len(ranked) - 1} finished trials come within {ALIKE:.0%} of it; "
            "do not read much into their order."
        )
    lines += _of_weights(tuning)
    for key, end in tuning.edges.items():
        lines.append(
            f"The best {key}, {_value(best.values[key])}, lies at the {end} end of what was searched "
            f"({tuning.space[key]}): widen it with --search."
        )
    return lines + _ends(tuning) + [_rows(tuning)]


def _of_weights(tuning: Tuning) -> list[str]:
    known = {key: weight for key, weight in tuning.weights.items() if weight is not None}
    if not known:
        return ["There are too few finished trials to say which setting matters."]
    ordered = sorted(known, key=lambda key: -known[key])
    said = ", ".join(f"{key} {known[key]:.0%}" for key in ordered)
    return [f"Of the differences between trials, each setting accounts alone for: {said}."]


def _ends(tuning: Tuning) -> list[str]:
    counts = {end: sum(t.end == end for t in tuning.trials) for end in ("ended early", "diverged", "failed")}
    said = [f"{count} {end}" for end, count in counts.items() if count]
    lines = [f"Of {len(tuning.trials)} trials, {', '.join(said)}."] if said else []
    notes = dict.fromkeys(t.note for t in tuning.trials if t.end == "failed" and t.note)
    return lines + [f"Failed: {note}" for note in list(notes)[:3]]


def _rows(tuning: Tuning) -> str:
    return (
        f"The loss is that of {tuning.validation_rows} rows taken out of the training rows; the held-out "
        "rows took no part, and score the best settings when they are trained."
    )


def tuning_markdown(tuning: Tuning) -> str:
    """The search as a page."""
    titles = ["trial", "loss", *tuning.space, "time", "end"]
    lines = [
        f"# Settings searched: {tuning.method}",
        "",
        *[f"- {line}" for line in lessons(tuning)],
        "",
        "```yaml",
        best_yaml(tuning),
        "```",
        "",
        f"| {' | '.join(titles)} |",
        "|" + " ---: |" * len(titles),
    ]
    others = [trial for trial in tuning.trials if trial.end != "done"]
    for trial in [*tuning.ranked, *others]:
        lines.append(f"| {' | '.join([*trial_cells(tuning, trial), trial.end])} |")
    return "\n".join([*lines, ""])


def trial_cells(tuning: Tuning, trial: TrialResult) -> list[str]:
    """A trial's texts: number, loss, a value for each setting, time."""
    mark = " (as it was)" if trial.number == tuning.first else ""
    return [
        f"{trial.number}{mark}",
        "" if trial.loss is None else f"{trial.loss:.4f}",
        *[_value(trial.values.get(key, "")) for key in tuning.space],
        duration(trial.seconds),
    ]


def _value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
