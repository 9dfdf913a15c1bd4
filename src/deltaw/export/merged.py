"""Tensors of a merged model, computed on demand from the base model's files and the adapters' changes.

Tensors are computed in blocks of rows: W + ΔW in fp32 (fp64 for fp64 weights), rounded once. They retain their names
in the base model's files. :class:`NeedsMemoryMerge` is raised if tensors cannot be matched by name.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.errors import UserError
from deltaw.export.adapters import BiasChange, ReplacedTensor, WeightChange
from deltaw.export.base import AdapterBase, MergePlan, check_base
from deltaw.hub.checkpoint import (
    INDEX,
    WEIGHTS,
    ParameterNames,
    WeightFiles,
    find_stored_name,
    match_names,
    read_checkpoint,
)
from deltaw.hub.sentence_layout import LAYOUT_FILES, copy_layout
from deltaw.hub.terminators import terminators_in
from deltaw.hub.tokenizers import CONFIG_FILES, TOKENIZER_FILES, tokenizer_in
from deltaw.hub.transformers_private import FOLLOWS_MODEL
from deltaw.inference.prompting import copy_system
from deltaw.methods.parameters import parameters_by_name
from deltaw.progress import track_progress
from deltaw.settings.task_registry import entry_of
from deltaw.tensor_files import StoredTensor, TensorEntry, TensorWriter, row_blocks
from deltaw.version import __version__

# The merge changes config.json only if required: untied weights, added biases, a classification head with its classes,
# and the weights' type. A model built from the new configuration on the meta device must match the merged tensors.


_MAX_FLAGS = 6
_AGAIN, _SEPARATE = "download or copy the base model again", "keep the adapter separate"
CONFIG = "config.json"


@dataclass(frozen=True)
class MergedConfig:
    """Configuration of a merged model.

    Attributes:
        base: Base model.
        settings: Content of config.json.
        other_class: True if the model class differs from the one that wrote the base model's files.
        untied: Names of weights that are no longer tied.
        zeros: Names and shapes of untrained biases that the configuration requires.
    """

    base: AdapterBase
    settings: dict[str, object]
    other_class: bool
    untied: tuple[str, ...]
    zeros: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def check(self, tensors: Iterable[MergedTensor]) -> None:
        """Check that the tensors are exactly those of a model with this configuration.

        Raises:
            UserError: if a tensor is missing or has another shape, or a changed weight is still tied.
        """
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        model = _build(self.base, self.settings)
        names = match_names(model, shapes)
        parameters = parameters_by_name(model)
        for group in _groups(parameters):
            stored = [name for name in group if name in names.stored]
            mismatched = [n for n in stored if shapes[names.stored[n]] != tuple(parameters[n].shape)]
            exists = bool(stored) or any(name in names.converted for name in group)
            optional = any(".pooler." in name or name.startswith("pooler.") for name in group)
            if mismatched or not (exists or optional):
                raise UserError(f"the merged model lacks '{group[0]}'", location=str(self.base.folder), hint=_AGAIN)
            if len(group) > 1 and any(name in self.untied for name in group):
                pair = f"'{group[0]}' is tied to '{group[1]}', of which the adapter changes only one"
                message = f"{pair}, and {type(model).__name__} cannot untie them"
                raise UserError(message, location=group[0], hint=_SEPARATE)


def _groups(parameters: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of each parameter. A tied parameter has several names."""
    groups: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


def read_settings(folder: Path) -> dict[str, object]:
    """Read the base model's config.json.

    Raises:
        UserError: if the file cannot be read, or the weights are quantized.
    """
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"the config.json cannot be read: {error}", location=str(folder), hint=_AGAIN) from error
    quantized = settings.get("quantization_config")
    if quantized:
        kind = quantized.get("quant_method") if isinstance(quantized, dict) else None
        message = f"cannot merge into quantized weights ({kind or 'quantization_config'})"
        raise UserError(message, location=str(folder / CONFIG), hint="set the unquantized model with --model")
    return settings


