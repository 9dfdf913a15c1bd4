"""Cache of plans.

The key contains the settings, the files of model and rows, deltaw's source and library versions, the CPU with its
limits, relevant environment variables, and the measured rates that precision and arithmetic were chosen from. Files are
identified by name, size and times of change, small files by content. A plan is not cached if changes cannot be
detected, for example of rows on a hub.

The module does not import torch, so that a cached plan is available quickly.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.cache.results import file_state, load_result, result_digest, store_result
from deltaw.data.row_store import digest_of_rows
from deltaw.errors import UserError
from deltaw.hub import packages
from deltaw.hub.folders import resolve
from deltaw.kernels.processor import processor_flags, processor_name
from deltaw.kernels.variants import MEASURED
from deltaw.machine import container_limits
from deltaw.machine.choices import usable_processors
from deltaw.memory.plan import Plan
from deltaw.progress import Detail
from deltaw.settings.config import RunConfig
from deltaw.settings.data import eval_sets
from deltaw.settings.mixture import references
from deltaw.settings.model_parts import parse_parts
from deltaw.settings.start import start_sources
from deltaw.training.planning.run_time import Workload, plan_with_cached_time

KIND = "plans"
CACHE_DEPENDENCIES = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "deltaw")
# Settings that do not affect the memory of a training.
_IGNORED_SETTINGS: dict[str, Any] = dict.fromkeys(("output", "force", "memory"), True)
_IGNORED_SETTINGS["train"] = {"learning_rate", "loraplus_lr_ratio", "schedule", "warmup", "weight_decay", "betas"}
_VARIABLES = ("DELTAW_", "OMP_", "MKL_", "KMP_", "ONEDNN_", "DNNL_", "MALLOC_", "GLIBC_", "ATEN_")
# Variables that do not affect plans.
_IGNORED_VARIABLES = {"DELTAW_CACHE"}
# Maximum size of files that are identified by content.
_MAX_HASHED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class CachedPlan:
    """Cached plan of one run.

    Attributes:
        key: Everything that the plan depends on.
        stored: Cached values, possibly empty.
    """

    key: dict[str, object]
    stored: dict[str, Any]

    @classmethod
    def of(cls, config: RunConfig, files: list[object] | None = None, processes: int = 1) -> CachedPlan | None:
        """Look up the plan of a run. Returns None if changes of model or rows cannot be detected.

        Args:
            config: Settings of the run.
            files: Stamps of the run's files, if known.
            processes: Number of processes that share the rows of a step.
        """
        files = _run_file_stamps(config) if files is None else files
        if files is None:
            return None
        settings = config.model_dump(mode="json", exclude=_IGNORED_SETTINGS)
        searches_rate = config.train.learning_rate == "search"  # needs a copy of the trained parameters
        key = {"settings": [settings, searches_rate], "files": files, "machine": _machine_key(), "processes": processes}
        cached = load_result(KIND, key, CACHE_DEPENDENCIES)
        return cls(key, cached if isinstance(cached, dict) else {})

    @property
    def lines(self) -> list[str]:
        """Messages about the rows from when they were read."""
        return [Detail(line) for line in self.stored.get("lines", ())]

    @property
    def refusal(self) -> UserError | None:
        """Error of a method that does not fit the model, if cached."""
        fields = self.stored.get("refusal")
        return UserError(**fields) if isinstance(fields, dict) else None

    def plan(self, rows: Sequence[Any] | None = None) -> Plan | None:
        """Return the cached plan, or None if it is missing, has other ``rows``, or depends on other measured rates."""
        fields = self.stored.get("plan")
        if not isinstance(fields, dict) or (rows is not None and self.stored.get("rows") != digest_of_rows(rows)):
            return None
        try:
            if any(result_digest(kind, key) != digest for kind, key, digest in self.stored.get("measured", ())):
                return None
            plan = Plan.from_fields(fields)
            if plan.workload:
                Workload.from_dict(plan.workload)
            is_valid = plan.parts["weights"] >= 0 and plan.peak_resident_bytes > 0
        except (TypeError, ValueError, KeyError, AttributeError):
            return None  # the file is damaged
        return plan if is_valid else None

    def store(self, plan: Plan, rows: Sequence[Any], lines: Sequence[str], measured: Sequence[Any] = ()) -> None:
        """Store a plan with the messages about its rows.

        Args:
            plan: Plan to store.
            rows: Rows of the plan.
            lines: Messages about the rows.
            measured: Kind, key and digest of each cached measurement that the plan depends on.
        """
        values = {"plan": plan.to_fields(), "rows": digest_of_rows(rows), "lines": [*lines], "measured": [*measured]}
        store_result(KIND, self.key, values, CACHE_DEPENDENCIES)

    def store_refusal(self, error: UserError, rows: Sequence[Any]) -> None:
        """Store the error of a method that does not fit."""
        values = {"refusal": {"message": error.message, "location": error.location, "hint": error.hint}}
        store_result(KIND, self.key, {**values, "rows": digest_of_rows(rows)}, CACHE_DEPENDENCIES)


@dataclass(frozen=True)
class PlanCache:
    """Cached plans of several methods for the same model and rows.

    Attributes:
        plans: Plans by method.
        lines: Messages about the rows and about methods that do not fit.
    """

    plans: dict[str, Plan]
    lines: list[str]


def load_cached_plans(config: RunConfig, methods: Sequence[str], processes: int = 1) -> PlanCache | None:
    """Return the plans of all these methods, or None if one is not cached.

    Args:
        config: Settings of the run.
        methods: Names of methods.
        processes: Number of processes that share the rows of a step.

    Raises:
        UserError: if the run's method does not fit the model.
    """
    files = _run_file_stamps(config)
    if files is None:
        return None
    plans: dict[str, Plan] = {}
    lines: list[str] = []
    for method in methods:
        cached = CachedPlan.of(config.model_copy(update={"method": method}), files, processes)
        plan = None if cached is None else cached.plan()
        if plan is not None and method == config.method and processes == 1:
            plan = plan_with_cached_time(plan, config)
        if cached is not None and plan is not None and plan.device == "cpu":  # settings are chosen for a card
            lines = lines or cached.lines
            plans[method] = plan
        elif cached is not None and cached.refusal is not None:
            if method == config.method:
                raise cached.refusal
            lines.append(f"{method}: {cached.refusal.message}")
        else:
            return None
    return PlanCache(plans, lines) if plans else None


def _run_file_stamps(config: RunConfig) -> list[object] | None:
    """Return stamps of the files of model and rows, or None if some files are unknown."""
    trained_on = references(config.data.train)
    trained_on += [name for name in eval_sets(config.data.eval).values() if isinstance(name, str)]
    try:
        parts = parse_parts(config.model)
        models = (config.model,) if parts is None else (parts.language, parts.vision)
        sources = [resolve(model) for model in models]
    except UserError:
        return None  # loading the model reports the error
    if any(source.kind == "hub" for source in sources):
        return None
    stamps: list[object] = [_stamps(source.path) for source in sources]
    for start in () if config.start_from is None else start_sources(config.start_from):
        folder = Path(os.path.expanduser(start.reference))
        if not folder.is_dir():
            return None
        stamps += [_stamps(file) for file in sorted(folder.glob("adapter_*"))]
    for reference in trained_on:
        path = Path(os.path.expanduser(reference))
        if packages.is_package_reference(reference):
            stamps.append(reference)  # published versions do not change
        elif path.exists():
            stamps.append(_stamps(path))
        else:
            return None
    return stamps


def _stamps(path: Path) -> list[object]:
    """Return the state of a file or of all files in a folder. A small file is identified by content."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return [str(path.resolve()), *map(file_state, files)]
    if path.stat().st_size > _MAX_HASHED_BYTES:
        return [file_state(path)]
    return [str(path.resolve()), hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()]


def _machine_key() -> list[object]:
    """Return the CPU, its available part, the devices, and environment variables that affect libraries."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_VARIABLES)
        and name not in _IGNORED_VARIABLES
        # Measured rates that a parent process passes on are equal to those that this process would cache.
        and (name != MEASURED or '"*"' in value)
    }
    gpu_devices = sorted(str(card) for card in Path("/dev").glob("nvidia[0-9]*"))
    visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    available = [sorted(usable_processors()), container_limits.processor_quota()]
    return [processor_name(), sorted(processor_flags()), available, gpu_devices, visible_devices, variables]
