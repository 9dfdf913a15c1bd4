"""How labeled rows become microbatches: how many tokens, what pads them, and why."""

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
from deltaw.training.tasks.token_budget import choose_tokens_per_pass, longest_row


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
    """Resolve the settings that the user left at ``auto``.

    Args:
        virtual_tokens: positions that the method will prepend to each text.
        tokenizer: of texts. encoder: of images.

    Returns:
        the batcher, and by setting the value chosen with its reason.

    Raises:
        UserError: a row is longer than the model has positions, or images are not what the model takes.
    """
    images = [example for example in examples if isinstance(example, ImageExample)]
    limit = None if images else text_positions(model)
    if images and encoder is not None:
        longest = encoder.tokens(images[0])
        _try(model, encoder, images[0])
    else:
        longest = longest_row(examples, virtual_tokens, limit)
    tokens = choose_tokens_per_pass(tokens_per_pass, longest, device)
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
            hint="check that preprocessor_config.json belongs to the model; without it, images are resized "
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
