"""Token ids beyond the vocabulary, whose embeddings are trained while the model stays as it is.

A model with V rows in its input embedding gets k more ids, V to V + k - 1, and a table (k, d) of their own
for them. To everything else (packing, padding, masks, caches) they are tokens like any other, so that a
soft prompt in front of a row needs no code besides this. The embedding is replaced by an object over the very
same weight; a tied output layer notices nothing and predicts the V real tokens only.

It knows modules; not how such a table is started, trained or stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.kernels.torch_private import adopt
from deltaw.lora import kinds
from deltaw.lora.adapted import factor_dtype
from deltaw.lora.places import Place, Replacement, as_before, spots_holding
from deltaw.lora.stored import weight_shape

_RECORD = "_deltaw_virtual_tokens"
# Tables by which some models (Gemma 3n and 4) give each block embeddings of the very token ids.
_SECOND_TABLES = ("embed_tokens_per_layer",)


class VirtualTokens(nn.Module):
    """What is added to an embedding's own class; objects are made by :func:`attach`.

    Attributes:
        prompt: (k, d), the embeddings of the ids from ``first_id`` on, in fp32 (fp64 for an fp64 weight).
        first_id: V, the rows of the embedding's own weight.
    """

    weight: Tensor
    prompt: nn.Parameter
    first_id: int

    def forward(self, input: Tensor, *others: object, **named: object) -> Tensor:
        """(...) of token ids to (..., d); whatever the embedding does to its rows, a scale say, it does to
        real tokens only. No gradient of the size of the vocabulary is ever made.
        """
        real: Tensor = super().forward(input.clamp(max=self.first_id - 1), *others, **named)
        virtual = F.embedding((input - self.first_id).clamp(min=0), self.prompt.to(real.dtype))
        return torch.where((input >= self.first_id)[..., None], virtual, real)

    def extra_repr(self) -> str:
        """The embedding's own line, and how many virtual tokens there are."""
        return f"{super().extra_repr()}, virtual_tokens={len(self.prompt)}"


def input_embedding(model: nn.Module) -> nn.Module:
    """The module that token ids enter.

    Raises:
        UserError: the model has none, or virtual tokens in front of its rows would not reach all of it.
    """
    config, embedding = getattr(model, "config", None), kinds.own_embedding(model)
    weight = getattr(embedding, "weight", None)
    why = None
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        why = "does not read tokens"
    elif getattr(config, "is_encoder_decoder", False):
        why = "reads rows of tokens in two places"
    elif not isinstance(embedding, nn.Module) or not isinstance(weight, Tensor) or weight.dim() != 2:
        why = "does not say which module is its token embedding"
    for other, module in model.named_modules():
        if isinstance(module, nn.Embedding) and other.rpartition(".")[2].startswith(_SECOND_TABLES):
            why = f"looks token ids up in '{other}' as well, which has no rows for a soft prompt"
    if why is not None or not isinstance(embedding, nn.Module):
        hint = "choose another method; a soft prompt is for models that read one row of tokens"
        raise UserError(f"a {type(model).__name__} {why}", where="method", hint=hint)
    return embedding


def weight_of(embedding: nn.Module) -> Tensor:
    """The table (V, d) of an embedding that :func:`input_embedding` found."""
    weight = embedding.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"a {type(embedding).__name__} has no weight")
    return weight


def attach(model: nn.Module, prompt: Tensor) -> VirtualTokens:
    """Give ``model`` as many virtual tokens as ``prompt`` (k, d) has rows, in place.

    The table is trainable; nothing else of the model is changed, frozen or unfrozen.

    Raises:
        UserError: as :func:`input_embedding`, the widths differ, or there are virtual tokens already.
    """
    if attached(model) is not None:
        raise UserError("the model has a soft prompt already", hint="take it off first, or load the model anew")
    embedding = input_embedding(model)
    weight = weight_of(embedding)
    width = weight_shape(embedding)[1]
    if prompt.dim() != 2 or prompt.shape[1] != width:
        what = f"the soft prompt is {tuple(prompt.shape)}, and the model's embedding is {width} wide"
        raise UserError(what, hint="is it the base model that the prompt was trained on?")
    layer = adopt(_class_over(type(embedding)), embedding)
    layer.prompt = nn.Parameter(prompt.detach().to(device=weight.device, dtype=factor_dtype(weight), copy=True))
    layer.first_id = int(weight.shape[0])
    names = tuple(name for name, module in model.named_modules() if module is embedding)
    place = Replacement(names, spots_holding(model, embedding), embedding, layer)
    place.put_current()
    vars(model)[_RECORD] = place
    return layer


def detach(model: nn.Module) -> None:
    """Give the model its own embedding back; nothing happens where there are no virtual tokens."""
    place = _place(model)
    if place is not None:
        place.put_original(model)
        vars(model).pop(_RECORD)


def attached(model: nn.Module) -> VirtualTokens | None:
    """The embedding with virtual tokens, or None."""
    place = _place(model)
    return place.current if place is not None and isinstance(place.current, VirtualTokens) else None


@contextlib.contextmanager
def own_embedding(model: nn.Module) -> Iterator[None]:
    """Within the block the model has its own embedding, which knows real tokens only."""
    place = _place(model)
    with as_before(model, [] if place is None else [place]):
        yield


def _place(model: nn.Module) -> Replacement | None:
    """Where the embedding with virtual tokens stands, and what stood there before."""
    place = vars(model).get(_RECORD)
    return place if isinstance(place, Place) else None


_CLASSES: dict[type[nn.Module], type[VirtualTokens]] = {}


def _class_over(base: type[nn.Module]) -> type[VirtualTokens]:
    """The class that looks virtual tokens up itself and leaves real ones to ``base``."""
    if base not in _CLASSES:
        _CLASSES[base] = type(f"{base.__name__}WithVirtualTokens", (VirtualTokens, base), {})
    return _CLASSES[base]
