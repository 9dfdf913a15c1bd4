"""A tokenizer of bytes with a ChatML template, variations of it, and files to read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from deltaw.data import Report
from deltaw.errors import UserError

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(
    template: str | None = CHATML,
    *,
    bos: bool = False,
    merges: Iterable[tuple[str, str]] = (),
    eos: str | None = "<|im_end|>",
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: special tokens, the 256 bytes, and ``merges`` (byte-level spelling: Ċ is a newline).

    Like SmolLM2's, its padding token is its end token, so that masking by id would show.
    """
    merges = list(merges)
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=eos,
        pad_token=eos,
        additional_special_tokens=[token for token in SPECIAL if token != eos],
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSON Lines, or a text or bytes as they are, and return the path."""

    def write_content(content: Iterable[object] | str | bytes, name: str = "data.jsonl") -> str:
        if not isinstance(content, (str, bytes)):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write_content


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: object, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": content, **more}


def refusal(work: Callable[..., object], *given: object, **more: object) -> UserError:
    """The error with which ``work`` refuses what it is given."""
    with pytest.raises(UserError) as refused:
        work(*given, **more)
    return refused.value


def accounted(report: Report) -> int:
    """What ``rows_read`` must be."""
    drawn = report.held_out if report.held_out_source is None else 0
    duplicates = 0 if report.duplicates_kept else report.duplicates
    used = report.rows_kept + drawn + duplicates + report.not_chosen + report.other_classes
    return used + report.skipped + report.dropped_long + report.without_label - report.added
