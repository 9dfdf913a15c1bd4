"""An Ollama ``Modelfile`` beside a GGUF file.

Ollama's templates are Go's, not Jinja. Three published forms are known: ChatML, Llama 3 and Gemma. Whether a
chat template is one of them is found by rendering conversations with it and comparing the texts; another one
is left out, and that is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from deltaw.data.rendering import FAULTS, rendered_by

Message = dict[str, str]


@dataclass(frozen=True)
class Form:
    """A way to write a conversation.

    Attributes:
        go: as a Go template of Ollama's ``.Messages``.
        turn: one message as text. opening: what opens the answer.
    """

    go: str
    turn: Callable[[Message], str]
    opening: str

    def text(self, messages: Sequence[Message]) -> str:
        return "".join(self.turn(message) for message in messages) + self.opening


def _gemma_role(message: Message) -> str:
    return "model" if message["role"] == "assistant" else message["role"]


_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_FORMS = (
    Form(
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n",
        lambda m: f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    Form(
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>"
        "{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n",
        lambda m: f"{_HEADER.format(m['role'])}{m['content']}<|eot_id|>",
        _HEADER.format("assistant"),
    ),
    Form(
        '{{- range .Messages }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}{{ .Role }}'
        "{{ end }}\n{{ .Content }}<end_of_turn>\n{{ end }}<start_of_turn>model\n",
        lambda m: f"<start_of_turn>{_gemma_role(m)}\n{m['content']}<end_of_turn>\n",
        "<start_of_turn>model\n",
    ),
)
_SYSTEM: Message = {"role": "system", "content": "Answer briefly."}
_CONVERSATION: list[Message] = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 3 + 3?"},
]


def modelfile(
    source: str, adapter: str | None, tokenizer: PreTrainedTokenizerBase | None, ends: Iterable[int]
) -> tuple[str, str | None]:
    """The text of a Modelfile, and what to say about it.

    Args:
        source: the base model or the merged one, as Ollama's FROM takes it.
        adapter: the adapter's file; None beside a merged model.
        tokenizer: with the chat template; None where there is none.
        ends: ids of the tokens that end an answer.
    """
    lines = [f"FROM {_path(source)}"]
    if adapter is not None:
        lines.append(f"ADAPTER {_path(adapter)}")
    note = None
    if tokenizer is not None:
        found = form_of(tokenizer)
        if found is not None:
            form, system = found
            lines.append(f'TEMPLATE """{form.go}"""')
            if system:
                lines.append(f'SYSTEM """{system}"""')
        elif tokenizer.chat_template:
            note = (
                "note: the chat template is none that could be written for Ollama, so the Modelfile has no "
                "TEMPLATE: write one, or check what Ollama makes of the GGUF file's own"
            )
        stops = dict.fromkeys(str(tokenizer.decode([end])) for end in sorted(ends))
        lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops if stop.strip()]
    return "\n".join(lines) + "\n", note


def form_of(tokenizer: PreTrainedTokenizerBase) -> tuple[Form, str | None] | None:
    """The form that the chat template has, and the system message that it adds where a conversation has none;
    None where it is no known form."""
    plain = _rendered(tokenizer, _CONVERSATION)
    if plain is None:
        return None
    for form in _FORMS:
        own = form.text(_CONVERSATION)
        if not plain.endswith(own):
            continue
        with_system = _rendered(tokenizer, [_SYSTEM, *_CONVERSATION])
        if with_system is not None and with_system != form.text([_SYSTEM, *_CONVERSATION]):
            return None
        added = plain.removesuffix(own)
        if not added:
            return form, None
        before, _, after = form.turn({"role": "system", "content": "\0"}).partition("\0")
        if added.startswith(before) and added.endswith(after):
            system = added.removeprefix(before).removesuffix(after)
            return (form, system) if '"""' not in system else None
    return None


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str | None:
    """The conversation as the template writes it, without the mark of the text's beginning; None where it
    refuses the conversation."""
    if not tokenizer.chat_template:
        return None
    try:
        text = rendered_by(tokenizer, messages, generation=True)
    except FAULTS:
        return None
    start = tokenizer.bos_token
    return text.removeprefix(str(start)) if start and not text.startswith("<|im_start|>") else text


def _path(path: str) -> str:
    return json.dumps(path, ensure_ascii=False) if " " in path else path
