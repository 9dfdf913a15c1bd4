"""How a run's rows are prompted, for whoever writes with its adapter: the system prompt that most of them share, and
some of their prompts.

It is a file of its own beside the adapter. Folders come from anywhere, so what is read is bounded, plain text. Knows
no engine and no page.
"""

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

from deltaw.contained import require_contained
from deltaw.data.chunk import MOST_SYSTEM
from deltaw.data.example import Example, rows_of
from deltaw.data.messages import Message
from deltaw.data.prepare import encode_prompt
from deltaw.data.report import quoted
from deltaw.data.settings import DataSettings
from deltaw.durable import write_text
from deltaw.errors import UserError
from deltaw.training.tasks.causal import question_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltaw.data.row_reader import RunData
    from deltaw.training.tasks.base import Task

FILE = "prompts.json"
# Prompts that are kept, characters of one, and rows that are tried for them.
EXAMPLES, MOST_PROMPT, TRIED = 4, 400, 64
# In JSON a character may take six bytes.
_MOST_BYTES = 6 * (MOST_SYSTEM + EXAMPLES * MOST_PROMPT) + 1024


@dataclass(frozen=True)
class Prompting:
    """How most rows of a run are prompted.

    Attributes:
        system: their system prompt; empty if they share none.
        joined: whether rows without a chat template hold it and the prompt as one text.
        examples: prompts of some rows.
    """

    system: str = ""
    joined: bool = False
    examples: tuple[str, ...] = ()

    def system_for(self, given: str | None) -> str:
        """The system prompt to write with: the caller's, which may be empty, else that of the rows."""
        return self.system if given is None else given

    def line(self, given: str | None) -> str | None:
        """What to say of a system prompt that the caller did not give; None if there is none."""
        if given is not None or not self.system:
            return None
        return f'system prompt of the rows: {quoted(self.system, 26)} (--system "" for none)'

    def prompt(
        self, asked: str | Sequence[Message], data: DataSettings | None, tokenizer: PreTrainedTokenizerBase
    ) -> np.ndarray:
        """A prompt, or a conversation that ends with one, as tokens, as the rows were rendered: int32 (length,).

        Raises:
            UserError: the template does not take it.
        """
        plain = not tokenizer.chat_template or (data is not None and data.template == "plain")
        if not isinstance(asked, str):
            asked = [*asked]
            if plain and self.joined and [message["role"] for message in asked] == ["system", "user"]:
                asked = "\n".join(str(message["content"]) for message in asked)
        return encode_prompt(asked, data or "auto", tokenizer)


def with_system(system: str, asked: str) -> str | list[Message]:
    """A prompt with its system prompt, if there is one."""
    turns: list[Message] = [{"role": "system", "content": system}, {"role": "user", "content": asked}]
    return turns if system else asked


def prompting_of(task: Task, data: RunData, settings: DataSettings) -> Prompting:
    """How the rows of a training are prompted. A prompt counts as found if it gives the row's tokens again."""
    tokenizer, system = task.tokenizer, data.report.system or ""
    if tokenizer is None or not task.writes_text:
        return Prompting()
    found: dict[str, bool] = {}
    for row in _spread(data):
        if len(found) < EXAMPLES and (one := prompt_of(row, system, settings, tokenizer)) is not None:
            found.setdefault(*one)
    return Prompting(system, any(found.values()), tuple(found))


def _spread(data: RunData) -> Iterator[Example]:
    """Held-out rows, then rows of the training, evenly spread."""
    for rows in (data.held_out, data.train):
        for place in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), TRIED // 2)).astype(int)):
            row = rows_of(rows[int(place)])[0]
            if isinstance(row, Example) and row.prompt_length:
                yield row


def prompt_of(
    row: Example, system: str, data: DataSettings, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, bool] | None:
    """The prompt of a row as a person writes it, and whether the system prompt is joined to it; None where it is
    longer, has further turns or cannot be told from the tokens."""
    tokens = row.tokens[: row.prompt_length]
    tokens = tokens[tokens < len(tokenizer)]  # a soft prompt has no text
    if len(tokens) > MOST_SYSTEM + MOST_PROMPT:
        return None
    whole = str(tokenizer.decode(tokens, skip_special_tokens=True))
    behind = whole.rpartition(system)[2] if system else whole
    plain = behind.removeprefix("\n") if system else behind
    named = behind.strip().removeprefix("user").removesuffix("assistant").strip()
    texts = dict.fromkeys((question_of(tokenizer, row), plain, plain.removesuffix("\n"), named))
    for joined, text in itertools.product((False, True), texts):
        if not 0 < len(text) <= MOST_PROMPT or not text.strip():
            continue
        try:
            again = Prompting(system, joined).prompt(with_system(system, text), data, tokenizer)
        except UserError:
            return None
        if np.array_equal(again, tokens):
            return text, joined
    return None


def write_prompting(folder: Path, found: Prompting) -> None:
    """Write it into an adapter's folder; no file if there is nothing to say."""
    if found == Prompting():
        (folder / FILE).unlink(missing_ok=True)
    else:
        write_text(folder / FILE, json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False) + "\n")


def read_prompting(folder: Path) -> Prompting:
    """What a folder holds of it; nothing where there is no such file, or something else in it.

    Raises:
        UserError: the file is a link that leads out of the folder.
    """
    path = folder / FILE
    require_contained(folder, among=[path])
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        found = json.loads(raw) if len(raw) <= _MOST_BYTES else None
    except (OSError, ValueError, RecursionError):
        return Prompting()
    if not isinstance(found, dict):
        return Prompting()
    given = found.get("examples")
    examples = [text for one in given if (text := _text(one, MOST_PROMPT))] if isinstance(given, list) else []
    return Prompting(_text(found.get("system"), MOST_SYSTEM), found.get("joined") is True, tuple(examples[:EXAMPLES]))


def copy_system(folder: Path, to: Path) -> None:
    """Let another folder have the system prompt; the rows' own prompts stay where they are."""
    write_prompting(to, dataclasses.replace(read_prompting(folder), examples=()))


def _text(value: object, most: int) -> str:
    """A text without control characters besides line breaks and tabs; nothing for anything else."""
    if not isinstance(value, str) or len(value) > most:
        return ""
    return value if all(c in "\n\t\r" or unicodedata.category(c) not in ("Cc", "Cs") for c in value) else ""
