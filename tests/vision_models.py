"""Tiny random vision-language models of several families, and image inputs for them."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from tests.byte_models import byte_tokenizer

IMAGE_TOKEN = 259
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


def _image() -> dict[str, Tensor]:
    return _pixels(1, 3, 28, 28)


def _one_tile() -> dict[str, Tensor]:
    return _pixels(1, 1, 3, 28, 28)


def _tiles() -> dict[str, Tensor]:
    return {**_pixels(1, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])}


def _family(
    kind: str,
    vision: Callable[[], object],
    text: Callable[[], transformers.PretrainedConfig],
    tokens: int,
    inputs: Callable[[], dict[str, Tensor]] = _image,
    **options: object,
) -> Family:
    """Return a family with a configuration of this kind."""

    def config() -> transformers.PretrainedConfig:
        return getattr(transformers, f"{kind}Config")(vision_config=vision(), text_config=text(), **options)

    return Family(config, inputs, tokens)


_TOKEN_ID = {"image_token_id": IMAGE_TOKEN}
_LAST_LAYER = {"image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1}
_GRID = {"image_grid_pinpoints": [[28, 28], [28, 56]]}


def _llama() -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(**TEXT)


def _qwen2() -> transformers.PretrainedConfig:
    return transformers.Qwen2Config(**TEXT)


def _cohere2() -> transformers.PretrainedConfig:
    return transformers.Cohere2Config(**TEXT, head_dim=8)


def _vision(model_type: str) -> Callable[[], dict[str, object]]:
    return lambda: {**VISION, "model_type": model_type}


def _clip() -> transformers.PretrainedConfig:
    return transformers.CLIPVisionConfig(**VISION)


def _siglip() -> transformers.PretrainedConfig:
    return transformers.SiglipVisionConfig(**VISION)


def _qwen_vl(kind: type[transformers.PretrainedConfig], **vision: object) -> transformers.PretrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    common = {"depth": 2, "num_heads": 2, "patch_size": 4, **vision}
    return kind(vision_config=common, text_config={**TEXT, "rope_parameters": rope}, image_token_id=IMAGE_TOKEN)


def _qwen2_vl() -> transformers.PretrainedConfig:
    return _qwen_vl(transformers.Qwen2VLConfig, embed_dim=16, hidden_size=32, mlp_ratio=2)


def _qwen2_5_vl() -> transformers.PretrainedConfig:
    sizes = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 16}
    return _qwen_vl(transformers.Qwen2_5_VLConfig, **sizes, fullatt_block_indexes=[1])


def _qwen3_vl() -> transformers.PretrainedConfig:
    sizes = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "num_position_embeddings": 16}
    return _qwen_vl(transformers.Qwen3VLConfig, **sizes, deepstack_visual_indexes=[0])


def _qwen3_5() -> transformers.PretrainedConfig:
    vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "hidden_size": 16, "out_hidden_size": 32}
    vision |= {"intermediate_size": 32, "num_position_embeddings": 16}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    text = {**TEXT, "head_dim": 16, "rope_parameters": rope, "layer_types": ["linear_attention", "full_attention"]}
    text |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    text |= {"linear_value_head_dim": 16}
    return transformers.Qwen3_5Config(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)


def _patches() -> dict[str, Tensor]:
    """Return an image of 4 x 6 patches, which are merged to 2 x 3 tokens."""
    return {**_pixels(24, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 6]])}


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(_qwen2_vl, _patches, 6),
    "qwen2_5_vl": Family(_qwen2_5_vl, _patches, 6),
    "qwen3_vl": Family(_qwen3_vl, _patches, 6),
    "qwen3_5": Family(_qwen3_5, _patches, 6),
    "llava": Family(
        lambda: transformers.LlavaConfig(
            vision_config=_clip(), text_config=_llama(), image_token_index=IMAGE_TOKEN, vision_feature_layer=-1
        ),
        lambda: _pixels(1, 3, 28, 28),
        4,
    ),
    "vipllava": _family("VipLlava", _clip, _llama, 4, image_token_index=IMAGE_TOKEN, vision_feature_layers=[-1, -2]),
    "llava_next": _family("LlavaNext", _clip, _llama, 10, _tiles, **_LAST_LAYER, **_GRID),
    "llava_onevision": _family("LlavaOnevision", _siglip, _qwen2, 10, _tiles, **_LAST_LAYER, **_GRID),
    "smolvlm": _family("SmolVLM", _vision("smolvlm_vision"), _llama, 1, _one_tile, **_TOKEN_ID, scale_factor=2),
    "idefics3": _family("Idefics3", _vision("idefics3_vision"), _llama, 1, _one_tile, **_TOKEN_ID, scale_factor=2),
    "internvl": _family(
        "InternVL",
        lambda: transformers.InternVLVisionConfig(**{**VISION, "image_size": [28, 28], "patch_size": [14, 14]}),
        _qwen2,
        1,
        **_TOKEN_ID,
        downsample_ratio=0.5,
    ),
    "mistral3": _family(
        "Mistral3",
        lambda: transformers.PixtralVisionConfig(**VISION, head_dim=8),
        lambda: transformers.MistralConfig(**TEXT, head_dim=8),
        4,
        lambda: {**_pixels(1, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])},
        **_LAST_LAYER,
        spatial_merge_size=1,
    ),
    "cohere2_vision": _family(
        "Cohere2Vision", _siglip, _cohere2, 1, **_TOKEN_ID, downsample_factor=2, alignment_intermediate_size=32
    ),
    "aya_vision": _family(
        "AyaVision", _siglip, _cohere2, 1, **_LAST_LAYER, downsample_factor=2, adapter_layer_norm_eps=1e-6
    ),
    "got_ocr2": _family(
        "GotOcr2",
        lambda: transformers.GotOcr2VisionConfig(
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
        _qwen2,
        1,
        lambda: _pixels(1, 3, 64, 64),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=1,
    ),
    "lfm2_vl": _family(
        "Lfm2Vl",
        lambda: transformers.Siglip2VisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_patches=16,
            patch_size=2,
        ),
        lambda: transformers.Lfm2Config(**TEXT, layer_types=["conv", "full_attention"]),
        4,
        lambda: {
            **_pixels(1, 16, 12),
            "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        },
        **_TOKEN_ID,
        downsample_factor=2,
        projector_hidden_size=32,
    ),
    "ovis2": _family(
        "Ovis2",
        lambda: transformers.Ovis2VisionConfig(**VISION, vocab_size=32, hidden_stride=1, num_visual_indicator_tokens=5),
        _qwen2,
        4,
        **_TOKEN_ID,
        visual_indicator_token_ids=[251, 252, 253, 254, 255],
        vocab_size=260,
        hidden_size=32,
    ),
    "paligemma": _family(
        "PaliGemma",
        _siglip,
        lambda: transformers.GemmaConfig(**TEXT, head_dim=8),
        4,
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
    ),
    "gemma3": _family(
        "Gemma3",
        _siglip,
        lambda: transformers.Gemma3TextConfig(**TEXT, head_dim=8),
        4,
        image_token_index=IMAGE_TOKEN,
        mm_tokens_per_image=4,
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


def token_kinds(model: PreTrainedModel | PeftModel, tokens: Tensor) -> dict[str, Tensor]:
    """Return the argument of a complete model, possibly in PEFT, that marks image tokens, if it has one."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    has_kinds = "mm_token_type_ids" in inspect.signature(model.forward).parameters
    return {"mm_token_type_ids": (tokens == IMAGE_TOKEN).long()} if has_kinds else {}


