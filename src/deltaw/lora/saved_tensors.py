"""The tensors of an adapter's file as a model has them, made one by one while the file is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor

from deltaw.lora import peft_format
from deltaw.lora.adapted import AdaptedLayer
from deltaw.lora.attachment import Attachment
from deltaw.lora.peft_paths import FilePaths


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
