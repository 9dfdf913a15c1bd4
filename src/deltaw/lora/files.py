"""The adapter on disk, in PEFT's format, so that PEFT, vLLM and others load what is written here and the
other way round. Safetensors only: nothing is unpickled, and no hub is asked.

A file that does not fit, in any tensor, is refused before the model is changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import safetensors
import torch
from torch import Tensor, nn

from deltaw import durable, platforms
from deltaw.contained import remember_named, require_contained
from deltaw.errors import UserError, did_you_mean
from deltaw.lora import peft_format
from deltaw.lora.adapt import Summary, attach_selected, detach, refuse_adapted
from deltaw.lora.adapted import AdaptedLayer
from deltaw.lora.attachment import Attachment, adapter_parameters, attached, count_parameters, unwrapped
from deltaw.lora.config import CHANGING_INITS, LoRAConfig
from deltaw.lora.fingerprint import FINGERPRINT_KEY, warn_of_base
from deltaw.lora.kinds import is_linear, linear_sizes
from deltaw.lora.matching import Named, modules_once, values_by_pattern
from deltaw.lora.peft_format import PREFIX, FilePaths, without_wrappers
from deltaw.lora.select import Selection, Target, select
from deltaw.tensor_files import TensorFile, save_tensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"

_LONGEST_NAME = 2000  # names are taken apart at every dot
_COPY_AGAIN = "copy or download the adapter again"
_ITS_BASE = "load it on the base model that it was trained on"
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class AdapterFile(NamedTuple):
    """An adapter as it stands on disk.

    Attributes:
        config: its settings.
        tensors: by the file's names, in the file's orientation.
        metadata: the weights file's own, with ``base_model_name_or_path``, ``task_type`` and ``peft_version``
            where given.
    """

    config: LoRAConfig
    tensors: Mapping[str, Tensor]
    metadata: dict[str, str]


class SavedTensors(Mapping[str, Tensor]):
    """All that an adapter's file holds, by its names, each made when it is asked for.

    Some do not lie in the model as in the file; copies of all of them would be as much as is trained.
    """

    def __init__(self, record: Attachment) -> None:
        paths = FilePaths(record)
        self._made: dict[str, Callable[[], Tensor]] = {}
        for name, layer in record.updated():
            path, twice = paths.of_layer(name), paths.counts_twice(name)
            for key, _ in peft_format.file_tensors(path, layer):
                self._made[key] = partial(_of_layer, path, layer, key, twice)
        for bias in record.biases:
            self._made[paths.of_parameter(bias.name)] = bias.parameter.detach
        for whole in record.extra_modules:
            for key, value in whole.current.state_dict().items():
                self._made[f"{paths.of_module(whole.names[0])}.{key}"] = value.detach

    def __getitem__(self, name: str) -> Tensor:
        return self._made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def _of_layer(path: str, layer: AdaptedLayer, key: str, counts_twice: bool) -> Tensor:
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
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, each complete or not at all.

    Args:
        model: has an adapter attached.
        folder: made if it is not there.
        base_model: what to call the base model; None takes the model's own ``name_or_path``.
        task_type: PEFT's name of the task (``CAUSAL_LM``, ``SEQ_CLS``, …) or None; "auto" tells it from the
            model's class.
        metadata: goes into the weights file's own.

    Raises:
        UserError: no adapter is attached, the folder cannot be written, or the adapter was merged for good
            after an initialization that changed W.
    """
    model = unwrapped(model)
    record = attached(model)
    if base_model is None:
        base_model = str(getattr(model, "name_or_path", "") or "") or None
    if task_type == "auto":
        task_type = task_type_of(model)
        # A classifier's task promises a trained head.
        if task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and not record.extra_modules:
            task_type = None
    init = record.config.init
    if init in CHANGING_INITS and any(layer.changed_init is None for _, layer in record.adapted()):
        what = f"after init '{init}' was merged without keeping the weights before, there is no adapter to save"
        raise UserError(what, hint="merge with keep_original=True")
    settings = peft_format.settings_of(model, record, base_model, task_type)
    metadata = {**(metadata or {}), **({FINGERPRINT_KEY: record.fingerprint} if record.fingerprint else {})}
    write_adapter(Path(folder), SavedTensors(record), settings, metadata)


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, object], metadata: Mapping[str, str]
) -> None:
    """Write an adapter's two files, each complete or not at all."""
    save_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt", **metadata})
    durable.write_text(folder / CONFIG_NAME, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    if (base_model := peft_format.base_reference(settings)) is not None:
        remember_named("model", base_model)


def load_adapter(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> Summary:
    """Attach the adapter in ``folder`` to ``model``, in place.

    The tensors decide which modules are adapted; the settings must agree with them.

    Args:
        model: the base model the adapter was trained on; on another one
            :class:`OtherBaseModelWarning` is given where the file can tell.
        folder: on this machine.
        trainable: whether the adapter is to be trained further.

    Raises:
        UserError: files are missing or broken, a tensor does not fit (the first is named, with both shapes)
            or is missing, or the adapter needs what is not available here. The model is then unchanged.
    """
    model = unwrapped(model)
    refuse_adapted(model)
    adapter = read_adapter(folder)
    where = str(Path(folder) / WEIGHTS_NAME)
    summary = attach_selected(model, adapter.config, _selection(model, adapter, where), filled=False)
    try:
        record = attached(model)
        _fill(model, record, adapter, where)
    except BaseException:
        detach(model)
        raise
    if not trainable:
        for _, parameter in adapter_parameters(model):
            parameter.requires_grad_(False)
    named = adapter.metadata.get("base_model_name_or_path")
    warn_of_base("the adapter", adapter.metadata, record.fingerprint, folder, named)
    count = count_parameters(model)
    return Summary(summary.matches, summary.adapted, count.trained, count.total, summary.notes)


def read_adapter(folder: str | Path) -> AdapterFile:
    """Read the adapter in ``folder`` without a model.

    Raises:
        UserError: files are missing or broken, or the adapter needs what is not available here.
    """
    return _adapter(folder, read_tensors)


def open_adapter(folder: str | Path) -> AdapterFile:
    """As :func:`read_adapter`, with each tensor read every time that it is asked for.

    Raises:
        UserError: files are missing or broken, or the adapter needs what is not available here.
    """
    return _adapter(folder, _open_tensors)


def _adapter(
    folder: str | Path, tensors_of: Callable[[Path], tuple[Mapping[str, Tensor], dict[str, str]]]
) -> AdapterFile:
    folder = Path(folder)
    if not folder.is_dir():
        hint = "name a folder on this machine; an adapter on a hub must be downloaded first"
        raise UserError(f"there is no adapter folder '{folder}'", where=str(folder), hint=hint)
    require_contained(folder)
    settings = read_settings(folder / CONFIG_NAME)
    config = peft_format.config_of(settings, str(folder / CONFIG_NAME))
    tensors, metadata = tensors_of(folder)
    if (longest := max(map(len, tensors), default=0)) > _LONGEST_NAME:
        raise _damaged(folder / WEIGHTS_NAME, f"a tensor's name has {longest:,} characters")
    for key in ("base_model_name_or_path", "task_type", "peft_version"):
        if isinstance(value := settings.get(key), str):
            metadata.setdefault(key, value)
    return AdapterFile(config, tensors, metadata)


def factor_tensors(model: nn.Module, adapter: AdapterFile, where: str) -> list[tuple[Target, Tensor, Tensor]]:
    """The targets of an adapter that has nothing but factors of linear layers, each with its A and B in the
    file's orientation. The model is not changed.

    Raises:
        UserError: as :func:`load_adapter`; ``where`` is named as the file.
    """
    left = dict(adapter.tensors)
    found = []
    for target in _selection(model, adapter, where).targets:
        path = next((PREFIX + n for n in target.names if f"{PREFIX}{n}.lora_A.weight" in left), None)
        path = path or PREFIX + target.names[0]
        if not is_linear(target.module):
            what = f"it adapts '{target.names[0]}', a {type(target.module).__name__} and no linear layer"
            raise UserError(what, where=where, hint="merge it into a model of its own: deltaw merge")
        inputs, outputs = linear_sizes(target.module)
        lora_A = _take(left, f"{path}.lora_A.weight", torch.Size((target.rank, inputs)), where)
        lora_B = _take(left, f"{path}.lora_B.weight", torch.Size((outputs, target.rank)), where)
        found.append((target, lora_A, lora_B))
    for key, tensor in left.items():
        _refuse_leftover(model, Attachment(adapter.config, None), key, tensor, where)
    return found


def read_settings(path: Path) -> dict[str, object]:
    """The object in a JSON file of an adapter's folder, such as its settings.

    Raises:
        UserError: the file is missing or not a JSON object.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = "name the folder that an adapter was saved in"
        raise UserError(f"the folder has no {path.name}", where=str(path.parent), hint=hint) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} cannot be read: {error}", where=str(path), hint=_COPY_AGAIN) from error
    if not isinstance(settings, dict):
        raise UserError(f"{path.name} is not a JSON object", where=str(path), hint=_COPY_AGAIN)
    return settings


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in an adapter's folder, and the metadata of their file.

    Raises:
        UserError: they are missing, damaged, or in a pickle.
    """
    path = weights_of(folder)
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if platforms.WINDOWS:  # which keeps a file whose tensors are mapped from being replaced
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            return tensors, dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _open_tensors(folder: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    path = weights_of(folder)
    try:
        file = TensorFile(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    return file, dict(file.metadata)


def weights_of(folder: Path) -> Path:
    """The weights file in an adapter's folder.

    Raises:
        UserError: it is missing, or a pickle.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        if (folder / PICKLED_NAME).exists():
            what = f"the adapter is in {PICKLED_NAME}, a pickle, which could run any code and is not read"
            hint = f"have whoever made it save it again as {WEIGHTS_NAME}"
            raise UserError(what, where=str(folder / PICKLED_NAME), hint=hint)
        raise UserError(f"the folder has no {WEIGHTS_NAME}", where=str(folder), hint=_COPY_AGAIN)
    return path


def _damaged(path: Path, error: Exception | str) -> UserError:
    return UserError(f"{WEIGHTS_NAME} is cut off or damaged: {error}", where=str(path), hint=_COPY_AGAIN)


def _selection(model: nn.Module, adapter: AdapterFile, where: str) -> Selection:
    """What the file's tensors say is adapted and trained in full, checked against its settings."""
    config, tensors = adapter.config, adapter.tensors
    modules = modules_once(model)
    by_name = {name: named for named in modules for name in named.names}
    extra = _extra_modules(config, tensors, modules)
    selection = select(model, config, strict=False)
    elsewhere = {name for parameter in selection.parameters for name in parameter.names}
    ranks = values_by_pattern("rank_pattern", config.rank_pattern, by_name)
    alphas = values_by_pattern("alpha_pattern", config.alpha_pattern, by_name)
    targets: dict[str, Target] = {}
    for tensor_name in tensors:
        name = peft_format.factor_module(tensor_name)
        if name is None or name in targets or name in elsewhere:
            continue
        if name not in by_name:
            hint = did_you_mean(name, by_name) + "; is it the base model that the adapter was trained on?"
            raise UserError(f"tensor '{tensor_name}' fits no module of the model", where=where, hint=hint)
        parent = by_name.get(name.rpartition(".")[0])
        if parent is not None and isinstance(parent.module, nn.MultiheadAttention):
            continue  # one of the two projections of an attention, which is chosen by its own name
        named = by_name[name]
        rank, alpha = int(ranks.get(name, config.rank)), alphas.get(name, config.alpha)
        targets[name] = Target((name, *(n for n in named.names if n != name)), named.module, rank, alpha)
    if not (targets or selection.parameters or selection.tokens):
        raise UserError("the file holds no LoRA factors", where=where, hint="save the adapter again")
    chosen = [targets[name] for named in modules for name in named.names if name in targets]
    whole_modules = {id(inner) for whole in extra for inner in whole.module.modules()}
    for target in selection.targets:
        if not any(name in targets for name in target.names) and id(target.module) not in whole_modules:
            missing = f"{PREFIX}{target.names[0]}.lora_A.weight"
            what = f"tensor '{missing}' is missing: the settings name its module"
            raise UserError(what, where=where, hint=f"{_ITS_BASE}, or save the adapter again")
    return Selection(chosen, extra, selection.parameters, selection.tokens, selection.matches)


def _extra_modules(config: LoRAConfig, tensors: Mapping[str, Tensor], modules: list[Named]) -> list[Named]:
    """The extra trainable modules that the file has tensors for; PEFT matches them by how the name ends."""
    if not config.train_modules:
        return []
    stored = {without_wrappers(name) for name in tensors}
    parents = {name[: match.start()] for name in stored for match in re.finditer(r"\.", name)}
    entries = tuple(config.train_modules)
    found = [named for named in modules if named.names[0] in parents and named.names[0].endswith(entries)]
    below = {id(inner) for named in found for inner in named.module.modules() if inner is not named.module}
    return [named for named in found if id(named.module) not in below]


def _fill(model: nn.Module, record: Attachment, adapter: AdapterFile, where: str) -> None:
    """Copy every tensor of the file to its place; every place must get one, and every tensor have one."""
    left = dict(adapter.tensors)
    twice = peft_format.attention_counts_twice(adapter.metadata.get("peft_version"))
    paths = FilePaths(record)
    with torch.no_grad():
        for name, layer in record.updated():
            for key, attribute in peft_format.places(paths.of_layer(name), layer):
                parameter = getattr(layer, attribute)
                found = _take(left, key, peft_format.as_in_file(parameter, attribute, layer).shape, where)
                if twice and attribute == "lora_B" and paths.counts_twice(name):
                    found = found * 2
                found = peft_format.as_in_layer(found, attribute, layer)
                setattr(layer, attribute, _filled(parameter, found))
        for bias in record.biases:
            key = paths.of_parameter(bias.name)
            values = _take(left, key, bias.parameter.shape, where)
            if bias.parameter.is_meta:
                bias.parameter = _filled(bias.parameter, values)
            else:
                bias.parameter.data = values.to(bias.parameter)
        for whole in record.extra_modules:
            state = whole.current.state_dict()
            for key, value in state.items():
                full = f"{paths.of_module(whole.names[0])}.{key}"
                state[key] = _filled(value, _take(left, full, value.shape, where))
            if any(place.is_meta for place in whole.current.state_dict().values()):
                whole.current.load_state_dict(state, assign=True)
    for key, tensor in left.items():
        _refuse_leftover(model, record, key, tensor, where)


Filled = TypeVar("Filled", bound=Tensor)


def _filled(place: Filled, values: Tensor) -> Filled:
    """``place`` with the file's ``values``, in its type; in a skeleton on the meta device, another one in
    main memory, since the skeleton's own holds no numbers."""
    if place.is_meta:
        held = values.to(place.dtype).contiguous()
        return nn.Parameter(held, place.requires_grad) if isinstance(place, nn.Parameter) else held  # type: ignore[return-value]
    place.data.copy_(values)
    return place


def _take(left: dict[str, Tensor], key: str, shape: torch.Size, where: str) -> Tensor:
    if key not in left:
        raise UserError(f"tensor '{key}' is missing", where=where, hint=f"{_ITS_BASE}, or save the adapter again")
    found = left.pop(key)
    if found.shape != shape:
        what = f"tensor '{key}' does not fit: {tuple(shape)} is needed, and the file has {tuple(found.shape)}"
        raise UserError(what, where=where, hint="is it the base model that the adapter was trained on?")
    return found


def _refuse_leftover(model: nn.Module, record: Attachment, key: str, tensor: Tensor, where: str) -> None:
    """PEFT writes some of the base model's own weights as well; they are skipped if they are the same. Under
    bias 'all' it writes the biases of extra trainable modules a second time under the names of its wrappers."""
    name = key.removeprefix(PREFIX)
    wrapped = ((f"{whole.name}.original_module.", f"{whole.name}.modules_to_save.") for whole in record.extra_modules)
    if any(map(name.startswith, wrapped)):
        return
    path, _, attribute = without_wrappers(key).rpartition(".")
    own = getattr(dict(model.named_modules()).get(path), attribute, None)
    if isinstance(own, Tensor) and own.shape == tensor.shape:
        if own.is_meta:
            record.copies[f"{path}.{attribute}"] = tensor  # a skeleton has no values to compare with
            return
        if torch.equal(tensor.to(own), own):
            return
    if isinstance(own, Tensor):
        sizes = f"{tuple(tensor.shape)} is not the model's {tuple(own.shape)}"
        hint = f"{_ITS_BASE}, with the vocabulary of the same size"
        raise UserError(f"the file's copy of the base weight '{name}' {sizes}", where=where, hint=hint)
    raise UserError(f"tensor '{key}' fits nothing in the model", where=where, hint=_ITS_BASE)


def task_type_of(model: nn.Module) -> str | None:
    """PEFT's name of the task, by the name of the model's class."""
    return next((name for ending, name in _TASKS.items() if type(model).__name__.endswith(ending)), None)
