"""Files of sentence-transformers that describe embedding models and rerankers: pooling, prompts and head.

They consist of ``modules.json``, a folder per module, and ``config_sentence_transformers.json``. Old and new key names
are read. The old names, which all versions support, are written.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from deltaw.atomic_files import write_text
from deltaw.errors import UserError

Pooling = Literal["mean", "first", "last", "weighted"]
_THEIRS: dict[Pooling, str] = {"mean": "mean", "first": "cls", "last": "lasttoken", "weighted": "weightedmean"}
_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_MODULES = "modules.json"
_PROMPTS = "config_sentence_transformers.json"
_LIMIT = "sentence_bert_config.json"
_POOLING = "1_Pooling"
_NORMALIZE = "2_Normalize"
_MODELS = "sentence_transformers.models."
# Files and folders that a merged model copies from the run's folder.
LAYOUT_FILES = (_MODULES, _PROMPTS, _LIMIT, _POOLING, _NORMALIZE)


@dataclass(frozen=True)
class SentenceLayout:
    """Description of text embedding in a model's folder.

    Attributes:
        pooling: Pooling of token vectors, or None if not specified.
        normalize: True if vectors are normalized to length 1.
        query_prompt, passage_prompt: Prefixes of texts.
        max_length: Number of tokens to which texts are truncated.
    """

    pooling: Pooling | None
    normalize: bool
    query_prompt: str = ""
    passage_prompt: str = ""
    max_length: int | None = None


def read_layout(folder: Path) -> SentenceLayout | None:
    """Read the layout of a model's folder, or return None if it has no ``modules.json``.

    Raises:
        UserError: if a file is not JSON, or a setting is not supported.
    """
    modules = _json(folder / _MODULES)
    if modules is None:
        return None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise UserError("this is not a list of modules", location=str(folder / _MODULES))
    kinds = [(str(m.get("type", "")).rpartition(".")[2], str(m.get("path", ""))) for m in modules]
    unsupported = [kind for kind, _ in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unsupported:
        message = f"the model uses a module '{unsupported[0]}', which is not supported"
        raise UserError(message, location=str(folder / _MODULES))
    path = next((path for kind, path in kinds if kind == "Pooling"), None)
    prompts = _object(_object(_json(folder / _PROMPTS)).get("prompts"))
    query = str(prompts.get("query") or "")
    passage = ""
    for name in ("corpus", "passage", "document"):
        passage = str(prompts.get(name) or passage)
    pooling = None if path is None else _pooling(folder, path, prompted=bool(query or passage))
    limit = _object(_json(folder / _LIMIT)).get("max_seq_length")
    max_length = limit if isinstance(limit, int) and limit > 0 else None
    return SentenceLayout(pooling, any(kind == "Normalize" for kind, _ in kinds), query, passage, max_length)


def _pooling(folder: Path, path: str, *, prompted: bool) -> Pooling:
    # The path is untrusted and must not leave the folder.
    config_path = (folder / path / "config.json").resolve()
    settings = _object(_json(config_path) if config_path.is_relative_to(folder.resolve()) else None)
    enabled = [key.removeprefix("pooling_mode_") for key, value in settings.items() if value is True]
    modes = [mode.removesuffix("_tokens").removesuffix("_token") for mode in enabled if mode in _MODES]
    modes = [str(settings["pooling_mode"])] if "pooling_mode" in settings else modes
    matching = [name for name, other_name in _THEIRS.items() if [other_name] == modes]
    if not matching:
        raise UserError(f"the pooling is not supported: {', '.join(modes) or 'unspecified'}", location=str(config_path))
    if prompted and settings.get("include_prompt") is False:
        raise UserError("the model excludes its prompt from pooling, which is not supported", location=str(config_path))
    return matching[0]


def write_layout(folder: Path, layout: SentenceLayout, width: int) -> None:
    """Write the files of a layout atomically.

    Args:
        folder: Folder of the model.
        layout: Layout to write.
        width: Dimension of the vectors.
    """
    pooling = _THEIRS[layout.pooling or "mean"]
    flags = {f"pooling_mode_{mode}": mode.removesuffix("_tokens").removesuffix("_token") == pooling for mode in _MODES}
    kinds = [("Transformer", ""), ("Pooling", _POOLING), *([("Normalize", _NORMALIZE)] if layout.normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{_MODELS}{kind}"} for i, (kind, path) in enumerate(kinds)
    ]
    prompts = {"query": layout.query_prompt, "document": layout.passage_prompt}
    _write(folder / _POOLING / "config.json", {"word_embedding_dimension": width, **flags, "include_prompt": True})
    if layout.normalize:
        _write(folder / _NORMALIZE / "config.json", {})
    _write(folder / _LIMIT, {"max_seq_length": layout.max_length, "do_lower_case": False})
    _write(folder / _PROMPTS, {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"})
    _write(folder / _MODULES, modules)


def write_cross_encoder(folder: Path, max_length: int | None, *, in_prompt: bool, pad_id: int | None) -> None:
    """Write the files of a reranker, which is a classifier with one output, atomically.

    Args:
        folder: Folder of the model.
        max_length: Number of tokens to which texts are truncated, or None for the model's maximum.
        in_prompt: True if the tokenizer's chat template renders query and passage.
        pad_id: Id of the padding token.
    """
    kind = {"method": "forward", "method_output_name": "logits"}
    modalities = {"message": {**kind, "format": "flat"}, "text": kind} if in_prompt else {"text": kind}
    settings: dict[str, Any] = {"transformer_task": "sequence-classification", "modality_config": modalities}
    settings |= {"module_output_name": "scores", "max_seq_length": max_length}
    settings["config_kwargs"] = {"num_labels": 1, **({} if pad_id is None else {"pad_token_id": pad_id})}
    _write(folder / _LIMIT, settings)
    model = {"model_type": "CrossEncoder", "prompts": {}, "activation_fn": "torch.nn.modules.activation.Sigmoid"}
    _write(folder / _PROMPTS, {**model, "default_prompt_name": None})
    _write(folder / _MODULES, [{"idx": 0, "name": "0", "path": "", "type": f"{_MODELS}Transformer"}])


def detect_use(folder: Path) -> Literal["vectors", "scores"] | None:
    """Return the purpose of a model according to its folder: text vectors or passage scores, or None if not specified.

    Raises:
        UserError: if a file is not JSON.
    """
    if _object(_json(folder / _PROMPTS)).get("model_type") == "CrossEncoder":
        return "scores"
    modules = _json(folder / _MODULES)
    kinds = [str(m.get("type", "")) for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    return "vectors" if any(kind.endswith(".Pooling") for kind in kinds) else None


def layout_files(folder: Path) -> list[Path]:
    """Return the existing layout files of a folder."""
    return [file for name in LAYOUT_FILES for file in (folder / name, folder / name / "config.json") if file.is_file()]


def copy_layout(source: Path, target: Path) -> None:
    """Copy the existing layout files of a folder."""
    for file in layout_files(source):
        copied = target / file.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copied)


def parse_pooling(name: str) -> Pooling:
    """Return ``name`` as a pooling.

    Raises:
        UserError: if the pooling does not exist.
    """
    if name not in get_args(Pooling):
        raise UserError(f"unknown pooling '{name}'", hint=f"use one of {', '.join(get_args(Pooling))}")
    return name  # type: ignore[return-value]


def _write(file: Path, value: object) -> None:
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _object(value: Any) -> dict[str, Any]:
    """Return a JSON object, or an empty dictionary for other values."""
    return value if isinstance(value, dict) else {}


def _json(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"this is not JSON: {error}", location=str(file)) from error
