"""Tensors of a merged model, computed on demand from the base model's files and the adapters' changes.

Tensors are computed in blocks of rows: W + ΔW in fp32 (fp64 for fp64 weights), rounded once. They retain their names
in the base model's files. :class:`NeedsMemoryMerge` is raised if tensors cannot be matched by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.errors import UserError
from deltaw.export.adapters import BiasChange, ReplacedTensor, WeightChange
from deltaw.export.base import AdapterBase, check_base
from deltaw.export.merge_plan import MergePlan
from deltaw.export.merged_config import DAMAGED_HINT, PRECISIONS, merged_config, read_settings, tied_names
from deltaw.hub.checkpoint import WeightFiles, read_checkpoint
from deltaw.hub.parameter_names import ParameterNames, find_stored_name, match_names
from deltaw.methods.parameters import parameters_by_name
from deltaw.tensor_files import StoredTensor, row_blocks


class NeedsMemoryMerge(Exception):
    """The merge requires loading the model. The message contains the reason."""


@dataclass(frozen=True)
class MergedTensor:
    """Tensor of a merged model.

    Attributes:
        name: Name in the file.
        dtype: Type in the file.
        shape: Shape in the file.
        source: Tensor of the base model, if any. A new head has none.
        changes: Changes to apply, in order.
        file: Name of the base model's file that contains the tensor or would contain it.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: StoredTensor | None
    changes: tuple[WeightChange, ...]
    file: str

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def blocks(self) -> Iterator[Tensor]:
        """Yield the merged rows in blocks, in the target type.

        Raises:
            UserError: if a value is not finite.
        """
        for change in self.changes:
            change.prepare(self._base_blocks)
        for start, rows in self._base_blocks(any(change.needs_all_rows for change in self.changes)):
            for change in self.changes:
                rows = change.apply(rows, start)
            converted = rows.to(self.dtype)
            narrowed = self.dtype == torch.float16 and self.source is not None
            if (self.changes or narrowed) and not bool(torch.isfinite(converted).all()):
                default_hint = "the adapter is damaged: check it with deltaw inspect"
                hint = "use --precision bf16, which has fp32's range" if self.dtype == torch.float16 else default_hint
                message = f"the merged tensor '{self.name}' contains values that are not finite"
                raise UserError(message, location=self.name, hint=hint)
            yield converted

    def load(self) -> Tensor:
        """Return the entire merged tensor."""
        return torch.cat(list(self.blocks())).view(self.shape)

    def _base_blocks(self, single_block: bool = False) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows) of W, in the compute type if W is changed, otherwise in the stored type."""
        shape = self.shape or (1,)
        for start, stop in [(0, shape[0])] if single_block else row_blocks(shape):
            rows = torch.zeros(stop - start, *shape[1:]) if self.source is None else self.source.rows(start, stop)
            if self.changes:
                rows = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
            yield start, rows


@dataclass(frozen=True)
class MergedModel:
    """Merged model before it is written.

    Attributes:
        job: Plan of the merge.
        tensors: All tensors.
        config: Content of config.json.
        changed: Changes by parameter name.
        untied: Names of weights that are no longer tied.
        dropped: Names of base tensors that the merged model does not contain.
        same_base: Whether the adapters were trained on this base model, or None if unknown.
        notes: Notes for the user.
    """

    job: MergePlan
    tensors: tuple[MergedTensor, ...]
    config: Mapping[str, object]
    changed: Mapping[str, WeightChange]
    untied: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    same_base: bool | None = None
    notes: tuple[str, ...] = field(default=())


def assemble(job: MergePlan) -> MergedModel:
    """Return the merged model of a plan.

    Raises:
        UserError: if the adapters cannot be merged.
        NeedsMemoryMerge: if the base model's files do not store its parameters individually.
    """
    base = job.base
    skeleton = base.skeleton()
    checkpoint = read_checkpoint(base.folder)
    names = match_names(skeleton, checkpoint.tensors)
    settings = read_settings(base.folder)
    is_same_base = job.same_base(check_base(base, skeleton, checkpoint, names, item) for item in job.adapters)
    plan = _TensorPlan(job, skeleton, checkpoint, names)
    config = merged_config(job, skeleton, settings, plan.untied, list(plan.added))
    drop = names.unused if config.other_class else ()
    outputs = plan.outputs(set(drop), config.zeros)
    config.check({tensor.name: tensor.shape for tensor in outputs})
    changed = {name: item.change for name, item in {**plan.wanted, **plan.added}.items()}
    notes = tuple(_notes(base, is_same_base, plan.untied))
    return MergedModel(job, tuple(outputs), config.settings, changed, plan.untied, tuple(drop), is_same_base, notes)


# Note by precision of the run: representation of the weights in training and in the merge.
_TRAINED_ON = {
    "int8": "int8-quantized weights; it is merged into the unquantized weights of the base model's files",
    "nf4": "NF4 weights; it is merged into the unquantized weights of the base model's files, with slightly "
    "different outputs",
    "gguf": "the blocks of a .gguf file; it is merged into the dequantized values",
}


def _notes(base: AdapterBase, same: bool | None, untied: Sequence[str]) -> Iterator[str]:
    if same is False:
        yield f"'{base.reference}' is not the base model that the adapter was trained on (--other-base)"
    elif same is None:
        yield "the base model was not compared with the one that the adapter was trained on"
    if base.run is not None and base.run.precision in _TRAINED_ON:
        yield f"the adapter was trained on {_TRAINED_ON[base.run.precision]}"
    for name in untied:
        yield f"'{name}' is no longer tied to another weight, because they now differ"


def dominant_dtype(tensors: Iterable[StoredTensor]) -> torch.dtype | None:
    """Return the type of the majority of floating-point elements, or None without such elements."""
    counts: Counter[torch.dtype] = Counter()
    for stored in tensors:
        if stored.is_float:
            counts[stored.dtype] += stored.numel
    return max(counts, key=counts.__getitem__) if counts else None


class _TensorPlan:
    """Assigns changes to tensors of the base model's files, and determines untied and new tensors.

    Attributes:
        wanted: Changes of parameters of the model, by name.
        added: Changes of parameters that the model lacks, by name.
        untied: Names of weights that are no longer tied.
    """

    def __init__(self, job: MergePlan, skeleton: PreTrainedModel, weights: WeightFiles, names: ParameterNames) -> None:
        self._checkpoint, self._names, self._skeleton = weights, names, skeleton
        self._dtype = PRECISIONS.get(job.options.precision)
        parameters = parameters_by_name(skeleton)
        groups = tied_names(parameters)
        self._group = {name: group for group in groups for name in group}
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.wanted = {name: change for change in job.changes for name in change.names if name in parameters}
        self.added = {name: change for change in job.changes for name in change.names if name not in parameters}
        untied_groups = [group for group in groups if len({id(self.wanted.get(name)) for name in group}) > 1]
        self.untied = tuple(name for group in untied_groups for name in group[1:])
        for name, change in self.wanted.items():
            if any(other in names.converted for other in self._group[name]):
                raise NeedsMemoryMerge(f"transformers assembles '{name}' from several tensors")
            if not change.new and not any(other in names.stored for other in self._group[name]):
                raise UserError(f"the base model's files lack '{name}'", location=name, hint=DAMAGED_HINT)

    def outputs(self, dropped: set[str], zeros: Mapping[str, tuple[int, ...]]) -> list[MergedTensor]:
        """Return the tensors of the base model's files, followed by new ones: untied weights, heads and biases."""
        parameter_of = {stored: name for name, stored in self._names.stored.items()}
        retained = {name: stored for name, stored in self._checkpoint.tensors.items() if name not in dropped}
        outputs = [self._of_file(name, stored, parameter_of.get(name)) for name, stored in retained.items()]
        last_file = self._checkpoint.files[-1]
        default_dtype = self._dtype or dominant_dtype(self._checkpoint.tensors.values()) or torch.float32

        def new(parameter: str, shape: tuple[int, ...], changes: tuple[WeightChange, ...]) -> MergedTensor:
            source = self._source(parameter) if parameter in self.untied else None
            dtype, file = (default_dtype, last_file) if source is None else (self._type(source), source.file.name)
            return MergedTensor(self._name(parameter), dtype, shape, source, changes, file)

        for parameter in self.untied:
            if parameter not in self._names.stored:
                outputs.append(new(parameter, self._shapes[parameter], self._changes(parameter)))
        for parameter, parameter_change in {**self.wanted, **self.added}.items():
            group = self._group.get(parameter, [parameter])
            if parameter != group[0] or any(name in self._names.stored for name in group):
                continue
            if not isinstance(parameter_change.change, ReplacedTensor | BiasChange):
                message = f"cannot combine '{parameter}', which the base model lacks and the adapters train in full"
                raise UserError(message, location=parameter, hint="merge one of them")
            output = new(parameter, parameter_change.shape, (parameter_change.change,))
            if self._dtype is None and isinstance(parameter_change.change, ReplacedTensor):
                output = replace(output, dtype=torch.promote_types(output.dtype, parameter_change.change.values.dtype))
            outputs.append(output)
        return outputs + [new(parameter, shape, ()) for parameter, shape in zeros.items()]

    def _changes(self, name: str) -> tuple[WeightChange, ...]:
        change = self.wanted.get(name) or self.added.get(name)
        return () if change is None else (change.change,)

    def _of_file(self, name: str, stored: StoredTensor, parameter: str | None) -> MergedTensor:
        source: StoredTensor = stored
        changes: tuple[WeightChange, ...] = ()
        if parameter is not None:
            group = self._group.get(parameter, [parameter])
            changes = self._changes(parameter)
            if any(other in self.untied for other in group):
                source = self._source(parameter) or stored
            elif not changes:
                changes = next((c for other in group if (c := self._changes(other))), ())
            shape = self._shapes.get(parameter)
            if changes and shape != stored.shape:
                message = f"'{name}' is {stored.shape} in the base model's file and {shape} in the model"
                hint = "download the model again, or check that config.json belongs to the weights"
                raise UserError(message, location=str(stored.file), hint=hint)
        return MergedTensor(name, self._type(source), source.shape, source, changes, stored.file.name)

    def _source(self, parameter: str) -> StoredTensor | None:
        """Return the base tensor of a parameter. Of a tied parameter, this is the one of its first stored name."""
        stored = [self._names.stored[name] for name in self._group[parameter] if name in self._names.stored]
        return self._checkpoint.tensors[stored[0]] if stored else None

    def _type(self, source: StoredTensor) -> torch.dtype:
        return self._dtype if self._dtype is not None and source.is_float else source.dtype

    def _name(self, parameter: str) -> str:
        """Return the name of a parameter in the files. The name of a new bias is derived from its weight."""
        if parameter in self._group:
            stored_name = find_stored_name(self._skeleton, parameter, self._names)
        else:
            stored_name = self._names.stored.get(f"{parameter.removesuffix('bias')}weight")
            stored_name = stored_name and f"{stored_name.removesuffix('weight')}bias"
        if stored_name is None:
            raise NeedsMemoryMerge(f"the name of '{parameter}' in a file is unknown")
        return stored_name
