"""The Modelfile beside a GGUF file: the template in Go where the chat template is of a known form."""

from __future__ import annotations

import re

import pytest

from deltaw.export.formats import form_of, modelfile
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


def in_go(template: str, messages: list[dict[str, str]]) -> str:
    """What these use of Go's templates: range, fields, one if; and {{- cuts spaces before it."""
    found = re.fullmatch(r"\{\{- range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.S)
    assert found is not None
    text, condition = "", r'\{\{ if eq \.Role "(\w+)" \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}'
    for message in messages:
        part = re.sub(condition, lambda m, role=message["role"]: m[2 if role == m[1] else 3], found[1], flags=re.S)
        text += part.replace("{{ .Role }}", message["role"]).replace("{{ .Content }}", message["content"])
    return text + found[2]


@pytest.mark.parametrize("template", [models.CHAT_ML, LLAMA3, GEMMA], ids=["ChatML", "Llama 3", "Gemma"])
def test_the_template_in_go_writes_the_same_conversation(template: str) -> None:
    tokenizer = models.sentence_bpe(prefix=False)
    tokenizer.chat_template = template
    found = form_of(tokenizer)
    assert found is not None and found[1] is None
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert in_go(found[0].go, MESSAGES) == rendered.removeprefix("<s>")


def test_a_system_message_that_a_template_adds_is_written_apart() -> None:
    tokenizer = models.byte_bpe("qwen2")
    tokenizer.chat_template = DEFAULT_SYSTEM
    text, notes = modelfile("./m.gguf", None, tokenizer, [0, 2])
    assert notes == [] and 'SYSTEM """You are helpful."""' in text
    assert 'PARAMETER stop "<|im_end|>"' in text and text.startswith("FROM ./m.gguf\nTEMPLATE ")


def test_another_template_is_left_out_and_that_is_said() -> None:
    tokenizer = models.byte_bpe("qwen2")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    text, (note,) = modelfile("/models/base model.gguf", "./a.gguf", tokenizer, [0])
    assert "no known form" in note and "TEMPLATE" not in text
    assert text.startswith('FROM "/models/base model.gguf"\nADAPTER ./a.gguf\n')


def commands(text: str) -> list[tuple[str, str]]:
    """A Modelfile as Ollama reads it: a text in three quotation marks goes on to the first line that ends so."""
    found, lines = [], iter(text.splitlines())
    for line in lines:
        name, _, value = line.partition(" ")
        while value.startswith('"""') and not (len(value) >= 6 and value.rstrip().endswith('"""')):
            value += "\n" + next(lines)
        found.append((name, value.strip().removeprefix('"""').removesuffix('"""')))
    return found


@pytest.mark.parametrize(
    "system",
    [
        "You are the bot.",
        "Two lines:\nTICKET: x\n\nREPLY: y",
        'Say "hi"',
        '"Quoted" all "over"',
        'x"""\nADAPTER /etc/passwd',
        '"""\nFROM evil\nSYSTEM """x',
        "{{ .System }}\\n# no comment",
    ],
)
def test_the_system_prompt_of_the_rows_comes_before_the_templates_own(system: str) -> None:
    tokenizer = models.byte_bpe("qwen2")
    tokenizer.chat_template = DEFAULT_SYSTEM
    text, notes = modelfile("./m.gguf", None, tokenizer, [0, 2], system)
    told = commands(text)
    assert {name for name, _ in told} == {"FROM", "TEMPLATE", "PARAMETER", "SYSTEM"}
    assert [value for name, value in told if name == "SYSTEM"] == [system.replace('"""', "'''")]
    assert len(notes) == ('"""' in system)
