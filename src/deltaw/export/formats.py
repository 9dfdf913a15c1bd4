"""`deltaw export`: the formats by name, and what each writes.

Knows which routine makes which format, and what is told afterwards; how a format looks is known there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from deltaw.durable import write_text
from deltaw.errors import UserError, did_you_mean
from deltaw.export import gguf_adapter, gguf_model, mlx
from deltaw.export.described_base import DescribedBase, describe_base
from deltaw.export.gguf_types import ADAPTER_KINDS, KINDS
from deltaw.export.ollama import modelfile
from deltaw.export.portable import WrittenFolder, export_peft
from deltaw.hub.terminators import terminators_in

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
        written = mlx.export_mlx(
            run, output, model=model, trust_remote_code=trust_remote_code, overwrite=overwrite, say=say
        )
        files = [str(output / name) for name in (mlx.WEIGHTS, "adapter_config.json")]
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
            f"{format_name} does not store numbers as '{kind}'",
            where="--type",
            hint=f"there is {', '.join(known)}",
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
        written = gguf_adapter.export_gguf_adapter(
            run, path, kind=kind, model=model, trust_remote_code=trust, say=say
        )
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
