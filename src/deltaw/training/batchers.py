"""Cut rows into microbatches: packed with shared prefixes, padded, or images.

The options of a batcher depend on the model and the device. :func:`choose_causal_batcher`,
:func:`choose_packed_batcher` and :func:`choose_label_batcher` resolve settings that are ``auto``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.example import RowGroup, lengths_of, rows_of
from deltaw.data.images import ImageEncoder
from deltaw.data.packing import (
    PLAIN_PADDING,
    Member,
    MicroBatch,
    Padding,
    microbatch_cost,
    pack,
    packed_length,
    pad,
    row_targets,
    split_into_microbatches,
)
from deltaw.data.pixels import AnyExample, ImageExample
from deltaw.decoding.generation import position_limit
from deltaw.errors import UserError
from deltaw.kernels import loader
from deltaw.kernels.layout import Layout, PositionShifts, to_device
from deltaw.machine.choices import Choice
from deltaw.runtime.fused_blocks import fused_in_mode
from deltaw.runtime.image_tokens import image_position_shifts
from deltaw.runtime.packed import PACKED_INDEPENDENT, first_position, fused_blocks, packed_rows
from deltaw.runtime.packing_checks import can_pack, can_pack_independent
from deltaw.training.batcher import Batcher

# Tokens of a microbatch for ``auto``: enough for full matmul throughput. More would only increase activation memory.
TOKENS_PER_PASS = {"cpu": 1024, "cuda": 8192, "mps": 4096}
# Rows that are sorted and cut together. Larger than a step, and small enough to evaluate a large data set in memory.
MAX_BUFFERED_ROWS = 8192
# Labeled rows are padded to multiples of this, because matrix libraries compile a kernel for each new shape.
PADDING_MULTIPLE = 8

BatcherType = TypeVar("BatcherType", bound="MicroBatcher")


@dataclass(frozen=True)
class BatcherOptions:
    """Options of a batcher. A value that is ``auto`` is chosen by the model and the rows.

    Attributes:
        device: Device that batches are moved to.
        tokens_per_pass: Maximum number of tokens of a microbatch.
        share: True to compute shared prefixes once.
        method_shares: True if results with shared prefixes are identical.
        virtual_tokens: Positions that the method prepends to each row.
    """

    device: str
    tokens_per_pass: int | str = "auto"
    share: bool | str = "auto"
    method_shares: bool = True
    virtual_tokens: int = 0


@dataclass(frozen=True)
class MicroBatcher(Batcher):
    """Cuts rows into microbatches and lays them out.

    Attributes:
        tokens_per_pass: Maximum number of tokens of a microbatch. A single row or group may exceed it.
        share: True to compute shared prefixes once.
        padded: True to pad rows instead of packing them.
        device: Device that batches are moved to.
        fill: True to fill packed rows up to recurring lengths.
        inactive_cost: Relative cost of a token that an activated adapter does not modify, if such tokens run
            separately.
        independent: True if packed rows share no prefixes because the model attends in both directions.
        first_position: Position of the first token of a packed row.
        position_shifts: Shifts of the positions of packed tokens, see :func:`deltaw.data.packing.pack`.
        segments: True if the model accepts ``token_type_ids``.
        padding: Padding of padded rows.
    """

    tokens_per_pass: int
    share: bool = False
    padded: bool = True
    device: str = "cpu"
    fill: bool = True
    inactive_cost: float = 1.0
    independent: bool = False
    first_position: int = 0
    position_shifts: PositionShifts | None = None
    segments: bool = False
    padding: Padding = PLAIN_PADDING

    def with_class(self, batcher_class: type[BatcherType], **changes: Any) -> BatcherType:
        """Return a batcher of another class with the same options, except for ``changes``."""
        return batcher_class(**{**vars(self), **changes})

    def batches(self, rows: Sequence[Any]) -> Iterator[MicroBatch]:
        """Yield the microbatches of these rows, laying out each one on demand."""
        return map(self.build, self.split(rows))

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        """Return (rows, length) of each microbatch of :meth:`batches`, without laying out any."""
        if self.padded:
            return [(sum(len(rows_of(item)) for item in part), self.padding.length(part)) for part in self.split(rows)]
        share = self.share
        fill = self.fill
        cost = self.inactive_cost
        return [(1, packed_length(part, share=share, fill=fill, inactive_cost=cost)) for part in self.split(rows)]

    def items(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Return the rows or groups that the microbatches of ``rows`` contain."""
        return rows

    def split(self, rows: Sequence[Any]) -> Iterator[list[Any]]:
        """Yield the rows or groups of each microbatch."""
        return self.cut(self.items(rows))

    def cut(self, items: Sequence[Any]) -> Iterator[list[Any]]:
        """Yield the items of each microbatch."""
        for start in range(0, len(items), MAX_BUFFERED_ROWS):
            yield from split_into_microbatches(
                items[start : start + MAX_BUFFERED_ROWS],
                self.tokens_per_pass,
                share=self.share,
                padded=self.padded,
                cost=microbatch_cost(self.device),
                inactive_cost=self.inactive_cost,
                padding=self.padding,
            )

    def build(self, items: Sequence[Any]) -> MicroBatch:
        """Lay out the items of one microbatch."""
        if self.padded:
            return pad(items, device=self.device, padding=self.padding, segments=self.segments)
        return pack(
            items,
            share=self.share,
            fill=self.fill,
            fill_active=self.inactive_cost != 1.0,
            device=self.device,
            first_position=self.first_position,
            position_shifts=self.position_shifts,
            segments=self.segments,
        )


