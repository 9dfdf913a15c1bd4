"""Image features as embeddings of token ids beyond the vocabulary.

A model with V input embeddings gets an additional id from V on for each feature vector of each image. Rows about one
image contain the same ids, so their prefix is computed once, and different images never share a prefix.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.hub.mrope import encode_grid, has_grid_positions, image_grids
from deltaw.hub.vision import VisionLanguageModel, VisionTower, unsupported_family
from deltaw.hub.vision_parts import fold_statistics
from deltaw.kernels.layout import Layout, PositionShifts
from deltaw.kernels.torch_modules import cast_module
from deltaw.lora import kinds
from deltaw.lora.replacements import Replacement, find_module_spots
from deltaw.runtime.virtual_tokens import embedding_weight, input_embedding
from deltaw.tensor_files import has_values

# Name of the submodule of the embedding that contains the modules of a trained vision tower.
VISION = "vision"
# Maximum relative difference between the logits of a complete model and its text view.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


class FeatureSource(Protocol):
    """Stored features of images.

    Attributes:
        width: Size of a feature vector.
    """

    width: int

    def rows(self, ids: Tensor, tower: VisionTower | None = None) -> Tensor:
        """Return the (n, width) features of token ids (n,). A tower computes them, with gradients."""
        ...

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """Return (n,) bool, True for ids (n,) of known images."""
        ...

    def grids(self, ids: np.ndarray) -> np.ndarray:
        """Return (3, n): index of ids (n,) of known images within their image, and height and width of its grid."""
        ...


class ImageTokens(nn.Module):
    """Mixin that adds image features to an embedding class.

    Attributes:
        features: Features of all images.
        first_image_id: Token id of the first feature.
        has_grid_positions: True if the positions of image tokens are a grid.
        connector_name: Name of the submodule that maps features (n, width) to embeddings (n, d), or None if the
            features are embeddings.
        statistics: (width,) mean and standard deviation by which the connector's inputs are standardized, or None.
        tower: Vision tower that computes the features at each call, with the submodules of ``vision``. None if features
            are stored.
    """

    weight: Tensor
    features: FeatureSource
    first_image_id: int
    has_grid_positions: bool
    connector_name: str | None
    statistics: tuple[Tensor, Tensor] | None
    tower: VisionTower | None

    @property
    def connector(self) -> nn.Module | None:
        """Module that maps features to embeddings, if any."""
        return None if self.connector_name is None else self.get_submodule(self.connector_name)

    def forward(self, input: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Map token ids (...) to embeddings (..., d). Transformations of the embedding class apply to text only."""
        is_image = input >= self.first_image_id
        text: Tensor = super().forward(input.masked_fill(is_image, 0), *args, **kwargs)
        if not bool(is_image.any()):
            return text
        return text.masked_scatter(is_image[..., None], self.image_rows(input[is_image]).to(text.dtype))

    def position_shifts(self, tokens: np.ndarray, layout: Layout) -> np.ndarray:
        """Return the numbers (T,) by which the encoded positions of tokens (T,) differ from those of their layout.

        See :mod:`deltaw.hub.mrope`. They are 0 if image tokens have the same positions as text.
        """
        steps = np.ones(len(tokens), np.int64)
        shifts = np.zeros(len(tokens), np.int64)
        is_image = tokens >= self.first_image_id
        if self.has_grid_positions and is_image.any():
            index, height, width = self.features.grids(tokens[is_image])
            steps[is_image] = np.where(index == height * width - 1, np.maximum(height, width), 0)
            shifts[is_image] = encode_grid(index // width, index % width)
            shifts += layout.positions(steps) - layout.positions()
        return shifts

    def image_rows(self, ids: Tensor) -> Tensor:
        """Return the (n, d) embeddings of image tokens (n,)."""
        if self.tower is not None:
            self.tower.set_parts(dict(self.get_submodule(VISION).named_children()))
            return self.features.rows(ids, self.tower)
        connector = self.connector
        # The embedding and the connector differ in precision while a bf16 model computes in fp32 (runtime/widened.py).
        dtype = self.weight.dtype if connector is None else next(connector.parameters()).dtype
        if not has_values(self.weight):  # a dry run
            return self._embed(self.weight.new_zeros((len(ids), self.features.width), dtype=dtype))
        return self._embed(self.features.rows(ids).to(device=ids.device, dtype=dtype))

    def _embed(self, features: Tensor) -> Tensor:
        if self.connector is None:
            return features
        if self.statistics is not None:
            mean, std = self.statistics
            features = ((features.float() - mean) / std).to(features.dtype)
        result: Tensor = self.connector(features)
        return result


def attach_images(
    model: nn.Module,
    features: FeatureSource,
    parts: Mapping[str, nn.Module] = MappingProxyType({}),
    tower: VisionTower | None = None,
) -> Replacement:
    """Replace the input embedding of a model by one that also embeds image tokens.

    Args:
        parts: Modules by their complete names that become a part of the embedding: those of the tower, or the module
            that maps stored features to embeddings.
        tower: Vision tower that computes the features at each call. None if they are stored.

    Raises:
        UserError: as in :func:`deltaw.runtime.virtual_tokens.input_embedding`.
    """
    embedding = input_embedding(model)
    kind = type(embedding)
    layer: Any = cast_module(type(f"{kind.__name__}WithImages", (ImageTokens, kind), {}), embedding)
    layer.features = features
    layer.first_image_id = int(embedding_weight(embedding).shape[0])
    layer.connector_name = None
    layer.statistics = None
    layer.has_grid_positions = has_grid_positions(model)
    layer.tower = tower
    named = {name.rpartition(".")[2]: module for name, module in parts.items()}
    if tower is not None:
        layer.add_module(VISION, nn.ModuleDict(named))
        if tower.connector is not None:
            layer.connector_name = f"{VISION}.{tower.connector.removeprefix(tower.prefix)}"
    for name, module in named.items() if tower is None else ():
        layer.connector_name = name
        layer.add_module(name, module)
    names = tuple(name for name, module in model.named_modules() if module is embedding)
    replacement = Replacement(names, find_module_spots(model, embedding), embedding, layer)
    replacement.put_current()
    return replacement


def image_position_shifts(model: nn.Module) -> PositionShifts | None:
    """Return the position shifts of a model's packed tokens, or None if image tokens have ordinary text positions."""
    layer = kinds.get_input_embedding(model)
    return layer.position_shifts if isinstance(layer, ImageTokens) and layer.has_grid_positions else None


def connector_module(model: nn.Module) -> str | None:
    """Return the name of the connector in a text view, or None if it is not attached."""
    for name, module in model.named_modules():
        if isinstance(module, ImageTokens) and module.connector_name is not None:
            return f"{name}.{module.connector_name}"
    return None


@contextlib.contextmanager
def statistics_folded(model: nn.Module) -> Iterator[None]:
    """Context in which the weights of the connector standardize its inputs, so that they can be saved."""
    layer = kinds.get_input_embedding(model)
    if not isinstance(layer, ImageTokens) or layer.statistics is None or layer.connector is None:
        yield
        return
    linear = next(module for module in layer.connector.modules() if isinstance(module, nn.Linear))
    weight = linear.weight.data
    bias = linear.bias.data
    linear.weight.data, linear.bias.data = fold_statistics(weight, bias, *layer.statistics)
    try:
        yield
    finally:
        linear.weight.data = weight
        linear.bias.data = bias


@contextlib.contextmanager
def image_embeddings(model: nn.Module, features: Tensor, grids: Sequence[tuple[int, int]] = ()) -> Iterator[int]:
    """Context in which additional token ids of a model have these features (n, d). Yields the first of these ids.

    Args:
        grids: Height and width of each image, if the positions of its tokens are a grid.
    """
    first_id = int(embedding_weight(input_embedding(model)).shape[0])
    replacement = attach_images(model, _Features(features, first_id, grids))
    try:
        yield first_id
    finally:
        replacement.put_original(model)


@torch.no_grad()
def verify_view(parts: VisionLanguageModel, tokens: Tensor, inputs: Mapping[str, Tensor], image_token: int) -> None:
    """Check that the complete model and its text view compute the same logits for a prompt with an image.

    Args:
        parts: Model with its view.
        tokens: (length,) prompt with a placeholder for each token of the image.
        inputs: Image inputs of the complete model.
        image_token: Id of the placeholder.

    Raises:
        UserError: if the logits differ, for example because image tokens attend to each other in both directions.
    """
    device = parts.view.device
    nn.Module.to(parts.model, device)
    tokens = tokens.to(device)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    is_image = tokens == image_token
    has_types = "mm_token_type_ids" in inspect.signature(parts.model.forward).parameters
    types = {"mm_token_type_ids": is_image.long()[None]} if has_types else {}
    expected = parts.model(input_ids=tokens[None], **types, **inputs).logits[0].float()
    features = torch.cat(parts.features(inputs))
    with image_embeddings(parts.view, features, image_grids(parts.model.config, inputs)) as first_id:
        ids = tokens.masked_scatter(is_image, torch.arange(first_id, first_id + int(is_image.sum()), device=device))
        actual = parts.view(input_ids=ids[None]).logits[0].float()
    difference = float((actual - expected).norm() / expected.norm())
    if not difference <= TOLERANCE.get(parts.view.dtype, 0.05):
        reason = f"its outputs differ by {difference:.1%} if images are read as tokens of one causal sequence"
        raise unsupported_family(parts.model.config.model_type, reason)


class _Features:
    """Features of consecutive ids."""

    def __init__(self, values: Tensor, first_id: int, grids: Sequence[tuple[int, int]]) -> None:
        self._values = values
        self._first_id = first_id
        self.width = values.shape[1]
        sizes = [(np.arange(height * width), height, width) for height, width in grids]
        self._grids = [np.stack(np.broadcast_arrays(*size)) for size in sizes]

    def rows(self, ids: Tensor, tower: VisionTower | None = None) -> Tensor:
        return self._values[ids - self._first_id]

    def contains(self, ids: np.ndarray) -> np.ndarray:
        return (ids >= self._first_id) & (ids < self._first_id + len(self._values))

    def grids(self, ids: np.ndarray) -> np.ndarray:
        grids: np.ndarray = np.concatenate(self._grids, 1)[:, ids - self._first_id]
        return grids
