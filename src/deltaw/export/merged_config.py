"""The config.json of a merged model: the base's own, with no more changed than the merge needs.

Weights that are tied no more, biases that the base has none of, a classifier's head and its classes, the type
of the weights. Whether a model of that configuration takes exactly the merged tensors is checked by building
one on the meta device.
"""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel

from deltaw.errors import UserError
from deltaw.export.base import Base
from deltaw.hub.checkpoint import names_on_disk
from deltaw.methods.parameters import names_of

_MOST_FLAGS = 6
CONFIG = "config.json"


class Shaped(Protocol):
    """A tensor to be written."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


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

    def check(self, tensors: Iterable[Shaped]) -> None:
        """Refuse tensors that are not exactly those of a model of this configuration.

        Raises:
            UserError: one is missing or has another shape, or a weight is still tied.
        """
        shapes = {tensor.name: tuple(tensor.shape) for tensor in tensors}
        model = _built(self.base, self.settings)
        names = names_on_disk(model, shapes)
        groups: dict[int, list[str]] = {}
        own = names_of(model)
        for name, parameter in own.items():
            groups.setdefault(id(parameter), []).append(name)
        for group in groups.values():
            stored = [name for name in group if name in names.stored]
            wrong = [n for n in stored if shapes[names.stored[n]] != tuple(own[n].shape)]
            there = bool(stored) or any(name in names.converted for name in group)
            optional = any(".pooler." in name or name.startswith("pooler.") for name in group)
            if wrong or not (there or optional):
                raise UserError(
                    f"the merged model would lack '{group[0]}'",
                    where=str(self.base.folder),
                    hint="fetch or copy the base model again",
                )
            if len(group) > 1 and any(name in self.untied for name in group):
                raise UserError(
                    f"'{group[0]}' is tied to '{group[1]}', the adapter changes only one of the two, and a "
                    f"{type(model).__name__} cannot have them apart",
                    where=group[0],
                    hint="keep the adapter separate",
                )


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
        raise UserError(
            f"the model's config.json cannot be read: {error}",
            where=str(folder),
            hint="fetch or copy the model again",
        ) from error
    quantized = settings.get("quantization_config")
    if quantized:
        kind = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise UserError(
            f"the base model's weights are quantized ({kind or 'quantization_config'}), and a sum with ΔW "
            "would have to be quantized again",
            where=str(folder / CONFIG),
            hint="name the unquantized model with --model",
        )
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
    for section in _sections(made):
        if untied and (section is made or "tie_word_embeddings" in section):
            section["tie_word_embeddings"] = False
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and (key in section or (section is made and key == "dtype")):
                section[key] = str(dtype).removeprefix("torch.")
    zeros: dict[str, tuple[int, ...]] = {}
    if added:
        zeros = _with_biases(base, skeleton, made, list(added))
    return MergedConfig(base, made, other_class, tuple(untied), zeros)


def _sections(settings: dict[str, object]) -> Iterator[dict[str, object]]:
    """The configuration itself, and that of the text model inside one of several models."""
    yield settings
    inner = settings.get("text_config")
    if isinstance(inner, dict):
        yield inner


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
                new = set(own) - before - set(wanted)
                return {name: tuple(own[name].shape) for name in sorted(new)}
    raise UserError(
        f"the adapter adds a bias '{wanted[0]}', for which a {type(skeleton).__name__} has no place",
        where=wanted[0],
        hint="keep the adapter separate",
    )


def _built(base: Base, settings: Mapping[str, object]) -> PreTrainedModel:
    """A model of a configuration, on the meta device."""
    with tempfile.TemporaryDirectory() as folder:
        for code in base.folder.glob("*.py") if base.trust_remote_code else ():
            (Path(folder) / code.name).write_bytes(code.read_bytes())
        (Path(folder) / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        return base.skeleton(Path(folder))
