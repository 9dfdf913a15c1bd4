"""What becomes of the answers in a comparison: each is stored in its method's entry and told in a line.

Whoever asked the worker, here or on another machine, brings its answers here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaw.config import RunConfig
from deltaw.errors import UserError
from deltaw.experiments.child import WorkerEnded
from deltaw.experiments.comparison import BASE
from deltaw.experiments.entry import Entry
from deltaw.experiments.folder import ExperimentFolder
from deltaw.experiments.pace import Pace
from deltaw.training.run_folder import remember_settings

# Cost of evaluating the untrained model, in trainings; used for the remaining time only.
BASE_WORK = 0.2


@dataclass(frozen=True)
class Stored:
    """Where a comparison's results go.

    Attributes:
        share: of the budget, for which a rate is tried. seeds: that each method is trained with.
    """

    place: ExperimentFolder
    pace: Pace
    share: float
    seeds: Sequence[int]

    def base(self, base: Entry, found: Mapping[str, object] | UserError | WorkerEnded) -> None:
        """The scores of the untrained model, or why there are none."""
        if isinstance(found, UserError | WorkerEnded):
            self.pace.did(f"{BASE}: {found}", BASE_WORK)
            return
        base.piece |= found
        self.place.write_piece(BASE, base.piece)
        self.pace.did(f"{BASE}: {_score_text(base.piece)}", BASE_WORK)

    def rate(self, entry: Entry, rate: float, loss: object) -> None:
        """The validation loss at a learning rate; None where training diverged.

        Raises:
            UserError: it did so at every rate.
        """
        if rate not in (entry.planned or ()):
            self.pace.more(self.share)
        tried = entry.losses | {rate: math.inf if loss is None else float(str(loss))}
        entry.piece["rates"] = [[r, x if math.isfinite(x) else None] for r, x in sorted(tried.items())]
        self.place.write_piece(entry.method, entry.piece)
        said = "diverged" if loss is None else f"validation loss {float(str(loss)):.4f}"
        self.pace.did(f"{entry.method}: learning rate {rate:g}: {said}", self.share)
        if entry.next_rate() is None and entry.chosen() is None:
            raise UserError(
                f"training diverged at every learning rate tried, down to {min(entry.losses):g}",
                hint=f"try lower ones: --rates {entry.method}={min(entry.losses) / 10:.1g}",
            )

    def no_rate(self, entry: Entry, error: UserError | WorkerEnded) -> None:
        """No learning rate was found for a method."""
        untried = 0 if entry.fixed else max(0, 3 - len(entry.losses))
        self._failed(entry, error, len(self.seeds) + untried * self.share)

    def run_begins(self, entry: Entry, seed: int, rate: float) -> RunConfig:
        """The settings of a final training; what an interrupted one left is removed."""
        folder = Path(entry.config.output) / f"seed-{seed}"
        train = entry.config.train.model_copy(update={"learning_rate": rate, "seed": seed})
        if str(seed) not in (entry.piece.get("runs") or {}):
            self.place.remove(folder)
        entry.store(seed, None)
        self.place.write_piece(entry.method, entry.piece)
        return entry.config.model_copy(update={"train": train, "output": str(folder)})

    def run(
        self, entry: Entry, seed: int, rate: float, found: Mapping[str, object] | UserError | WorkerEnded
    ) -> None:
        """A final training's result, or why there is none."""
        if isinstance(found, UserError | WorkerEnded):
            left = [other for other in self.seeds if other >= seed]
            which = "" if len(self.seeds) == 1 else f"seed {seed}: "
            self._failed(entry, found, float(len(left)), which)
            return
        entry.store(seed, {"learning_rate": rate, **found})
        remember_settings(entry.config)  # the run may have been made on another machine
        self.place.write_piece(entry.method, entry.piece)
        which = "" if len(self.seeds) == 1 else f", seed {seed}"
        self.pace.did(f"{entry.method}: trained at {rate:g}{which}: {_run_text(found)}", 1.0)

    def _failed(self, entry: Entry, error: UserError | WorkerEnded, work: float, which: str = "") -> None:
        """Store why a method has no result; the other methods continue.

        Args:
            work: that need not be done now.
            which: what it failed with.
        """
        where, hint = (error.where, error.hint) if isinstance(error, UserError) else (None, None)
        what = error.what if isinstance(error, UserError) else str(error)
        entry.error = UserError(f"{which}{what}", where=where, hint=hint)
        self.pace.more(-work)
        self.pace.did(f"{entry.method}: not possible: {entry.error.what}", 0.0)


def _run_text(found: Mapping[str, object]) -> str:
    """A final training in a few words."""
    flat = f"{'flattened' if found['flattened'] else 'not flattened'} in {found['steps']} steps"
    if found.get("one_answer") is not None:
        return f"one answer to every row ('{found['one_answer']}'), {flat}"
    return f"{_score_text(found)}, {flat}"


def _score_text(found: Mapping[str, object]) -> str:
    score = found.get("score")
    return f"{score['metric']} {score['value']:.4f}" if isinstance(score, dict) else "no score"
