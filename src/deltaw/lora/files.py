"""Save and load adapters in PEFT's format, compatible with PEFT and vLLM in both directions, or read only A and B.

Only safetensors files are read, never pickles, and no hub is contacted. A file with a tensor that does not fit is
rejected before the model is changed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import safetensors
import torch
from torch import Tensor, nn

from deltaw import atomic_files, platforms
from deltaw.errors import UserError, did_you_mean
from deltaw.lora import peft_format
from deltaw.lora.adapt import Summary, attach_selected, detach, require_unadapted
from deltaw.lora.adapted import AdaptedLayer
from deltaw.lora.attachment import Attachment, adapter_parameters, count_parameters, require_attachment, unwrap_model
from deltaw.lora.complete_names import complete_names
from deltaw.lora.config import CHANGING_INITS, LoRAConfig, scaling
from deltaw.lora.fingerprint import FINGERPRINT_KEY, warn_other_base
from deltaw.lora.kinds import is_linear, linear_sizes
from deltaw.lora.layers import LoRAConv, LoRALayer
from deltaw.lora.peft_format import PREFIX, FilePaths, without_wrappers
from deltaw.lora.select import (
    NamedModule,
    Selection,
    Target,
    format_names,
    matched_names,
    select,
    unique_modules,
    values_by_pattern,
)
from deltaw.tensor_files import TensorFile, save_tensors
from deltaw.untrusted_paths import require_contained
from deltaw.user_references import record_reference

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"

_MAX_NAME_LENGTH = 2000  # since names are split at every dot
_COPY_AGAIN = "copy or download the adapter again"
_MERGE = "merge it into a separate model: deltaw merge"
_BASE_HINT = "load it on the base model that it was trained on"
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class AdapterFile(NamedTuple):
    """An adapter on disk.

    Attributes:
        config: Settings of the adapter.
        tensors: Tensors by their names and in their orientation in the file.
        metadata: Metadata of the weights file, with ``base_model_name_or_path``, ``task_type`` and ``peft_version`` if
            set.
    """

    config: LoRAConfig
    tensors: Mapping[str, Tensor]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Factors:
    """The update of one linear layer: y += scaling · (x·A)·B.

    The tensors may be views of a file's or a layer's memory.

    Attributes:
        lora_A: (in, r) fp32.
        lora_B: (r, out) fp32.
        scaling: Factor of A·B.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


@dataclass(frozen=True)
class AdapterFactors:
    """The factors of an adapter.

    Attributes:
        config: Settings of the adapter.
        layers: Factors by the layer's name in the model, in model order.
        metadata: See :class:`AdapterFile`.
    """

    config: LoRAConfig
    layers: Mapping[str, Factors]
    metadata: Mapping[str, str]


class AdapterTensors(Mapping[str, Tensor]):
    """Mapping of an adapter's tensors by their names in the file, each converted when it is accessed.

    Some are stored differently in the model, and copies of all would double the memory of the trained parameters.
    """

    def __init__(self, record: Attachment) -> None:
        paths = FilePaths(record)
        self._factories: dict[str, Callable[[], Tensor]] = {}
        for name, layer in record.updated():
            path = paths.of_layer(name)
            doubled = paths.counts_twice(name)
            for key, _ in peft_format.file_tensors(path, layer):
                self._factories[key] = partial(_layer_tensor, path, layer, key, doubled)
        for bias in record.biases:
            self._factories[paths.of_parameter(bias.name)] = bias.parameter.detach
        for extra in record.extra_modules:
            for key, value in extra.current.state_dict().items():
                self._factories[f"{paths.of_module(extra.names[0])}.{key}"] = value.detach
        if (mapping := record.complete_names) is not None:
            items = self._factories.items()
            self._factories = {PREFIX + mapping.to_complete(key.removeprefix(PREFIX)): make for key, make in items}

    def __getitem__(self, name: str) -> Tensor:
        return self._factories[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._factories)

    def __len__(self) -> int:
        return len(self._factories)


