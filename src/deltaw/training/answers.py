"""Prompts of a run and generated answers to them, and the options and result of an evaluation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltaw.atomic_files import write_text
from deltaw.data.chunk import MAX_SYSTEM_CHARS
from deltaw.data.example import Example, rows_of
from deltaw.data.messages import Message
from deltaw.data.prepare import encode_prompt
from deltaw.data.prompts import TokenizedPrompt
from deltaw.data.report import quoted
from deltaw.data.row_images import ImagePlacer
from deltaw.data.rows import RowFolder
from deltaw.decoding.generation import Progress, TextGenerator, common_prefix_length
from deltaw.errors import UserError
from deltaw.settings.data import DataSettings
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.evaluation.general import GreedyDecoder
from deltaw.untrusted_paths import require_contained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltaw.data.row_reader import RunData


@dataclass(frozen=True)
class EvaluatedAnswer:
    """A generated answer and the expected one.

    Attributes:
        row: Number of the row.
        question: Last user turn of the prompt.
        expected: Answer in the data, or an empty string.
        output: Generated answer.
        reward: Reward of the answer, for tasks that reward completions.
        passed: True if the reward reaches the threshold.
    """

    row: int
    question: str
    expected: str
    output: str
    reward: float | None = None
    passed: bool = False

    @property
    def exact(self) -> bool:
        """True if the answer passed, or without a reward, if it equals the expected one apart from white space."""
        if self.reward is not None:
            return self.passed
        return self.output.strip() == self.expected.strip()

    @property
    def first_difference(self) -> int | None:
        """Index of the first character that differs from the expected answer, apart from white space at the start.

        None if the answer is correct, or no answer is expected.
        """
        if self.exact or not self.expected:
            return None
        return common_prefix_length(self.output.strip(), self.expected.strip())

    def as_dict(self) -> dict[str, object]:
        """Return the generated answer for JSON."""
        reward = {} if self.reward is None else {"reward": self.reward}
        return {"text": self.output, "correct": self.exact, "first_difference": self.first_difference, **reward}


@dataclass(frozen=True)
class ScoreOptions:
    """Options of an evaluation of a loaded model.

    Attributes:
        num_answers: Number of examples, from the first, for which the model generates an answer. Tasks that reward
            completions return all of them if it is not 0.
        max_new_tokens: Maximum number of tokens of an answer, or None for the limit of training.
        samples: Number of sampled completions per prompt, in addition to the greedy one.
        temperature: Sampling temperature, or None for the temperature of training.
        threshold: Minimum weighted reward of a passing completion. None for the highest reward of functions with values
            up to 1.
    """

    num_answers: int = 0
    max_new_tokens: int | None = None
    samples: int = 0
    temperature: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class EvaluationScore:
    """Evaluation of a model, its answers to some of the examples, and a warning if they contradict the scores."""

    evaluation: Evaluation
    answers: list[EvaluatedAnswer] = field(default_factory=list)
    warning: str | None = None

    @property
    def metrics(self) -> dict[str, float]:
        return self.evaluation.metrics


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int | None = None,
    batch_tokens: int = 4096,
    on_progress: Progress = None,
    writer: TextGenerator | None = None,
) -> list[EvaluatedAnswer]:
    """Generate greedy completions of the examples that have a prompt, in order.

    Args:
        max_new_tokens: By default slightly more than the longest expected answer.
        batch_tokens: Maximum number of tokens in a decoding batch.
        writer: Generates the completions. By default, or if it returns None, transformers is used.
    """
    prompted = [e for e in examples if has_prompt(e)]
    if not prompted:
        return []
    prompts = [e.tokens[: e.prompt_length] for e in prompted]
    count = max_new_tokens or 4 + max(len(e.tokens) - e.prompt_length for e in prompted)
    completions = GreedyDecoder(model, tokenizer, None, writer, batch_tokens).complete(prompts, count, on_progress)
    pairs = zip(prompted, completions, strict=True)
    return [EvaluatedAnswer(e.row, question_of(tokenizer, e), e.answer or "", c.text) for e, c in pairs]


# Rows whose exact match is verified by generation, and the maximum length of their answers in tokens.
_MAX_VERIFIED = 8
_MAX_VERIFIED_TOKENS = 128


def exact_match_warning(
    rows: Sequence[Any], evaluation: Evaluation, tokenizer: PreTrainedTokenizerBase, complete: TextGenerator
) -> str | None:
    """Return a warning if rows count as exact matches, and the model generates other answers, on a sample of rows.

    Args:
        rows: Evaluated rows as the model receives them.
        complete: Generates greedy completions.
    """
    if evaluation.main != "exact_match" or evaluation.per_row is None:
        return None
    answered = (row for item in rows for row in rows_of(item) if row.answer is not None)
    exact = (row for row, share in zip(answered, evaluation.per_row, strict=True) if share == 1 and has_prompt(row))
    short = (row for row in exact if len(row) - row.prompt_length <= _MAX_VERIFIED_TOKENS)
    if not (sample := list(itertools.islice(short, _MAX_VERIFIED))):
        return None
    count = 1 + max(len(row) - row.prompt_length for row in sample)
    completions = complete([row.tokens[: row.prompt_length] for row in sample], count, 4096, None)
    different = []
    for row, completion in zip(sample, completions or (), strict=False):
        label = str(tokenizer.decode(row.tokens[row.prompt_length :], skip_special_tokens=True))
        expected = label.rpartition("</think>")[2].strip()
        is_complete = not row.answer.strip().startswith(expected) or expected == row.answer.strip()
        is_answer = expected.startswith(row.answer.strip()) and completion.text.strip() == label.strip()
        if is_complete and not is_answer:
            different.append(f"row {row.row}: {quoted(completion.text, 60)} instead of {quoted(row.answer, 60)}")
    if not different:
        return None
    return (
        f"exact match is not confirmed: {len(different)} of {len(sample)} generated answers to rows that count as "
        f"correct differ. {different[0]}"
    )


def has_prompt(row: Example) -> bool:
    """True if a row has a prompt that a model can answer."""
    return row.prompt_length > 0 and (row.answer is not None or isinstance(row, TokenizedPrompt))


def question_of(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """Return the last user turn of the prompt as plain text.

    Chat templates put the speaker's name on a line by itself.
    """
    prompt = example.tokens[: example.prompt_length]
    prompt = prompt[prompt < len(tokenizer)]  # a soft prompt has no text
    text = str(tokenizer.decode(prompt, skip_special_tokens=True)).rstrip()
    lines = text.removesuffix("assistant").rstrip().splitlines()
    speaker = max((n for n, line in enumerate(lines) if line.strip().lower() == "user"), default=-1)
    return "\n".join(lines[speaker + 1 :])


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
            images: See :meth:`deltaw.training.task.OpenedRun.encode`.

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
    path = folder / FILE
    require_contained(folder, only=[path])
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        found = json.loads(raw) if len(raw) <= _MAX_BYTES else None
    except (OSError, ValueError, RecursionError):
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
