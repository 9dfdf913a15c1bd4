"""A base model and what adapters change in it, as the tensors of one merged model, in its files' order.

Nothing is computed here before a tensor is asked for, and then a block of rows at a time: W + ΔW in fp32
(fp64 for fp64 weights), rounded once. Tensors keep the names that they have in the base's files. What
cannot be done by names alone raises :class:`NotByName`, and is done in memory by whoever asked.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.errors import UserError
from deltaw.export.adapters import Added, Change, Replaced
from deltaw.export.base import Base, Merging, check_base
from deltaw.hub.checkpoint import INDEX, WEIGHTS, Checkpoint, Names, name_for, names_on_disk, read_checkpoint
from deltaw.hub.sentence_layout import copy_layout
from deltaw.hub.terminators import terminators_in
from deltaw.hub.tokenizers import TOKENIZER_FILES, tokenizer_in
from deltaw.hub.transformers_private import FOLLOWS_MODEL
from deltaw.methods.parameters import names_of
from deltaw.tasks import entry_of
from deltaw.tensor_files import Entry, StoredTensor, TensorWriter, row_blocks
from deltaw.training.prompting import copy_system
from deltaw.version import __version__
from deltaw.working import working

# Of config.json no more is changed than the merge needs: weights that are tied no more, biases that the base has none
# of, a classifier's head and its classes, the type of the weights. Whether a model of that configuration takes exactly
# the merged tensors is checked by building one on the meta device.


_MOST_FLAGS = 6
_AGAIN, _SEPARATE = "fetch or copy the base model again", "keep the adapter separate"
CONFIG = "config.json"


@dataclass(frozen=True)
class MergedConfig:
    """What :func:`merged_config` made.

    Attributes:
        settings: the content of config.json.
        other_class: whether the model is of another class than the base's files were written by.
        zeros: biases that the configuration brings along and that nobody trained, and their shapes.
    """

    base: Base
    settings: dict[str, object]
    other_class: bool
    untied: tuple[str, ...]
    zeros: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def check(self, tensors: Iterable[Output]) -> None:
        """Refuse tensors that are not exactly those of a model of this configuration.

        Raises:
            UserError: one is missing or has another shape, or a weight is still tied.
        """
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        model = _built(self.base, self.settings)
        names = names_on_disk(model, shapes)
        own = names_of(model)
        for group in _groups(own):
            stored = [name for name in group if name in names.stored]
            wrong = [n for n in stored if shapes[names.stored[n]] != tuple(own[n].shape)]
            there = bool(stored) or any(name in names.converted for name in group)
            optional = any(".pooler." in name or name.startswith("pooler.") for name in group)
            if wrong or not (there or optional):
                raise UserError(f"the merged model would lack '{group[0]}'", where=str(self.base.folder), hint=_AGAIN)
            if len(group) > 1 and any(name in self.untied for name in group):
                pair = f"'{group[0]}' is tied to '{group[1]}', of which the adapter changes only one"
                what = f"{pair}, and a {type(model).__name__} cannot have them apart"
                raise UserError(what, where=group[0], hint=_SEPARATE)


def _groups(own: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each parameter of a model; several of one that is tied."""
    groups: dict[int, list[str]] = {}
    for name, parameter in own.items():
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


def read_settings(folder: Path) -> dict[str, object]:
    """The base model's config.json.

    Raises:
        UserError: it cannot be read, or the weights are quantized.
    """
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"the model's config.json cannot be read: {error}", where=str(folder), hint=_AGAIN) from error
    quantized = settings.get("quantization_config")
    if quantized:
        kind = quantized.get("quant_method") if isinstance(quantized, dict) else None
        what = f"the base model's weights are quantized ({kind or 'quantization_config'}), and a sum with ΔW is not"
        raise UserError(what, where=str(folder / CONFIG), hint="name the unquantized model with --model")
    return settings


