"""Images in rows: references to them, and their place in the tokens of a row.

A row refers to its images by :data:`MARKER` in its texts, in the order of the images. The chat template renders the
marker as the model's placeholder, which is replaced by the text that the model's processor writes for the image. Each
image token of this text gets a separate token id beyond the vocabulary (:mod:`deltaw.runtime.image_tokens`).

A line break next to a marker separates it from the text. The line break is removed if the template expects content
parts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from deltaw.data.bad_rows import BadRowError
from deltaw.data.image_files import decode, image_of, unreadable_image
from deltaw.data.report import count_of
from deltaw.data.rows import Row, RowFolder
from deltaw.errors import UserError

# Marker of an image in a text of a row, as in the rows of LLaVA.
MARKER = "<image>"
# Maximum number of tokens of the images of a row, which limits the memory of a row that repeats an image.
MAX_TOKENS = 2**20


@dataclass(frozen=True)
class RowImage:
    """Image of a row, which is not decoded yet.

    Attributes:
        content: File, encoded bytes, or decoded image.
        location: Row or file, for messages.
    """

    content: Path | bytes | Image.Image
    location: str

    def decoded(self) -> Image.Image:
        """Return the image as RGB, rotated upright by its EXIF orientation.

        Raises:
            BadRowError: if it cannot be read or decoded.
        """
        try:
            return decode(self.content, self.location).convert("RGB")
        except UserError as error:
            raise unreadable_image(error) from error


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
    """Returns the text and the token ids of images of rows.

    Attributes:
        placeholder: Text of an image in rendered conversations, for example ``<image>``.
        token_id: Id of an image token.
        first_id: First token id of images, which is the size of the vocabulary. All ids from here on are images.
    """

    placeholder: str
    token_id: int
    first_id: int

    def place(self, image: RowImage) -> PlacedImage:
        """Return the text and the token ids of an image. Equal images have equal ids.

        Raises:
            BadRowError: if the image cannot be read, decoded or processed.
        """
        ...


def without_markers(value: Any, placer: ImagePlacer) -> Any:
    """Return texts, or lists and dictionaries of texts, in which markers and placeholders of images are ordinary text.

    A zero-width space follows their first character, so that the tokenizer does not encode them as image tokens.
    """
    if isinstance(value, str):
        for marker in {MARKER, placer.placeholder}:
            value = value.replace(marker, f"{marker[0]}\u200b{marker[1:]}")
        return value
    if isinstance(value, Mapping):
        return {key: without_markers(entry, placer) for key, entry in value.items()}
    return [without_markers(entry, placer) for entry in value] if isinstance(value, list | tuple) else value


def count_markers(messages: Sequence[Mapping[str, object]]) -> int:
    """Return the number of images that messages refer to. Assistant messages are not counted."""
    return sum(str(message["content"]).count(MARKER) for message in messages if message["role"] != "assistant")


def for_template(message: Mapping[str, object], placeholder: str | None) -> dict[str, object]:
    """Return a message as the chat template reads it: with ``placeholder`` if it is given, else with content parts."""
    content = message.get("content")
    if not isinstance(content, str):
        return dict(message)
    texts = [content] if message["role"] == "assistant" else content.split(MARKER)
    if placeholder is not None:
        return {**message, "content": placeholder.join(texts)}
    parts: list[dict[str, str]] = []
    for number, text in enumerate(texts):
        if number:
            parts.append({"type": "image"})
            text = text.removeprefix("\n")
        if number < len(texts) - 1:
            text = text.removesuffix("\n")
        if text or len(texts) == 1:
            parts.append({"type": "text", "text": text})
    return {**message, "content": parts}


def place_images(placer: ImagePlacer, images: Iterable[RowImage], location: str) -> list[PlacedImage]:
    """Return the text and the ids of each image of a row.

    Raises:
        BadRowError: if an image is unusable, or the images have more than :data:`MAX_TOKENS` tokens.
    """
    placed: list[PlacedImage] = []
    count = 0
    for image in images:
        placed.append(placer.place(image))
        count += len(placed[-1].ids)
        if count > MAX_TOKENS:
            message = f"the images have more than {MAX_TOKENS:,} tokens"
            hint = "use fewer or smaller images"
            raise BadRowError(message, reason="too many images", location=location, hint=hint)
    return placed


def insert_texts(text: str, placeholder: str, images: Sequence[PlacedImage], location: str) -> str:
    """Replace each placeholder by the text of its image.

    Raises:
        BadRowError: if the text has another number of placeholders.
    """
    pieces = text.split(placeholder)
    if len(pieces) - 1 != len(images):
        placeholders = count_of(len(pieces) - 1, "placeholder")
        message = f"the rendered text has {placeholders} '{placeholder}' for {count_of(len(images), 'image')}"
        raise _mismatch(message, location)
    return "".join(part for pair in zip(pieces, (*(image.text for image in images), ""), strict=True) for part in pair)


def insert_ids(
    tokens: list[int],
    labels: Sequence[tuple[int, int]],
    images: Sequence[PlacedImage],
    placer: ImagePlacer,
    location: str,
) -> list[int]:
    """Replace each image token by the id of its feature.

    Args:
        labels: Half-open ranges of labels.

    Raises:
        BadRowError: if the tokens have another number of image tokens, or one of them is a label.
    """
    if max(tokens, default=0) >= placer.first_id:
        message = "the text has a token beyond the model's vocabulary"
        hint = "use the model's own tokenizer, or remove the token from the text"
        raise BadRowError(message, reason="an unknown token", location=location, hint=hint)
    ids = [int(token) for image in images for token in image.ids]
    count = tokens.count(placer.token_id)
    token_id = placer.token_id
    if count != len(ids):
        raise _mismatch(f"the text has {count_of(count, 'image token')}, and its images have {len(ids):,}", location)
    if not ids:
        return tokens
    if any(token_id in tokens[start:stop] for start, stop in labels):
        raise _mismatch("an answer has an image token", location)
    remaining = iter(ids)
    return [next(remaining) if token == token_id else token for token in tokens]


def _mismatch(message: str, location: str) -> BadRowError:
    reason = "an image token in a text"
    hint = "remove the model's image tokens from the texts"
    return BadRowError(message, reason=reason, location=location, hint=hint)


# Columns of images, and of texts and messages in the order of a conversation.
COLUMNS = ("images", "image")
IMAGE_PARTS = ("image", "image_url")  # types of content parts
_TEXTS = ("system", "messages", "conversations", "prompt", "instruction", "input", "completion", "output", "ideal")
_ANSWERS = ("assistant", "gpt", "completion", "output", "ideal")
_USERS = ("user", "human", "prompt", "instruction", "input")

# Returns a new text or content for the role or column, the value and the location of an old one.
_Change = Callable[[str, object, str], object]


def take_images(
    row: Row, folder: RowFolder, location: str, columns: Collection[str] = _TEXTS
) -> tuple[dict[str, object], tuple[RowImage, ...]]:
    """Return a row with a marker for each image in its texts and messages, and the images in order.

    Images are content parts, or elements of the column ``images`` or ``image``. Markers in texts, and content parts
    without an image, refer to these elements in order. Without any, they precede the first text of the user.

    Args:
        row: Columns under deltaw's names.
        folder: Folder of the row, see :func:`deltaw.data.image_files.image_of`.
        location: Location of the row, for messages.
        columns: Columns that the row format reads.

    Raises:
        BadRowError: if an answer has an image, a value is not an image, or the texts refer to more or fewer images
            than the column has.
    """
    values = _image_values(row, location)
    references: list[object] = []  # an image each, or None for the next element of the column
    marked_answers: list[str] = []

    def add_marker(role: str, content: object, text_location: str) -> object:
        if isinstance(content, str):
            markers = content.count(MARKER)
            if role in _ANSWERS:
                marked_answers.extend([text_location] * (markers > 0))
            else:
                references.extend([None] * markers)
        if not isinstance(content, list):
            return content
        parts: list[object] = []
        for part in content:
            is_image = isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS
            if is_image and role in _ANSWERS:
                raise _answer_error(text_location)
            if is_image:
                references.append(_part_image(part))
                parts.append({"type": "text", "text": MARKER})
            elif isinstance(part, Mapping) and any(not _is_empty(part.get(name)) for name in IMAGE_PARTS):
                message = "a content part of another type has an image"
                hint = "give it the type 'image'"
                raise BadRowError(message, reason="an image in a text part", location=text_location, hint=hint)
            else:
                text = part.get("text") if isinstance(part, Mapping) else None
                add_marker(role, text, text_location)
                parts.append(part)
        return parts

    changed = _map_texts(row, columns, add_marker, location)
    if values and not references:
        remaining = [MARKER] * len(values)

        def prepend(role: str, content: object, text_location: str) -> object:
            if role not in _USERS or not remaining or not isinstance(content, str | list):
                return content
            references.extend([None] * len(values))
            parts = [{"type": "text", "text": marker} for marker in remaining]
            markers = "\n".join(remaining)
            remaining.clear()
            return [*parts, *content] if isinstance(content, list) else f"{markers}\n{content}"

        changed = _map_texts(changed, columns, prepend, location)
    missing = references.count(None)
    if missing != len(values):
        in_texts = count_of(missing, "image")
        message = f"the texts refer to {in_texts} ({MARKER}), and the row has {len(values)} in its column"
        hint = f"write {MARKER} once for each element of 'images', or nowhere to put them before the first question"
        raise BadRowError(message, reason="markers and images that differ in number", location=location, hint=hint)
    if references and marked_answers:
        raise _answer_error(marked_answers[0])
    elements = iter(values)
    found = [next(elements) if value is None else value for value in references]
    return changed, tuple(_row_image(value, folder, f"{location}, image {n}") for n, value in enumerate(found, start=1))


def _image_values(row: Row, location: str) -> list[object]:
    """Return the elements of the column with images.

    Raises:
        BadRowError: if both columns have a value.
    """
    present = [name for name in COLUMNS if not _is_empty(row.get(name))]
    if len(present) > 1:
        reason = "two columns with images"
        hint = "remove one of both columns, or map it with data.columns"
        raise BadRowError("the row has both 'images' and 'image'", reason=reason, location=location, hint=hint)
    value = row[present[0]] if present else []
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list) and not value)


def _part_image(part: Mapping[str, object]) -> object:
    """Return the image of a content part, or None if it refers to the next element of the column."""
    url = part.get("image_url")
    if isinstance(url, Mapping):
        url = url.get("url")
    values = (url, *(part.get(name) for name in ("image", "bytes", "path", "url")))
    value = next((value for value in values if value is not None), None)
    return "" if value is None and part["type"] == "image_url" else value


def _row_image(value: object, folder: RowFolder, location: str) -> RowImage:
    try:
        image = image_of(value, folder, location)
    except UserError as error:
        raise unreadable_image(error) from error
    if image is None:
        problem = "is empty" if _is_empty(value) else f"is a {type(value).__name__}"
        hint = "give a path relative to the file's folder, encoded bytes, or a data URL"
        raise unreadable_image(UserError(f"the image {problem}", location=location, hint=hint))
    return RowImage(image, f"{location}: {image}" if isinstance(image, Path) else location)


def _map_texts(row: Row, columns: Collection[str], change: _Change, location: str) -> dict[str, object]:
    """Return a row with ``change`` applied to each text, and to the content of each message."""
    changed = dict(row)
    for name in _TEXTS:
        value = row.get(name) if name in columns else None
        if isinstance(value, str):
            changed[name] = change(name, value, location)
        elif isinstance(value, list):
            turns = enumerate(value, start=1)
            changed[name] = [_map_turn(turn, change, f"{location}, turn {number}") for number, turn in turns]
    return changed


def _map_turn(turn: object, change: _Change, location: str) -> object:
    if not isinstance(turn, Mapping):
        return turn
    role, key = ("role", "content") if "content" in turn else ("from", "value")
    return {**turn, key: change(str(turn.get(role)), turn[key], location)} if key in turn else turn


def _answer_error(location: str) -> BadRowError:
    hint = "put images into messages of the user"
    return BadRowError("an answer has an image", reason="an image in an answer", location=location, hint=hint)


def image_groups(rows: Sequence[Any], first_id: int) -> np.ndarray | None:
    """Return the group (n,) of each row: rows with the same first image. None if all first images differ.

    Args:
        first_id: First token id of images.
    """
    keys = np.empty(len(rows), np.int64)
    for index, row in enumerate(rows):
        ids = row.tokens[row.tokens >= first_id]
        keys[index] = ids[0] if len(ids) else -1 - index
    distinct, groups = np.unique(keys, return_inverse=True)
    return None if len(distinct) == len(rows) else groups
