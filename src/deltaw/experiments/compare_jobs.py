"""A comparison as jobs for several machines: the base model, learning rates, and final trainings.

Methods are tuned side by side, each rate after the one that it follows from; a method's final trainings begin
once its rate is known. What is asked, and what becomes of the answers, is as on one machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from deltaw.errors import UserError
from deltaw.experiments.child import Child, WorkerEnded
from deltaw.experiments.comparison import BASE
from deltaw.experiments.entry import Entry
from deltaw.experiments.jobs import Job
from deltaw.experiments.stored import Stored

Found = Mapping[str, object] | UserError | WorkerEnded


class ComparisonJobs:
    """What is left to do of a comparison.

    Args:
        base: the untrained model; None where it is not scored.
        written: called after each final training.
    """

    def __init__(
        self, entries: Sequence[Entry], base: Entry | None, stored: Stored, written: Callable[[], None]
    ) -> None:
        self._entries, self._stored, self._written = entries, stored, written
        self._base = None if base is None or "score" in base.piece else base
        self._ends: dict[str, Callable[[Found], None]] = {}

    def know_rates(self, child: Child) -> None:
        """Ask for the usual rates of the methods that are tuned, which follow from the model's shape."""
        for entry in self._entries:
            if entry.planned is not None:
                continue
            try:
                found = child.ask("usual", config=entry.config.model_dump(mode="json"))
                entry.piece["usual_rate"] = found["usual_rate"]
            except (UserError, WorkerEnded) as error:
                self._stored.no_rate(entry, error)

    def next(self) -> Job | None:
        if self._base is not None:
            base, self._base = self._base, None
            self._ends[BASE] = partial(self._stored.base, base)
            return self._job(BASE, "base", BASE, config=base.config.model_dump(mode="json"))
        for entry in self._entries:
            rate = None if entry.error is not None else entry.next_rate()
            if rate is not None and entry.method not in self._ends:
                self._ends[entry.method] = partial(self._tried, entry, rate)
                config = entry.config.model_dump(mode="json")
                request = {"config": config, "rate": rate, "share": self._stored.share}
                return self._job(entry.method, "rate", f"tuning-{entry.method}", **request)
        for seed in self._stored.seeds:
            for entry in self._entries:
                job = self._run(entry, seed)
                if job is not None:
                    return job
        return None

    def report(self, key: str, report: Mapping[str, object]) -> bool:
        """These jobs report nothing on the way."""
        return True

    def ended(self, key: str, found: Found) -> None:
        self._ends.pop(key)(found)

    def _run(self, entry: Entry, seed: int) -> Job | None:
        """The final training with a seed, where it is left to do and can begin."""
        key, rate = f"{entry.method}-seed-{seed}", entry.chosen()
        if entry.error is not None or rate is None or key in self._ends:
            return None
        if entry.next_rate() is not None or entry.run(seed) is not None:
            return None
        config = self._stored.run_begins(entry, seed, rate).model_dump(mode="json")
        self._ends[key] = partial(self._trained, entry, seed, rate)
        # The plan is the same for every seed.
        return self._job(key, "run", key, config=config, plan=seed == self._stored.seeds[0])

    def _tried(self, entry: Entry, rate: float, found: Found) -> None:
        if isinstance(found, UserError | WorkerEnded):
            self._stored.no_rate(entry, found)
            return
        try:
            self._stored.rate(entry, rate, found["loss"])
        except UserError as error:
            self._stored.no_rate(entry, error)

    def _trained(self, entry: Entry, seed: int, rate: float, found: Found) -> None:
        self._stored.run(entry, seed, rate, found)
        self._written()

    def _job(self, key: str, do: str, log: str, **request: object) -> Job:
        return Job(key, do, self._stored.place.log(log), request)