def merged_config(
    base: Base,
    skeleton: PreTrainedModel,
    settings: Mapping[str, object],
    untied: Sequence[str],
    added: Mapping[str, object],
    dtype: torch.dtype | None,
) -> MergedConfig:
    """The configuration of the merged model.

    Args:
        skeleton: the base model as the adapter's task loads it, on the meta device.
        settings: the base's config.json.
        untied: names of weights that are tied no more.
        added: names of trained biases that the base model does not have.
        dtype: of all weights; None where they keep theirs.

    Raises:
        UserError: the architecture has no place for a bias.
    """
    made = copy.deepcopy(dict(settings))
    name = type(skeleton).__name__
    written_by = made.get("architectures") or [name]
    other_class = name not in (written_by if isinstance(written_by, list) else [written_by])
    if other_class or not made.get("architectures"):
        made["architectures"] = [name]
    if base.outputs is not None:
        labels = base.classes or tuple(f"LABEL_{number}" for number in range(base.outputs))
        made.pop("num_labels", None)
        made["id2label"] = {str(number): label for number, label in enumerate(labels)}
        made["label2id"] = {label: number for number, label in enumerate(labels)}
        if base.task == "regression":
            made["problem_type"] = "regression"
    # The configuration itself, and that of the text model inside one of several models.
    inner = made.get("text_config")
    for section in [made, inner] if isinstance(inner, dict) else [made]:
        if untied and (section is made or "tie_word_embeddings" in section):
            section["tie_word_embeddings"] = False
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and (key in section or (section is made and key == "dtype")):
                section[key] = str(dtype).removeprefix("torch.")
    zeros = _with_biases(base, skeleton, made, list(added)) if added else {}
    return MergedConfig(base, made, other_class, tuple(untied), zeros)


