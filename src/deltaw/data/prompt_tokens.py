"""Tokens of a prompt, rendered as in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.messages import read_prompt
from deltaw.data.row_images import ImagePlacer, take_images, without_markers
from deltaw.data.rows import NO_FOLDER, Row, RowFolder
from deltaw.data.templates import Encoder
from deltaw.errors import UserError
from deltaw.settings.data import DataSettings, TemplateName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_prompt(
    prompt: str | list[dict[str, object]],
    settings: DataSettings | TemplateName,
    tokenizer: PreTrainedTokenizerBase,
    *,
    images: ImagePlacer | None = None,
    image_folder: RowFolder = NO_FOLDER,
    attached: Sequence[object] = (),
) -> np.ndarray:
    """Return the (length,) int32 tokens of ``prompt``, rendered as in training.

    Args:
        prompt: A question, or a conversation that ends with one.
        settings: Data settings of the run, or "auto", "chat" or "plain".
        tokenizer: Tokenizer of the model.
        images: See :class:`deltaw.data.templates.Encoder`.
        image_folder: Folder of relative paths of images. By default, paths are rejected.
        attached: Images as in the column ``images`` of a row. Without any, markers in the prompt are ordinary text.

    Raises:
        UserError: if the conversation is out of order, the template rejects it, or an image cannot be read.
    """
    if isinstance(settings, DataSettings):
        template: TemplateName = "plain" if settings.form == "text" else settings.template
        date = settings.date
    else:
        template = settings
        date = None
    location = "the prompt"
    encoder = Encoder(tokenizer, template, date=date, images=images)
    if images is None and attached:
        hint = "use a vision-language model, or remove the images"
        raise UserError("the model reads text only", location=location, hint=hint)
    if images is not None and not attached:
        prompt = without_markers(prompt, images)
    row: Row = {"prompt" if isinstance(prompt, str) else "messages": prompt, "images": attached}
    row, row_images = (row, ()) if images is None else take_images(row, image_folder, location)
    messages = str(row["prompt"]) if "prompt" in row else read_prompt(row["messages"], location)
    return np.asarray(encoder.prompt(messages, images=row_images), dtype=np.int32)
