"""Tests of Modelfiles: chat templates of known forms are translated to Go templates."""

from __future__ import annotations

import re

import pytest

from deltaw.export.formats import detect_chat_format, modelfile, ollama_template
from tests.export import models

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + models.CHAT_ML
)
MESSAGES = [
    {"role": role, "content": text} for role, text in (("user", "one"), ("assistant", "two"), ("user", "three"))
]


def render_go(template: str, messages: list[dict[str, str]]) -> str:
    """Render with the subset of Go templates that deltaw uses: range, fields, one if, and whitespace trimming."""
    match = re.fullmatch(r"\{\{- range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.S)
    assert match is not None
    text = ""
    condition = r'\{\{ if eq \.Role "(\w+)" \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}'
    for message in messages:
        part = re.sub(condition, lambda m, role=message["role"]: m[2 if role == m[1] else 3], match[1], flags=re.S)
        text += part.replace("{{ .Role }}", message["role"]).replace("{{ .Content }}", message["content"])
    return text + match[2]


@pytest.mark.parametrize("template", [models.CHAT_ML, LLAMA3, GEMMA], ids=["ChatML", "Llama 3", "Gemma"])
def test_go_template_renders_same_conversation(template: str) -> None:
    tokenizer = models.sentence_bpe(prefix=False)
    tokenizer.chat_template = template
    detected = detect_chat_format(tokenizer)
    assert detected is not None and detected[1] is None
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert render_go(detected[0].go, MESSAGES) == rendered.removeprefix("<s>")


def test_default_system_message_is_written_as_system_command() -> None:
    tokenizer = models.byte_bpe("qwen2")
    tokenizer.chat_template = DEFAULT_SYSTEM
    chat, notes = ollama_template(tokenizer, [0, 2])
    text = modelfile("./m.gguf", None, chat)
    assert notes == [] and 'SYSTEM """You are helpful."""' in text
    assert 'PARAMETER stop "<|im_end|>"' in text and text.startswith("FROM ./m.gguf\nTEMPLATE ")


def test_unknown_template_is_omitted_with_note() -> None:
    tokenizer = models.byte_bpe("qwen2")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    chat, (note,) = ollama_template(tokenizer, [0])
    text = modelfile("/models/base model.gguf", "./a.gguf", chat)
    assert "no equivalent for Ollama" in note and "TEMPLATE" not in text
    assert text.startswith('FROM "/models/base model.gguf"\nADAPTER ./a.gguf\n')


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """Parse a Modelfile as Ollama does. A text in triple quotes ends at the first line that ends with triple quotes."""
    parsed = []
    lines = iter(text.splitlines())
    for line in lines:
        name, _, value = line.partition(" ")
        while value.startswith('"""') and not (len(value) >= 6 and value.rstrip().endswith('"""')):
            value += "\n" + next(lines)
        parsed.append((name, value.strip().removeprefix('"""').removesuffix('"""')))
    return parsed


SYSTEM_PROMPTS = [
    "You are the bot.",
    "Two lines:\nTICKET: x\n\nREPLY: y",
    'Say "hi"',
    '"Quoted" all "over"',
    'x"""\nADAPTER /etc/passwd',
    '"""\nFROM evil\nSYSTEM """x',
    "{{ .System }}\\n# no comment",
]


@pytest.mark.parametrize("system", SYSTEM_PROMPTS)
def test_system_prompt_of_rows_overrides_template_default(system: str) -> None:
    tokenizer = models.byte_bpe("qwen2")
    tokenizer.chat_template = DEFAULT_SYSTEM
    chat, notes = ollama_template(tokenizer, [0, 2], system)
    parsed = parse_modelfile(modelfile("./m.gguf", None, chat))
    assert {name for name, _ in parsed} == {"FROM", "TEMPLATE", "PARAMETER", "SYSTEM"}
    assert [value for name, value in parsed if name == "SYSTEM"] == [system.replace('"""', "'''")]
    assert len(notes) == ('"""' in system)
