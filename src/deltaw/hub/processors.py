"""Image processors of vision-language models: the text and the inputs of an image."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import ImageProcessingMixin, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # in 5.11 exported only with torchvision
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from deltaw.errors import UserError, first_line
from deltaw.hub.outside_references import read_json_object
from deltaw.hub.transformers_private import quiet

# Files of a processor, which belong to a complete model.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
# Keys of processor_config.json with the processors of each modality. The other keys are settings of the class.
_PARTS = ("image_processor", "tokenizer", "video_processor", "feature_extractor", "audio_tokenizer")


class ModelProcessor:
    """transformers' processor of a model, for images only. Images are resized with Pillow if it supports them.

    Args:
        folder: Model folder with ``preprocessor_config.json``.
        config: Configuration of the model.
        tokenizer: Tokenizer of the model.

    Attributes:
        placeholder: Text of an image in a rendered conversation.
        token_id: Token id of a feature in the text of an image.
        settings: Settings of the processor, which determine its outputs.

    Raises:
        UserError: if the folder has no processor, or the processor cannot be loaded.
    """

    def __init__(self, folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        name = PROCESSOR_MAPPING_NAMES.get(config.model_type)
        if name is None:
            hint = "use a model of another family"
            raise UserError(f"transformers has no processor for {config.model_type}", location=str(folder), hint=hint)
        settings = {file: read_json_object(folder / file) for file in PROCESSOR_FILES[:2]}
        self.settings: dict[str, object] = {"class": name, **settings}
        self._folder = folder
        self._tokenizer = tokenizer
        try:
            with quiet():
                self._processor = _processor(name, folder, settings["processor_config.json"], tokenizer)
            self.placeholder = str(self._processor.image_token)
        except Exception as error:  # classes of processors raise various errors for invalid settings
            message = f"the model's image processor cannot be loaded: {first_line(error)}"
            hint = "copy the model's preprocessor_config.json and processor_config.json into its folder"
            raise UserError(message, location=str(folder), hint=hint) from error
        token_id = getattr(config, "image_token_id", None)
        self.token_id = int(config.image_token_index if token_id is None else token_id)

    def encode(self, image: Image.Image) -> tuple[str, dict[str, Tensor]]:
        """Return the text of an image, with an image token for each feature, and the model's inputs.

        Raises:
            UserError: if the processor rejects the image, or its tokens change if they are decoded and tokenized again.
        """
        try:
            options = {"return_tensors": "pt", "add_special_tokens": False}
            inputs = dict(self._processor(text=[self.placeholder], images=[image.convert("RGB")], **options))
        except Exception as error:
            message = f"the model's processor rejects the image: {first_line(error)}"
            raise UserError(message, hint="resize the image, or remove it") from error
        ids = inputs.pop("input_ids")[0].tolist()
        decoding = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        text = str(self._tokenizer.decode(ids, **decoding))
        if self._tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            message = "the tokens that the model's processor writes for an image are not the tokens of a text"
            raise UserError(message, location=str(self._folder), hint="use a model of another family")
        return text, inputs

    def tokenize(self, text: str) -> Tensor:
        """Return the (length,) tokens of a text, without additional special tokens."""
        return torch.tensor(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _processor(name: str, folder: Path, settings: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return a processor without a video processor, which would require torchvision."""
    kind = getattr(transformers, name)
    options = {key: value for key, value in settings.items() if key not in (*_PARTS, "processor_class")}
    unchecked = type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda self, name, value: type(value)})
    parts = {"tokenizer": tokenizer, "image_processor": _image_processor(folder, settings)}
    if "video_processor" in inspect.signature(kind.__init__).parameters:
        parts["video_processor"] = None
    return unchecked(**parts, **options)


def _image_processor(folder: Path, settings: dict[str, object]) -> Any:
    if (folder / "preprocessor_config.json").is_file() or "image_processor" not in settings:
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        return AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
    nested: Any = settings["image_processor"]
    names = [f"{nested['image_processor_type'].removesuffix('Fast')}Pil", nested["image_processor_type"]]
    kind = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    # Call no other function with settings of the file.
    if not (isinstance(kind, type) and issubclass(kind, ImageProcessingMixin)):
        raise ValueError(f"{names[1]} is not an image processor")
    return kind(**nested)
