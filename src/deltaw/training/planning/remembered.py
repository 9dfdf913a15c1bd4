"""A plan that was made before, found again by all that it depends on.

These are: the settings, the files of model and rows, deltaw's own source and the versions of the libraries
under it, the processor with its limits, the environment variables that steer them, and the measured rates
that precision and arithmetic were chosen by. Files count by name, size and times of change; a small file of
rows by its content. Where it cannot be told whether something changed, as with rows from a hub, nothing is
remembered.

No torch is imported here: a plan that is remembered is shown before torch could be.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.cache import file_state, recall, remember, stamp
from deltaw.data.mixture import references
from deltaw.data.row_store import digest_of_rows
from deltaw.data.settings import eval_sets
from deltaw.errors import UserError
from deltaw.hub import packages
from deltaw.hub.folders import resolve
from deltaw.kernels.variants import MEASURED
from deltaw.machine import choices
from deltaw.machine.processor import processor_flags, processor_name, usable_processors
from deltaw.memory.plan import Plan
from deltaw.settings import RunConfig
from deltaw.working import Detail

KIND = "plans"
MADE_BY = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "deltaw")
# Settings that change nothing about the memory of a training.
_WITHOUT: dict[str, Any] = dict.fromkeys(("output", "force", "memory"), True)
_WITHOUT["train"] = {"learning_rate", "b_rate", "schedule", "warmup", "weight_decay", "betas"}
_VARIABLES = ("DELTAW_", "OMP_", "MKL_", "KMP_", "ONEDNN_", "DNNL_", "MALLOC_", "GLIBC_", "ATEN_")
# The cache may lie elsewhere without a change to any plan.
_NO_MATTER = {"DELTAW_CACHE"}
# Files of this many bytes at most count by their content.
_SMALL = 64 * 2**20


@dataclass(frozen=True)
class Remembered:
    """What is remembered of the plan of one run.

    Attributes:
        key: all that the plan depends on.
        found: what was kept under it; empty where nothing was.
    """

    key: dict[str, object]
    found: dict[str, Any]

    @classmethod
    def of(cls, config: RunConfig, files: list[object] | None = None, processes: int = 1) -> Remembered | None:
        """None where it cannot be told whether a model or rows changed.

        Args:
            files: stamps of the run's files, where they are known already.
            processes: that share the rows of a step.
        """
        files = _files_of(config) if files is None else files
        if files is None:
            return None
        settings = config.model_dump(mode="json", exclude=_WITHOUT)
        searches = config.train.learning_rate == "search"  # beside a copy of what is trained
        key = {"settings": [settings, searches], "files": files, "machine": _machine(), "processes": processes}
        kept = recall(KIND, key, MADE_BY)
        return cls(key, kept if isinstance(kept, dict) else {})

    @property
    def lines(self) -> list[str]:
        """The account of the rows, as it was told when they were read."""
        return [Detail(line) for line in self.found.get("lines", ())]

    @property
    def refusal(self) -> UserError | None:
        """Why the method does not fit the model; None where it does, or where nobody tried."""
        told = self.found.get("refusal")
        return UserError(**told) if isinstance(told, dict) else None

    def plan(self, rows: Sequence[Any] | None = None) -> Plan | None:
        """The plan; None where there is none, or where it was made of other ``rows`` than these, or with what
        was chosen by other rates."""
        kept = self.found.get("plan")
        if not isinstance(kept, dict) or (rows is not None and self.found.get("rows") != digest_of_rows(rows)):
            return None
        if any(stamp(kind, key) != known for kind, key, known in self.found.get("measured", ())):
            return None
        try:
            return Plan.from_kept(kept)
        except TypeError:
            return None

    def keep(self, plan: Plan, rows: Sequence[Any], lines: Sequence[str], measured: Sequence[Any] = ()) -> None:
        """Remember a plan, with the account of the rows that it was made of.

        Args:
            measured: kind, key and state of each remembered result that the plan rests on.
        """
        told = {"plan": plan.kept(), "rows": digest_of_rows(rows), "lines": list(lines), "measured": list(measured)}
        remember(KIND, self.key, told, MADE_BY)

    def keep_refusal(self, error: UserError, rows: Sequence[Any]) -> None:
        """Remember that the method does not fit."""
        told = {"refusal": {"what": error.what, "where": error.where, "hint": error.hint}}
        remember(KIND, self.key, {**told, "rows": digest_of_rows(rows)}, MADE_BY)


@dataclass(frozen=True)
class Recalled:
    """Plans of several methods on one run's model and rows.

    Attributes:
        plans: by method. lines: the account of the rows, and why methods do not fit.
    """

    plans: dict[str, Plan]
    lines: list[str]


def recalled(config: RunConfig, methods: Sequence[str], processes: int = 1) -> Recalled | None:
    """The plans of all these methods; None where one of them was not made before.

    Args:
        processes: that share the rows of a step.

    Raises:
        UserError: the run's own method does not fit the model.
    """
    files = _files_of(config)
    if files is None:
        return None
    plans: dict[str, Plan] = {}
    lines: list[str] = []
    for method in methods:
        kept = Remembered.of(config.model_copy(update={"method": method}), files, processes)
        plan = None if kept is None else kept.plan()
        if kept is not None and plan is not None:
            lines = lines or kept.lines
            plans[method] = plan
        elif kept is not None and kept.refusal is not None:
            if method == config.method:
                raise kept.refusal
            lines.append(f"{method}: {kept.refusal.what}")
        else:
            return None
    return Recalled(plans, lines) if plans else None


def _files_of(config: RunConfig) -> list[object] | None:
    """Stamps of the files of model and rows; None where some of them are not known."""
    trained_on = references(config.data.train)
    trained_on += [name for name in eval_sets(config.data.eval).values() if isinstance(name, str)]
    try:
        source = resolve(config.model)
    except UserError:
        return None  # whoever loads the model says what is wrong with it
    if source.kind == "hub":
        return None
    stamps: list[object] = [_stamps(source.path)]
    for reference in trained_on:
        path = Path(os.path.expanduser(reference))
        if packages.is_package_reference(reference):
            stamps.append(reference)  # a version, once published, does not change
        elif path.exists():
            stamps.append(_stamps(path))
        else:
            return None
    return stamps


def _stamps(path: Path) -> list[object]:
    """The state of a file, or of all files in a folder; of a small file its content."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [str(path.resolve()), *map(file_state, files)]
    if path.stat().st_size > _SMALL:
        return [file_state(path)]
    return [str(path.resolve()), hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()]


def _machine() -> list[object]:
    """The processor, how much of it this process may use, devices, and variables that steer libraries."""
    told = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_VARIABLES)
        and name not in _NO_MATTER
        # Rates of certain sizes, which a process hands to another, are what that one would remember too.
        and (name != MEASURED or '"*"' in value)
    }
    cards = sorted(str(card) for card in Path("/dev").glob("nvidia[0-9]*"))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    used = [sorted(usable_processors()), choices.processor_quota()]
    return [processor_name(), sorted(processor_flags()), used, cards, hidden, told]
