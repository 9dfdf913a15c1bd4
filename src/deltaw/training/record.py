"""What a run writes about itself so that it can go on: its status and its checkpoints.

Knows a session, a folder and how the run began; not the training's steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deltaw.errors import UserError
from deltaw.training.callbacks import Say
from deltaw.training.checkpoints import Checkpoints, Stateful, training_of
from deltaw.training.diagnosis import Diagnosis
from deltaw.training.features.record import FeatureRecord
from deltaw.training.not_finite import NotFinite, NotFiniteError
from deltaw.training.parallel.group import LostProcess
from deltaw.training.resuming import dumped
from deltaw.training.run_folder import RunFolder
from deltaw.training.run_state import FOLDER, Status
from deltaw.training.session import Session
from deltaw.training.start import Start
from deltaw.training.state import Outcome, SavedState, TrainState


class RunRecord:
    """Keeps a run's status and checkpoints current. Made once the run's folder is there.

    Args:
        rows: of :func:`deltaw.training.resuming.rows_facts`.
        choices: of :func:`deltaw.training.resuming.choices_of`.
        say: told what a person may want to know.

    Attributes:
        checkpoints: of the run.
        extras: by name, what changes over the run and is kept with every checkpoint; to be filled before
            :meth:`restore`.
    """

    def __init__(
        self,
        start: Start,
        session: Session,
        folder: RunFolder,
        *,
        rows: Mapping[str, object],
        choices: Mapping[str, object],
        say: Say,
    ) -> None:
        settings = session.config.train
        self._start, self._session, self._folder, self._say = start, session, folder, say
        self._state: TrainState | None = None
        self._settings = dumped(start.asked)
        prefix = session.prefix
        kept = session.chosen.get("train.keep_features")
        features = FeatureRecord(
            None if prefix is None else prefix.store, "off" if kept is None else str(kept.value), say
        )
        self.extras: dict[str, Stateful] = {"features": features}
        self._features: Mapping[str, Any] = features.state()
        if start.goes_on and start.status is not None:
            self._features = start.status.features
            if start.found is None:
                features.restore(self._features)
        self.checkpoints = Checkpoints(
            folder.path / FOLDER,
            every=settings.checkpoint_every,
            minutes=settings.checkpoint_minutes,
            keep=settings.keep_checkpoints,
            about={
                "settings": self._settings,
                "choices": dict(choices),
                "rows": dict(rows),
                "model": session.identity,
            },
            extras=self.extras,
            sync=folder.sync_metrics,
        )
        self._write("running")

    def add(self, name: str, extra: Stateful, *, durable: Callable[[], None]) -> None:
        """Keep what changes over the run with every checkpoint; before :meth:`restore`.

        Args:
            durable: called between two steps once a checkpoint is on the disk.
        """
        self.extras[name] = extra
        self.checkpoints.durable = durable

    def chose(self, choices: Mapping[str, object]) -> None:
        """The run chose more than it had when this was made."""
        self.checkpoints.about["choices"] = dict(choices)

    @property
    def saved(self) -> SavedState | None:
        """What the training goes on from; None where it begins with its first step."""
        found = self._start.found
        if found is None:
            return None
        saved = training_of(found)
        return saved.lasting(self._session.total_steps) if self._start.longer else saved

    def restore(self) -> None:
        """Clear what killed processes left, and give the extras back their state."""
        self.checkpoints.clear(after=self._start.step or 0)
        found = self._start.found
        if found is None:
            return
        finished = self._start.finished_there
        if finished is not None:  # with what the evaluation after the last step added
            found = replace(found, values=found.values | {k: finished[k] for k in ("best", "extras")})
        self.checkpoints.went_on_from(found)

    def begin(self, state: TrainState) -> None:
        """The first step is about to begin."""
        self._state = state
        self.checkpoints.begin(state)
        if self._start.longer and self._start.found is not None:
            self._say(
                f"{state.total_steps} steps now; the learning rate goes on with {state.learning_rate:.3g}, "
                "that of a run of this length"
            )

    def diagnose(self, found: NotFinite) -> Sequence[str]:
        """What is wrong with a step, once all that was trained before it is safe."""
        lines = []
        try:
            self.checkpoints.write()
        except UserError as error:
            lines.append(error.what)
        return [*lines, *Diagnosis(self._session, self._folder.path)(found)]

    def where(self) -> str:
        """The place in the training, for a person."""
        state = self._state
        return "before the first step" if state is None else f"step {state.step + 1} of {state.total_steps}"

    def done(self, outcome: Outcome) -> None:
        """The training and all that follows it is over.

        Raises:
            UserError, OSError: that cannot be written down.
        """
        self._write("interrupted" if outcome.interrupted else "finished")

    def failed(self, error: BaseException) -> None:
        """The run ended with an error, which is raised afterwards."""
        if isinstance(error, LostProcess):
            self._save_whole_steps()
        states = {NotFiniteError: "diverged", KeyboardInterrupt: "interrupted"}
        try:
            self.checkpoints.close()
        except UserError as another:
            self._say(another.what)
        try:
            self._write(states.get(type(error), "failed"))
        except (UserError, OSError) as another:
            self._say(f"the run's status could not be written: {another}")

    def _save_whole_steps(self) -> None:
        """Another process is lost: what was trained before the step that it broke is the run's."""
        try:
            self.checkpoints.write()
            self.checkpoints.check(until_durable=True)
        except (UserError, OSError) as another:
            self._say(f"no checkpoint could be written: {another}")
            return
        last = self.checkpoints.last
        if last is not None:
            self._say(f"all steps before are in {last}: the same command goes on from there")

    def _write(self, state: str) -> None:
        steps = self._steps
        before = self._start.status
        finished: Mapping[str, Any] | None = None if before is None else before.finished
        if state == "finished":
            finished = {"steps": steps, "lines": self._folder.sync_metrics(), **self.checkpoints.beside()}
        Status(state, steps, self._session.total_steps, self._settings, self._features, finished).write(
            self._folder.path
        )

    @property
    def _steps(self) -> int:
        return (self._start.step or 0) if self._state is None else self._state.step
