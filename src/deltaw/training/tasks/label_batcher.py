"""How labelled rows go through a model: how many tokens at once, and what pads them, and why."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.data.images import ImageEncoder
from deltaw.data.label_batches import LabelMicroBatcher
from deltaw.data.labels import AnyExample
from deltaw.data.pixels import ImageExample
from deltaw.errors import UserError
from deltaw.host.choices import Choice
from deltaw.runtime.generation import position_limit
from deltaw.training.tasks.causal_batcher import TOKENS_PER_PASS


def choose_label_batcher(
    model: PreTrainedModel,
    examples: Sequence[AnyExample],
    *,
    device: str,
    tokens_per_pass: int | str = "auto",
    virtual_tokens: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    encoder: ImageEncoder | None = None,
) -> tuple[LabelMicroBatcher, dict[str, Choice]]:
    """Settle what the user left open.

    Args:
        virtual_tokens: tokens that the method will put before each text.
        tokenizer: of texts. encoder: of images.

    Returns:
        the microbatches, and by setting the value chosen with its reason.

    Raises:
        UserError: a row is longer than the model has positions, or images are not what the model takes.
    """
    images = [example for example in examples if isinstance(example, ImageExample)]
    limit = None if images else text_positions(model)
    if images and encoder is not None:
        longest = encoder.tokens(images[0])
        _try(model, encoder, images[0])
    else:
        longest = max(len(example) for example in examples) + virtual_tokens
    if limit is not None and longest > limit:
        raise UserError(
            f"the longest row has {longest:,} tokens, and the model {limit:,} positions",
            where="data.max_length",
            hint=f"set data.max_length: {limit - virtual_tokens}, with data.long_rows: cut or drop",
        )
    if tokens_per_pass == "auto":
        usual = TOKENS_PER_PASS.get(device.partition(":")[0], TOKENS_PER_PASS["cpu"])
        tokens = Choice(max(usual, longest), "fills the machine" if longest <= usual else "the longest row")
    else:
        tokens = Choice(int(tokens_per_pass), "as asked")
    pad = getattr(tokenizer, "pad_token_id", None)
    batcher = LabelMicroBatcher(
        tokens.value,
        device,
        pad_id=pad if isinstance(pad, int) else 0,
        segments="token_type_ids" in inspect.signature(model.forward).parameters,
        encoder=encoder,
        tokens_per_image=longest if images else 1,
        limit=limit,
    )
    return batcher, {"train.tokens_per_pass": tokens}


def _try(model: PreTrainedModel, encoder: ImageEncoder, example: ImageExample) -> None:
    """Let the model see one image, so that one of another size than its own is refused in words."""
    pixels = encoder.encode([example]).to(device=model.device, dtype=model.dtype)
    try:
        with torch.no_grad():
            model(pixel_values=pixels)
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"the model does not take its images as prepared: {str(error).splitlines()[0]}",
            where=f"images of {pixels.shape[2]}×{pixels.shape[3]} pixels in {pixels.shape[1]} channels",
            hint="look whether preprocessor_config.json belongs to the model; without it, images are resized "
            "to the model's image_size",
        ) from error


def text_positions(model: PreTrainedModel) -> int | None:
    """The most tokens that a row may have; RoBERTa and its kin count positions from the pad id's on."""
    limit = position_limit(model)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            rows = getattr(module, "num_embeddings", limit)
            return int(rows) - int(module.padding_idx) - 1  # type: ignore[arg-type]
    return limit