def _with_biases(
    base: Base, skeleton: PreTrainedModel, settings: dict[str, object], wanted: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Turn on the fewest flags of ``settings`` that give the model the biases ``wanted``; returns those that
    come with them. What a flag does is found by building a model on the meta device."""
    before = set(names_of(skeleton))
    config = skeleton.config
    flags = [k for k in vars(config) if "bias" in k and getattr(config, k) is False][:_MOST_FLAGS]
    for count in range(1, len(flags) + 1):
        for chosen in itertools.combinations(flags, count):
            own = names_of(_built(base, {**settings, **dict.fromkeys(chosen, True)}))
            if set(wanted) <= set(own) and before <= set(own):
                settings.update(dict.fromkeys(chosen, True))
                return {name: tuple(own[name].shape) for name in sorted(set(own) - before - set(wanted))}
    what = f"the adapter adds a bias '{wanted[0]}', for which a {type(skeleton).__name__} has no place"
    raise UserError(what, where=wanted[0], hint=_SEPARATE)


def _built(base: Base, settings: Mapping[str, object]) -> PreTrainedModel:
    """A model of a configuration, on the meta device."""
    with tempfile.TemporaryDirectory() as folder:
        for code in base.folder.glob("*.py") if base.trust_remote_code else ():
            (Path(folder) / code.name).write_bytes(code.read_bytes())
        (Path(folder) / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        return base.skeleton(Path(folder))


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
                broken = "the adapter is broken: look at it with deltaw inspect"
                hint = "use --precision bf16, whose range is that of fp32" if self.dtype == torch.float16 else broken
                what = f"the merged tensor '{self.name}' holds numbers that are not finite"
                raise UserError(what, where=self.name, hint=hint)
            yield made

    def whole(self) -> Tensor:
        """All of it."""
        return torch.cat(list(self.blocks())).view(self.shape)

    def _base_blocks(self, whole: bool = False) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of W: in the type that is computed in where W is changed, else as stored."""
        shape = self.shape or (1,)
        for start, stop in [(0, shape[0])] if whole else row_blocks(shape):
            rows = torch.zeros(stop - start, *shape[1:]) if self.source is None else self.source.rows(start, stop)
            if self.changes:
                rows = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
            yield start, rows


@dataclass(frozen=True)
class MergedModel:
    """A merged model that is not written yet.

    Attributes:
        job: what is merged.
        tensors: all of it. config: the content of its config.json.
        changed: names of the model's parameters that differ from the base's, and their change.
        untied: names of tied weights that are tied no more.
        dropped: tensors of the base's files that the merged model has no use for.
        same_base: whether the adapters were trained on this base; None where that is not known.
        notes: what a person should be told.
    """

    job: Merging
    tensors: tuple[Output, ...]
    config: Mapping[str, object]
    changed: Mapping[str, Change]
    untied: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    same_base: bool | None = None
    notes: tuple[str, ...] = field(default=())


def assemble(job: Merging) -> MergedModel:
    """The merged model of a base and changes to it.

    Raises:
        UserError: it cannot be merged.
        NotByName: the base's files do not hold its weights one by one.
    """
    base, dtype = job.base, PRECISIONS.get(job.options.precision)
    skeleton = base.skeleton()
    checkpoint = read_checkpoint(base.folder)
    names = names_on_disk(skeleton, checkpoint.tensors)
    settings = read_settings(base.folder)
    same = job.same_base(check_base(base, skeleton, checkpoint, names, one) for one in job.adapters)
    plan = _Plan(job, skeleton, checkpoint, names)
    config = merged_config(base, skeleton, settings, plan.untied, plan.added, dtype)
    drop = names.unused if config.other_class else ()
    outputs = plan.outputs(set(drop), config.zeros)
    config.check(outputs)
    changed = {name: one.change for name, one in {**plan.wanted, **plan.added}.items()}
    notes = tuple(_notes(base, same, plan.untied))
    return MergedModel(job, tuple(outputs), config.settings, changed, plan.untied, tuple(drop), same, notes)


# By a run's precision, what its adapter was trained on, and what it is merged into.
_TRAINED_ON = {
    "int8": "int8-quantized weights; it is merged into the weights that were quantized, as they are in the base "
    "model's files",
    "nf4": "weights in NF4; it is merged into the weights that were rounded, as they are in the base model's files, "
    "on which it acts a little differently",
    "gguf": "the blocks of a .gguf file; it is merged into these blocks' values, which are no longer in blocks",
}


def _notes(base: Base, same: bool | None, untied: Sequence[str]) -> Iterator[str]:
    if same is False:
        yield f"'{base.reference}' is another base model than the adapter was trained on, as asked"
    elif same is None:
        yield "whether this is the base model that the adapter was trained on cannot be told from its file"
    if base.run is not None and base.run.precision in _TRAINED_ON:
        yield f"the adapter was trained on {_TRAINED_ON[base.run.precision]}"
    for name in untied:
        yield f"'{name}' was tied to another weight and is not any more: the two differ now"


def usual_type(tensors: Iterable[StoredTensor]) -> torch.dtype | None:
    """The type of most floating-point numbers; None without any."""
    counts: Counter[torch.dtype] = Counter()
    for stored in tensors:
        if stored.is_float:
            counts[stored.dtype] += stored.numel
    return max(counts, key=counts.__getitem__) if counts else None


class _Plan:
    """Which changes each tensor of the base's files gets, which tied weights come apart, and what is new.

    Attributes:
        wanted, added: the changes by the parameter's name: of the model's own ones, and of those that it lacks.
        untied: names of tied weights that are tied no more.
    """

    def __init__(self, job: Merging, skeleton: PreTrainedModel, checkpoint: Checkpoint, names: Names) -> None:
        self._checkpoint, self._names, self._skeleton = checkpoint, names, skeleton
        self._dtype = PRECISIONS.get(job.options.precision)
        own = names_of(skeleton)
        groups = _groups(own)
        self._group = {name: group for group in groups for name in group}
        self._shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
        self.wanted = {name: one for one in job.trained for name in one.names if name in own}
        self.added = {name: one for one in job.trained for name in one.names if name not in own}
        apart = [group for group in groups if len({id(self.wanted.get(name)) for name in group}) > 1]
        self.untied = tuple(name for group in apart for name in group[1:])
        for name, one in self.wanted.items():
            if any(other in names.converted for other in self._group[name]):
                raise NotByName(f"the files hold '{name}' in parts that are put together while it is loaded")
            if not one.new and not any(other in names.stored for other in self._group[name]):
                raise UserError(f"the base model's files lack '{name}'", where=name, hint=_AGAIN)

    def outputs(self, dropped: set[str], zeros: Mapping[str, tuple[int, ...]]) -> list[Output]:
        """The tensors of the base's files, then the new ones: weights that were tied, heads, biases."""
        parameter_of = {stored: name for name, stored in self._names.stored.items()}
        kept = {name: stored for name, stored in self._checkpoint.tensors.items() if name not in dropped}
        outputs = [self._of_file(name, stored, parameter_of.get(name)) for name, stored in kept.items()]
        last = self._checkpoint.files[-1]
        usual = self._dtype or usual_type(self._checkpoint.tensors.values()) or torch.float32

        def new(parameter: str, shape: tuple[int, ...], changes: tuple[Change, ...]) -> Output:
            source = self._source(parameter) if parameter in self.untied else None
            dtype, file = (usual, last) if source is None else (self._type(source), source.file.name)
            return Output(self._name(parameter), dtype, shape, source, changes, file)

        for parameter in self.untied:
            if parameter not in self._names.stored:
                outputs.append(new(parameter, self._shapes[parameter], self._changes(parameter)))
        for parameter, one in {**self.wanted, **self.added}.items():
            group = self._group.get(parameter, [parameter])
            if parameter != group[0] or any(name in self._names.stored for name in group):
                continue
            if not isinstance(one.change, Replaced | Added):
                what = f"the adapters trained '{parameter}' whole, and the base model lacks it, so it is not combined"
                raise UserError(what, where=parameter, hint="merge one of them")
            outputs.append(new(parameter, one.shape, (one.change,)))
        return outputs + [new(parameter, shape, ()) for parameter, shape in zeros.items()]

    def _changes(self, name: str) -> tuple[Change, ...]:
        found = self.wanted.get(name) or self.added.get(name)
        return () if found is None else (found.change,)

    def _of_file(self, name: str, stored: StoredTensor, parameter: str | None) -> Output:
        source: StoredTensor = stored
        changes: tuple[Change, ...] = ()
        if parameter is not None:
            group = self._group.get(parameter, [parameter])
            changes = self._changes(parameter)
            if any(other in self.untied for other in group):
                source = self._source(parameter) or stored
            elif not changes:
                changes = next((c for other in group if (c := self._changes(other))), ())
            shape = self._shapes.get(parameter)
            if changes and shape != stored.shape:
                what = f"'{name}' is {stored.shape} in the base model's file and {shape} in the model"
                hint = "fetch the model again, or check that config.json belongs to the weights"
                raise UserError(what, where=str(stored.file), hint=hint)
        return Output(name, self._type(source), source.shape, source, changes, stored.file.name)

    def _source(self, parameter: str) -> StoredTensor | None:
        """The base's tensor behind a parameter that may be tied: that of the first of its names."""
        stored = [self._names.stored[name] for name in self._group[parameter] if name in self._names.stored]
        return self._checkpoint.tensors[stored[0]] if stored else None

    def _type(self, source: StoredTensor) -> torch.dtype:
        return self._dtype if self._dtype is not None and source.is_float else source.dtype

    def _name(self, parameter: str) -> str:
        """How a file names a parameter; a bias that the base model has no place for, as its weight."""
        if parameter in self._group:
            found = name_for(self._skeleton, parameter, self._names)
        else:
            found = self._names.stored.get(f"{parameter.removesuffix('bias')}weight")
            found = found and f"{found.removesuffix('weight')}bias"
        if found is None:
            raise NotByName(f"how a file would name '{parameter}' cannot be told")
        return found


# Configuration, tokenizer, chat template and terminators come from the base
# model, and from the run where that has its own.


GENERATION = "generation_config.json"
# Of the base model: what describes it, and no other weights.
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
_NOT_COPIED = (CONFIG, "*.index.json", "adapter_config.json", "run.yaml", "run.json", "summary.json")
OF_TOKENIZER = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def write_weights(model: MergedModel, folder: Path, shard_size: int | None) -> list[str]:
    """Write the merged weights into ``folder``; returns the files' names.

    Args:
        shard_size: the most bytes of tensors in a file (a larger tensor has a file of its own); None divides
            them as the base model's files do.
    """
    shards = shards_of(model.tensors, shard_size)
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    total = sum(output.bytes for output in model.tensors)
    done = 0
    with working("merging", total) as advance:
        for name, shard in zip(names, shards, strict=True):
            # Wider types first, so that each tensor lies aligned to its type.
            ordered = sorted(shard, key=lambda output: -output.dtype.itemsize)
            entries = [Entry(output.name, output.dtype, output.shape) for output in ordered]
            with (folder / name).open("wb") as file, TensorWriter(file, entries, {"format": "pt"}) as writer:
                for output in ordered:
                    for rows in output.blocks():
                        writer.write(rows)
                        done += rows.numel() * rows.element_size()
                        advance(done)
    if count > 1:
        weights = {output.name: name for name, shard in zip(names, shards, strict=True) for output in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))})
    return names


