"""Tiny random vision-language models of several families, and image inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

IMAGE_TOKEN = 250
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        config: Creates its configuration.
        inputs: Image inputs of one image.
        tokens: Number of tokens of an image.
    """

    config: Callable[[], transformers.PretrainedConfig]
    inputs: Callable[[], dict[str, Tensor]]
    tokens: int


def _pixels(*shape: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(*shape, generator=torch.Generator().manual_seed(1))}


def _llama() -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(**TEXT)


def _qwen2() -> transformers.PretrainedConfig:
    return transformers.Qwen2Config(**TEXT)


def _clip() -> transformers.PretrainedConfig:
    return transformers.CLIPVisionConfig(**VISION)


def _siglip() -> transformers.PretrainedConfig:
    return transformers.SiglipVisionConfig(**VISION)


FAMILIES: dict[str, Family] = {
    "llava": Family(
        lambda: transformers.LlavaConfig(
            vision_config=_clip(), text_config=_llama(), image_token_index=IMAGE_TOKEN, vision_feature_layer=-1
        ),
        lambda: _pixels(1, 3, 28, 28),
        4,
    ),
    "vipllava": Family(
        lambda: transformers.VipLlavaConfig(
            vision_config=_clip(), text_config=_llama(), image_token_index=IMAGE_TOKEN, vision_feature_layers=[-1, -2]
        ),
        lambda: _pixels(1, 3, 28, 28),
        4,
    ),
    "llava_next": Family(
        lambda: transformers.LlavaNextConfig(
            vision_config=_clip(),
            text_config=_llama(),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-1,
            image_grid_pinpoints=[[28, 28]],
        ),
        lambda: {**_pixels(1, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])},
        10,
    ),
    "llava_onevision": Family(
        lambda: transformers.LlavaOnevisionConfig(
            vision_config=_siglip(),
            text_config=_qwen2(),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-1,
            image_grid_pinpoints=[[28, 28]],
        ),
        lambda: {**_pixels(1, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])},
        10,
    ),
    "smolvlm": Family(
        lambda: transformers.SmolVLMConfig(
            vision_config={**VISION, "model_type": "smolvlm_vision"},
            text_config=_llama(),
            image_token_id=IMAGE_TOKEN,
            scale_factor=2,
        ),
        lambda: _pixels(1, 1, 3, 28, 28),
        1,
    ),
    "idefics3": Family(
        lambda: transformers.Idefics3Config(
            vision_config={**VISION, "model_type": "idefics3_vision"},
            text_config=_llama(),
            image_token_id=IMAGE_TOKEN,
            scale_factor=2,
        ),
        lambda: _pixels(1, 1, 3, 28, 28),
        1,
    ),
    "internvl": Family(
        lambda: transformers.InternVLConfig(
            vision_config=transformers.InternVLVisionConfig(
                **{**VISION, "image_size": [28, 28], "patch_size": [14, 14]}
            ),
            text_config=_qwen2(),
            image_token_id=IMAGE_TOKEN,
            downsample_ratio=0.5,
        ),
        lambda: _pixels(1, 3, 28, 28),
        1,
    ),
    "mistral3": Family(
        lambda: transformers.Mistral3Config(
            vision_config=transformers.PixtralVisionConfig(**VISION, head_dim=8),
            text_config=transformers.MistralConfig(**TEXT, head_dim=8),
            image_token_index=IMAGE_TOKEN,
            spatial_merge_size=1,
            vision_feature_layer=-1,
        ),
        lambda: {**_pixels(1, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])},
        4,
    ),
    "cohere2_vision": Family(
        lambda: transformers.Cohere2VisionConfig(
            vision_config=_siglip(),
            text_config=transformers.Cohere2Config(**TEXT, head_dim=8),
            image_token_id=IMAGE_TOKEN,
            downsample_factor=2,
            alignment_intermediate_size=32,
        ),
        lambda: _pixels(1, 3, 28, 28),
        1,
    ),
    "aya_vision": Family(
        lambda: transformers.AyaVisionConfig(
            vision_config=_siglip(),
            text_config=transformers.Cohere2Config(**TEXT, head_dim=8),
            image_token_index=IMAGE_TOKEN,
            downsample_factor=2,
            adapter_layer_norm_eps=1e-6,
            vision_feature_layer=-1,
        ),
        lambda: _pixels(1, 3, 28, 28),
        1,
    ),
    "got_ocr2": Family(
        lambda: transformers.GotOcr2Config(
            vision_config=transformers.GotOcr2VisionConfig(
                hidden_size=16,
                output_channels=8,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=64,
                patch_size=16,
                mlp_dim=32,
                window_size=2,
                global_attn_indexes=[1],
            ),
            text_config=_qwen2(),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=1,
        ),
        lambda: _pixels(1, 3, 64, 64),
        1,
    ),
    "lfm2_vl": Family(
        lambda: transformers.Lfm2VlConfig(
            vision_config=transformers.Siglip2VisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_patches=16,
                patch_size=2,
            ),
            text_config=transformers.Lfm2Config(**TEXT, layer_types=["conv", "full_attention"]),
            image_token_id=IMAGE_TOKEN,
            downsample_factor=2,
            projector_hidden_size=32,
        ),
        lambda: {
            **_pixels(1, 16, 12),
            "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        },
        4,
    ),
    "ovis2": Family(
        lambda: transformers.Ovis2Config(
            vision_config=transformers.Ovis2VisionConfig(
                **VISION, vocab_size=32, hidden_stride=1, num_visual_indicator_tokens=5
            ),
            text_config=_qwen2(),
            image_token_id=IMAGE_TOKEN,
            visual_indicator_token_ids=[251, 252, 253, 254, 255],
            vocab_size=260,
            hidden_size=32,
        ),
        lambda: _pixels(1, 3, 28, 28),
        4,
    ),
    "paligemma": Family(
        lambda: transformers.PaliGemmaConfig(
            vision_config=_siglip(),
            text_config=transformers.GemmaConfig(**TEXT, head_dim=8),
            image_token_index=IMAGE_TOKEN,
            projection_dim=32,
        ),
        lambda: _pixels(1, 3, 28, 28),
        4,
    ),
    "gemma3": Family(
        lambda: transformers.Gemma3Config(
            vision_config=_siglip(),
            text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=8),
            image_token_index=IMAGE_TOKEN,
            mm_tokens_per_image=4,
        ),
        lambda: _pixels(1, 3, 28, 28),
        4,
    ),
}


def vision_model(family: str) -> PreTrainedModel:
    """Return a tiny random model of a family."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(FAMILIES[family].config(), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def prompt(family: str) -> Tensor:
    """Return a prompt with text before and after one image."""
    count = FAMILIES[family].tokens
    return torch.tensor([1, 7, 9, *[IMAGE_TOKEN] * count, 11, 23, 42, 5])
