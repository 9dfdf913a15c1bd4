"""Train the input layer, or another early part, with everything above it frozen.

The gradient runs through the whole network to get there, so every block keeps its activations. The blocks'
own gradients and their optimizer state are saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from deltaw.errors import UserError, did_you_mean
from deltaw.lora.places import ParameterPlace
from deltaw.methods.in_place import SubsetInPlace
from deltaw.methods.parameters import inside, modules_named, names_of, train_places
from deltaw.methods.registry import TrainOptions
from deltaw.methods.settings import InputSettings
from deltaw.methods.subset import INDICES


class Input(SubsetInPlace):
    """Train ``input.modules``, by default the input layer; or only the rows of ``input.tokens`` in it."""

    name = "input"
    usual_rate = 5e-4

    def __init__(
        self, settings: InputSettings | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        settings = settings or InputSettings()
        super().__init__(settings)
        self.modules = settings.modules
        self.tokens = settings.tokens
        self.tokenizer = tokenizer

    @classmethod
    def from_run(
        cls, section: object, *, train: TrainOptions | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Input:
        return cls(section if isinstance(section, InputSettings) else None, tokenizer)

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        if self.tokens:
            return []
        if self.modules:
            return inside(modules_named(model, self.modules, "input.modules"), names_of(model))
        return inside([_input_layer(model)], names_of(model))

    def start(self, model: nn.Module, extra_modules: Sequence[str], seed: int) -> list[ParameterPlace]:
        if not self.tokens:
            return super().start(model, extra_modules, seed)
        rows = torch.tensor(sorted({self._token_id(token) for token in self.tokens}), dtype=torch.int32)
        name = f"{_input_layer(model)}.weight"
        # The rows are trained in the embedding; a tied output layer stays as it is.
        places = train_places(model, [name, *inside(extra_modules, names_of(model))])
        embedding = next(place for place in places if place.name == name)
        width = embedding.current.shape[1]
        self._subset.begin(embedding, (rows[:, None] * width + torch.arange(width)).flatten())
        return [place for place in places if place is not embedding]

    def summary(self, model: nn.Module, total: int, extra_modules: Sequence[str]) -> str:
        if not self.tokens:
            return super().summary(model, total, extra_modules)
        count = len(set(self.tokens))
        trained = sum(p.numel() for _, p in self.parameters(model))
        return (
            f"input: the embeddings of {count} token{'s' if count != 1 else ''} trained, "
            f"{trained:,} parameters"
        )

    def _token_id(self, token: str) -> int:
        vocabulary = self.tokenizer.get_vocab() if self.tokenizer is not None else {}
        if token not in vocabulary:
            raise UserError(
                f"'{token}' is no token of the model's vocabulary",
                where="input.tokens",
                hint=did_you_mean(token, list(vocabulary)[-2000:])
                + "; add a new token to the tokenizer, and its row to the embedding, first",
            )
        return int(vocabulary[token])

    def put(
        self, model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, Sequence[str]], where: str
    ) -> list[ParameterPlace]:
        names = {key.removesuffix(INDICES) for key in tensors if key.endswith(INDICES)}
        # As in training: rows of an embedding that is tied to the output layer change in a copy of it.
        train_places(model, [name for name in names_of(model) if name in names])
        return super().put(model, tensors, tied, where)


def _input_layer(model: nn.Module) -> str:
    """The name of the module that reads the input."""
    getter = getattr(model, "get_input_embeddings", None)
    layer = getter() if callable(getter) else None
    for name, module in model.named_modules():
        if module is layer and name:
            return name
    raise UserError(
        f"a {type(model).__name__} does not say which module is its input layer",
        where="input.modules",
        hint="name the modules to train",
    )
