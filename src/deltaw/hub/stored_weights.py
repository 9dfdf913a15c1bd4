"""A model whose weights are still in their files: rows of single tensors are read when they are asked for.

The model is made with its parameters on the meta device, so that it takes no memory; its buffers, such as
rotary frequencies, have their values. Files are open only while something is read.

Knows safetensors files and transformers' classes; not what becomes of the rows.
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
from deltaw.hub.checkpoint import names_on_disk, note_stored, values_in_folder
from deltaw.hub.loading import skeleton
from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.fingerprint import note_base

# Rows of a tensor, from and to; None for all of them.
Rows = tuple[int, int] | None


class StoredWeights:
    """The weights of a model in a folder.

    Args:
        folder: with the weights in safetensors files.
        model: made by :func:`unfilled`; what the files hold is noted on its parameters.

    Attributes:
        missing: names of parameters that the files do not hold.

    Raises:
        UserError: a parameter is built of several tensors, or of one that is changed on the way.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    self._file_of[name] = path
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        names = names_on_disk(model, self._file_of)
        if names.converted:
            what = f"'{next(iter(names.converted))}' is made of several tensors when loaded, which rows cannot be"
            hint = "set train.sharding: none, or save the model with transformers as it is in memory"
            raise UserError(what, where=str(folder), hint=hint)
        self._stored = dict(names.stored)
        self._dtypes: dict[str, torch.dtype] = {}
        self.missing: list[str] = []
        known: dict[int, str] = {}  # tied parameters have several names, of which the files hold one
        every = list(model.named_parameters(remove_duplicate=False))
        for name, parameter in every:
            if name in self._stored:
                known.setdefault(id(parameter), self._stored[name])
        for name, parameter in every:
            self._dtypes[name] = parameter.dtype
            if id(parameter) not in known:
                self.missing.append(name)
                continue
            self._stored[name] = known[id(parameter)]
            if shapes[self._stored[name]] != tuple(parameter.shape):
                what = "the model cannot be loaded: its weights have other shapes than its config.json says"
                hint = "fetch or copy the model again, or check that config.json belongs to the weights"
                raise UserError(what, where=f"{folder}: {name}", hint=hint)
        note_stored(model, values_in_folder(folder))

    def read(self, wanted: Mapping[str, Rows]) -> dict[str, Tensor]:
        """Rows of parameters, by their names, in the type that the model has them in."""
        found: dict[str, Tensor] = {}
        for path, names in self._by_file(wanted).items():
            with safe_open(path, framework="pt") as file:
                for name in names:
                    rows = wanted[name]
                    if rows is None:
                        given = file.get_tensor(self._stored[name])
                    elif rows[0] == rows[1]:
                        given = torch.empty(0, *file.get_slice(self._stored[name]).get_shape()[1:])
                    else:
                        # A view of the mapped file would hold more: the system maps what lies around it.
                        given = file.get_slice(self._stored[name])[rows[0] : rows[1]].clone()
                    found[name] = given.to(self._dtypes[name])
        return found

    def _by_file(self, names: Mapping[str, object]) -> dict[Path, list[str]]:
        """Parameters by the file that holds them."""
        found: dict[Path, list[str]] = {}
        for name in names:
            found.setdefault(self._file_of[self._stored[name]], []).append(name)
        return found


def unfilled(folder: Path, *, dtype: str, task: str, attention: str, trust_remote_code: bool) -> PreTrainedModel:
    """The model in ``folder`` with its parameters on the meta device, in evaluation mode and frozen.

    Raises:
        UserError: as :func:`deltaw.hub.loading.skeleton`.
    """
    with _parameters_on_meta():
        model = skeleton(folder, dtype=dtype, task=task, attention=attention, trust_remote_code=trust_remote_code)
    if (folder / "generation_config.json").is_file():
        with contextlib.suppress(OSError, ValueError):  # as transformers does where it cannot be read
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While open, every parameter that a module gets is moved to the meta device; buffers stay."""
    inner = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        inner(self, name, param)
        if param is not None and not param.is_meta:
            setattr(self, name, nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad))

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = inner  # type: ignore[method-assign]


def fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put values in the place of parameters on the meta device, by their names; what is tied stays tied, and
    what was noted of values stays noted."""
    own = dict(model.named_parameters(remove_duplicate=False))
    made = {id(own[name]): nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    for name in values:
        note_base(made[id(own[name])], own[name])
    for module in model.modules():
        for name, parameter in list(own_parameters(module).items()):
            if parameter is not None and id(parameter) in made:
                setattr(module, name, made[id(parameter)])
