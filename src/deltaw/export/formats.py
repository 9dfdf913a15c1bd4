"""`deltaw export`: the formats by name, and what each writes.

Knows which routine makes which format, and what is told afterwards; how a format looks is known there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deltaw.data.rendering import FAULTS, rendered_by
from deltaw.durable import write_text
from deltaw.errors import UserError, did_you_mean
from deltaw.export import gguf_model
from deltaw.export import gguf_model as gguf_adapter
from deltaw.export.gguf_file import ADAPTER_KINDS, KINDS
from deltaw.export.output_folder import appearing, check_target
from deltaw.export.plain_adapter import PlainAdapter, PlainUpdate, require_lora
from deltaw.export.portable import (
    DescribedBase,
    WrittenFolder,
    describe_base,
    export_peft,
    read_updates,
    require_same_base,
    uniform,
)
from deltaw.hub.gguf import terminators_in
from deltaw.lora.files import CONFIG_NAME
from deltaw.lora.fingerprint import FINGERPRINT_KEY
from deltaw.tensor_files import save_tensors

# ---- An Ollama ``Modelfile`` beside a GGUF file.
#
# Ollama's templates are Go's, not Jinja. Three published forms are known: ChatML, Llama 3 and Gemma. Whether a
# chat template is one of them is found by rendering conversations with it and comparing the texts; another one
# is left out, and that is said.


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
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
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


# ---- An adapter in the format of mlx-lm: ``adapters.safetensors`` and its own ``adapter_config.json``.
#
# mlx-lm puts an update on every module that ``keys`` names in the last ``num_layers`` layers, with one rank and
# one scale, and then reads what the file has. A module that the file has nothing for keeps a B of zeros, so it
# changes nothing. A is (in, r) and B (r, out) there.


FORMAT = "mlx"
WEIGHTS = "adapters.safetensors"
_LAYER = re.compile(r"model\.layers\.(?P<number>\d+)\.(?P<inside>.+)")
# Families whose modules mlx-lm names as transformers does.
_SAME_NAMES = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")


def export_mlx(
    run: Path,
    folder: Path,
    *,
    model: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> WrittenFolder:
    """Write the adapter in ``run`` for mlx-lm's ``--adapter-path``.

    Args:
        run: a run's folder, or an adapter's in PEFT's format.
        folder: to make.
        model: the base model, where it is not the one that the folder names.
        trust_remote_code: run the Python files that came with the base model.
        overwrite: whether a folder with files is replaced.
        say: told a line where something should be known.

    Raises:
        UserError: the adapter holds more than the format can, the base is another one or of a family that
            mlx-lm names otherwise, or the folder cannot be written. Nothing is written then.
    """
    require_lora(run, FORMAT)
    check_target(folder, overwrite=overwrite)
    base = describe_base(run, model, say=say, precision="bf16", trust_remote_code=trust_remote_code)
    adapter = read_updates(run, base, FORMAT, say=say)
    _refuse(adapter, base, run)
    fingerprint = require_same_base(base, adapter.fingerprint, run, say)
    alike = uniform(adapter.updates)
    tensors: dict[str, Tensor] = {}
    for update, (factor_A, factor_B) in zip(adapter.updates, alike.factors, strict=True):
        tensors[f"{update.module}.lora_a"] = factor_A.t().contiguous()
        tensors[f"{update.module}.lora_b"] = factor_B.t().contiguous()
    layers, keys = _keys(adapter.updates, int(base.config.num_hidden_layers))
    settings = {
        "fine_tune_type": "lora",
        "model": base.files.reference,
        "num_layers": layers,
        "lora_parameters": {"rank": alike.rank, "scale": alike.scaling, "dropout": 0.0, "keys": keys},
    }
    metadata = {"format": "mlx"} | ({FINGERPRINT_KEY: fingerprint} if fingerprint else {})
    with appearing(folder, overwrite=overwrite, say=say) as partial:
        save_tensors(partial / WEIGHTS, tensors, metadata)
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (partial / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    return WrittenFolder(folder, len(adapter.updates), alike.rank, alike.alpha, alike.padded, alike.folded)


def _keys(updates: list[PlainUpdate], layers: int) -> tuple[int, list[str]]:
    """How many of the last layers have updates, and the modules: of a layer by their names inside it."""
    found = [(_LAYER.fullmatch(update.module), update.module) for update in updates]
    numbers = [int(match["number"]) for match, _ in found if match is not None]
    keys = {module if match is None else match["inside"] for match, module in found}
    # mlx-lm takes 0 for none of the layers.
    return (layers - min(numbers) if numbers else 0), sorted(keys)


def _refuse(adapter: PlainAdapter, base: DescribedBase, run: Path) -> None:
    if base.config.model_type not in _SAME_NAMES:
        raise UserError(
            f"the modules of '{base.config.model_type}' models have other names in mlx-lm",
            where=str(run),
            hint=f"known are {', '.join(_SAME_NAMES)}; otherwise merge the adapter (deltaw merge) and "
            "convert the model with mlx_lm.convert",
        )
    if adapter.invocation is not None:
        raise UserError(
            "the adapter acts only from its invocation tokens on, and mlx-lm would apply it to every token",
            where=str(run),
            hint="serve it with deltaw serve, or llama.cpp (--format gguf-adapter)",
        )
    outer = [u.module for u in adapter.updates if u.embedding or u.module == "lm_head"]
    if outer and base.config.tie_word_embeddings:
        raise UserError(
            f"the adapter changes '{outer[0]}', which is tied: mlx-lm would change both weights",
            where=str(run),
            hint="merge it instead (deltaw merge) and convert the model with mlx_lm.convert",
        )


# ---- formats


FORMATS = {
    "gguf-adapter": "the adapter for llama.cpp and Ollama, beside a GGUF base model",
    "gguf": "base and adapter merged, for llama.cpp and Ollama",
    "peft": "the adapter with one rank and one alpha, for any reader of PEFT's format",
    "vllm": "the same, without what vLLM refuses",
    "mlx": "the adapter for mlx-lm",
}
_REFUSED = {"onnx": "merge the adapter (deltaw merge), then: optimum-cli export onnx --model FOLDER OUT"}
_DEFAULT_KIND = {"gguf-adapter": "f32", "gguf": "f16"}


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        format: by name. files: their paths, the main one first.
        facts: of the format, for JSON. lines: the same for a person.
    """

    format: str
    files: list[str]
    facts: dict[str, object]
    lines: list[str]

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
    say: Callable[[str], None] = lambda line: None,
) -> Export:
    """Write the adapter in ``run`` in another program's format.

    Args:
        run: a run's folder, or an adapter's in PEFT's format.
        format_name: a key of :data:`FORMATS`.
        output: a file that ends in ``.gguf`` or a folder for one; a folder for the other formats.
        kind: how numbers are stored in a GGUF file; None takes f32 for an adapter and f16 for a model.
        model: the base model, where it is not the one that the folder names.
        trust_remote_code: run the Python files that came with the base model.
        overwrite: whether files that are there are replaced.
        say: told a line where something should be known.

    Raises:
        UserError: the format cannot hold the adapter, or the output cannot be written.
    """
    run, output = Path(run), Path(output)
    if format_name in _REFUSED:
        raise UserError(f"'{format_name}' is not exported here", where="--format", hint=_REFUSED[format_name])
    if format_name not in FORMATS:
        raise UserError(
            f"there is no format '{format_name}'", where="--format", hint=did_you_mean(format_name, FORMATS)
        )
    if format_name in _DEFAULT_KIND:
        kind = kind or _DEFAULT_KIND[format_name]
        return _gguf(run, format_name, output, kind, model, trust_remote_code, overwrite, say)
    if kind is not None:
        raise UserError(
            f"--type is for GGUF files, and {format_name} keeps the factors in fp32",
            where="--type",
            hint="leave it out",
        )
    if format_name == "mlx":
        written = export_mlx(
            run, output, model=model, trust_remote_code=trust_remote_code, overwrite=overwrite, say=say
        )
        files = [str(output / name) for name in (WEIGHTS, "adapter_config.json")]
    else:
        written = export_peft(
            run,
            output,
            reader=format_name,
            model=model,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            say=say,
        )
        files = [str(output / name) for name in ("adapter_model.safetensors", "adapter_config.json")]
    facts = {**asdict(written), "path": str(output)}
    return Export(format_name, files, facts, _lines(written))


