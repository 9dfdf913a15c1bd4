"""`deltaw export`: the formats by name, what each writes, and the Modelfile beside a GGUF file.

Knows which routine makes which format, and what is told afterwards; how a format looks is known there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from deltaw.data.rendering import FAULTS, rendered_by
from deltaw.data.report import quoted
from deltaw.durable import write_text
from deltaw.errors import UserError, did_you_mean
from deltaw.export.base import MergeOptions, Say, base_of
from deltaw.export.gguf_file import ADAPTER_KINDS, KINDS
from deltaw.export.gguf_model import export_gguf, export_gguf_adapter
from deltaw.export.portable import export_folder, file_names
from deltaw.hub.folders import adapter_folder, short_name
from deltaw.hub.terminators import terminators_in
from deltaw.platforms import shell_word
from deltaw.training.prompting import read_prompting

# Ollama's templates are Go's, not Jinja. Three published forms are known: ChatML, Llama 3 and Gemma. A chat template
# is recognized by rendering conversations with it and comparing the texts; for another one there is no TEMPLATE.

Message = dict[str, str]


@dataclass(frozen=True)
class Form:
    """A way to write a conversation.

    Attributes:
        turn: one message as text, with ``{role}`` and ``{content}``.
        assistant: the name of the role that answers.
    """

    turn: str
    assistant: str = "assistant"

    @property
    def opening(self) -> str:
        """What opens the answer."""
        return self.turn.partition("{content}")[0].format(role=self.assistant)

    @property
    def go(self) -> str:
        """As a Go template of Ollama's ``.Messages``."""
        role = "{{ .Role }}"
        if self.assistant != "assistant":
            role = '{{ if eq .Role "assistant" }}' + self.assistant + "{{ else }}{{ .Role }}{{ end }}"
        turn = self.turn.format(role=role, content="{{ .Content }}")
        return "{{- range .Messages }}" + turn + "{{ end }}" + self.opening

    def text(self, messages: Sequence[Message]) -> str:
        """A conversation, with what opens the answer."""
        names = {"assistant": self.assistant}
        turns = [self.turn.format(role=names.get(m["role"], m["role"]), content=m["content"]) for m in messages]
        return "".join(turns) + self.opening


_FORMS = (
    Form("<|im_start|>{role}\n{content}<|im_end|>\n"),
    Form("<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"),
    Form("<start_of_turn>{role}\n{content}<end_of_turn>\n", assistant="model"),
)
# What ends a text in a Modelfile, which knows no way to write it inside of one.
_QUOTES, _OTHER_QUOTES = '"""', "'''"
_SYSTEM: Message = {"role": "system", "content": "Answer briefly."}
_CONVERSATION: list[Message] = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 3 + 3?"},
]


