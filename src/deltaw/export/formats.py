"""`deltaw export`: export formats, and the Modelfile for a GGUF file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from deltaw.atomic_files import write_text
from deltaw.data.rendering import FAULTS, render_with_tokenizer
from deltaw.data.report import quoted
from deltaw.errors import UserError, did_you_mean
from deltaw.export.gguf_adapter import export_gguf_adapter
from deltaw.export.gguf_file import ADAPTER_KINDS, KINDS
from deltaw.export.gguf_model import export_gguf
from deltaw.export.gguf_vision import mmproj_path
from deltaw.export.merge_plan import MergeOptions
from deltaw.export.portable import export_folder, file_names
from deltaw.hub.folders import adapter_folder, short_name
from deltaw.hub.terminators import terminators_in
from deltaw.inference.prompting import read_prompting
from deltaw.platforms import shell_word
from deltaw.progress import LogFunction, ignore_line

# Ollama uses Go templates instead of Jinja. Three published formats are supported: ChatML, Llama 3 and Gemma. A chat
# template is recognized by rendering conversations and comparing the texts. Otherwise, TEMPLATE is omitted.

Message = dict[str, str]


@dataclass(frozen=True)
class ChatFormat:
    """Text format of a conversation.

    Attributes:
        turn: Format string of a message with ``{role}`` and ``{content}``.
        assistant: Role name of the assistant.
    """

    turn: str
    assistant: str = "assistant"

    @property
    def opening(self) -> str:
        """Text before an answer."""
        return self.turn.partition("{content}")[0].format(role=self.assistant)

    @property
    def go(self) -> str:
        """The format as a Go template for Ollama's ``.Messages``."""
        role = "{{ .Role }}"
        if self.assistant != "assistant":
            role = '{{ if eq .Role "assistant" }}' + self.assistant + "{{ else }}{{ .Role }}{{ end }}"
        turn = self.turn.format(role=role, content="{{ .Content }}")
        return "{{- range .Messages }}" + turn + "{{ end }}" + self.opening

    def text(self, messages: Sequence[Message]) -> str:
        """Render a conversation, including the opening of the next answer."""
        names = {"assistant": self.assistant}
        turns = [self.turn.format(role=names.get(m["role"], m["role"]), content=m["content"]) for m in messages]
        return "".join(turns) + self.opening


_CHAT_FORMATS = (
    ChatFormat("<|im_start|>{role}\n{content}<|im_end|>\n"),
    ChatFormat("<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"),
    ChatFormat("<start_of_turn>{role}\n{content}<end_of_turn>\n", assistant="model"),
)
# Delimiter of multiline texts in a Modelfile, which cannot be escaped, and its replacement.
_QUOTES = '"""'
_OTHER_QUOTES = "'''"
_SYSTEM: Message = {"role": "system", "content": "Answer briefly."}
_TURNS = (("user", "What is 2 + 2?"), ("assistant", "4."), ("user", "And 3 + 3?"))
_CONVERSATION: list[Message] = [{"role": role, "content": content} for role, content in _TURNS]