class CausalMicroBatcher(MicroBatcher):
    """Microbatches of a language model, which predicts label tokens."""

    def labels(self, rows: Sequence[Any]) -> list[int]:
        """Return the number of labels of each microbatch."""
        return [sum(row.label_count for row in part) for part in self.split(rows)]

    def layouts(self, rows: Sequence[Any]) -> Iterator[Layout]:
        """Yield the layout of each microbatch. Padded rows have no layout."""
        for part in [] if self.padded else self.split(rows):
            layout = pack(part, share=self.share, fill=self.fill).inputs["packed_layout"]
            assert isinstance(layout, Layout)
            yield layout


class LabelMicroBatcher(MicroBatcher):
    """Microbatches of labeled texts, of which a head reads one token per row."""

    def head_rows(self, rows: Sequence[Any], shapes: Sequence[tuple[int, int]]) -> list[int]:
        return [sum(len(rows_of(item)) for item in part) for part in self.split(rows)]


@dataclass(frozen=True)
class ImageMicroBatcher(MicroBatcher):
    """Microbatches of images.

    Attributes:
        encoder: Encoder of images.
        tokens_per_image: Number of tokens of an image.
    """

    encoder: ImageEncoder = field(kw_only=True)
    tokens_per_image: int = 1

    def cut(self, items: Sequence[Any]) -> Iterator[list[Any]]:
        max_images = max(1, self.tokens_per_pass // self.tokens_per_image)
        for part in np.array_split(np.arange(len(items)), -(-len(items) // max_images)):
            yield [items[index] for index in part]

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        return [(len(part), self.tokens_per_image) for part in self.split(rows)]

    def build(self, items: Sequence[Any]) -> MicroBatch:
        indices = np.arange(len(items) * self.tokens_per_image).reshape(len(items), -1)
        members = tuple(map(Member, items, indices))
        inputs = {"pixel_values": to_device(self.encoder.encode(items), self.device)}
        return MicroBatch(inputs, row_targets(items, self.device), members, indices.size)


def longest_row(rows: Sequence[Any], virtual_tokens: int, limit: int | None) -> int:
    """Return the number of tokens of the longest row, including virtual tokens. Groups count by their longest row.

    Args:
        virtual_tokens: Tokens that the method prepends.
        limit: Positions that the model supports, or None for no limit.

    Raises:
        UserError: if the row exceeds the limit.
    """
    if any(isinstance(row, RowGroup) for row in rows[:1]):
        rows = [row for group in rows for row in group.rows]
    longest = int(lengths_of(rows).max()) + virtual_tokens
    if limit is not None and longest > limit:
        message = f"the longest row has {longest:,} tokens, and the model {limit:,} positions"
        hint = f"set data.max_length: {limit - virtual_tokens}, with data.long_rows: cut or drop"
        raise UserError(message, location="data.max_length", hint=hint)
    return longest


def text_positions(model: PreTrainedModel) -> int | None:
    """Return the maximum number of tokens of a row. RoBERTa-like models count positions from the padding index."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return position_limit(model)


def choose_tokens_per_pass(requested: int | str, longest: int, device: str) -> Choice[int]:
    """Return the requested number of tokens, or for ``auto`` the device's default, at least the longest row."""
    if requested != "auto":
        return Choice(int(requested), "as requested")
    default = TOKENS_PER_PASS.get(device.partition(":")[0], TOKENS_PER_PASS["cpu"])
    return Choice(max(default, longest), "fills the machine" if longest <= default else "the longest row")


def choose_causal_batcher(
    model: PreTrainedModel, examples: Sequence[Any], options: BatcherOptions
) -> tuple[CausalMicroBatcher, dict[str, Choice[Any]]]:
    """Create the batcher of a language model's rows, packed if the model supports it.

    Returns:
        The batcher, and the chosen value of each setting with its reason.

    Raises:
        UserError: if a row is longer than the model has positions.
    """
    longest = longest_row(examples, options.virtual_tokens, position_limit(model))
    device = options.device
    packable = can_pack(model)
    shared = Choice(bool(options.share), "as requested")
    if options.share == "auto" and options.method_shares:
        shared = Choice(True, "exact, and shared prefixes are computed once")
    elif options.share == "auto":
        shared = Choice(False, "dropout would draw one mask for several rows")
    if shared.value and not packable.value:
        shared = Choice(False, packable.why)
    tokens = choose_tokens_per_pass(options.tokens_per_pass, longest, device)
    # Fused blocks of the compiled kernels accept any shape, unless dropout forces blocks to run the model's code.
    any_shape = packable.value and options.method_shares and loader.library() is not None and device == "cpu"
    if any_shape:
        with packed_rows(model):
            any_shape = fused_blocks(model).choice.value
    batcher = CausalMicroBatcher(
        tokens.value,
        shared.value,
        not packable.value,
        device,
        fill=not any_shape,
        position_shifts=image_position_shifts(model),
    )
    return batcher, {"train.share_prefixes": shared, "train.tokens_per_pass": tokens, "packing": packable}


def choose_packed_batcher(
    model: PreTrainedModel, rows: Sequence[Any], options: BatcherOptions
) -> tuple[MicroBatcher, dict[str, Choice[Any]]] | None:
    """Create the batcher of packed texts without predicted tokens.

    Rows of a decoder share common prefixes, for example a prompt and a query. Rows of an encoder have no shared
    prefixes, because its tokens attend to later tokens.

    Returns:
        The batcher and its choices, or None if the model cannot run packed rows.

    Raises:
        UserError: if a row is longer than the model has positions.
    """
    segments = "token_type_ids" in inspect.signature(model.forward).parameters
    start = first_position(model)
    if can_pack(model).value:
        causal, choices = choose_causal_batcher(model, rows, options)
        return causal.with_class(MicroBatcher, first_position=start, segments=segments), choices
    packable = can_pack_independent(model)
    if not packable.value:
        return None
    tokens = choose_tokens_per_pass(
        options.tokens_per_pass, longest_row(rows, 0, text_positions(model)), options.device
    )
    with packed_rows(model, independent=True):
        any_shape = fused_in_mode(model, PACKED_INDEPENDENT).choice.value
    batcher = MicroBatcher(
        tokens.value,
        padded=False,
        device=options.device,
        fill=not any_shape,
        independent=True,
        first_position=start,
        segments=segments,
    )
    return batcher, {"train.tokens_per_pass": tokens, "packing": packable}


def choose_label_batcher(
    model: PreTrainedModel,
    examples: Sequence[AnyExample],
    options: BatcherOptions,
    tokenizer: PreTrainedTokenizerBase | None = None,
    encoder: ImageEncoder | None = None,
) -> tuple[MicroBatcher, dict[str, Choice[Any]]]:
    """Create the batcher of padded texts or of images.

    Args:
        tokenizer: Tokenizer of texts.
        encoder: Encoder of images.

    Returns:
        The batcher, and the chosen value of each setting with its reason.

    Raises:
        UserError: if a row is longer than the model has positions, or the model rejects the prepared images.
    """
    if isinstance(examples[0], ImageExample):
        if encoder is None:
            raise UserError("images need the model's preprocessor", location="task", hint="task: image-classification")
        longest = encoder.tokens(examples[0])
        _try_image(model, encoder, examples[0])
        tokens = choose_tokens_per_pass(options.tokens_per_pass, longest, options.device)
        images = ImageMicroBatcher(tokens.value, device=options.device, encoder=encoder, tokens_per_image=longest)
        return images, {"train.tokens_per_pass": tokens}
    limit = text_positions(model)
    longest = longest_row(examples, options.virtual_tokens, limit)
    tokens = choose_tokens_per_pass(options.tokens_per_pass, longest, options.device)
    pad_token = getattr(tokenizer, "pad_token_id", None)
    padding = Padding(pad_token if isinstance(pad_token, int) else 0, PADDING_MULTIPLE, limit)
    segments = "token_type_ids" in inspect.signature(model.forward).parameters
    texts = LabelMicroBatcher(tokens.value, device=options.device, segments=segments, padding=padding)
    return texts, {"train.tokens_per_pass": tokens}


def _try_image(model: PreTrainedModel, encoder: ImageEncoder, example: ImageExample) -> None:
    """Run the model on one image, so that a mismatch of sizes is reported as a UserError."""
    pixels = encoder.encode([example]).to(device=model.device, dtype=model.dtype)
    try:
        with torch.no_grad():
            model(pixel_values=pixels)
    except (ValueError, RuntimeError, TypeError) as error:
        message = f"the model rejects the prepared images: {str(error).splitlines()[0]}"
        location = f"images of {pixels.shape[2]}×{pixels.shape[3]} pixels in {pixels.shape[1]} channels"
        hint = "check that preprocessor_config.json belongs to the model; without it, images get the model's image_size"
        raise UserError(message, location=location, hint=hint) from error
