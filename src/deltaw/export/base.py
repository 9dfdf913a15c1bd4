"""What a merge or an export starts from: the base model's files, whether it is the one, and what adapters change.

Knows folders and transformers' classes; not what is written.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deltaw import tasks
from deltaw.data.chat_template import with_chat_template
from deltaw.errors import UserError
from deltaw.export.adapters import AdapterChanges, Trained, changes_of
from deltaw.export.combine import Combination, Recipe, combine
from deltaw.hub.checkpoint import Checkpoint, Names, names_on_disk, note_stored, read_checkpoint, values_in_folder
from deltaw.hub.folders import Source, adapter_folder, local_folder, resolve
from deltaw.hub.loading import LoadedModel, load, read_config, skeleton
from deltaw.hub.quiet import quiet
from deltaw.hub.tokenizers import tokenizer_in
from deltaw.lora import load_adapter, save_adapter
from deltaw.lora.config import CHANGING_INITS
from deltaw.lora.fingerprint import base_fingerprint, same_base
from deltaw.methods.files import classes_of, outputs_of
from deltaw.methods.files import read_config as read_adapter_config
from deltaw.methods.parameters import names_of
from deltaw.settings import RunConfig
from deltaw.tensor_files import row_blocks
from deltaw.training.origin import CHAT_TEMPLATE, read_folder
from deltaw.working import working

Say = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """What an export reports of what it wrote: ``facts`` for JSON, ``lines`` for a person."""

    facts: dict[str, object]
    lines: list[str]


@dataclass(frozen=True)
class Base:
    """A base model, as an adapter needs it.

    Attributes:
        reference: what names it. folder: with config.json and safetensors.
        task: what the model does with the adapter. outputs: of a classifier's head, else None.
        classes: their names. run: the settings of the run, None where the folder is no run.
        trust_remote_code: the caller's.
    """

    reference: str
    folder: Path
    task: str
    outputs: int | None
    classes: tuple[str, ...] | None
    run: RunConfig | None
    trust_remote_code: bool

    def skeleton(self, folder: Path | None = None) -> PreTrainedModel:
        """The model on the meta device, of the base's config.json or that in another ``folder``."""
        with torch.device("meta"):
            return skeleton(str(folder or self.folder), dtype="fp32", **self._for_task)

    def load(self, precision: str, folder: Path | None = None) -> LoadedModel:
        """The model in memory, or the one in another ``folder``, for the adapter's task."""
        with quiet():
            place = str(folder or self.folder)
            return load(place, precision=precision, device="cpu", say=lambda line: None, **self._for_task)

    @property
    def _for_task(self) -> dict[str, Any]:
        return {"task": self.task, "num_labels": self.outputs, "trust_remote_code": self.trust_remote_code}

    @functools.cached_property
    def source(self) -> Source:
        """Where it comes from: its name for a person, and the path of a ``.gguf`` file that was converted."""
        return resolve(self.reference)

    @property
    def gguf(self) -> Path | None:
        """The ``.gguf`` file that the folder was converted from; None where it was none."""
        return self.source.path if self.source.kind == "gguf" else None

    @functools.cached_property
    def config(self) -> PretrainedConfig:
        """Its configuration."""
        with quiet():
            return read_config(self.folder, self.task, None, self.trust_remote_code)

    def tokenizer(self, run: Path) -> PreTrainedTokenizerBase | None:
        """The tokenizer, with the chat template of ``run`` where that has one of its own."""
        found = tokenizer_in(self.folder, self.trust_remote_code)
        if found is None:
            return None
        if self.run is not None:
            return with_chat_template(found, self.run.data.chat_template)
        template = run / CHAT_TEMPLATE
        return with_chat_template(found, str(template)) if template.is_file() else found

    def fingerprint(self) -> str | None:
        """Of its weights, read without loading them; None where the files do not hold them one by one."""
        model = self.skeleton()
        checkpoint = read_checkpoint(self.folder)
        return fingerprint_on_disk(model, checkpoint, names_on_disk(model, checkpoint.tensors))


def base_of(adapter: Path, dtype: str, options: MergeOptions, say: Say) -> Base:
    """The base model of the adapter in a folder.

    Args:
        adapter: a run's folder, or an adapter's.
        dtype: what a ``.gguf`` base is converted to.
        options: name the base model, if it is not the one that the folder names, and whether Python code that comes
            with it is run.

    Raises:
        UserError: there is no adapter, no base model to be found, or one that the caller has to allow.
    """
    trust = options.trust_remote_code
    found = read_folder(adapter, trust_remote_code=trust)
    classes = classes_of(adapter)
    outputs = len(classes) if classes is not None else tasks.entry_of(found.task).outputs
    if outputs is None and tasks.entry_of(found.task).new_head:
        outputs = outputs_of(adapter)
    folder = local_folder(resolve(found.base(options.model)), dtype, say, trust)
    return Base(found.base_name(options.model), folder, found.task, outputs, classes, found.run, trust)


def other_base(base: Base, adapter: Path, hint: str) -> UserError:
    """The error of an adapter that was trained on another base model."""
    what = f"the adapter was trained on other weights than those of '{base.reference}'"
    return UserError(what, where=str(adapter), hint=hint)


