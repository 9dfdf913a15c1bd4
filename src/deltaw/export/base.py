"""Preparation of merges and exports: the base model's files, its verification, and the changes of the adapters."""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaw import platforms
from deltaw.atomic_files import apply_umask, sync_file, sync_folder
from deltaw.data.chat_template import with_chat_template
from deltaw.errors import UserError
from deltaw.export.adapters import AdapterChanges, ParameterChange, load_changes
from deltaw.export.combine import Combination, Recipe, combine
from deltaw.hub.checkpoint import ParameterNames, WeightFiles, match_names, read_checkpoint
from deltaw.hub.empty_models import read_config
from deltaw.hub.folders import ModelSource, adapter_folder, local_folder, resolve
from deltaw.hub.loading import LoadedModel, load
from deltaw.hub.skeletons import skeleton
from deltaw.hub.tokenizers import tokenizer_in
from deltaw.hub.transformers_private import complete_skeleton, quiet
from deltaw.hub.vision import loads_as_text_view, text_view
from deltaw.hub.weight_digests import folder_digests, record_stored_digests
from deltaw.lora import load_adapter, save_adapter
from deltaw.lora.config import CHANGING_INITS
from deltaw.lora.fingerprint import base_fingerprint, same_base
from deltaw.methods.files import read_classes, read_num_outputs
from deltaw.methods.files import read_config as read_adapter_config
from deltaw.methods.parameters import parameters_by_name
from deltaw.methods.trust import CHAT_TEMPLATE, read_folder
from deltaw.progress import LogFunction, track_progress
from deltaw.settings import task_registry
from deltaw.settings.config import RunConfig
from deltaw.tensor_files import row_blocks


@dataclass(frozen=True)
class ExportResult:
    """Result of an export.

    Attributes:
        details: Values for JSON output.
        lines: Lines for the user.
    """

    details: dict[str, object]
    lines: list[str]


@dataclass(frozen=True)
class AdapterBase:
    """Base model of an adapter.

    Attributes:
        reference: Reference of the model.
        folder: Folder with config.json and safetensors files.
        task: Task of the adapter.
        outputs: Number of outputs of a classification head.
        classes: Names of the classes.
        run: Settings of the run, if the folder is a run.
        trust_remote_code: Whether the caller trusts the model's Python code.
    """

    reference: str
    folder: Path
    task: str
    outputs: int | None
    classes: tuple[str, ...] | None
    run: RunConfig | None
    trust_remote_code: bool

    def skeleton(self, folder: Path | None = None) -> PreTrainedModel:
        """Return the model on the meta device, built from the base's config.json or from the one in ``folder``.

        A vision-language model is returned completely, with its vision tower.
        """
        if self.is_view:
            return complete_skeleton(self._read_config(folder or self.folder))
        with torch.device("meta"):
            return skeleton(str(folder or self.folder), dtype="fp32", **self._for_task)

    def load(self, precision: str, folder: Path | None = None) -> LoadedModel:
        """Load the model, or the one in ``folder``, for the adapter's task."""
        with quiet():
            path = str(folder or self.folder)
            return load(path, precision=precision, device="cpu", log=lambda line: None, **self._for_task)

    @property
    def _for_task(self) -> dict[str, Any]:
        return {"task": self.task, "num_labels": self.outputs, "trust_remote_code": self.trust_remote_code}

    @functools.cached_property
    def source(self) -> ModelSource:
        """Source of the model: its display name, and the path of a converted ``.gguf`` file."""
        return resolve(self.reference)

    @property
    def gguf(self) -> Path | None:
        """``.gguf`` file that the folder was converted from, if any."""
        return self.source.path if self.source.kind == "gguf" else None

    @functools.cached_property
    def is_view(self) -> bool:
        """True if the model is a vision-language model, which is trained through its text view."""
        return loads_as_text_view(self._read_config(self.folder), task_registry.entry_of(self.task).auto_model)

    @functools.cached_property
    def config(self) -> PretrainedConfig:
        """Configuration of the model, or of the language model of a vision-language model."""
        config = self._read_config(self.folder)
        if not self.is_view:
            return config
        text: PretrainedConfig = config.get_text_config(decoder=True)
        model = self.skeleton()
        text.tie_word_embeddings = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return text

    def _read_config(self, folder: Path) -> PretrainedConfig:
        with quiet():
            return read_config(folder, self.task, None, self.trust_remote_code)

    def tokenizer(self, run: Path) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer, with the chat template of ``run`` if it has one."""
        tokenizer = tokenizer_in(self.folder, self.trust_remote_code)
        if tokenizer is None:
            return None
        if self.run is not None:
            return with_chat_template(tokenizer, self.run.data.chat_template)
        template = run / CHAT_TEMPLATE
        return with_chat_template(tokenizer, str(template)) if template.is_file() else tokenizer

    def fingerprint(self) -> str | None:
        """Compute the fingerprint of the weights without loading them.

        Returns None if the files do not store the parameters individually.
        """
        model = self.skeleton()
        checkpoint = read_checkpoint(self.folder)
        return fingerprint_on_disk(self, model, checkpoint, match_names(model, checkpoint.tensors))

    def trained_part(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the part of a skeleton that was trained: the text view of a vision-language model."""
        return text_view(model).view if self.is_view else model


