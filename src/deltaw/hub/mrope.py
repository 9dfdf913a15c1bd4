"""Language models with three rotary positions per token: time, height and width (M-RoPE, arXiv 2409.12191).

The three positions of a text token are equal. The tokens of an image are a grid: they have one time, and differ in
height and width. The next token follows the largest of these positions. So the positions of a token depend only on the
tokens before it, and shared prefixes and caches stay valid.

The three positions of a token are one integer (:func:`encode_grid`), which is a text token's usual position. Packing,
caches and transformers pass it as usual, and the rotary embedding decodes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, Qwen2ForCausalLM, Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM

from deltaw.kernels.layout import Layout, PositionShifts
from deltaw.kernels.torch_modules import cast_module

# Number of bits of each part of an encoded position.
_BITS = 21
_MASK = (1 << _BITS) - 1


def encode_grid(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the number (n,) to add to the time of image tokens in these rows and columns (n,) of their grids."""
    encoded: np.ndarray = (rows.astype(np.int64) << _BITS) | (columns.astype(np.int64) << 2 * _BITS)
    return encoded


class GridRotary(nn.Module):
    """Mixin that lets a rotary embedding with three positions read encoded positions."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of positions: encoded ones (batch, T) or (3, batch, T), or three separate ones."""
        shifts = torch.tensor([3 * _BITS, _BITS, 2 * _BITS], device=position_ids.device)[:, None, None]
        decoded: tuple[Tensor, Tensor] = super().forward(x, (position_ids & _MASK) + (position_ids >> shifts & _MASK))
        return decoded


class GridGeneration:
    """Mixin that lets a causal model generate text after image tokens with encoded positions."""

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, position_ids: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        if position_ids is not None:
            position_ids = position_ids + _shifts(self, input_ids)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, position_ids=position_ids, **kwargs
        )
        return inputs


class MRoPEForCausalLM(GridGeneration, Qwen2ForCausalLM):
    """Causal model over a language model of Qwen2-VL, for which transformers has none."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.post_init()


# Causal classes by type of the language model's configuration.
CAUSAL_MODELS: dict[str, type[Any]] = {"qwen2_vl_text": MRoPEForCausalLM, "qwen2_5_vl_text": MRoPEForCausalLM}
_HYBRID_MODELS: tuple[Any, ...] = (Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM)
for _kind in _HYBRID_MODELS:
    CAUSAL_MODELS[_kind.config_class.model_type] = type(f"Grid{_kind.__name__}", (GridGeneration, _kind), {})


def read_encoded_positions(language: Any) -> None:
    """Let a language model read encoded positions, and compute the positions of rows that have none."""
    kind = type(language.rotary_emb)
    language.rotary_emb = cast_module(type(f"Grid{kind.__name__}", (GridRotary, kind), {}), language.rotary_emb)
    language.register_forward_pre_hook(_add_positions, with_kwargs=True)


def image_grids(config: PretrainedConfig, inputs: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Return height and width in tokens of each image of these inputs, or [] if the positions are not a grid."""
    if config.get_text_config(decoder=True).model_type not in CAUSAL_MODELS:
        return []
    size = int(config.vision_config.spatial_merge_size)
    return [(height // size, width // size) for _, height, width in inputs["image_grid_thw"].tolist()]


def has_grid_positions(model: nn.Module) -> bool:
    """Return True if the positions of image tokens are a grid."""
    return any(isinstance(module, GridRotary) for module in model.modules())


def _add_positions(language: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    tokens = kwargs.get("input_ids")
    if tokens is None or kwargs.get("position_ids") is not None:
        return None
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return args, {**kwargs, "position_ids": positions + _shifts(language, tokens)}


def _shifts(model: Any, tokens: Tensor) -> Tensor:
    """Return the numbers (rows, T) that are added to the positions of rows of tokens (rows, T)."""
    position_shifts: PositionShifts | None = getattr(model.get_input_embeddings(), "position_shifts", None)
    if position_shifts is None:
        return torch.zeros_like(tokens)
    layout = Layout.of_lengths([tokens.shape[1]] * len(tokens))
    shifts = position_shifts(tokens.flatten().numpy(force=True), layout)
    return torch.from_numpy(shifts).view_as(tokens).to(tokens.device)
