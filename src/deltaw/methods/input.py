"""Train the input layer, or another early part, with everything above it frozen.

The gradient runs through the whole network to get there, and every block keeps its activations for it; what
is saved is the products for the blocks' own gradients, those gradients, and their optimizer state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from deltaw.errors import UserError, did_you_mean
from deltaw.methods.in_place import InPlace
from deltaw.methods.places import Place, inside, modules_named, names_of, train_places
from deltaw.methods.settings import InputSettings
from deltaw.methods.subset import INDICES, Subset


class Input(InPlace):
    """Train ``input.modules``, by default the input layer; or only the rows of ``input.tokens`` in it."""

    name = "input"
    usual_rate = 5e-4

    def __init__(self, settings: InputSettings, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__(settings)
        self.modules = settings.modules
        self.tokens = settings.tokens
        self.tokenizer = tokenizer
        self._rows = Subset()

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        if self.tokens:
            return []
        if self.modules:
            return inside(modules_named(model, self.modules, "input.modules"), names_of(model))
        return inside([_input_layer(model)], names_of(model))

    def prepare(
        self,
        model: nn.Module,
        *,
        seed: int,
        extra_modules: Sequence[str] = (),
        calibrate: Callable[[], None] | None = None,
    ) -> str:
        if not self.tokens:
            return super().prepare(model, seed=seed, extra_modules=extra_modules)
        rows = torch.tensor(sorted({self._token_id(token) for token in self.tokens}), dtype=torch.int32)
        name = f"{_input_layer(model)}.weight"
        # The rows are trained where the embedding stands; a tied output layer stays as it is.
        self._places = train_places(model, [name, *inside(extra_modules, names_of(model))])
        place = next(p for p in self._places if p.name == name)
        self._places.remove(place)
        self._rows.begin(
            place, (rows[:, None] * place.now.shape[1] + torch.arange(place.now.shape[1])).flatten()
        )
        return (
            f"input: the embeddings of {len(rows)} token{'s' if len(rows) != 1 else ''} trained, "
            f"{sum(p.numel() for _, p in self.parameters(model)):,} parameters"
        )

    def _token_id(self, token: str) -> int:
        vocabulary = self.tokenizer.get_vocab() if self.tokenizer is not None else {}
        if token not in vocabulary:
            raise UserError(
                f"'{token}' is no token of the model's vocabulary",
                where="input.tokens",
                hint=did_you_mean(token, list(vocabulary)[-2000:])
                + "; a token that is new must be in the tokenizer and have its row in the embedding first",
            )
        return int(vocabulary[token])

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [*super().parameters(model), *self._rows.parameters()]

    def after_step(self, model: nn.Module) -> None:
        self._rows.write()

    def without(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return self._rows.without(super().without(model))

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **self._rows.tensors()}

    def put(
        self, model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, Sequence[str]], where: str
    ) -> list[Place]:
        names = {key.removesuffix(INDICES) for key in tensors if key.endswith(INDICES)}
        # As in training: rows of an embedding that is tied to the output layer change in a copy of it.
        train_places(model, [name for name in names_of(model) if name in names])
        model.requires_grad_(False)
        return super().put(model, self._rows.put(model, tensors, where), tied, where)


def _input_layer(model: nn.Module) -> str:
    """The name of the module that the input enters first."""
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
