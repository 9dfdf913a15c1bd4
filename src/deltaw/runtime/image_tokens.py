"""Image features as embeddings of token ids beyond the vocabulary.

A model with V input embeddings gets an additional id for each feature vector of each image. Rows about one image contain
the same ids, so their prefix is computed once, and different images never share a prefix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.kernels.torch_private import cast_module
from deltaw.lora.attachment import Replacement, find_module_spots
from deltaw.runtime.virtual_tokens import embedding_weight, input_embedding


class ImageTokens(nn.Module):
    """Mixin that adds image features to an embedding class.

    Attributes:
        features: (n, d) features, which may be memory-mapped.
        first_image_id: Token id of the first feature.
    """

    weight: Tensor
    features: Tensor
    first_image_id: int

    def forward(self, input: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Map token ids (...) to embeddings (..., d). Transformations of the embedding class apply to text only."""
        is_image = input >= self.first_image_id
        text: Tensor = super().forward(input.masked_fill(is_image, 0), *args, **kwargs)
        if not bool(is_image.any()):
            return text
        rows = F.embedding((input[is_image] - self.first_image_id).to(self.features.device), self.features)
        return text.masked_scatter(is_image[..., None], rows.to(device=text.device, dtype=text.dtype))


@contextlib.contextmanager
def image_embeddings(model: nn.Module, features: Tensor) -> Iterator[int]:
    """Context in which additional token ids of a model have these features (n, d). Yields the first of these ids."""
    embedding = input_embedding(model)
    first_id = int(embedding_weight(embedding).shape[0])
    kind = type(embedding)
    layer = cast_module(type(f"Image{kind.__name__}", (ImageTokens, kind), {}), embedding)
    layer.features, layer.first_image_id = features, first_id
    names = tuple(name for name, module in model.named_modules() if module is embedding)
    replacement = Replacement(names, find_module_spots(model, embedding), embedding, layer)
    replacement.put_current()
    try:
        yield first_id
    finally:
        replacement.put_original(model)
