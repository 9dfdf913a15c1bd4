"""Assembly of a vision-language model from a language model and a vision encoder.

The result is a folder of transformers' LLaVA class. It contains the weights of both models and a new connector, which
maps the encoder's features to the embeddings of the language model. The folder is stored in a cache by the digests of
the files of both models.

A new connector must be trained on standardized features. :func:`fold_statistics` then includes the statistics in its
first layer.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, PretrainedConfig, PreTrainedModel

from deltaw.cache.entries import Cache
from deltaw.cache.keys import key
from deltaw.cache.results import file_digest
from deltaw.errors import UserError, first_line
from deltaw.hub.checkpoint import WEIGHTS, WeightFiles, read_checkpoint
from deltaw.hub.parameter_names import match_names
from deltaw.hub.transformers_private import quiet
from deltaw.progress import LogFunction, track_progress
from deltaw.settings.model_parts import CONNECTORS
from deltaw.tensor_files import StoredTensor, TensorEntry, TensorWriter, row_blocks

IMAGE_TOKEN = "<image>"
# Maximum total size of all assembled models in bytes.
LIMIT_BYTES = 256 * 2**30
DEPENDENCIES = (
    "transformers",
    "tokenizers",
    "deltaw.hub.vision_parts",
    "deltaw.hub.checkpoint",
    "deltaw.hub.parameter_names",
    "deltaw.tensor_files",
)

# File that marks a folder with an untrained connector, with the sizes of the other files. A merged model does not
# contain it.
_MARKER = "new-connector"
_READ = (".safetensors", ".json", ".jinja", ".txt", ".model")
_LANGUAGE = "model.language_model."
_VISION = "model.vision_tower."
_PROJECTOR = "model.multi_modal_projector."
_EMBEDDING = f"{_LANGUAGE}embed_tokens.weight"
_HEAD = "lm_head.weight"
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# Settings of language models with a head that is more than a linear layer.
_LOGIT_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def assembled_folder(
    language: Path, vision: Path, *, connector: str = CONNECTORS[0], seed: int = 0, log: LogFunction = print
) -> Path:
    """Return the folder of a model assembled from two models. It is assembled if it is not cached.

    Args:
        language: Folder of a causal language model.
        vision: Folder of a vision encoder with one hidden state per patch, for example DINOv2, SigLIP or CLIP.
        connector: "linear", or "mlp" with GELU between two layers.
        seed: Seed of the connector's weights.
        log: Receives a message if the model is assembled.

    Raises:
        UserError: if a folder contains another kind of model, or the assembled model cannot be stored.
    """
    cache = Cache("parts", LIMIT_BYTES, mark="{}")
    digests = [
        {file.name: file_digest(file) for file in sorted(folder.iterdir()) if file.suffix in _READ and file.is_file()}
        for folder in (language, vision)
    ]
    name = key("parts", [*digests, connector, seed], DEPENDENCIES)

    def assemble(folder: Path) -> None:
        with track_progress("assembling the model"), quiet():
            parts = _language_part(language), _vision_part(vision)
            log(f"assembling the vision-language model, once, into {cache.folder / name}")
            _save(*parts, folder, connector, seed)

    return cache.create_folder(name, assemble, _is_complete)


def _is_complete(folder: Path) -> bool:
    """Return True if all files of an assembled model have the size that the marker contains."""
    with contextlib.suppress(OSError, ValueError):
        sizes = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return isinstance(sizes, dict) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    return False


def is_new_connector(folder: Path) -> bool:
    """Return True if the connector of a model's folder is not trained."""
    return (folder / _MARKER).is_file()