def merged_config(
    job: MergePlan, skeleton: PreTrainedModel, merged: dict[str, Any], untied: Sequence[str], added: Sequence[str]
) -> MergedConfig:
    """Return the configuration of the merged model.

    Args:
        job: Plan of the merge.
        skeleton: Base model for the adapter's task, on the meta device.
        merged: Base model's config.json, which is modified.
        untied: Names of weights that are no longer tied.
        added: Names of trained biases that the base model lacks.

    Raises:
        UserError: if the architecture does not support a bias.
    """
    base, dtype = job.base, PRECISIONS.get(job.options.precision)
    name = type(skeleton).__name__
    model_classes = merged.get("architectures") or [name]
    other_class = name not in (model_classes if isinstance(model_classes, list) else [model_classes])
    if other_class or not merged.get("architectures"):
        merged["architectures"] = [name]
    if base.outputs is not None:
        labels = base.classes or tuple(f"LABEL_{number}" for number in range(base.outputs))
        merged |= entry_of(base.task).config
        merged.pop("num_labels", None)
        merged["id2label"] = {str(number): label for number, label in enumerate(labels)}
        merged["label2id"] = {label: number for number, label in enumerate(labels)}
    # The configuration, and the nested configuration of the text model in a multimodal model.
    text_config = merged.get("text_config")
    for section in [merged, text_config] if isinstance(text_config, dict) else [merged]:
        if untied and (section is merged or "tie_word_embeddings" in section):
            section["tie_word_embeddings"] = False
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and (key in section or (section is merged and key == "dtype")):
                section[key] = str(dtype).removeprefix("torch.")
    zeros = _with_biases(base, skeleton, merged, added) if added else {}
    return MergedConfig(base, merged, other_class, tuple(untied), zeros)


