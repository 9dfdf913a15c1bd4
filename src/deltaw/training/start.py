"""How a run begins: in a folder of its own, or where the run in its folder stopped.

Knows folders, settings and checkpoints; not models or rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.config import RunConfig
from deltaw.errors import UserError
from deltaw.methods.base import ADAPTER_CONFIG
from deltaw.training.callbacks import Say
from deltaw.training.checkpoint_files import Checkpoint
from deltaw.training.checkpoints import listed, newest
from deltaw.training.origin import settings_in
from deltaw.training.resuming import (
    LENGTH,
    ROUNDING,
    Change,
    changes,
    dumped,
    flat,
    refusal,
    refused,
    with_choices,
)
from deltaw.training.run_folder import SETTINGS
from deltaw.training.run_state import FOLDER, RunLock, Status, read_status


@dataclass
class Start:
    """How a run begins.

    Attributes:
        asked: the settings as the user gave them.
        config: those to run with: what the run chose itself when it began is given.
        goes_on: whether the run in the folder goes on, in the same folder.
        found: the checkpoint that it goes on from; None where it begins with its first step.
        status: of the run that goes on.
        longer: whether its length was changed.
        lock: of the folder, where that existed.
    """

    asked: RunConfig
    config: RunConfig
    goes_on: bool = False
    found: Checkpoint | None = None
    status: Status | None = None
    longer: bool = False
    lock: RunLock | None = None
    choices: Mapping[str, object] = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """The step that it goes on from; None where it begins with the first."""
        return None if self.found is None else self.found.step

    @property
    def finished(self) -> bool:
        """Whether the run that goes on was done."""
        return self.status is not None and self.status.state == "finished"

    @property
    def lines_kept(self) -> int:
        """Lines of the metrics that stay."""
        if self.found is None:
            return 0
        finished = self.finished_there
        return int((finished or {"lines": self.found.values["metrics_lines"]})["lines"])

    @property
    def finished_there(self) -> Mapping[str, Any] | None:
        """What was noted when the run was done at the step that it goes on from; None where it was not."""
        noted = None if self.status is None else self.status.finished
        return noted if noted is not None and noted["steps"] == self.step else None

    def as_written(self, config: RunConfig) -> RunConfig:
        """The user's settings, with the activation checkpointing that ``memory`` led to."""
        checkpointing = config.train.checkpointing
        train = self.asked.train.model_copy(update={"checkpointing": checkpointing})
        return self.asked.model_copy(update={"train": train})

    def as_begun(self) -> dict[str, tuple[object, str]]:
        """What was chosen when the run began, for the settings that leave it open."""
        open_keys = {
            key for key, value in flat(dumped(self.asked)).items() if value in ("auto", "search", None)
        }
        return {k: (v, "as the run began") for k, v in self.choices.items() if k in open_keys}

    def check_length(self, total_steps: int) -> None:
        """Refuse to go on where no step is left.

        Raises:
            UserError: none is, or the checkpoint is beyond the end.
        """
        if self.found is None or self.found.step < total_steps:
            return
        if self.found.step == total_steps and not self.finished:
            return  # it was stopped in its last evaluation
        raise UserError(
            f"the run has done {self.found.step} steps, and the settings ask for {total_steps}",
            where=str(self.found.path.parent.parent),
            hint="ask for more with --train.epochs or --train.max_steps",
        )


def settings_to_resume(run: Path, given: Mapping[str, Any]) -> RunConfig:
    """The settings that a run was told, with those that are ``given`` above them.

    Raises:
        UserError: there is no such run, or its settings name what the caller has to allow.
    """
    if not (run / SETTINGS).is_file():
        raise UserError(
            "there is no run to go on with",
            where=str(run),
            hint="give the folder of a run, the 'output' of its settings",
        )
    return settings_in(run, given, all_of_it=True)


def begin(output: Path, config: RunConfig, *, asked: bool, fresh: bool, say: Say) -> Start:
    """Decide how a run into ``output`` begins; nothing is changed there but the lock.

    Args:
        config: the user's settings. asked: whether the user said that the run there goes on.
        fresh: whether the user said that it does not.

    Raises:
        UserError: the folder is in use, or the run in it cannot go on with these settings.
    """
    if not (output / FOLDER).is_dir():
        if asked:
            raise _nothing(output)
        return Start(config, config)
    lock = RunLock(output)
    try:
        start = Start(config, config) if fresh else _decided(output, config, asked, say)
    except BaseException:
        lock.release()
        raise
    start.lock = lock
    return start


def _decided(output: Path, config: RunConfig, asked: bool, say: Say) -> Start:
    status = read_status(output)
    if status is None or (status.state == "finished" and not asked):
        if asked:
            raise _nothing(output)
        return Start(config, config)
    found, damaged = newest(output / FOLDER)
    for path, why in damaged:
        say(f"{path.name} is damaged and passed over: {why}")
    if found is None:
        return _from_the_first_step(output, config, status, asked, say)
    choices = found.values["choices"]
    before = found.values["settings"]
    differing = changes(before, config, choices)
    other = refusal(differing, asked=asked)
    done = f"step {found.step} of {status.total_steps}"
    if other and status.state == "diverged" and not asked:
        return Start(config, config)  # nobody wants to go on with what diverged
    if other:
        raise refused(output, done, other, asked=asked)
    longer = any(change.key in LENGTH for change in differing)
    if longer:  # how many steps a time budget gave holds no more
        choices = {key: value for key, value in choices.items() if key not in LENGTH}
    pinned, said = with_choices(config, before, choices)
    say(f"the run in {output} goes on from {done} ({found.path.name})")
    for line in [*said, *_rounded(differing)]:
        say(line)
    return Start(config, pinned, goes_on=True, found=found, status=status, longer=longer, choices=choices)


def _from_the_first_step(output: Path, config: RunConfig, status: Status, asked: bool, say: Say) -> Start:
    """A run that left no whole checkpoint: it begins anew, in the same folder where nothing would be lost."""
    if status.state == "finished":
        raise _nothing(output)
    other = refusal(changes(status.settings, config), asked=asked)
    if asked and other:
        raise refused(output, "no step", other, asked=asked)
    if other or (output / ADAPTER_CONFIG).exists():
        return Start(config, config)
    there = "no whole checkpoint" if listed(output / FOLDER) else "no checkpoint yet"
    say(f"the run in {output} was stopped and has {there}: it begins again with its first step")
    return Start(config, config, goes_on=True, status=status)


def _rounded(differing: list[Change]) -> list[str]:
    """What to say of changes that round the steps to come in another way."""
    return [
        f"{change}: the steps to come are rounded otherwise than they would have been"
        for change in differing
        if change.key in ROUNDING
    ]


def _nothing(output: Path) -> UserError:
    return UserError(
        "there is no checkpoint to go on from",
        where=str(output),
        hint="train without --resume; runs write checkpoints unless train.checkpoint_every and "
        "train.checkpoint_minutes are both null",
    )
