"""Image preprocessing, and batches of labeled rows.

Images are decoded when their batch is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # in 5.11 exported only with torchvision

from deltaw.data.example import LabeledExample, RowGroup, rows_of
from deltaw.data.packing import cut_by_length, longest_of, microbatch_cost, pad_rows
from deltaw.data.pixels import AnyExample, ImageExample
from deltaw.errors import UserError
from deltaw.hub.folders import remote_code_error
from deltaw.kernels.transfer import to_device

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
            options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
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
                (height, width), location = example.size, f"{source}, row {example.row}"
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


# Batches of labeled rows: padded texts, or images. Groups of compared texts are never divided.


# Rows are padded to multiples of this, because matrix libraries compile a kernel for each new shape.
GRID = 8


@dataclass(frozen=True, eq=False)
class LabelBatch:
    """Microbatch of labeled rows.

    Attributes:
        inputs: Keyword arguments of the model: ``input_ids`` and ``attention_mask`` (rows, longest), with
            ``token_type_ids`` for pairs; or ``pixel_values`` (rows, channels, height, width) in fp32; or, for packed
            rows,
            ``input_ids`` and ``position_ids`` (1, T) with ``packed_layout``.
        targets: (rows,) int64 class indices, or fp32 numbers.
        examples: Rows in batch order.
        rows: Number of rows.
        row_tokens: Number of tokens of all rows.
        tokens: Number of computed tokens, including padding.
        sizes: Number of rows of each group, or empty without groups. In a preference pair the preferred row is first,
            and
            ``targets`` are margins.
        read_indices: (rows,) indices of the packed tokens that the head reads, or None if rows are padded.
        enter: Context manager that provides a batch for the stored outputs of frozen layers, to be used instead of this
            one. None to use this batch.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    examples: tuple[AnyExample, ...]
    rows: int
    row_tokens: int
    tokens: int
    sizes: tuple[int, ...] = ()
    read_indices: Tensor | None = None
    enter: Callable[[], AbstractContextManager[LabelBatch]] | None = None

    @property
    def label_tokens(self) -> int:
        """Return the number of labels: one per row, or one per group."""
        return len(self.sizes) or self.rows


@dataclass(frozen=True)
class LabelMicroBatcher:
    """Divides labeled rows into microbatches.

    Attributes:
        tokens_per_pass: Maximum number of tokens per microbatch, including padding. A longer row is processed alone.
        device: Device of the batches.
        pad_id: Padding token. Padding is masked by length, so that any token is valid.
        segments: Pass ``token_type_ids`` for pairs.
        encoder: Encoder of images.
        tokens_per_image: Number of tokens of an image.
        limit: Maximum number of positions of the model, which limits padding.
    """

    tokens_per_pass: int
    device: str
    pad_id: int = 0
    segments: bool = True
    encoder: ImageEncoder | None = None
    tokens_per_image: int = 1
    limit: int | None = None

    def batches(self, rows: Sequence[AnyExample]) -> Iterator[LabelBatch]:
        """Yield the microbatches of the rows, each built on demand."""
        for part, length, sizes in self._parts(rows):
            yield self._texts(part, length, sizes) if length else self._images(part)

    def shapes(self, rows: Sequence[AnyExample]) -> list[tuple[int, int]]:
        """Return (rows, length) of each microbatch of :meth:`batches` without building it."""
        return [(len(part), length or self.tokens_per_image) for part, length, _ in self._parts(rows)]

    def _parts(self, rows: Sequence[Any]) -> Iterator[tuple[list[Any], int, tuple[int, ...]]]:
        """Yield the rows, the padded length (0 for images) and the group sizes of each microbatch."""
        images = [row for row in rows if isinstance(row, ImageExample)]
        if images:
            max_images = max(1, self.tokens_per_pass // self.tokens_per_image)
            for part in np.array_split(np.arange(len(images)), -(-len(images) // max_images)):
                yield [images[index] for index in part], 0, ()
            return
        for kind in (RowGroup, LabeledExample):
            items: list[Any] = sorted((row for row in rows if isinstance(row, kind)), key=longest_of)
            lengths = [self._padded(longest_of(item)) for item in items]
            counts = [len(rows_of(item)) for item in items]
            cuts = cut_by_length(lengths, self.tokens_per_pass, microbatch_cost(self.device), counts)
            # Largest first, so that the memory of the first microbatch is sufficient for all others.
            for start, stop in sorted(cuts, key=lambda cut: -sum(counts[slice(*cut)]) * lengths[cut[1] - 1]):
                texts: list[Any] = [row for item in items[start:stop] for row in rows_of(item)]
                yield texts, lengths[stop - 1], tuple(counts[start:stop]) if kind is RowGroup else ()

    def _padded(self, length: int) -> int:
        padded = -(-length // GRID) * GRID
        return max(length, min(padded, self.limit)) if self.limit is not None else padded

    def _texts(self, rows: Sequence[LabeledExample], longest: int, sizes: tuple[int, ...] = ()) -> LabelBatch:
        tokens, mask = pad_rows([row.tokens for row in rows], longest, self.pad_id)
        segments = np.zeros_like(tokens)
        for index, row in enumerate(rows):
            if row.segments is not None:
                # Virtual tokens that a method prepends belong to the row's first text.
                segments[index, len(row) - len(row.segments) : len(row)] = row.segments
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if self.segments and any(row.segments is not None for row in rows):
            inputs["token_type_ids"] = segments
        on_device = {name: to_device(torch.from_numpy(values), self.device) for name, values in inputs.items()}
        return self._batch(rows, on_device, int(mask.sum()), tokens.size, sizes)

    def _images(self, rows: Sequence[ImageExample]) -> LabelBatch:
        if self.encoder is None:
            raise UserError("images need the model's preprocessor", location="task", hint="task: image-classification")
        tokens = len(rows) * self.tokens_per_image
        return self._batch(rows, {"pixel_values": to_device(self.encoder.encode(rows), self.device)}, tokens, tokens)

    def _batch(
        self,
        rows: Sequence[AnyExample],
        inputs: dict[str, Tensor],
        row_tokens: int,
        tokens: int,
        sizes: tuple[int, ...] = (),
    ) -> LabelBatch:
        labels = [row.label for row in rows]
        dtype = torch.float32 if isinstance(labels[0], float) else torch.int64
        targets = to_device(torch.tensor(labels, dtype=dtype), self.device)
        return LabelBatch(inputs, targets, tuple(rows), len(rows), row_tokens, tokens, sizes)