def modelfile(
    source: str, adapter: str | None, tokenizer: PreTrainedTokenizerBase | None, ends: Iterable[int], system: str = ""
) -> tuple[str, list[str]]:
    """The text of a Modelfile, and what to say about it.

    Args:
        source: the base model or the merged one, as Ollama's FROM takes it.
        adapter: the adapter's file; None beside a merged model.
        tokenizer: with the chat template; None where there is none.
        ends: ids of the tokens that end an answer.
        system: the system prompt that the training rows share; empty for that of the chat template.
    """
    lines = [f"FROM {_path(source)}"]
    if adapter is not None:
        lines.append(f"ADAPTER {_path(adapter)}")
    found, notes = chat_of(tokenizer, ends, system)
    if found.template:
        lines.append(f'TEMPLATE """{found.template}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in found.stops]
    if _QUOTES in found.system:
        notes.append(f"the system prompt holds {_QUOTES}, which no Modelfile can: it has {_OTHER_QUOTES} instead")
    if found.system:
        lines.append(f"SYSTEM {_QUOTES}{found.system.replace(_QUOTES, _OTHER_QUOTES)}{_QUOTES}")
    return "\n".join(lines) + "\n", notes


@dataclass(frozen=True)
class Chat:
    """How a model is talked with: Ollama's template in Go, the texts that end an answer, the system prompt; each may
    be empty."""

    template: str = ""
    stops: tuple[str, ...] = ()
    system: str = ""


def chat_of(tokenizer: PreTrainedTokenizerBase | None, ends: Iterable[int], system: str = "") -> tuple[Chat, list[str]]:
    """How a model is talked with, and what to say about it; arguments as those of :func:`modelfile`."""
    if tokenizer is None:
        return Chat(system=system), []
    form, of_template = form_of(tokenizer) or (None, None)
    notes = []
    if form is None and tokenizer.chat_template:
        notes.append("the chat template has no known form for Ollama, so the Modelfile has no TEMPLATE: write one")
    texts = dict.fromkeys(str(tokenizer.decode([end])) for end in sorted(ends))
    stops = tuple(stop for stop in texts if stop.strip())
    return Chat("" if form is None else form.go, stops, system or of_template or ""), notes


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
        before, _, after = form.turn.format(role="system", content="\0").partition("\0")
        if added.startswith(before) and added.endswith(after):
            system = added.removeprefix(before).removesuffix(after)
            return (form, system) if _QUOTES not in system else None
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
    path = path.replace(os.sep, "/")
    return json.dumps(path, ensure_ascii=False) if " " in path else path


FORMATS = {
    "gguf-adapter": "the adapter for llama.cpp and Ollama, beside a GGUF base model",
    "gguf": "base and adapter merged, for llama.cpp and Ollama",
    "peft": "the adapter with one rank and one alpha, for any reader of PEFT's format",
    "vllm": "the same, without what vLLM refuses",
    "mlx": "the adapter for mlx-lm",
}
_REFUSED = {"onnx": "merge the adapter (deltaw merge), then: optimum-cli export onnx --model FOLDER OUT"}
# Of GGUF files: the types of numbers, the usual one first.
_KINDS = {"gguf-adapter": ADAPTER_KINDS, "gguf": ("q8_0", *KINDS)}


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        format: by name. files: their paths, the main one first.
        facts: of the format, for JSON. lines: the same for a person. told: what to know of the files.
    """

    format: str
    files: list[str]
    facts: dict[str, object]
    lines: list[str]
    told: Sequence[str] = ()

    def as_dict(self) -> dict[str, object]:
        return {"format": self.format, "files": self.files, **self.facts}


def export(
    run: str | Path,
    format_name: str,
    output: str | Path,
    *,
    kind: str | None = None,
    model: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> Export:
    """Write the adapter in ``run`` in another program's format.

    Args:
        run: a run's folder, or an adapter's in PEFT's format; or an adapter's hub id.
        format_name: a key of :data:`FORMATS`.
        output: a file that ends in ``.gguf`` or a folder for one; a folder for the other formats.
        kind: how numbers are stored in a GGUF file; None takes f32 for an adapter and q8_0 for a model.
        model: the base model, if it is not the one that the folder names.
        trust_remote_code: run the Python files that came with the base model.
        overwrite: whether files that are there are replaced.
        say: told a line if something should be known.

    Raises:
        UserError: the format cannot hold the adapter, or the output cannot be written.
    """
    run, output = adapter_folder(run), Path(output)
    if format_name in _REFUSED:
        raise UserError(f"'{format_name}' is not exported here", where="--format", hint=_REFUSED[format_name])
    if format_name not in FORMATS:
        hint = did_you_mean(format_name, FORMATS)
        raise UserError(f"there is no format '{format_name}'", where="--format", hint=hint)
    options = MergeOptions(model, trust_remote_code, "fp32", overwrite=overwrite)
    if format_name in _KINDS:
        return _gguf(run, format_name, output, kind or _KINDS[format_name][0], options, say)
    if kind is not None:
        what = f"--type is for GGUF files, and {format_name} keeps the factors in fp32"
        raise UserError(what, where="--type", hint="leave it out")
    written = export_folder(run, output, format_name, options, say)
    return Export(format_name, [str(output / name) for name in file_names(format_name)], written.facts, written.lines)


def _gguf(run: Path, format_name: str, output: Path, kind: str, options: MergeOptions, say: Say) -> Export:
    if kind not in _KINDS[format_name]:
        hint = f"use {', '.join(dict.fromkeys(_KINDS[format_name]))}"
        raise UserError(f"{format_name} does not store numbers as '{kind}'", where="--type", hint=hint)
    in_folder = output.suffix.lower() != ".gguf"
    path = output / f"{short_name(run)}-{kind}.gguf" if in_folder else output
    beside = output / "Modelfile" if in_folder else output.with_suffix(".Modelfile")
    for file in (path, beside):
        if file.is_dir() or (file.exists() and not options.overwrite):
            hint = "name another output, or replace it with --overwrite"
            raise UserError(f"there is '{file.name}' already", where=str(file), hint=hint)
    alone = format_name == "gguf-adapter"
    written = (export_gguf_adapter if alone else export_gguf)(run, path, kind, options, say)
    base = base_of(run, "bf16" if alone else "fp32", options, say)
    tokenizer = base.tokenizer(run)
    ends = [] if tokenizer is None else terminators_in(base.folder, tokenizer)
    here = f"./{path.name}"
    source, adapter = (os.path.abspath(base.gguf or base.folder), here) if alone else (here, None)
    system = read_prompting(run).system
    text, notes = modelfile(source, adapter, tokenizer, ends, system)
    write_text(beside, text)
    for note in notes:
        say(f"note: {note}")
    told = [f"system prompt of the rows, as SYSTEM in the Modelfile: {quoted(system, 22)}"] if system else []
    told.append(f"next: ollama create {shell_word(short_name(run))} -f {shell_word(beside)}")
    return Export(format_name, [str(path), str(beside)], written.facts, written.lines, told)
