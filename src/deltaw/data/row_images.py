"""Images in rows: references to them, and their place in the tokens of a row.

A row refers to its images by :data:`MARKER` in its texts, in the order of the images. The chat template renders the
marker as the model's placeholder, which is replaced by the text that the model's processor writes for the image. Each
image token of this text gets a token id of its own beyond the vocabulary (:mod:`deltaw.runtime.image_tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

# Stands for an image in a text of a row, as in the rows of LLaVA.
MARKER = "<image>"


@dataclass(frozen=True)
class RowImage:
    """Image of a row, which is not decoded yet.

    Attributes:
        content: File, encoded bytes, or decoded image.
        location: Row or file, for messages.
    """

    content: Path | bytes | Image.Image
    location: str


@dataclass(frozen=True)
class PlacedImage:
    """Text and tokens of an image.

    Attributes:
        text: Text that replaces the model's placeholder, with an image token for each feature.
        ids: Token id of each feature, in the order of the image tokens in the text.
    """

    text: str
    ids: Sequence[int]


class ImagePlacer(Protocol):
    """Gives images of rows their text and token ids.

    Attributes:
        placeholder: Text of an image in rendered conversations, for example ``<image>``.
        token_id: Id of an image token.
        first_id: First token id of images, which is the size of the vocabulary. All ids from here on are images.
        reads_parts: True if the chat template expects content parts (``{"type": "image"}``) instead of the placeholder.
    """

    placeholder: str
    token_id: int
    first_id: int
    reads_parts: bool

    def place(self, image: RowImage) -> PlacedImage:
        """Return the text and the token ids of an image. Equal images have equal ids.

        Raises:
            BadRowError: if the image cannot be read, decoded or processed.
        """
        ...
