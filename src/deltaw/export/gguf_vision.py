"""Vision tower and connector of a vision-language model as a GGUF file, which llama.cpp reads with ``--mmproj``.

llama.cpp selects its computation by the projector type. For ``mlp`` (LLaVA), it computes the tower up to the feature
layer, and two linear layers with GELU between them. For ``idefics3`` (also SmolVLM), it merges patches and computes one
linear layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFType, GGUFWriter
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from deltaw.errors import UserError
from deltaw.export.base import AdapterBase
from deltaw.export.gguf_file import KINDS, Shapes, storage_type, write_gguf
from deltaw.export.gguf_tokenizer import require_tokenizer
from deltaw.export.merged import MergedModel, MergedTensor
from deltaw.hub.parameter_names import match_names
from deltaw.hub.processors import ModelProcessor
from deltaw.lora.complete_names import complete_names

_TOWER = re.compile(r"model\.vision_(?:tower|model)\.(?:vision_model\.)?(?P<name>.+)")
_LAYER = re.compile(r"encoder\.layers\.(?P<index>\d+)\.")
_CONNECTORS = {
    "model.multi_modal_projector.linear_1": "mm.0",
    "model.multi_modal_projector.linear_2": "mm.2",
    "model.connector.modality_projection.proj": "mm.model.fc",
}
# Prefixes of connectors in the complete model.
CONNECTOR_PREFIXES = ("model.multi_modal_projector.", "model.connector.")
# Types of the tower by type of the model.
_TOWERS = {
    "llava": ("clip_vision_model", "siglip_vision_model"),
    "idefics3": ("idefics3_vision",),
    "smolvlm": ("smolvlm_vision",),
}
_GELU = ("gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_ACTIVATIONS = ("quick_gelu", "silu", *_GELU)


def has_vision_file(model_type: str) -> bool:
    """True if vision towers of this type of models are exported, unless llama.cpp lacks a feature of them."""
    return model_type in _TOWERS


def mmproj_path(path: Path) -> Path:
    """Return the path of the vision file for the GGUF file of a language model or an adapter."""
    return path.with_name(f"mmproj-{path.name}")


def split_tensors(merged: MergedModel) -> tuple[tuple[MergedTensor, ...], dict[str, MergedTensor]]:
    """Return the tensors of the language model, named as in a text model, and all others by parameter.

    Raises:
        UserError: if transformers assembles a parameter from several tensors.
    """
    base = merged.job.base
    tensors = {tensor.name: tensor for tensor in merged.tensors}
    skeleton = base.skeleton()
    names = match_names(skeleton, tensors)
    mapping = complete_names(base.trained_part(skeleton))
    assert mapping is not None
    _refuse_if(base, bool(names.converted), "weights that transformers converts during loading")
    language = []
    others = dict[str, MergedTensor]()
    for name, stored in names.stored.items():
        if (text_name := mapping.from_complete(name)) is None:
            others[name] = tensors[stored]
        else:
            language.append(replace(tensors[stored], name=text_name))
    return tuple(language), others


# Shape of a tensor, and a function that loads its values.
_Entry = tuple[tuple[int, ...], Callable[[], Tensor]]


@dataclass(frozen=True)
class VisionFile:
    """Content of a vision file.

    Attributes:
        tensors: Tensors by name.
        metadata: Writes the metadata, except for the origin.
        notes: Notes for the user about differences in llama.cpp.
    """

    tensors: Mapping[str, _Entry]
    metadata: Callable[[GGUFWriter], None]
    notes: tuple[str, ...]

    def write(self, path: Path, kind: str, origin: Callable[[GGUFWriter], None]) -> None:
        """Write the file with matrices in fp32 if ``kind`` is "f32", otherwise in fp16.

        Args:
            origin: Writes the name of the model.

        Raises:
            UserError: if the file cannot be written.
        """
        kind = "f32" if kind == "f32" else "f16"

        def metadata(out: GGUFWriter) -> None:
            out.add_type(GGUFType.MMPROJ)
            origin(out)
            out.add_file_type(int(KINDS[kind][2]))
            out.add_quantization_version(gguf.GGML_QUANT_VERSION)
            self.metadata(out)

        def tensors() -> Iterator[tuple[str, np.ndarray]]:
            for name, (_, load) in self.tensors.items():
                yield name, load().float().numpy()

        shapes: Shapes = {n: (shape, storage_type(n, shape, kind)) for n, (shape, _) in self.tensors.items()}
        write_gguf(path, "clip", metadata, shapes, tensors())


def vision_file(
    base: AdapterBase, tokenizer: PreTrainedTokenizerBase | None, tensors: Mapping[str, MergedTensor]
) -> VisionFile:
    """Return the content of the vision file of a model.

    Args:
        base: Base model.
        tokenizer: Tokenizer of the base model.
        tensors: Tensors outside of the language model, from :func:`split_tensors`.

    Raises:
        UserError: if llama.cpp does not compute the model's tower or connector.
    """
    config = base.skeleton().config
    _check(base, config)
    vision = config.vision_config
    is_llava = config.model_type == "llava"
    layers = int(vision.num_hidden_layers)
    if is_llava:
        layers = config.vision_feature_layer % (layers + 1)
    mean, std, grid = _image_settings(base, require_tokenizer(tokenizer, base.folder), config)
    _refuse_if(base, not is_llava and grid < 2, "an image processor that does not split images")

    def metadata(out: GGUFWriter) -> None:
        out.add_clip_has_vision_encoder(True)
        out.add_clip_projector_type("mlp" if is_llava else "idefics3")
        out.add_vision_projection_dim(base.config.hidden_size)
        out.add_vision_image_size(vision.image_size)
        out.add_vision_patch_size(vision.patch_size)
        out.add_vision_embedding_length(vision.hidden_size)
        out.add_vision_feed_forward_length(vision.intermediate_size)
        out.add_vision_block_count(layers)
        out.add_vision_head_count(vision.num_attention_heads)
        out.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
        out.add_vision_image_mean(mean)
        out.add_vision_image_std(std)
        out.add_vision_use_gelu(vision.hidden_act in _GELU)
        out.add_vision_use_silu(vision.hidden_act == "silu")
        if is_llava:  # otherwise llama.cpp omits the last layer
            out.add_array("clip.vision.feature_layer", [layers])
        else:
            out.add_vision_projector_scale_factor(config.scale_factor)
            out.add_vision_preproc_image_size(grid * vision.image_size)

    notes = []
    if is_llava:
        notes.append("note: llama.cpp pads images to squares instead of cropping or stretching them: use square images")
    if vision.model_type == "clip_vision_model":
        notes.append("note: llama.cpp shifts the features of CLIP towers by one patch (its issue 25814)")
    return VisionFile({**_tower(tensors, layers, is_llava), **_connector(tensors, config)}, metadata, tuple(notes))


def _tower(tensors: Mapping[str, MergedTensor], layers: int, is_llava: bool) -> dict[str, _Entry]:
    """Return the tensors of the tower that the features depend on. LLaVA reads the output of a layer without norm."""
    names = gguf.get_tensor_name_map(MODEL_ARCH.MMPROJ, layers)
    found = {}
    for parameter, tensor in tensors.items():
        if (match := _TOWER.fullmatch(parameter)) is None:
            continue
        layer = _LAYER.match(match["name"])
        is_unused = match["name"].startswith(("head.", *(("post_layernorm.",) if is_llava else ())))
        if is_unused or (layer is not None and int(layer["index"]) >= layers):
            continue
        module, _, attribute = match["name"].rpartition(".")
        if attribute == "class_embedding":
            name = "v.class_embd"
        else:
            name = f"{names.get_name(f'vision_tower.vision_model.{module}')}.{attribute}"
        found[name] = tensor.shape, tensor.load
    return found


def _connector(tensors: Mapping[str, MergedTensor], config: PretrainedConfig) -> dict[str, _Entry]:
    """Return the tensors of the connector.

    llama.cpp always computes GELU between the layers of LLaVA's connector. A connector without it is stored with twice
    the width, because GELU(x) - GELU(-x) = x.
    """
    values = {}
    for parameter, tensor in tensors.items():
        module, _, attribute = parameter.rpartition(".")
        if module in _CONNECTORS:
            values[f"{_CONNECTORS[module]}.{attribute}"] = tensor.load().float()
    if config.model_type == "llava":
        for name in ("mm.0", "mm.2"):
            values.setdefault(f"{name}.bias", torch.zeros(len(values[f"{name}.weight"])))
        if config.projector_hidden_act == "linear":
            for name, dim in (("mm.0.weight", 0), ("mm.0.bias", 0), ("mm.2.weight", 1)):
                values[name] = torch.cat([values[name], -values[name]], dim)
    return {name: (tuple(value.shape), value.clone) for name, value in values.items()}


def _check(base: AdapterBase, config: PretrainedConfig) -> None:
    """Raise a UserError if llama.cpp does not compute the tower or the connector."""
    kind = config.model_type
    _refuse_if(base, kind not in _TOWERS, f"images of {kind} models")
    vision = config.vision_config
    _refuse_if(base, vision.model_type not in _TOWERS[kind], f"a vision tower of type {vision.model_type}")
    _refuse_if(base, vision.hidden_act not in _ACTIVATIONS, f"a vision tower with the activation {vision.hidden_act}")
    # llama.cpp would exchange both layers, as in old files.
    same_width = vision.hidden_size == vision.intermediate_size
    _refuse_if(base, same_width, "a vision tower whose hidden and intermediate size are equal")
    _refuse_if(base, "gemma" in base.config.model_type, "images of models with scaled embeddings (Gemma)")
    if kind != "llava":
        return
    layer = config.vision_feature_layer
    layers = int(vision.num_hidden_layers)
    has_one = isinstance(layer, int) and -layers <= layer <= layers and layer != 0
    _refuse_if(base, not has_one, f"vision_feature_layer: {layer}")
    strategy = "default" if vision.model_type == "clip_vision_model" else "full"
    feature = f"vision_feature_select_strategy: {config.vision_feature_select_strategy}"
    _refuse_if(base, config.vision_feature_select_strategy != strategy, feature)
    activation = config.projector_hidden_act
    _refuse_if(base, activation not in ("linear", *_GELU), f"a connector with the activation {activation}")


def _image_settings(
    base: AdapterBase, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> tuple[list[float], list[float], int]:
    """Return mean and standard deviation by channel for pixels in [0, 1], and the number of tiles in a row.

    They are measured on a black and a white image, so they apply to any image processor.
    """
    size = int(config.vision_config.image_size)
    values = []
    count = 1
    processor = ModelProcessor(base.folder, config, tokenizer)
    for color in ("black", "white"):
        pixels: Any = processor.encode(Image.new("RGB", (size, size), color))[1]["pixel_values"]
        is_other = pixels.shape[-3:] != (3, size, size)
        _refuse_if(base, is_other, f"an image processor for images of {pixels.shape[-1]} px")
        tiles = pixels.reshape(-1, 3, size * size).float()
        has_border = bool((tiles.amax((0, 2)) - tiles.amin((0, 2))).max() > 1e-3)
        _refuse_if(base, has_border, "an image processor that adds borders")
        values.append(tiles.mean((0, 2)).double())
        count = len(tiles)
    std = 1 / (values[1] - values[0])
    return (-values[0] * std).tolist(), std.tolist(), math.isqrt(count - 1) if count > 1 else 1


def _refuse_if(base: AdapterBase, is_unsupported: bool, feature: str) -> None:
    if is_unsupported:
        hint = "merge it for another program (deltaw merge); with a frozen connector, use --format gguf-adapter"
        raise UserError(f"deltaw does not export {feature} to GGUF", location=str(base.folder), hint=hint)
