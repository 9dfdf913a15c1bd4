"""Virtual tokens: trainable embeddings for token ids beyond the vocabulary of a frozen model.

A model with V input embeddings gets k additional ids, V to V + k - 1, with a separate table (k, d). Packing, padding,
masks and caches handle them like other tokens, so a soft prompt needs no special code. The embedding module is
replaced by an object with the same weight. A tied output layer is not affected and predicts only the V regular tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.kernels.torch_modules import cast_module
from deltaw.lora import kinds
from deltaw.lora.adapted import factor_dtype
from deltaw.lora.replacements import ReplacedModule, Replacement, find_module_spots, originals_restored
from deltaw.lora.stored import weight_shape

_RECORD = "_deltaw_virtual_tokens"
# Additional embedding tables of some models (Gemma 3n and 4), which are indexed by token ids in each block.
_SECOND_TABLES = ("embed_tokens_per_layer",)


class VirtualTokens(nn.Module):
    """Mixin that adds virtual tokens to an embedding class. Objects are created by :func:`attach`.

    Attributes:
        prompt: (k, d) embeddings of the ids from ``first_id``, in fp32 (fp64 for an fp64 weight).
        first_id: V, the number of rows of the embedding's weight.
    """

    weight: Tensor
    prompt: nn.Parameter
    first_id: int

    def forward(self, input: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Map token ids (...) to embeddings (..., d).

        Transformations of the embedding class, such as scaling, apply only to regular tokens. No gradient of the size
        of the vocabulary is created.
        """
        regular: Tensor = super().forward(input.clamp(max=self.first_id - 1), *args, **kwargs)
        virtual = F.embedding((input - self.first_id).clamp(min=0), self.prompt.to(regular.dtype))
        return torch.where((input >= self.first_id)[..., None], virtual, regular)

    def extra_repr(self) -> str:
        """Return the embedding's representation with the number of virtual tokens."""
        return f"{super().extra_repr()}, virtual_tokens={len(self.prompt)}"


def input_embedding(model: nn.Module) -> nn.Module:
    """Return the module that embeds token ids.

    Raises:
        UserError: if the model has none, or virtual tokens would not reach all parts of it.
    """
    config = getattr(model, "config", None)
    embedding = kinds.get_input_embedding(model)
    weight = getattr(embedding, "weight", None)
    problem = None
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        problem = "does not read tokens"
    elif getattr(config, "is_encoder_decoder", False):
        problem = "has separate encoder and decoder inputs"
    elif not isinstance(embedding, nn.Module) or not isinstance(weight, Tensor) or weight.dim() != 2:
        problem = "does not define its token embedding"
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2].startswith(_SECOND_TABLES):
            problem = f"also uses token ids in '{name}', which has no rows for a soft prompt"
    if problem is not None or not isinstance(embedding, nn.Module):
        hint = "use another method; soft prompts require a model with a single token input"
        raise UserError(f"a {type(model).__name__} {problem}", location="method", hint=hint)
    return embedding


def embedding_weight(embedding: nn.Module) -> Tensor:
    """Return the weight (V, d) of an embedding from :func:`input_embedding`."""
    weight = embedding.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"a {type(embedding).__name__} has no weight")
    return weight


def attach(model: nn.Module, prompt: Tensor) -> VirtualTokens:
    """Add virtual tokens with the embeddings ``prompt`` (k, d) to ``model``, in place.

    The table is trainable. Other parameters are not changed.

    Raises:
        UserError: as in :func:`input_embedding`, or if the widths differ, or the model has virtual tokens already.
    """
    if attached(model) is not None:
        raise UserError("the model already has a soft prompt", hint="detach it first, or reload the model")
    embedding = input_embedding(model)
    weight = embedding_weight(embedding)
    width = weight_shape(embedding)[1]
    if prompt.dim() != 2 or prompt.shape[1] != width:
        message = f"the soft prompt is {tuple(prompt.shape)}, and the model's embedding is {width} wide"
        raise UserError(message, hint="is it the base model that the prompt was trained on?")
    layer = cast_module(_virtual_class(type(embedding)), embedding)
    layer.prompt = nn.Parameter(prompt.detach().to(device=weight.device, dtype=factor_dtype(weight), copy=True))
    layer.first_id = int(weight.shape[0])
    names = tuple(name for name, module in model.named_modules() if module is embedding)
    replacement = Replacement(names, find_module_spots(model, embedding), embedding, layer)
    replacement.put_current()
    vars(model)[_RECORD] = replacement
    return layer


def detach(model: nn.Module) -> None:
    """Restore the model's original embedding, if it has virtual tokens."""
    replacement = _replacement(model)
    if replacement is not None:
        replacement.put_original(model)
        vars(model).pop(_RECORD)


def attached(model: nn.Module) -> VirtualTokens | None:
    """Return the embedding with virtual tokens, if attached."""
    replacement = _replacement(model)
    return replacement.current if replacement is not None and isinstance(replacement.current, VirtualTokens) else None


@contextlib.contextmanager
def original_embedding(model: nn.Module) -> Iterator[None]:
    """Context in which the model uses its original embedding without virtual tokens."""
    replacement = _replacement(model)
    with originals_restored(model, [] if replacement is None else [replacement]):
        yield


def _replacement(model: nn.Module) -> Replacement | None:
    """Return the replacement of the embedding, if any."""
    record = vars(model).get(_RECORD)
    return record if isinstance(record, ReplacedModule) else None


_CLASSES: dict[type[nn.Module], type[VirtualTokens]] = {}


def _virtual_class(base: type[nn.Module]) -> type[VirtualTokens]:
    """Return the subclass of ``base`` that adds virtual tokens."""
    if base not in _CLASSES:
        _CLASSES[base] = type(f"{base.__name__}WithVirtualTokens", (VirtualTokens, base), {})
    return _CLASSES[base]
