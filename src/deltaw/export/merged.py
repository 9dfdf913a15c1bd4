"""A base model and what adapters change in it, as the tensors of one merged model, in its files' order.

Nothing is computed here before a tensor is asked for, and then a block of rows at a time: W + ΔW in fp32
(fp64 for fp64 weights), rounded once. Tensors keep the names that they have in the base's files. What
cannot be done by names alone raises :class:`NotByName`, and is done in memory by whoever asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.errors import UserError
from deltaw.export.adapters import AdapterChanges, Trained, changes_of
from deltaw.export.base import Base, Say, base_of, check_base
from deltaw.export.changes import Added, Change, Replaced
from deltaw.export.merged_config import merged_config, read_settings
from deltaw.hub.checkpoint import Checkpoint, Names, name_for, names_on_disk, read_checkpoint
from deltaw.methods.parameters import names_of
from deltaw.tensor_files import StoredTensor, row_blocks

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class NotByName(Exception):
    """The merge needs the model in memory; the message says why."""


@dataclass(frozen=True)
class Output:
    """One tensor of the merged model.

    Attributes:
        name: in its file. dtype, shape: there.
        source: the base's tensor; None where there is none, such as a new head's.
        changes: that are made to it, in their order.
        file: of the base's files, that it is in or would be.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: StoredTensor | None
    changes: tuple[Change, ...]
    file: str

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def blocks(self) -> Iterator[Tensor]:
        """Its rows in blocks, in its type.

        Raises:
            UserError: a number is not finite.
        """
        for change in self.changes:
            change.prepare(self._base_blocks)
        whole = any(change.whole for change in self.changes)
        for start, rows in self._base_blocks(whole):
            for change in self.changes:
                rows = change.apply(rows, start)
            made = rows.to(self.dtype)
            narrowed = self.dtype == torch.float16 and self.source is not None
            if (self.changes or narrowed) and not bool(torch.isfinite(made).all()):
                raise UserError(
                    f"the merged tensor '{self.name}' holds numbers that are not finite",
                    where=self.name,
                    hint="use --precision bf16, whose range is that of fp32"
                    if self.dtype == torch.float16
                    else "the adapter is broken: look at it with deltaw inspect",
                )
            yield made

    def whole(self) -> Tensor:
        """All of it."""
        return torch.cat(list(self.blocks())).view(self.shape)

    def _base_blocks(self, whole: bool = False) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of W: in the type that is computed in where W is changed, else as stored."""
        shape = self.shape or (1,)
        parts = [(0, shape[0])] if whole else row_blocks(shape)
        for start, stop in parts:
            if self.source is None:
                yield start, torch.zeros(stop - start, *shape[1:])
                continue
            rows = self.source.rows(start, stop)
            if self.changes:
                rows = rows.to(torch.float64 if self.source.dtype == torch.float64 else torch.float32)
            yield start, rows


@dataclass(frozen=True)
class MergedModel:
    """A merged model that is not written yet.

    Attributes:
        base: its base model. adapters: what was merged.
        tensors: all of it. config: the content of its config.json.
        changed: names of the model's parameters that differ from the base's, and their change.
        untied: names of tied weights that are tied no more.
        dropped: tensors of the base's files that the merged model has no use for.
        same_base: whether the adapters were trained on this base; None where that is not known.
        notes: what a person should be told.
    """

    base: Base
    adapters: tuple[AdapterChanges, ...]
    tensors: tuple[Output, ...]
    config: Mapping[str, object]
    changed: Mapping[str, Change]
    untied: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    same_base: bool | None = None
    notes: tuple[str, ...] = field(default=())


def merged_tensors(
    run: str | Path,
    *,
    model: str | None = None,
    precision: str = "keep",
    trust_remote_code: bool = False,
    say: Say = lambda line: None,
) -> Iterator[tuple[str, Tensor]]:
    """(name on disk, tensor) of the model that a run's adapter and its base make, one at a time.

    Args:
        run: a run's folder, or an adapter's.
        model: the base model, where it is not the one that the folder names.
        precision: ``bf16``, ``fp16``, ``fp32``, or ``keep`` for the types of the base's files.
        trust_remote_code: run the Python files that came with the base model.

    Raises:
        UserError: it cannot be merged.
    """
    merged = merged_model(run, model=model, precision=precision, trust_remote_code=trust_remote_code, say=say)
    for output in merged.tensors:
        yield output.name, output.whole()


def merged_model(
    run: str | Path,
    *,
    model: str | None = None,
    precision: str = "keep",
    other_base: bool = False,
    trust_remote_code: bool = False,
    say: Say = lambda line: None,
) -> MergedModel:
    """What the adapter of ``run`` makes of its base model.

    Args:
        run, model, precision, trust_remote_code: as for :func:`merged_tensors`.
        other_base: merge also into a base model that is not the one that the adapter was trained on.

    Raises:
        UserError: it cannot be merged.
        NotByName: the base's files do not hold its weights one by one.
    """
    folder = Path(run)
    dtype = "fp32" if precision in ("fp32", "fp16") else "bf16"
    base = base_of(folder, model, dtype, say, trust_remote_code=trust_remote_code)
    adapter = changes_of(folder, base.skeleton())
    return assemble(base, [adapter], adapter.trained, precision=precision, other_base=other_base)


def assemble(
    base: Base,
    adapters: Sequence[AdapterChanges],
    trained: Sequence[Trained],
    *,
    precision: str,
    other_base: bool = False,
) -> MergedModel:
    """The merged model of a base and changes to it.

    Args:
        adapters: that the changes come from, for what is checked and said.
        trained: the changes, each parameter once.
    """
    skeleton = base.skeleton()
    checkpoint = read_checkpoint(base.folder)
    names = names_on_disk(skeleton, checkpoint.tensors)
    settings = read_settings(base.folder)
    same = _same_base(base, skeleton, checkpoint, names, adapters, other_base)
    tying = _Tying(skeleton, trained)
    _refuse_converted(names, tying)
    config = merged_config(base, skeleton, settings, tying.untied, tying.added, PRECISIONS.get(precision))
    drop = list(names.unused) if config.other_class else []
    plan = _Outputs(checkpoint, names, tying, PRECISIONS.get(precision), skeleton)
    outputs = plan.all(set(drop), config.zeros)
    config.check(outputs)
    changed = {name: found.change for name, found in {**tying.wanted, **tying.added}.items()}
    return MergedModel(
        base,
        tuple(adapters),
        tuple(outputs),
        config.settings,
        changed,
        tying.untied,
        tuple(drop),
        same,
        tuple(_notes(base, adapters, same, tying)),
    )


def _same_base(
    base: Base,
    skeleton: PreTrainedModel,
    checkpoint: Checkpoint,
    names: Names,
    adapters: Sequence[AdapterChanges],
    other_base: bool,
) -> bool | None:
    """Whether all adapters were trained on these weights."""
    found: list[bool | None] = []
    for adapter in adapters:
        same = check_base(base, skeleton, checkpoint, names, adapter)
        if same is False and not other_base:
            raise UserError(
                f"the adapter was trained on other weights than those of '{base.reference}'",
                where=str(adapter.folder),
                hint="name its own base with --model; --other-base merges it all the same",
            )
        found.append(same)
    return False if False in found else None if None in found else True


def _notes(base: Base, adapters: Sequence[AdapterChanges], same: bool | None, tying: _Tying) -> Iterator[str]:
    if same is False:
        yield f"'{base.reference}' is another base model than the adapter was trained on, as asked"
    elif same is None:
        yield "whether this is the base model that the adapter was trained on cannot be told from its file"
    if base.run is not None and base.run.precision == "int8":
        yield (
            "the adapter was trained on int8-quantized weights; it is merged into the weights that were "
            "quantized, as they are in the base model's files"
        )
    if base.run is not None and base.run.precision == "nf4":
        yield (
            "the adapter was trained on weights in NF4; it is merged into the weights that were rounded, as "
            "they are in the base model's files, on which it acts a little differently"
        )
    if base.run is not None and base.run.precision == "gguf":
        yield (
            "the adapter was trained on the blocks of a .gguf file; it is merged into these blocks' values, "
            "which are no longer in blocks"
        )
    for name in tying.untied:
        yield f"'{name}' was tied to another weight and is not any more: the two differ now"


class _Tying:
    """Which names of the model a change is for, and which tied weights it unties."""

    def __init__(self, skeleton: PreTrainedModel, trained: Sequence[Trained]) -> None:
        own = names_of(skeleton)
        groups: dict[int, list[str]] = {}
        for name, parameter in own.items():
            groups.setdefault(id(parameter), []).append(name)
        self.group = {name: groups[id(parameter)] for name, parameter in own.items()}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
        self.wanted: dict[str, Trained] = {}
        self.added: dict[str, Trained] = {}
        for one in trained:
            for name in one.names:
                (self.wanted if name in own else self.added)[name] = one
        untied: list[str] = []
        for group in groups.values():
            made = {id(self.wanted[name]) if name in self.wanted else None for name in group}
            if len(made) > 1:
                untied += group[1:]
        self.untied = tuple(untied)

    def is_untied(self, name: str) -> bool:
        return any(other in self.untied for other in self.group.get(name, ()))

    def changes(self, name: str) -> tuple[Change, ...]:
        found = self.wanted.get(name) or self.added.get(name)
        return () if found is None else (found.change,)


def _refuse_converted(names: Names, tying: _Tying) -> None:
    for name in tying.wanted:
        if any(other in names.converted for other in tying.group[name]):
            raise NotByName(f"the files hold '{name}' in parts that are put together while it is loaded")
        stored = any(other in names.stored for other in tying.group[name])
        if not stored and not tying.wanted[name].new:
            raise UserError(
                f"the base model's files lack '{name}'", where=name, hint="fetch or copy the model again"
            )


@dataclass(frozen=True)
class _Outputs:
    """The tensors of the merged model, file after file."""

    checkpoint: Checkpoint
    names: Names
    tying: _Tying
    dtype: torch.dtype | None
    skeleton: PreTrainedModel

    def all(self, dropped: set[str], zeros: Mapping[str, tuple[int, ...]]) -> list[Output]:
        """Those of the base's files, then the new ones: weights that were tied, heads, biases."""
        parameter_of = {stored: name for name, stored in self.names.stored.items()}
        outputs = []
        for name, stored in self.checkpoint.tensors.items():
            if name not in dropped:
                outputs.append(self._of_file(name, stored, parameter_of.get(name)))
        last = self.checkpoint.files[-1]
        usual = self._usual_type()
        for parameter in self.tying.untied:
            if parameter not in self.names.stored:
                source = self._source(parameter)
                made = Output("", self.dtype or usual, self.tying.shapes[parameter], source, (), last)
                made = replace(made, changes=self.tying.changes(parameter))
                if source is not None:
                    made = replace(made, dtype=self._type(source), file=source.file.name)
                outputs.append(replace(made, name=self._name(parameter)))
        for parameter, one in {**self.tying.wanted, **self.tying.added}.items():
            group = self.tying.group.get(parameter, [parameter])
            known = any(name in self.names.stored for name in group)
            if not known and parameter == group[0]:
                if not isinstance(one.change, Replaced | Added):
                    raise UserError(
                        f"'{parameter}' is a module that adapters trained whole and the base model lacks, so "
                        "there is nothing that their changes could be combined upon",
                        where=parameter,
                        hint="merge one of them",
                    )
                changes = (one.change,)
                outputs.append(
                    Output(self._name(parameter), self.dtype or usual, one.shape, None, changes, last)
                )
        for parameter, shape in zeros.items():
            outputs.append(Output(self._name(parameter), self.dtype or usual, shape, None, (), last))
        return outputs

    def _of_file(self, name: str, stored: StoredTensor, parameter: str | None) -> Output:
        source: StoredTensor = stored
        changes: tuple[Change, ...] = ()
        if parameter is not None:
            group = self.tying.group.get(parameter, [parameter])
            if self.tying.is_untied(parameter):
                source = self._source(parameter) or stored
            changes = self.tying.changes(parameter)
            if not changes and not self.tying.is_untied(parameter):
                changes = next((c for other in group if (c := self.tying.changes(other))), ())
            shape = self.tying.shapes.get(parameter)
            if changes and shape != stored.shape:
                raise UserError(
                    f"'{name}' is {stored.shape} in the base model's file and {shape} in the model",
                    where=str(stored.file),
                    hint="fetch the model again, or check that config.json belongs to the weights",
                )
        return Output(name, self._type(source), source.shape, source, changes, stored.file.name)

    def _source(self, parameter: str) -> StoredTensor | None:
        """The base's tensor behind a parameter that may be tied: that of the first of its names."""
        for name in self.tying.group[parameter]:
            if name in self.names.stored:
                return self.checkpoint.tensors[self.names.stored[name]]
        return None

    def _type(self, source: StoredTensor) -> torch.dtype:
        return self.dtype if self.dtype is not None and source.is_float else source.dtype

    def _usual_type(self) -> torch.dtype:
        """That of most of the base's numbers."""
        counts: dict[torch.dtype, int] = {}
        for stored in self.checkpoint.tensors.values():
            if stored.is_float:
                counts[stored.dtype] = counts.get(stored.dtype, 0) + stored.numel
        return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32

    def _name(self, parameter: str) -> str:
        if parameter not in self.tying.group:
            return self._added_name(parameter)
        found = name_for(self.skeleton, parameter, self.names)
        if found is None:
            raise NotByName(f"how a file would name '{parameter}' cannot be told")
        return found

    def _added_name(self, parameter: str) -> str:
        """Of a bias that the base model has no place for: named as its weight is."""
        owner = parameter.removesuffix("bias")
        weight = self.names.stored.get(f"{owner}weight")
        if weight is None:
            raise NotByName(f"how a file would name '{parameter}' cannot be told")
        return f"{weight.removesuffix('weight')}bias"