def check_base(
    base: Base, model: PreTrainedModel, checkpoint: Checkpoint, names: Names, adapter: AdapterChanges
) -> bool | None:
    """Whether the files are the base model that an adapter was trained on; None where that cannot be told.

    Args:
        model: on the meta device, and without an adapter.

    Raises:
        UserError: the adapter's file has weights of its base model, and they are not these.
    """
    for name, tensor in adapter.copies.items():
        stored = checkpoint.tensors.get(names.stored.get(name, ""))
        blocks = row_blocks(tensor.shape)
        if stored is None or not all(torch.equal(tensor[a:b].to(stored.dtype), stored.rows(a, b)) for a, b in blocks):
            what = f"the adapter's file has its own copy of the base weight '{name}', which is not that of the model"
            hint = "merge it into the base model that it was trained on"
            raise UserError(what, where=str(adapter.folder), hint=hint)
    if adapter.fingerprint is None:
        return None
    return same_base(fingerprint_on_disk(model, checkpoint, names, adapter.replaced), adapter.fingerprint)


def fingerprint_on_disk(
    model: PreTrainedModel, checkpoint: Checkpoint, names: Names, replaced: frozenset[str] = frozenset()
) -> str | None:
    """:func:`~deltaw.lora.fingerprint.base_fingerprint` of the model in these files, read without loading it;
    None where a parameter is built of several tensors."""
    if names.converted:
        return None
    note_stored(model, values_in_folder(checkpoint.folder))
    return base_fingerprint(model, [p for name, p in names_of(model).items() if name in replaced])


# An adapter whose initialization changed its base's weights (PiSSA, OLoRA), saved by PEFT as it was trained, belongs to
# W − s·A₀·B₀, where A₀ and B₀ follow from W. They are found by loading the base model; the plain adapter of twice the
# rank then goes the way of all others. One that deltaw saved is plain already.


@contextlib.contextmanager
def plain_adapter(folder: Path, base: Base, say: Say) -> Iterator[Path]:
    """Yield ``folder``, or one with the same adapter in plain form that is gone afterwards."""
    init = read_adapter_config(folder).get("init_lora_weights")
    if not isinstance(init, str) or init not in CHANGING_INITS:
        yield folder
        return
    say(f"the adapter was initialized with '{init}', which took a share out of W: the base model is loaded to find it")
    model = base.load("fp32").model
    load_adapter(model, folder)
    with tempfile.TemporaryDirectory(prefix="deltaw-plain-", ignore_cleanup_errors=True) as made:
        save_adapter(model, made, base_model=base.reference)
        del model
        yield Path(made)


@dataclass(frozen=True)
class MergeOptions:
    """How a merge is done.

    Attributes:
        model: the base model, where it is not the one that the adapter names.
        trust_remote_code: run the Python files that came with it.
        precision: ``keep``, ``bf16``, ``fp16`` or ``fp32``.
        shard_size: most bytes of a file; None as the base's.
        overwrite: replace an output folder that holds files.
        other_base: merge also into another base model than the adapter was trained on.
        others: further adapters' folders.
        recipe: how several are combined; None for a single one of weight 1.
    """

    model: str | None = None
    trust_remote_code: bool = False
    precision: str = "keep"
    shard_size: int | None = None
    overwrite: bool = False
    other_base: bool = False
    others: tuple[Path, ...] = ()
    recipe: Recipe | None = None


@dataclass(frozen=True)
class Merging:
    """A merge that is prepared: the base, the adapters, and what becomes of each parameter."""

    run: Path
    base: Base
    adapters: tuple[AdapterChanges, ...]
    trained: tuple[Trained, ...]
    options: MergeOptions
    combination: Combination | None = None

    def same_base(self, found: Iterable[bool | None]) -> bool | None:
        """Whether all adapters were trained on this base; None where that is not known.

        Args:
            found: for each adapter.

        Raises:
            UserError: one was trained on another base, and that is not asked for.
        """
        known = []
        for adapter, same in zip(self.adapters, found, strict=True):
            if same is False and not self.options.other_base:
                hint = "name its own base with --model; --other-base merges it all the same"
                raise other_base(self.base, adapter.folder, hint)
            known.append(same)
        return False if False in known else None if None in known else True


@contextlib.contextmanager
def prepared(run: Path, options: MergeOptions, say: Say) -> Iterator[Merging]:
    """Read base and adapters, and settle what becomes of each parameter.

    Raises:
        UserError: something cannot be merged.
    """
    dtype = "fp32" if options.precision in ("fp32", "fp16") else "bf16"
    with contextlib.ExitStack() as stack, working("reading the adapter"):
        run, *others = (adapter_folder(folder) for folder in (run, *options.others))
        base = base_of(run, dtype, options, say)
        plain = [stack.enter_context(plain_adapter(folder, base, say)) for folder in (run, *others)]
        adapters = tuple(changes_of(folder, base.skeleton()) for folder in plain)
        if options.recipe is None and len(adapters) > 1:
            raise ValueError("several adapters need a recipe")
        combination = None if options.recipe is None else combine(adapters, options.recipe)
        trained = adapters[0].trained if combination is None else combination.trained
        yield Merging(run, base, adapters, tuple(trained), options, combination)