def _with_biases(
    base: AdapterBase, skeleton: PreTrainedModel, settings: dict[str, object], required: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Set the fewest flags of ``settings`` that add the biases ``required``, and return the other biases that they add.

    The effect of a flag is determined by building a model on the meta device.
    """
    before = set(parameters_by_name(skeleton))
    config = skeleton.config
    flags = [k for k in vars(config) if "bias" in k and getattr(config, k) is False][:_MAX_FLAGS]
    for count in range(1, len(flags) + 1):
        for selected in itertools.combinations(flags, count):
            parameters = parameters_by_name(_build(base, {**settings, **dict.fromkeys(selected, True)}))
            if set(required) <= set(parameters) and before <= set(parameters):
                settings.update(dict.fromkeys(selected, True))
                return {n: tuple(parameters[n].shape) for n in sorted(set(parameters) - before - set(required))}
    message = f"the adapter adds the bias '{required[0]}', which {type(skeleton).__name__} does not support"
    raise UserError(message, location=required[0], hint=_SEPARATE)


def _build(base: AdapterBase, settings: Mapping[str, object]) -> PreTrainedModel:
    """Build a model from a configuration on the meta device."""
    with tempfile.TemporaryDirectory() as folder:
        for code in base.folder.glob("*.py") if base.trust_remote_code else ():
            (Path(folder) / code.name).write_bytes(code.read_bytes())
        (Path(folder) / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        return base.skeleton(Path(folder))


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
    config.check(outputs)
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
        yield "the adapter's file does not identify its base model, so it was not verified"
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
        groups = _groups(parameters)
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
                raise UserError(f"the base model's files lack '{name}'", location=name, hint=_AGAIN)

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


# Configuration, tokenizer, chat template and terminators are copied from the base model. Files of the run take
# precedence.


GENERATION = "generation_config.json"
# Metadata files to copy from the base model.
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
_NOT_COPIED = (CONFIG, "*.index.json", "adapter_config.json", "run.yaml", "run.json", "summary.json")
RUN_TOKENIZER_FILES = (*TOKENIZER_FILES, *CONFIG_FILES[1:], "chat_template.jinja", "chat_template.json")


def write_weights(model: MergedModel, folder: Path, shard_size: int | None) -> list[str]:
    """Write the merged weights into ``folder`` and return the file names.

    Args:
        model: Merged model.
        folder: Existing folder.
        shard_size: Maximum bytes of tensors per file. A larger tensor gets a separate file. None means the same
            division as in the base model's files.
    """
    shards = split_shards(model.tensors, shard_size)
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    total = sum(output.bytes for output in model.tensors)
    num_bytes = 0
    with track_progress("merging", total) as advance:
        for name, shard in zip(names, shards, strict=True):
            # Wider types first, so that each tensor is aligned to its type.
            ordered = sorted(shard, key=lambda output: -output.dtype.itemsize)
            entries = [TensorEntry(output.name, output.dtype, output.shape) for output in ordered]
            with (folder / name).open("wb") as file, TensorWriter(file, entries, {"format": "pt"}) as writer:
                for output in ordered:
                    for rows in output.blocks():
                        writer.write(rows)
                        num_bytes += rows.numel() * rows.element_size()
                        advance(num_bytes)
    if count > 1:
        weights = {output.name: name for name, shard in zip(names, shards, strict=True) for output in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))})
    return names


def split_shards(outputs: Sequence[MergedTensor], size: int | None) -> list[list[MergedTensor]]:
    """Group the tensors by output file."""
    if size is None:
        files: dict[str, list[MergedTensor]] = {}
        for output in outputs:
            files.setdefault(output.file, []).append(output)
        return list(files.values())
    shards: list[list[MergedTensor]] = [[]]
    free_bytes = size
    for output in outputs:
        if output.bytes > free_bytes and shards[-1]:
            shards.append([])
            free_bytes = size
        shards[-1].append(output)
        free_bytes -= output.bytes
    return shards


def write_metadata_files(model: MergedModel, folder: Path) -> None:
    """Write all files except the weights: configuration, tokenizer, terminators and model card.

    The tokenizer and the chat template of the adapter's folder take precedence.
    """
    job, base, run = model.job, model.job.base, model.job.run
    has_tokenizer = any((run / name).is_file() for name in TOKENIZER_FILES)
    patterns = [*_COPIED, "*.py"] if base.trust_remote_code else _COPIED
    for source in {path for pattern in patterns for path in base.folder.glob(pattern) if path.is_file()}:
        is_replaced = has_tokenizer and source.name in RUN_TOKENIZER_FILES
        if base.outputs is not None and source.name in LAYOUT_FILES:
            continue  # they describe the vectors of the base model, which the merged model with a head does not return
        if not is_replaced and not any(source.match(pattern) for pattern in _NOT_COPIED):
            shutil.copyfile(source, folder / source.name)
    copy_system(run, folder)
    copy_layout(run, folder)
    for name in RUN_TOKENIZER_FILES if has_tokenizer else ("chat_template.jinja",):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    write_json(folder / CONFIG, model.config)
    if entry_of(base.task).generates_text:
        _write_terminators(base, folder)
    properties = {"adapter": str(run), "method": job.adapters[0].method, "precision": job.options.precision}
    if (recipe := job.options.recipe) is not None:
        folders = [run, *job.options.additional_adapters]
        parts = [f"{weight:g} × {path}" for weight, path in zip(recipe.weights, folders, strict=True)]
        properties["combined"] = f"{recipe.method}: {' + '.join(parts)}"
    title = f"`{base.reference}` with an adapter merged into its weights by deltaw {__version__}."
    tags = f"{job.adapters[0].method}, {base.task}, merged, deltaw"
    header = f"---\nbase_model: {base.reference!r}\nlibrary_name: transformers\ntags: [{tags}]\n---\n"
    table = "".join(f"| {name} | {value} |\n" for name, value in properties.items())
    (folder / "README.md").write_text(f"{header}\n{title}\n\n| | |\n| --- | --- |\n{table}", encoding="utf-8")


def _write_terminators(base: AdapterBase, folder: Path) -> None:
    """Add all tokens that end a text of this model to its generation configuration."""
    tokenizer, path = tokenizer_in(folder, base.trust_remote_code), folder / GENERATION
    if tokenizer is None:
        return
    terminators = terminators_in(folder, tokenizer)
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if terminators and isinstance(settings, dict):
        settings["eos_token_id"] = terminators if len(terminators) > 1 else terminators[0]
        settings.pop(FOLLOWS_MODEL, None)  # otherwise transformers regenerates the file with a single terminator
        write_json(path, settings)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