def modelfile(source: str, adapter: str | None, chat: OllamaTemplate, vision: str | None = None) -> str:
    """Return the text of a Modelfile.

    Args:
        source: Base or merged model, as in Ollama's FROM.
        adapter: File of the adapter, or None for a merged model.
        chat: Chat settings.
        vision: File with the vision tower and the connector, if any.
    """
    lines = [f"FROM {_path(file)}" for file in (source, vision) if file is not None]
    if adapter is not None:
        lines.append(f"ADAPTER {_path(adapter)}")
    if chat.template:
        lines.append(f'TEMPLATE """{chat.template}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in chat.stops]
    if chat.system:
        lines.append(f"SYSTEM {_QUOTES}{chat.system.replace(_QUOTES, _OTHER_QUOTES)}{_QUOTES}")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class OllamaTemplate:
    """Chat settings of an Ollama model: Go template, stop strings and system prompt. Each can be empty."""

    template: str = ""
    stops: tuple[str, ...] = ()
    system: str = ""


def ollama_template(
    tokenizer: PreTrainedTokenizerBase | None, terminators: Iterable[int], system: str = ""
) -> tuple[OllamaTemplate, list[str]]:
    """Return the chat settings for Ollama, and notes for the user.

    Args:
        tokenizer: Tokenizer with the chat template, if any.
        terminators: Ids of the tokens that end an answer.
        system: System prompt of the training rows, or empty to use the one of the chat template.
    """
    replaced = f"the system prompt contains {_QUOTES}, invalid in a Modelfile: replaced by {_OTHER_QUOTES}"
    notes = [replaced] if _QUOTES in system else []
    if tokenizer is None:
        return OllamaTemplate(system=system), notes
    chat_format, template_system = detect_chat_format(tokenizer) or (None, None)
    if chat_format is None and tokenizer.chat_template:
        notes.append("the chat template has no equivalent for Ollama: add a TEMPLATE to the Modelfile")
    texts = dict.fromkeys(str(tokenizer.decode([token])) for token in sorted(terminators))
    stops = tuple(stop for stop in texts if stop.strip())
    return OllamaTemplate("" if chat_format is None else chat_format.go, stops, system or template_system or ""), notes


def detect_chat_format(tokenizer: PreTrainedTokenizerBase) -> tuple[ChatFormat, str | None] | None:
    """Return the format of the chat template and its default system message, or None if the format is unknown."""
    rendered = _rendered(tokenizer, _CONVERSATION)
    if rendered is None:
        return None
    for chat_format in _CHAT_FORMATS:
        expected = chat_format.text(_CONVERSATION)
        if not rendered.endswith(expected):
            continue
        with_system = _rendered(tokenizer, [_SYSTEM, *_CONVERSATION])
        if with_system is not None and with_system != chat_format.text([_SYSTEM, *_CONVERSATION]):
            return None
        added = rendered.removesuffix(expected)
        if not added:
            return chat_format, None
        before, _, after = chat_format.turn.format(role="system", content="\0").partition("\0")
        if added.startswith(before) and added.endswith(after):
            system = added.removeprefix(before).removesuffix(after)
            return (chat_format, system) if _QUOTES not in system else None
    return None


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str | None:
    """Render a conversation without the BOS token. Return None if the template rejects it."""
    if not tokenizer.chat_template:
        return None
    try:
        text = render_with_tokenizer(tokenizer, messages, generation=True)
    except FAULTS:
        return None
    start = tokenizer.bos_token
    return text.removeprefix(str(start)) if start and not text.startswith("<|im_start|>") else text


def _path(path: str) -> str:
    path = path.replace(os.sep, "/")
    return json.dumps(path, ensure_ascii=False) if " " in path else path


FORMATS = {
    "gguf-adapter": "adapter for llama.cpp and Ollama, used with a GGUF base model",
    "gguf": "merged model for llama.cpp and Ollama",
    "peft": "adapter with one rank and one alpha, for any program that reads PEFT's format",
    "vllm": "like peft, restricted to features that vLLM supports",
    "mlx": "adapter for mlx-lm",
}
_UNSUPPORTED = {"onnx": "merge the adapter (deltaw merge), then: optimum-cli export onnx --model FOLDER OUT"}
# Storage types of GGUF files, with the default first.
_KINDS = {"gguf-adapter": ADAPTER_KINDS, "gguf": ("q8_0", *KINDS)}


@dataclass(frozen=True)
class ExportedFiles:
    """Files written by an export.

    Attributes:
        format: Name of the format.
        files: Paths of the files, the main one first.
        details: Format-specific values for JSON output.
        lines: Lines for the user.
        notes: Hints for using the files.
    """

    format: str
    files: list[str]
    details: dict[str, object]
    lines: list[str]
    notes: Sequence[str] = ()

    def as_dict(self) -> dict[str, object]:
        return {"format": self.format, "files": self.files, **self.details}


def export(
    run: str | Path,
    format_name: str,
    output: str | Path,
    *,
    kind: str | None = None,
    model: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    log: LogFunction = ignore_line,
) -> ExportedFiles:
    """Write the adapter of a run in the format of another program.

    Args:
        run: Folder of a run, folder of a PEFT adapter, or hub id of an adapter.
        format_name: Key of :data:`FORMATS`.
        output: Folder, or for GGUF formats also a file with the suffix ``.gguf``.
        kind: Storage type of a GGUF file. None means f32 for an adapter and q8_0 for a model.
        model: Base model, if it is not the one that the folder names.
        trust_remote_code: Run the Python files of the base model.
        overwrite: Replace existing files.
        log: Receives messages for the user.

    Raises:
        UserError: if the format does not support the adapter, or the output cannot be written.
    """
    run = adapter_folder(run)
    output = Path(output)
    if format_name in _UNSUPPORTED:
        raise UserError(f"deltaw does not export '{format_name}'", location="--format", hint=_UNSUPPORTED[format_name])
    if format_name not in FORMATS:
        raise UserError(f"unknown format '{format_name}'", location="--format", hint=did_you_mean(format_name, FORMATS))
    options = MergeOptions(model, trust_remote_code, "fp32", overwrite=overwrite)
    if format_name in _KINDS:
        return _gguf(run, format_name, output, kind or _KINDS[format_name][0], options, log)
    if kind is not None:
        message = f"--type applies only to GGUF files; {format_name} stores the factors in fp32"
        raise UserError(message, location="--type", hint="remove --type")
    result = export_folder(run, output, format_name, options, log)
    return ExportedFiles(format_name, [str(output / n) for n in file_names(format_name)], result.details, result.lines)


def _gguf(run: Path, name: str, output: Path, kind: str, options: MergeOptions, log: LogFunction) -> ExportedFiles:
    if kind not in _KINDS[name]:
        hint = f"use {', '.join(dict.fromkeys(_KINDS[name]))}"
        raise UserError(f"{name} does not support the type '{kind}'", location="--type", hint=hint)
    in_folder = output.suffix.lower() != ".gguf"
    path = output / f"{short_name(run)}-{kind}.gguf" if in_folder else output
    modelfile_path = output / "Modelfile" if in_folder else output.with_suffix(".Modelfile")
    vision_path = mmproj_path(path)
    for file in (path, modelfile_path, vision_path):
        if file.is_dir() or (file.exists() and not options.overwrite):
            hint = "choose another output, or replace it with --overwrite"
            raise UserError(f"'{file.name}' already exists", location=str(file), hint=hint)
    is_adapter = name == "gguf-adapter"
    result = (export_gguf_adapter if is_adapter else export_gguf)(run, path, kind, options, log)
    base = options.resolve_base(run, dtype="bf16" if is_adapter else "fp32", log=log)
    tokenizer = base.tokenizer(run)
    terminators = [] if tokenizer is None else terminators_in(base.folder, tokenizer)
    file_name = f"./{path.name}"
    source = file_name
    adapter = None
    if is_adapter:
        source = os.path.abspath(base.gguf or base.folder) if base.in_ollama is None else base.in_ollama.name
        adapter = file_name
    system = read_prompting(run).system
    chat, notes = ollama_template(tokenizer, terminators, system)
    vision = "mmproj" in result.details
    with_vision = f"./{vision_path.name}" if vision and not is_adapter else None
    write_text(modelfile_path, modelfile(source, adapter, chat, with_vision))
    for note in notes:
        log(f"note: {note}")
    hints = [f"system prompt of the training rows, SYSTEM in the Modelfile: {quoted(system, 22)}"] if system else []
    hints.append(f"next: ollama create {shell_word(short_name(run))} -f {shell_word(modelfile_path)}")
    files = [path, *([vision_path] if vision else []), modelfile_path]
    if base.is_view:
        model = f"BASE.gguf --lora {shell_word(path)}" if is_adapter else shell_word(path)
        projector = shell_word(vision_path) if vision else "BASE-MMPROJ.gguf"
        hints.append(f"or: llama-mtmd-cli -m {model} --mmproj {projector} --image IMAGE -p PROMPT")
    return ExportedFiles(name, [str(file) for file in files], result.details, result.lines, hints)
