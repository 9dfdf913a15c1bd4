"""Prompt format of a run: its shared system prompt and examples, as stored in the folder of an adapter."""

from __future__ import annotations

import dataclasses
import itertools
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from deltaw.atomic_files import write_text
from deltaw.data.example import Example, rows_of
from deltaw.data.messages import Message
from deltaw.data.prompt_tokens import encode_prompt
from deltaw.data.report import MAX_SYSTEM_CHARS, quoted
from deltaw.data.row_images import ImagePlacer
from deltaw.data.rows import RowFolder
from deltaw.errors import UserError
from deltaw.settings.data import DataSettings
from deltaw.training.evaluation.answers import question_of
from deltaw.untrusted_paths import read_contained

if TYPE_CHECKING:
    from deltaw.data.row_reader import RunData

FILE = "prompts.json"
# Maximum number of stored prompts, characters per prompt, and rows to examine.
MAX_EXAMPLES = 4
MAX_PROMPT_LENGTH = 400
MAX_TRIED_ROWS = 64
# A character takes up to six bytes in JSON.
_MAX_BYTES = 6 * (MAX_SYSTEM_CHARS + MAX_EXAMPLES * MAX_PROMPT_LENGTH) + 1024


@dataclass(frozen=True)
class Prompting:
    """Prompt format shared by most rows of a run.

    Attributes:
        system: Shared system prompt, or an empty string.
        joined: True if rows without a chat template contain the system prompt and the prompt as one text.
        examples: Prompts of some rows.
    """

    system: str = ""
    joined: bool = False
    examples: tuple[str, ...] = ()

    def system_for(self, override: str | None) -> str:
        """Return the caller's system prompt, which may be empty, or that of the rows if it is None."""
        return self.system if override is None else override

    def line(self, override: str | None) -> str | None:
        """Return a message if the system prompt of the rows is used, else None."""
        if override is not None or not self.system:
            return None
        return f'system prompt of the rows: {quoted(self.system, 26)} (--system "" for none)'

    def prompt(
        self,
        prompt: str | Sequence[Message],
        data: DataSettings | None,
        tokenizer: PreTrainedTokenizerBase,
        placer: ImagePlacer | None = None,
        images: Sequence[object] = (),
    ) -> np.ndarray:
        """Tokenize a prompt or a conversation as the training rows were rendered: int32 (length,).

        Args:
            placer: See :class:`deltaw.data.templates.Encoder`.
            images: See :meth:`deltaw.inference.opened_run.OpenedRun.encode`.

        Raises:
            UserError: if the chat template rejects it, or an image cannot be read.
        """
        plain = not tokenizer.chat_template or (data is not None and data.template == "plain")
        if not isinstance(prompt, str):
            prompt = self.join([*prompt]) if plain else [*prompt]
        folder = RowFolder(Path())
        return encode_prompt(prompt, data or "auto", tokenizer, images=placer, image_folder=folder, attached=images)

    def join(self, messages: list[Message]) -> str | list[Message]:
        """Return a system prompt and a question without a chat template as the rows contain them."""
        texts = [message["content"] for message in messages if isinstance(message["content"], str)]
        roles = [message["role"] for message in messages]
        is_joined = self.joined and roles == ["system", "user"] and len(texts) == 2
        return "\n".join(texts) if is_joined else messages


def with_system(system: str, prompt: str) -> str | list[Message]:
    """Add the system prompt to a prompt, unless it is empty."""
    turns: list[Message] = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    return turns if system else prompt


def prompting_of(tokenizer: PreTrainedTokenizerBase, data: RunData, settings: DataSettings) -> Prompting:
    """Detect the prompt format of the training rows. A prompt is used only if it reproduces the tokens of its row."""
    system = data.report.system or ""
    joined_by_prompt: dict[str, bool] = {}
    for row in _spread(data):
        if len(joined_by_prompt) < MAX_EXAMPLES and (parsed := prompt_of(row, system, settings, tokenizer)) is not None:
            joined_by_prompt.setdefault(*parsed)
    return Prompting(system, any(joined_by_prompt.values()), tuple(joined_by_prompt))


def _spread(data: RunData) -> Iterator[Example]:
    """Yield evenly spaced held-out rows, then training rows."""
    for rows in (data.held_out, data.train):
        for index in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_TRIED_ROWS // 2)).astype(int)):
            row = rows_of(rows[int(index)])[0]
            if isinstance(row, Example) and row.prompt_length:
                yield row


def prompt_of(
    row: Example, system: str, data: DataSettings, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, bool] | None:
    """Return the user's prompt of a row and True if the system prompt is joined to it.

    Returns None if the prompt is too long, has several turns, or cannot be recovered from the tokens.
    """
    tokens = row.tokens[: row.prompt_length]
    tokens = tokens[tokens < len(tokenizer)]  # a soft prompt has no text
    if len(tokens) > MAX_SYSTEM_CHARS + MAX_PROMPT_LENGTH:
        return None
    text_of_prompt = str(tokenizer.decode(tokens, skip_special_tokens=True))
    user_part = text_of_prompt.rpartition(system)[2] if system else text_of_prompt
    plain = user_part.removeprefix("\n") if system else user_part
    without_roles = user_part.strip().removeprefix("user").removesuffix("assistant").strip()
    texts = dict.fromkeys((question_of(tokenizer, row), plain, plain.removesuffix("\n"), without_roles))
    for joined, text in itertools.product((False, True), texts):
        if not 0 < len(text) <= MAX_PROMPT_LENGTH or not text.strip():
            continue
        try:
            tokens_again = Prompting(system, joined).prompt(with_system(system, text), data, tokenizer)
        except UserError:
            return None
        if np.array_equal(tokens_again, tokens):
            return text, joined
    return None


def write_prompting(folder: Path, prompting: Prompting) -> None:
    """Write the prompt format to an adapter's folder. No file is written if it is empty."""
    if prompting == Prompting():
        (folder / FILE).unlink(missing_ok=True)
    else:
        write_text(folder / FILE, json.dumps(dataclasses.asdict(prompting), indent=2, ensure_ascii=False) + "\n")


def read_prompting(folder: Path) -> Prompting:
    """Read the prompt format from a folder. Returns an empty one if the file is missing or invalid.

    Raises:
        UserError: if the file is a link that leaves the folder.
    """
    raw = read_contained(folder, FILE, _MAX_BYTES + 1) or b""
    try:
        found = json.loads(raw) if len(raw) <= _MAX_BYTES else None
    except (ValueError, RecursionError):
        return Prompting()
    if not isinstance(found, dict):
        return Prompting()
    stored_examples = found.get("examples")
    stored_examples = stored_examples if isinstance(stored_examples, list) else []
    examples = [text for value in stored_examples if (text := _text(value, MAX_PROMPT_LENGTH))]
    system = _text(found.get("system"), MAX_SYSTEM_CHARS)
    joined = found.get("joined") is True
    return Prompting(system, joined, tuple(examples[:MAX_EXAMPLES]))


def copy_system(folder: Path, target: Path) -> None:
    """Copy the system prompt to another folder without the example prompts, which are data of the user."""
    write_prompting(target, dataclasses.replace(read_prompting(folder), examples=()))


def _text(value: object, max_length: int) -> str:
    """Return a string without control characters except line breaks and tabs, or an empty string if it is invalid."""
    if not isinstance(value, str) or len(value) > max_length:
        return ""
    return value if all(c in "\n\t\r" or unicodedata.category(c) not in ("Cc", "Cs") for c in value) else ""
