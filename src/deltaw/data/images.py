"""Images become a model's inputs: by the preprocessor in its folder, or by plain resizing without one.

Images are decoded when their batch is made. It knows a model's files, not the model.
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
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.11 offers it with torchvision alone

from deltaw.data.example import LabeledExample, RowGroup, rows_of
from deltaw.data.packing import cut_by_length, longest_of, microbatch_cost, side_by_side
from deltaw.data.pixels import AnyExample, ImageExample
from deltaw.errors import UserError
from deltaw.hub.folders import asks_for_code
from deltaw.kernels.transfer import to_device

_PREPROCESSOR = "preprocessor_config.json"


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
            what = f"the model's image preprocessing cannot be read: {str(error).splitlines()[0][:300]}"
            raise UserError(what, where=str(folder), hint="download or copy the model again") from error
        vision = getattr(config, "vision_config", config)
        self._channels = int(getattr(vision, "num_channels", 3))
        self._mode = "L" if self._channels == 1 else "RGB"
        self._size = _pair(getattr(vision, "image_size", None))
        self._patch = _pair(getattr(vision, "patch_size", None)) or (16, 16)
        if self._processor is None and self._size is None:
            what = f"the model's folder has no {_PREPROCESSOR}, and its config.json no image_size"
            raise UserError(what, where=str(folder), hint=f"copy the model's {_PREPROCESSOR} into it")
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
                (height, width), where = example.size, f"{source}, row {example.row}"
                what = f"the image has {height}×{width} pixels, those before it {first[0]}×{first[1]}, "
                what += "and the model's preprocessor does not resize"
                hint = f"resize the images, or set do_resize and size in {self._folder / _PREPROCESSOR}"
                where = str(example.image) if isinstance(example.image, Path) else where
                raise UserError(what, where=where, hint=hint)

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
            return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1.0
        try:
            encoded = self._processor(arrays, return_tensors="pt", input_data_format="channels_last")
            return encoded["pixel_values"].float()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"the model's preprocessor does not accept the images: {str(error).splitlines()[0][:300]}"
            hint = "check that it belongs to the model; without the file, images are only resized"
            raise UserError(what, where=str(self._folder / _PREPROCESSOR), hint=hint) from error


def _pair(size: object) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


# Labeled rows become batches: texts side by side, padded as little as pays, or images of one size.
#
# A group of texts that are compared, such as two of which one is preferred, stays within one batch.
#
# Knows tokens, pixels and labels; not files or models.


# Rows are padded to multiples of this: matrix libraries build a kernel for each new shape.
GRID = 8


@dataclass(frozen=True, eq=False)
class LabelBatch:
    """A microbatch: what one forward and backward sees.

    Attributes:
        inputs: the model's keyword arguments: ``input_ids`` and ``attention_mask`` (rows, longest), with
            ``token_type_ids`` for pairs; or ``pixel_values`` (rows, channels, height, width) in fp32.
            Of packed rows ``input_ids`` and ``position_ids`` (1, T) with the ``packed_layout``.
        targets: (rows,), int64 class indices, or fp32 numbers.
        examples: the rows, in the order of the batch.
        sizes: rows of each group, whose rows follow each other; empty where rows come one by one. Of pairs, the
            preferred row is the first, and ``targets`` are their margins.
        rows: rows in it. row_tokens: tokens of all rows. tokens: tokens computed, padding included.
        places: (rows,) of packed rows the token of each that the head reads; None where rows are padded.
        enter: opens the batch that the model runs instead, over what is kept of frozen layers; None: this one.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    examples: tuple[AnyExample, ...]
    rows: int
    row_tokens: int
    tokens: int
    sizes: tuple[int, ...] = ()
    places: Tensor | None = None
    enter: Callable[[], AbstractContextManager[LabelBatch]] | None = None

    @property
    def label_tokens(self) -> int:
        """Labels in it: one a row, or one a group."""
        return len(self.sizes) or self.rows


@dataclass(frozen=True)
class LabelMicroBatcher:
    """How labeled rows go through a model.

    Attributes:
        tokens_per_pass: the most tokens at once, padding included, unless one row alone has more.
        device: where batches are put.
        pad_id: what rows are filled up with; it is masked by length, so that any token will do.
        segments: whether ``token_type_ids`` go with pairs; False for a model that takes none.
        encoder: of images. tokens_per_image: what an image counts.
        limit: the most positions that the model has; padding does not go beyond.
    """

    tokens_per_pass: int
    device: str
    pad_id: int = 0
    segments: bool = True
    encoder: ImageEncoder | None = None
    tokens_per_image: int = 1
    limit: int | None = None

    def batches(self, rows: Sequence[AnyExample]) -> Iterator[LabelBatch]:
        """The microbatches of these rows, one after another, each laid out only when its turn comes."""
        for part, length, sizes in self._parts(rows):
            yield self._texts(part, length, sizes) if length else self._images(part)

    def shapes(self, rows: Sequence[AnyExample]) -> list[tuple[int, int]]:
        """(rows, length) of each microbatch of :meth:`batches`, without laying any out."""
        return [(len(part), length or self.tokens_per_image) for part, length, _ in self._parts(rows)]

    def _parts(self, rows: Sequence[Any]) -> Iterator[tuple[list[Any], int, tuple[int, ...]]]:
        """The rows of each microbatch, its padded length (0 for images), and rows of each group."""
        images = [row for row in rows if isinstance(row, ImageExample)]
        if images:
            at_once = max(1, self.tokens_per_pass // self.tokens_per_image)
            for part in np.array_split(np.arange(len(images)), -(-len(images) // at_once)):
                yield [images[index] for index in part], 0, ()
            return
        for kind in (RowGroup, LabeledExample):
            items: list[Any] = sorted((row for row in rows if isinstance(row, kind)), key=longest_of)
            lengths = [self._padded(longest_of(item)) for item in items]
            counts = [len(rows_of(item)) for item in items]
            cuts = cut_by_length(lengths, self.tokens_per_pass, microbatch_cost(self.device), counts)
            # The largest comes first: what the others need fits where it was in memory.
            for start, stop in sorted(cuts, key=lambda cut: -sum(counts[slice(*cut)]) * lengths[cut[1] - 1]):
                texts: list[Any] = [row for item in items[start:stop] for row in rows_of(item)]
                yield texts, lengths[stop - 1], tuple(counts[start:stop]) if kind is RowGroup else ()

    def _padded(self, length: int) -> int:
        whole = -(-length // GRID) * GRID
        return max(length, min(whole, self.limit)) if self.limit is not None else whole

    def _texts(self, rows: Sequence[LabeledExample], longest: int, sizes: tuple[int, ...] = ()) -> LabelBatch:
        tokens, mask = side_by_side([row.tokens for row in rows], longest, self.pad_id)
        segments = np.zeros_like(tokens)
        for place, row in enumerate(rows):
            if row.segments is not None:
                # Virtual tokens that a method prepends belong to the row's first text.
                segments[place, len(row) - len(row.segments) : len(row)] = row.segments
        inputs = {"input_ids": tokens, "attention_mask": mask}
        if self.segments and any(row.segments is not None for row in rows):
            inputs["token_type_ids"] = segments
        on_device = {name: to_device(torch.from_numpy(values), self.device) for name, values in inputs.items()}
        return self._batch(rows, on_device, int(mask.sum()), tokens.size, sizes)

    def _images(self, rows: Sequence[ImageExample]) -> LabelBatch:
        if self.encoder is None:
            raise UserError("images need the model's preprocessor", where="task", hint="task: image-classification")
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