def _gguf(
    run: Path,
    format_name: str,
    output: Path,
    kind: str,
    model: str | None,
    trust: bool,
    overwrite: bool,
    say: Callable[[str], None],
) -> Export:
    known: Iterable[str] = ADAPTER_KINDS if format_name == "gguf-adapter" else KINDS
    if kind not in known:
        raise UserError(
            f"{format_name} does not store numbers as '{kind}'", where="--type", hint=f"there is {', '.join(known)}"
        )
    in_folder = output.suffix.lower() != ".gguf"
    name = f"{run.resolve().name}-{kind}.gguf"
    path = output / name if in_folder else output
    beside = output / "Modelfile" if in_folder else output.with_suffix(".Modelfile")
    for file in (path, beside):
        if file.is_dir() or (file.exists() and not overwrite):
            raise UserError(
                f"there is '{file.name}' already",
                where=str(file),
                hint="name another output, or replace it with --overwrite",
            )
    written: gguf_adapter.WrittenAdapter | gguf_model.WrittenModel
    if format_name == "gguf-adapter":
        written = gguf_adapter.export_gguf_adapter(run, path, kind=kind, model=model, trust_remote_code=trust, say=say)
    else:
        written = gguf_model.export_gguf(run, path, kind=kind, model=model, trust_remote_code=trust, say=say)
    precision = "bf16" if format_name == "gguf-adapter" else "fp32"
    base = describe_base(run, model, say=say, precision=precision, trust_remote_code=trust)
    note = _write_modelfile(beside, path, run, base if format_name == "gguf-adapter" else None, base)
    if note is not None:
        say(note)
    facts = {**asdict(written), "path": str(path)}
    return Export(format_name, [str(path), str(beside)], facts, _lines(written))


