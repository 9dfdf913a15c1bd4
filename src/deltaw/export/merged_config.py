"""Configuration of a merged model.

The merge changes config.json only if required: untied weights, added biases, a classification head with its classes,
and the type of the weights. A model built from the new configuration on the meta device must match the merged tensors.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.errors import UserError
from deltaw.export.base import AdapterBase
from deltaw.export.merge_plan import MergePlan
from deltaw.hub.parameter_names import match_names
from deltaw.methods.parameters import parameters_by_name
from deltaw.settings.task_registry import entry_of

_MAX_FLAGS = 6
DAMAGED_HINT = "download or copy the base model again"
_SEPARATE = "keep the adapter separate"
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

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that tensors with these names and shapes are exactly those of a model with this configuration.

        Raises:
            UserError: if a tensor is missing or has another shape, or a changed weight is still tied.
        """
        model = _build(self.base, self.settings)
        names = match_names(model, shapes)
        parameters = parameters_by_name(model)
        for group in tied_names(parameters):
            stored = [name for name in group if name in names.stored]
            mismatched = [n for n in stored if shapes[names.stored[n]] != tuple(parameters[n].shape)]
            exists = bool(stored) or any(name in names.converted for name in group)
            optional = any(".pooler." in name or name.startswith("pooler.") for name in group)
            if mismatched or not (exists or optional):
                raise UserError(
                    f"the merged model lacks '{group[0]}'", location=str(self.base.folder), hint=DAMAGED_HINT
                )
            if len(group) > 1 and any(name in self.untied for name in group):
                pair = f"'{group[0]}' is tied to '{group[1]}', of which the adapter changes only one"
                message = f"{pair}, and {type(model).__name__} cannot untie them"
                raise UserError(message, location=group[0], hint=_SEPARATE)


def tied_names(parameters: Mapping[str, Tensor]) -> list[list[str]]:
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
        raise UserError(f"the config.json cannot be read: {error}", location=str(folder), hint=DAMAGED_HINT) from error
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