def prompt(family: str) -> Tensor:
    """Return a prompt with text before and after one image."""
    count = FAMILIES[family].tokens
    return torch.tensor([1, 7, 9, *[IMAGE_TOKEN] * count, 11, 23, 42, 5])


# Tokens of images, which follow the 259 tokens of the byte tokenizer.
_MORE_TOKENS = {
    "smolvlm": ("<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>", "<end_of_utterance>"),
    "idefics3": ("<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>", "<end_of_utterance>"),
    "internvl": ("<img>", "</img>"),
}
_IMAGE_TEXTS = {"internvl": "<IMG_CONTEXT>", "qwen2_vl": "<|image_pad|>", "qwen2_5_vl": "<|image_pad|>"}
_PARTS_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_vision_model(family: str, folder: Path) -> Path:
    """Save a tiny random model with tokenizer and processor: llava, llava_next, llava_onevision, smolvlm, idefics3,
    internvl, qwen2_vl or qwen2_5_vl.
    """
    tokenizer = byte_tokenizer()
    image = _IMAGE_TEXTS.get(family, "<image>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", image]})
    more = list(_MORE_TOKENS.get(family, ()))
    tokenizer.add_special_tokens({"additional_special_tokens": more}, replace_extra_special_tokens=False)
    tokenizer.chat_template = _PARTS_TEMPLATE.replace("<image>", image)
    assert tokenizer.convert_tokens_to_ids(image) == IMAGE_TOKEN
    model = vision_model(family)
    if len(tokenizer) > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSORS[family]))
    (folder / "processor_config.json").write_text(json.dumps(_PROCESSORS[family]))
    return folder