def _layer_tensor(path: str, layer: AdaptedLayer, key: str, counts_twice: bool) -> Tensor:
    tensor = next(tensor for name, tensor in peft_format.file_tensors(path, layer) if name == key)
    return tensor / 2 if counts_twice and key.endswith("lora_B.weight") else tensor


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str | None = None,
    task_type: str | None = "auto",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` atomically.

    Args:
        model: Model with an attached adapter.
        folder: Folder to write to. Created if it does not exist.
        base_model: Reference of the base model. None uses the model's ``name_or_path``.
        task_type: PEFT's name of the task (``CAUSAL_LM``, ``SEQ_CLS``, …) or None. "auto" derives it from the model's
            class.
        metadata: Additional metadata of the weights file.

    Raises:
        UserError: if no adapter is attached, the folder cannot be written, or the adapter was merged permanently after
            an initialization that changed W.
    """
    model = unwrap_model(model)
    record = require_attachment(model)
    if base_model is None:
        base_model = str(getattr(model, "name_or_path", "") or "") or None
    if task_type == "auto":
        task_type = task_type_of(model)
        # PEFT expects a trained head for these tasks.
        if task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and not record.extra_modules:
            task_type = None
    init = record.config.init
    if init in CHANGING_INITS and any(layer.changed_init is None for _, layer in record.adapted()):
        message = f"an adapter with init '{init}' cannot be saved after a merge without keeping the original weights"
        raise UserError(message, hint="merge with keep_original=True")
    settings = peft_format.adapter_settings(model, record, base_model, task_type)
    metadata = {**(metadata or {}), **({FINGERPRINT_KEY: record.fingerprint} if record.fingerprint else {})}
    write_adapter(Path(folder), AdapterTensors(record), settings, metadata)


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, object], metadata: Mapping[str, str]
) -> None:
    """Write an adapter's two files atomically."""
    save_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt", **metadata})
    atomic_files.write_text(folder / CONFIG_NAME, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    if (base_model := peft_format.base_reference(settings)) is not None:
        record_reference("model", base_model)


def load_adapter(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> Summary:
    """Attach the adapter in ``folder`` to ``model``, in place.

    The tensors determine the adapted modules, and the settings must be consistent with them.

    Args:
        model: Base model that the adapter was trained on. Emits :class:`OtherBaseModelWarning` if the file's
            fingerprint is that of a different model.
        folder: Local folder.
        trainable: If True, the adapter's parameters are trainable.

    Raises:
        UserError: if files are missing or damaged, a tensor does not fit (the message has both shapes) or is missing,
            or the adapter uses unsupported features. The model is then unchanged.
    """
    model = unwrap_model(model)
    require_unadapted(model)
    location = str(Path(folder) / WEIGHTS_NAME)
    adapter = with_model_names(model, read_adapter(folder), location)
    summary = attach_selected(model, adapter.config, stored_selection(model, adapter, location), init_factors=False)
    try:
        record = require_attachment(model)
        fill(model, record, adapter, location)
    except BaseException:
        detach(model)
        raise
    if not trainable:
        for _, parameter in adapter_parameters(model):
            parameter.requires_grad_(False)
    base_name = adapter.metadata.get("base_model_name_or_path")
    warn_other_base("the adapter", adapter.metadata, record.fingerprint, folder, base_name)
    count = count_parameters(model)
    return replace(summary, total=count.total, trained=count.trained, per_module=count.per_module)


def read_adapter(folder: str | Path, *, lazy: bool = False) -> AdapterFile:
    """Read the adapter in ``folder`` without a model. With ``lazy``, each access reads a tensor from the file.

    Raises:
        UserError: if files are missing or damaged, or the adapter uses unsupported features.
    """
    folder = Path(folder)
    if not folder.is_dir():
        hint = "use a local folder; an adapter on a hub must be downloaded first"
        raise UserError(f"there is no adapter folder '{folder}'", location=str(folder), hint=hint)
    require_contained(folder)
    settings = read_settings(folder / CONFIG_NAME)
    config = peft_format.parse_config(settings, str(folder / CONFIG_NAME))
    tensors, metadata = _open_tensors(folder) if lazy else read_tensors(folder)
    if (longest := max(map(len, tensors), default=0)) > _MAX_NAME_LENGTH:
        raise _damaged_error(folder / WEIGHTS_NAME, f"a tensor's name has {longest:,} characters")
    for key in ("base_model_name_or_path", "task_type", "peft_version"):
        if isinstance(value := settings.get(key), str):
            metadata.setdefault(key, value)
    return AdapterFile(config, tensors, metadata)


def with_model_names(model: nn.Module, adapter: AdapterFile, location: str) -> AdapterFile:
    """Return an adapter with tensors by their names in the model, which may be a text view.

    Raises:
        UserError: as in :func:`names_in_model`.
    """
    if complete_names(model) is None:
        return adapter
    names = names_in_model(model, (key.removeprefix(PREFIX) for key in adapter.tensors), location)
    return adapter._replace(tensors={PREFIX + names[k.removeprefix(PREFIX)]: t for k, t in adapter.tensors.items()})


def names_in_model(model: nn.Module, names: Iterable[str], location: str) -> dict[str, str]:
    """Return the name in the model of each name in a file, which differ for a text view.

    Raises:
        UserError: if the file changes modules of the complete model that the view lacks.
    """
    if (mapping := complete_names(model)) is None:
        return {name: name for name in names}
    converted = {name: mapping.from_complete(name) for name in names}
    if others := [name for name, view_name in converted.items() if view_name is None]:
        modules = dict.fromkeys(peft_format.factor_module(name) or name for name in others)
        message = f"the adapter changes modules outside of the language model: {format_names(list(modules))}"
        hint = f"{_MERGE}; to continue its training, set lora.vision_tower: true"
        raise UserError(message, location=location, hint=hint)
    return {name: view_name for name, view_name in converted.items() if view_name is not None}


def read_factors(model: nn.Module, folder: str | Path) -> AdapterFactors:
    """Read the factors in ``folder`` for ``model``, which has no adapter and is not changed.

    Used to serve several adapters on one model. Names and shapes are checked as in :func:`load_adapter`.

    Raises:
        UserError: if files are missing or damaged, a tensor is missing or does not fit, or a value is not finite. Also
            if the adapter has more than low-rank factors of linear layers.
    """
    location = str(Path(folder) / WEIGHTS_NAME)
    adapter = read_adapter(folder)
    if (reason := unsupported_reason(adapter.config)) is not None:
        raise UserError(reason, location=str(folder), hint=f"{_MERGE} {folder}")
    adapter = with_model_names(model, adapter, location)
    remaining = dict(adapter.tensors)
    layers: dict[str, Factors] = {}
    for target in stored_selection(model, adapter, location).targets:
        name = target.names[0]
        rank = target.rank
        path = PREFIX + next((n for n in target.names if f"{PREFIX}{n}.lora_A.weight" in remaining), name)
        if not is_linear(target.module):
            message = f"it adapts '{name}', which is a {type(target.module).__name__}, not a linear layer"
            raise UserError(message, location=location, hint=_MERGE)
        inputs, outputs = linear_sizes(target.module)
        lora_A = _pop_tensor(remaining, f"{path}.lora_A.weight", (rank, inputs), location).t().float()
        lora_B = _pop_tensor(remaining, f"{path}.lora_B.weight", (outputs, rank), location).t().float()
        layers[name] = Factors(lora_A, lora_B, scaling(rank, target.alpha, adapter.config.rslora))
    _check_leftovers(model, Attachment(adapter.config, None), remaining, location)
    for name, factors in layers.items():
        # min and max are NaN if any value is. NumPy uses one thread, so that it does not slow down generation.
        values = [factor.numpy() for factor in (factors.lora_A, factors.lora_B) if factor.numel()]
        if not all(math.isfinite(array.min()) and math.isfinite(array.max()) for array in values):
            hint = "use an earlier checkpoint of the adapter"
            raise UserError(f"the factors of '{name}' have values that are not finite", location=location, hint=hint)
    return AdapterFactors(adapter.config, layers, adapter.metadata)


def unsupported_reason(config: LoRAConfig) -> str | None:
    """Return a sentence about parts of an adapter other than factors, or None if it has none."""
    if config.dora:
        return "it is a DoRA adapter (use_dora), whose magnitudes change the base weights"
    if config.bias != "none":
        return f"it has trained biases of the base model (bias: {config.bias})"
    if config.lora_bias:
        return "it has biases on its factors (lora_bias)"
    if config.train_modules:
        return f"it has modules trained in full (modules_to_save): {', '.join(config.train_modules)}"
    if config.target_parameters:
        return f"it adapts parameters (target_parameters): {', '.join(config.target_parameters)}"
    if config.trainable_token_indices:
        return "it has trained rows of token embeddings (trainable_token_indices)"
    if config.init in CHANGING_INITS:
        return f"its initialization '{config.init}' changed the base weights"
    return None


def read_settings(path: Path) -> dict[str, object]:
    """Read a JSON object from a file of an adapter's folder, such as its settings.

    Raises:
        UserError: if the file is missing or not a JSON object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = "use a folder that an adapter was saved in"
        raise UserError(f"the folder has no {path.name}", location=str(path.parent), hint=hint) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read: {error}", location=str(path), hint=_COPY_AGAIN) from error
    if not isinstance(settings, dict):
        raise UserError(f"{path.name} is not a JSON object", location=str(path), hint=_COPY_AGAIN)
    return settings


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of the weights file in an adapter's folder.

    Raises:
        UserError: if the file is missing, damaged, or a pickle.
    """
    path = find_weights(folder)
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if platforms.WINDOWS:  # a file with mapped tensors cannot be replaced
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            return tensors, dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _damaged_error(path, error) from error


def _open_tensors(folder: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    path = find_weights(folder)
    try:
        file = TensorFile(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged_error(path, error) from error
    return file, dict(file.metadata)


def find_weights(folder: Path) -> Path:
    """Return the path of the weights file in an adapter's folder.

    Raises:
        UserError: if it is missing or a pickle.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        if (folder / PICKLED_NAME).exists():
            message = f"the adapter is in {PICKLED_NAME}, a pickle, which is not read because it can execute any code"
            hint = f"ask its author for a {WEIGHTS_NAME}"
            raise UserError(message, location=str(folder / PICKLED_NAME), hint=hint)
        raise UserError(f"the folder has no {WEIGHTS_NAME}", location=str(folder), hint=_COPY_AGAIN)
    return path


def _damaged_error(path: Path, error: Exception | str) -> UserError:
    return UserError(f"{WEIGHTS_NAME} is cut off or damaged: {error}", location=str(path), hint=_COPY_AGAIN)


def stored_selection(model: nn.Module, adapter: AdapterFile, location: str) -> Selection:
    """Return the modules that are adapted and trained in full according to the file's tensors.

    Raises:
        UserError: if tensors and settings are inconsistent or do not fit the model.
    """
    config = adapter.config
    tensors = adapter.tensors
    modules = unique_modules(model)
    by_name = {name: entry for entry in modules for name in entry.names}
    extra = _extra_modules(config, tensors, modules)
    selection = select(model, config, strict=False)
    parameter_names = {name for parameter in selection.parameters for name in parameter.names}
    mapping = complete_names(model)
    ranks = values_by_pattern("rank_pattern", config.rank_pattern, by_name, mapping)
    alphas = values_by_pattern("alpha_pattern", config.alpha_pattern, by_name, mapping)
    targets: dict[str, Target] = {}
    for tensor_name in tensors:
        name = peft_format.factor_module(tensor_name)
        if name is None or name in targets or name in parameter_names:
            continue
        if name not in by_name:
            hint = did_you_mean(name, by_name) + "; is it the base model that the adapter was trained on?"
            raise UserError(f"tensor '{tensor_name}' matches no module of the model", location=location, hint=hint)
        parent = by_name.get(name.rpartition(".")[0])
        if parent is not None and isinstance(parent.module, nn.MultiheadAttention):
            continue  # one of the two projections of an attention, which is selected by the attention's name
        entry = by_name[name]
        rank = int(ranks.get(name, config.rank))
        alpha = alphas.get(name, config.alpha)
        targets[name] = Target((name, *(n for n in entry.names if n != name)), entry.module, rank, alpha)
    if not (targets or selection.parameters or selection.tokens):
        raise UserError("the file contains no LoRA factors", location=location, hint="save the adapter again")
    ordered = [targets[name] for entry in modules for name in entry.names if name in targets]
    extra_module_ids = {id(inner) for extra_module in extra for inner in extra_module.module.modules()}
    for target in selection.targets:
        if not any(name in targets for name in target.names) and id(target.module) not in extra_module_ids:
            missing = f"{PREFIX}{target.names[0]}.lora_A.weight"
            message = f"tensor '{missing}' is missing, although the settings name its module"
            raise UserError(message, location=location, hint=f"{_BASE_HINT}, or save the adapter again")
    return Selection(ordered, extra, selection.parameters, selection.tokens, selection.matches)


def _extra_modules(config: LoRAConfig, tensors: Mapping[str, Tensor], modules: list[NamedModule]) -> list[NamedModule]:
    """Return the extra trainable modules that the file has tensors for. PEFT matches them by name suffix."""
    if not config.train_modules:
        return []
    stored = {without_wrappers(name) for name in tensors}
    parents = {name[: match.start()] for name in stored for match in re.finditer(r"\.", name)}
    entries = tuple(config.train_modules)
    matched = [m for m in modules if m.names[0] in parents and any(n.endswith(entries) for n in matched_names(m))]
    nested = {id(inner) for m in matched for inner in m.module.modules() if inner is not m.module}
    return [m for m in matched if id(m.module) not in nested]


def fill(
    model: nn.Module,
    record: Attachment,
    adapter: AdapterFile,
    location: str,
    *,
    pad: bool = False,
    new_modules: Container[str] = (),
) -> None:
    """Copy every tensor of the file to the model.

    Args:
        model: Model with the adapter attached.
        record: Record of the attachment.
        adapter: Adapter to copy.
        location: File of the adapter, for messages.
        pad: Copy factors of a lower rank than the layer's to its first directions.
        new_modules: Extra trainable modules that the file does not contain.

    Raises:
        UserError: if a tensor is missing or left over.
    """
    unread = dict(adapter.tensors)
    doubled = peft_format.attention_counts_twice(adapter.metadata.get("peft_version"))
    paths = FilePaths(record)
    with torch.no_grad():
        for name, layer in record.updated():
            for key, attribute in peft_format.tensor_names(paths.of_layer(name), layer):
                param = getattr(layer, attribute)
                part = first_directions(
                    layer, attribute, stored_rank(layer, attribute, unread.get(key)) if pad else None
                )
                loaded = _pop_tensor(unread, key, peft_format.to_file_layout(part, attribute, layer).shape, location)
                if doubled and attribute == "lora_B" and paths.counts_twice(name):
                    loaded = loaded * 2
                loaded = peft_format.from_file_layout(loaded, attribute, layer)
                if part.shape == param.shape:
                    setattr(layer, attribute, _fill_tensor(param, loaded))
                else:
                    _fill_tensor(part, loaded)
        for bias in record.biases:
            key = paths.of_parameter(bias.name)
            values = _pop_tensor(unread, key, bias.parameter.shape, location)
            if bias.parameter.is_meta:
                bias.parameter = _fill_tensor(bias.parameter, values)
            else:
                bias.parameter.data = values.to(bias.parameter)
        for extra in (e for e in record.extra_modules if e.name not in new_modules):
            state = extra.current.state_dict()
            for key, value in state.items():
                full = f"{paths.of_module(extra.names[0])}.{key}"
                state[key] = _fill_tensor(value, _pop_tensor(unread, full, value.shape, location))
            if any(state_tensor.is_meta for state_tensor in extra.current.state_dict().values()):
                extra.current.load_state_dict(state, assign=True)
    _check_leftovers(model, record, unread, location)


def first_directions(layer: AdaptedLayer, attribute: str, rank: int | None) -> Tensor:
    """Return the part of a trained parameter that belongs to the first ``rank`` directions, as a view."""
    parameter: Tensor = getattr(layer, attribute)
    if rank is None or attribute not in ("lora_A", "lora_B"):
        return parameter
    return parameter.narrow(rank_dimension(layer, attribute), 0, rank)


def rank_dimension(layer: AdaptedLayer, attribute: str) -> int:
    """Return the dimension of a factor that has the size of the rank."""
    dimensions = (0, 1) if isinstance(layer, LoRAConv) else (-1, -2)
    return dimensions[attribute == "lora_B"]


def stored_rank(layer: AdaptedLayer, attribute: str, stored: Tensor | None) -> int | None:
    """Return the rank of a stored factor if it is lower than the layer's, else None."""
    if stored is None or not isinstance(layer, LoRALayer) or attribute not in ("lora_A", "lora_B"):
        return None
    rank, remainder = divmod(stored.numel() * layer.rank, max(1, getattr(layer, attribute).numel()))
    return rank if not remainder and 0 < rank < layer.rank else None


TensorT = TypeVar("TensorT", bound=Tensor)


def _fill_tensor(target: TensorT, values: Tensor) -> TensorT:
    """Copy ``values`` to a tensor with its dtype. A meta tensor is replaced by a new tensor in main memory."""
    if target.is_meta:
        converted = values.to(target.dtype).contiguous()
        return nn.Parameter(converted, target.requires_grad) if isinstance(target, nn.Parameter) else converted  # type: ignore[return-value]
    target.data.copy_(values)
    return target


def _pop_tensor(remaining: dict[str, Tensor], key: str, shape: tuple[int, ...], location: str) -> Tensor:
    if key not in remaining:
        raise UserError(f"tensor '{key}' is missing", location=location, hint=f"{_BASE_HINT}, or save it again")
    tensor = remaining.pop(key)
    if tensor.shape != shape:
        message = f"tensor '{key}' does not fit: the model needs {tuple(shape)}, the file has {tuple(tensor.shape)}"
        raise UserError(message, location=location, hint="is it the base model that the adapter was trained on?")
    return tensor


def _check_leftovers(model: nn.Module, record: Attachment, tensors: Mapping[str, Tensor], location: str) -> None:
    """Raise UserError for a tensor of the file that the adapter does not use, with two exceptions.

    PEFT also writes some base weights, which are ignored if they are equal to the model's. With bias 'all' it writes
    the biases of extra trainable modules a second time under the names of its wrappers.
    """
    modules = dict(model.named_modules()) if tensors else {}
    names = [extra.name for extra in record.extra_modules]
    wrapped = tuple(f"{name}.{part}." for name in names for part in ("original_module", "modules_to_save"))
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        path, _, attribute = without_wrappers(key).rpartition(".")
        base_weight = getattr(modules.get(path), attribute, None)
        if name.startswith(wrapped):
            continue
        if not isinstance(base_weight, Tensor):
            raise UserError(f"tensor '{key}' matches no parameter of the model", location=location, hint=_BASE_HINT)
        if base_weight.shape == tensor.shape and base_weight.is_meta:
            record.copies[f"{path}.{attribute}"] = tensor  # a meta tensor has no values to compare
        elif base_weight.shape != tensor.shape or not torch.equal(tensor.to(base_weight), base_weight):
            sizes = f"{tuple(tensor.shape)} is not the model's {tuple(base_weight.shape)}"
            message = f"the file's copy of the base weight '{name}' {sizes}"
            raise UserError(message, location=location, hint=f"{_BASE_HINT}, with the same vocabulary size")


def task_type_of(model: nn.Module) -> str | None:
    """Return PEFT's name of the task for the model's class, or None."""
    task = next((name for ending, name in _TASKS.items() if type(model).__name__.endswith(ending)), None)
    is_decoder = not getattr(getattr(model, "config", None), "is_encoder_decoder", True)
    return "CAUSAL_LM" if task == "SEQ_2_SEQ_LM" and is_decoder else task
