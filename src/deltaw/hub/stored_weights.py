"""Access to weights on disk: rows of single tensors are read on request.

Parameters of the model are on the meta device and use no memory. Buffers, such as rotary frequencies, have values.
Files are open only during a read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from deltaw.errors import UserError
from deltaw.hub.parameter_names import match_names
from deltaw.hub.skeletons import skeleton
from deltaw.hub.weight_digests import folder_digests, record_stored_digests
from deltaw.kernels.torch_modules import direct_parameters
from deltaw.lora.fingerprint import record_base_digest
from deltaw.tensor_files import read_header

# Range of rows (start, stop), or None for all rows.
Rows = tuple[int, int] | None


class StoredWeights:
    """Weights of a model in a folder.

    Args:
        folder: Folder with safetensors files.
        model: Model created by :func:`meta_model`. Digests of the files are recorded on its parameters.

    Attributes:
        missing: Names of parameters that the files do not contain.

    Raises:
        UserError: if a parameter is assembled from several tensors or modified during loading.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            for name, tensor in read_header(path).items():
                self._file_of[name] = path
                shapes[name] = tensor.shape
        names = match_names(model, self._file_of)
        if names.converted:
            message = f"'{next(iter(names.converted))}' is assembled from several tensors, so its rows cannot be read"
            hint = "set train.sharding: none, or save the loaded model again with transformers"
            raise UserError(message, location=str(folder), hint=hint)
        self._stored = dict(names.stored)
        self._dtypes: dict[str, torch.dtype] = {}
        self.missing: list[str] = []
        stored_names: dict[int, str] = {}  # tied parameters have several names but are stored once
        named_parameters = list(model.named_parameters(remove_duplicate=False))
        for name, parameter in named_parameters:
            if name in self._stored:
                stored_names.setdefault(id(parameter), self._stored[name])
        for name, parameter in named_parameters:
            self._dtypes[name] = parameter.dtype
            if id(parameter) not in stored_names:
                self.missing.append(name)
                continue
            self._stored[name] = stored_names[id(parameter)]
            if shapes[self._stored[name]] != tuple(parameter.shape):
                message = "the model cannot be loaded: the shapes of its weights do not match config.json"
                hint = "download or copy the model again, or check that config.json belongs to the weights"
                raise UserError(message, location=f"{folder}: {name}", hint=hint)
        record_stored_digests(model, folder_digests(folder))

    def read(self, rows_by_name: Mapping[str, Rows]) -> dict[str, Tensor]:
        """Read rows of parameters by name, in the type of the model."""
        tensors: dict[str, Tensor] = {}
        groups: dict[Path, list[str]] = {}
        for name in rows_by_name:
            groups.setdefault(self._file_of[self._stored[name]], []).append(name)
        for path, names in groups.items():
            with safe_open(path, framework="pt") as file:
                for name in names:
                    rows = rows_by_name[name]
                    if rows is None:
                        values = file.get_tensor(self._stored[name])
                    elif rows[0] == rows[1]:
                        values = torch.empty(0, *file.get_slice(self._stored[name]).get_shape()[1:])
                    else:
                        # Copy, because a view would keep surrounding pages of the file mapped.
                        values = file.get_slice(self._stored[name])[rows[0] : rows[1]].clone()
                    tensors[name] = values.to(self._dtypes[name])
        return tensors


def meta_model(folder: Path, *, dtype: str, task: str, attention: str, trust_remote_code: bool) -> PreTrainedModel:
    """Return the frozen model of a folder in evaluation mode, with its parameters on the meta device.

    Raises:
        UserError: as in :func:`deltaw.hub.skeletons.skeleton`.
    """
    with _parameters_on_meta():
        model = skeleton(folder, dtype=dtype, task=task, attention=attention, trust_remote_code=trust_remote_code)
    if (folder / "generation_config.json").is_file():
        with contextlib.suppress(OSError, ValueError):  # like transformers for invalid files
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within the block, move every new parameter of a module to the meta device. Buffers are unchanged."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None and not param.is_meta:
            setattr(self, name, nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad))

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def assign_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Replace parameters on the meta device by values. Ties and recorded digests are retained."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    replacements = {id(parameters[name]): nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    for name in values:
        record_base_digest(replacements[id(parameters[name])], parameters[name])
    for module in model.modules():
        for name, parameter in list(direct_parameters(module).items()):
            if parameter is not None and id(parameter) in replacements:
                setattr(module, name, replacements[id(parameter)])
