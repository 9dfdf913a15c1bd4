"""Images become a model's inputs: by the preprocessor in its folder, or by plain resizing without one.

Images are decoded when their batch is made. It knows a model's files, not the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor

from deltaw.data.labels import PreparedLabels, prepare_label_file, prepare_labeled
from deltaw.data.mixture import shown
from deltaw.data.pixels import ImageExample
from deltaw.data.report import Report
from deltaw.data.settings import DataSettings
from deltaw.errors import UserError
from deltaw.hub.folders import asks_for_code

_TASK = "image-classification"
_PREPROCESSOR = "preprocessor_config.json"


def prepare_images(
    settings: DataSettings, encoder: ImageEncoder, *, seed: int = 0, classes: Sequence[str] | None = None
) -> PreparedLabels:
    """As :func:`deltaw.data.labels.prepare_labeled`, and check that ``encoder`` accepts the images.

    Raises:
        UserError: the data cannot be used; the message names the file and the row.
    """
    prepared = prepare_labeled(settings, None, _TASK, seed=seed, classes=classes)
    encoder.check(prepared.train, shown(settings.train))
    encoder.check(prepared.held_out, prepared.report.held_out_source or shown(settings.train))
    return prepared


def prepare_image_file(
    reference: str, settings: DataSettings, encoder: ImageEncoder, classes: Sequence[str] | None
) -> tuple[list[ImageExample], Report]:
    """As :func:`deltaw.data.labels.prepare_label_file`, and check that ``encoder`` accepts the images.

    Raises:
        UserError: the data cannot be used, or a label is none of the classes; the message names file and row.
    """
    examples, report = prepare_label_file(reference, settings, None, _TASK, classes)
    images = [example for example in examples if isinstance(example, ImageExample)]
    encoder.check(images, reference)
    return images, report


class ImageEncoder:
    """Decodes, resizes and normalizes images as the model in ``folder`` wants them.

    With a ``preprocessor_config.json`` transformers' own preprocessor does it, always with Pillow, so the
    result does not depend on other installed libraries. Without one, images are resized to the model's
    ``image_size`` and scaled from 0…255 to -1…1 (mean and standard deviation 0.5).

    Args:
        folder: of the model, with its ``config.json``.
        trust_remote_code: run the Python files that came with it.

    Raises:
        UserError: the folder does not say the model's image size, or its files are damaged.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self._folder = folder
        self._processor = None
        try:
            how = {"local_files_only": True, "trust_remote_code": trust_remote_code}
            config = AutoConfig.from_pretrained(folder, **how)
            if (folder / _PREPROCESSOR).is_file():
                self._processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **how)
        except Exception as error:  # a configuration's own checks raise anything
            if "trust_remote_code" in str(error):
                raise asks_for_code(folder) from error
            raise UserError(
                f"the model's image preprocessing cannot be read: {str(error).splitlines()[0][:300]}",
                where=str(folder),
                hint="download or copy the model again",
            ) from error
        vision = getattr(config, "vision_config", config)
        self._channels = int(getattr(vision, "num_channels", 3))
        self._mode = "L" if self._channels == 1 else "RGB"
        self._size = _pair(getattr(vision, "image_size", None))
        self._patch = _pair(getattr(vision, "patch_size", None)) or (16, 16)
        if self._processor is None and self._size is None:
            raise UserError(
                f"the model's folder has no {_PREPROCESSOR}, and its config.json no image_size",
                where=str(folder),
                hint=f"copy the model's {_PREPROCESSOR} into it",
            )
        self._shapes: dict[tuple[int, int], tuple[int, int]] = {}
        self.resizes = self._shape((30, 40)) == self._shape((110, 90))

    def tokens(self, example: ImageExample) -> int:
        """Tokens of an image: its patches, and one for the class."""
        height, width = self._shape(example.size)
        return max(1, height // self._patch[0]) * max(1, width // self._patch[1]) + 1

    def check(self, examples: Sequence[object], source: str) -> None:
        """Check that all images will have one size.

        Raises:
            UserError: they will not, since the preprocessor keeps their size.
        """
        images = [example for example in examples if isinstance(example, ImageExample)]
        if self.resizes or not images:
            return
        first = images[0].size
        for example in images:
            if self._shape(example.size) != self._shape(first):
                raise UserError(
                    f"the image has {example.size[0]}×{example.size[1]} pixels, those before it "
                    f"{first[0]}×{first[1]}, and the model's preprocessor does not resize",
                    where=str(example.image)
                    if isinstance(example.image, Path)
                    else f"{source}, row {example.row}",
                    hint=f"resize the images, or set do_resize and size in {self._folder / _PREPROCESSOR}",
                )

    def encode(self, examples: Sequence[ImageExample]) -> Tensor:
        """fp32 (images, channels, height, width).

        Raises:
            UserError: an image has become unreadable, or their sizes differ.
        """
        images = (example.decoded().convert(self._mode) for example in examples)
        if not self.resizes:
            return self._encode(list(images))
        # One at a time, so that no more than one is in memory at its full size.
        return torch.cat([self._encode([image]) for image in images])

    def _shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that an image of ``size`` has for the model."""
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
            stacked = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float()
            return stacked.contiguous() / 127.5 - 1.0
        try:
            encoded = self._processor(arrays, return_tensors="pt", input_data_format="channels_last")
            return encoded["pixel_values"].float()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"the model's preprocessor does not accept the images: {str(error).splitlines()[0][:300]}",
                where=str(self._folder / _PREPROCESSOR),
                hint="check that it belongs to the model; without the file, images are only resized",
            ) from error


def _pair(size: object) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None