def _write_modelfile(
    beside: Path, file: Path, run: Path, below: DescribedBase | None, base: DescribedBase
) -> str | None:
    tokenizer = base.tokenizer(run)
    ends = [] if tokenizer is None else terminators_in(base.folder, tokenizer)
    here = f"./{file.name}"
    if below is None:
        text, note = modelfile(here, None, tokenizer, ends)
    else:
        text, note = modelfile(os.path.abspath(below.gguf or below.folder), here, tokenizer, ends)
    write_text(beside, text)
    return note


def _lines(written: gguf_adapter.WrittenAdapter | gguf_model.WrittenModel | WrittenFolder) -> list[str]:
    """What a person is told."""
    if isinstance(written, gguf_model.WrittenModel):
        types = ", ".join(f"{count} {name}" for name, count in sorted(written.types.items()))
        return [
            f"architecture {written.architecture}",
            f"{written.tensors} tensors ({types})",
            f"{written.size / 1e6:.1f} MB",
        ]
    if isinstance(written, gguf_adapter.WrittenAdapter):
        lines = [
            f"architecture {written.architecture}",
            f"{written.tensors} modules, alpha {written.alpha:g}",
            f"{written.size / 1e6:.1f} MB",
        ]
    else:
        lines = [f"{written.modules} modules, rank {written.rank}, alpha {written.alpha:g}"]
        if written.padded:
            lines.append(f"{written.padded} modules of smaller rank were padded with zeros")
    if written.folded:
        lines.append(f"of {written.folded} modules, a part of the scaling is in B")
    return lines