_SQUARE = {"height": 28, "width": 28}
_QWEN_VL = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 64, "longest_edge": 4096},
    "patch_size": 4,
    "merge_size": 2,
}
_PREPROCESSORS = {
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "llava": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "crop_size": _SQUARE},
    "llava_next": {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 28},
        "crop_size": _SQUARE,
        "image_grid_pinpoints": [[28, 28], [28, 56]],
    },
    "llava_onevision": {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": _SQUARE,
        "image_grid_pinpoints": [[28, 28], [28, 56]],
    },
    "smolvlm": {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 56},
        "max_image_size": {"longest_edge": 28},
    },
    "idefics3": {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 56},
        "max_image_size": {"longest_edge": 28},
    },
    "internvl": {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": _SQUARE,
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 2,
    },
}
_LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_PROCESSORS = {
    "qwen2_vl": {"processor_class": "Qwen2VLProcessor"},
    "qwen2_5_vl": {"processor_class": "Qwen2_5_VLProcessor"},
    "llava": {"processor_class": "LlavaProcessor", **_LLAVA},
    "llava_next": {"processor_class": "LlavaNextProcessor", **_LLAVA},
    "llava_onevision": {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 4,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    },
    "smolvlm": {"processor_class": "SmolVLMProcessor", "image_seq_len": 1},
    "idefics3": {"processor_class": "Idefics3Processor", "image_seq_len": 1},
    "internvl": {"processor_class": "InternVLProcessor", "image_seq_length": 1},
}


def png(color: tuple[int, int, int], size: tuple[int, int] = (28, 28)) -> bytes:
    """Return an image with noise around a color."""
    pixels = np.random.default_rng(0).integers(0, 30, (size[1], size[0], 3)) + np.array(color)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def chat_prompt(content: str) -> str:
    """Return a question as the chat template of the saved models renders it."""
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def reference_text(folder: Path, prompt: str, *images: bytes, max_new_tokens: int = 6) -> str:
    """Return the greedy answer of a saved complete LLaVA or Qwen-VL model, generated by transformers."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    vision = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = [Image.open(io.BytesIO(image)) for image in images] or None
    if (pad := _IMAGE_TEXTS.get(model.config.model_type)) is not None:
        inputs = vision(pixels, return_tensors="pt") if pixels else {}
        counts = [int(grid.prod()) // 4 for grid in inputs.get("image_grid_thw", ())]
        parts = prompt.split("<image>")
        text = parts[0] + "".join(pad * count + part for count, part in zip(counts, parts[1:], strict=True))
        inputs = {**inputs, **tokenizer(text, return_tensors="pt", add_special_tokens=False)}
        inputs |= token_kinds(model, inputs["input_ids"])
    else:
        processor = transformers.LlavaProcessor(vision, tokenizer, chat_template=tokenizer.chat_template, **_LLAVA)
        inputs = processor(text=[prompt], images=pixels, return_tensors="pt", add_special_tokens=False)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
    return str(tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