def resolve_base(adapter: Path, dtype: str, options: MergeOptions, log: LogFunction) -> AdapterBase:
    """Resolve the base model of an adapter.

    Args:
        adapter: Folder of a run or of an adapter.
        dtype: Type that a ``.gguf`` base model is converted to.
        options: May override the base model, and may allow its Python code.
        log: Receives messages for the user.

    Raises:
        UserError: if the adapter or its base model is not found, or if the caller has to confirm the base model.
    """
    trust = options.trust_remote_code
    source = read_folder(adapter, trust_remote_code=trust)
    classes = read_classes(adapter)
    outputs = len(classes) if classes is not None else task_registry.entry_of(source.task).outputs
    if outputs is None and task_registry.entry_of(source.task).new_head:
        outputs = read_num_outputs(adapter)
    folder = local_folder(resolve(source.base(options.model)), dtype, log, trust)
    return AdapterBase(source.base_name(options.model), folder, source.task, outputs, classes, source.run, trust)


def wrong_base_error(base: AdapterBase, adapter: Path, hint: str) -> UserError:
    """Return the error for an adapter that was trained on another base model."""
    message = f"the adapter was trained on other weights than those of '{base.reference}'"
    return UserError(message, location=str(adapter), hint=hint)


def check_base(
    base: AdapterBase, model: PreTrainedModel, checkpoint: WeightFiles, names: ParameterNames, adapter: AdapterChanges
) -> bool | None:
    """Return True if the files are the base model that an adapter was trained on, or None if this is unknown.

    Args:
        base: Base model.
        model: Its skeleton, without an adapter.
        checkpoint: Weight files of the base model.
        names: Names of the parameters in the files.
        adapter: Changes of the adapter.

    Raises:
        UserError: if the adapter's file contains copies of base weights that differ from the files.
    """
    for name, tensor in adapter.copies.items():
        stored = checkpoint.tensors.get(names.stored.get(name, ""))
        blocks = row_blocks(tensor.shape)
        if stored is None or not all(torch.equal(tensor[a:b].to(stored.dtype), stored.rows(a, b)) for a, b in blocks):
            message = f"the base weight '{name}' in the adapter's file differs from the model's"
            hint = "merge it into the base model that it was trained on"
            raise UserError(message, location=str(adapter.folder), hint=hint)
    if adapter.fingerprint is None:
        return None
    return same_base(fingerprint_on_disk(base, model, checkpoint, names, adapter.replaced), adapter.fingerprint)


def fingerprint_on_disk(
    base: AdapterBase,
    model: PreTrainedModel,
    checkpoint: WeightFiles,
    names: ParameterNames,
    replaced: frozenset[str] = frozenset(),
) -> str | None:
    """Compute :func:`~deltaw.lora.fingerprint.base_fingerprint` of a model from its files without loading it.

    Returns None if a parameter is assembled from several tensors.
    """
    if names.converted:
        return None
    record_stored_digests(model, folder_digests(checkpoint.folder))
    return base_fingerprint(
        base.trained_part(model), [p for name, p in parameters_by_name(model).items() if name in replaced]
    )


# Initializations such as PiSSA and OLoRA change the base weights to W − s·A₀·B₀, with A₀ and B₀ computed from W.
# For adapters that PEFT saved in this form, the base model is loaded to compute A₀ and B₀, and the adapter is converted
# to a plain one of twice the rank. Adapters saved by deltaw are already plain.


@contextlib.contextmanager
def plain_adapter(folder: Path, base: AdapterBase, log: LogFunction) -> Iterator[Path]:
    """Yield ``folder``, or a temporary folder with the same adapter in plain form."""
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
        base = resolve_base(run, dtype, options, log)
        plain_folders = [stack.enter_context(plain_adapter(folder, base, log)) for folder in (run, *others)]
        adapters = tuple(load_changes(folder, base.skeleton()) for folder in plain_folders)
        if options.recipe is None and len(adapters) > 1:
            raise ValueError("several adapters need a recipe")
        combination = None if options.recipe is None else combine(adapters, options.recipe)
        changes = adapters[0].changes if combination is None else combination.changes
        yield MergePlan(run, base, adapters, tuple(changes), options, combination)


_PARTIAL = ".partial-"
_BEFORE = ".before-"
# Bytes for headers, configuration, tokenizer and file system overhead.
_DISK_RESERVE = 64 << 20


