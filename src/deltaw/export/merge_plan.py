"""Plan of a merge: the base model, the adapters in plain form, and the change of each parameter."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deltaw.export.adapters import AdapterChanges, ParameterChange, load_changes
from deltaw.export.base import AdapterBase, resolve_base, wrong_base_error
from deltaw.export.combine import Combination, Recipe, combine
from deltaw.hub.folders import adapter_folder
from deltaw.lora import load_adapter, save_adapter
from deltaw.lora.config import CHANGING_INITS
from deltaw.methods.files import read_config as read_adapter_config
from deltaw.progress import LogFunction, track_progress


@contextlib.contextmanager
def plain_adapter(folder: Path, base: AdapterBase, log: LogFunction) -> Iterator[Path]:
    """Yield ``folder``, or a temporary folder with the same adapter in plain form.

    Initializations such as PiSSA and OLoRA change the base weights to W − s·A₀·B₀, with A₀ and B₀ computed from W. For
    adapters that PEFT saved in this form, the base model is loaded to compute A₀ and B₀, and the adapter is converted
    to a plain one of twice the rank. Adapters saved by deltaw are already plain.
    """
    init = read_adapter_config(folder).get("init_lora_weights")
    if not isinstance(init, str) or init not in CHANGING_INITS:
        yield folder
        return
    log(f"the adapter's initialization '{init}' changed the base weights: loading the base model to convert it")
    model = base.load("fp32").model
    load_adapter(model, folder)
    with tempfile.TemporaryDirectory(prefix="deltaw-plain-", ignore_cleanup_errors=True) as plain_folder:
        save_adapter(model, plain_folder, base_model=base.reference)
        del model
        yield Path(plain_folder)


@dataclass(frozen=True)
class MergeOptions:
    """Options of a merge.

    Attributes:
        model: Base model, if it is not the one that the adapter names.
        trust_remote_code: Run the Python files of the base model.
        precision: ``keep``, ``bf16``, ``fp16`` or ``fp32``.
        shard_size: Maximum bytes per file, or None to shard like the base model.
        overwrite: Replace an output folder that contains files.
        other_base: Allow a base model with other weights than the adapter was trained on.
        additional_adapters: Folders of further adapters.
        recipe: Combination of several adapters, or None for a single adapter with weight 1.
    """

    model: str | None = None
    trust_remote_code: bool = False
    precision: str = "keep"
    shard_size: int | None = None
    overwrite: bool = False
    other_base: bool = False
    additional_adapters: tuple[Path, ...] = ()
    recipe: Recipe | None = None

    def resolve_base(self, run: Path, *, dtype: str, log: LogFunction) -> AdapterBase:
        """Resolve the base model of a run. See :func:`deltaw.export.base.resolve_base`."""
        return resolve_base(run, dtype=dtype, model=self.model, trust_remote_code=self.trust_remote_code, log=log)


@dataclass(frozen=True)
class MergePlan:
    """Prepared merge: the base model, the adapters and the change of each parameter."""

    run: Path
    base: AdapterBase
    adapters: tuple[AdapterChanges, ...]
    changes: tuple[ParameterChange, ...]
    options: MergeOptions
    combination: Combination | None = None

    def same_base(self, comparisons: Iterable[bool | None]) -> bool | None:
        """Return True if all adapters were trained on this base, or None if this is unknown.

        Args:
            comparisons: Result of the comparison for each adapter.

        Raises:
            UserError: if an adapter was trained on another base and ``other_base`` is not set.
        """
        results = []
        for adapter, same in zip(self.adapters, comparisons, strict=True):
            if same is False and not self.options.other_base:
                hint = "set its base model with --model, or merge anyway with --other-base"
                raise wrong_base_error(self.base, adapter.folder, hint)
            results.append(same)
        return False if False in results else None if None in results else True


@contextlib.contextmanager
def prepare_merge(run: Path, options: MergeOptions, log: LogFunction) -> Iterator[MergePlan]:
    """Read the base model and the adapters, and yield the plan of the merge.

    Raises:
        UserError: if an adapter cannot be merged.
    """
    dtype = "fp32" if options.precision in ("fp32", "fp16") else "bf16"
    with contextlib.ExitStack() as stack, track_progress("reading the adapter"):
        run, *others = (adapter_folder(folder) for folder in (run, *options.additional_adapters))
        base = options.resolve_base(run, dtype=dtype, log=log)
        plain_folders = [stack.enter_context(plain_adapter(folder, base, log)) for folder in (run, *others)]
        adapters = tuple(load_changes(folder, base.skeleton()) for folder in plain_folders)
        if options.recipe is None and len(adapters) > 1:
            raise ValueError("several adapters need a recipe")
        combination = None if options.recipe is None else combine(adapters, options.recipe)
        changes = adapters[0].changes if combination is None else combination.changes
        yield MergePlan(run, base, adapters, tuple(changes), options, combination)
