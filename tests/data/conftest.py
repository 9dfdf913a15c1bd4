"""A byte-level tokenizer with a ChatML template, variations of it, and input files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from deltaw.data.report import PreparationReport
from tests.conftest import refusal  # noqa: F401 (used by the tests)

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>")
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def make_tokenizer(
    template: str | None = CHATML, *, bos=False, merges: Iterable[tuple[str, str]] = (), eos: str | None = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """Create a byte-level BPE tokenizer with special tokens, the 256 bytes, and ``merges``.

    Merges are in byte-level spelling (Ċ is a newline). The padding token is the end token, as in SmolLM2, so that
    masking by id would be detected.
    """
    merges = list(merges)
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": eos, "pad_token": eos}
    special["additional_special_tokens"] = [token for token in SPECIAL if token != eos]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSON Lines, or write a text or bytes unchanged, and return the path."""

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


def assistant(content: object, **fields: object) -> dict[str, object]:
    return {"role": "assistant", "content": content, **fields}


def accounted(report: PreparationReport) -> int:
    """Return the expected value of ``rows_read``."""
    split_off = report.held_out if report.held_out_source is None else 0
    duplicates = 0 if report.duplicates_kept else report.duplicates
    used = report.rows_kept + split_off + duplicates + report.not_selected + report.other_classes
    return used + report.skipped + report.dropped_long + report.without_label - report.added
