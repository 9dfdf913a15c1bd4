"""Image preprocessing. Images are decoded when their batch is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # in 5.11 exported only with torchvision

from deltaw.data.pixels import ImageExample
from deltaw.errors import UserError
from deltaw.hub.folders import remote_code_error

_PREPROCESSOR = "preprocessor_config.json"


class ImageEncoder:
    """Decodes, resizes and normalizes images for the model in ``folder``.

    If the folder has a ``preprocessor_config.json``, transformers' image processor is used, always with Pillow, so that
    results do not depend on other installed libraries. Otherwise images are resized to the model's ``image_size`` and
    scaled from 0…255 to -1…1 (mean and standard deviation 0.5).

    Args:
        folder: Model folder with a ``config.json``.
        trust_remote_code: Run Python files of the model folder.

    Raises:
        UserError: if the image size of the model is unknown, or its files are damaged.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self._folder = folder
        self._processor = None
        try:
            options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
            config = AutoConfig.from_pretrained(folder, **options)
            if (folder / _PREPROCESSOR).is_file():
                self._processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
        except Exception as error:  # custom configuration classes raise arbitrary exceptions
            if "trust_remote_code" in str(error):
                raise remote_code_error(folder) from error
            message = f"the model's image preprocessing cannot be read: {str(error).splitlines()[0][:300]}"
            raise UserError(message, location=str(folder), hint="download or copy the model again") from error
        vision = getattr(config, "vision_config", config)
        self._channels = int(getattr(vision, "num_channels", 3))
        self._mode = "L" if self._channels == 1 else "RGB"
        self._size = _pair(getattr(vision, "image_size", None))
        self._patch = _pair(getattr(vision, "patch_size", None)) or (16, 16)
        if self._processor is None and self._size is None:
            message = f"the model's folder has no {_PREPROCESSOR}, and its config.json no image_size"
            raise UserError(message, location=str(folder), hint=f"copy the model's {_PREPROCESSOR} into it")
        self._shapes: dict[tuple[int, int], tuple[int, int]] = {}
        self.resizes = self._shape((30, 40)) == self._shape((110, 90))

    def tokens(self, example: ImageExample) -> int:
        """Return the number of tokens of an image: its patches and the class token."""
        height, width = self._shape(example.size)
        return max(1, height // self._patch[0]) * max(1, width // self._patch[1]) + 1

    def check(self, examples: Sequence[object], source: str) -> None:
        """Check that all images have the same size after preprocessing.

        Raises:
            UserError: if sizes differ and the preprocessor does not resize.
        """
        images = [example for example in examples if isinstance(example, ImageExample)]
        if self.resizes or not images:
            return
        first = images[0].size
        for example in images:
            if self._shape(example.size) != self._shape(first):
                height, width = example.size
                location = f"{source}, row {example.row}"
                message = f"the image has {height}×{width} pixels, those before it {first[0]}×{first[1]}, "
                message += "and the model's preprocessor does not resize"
                hint = f"resize the images, or set do_resize and size in {self._folder / _PREPROCESSOR}"
                location = str(example.image) if isinstance(example.image, Path) else location
                raise UserError(message, location=location, hint=hint)

    def encode(self, examples: Sequence[ImageExample]) -> Tensor:
        """Return (images, channels, height, width) fp32 pixel values.

        Raises:
            UserError: if an image cannot be read anymore, or if sizes differ.
        """
        images = (example.decoded().convert(self._mode) for example in examples)
        if not self.resizes:
            return self._encode(list(images))
        # Process images one at a time, to have one full-size image in memory.
        return torch.cat([self._encode([image]) for image in images])

    def _shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the preprocessed height and width of an image of ``size``."""
        if size not in self._shapes:
            height, width = self._encode([Image.new(self._mode, (size[1], size[0]))]).shape[2:]
            self._shapes[size] = (int(height), int(width))
        return self._shapes[size]

    def _encode(self, images: list[Image.Image]) -> Tensor:
        if self._processor is None:
            height, width = self._size or (0, 0)
            images = [image.resize((width, height), Image.Resampling.BILINEAR) for image in images]
        arrays = [np.asarray(image).reshape(image.height, image.width, self._channels) for image in images]
        if self._processor is None:
            return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1.0
        try:
            encoded = self._processor(arrays, return_tensors="pt", input_data_format="channels_last")
            return encoded["pixel_values"].float()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            message = f"the model's preprocessor does not accept the images: {str(error).splitlines()[0][:300]}"
            hint = "check that it belongs to the model; without this file, images are resized and scaled to -1…1"
            raise UserError(message, location=str(self._folder / _PREPROCESSOR), hint=hint) from error


def _pair(size: object) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None