def fold_statistics(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a linear layer that standardizes its inputs itself.

    Args:
        weight: (out, in) weight for standardized inputs ``(x - mean) / std``.
        bias: (out,) bias.
        mean: (in,) mean of each input.
        std: (in,) standard deviation of each input.
    """
    scaled = weight / std
    return scaled, bias - scaled @ mean


@dataclass(frozen=True)
class _Part:
    """Language model or vision encoder.

    Attributes:
        folder: Folder of the model.
        config: Configuration of the model.
        tensors: Tensors of the weight files by name in the assembled model.
    """

    folder: Path
    config: PretrainedConfig
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class _VisionPart(_Part):
    """Vision encoder.

    Attributes:
        processor: Image processor.
        num_patches: Number of patches of an image.
        num_prefix: Number of hidden states that precede those of the patches, for example of the CLS token.
    """

    processor: Any
    num_patches: int
    num_prefix: int


def _read_config(folder: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, **_LOCAL)
    except Exception as error:  # checks of configuration classes raise various exceptions
        hint = "use a model that transformers supports without additional code"
        message = f"the model's config.json cannot be used: {first_line(error)}"
        raise UserError(message, location=str(folder), hint=hint) from error
    if getattr(config, "quantization_config", None) is not None:
        raise UserError("the weights are quantized", location=str(folder), hint="use a model in bf16, fp16 or fp32")
    return config


def _language_part(folder: Path) -> _Part:
    config = _read_config(folder)
    hint = "use a causal language model, for example of type llama, qwen2, qwen3 or mistral"
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise _wrong_part(folder, config, "language model", hint) from error
    names = {type(model).__name__}
    head = model.get_output_embeddings()
    is_complete = config.get_text_config(decoder=True) is config and names >= set(config.architectures or names)
    if not is_complete or not isinstance(head, torch.nn.Linear):
        raise _wrong_part(folder, config, "language model", hint)
    scaled = [name for name in _LOGIT_SETTINGS if getattr(config, name, None) not in (None, 1)]
    if scaled or head.bias is not None or not hasattr(model.base_model, "embed_tokens"):
        message = f"transformers' LLaVA class does not support the embedding or the output layer of {config.model_type}"
        raise UserError(message, location=str(folder), hint=hint)
    head_name = next(f"{name}.weight" for name, module in model.named_modules() if module is head)
    prefix = f"{model.base_model_prefix}."
    files, stored, converted = _match(model, folder)
    tensors = {_HEAD if n == head_name else _LANGUAGE + n.removeprefix(prefix): t for n, t in stored.items()}
    tensors |= {_LANGUAGE + name.removeprefix(prefix): files.tensors[name] for name in converted}
    return _Part(folder, config, tensors)


def _vision_part(folder: Path) -> _VisionPart:
    config = _read_config(folder)
    config = getattr(config, "vision_config", None) or config  # of a complete CLIP or SigLIP model
    hint = "use a vision encoder with one hidden state per patch, for example of type dinov2, siglip or clip"
    try:
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
        is_vision = model.main_input_name == "pixel_values"
    except Exception as error:
        raise _wrong_part(folder, config, "vision encoder", hint) from error
    if not is_vision:
        raise _wrong_part(folder, config, "vision encoder", hint)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **_LOCAL)
        pixels = processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
    except Exception as error:
        message = f"the image processor cannot be used: {first_line(error)}"
        raise UserError(message, location=str(folder), hint="copy the model's preprocessor_config.json") from error
    try:
        output = model(pixels.to("meta"), output_hidden_states=True)
        states = output.hidden_states[-1]
        num_patches = (pixels.shape[-2] // config.patch_size) * (pixels.shape[-1] // config.patch_size)
        num_prefix = states.shape[1] - num_patches
        is_supported = states.shape == (1, states.shape[1], config.hidden_size) and num_prefix >= 0
    except Exception as error:
        raise _wrong_part(folder, config, "supported vision encoder", hint) from error
    if not is_supported:
        raise _wrong_part(folder, config, "supported vision encoder", hint)
    files, stored, converted = _match(model, folder)
    tensors = {_VISION + name: tensor for name, tensor in stored.items()}
    tensors |= {_VISION + name: files.tensors[name] for name in converted}
    return _VisionPart(folder, config, tensors, processor, num_patches, num_prefix)


def _wrong_part(folder: Path, config: PretrainedConfig, kind: str, hint: str) -> UserError:
    names = ", ".join(config.architectures or ())
    description = f"a model of type {config.model_type}" + (f" ({names})" if names else "")
    return UserError(f"{description} is not a {kind}", location=str(folder), hint=hint)


def _match(model: PreTrainedModel, folder: Path) -> tuple[WeightFiles, dict[str, StoredTensor], list[str]]:
    """Return the weight files, tensors by parameter, and names of tensors that transformers converts during loading."""
    files = read_checkpoint(folder)
    names = match_names(model, files.tensors)
    stored = {parameter: files.tensors[name] for parameter, name in names.stored.items()}
    optional = {*names.converted, *model.all_tied_weights_keys}
    expected = {n: tuple(p.shape) for n, p in model.state_dict().items() if n in stored or n not in optional}
    wrong = [name for name, shape in expected.items() if name not in stored or stored[name].shape != shape]
    if wrong:
        message = f"{len(wrong)} tensors are missing or have another shape than config.json, for example '{wrong[0]}'"
        raise UserError(message, location=str(folder), hint="copy or download the model again")
    return files, stored, [name for group in names.converted.values() for name in group]


def _save(language: _Part, vision: _VisionPart, folder: Path, connector: str, seed: int) -> None:
    """Write all files of the assembled model."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(language.folder, **_LOCAL)
    except Exception as error:
        message = f"the tokenizer cannot be used: {first_line(error)}"
        raise UserError(message, location=str(language.folder), hint="copy the model's tokenizer.json") from error
    for name in (*_LOCAL, "is_local"):
        tokenizer.init_kwargs.pop(name, None)  # settings of this call
    tokenizer.add_tokens([transformers.AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    image_id = tokenizer.get_vocab()[IMAGE_TOKEN]
    num_rows = language.config.vocab_size
    if image_id > num_rows:
        message = f"the tokenizer has {image_id} tokens, and the model {num_rows}"
        raise UserError(message, location=str(language.folder), hint="download the model again")
    strategy: Literal["default", "full"] = "default" if vision.num_prefix else "full"
    dtype = language.config.dtype or torch.float32
    language.config.name_or_path = vision.config.name_or_path = ""  # otherwise saved
    language.config.vocab_size = max(num_rows, image_id + 1)
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=image_id,
        image_seq_length=vision.num_patches + max(0, vision.num_prefix - 1),
        projector_hidden_act="gelu" if connector == "mlp" else "linear",
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-1,
        tie_word_embeddings=language.config.tie_word_embeddings,
        architectures=[LlavaForConditionalGeneration.__name__],
        dtype=dtype,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    tensors: dict[str, StoredTensor | Tensor] = {**language.tensors, **vision.tensors}
    tensors |= _new_connector(model, _rms(language.tensors[_EMBEDDING]), connector, seed)
    grown = {_EMBEDDING, _HEAD} & set(tensors) if image_id == num_rows else set()
    _write_weights(folder / WEIGHTS, tensors, {name: _mean_row(language.tensors[name]) for name in sorted(grown)})
    _match(model, folder)
    config.save_pretrained(folder)
    transformers.LlavaProcessor(
        vision.processor,
        tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=vision.num_prefix,
    ).save_pretrained(folder)
    generation = language.folder / "generation_config.json"
    if generation.is_file():
        (folder / generation.name).write_bytes(generation.read_bytes())
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / _MARKER).write_text(json.dumps(sizes), encoding="utf-8")


def _new_connector(model: PreTrainedModel, embedding_rms: float, connector: str, seed: int) -> dict[str, Tensor]:
    """Return the tensors of a random connector.

    Its outputs for standardized features are about as large as embeddings of text. The second layer of a linear
    connector is the identity.
    """
    tensors = {name: torch.zeros(p.shape) for name, p in model.named_parameters() if name.startswith(_PROJECTOR)}
    first, second = (tensors[f"{_PROJECTOR}linear_{n}.weight"] for n in (1, 2))
    generator = torch.Generator().manual_seed(seed)
    if connector == "mlp":
        first.normal_(std=first.shape[1] ** -0.5, generator=generator)
        second.normal_(std=embedding_rms * second.shape[1] ** -0.5, generator=generator)
    else:
        first.normal_(std=embedding_rms * first.shape[1] ** -0.5, generator=generator)
        second.copy_(torch.eye(len(second)))
    return tensors


def _rms(tensor: StoredTensor) -> float:
    """Return the root mean square of a tensor."""
    blocks = (tensor.rows(start, stop) for start, stop in row_blocks(tensor.shape))
    total = sum(float(block.double().square().sum()) for block in blocks)
    if not math.isfinite(total):
        hint = "use a model without NaN and infinite weights"
        raise UserError(f"the weight '{tensor.name}' is not finite", location=str(tensor.file), hint=hint)
    return float(total / tensor.numel) ** 0.5


def _mean_row(tensor: StoredTensor) -> Tensor:
    """Return the mean (1, d) of the rows of a matrix.

    As a row of the head, it never gives the largest logit, because its logit is the mean of those of all other tokens.
    The mean of bf16 values has the same fingerprint if the model is stored in fp32 or in bf16.
    """
    blocks = (tensor.rows(start, stop) for start, stop in row_blocks(tensor.shape))
    total = torch.stack([block.bfloat16().double().sum(0) for block in blocks]).sum(0)
    return (total / tensor.shape[0])[None].to(tensor.dtype)


def _write_weights(path: Path, tensors: Mapping[str, StoredTensor | Tensor], additional: Mapping[str, Tensor]) -> None:
    """Write a safetensors file block by block.

    Args:
        path: File to write.
        tensors: Tensors by name.
        additional: Rows to append to some of them.
    """
    entries = []
    for name, tensor in tensors.items():
        num_additional = len(additional[name]) if name in additional else 0
        shape = (tensor.shape[0] + num_additional, *tensor.shape[1:]) if num_additional else tuple(tensor.shape)
        entries.append(TensorEntry(name, tensor.dtype, shape))
    entries.sort(key=lambda entry: (-entry.dtype.itemsize, entry.name))
    with path.open("wb") as file, TensorWriter(file, entries, {"format": "pt"}) as writer:
        for entry in entries:
            tensor = tensors[entry.name]
            if isinstance(tensor, StoredTensor):
                for start, stop in row_blocks(tensor.shape):
                    writer.write(tensor.rows(start, stop))
            else:
                writer.write(tensor)
            if entry.name in additional:
                writer.write(additional[entry.name])