@contextlib.contextmanager
def atomic_folder(
    target: Path, *, overwrite: bool = False, needed: int = 0, log: Callable[[str], None] = lambda line: None
) -> Iterator[Path]:
    """Yield a hidden folder. If the block succeeds, rename it to ``target``.

    Args:
        target: Destination. It may exist if it is empty.
        overwrite: Replace an existing folder with files. It is renamed first, and removed after the replacement.
        needed: Number of bytes that will be written.
        log: Receives messages about leftovers of earlier processes.

    Raises:
        UserError: if ``target`` contains files, the disk is full, or the folder is not writable.
    """
    target = Path(os.path.abspath(target))
    check_target(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target, log)
        check_target(target, overwrite=overwrite)  # the cleanup may have restored a folder
        if needed and (free := shutil.disk_usage(target.parent).free) < needed + _DISK_RESERVE:
            message = f"the merged model needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free"
            hint = "free some space, or choose another disk or a narrower --precision"
            raise UserError(message, location=str(target.parent), hint=hint)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}{_PARTIAL}{os.getpid()}-", dir=target.parent))
    except OSError as error:
        raise _not_writable(target, error) from error
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        # Locked if the file system supports it.
        if not platforms.WINDOWS and (handle := _acquire_lock(partial)) is not None:
            stack.callback(os.close, handle)
        yield partial
        try:
            _flush(partial)
            _move_into_place(partial, target)
        except OSError as error:
            raise _not_writable(target, error) from error


def check_target(target: Path, *, overwrite: bool = False) -> None:
    """Check that a folder can be created at ``target``.

    Raises:
        UserError: if ``target`` is a file, or a folder with files that must not be replaced, or if its name is reserved
            on Windows.
    """
    platforms.reject_reserved_names(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError("the output is not a folder", location=str(target), hint="choose a new folder")
    if target.is_dir():
        entries = sorted(entry.name for entry in target.iterdir())
        if entries and not overwrite:
            message = f"the output folder already contains files, such as '{entries[0]}'"
            raise UserError(message, location=str(target), hint="choose another folder, or add --overwrite")
        if entries and Path.cwd().resolve().is_relative_to(target.resolve()):
            message = "the output folder cannot be replaced because it contains the current directory"
            raise UserError(message, location=str(target), hint="change to another directory first")


def _move_into_place(partial: Path, target: Path) -> None:
    """Rename the folder to its destination, then remove the folder that it replaces."""
    before = target.with_name(f".{target.name}{_BEFORE}{os.getpid()}")
    if target.is_dir() and any(target.iterdir()):
        platforms.rename_path(target, before)
    apply_umask(partial, 0o777)
    try:
        platforms.rename_path(partial, target)  # also replaces an empty folder
    except OSError:
        if before.is_dir():
            platforms.rename_path(before, target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(before, ignore_errors=True)


def _clear(target: Path, log: Callable[[str], None]) -> None:
    """Remove leftovers of dead processes, and restore a folder that one of them had renamed."""
    for before in sorted(target.parent.glob(f".{glob.escape(target.name)}{_BEFORE}*")):
        if not _is_process_alive(before):
            if not target.exists():
                platforms.rename_path(before, target)
                log(f"restored {target.name}, which an interrupted process had renamed")
            shutil.rmtree(before, ignore_errors=True)
    for leftover in sorted(target.parent.glob(f".{glob.escape(target.name)}{_PARTIAL}*")):
        if _is_process_alive(leftover) or not _is_free(leftover):
            log(f"another process is writing {leftover.name}")
        else:
            shutil.rmtree(leftover, ignore_errors=True)
            log(f"removed {leftover.name}, left by an interrupted process")


def _is_process_alive(folder: Path) -> bool:
    """Return True if the process with the id in the name exists. Other machines' processes are assumed to be alive."""
    match = re.fullmatch(r".*\.(?:partial|before)-([0-9]+)(?:-.*)?", folder.name, re.DOTALL)
    return match is None or (int(match[1]) != os.getpid() and psutil.pid_exists(int(match[1])))


def _acquire_lock(folder: Path) -> int | None:
    """Lock a folder and return its file descriptor, or None if another process owns the lock."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _is_free(folder: Path) -> bool:
    """Return True if no process has locked the folder."""
    if platforms.WINDOWS:  # the process id is checked instead
        return True
    try:
        handle = _acquire_lock(folder)
    except OSError:
        return False
    if handle is not None:
        os.close(handle)
    return handle is not None


def _flush(folder: Path) -> None:
    """Flush all files and folders to disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            sync_file(path)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def _not_writable(target: Path, error: OSError) -> UserError:
    message = f"the folder cannot be written: {error.strerror or error}"
    return UserError(message, location=str(target), hint="choose a folder with write permission and enough free space")