def shards_of(outputs: Sequence[Output], size: int | None) -> list[list[Output]]:
    """The tensors by the file that they will be in."""
    if size is None:
        files: dict[str, list[Output]] = {}
        for output in outputs:
            files.setdefault(output.file, []).append(output)
        return list(files.values())
    shards: list[list[Output]] = [[]]
    room = size
    for output in outputs:
        if output.bytes > room and shards[-1]:
            shards.append([])
            room = size
        shards[-1].append(output)
        room -= output.bytes
    return shards


def write_beside(model: MergedModel, folder: Path) -> None:
    """Write all but the weights: configuration, tokenizer, terminators, a card.

    The tokenizer and the chat template of the adapter's folder come before the base model's.
    """
    job, base, run = model.job, model.job.base, model.job.run
    own_tokenizer = any((run / name).is_file() for name in TOKENIZER_FILES)
    for source in _described_by(base, own_tokenizer):
        shutil.copyfile(source, folder / source.name)
    copy_system(run, folder)
    copy_layout(run, folder)
    for name in OF_TOKENIZER if own_tokenizer else ("chat_template.jinja",):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    write_json(folder / CONFIG, model.config)
    if entry_of(base.task).writes_text:
        _write_terminators(base, folder)
    facts = {"adapter": str(run), "method": job.adapters[0].method, "precision": job.options.precision}
    if (recipe := job.options.recipe) is not None:
        folders = [run, *job.options.others]
        parts = [f"{weight:g} × {one}" for weight, one in zip(recipe.weights, folders, strict=True)]
        facts["combined"] = f"{recipe.method}: {' + '.join(parts)}"
    title = f"`{base.reference}` with an adapter merged into its weights by deltaw {__version__}."
    tags = f"{job.adapters[0].method}, {base.task}, merged, deltaw"
    header = f"---\nbase_model: {base.reference!r}\nlibrary_name: transformers\ntags: [{tags}]\n---\n"
    table = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    (folder / "README.md").write_text(f"{header}\n{title}\n\n| | |\n| --- | --- |\n{table}", encoding="utf-8")


def _described_by(base: Base, own_tokenizer: bool) -> list[Path]:
    """The base model's files that the merged model needs too."""
    patterns = [*_COPIED, "*.py"] if base.trust_remote_code else list(_COPIED)
    found = {path for pattern in patterns for path in base.folder.glob(pattern) if path.is_file()}
    left = {path for pattern in _NOT_COPIED for path in found if path.match(pattern)}
    if own_tokenizer:
        left |= {path for path in found if path.name in OF_TOKENIZER}
    return sorted(found - left)


def _write_terminators(base: Base, folder: Path) -> None:
    """Let every token that ends a text of this model be in its generation configuration."""
    tokenizer = tokenizer_in(folder, base.trust_remote_code)
    if tokenizer is None:
        return
    ends = terminators_in(folder, tokenizer)
    path = folder / GENERATION
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if ends and isinstance(settings, dict):
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        settings.pop(FOLLOWS_MODEL, None)  # it would be made anew from config.json, with one end
        write_json(path, settings)


def write_json(path: Path, value: object) -> None:
    """Write a value as an indented JSON file."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
