"""The files by which sentence-transformers knows how a model embeds a text, or scores two: pooling, prompts, head.

Beside a model's own files lie ``modules.json``, a folder for each module, and ``config_sentence_transformers.json``.
Both its older and its newer names are read; the older ones are written, which all its versions load. Knows no models.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from deltaw.durable import write_text
from deltaw.errors import UserError

Pooling = Literal["mean", "first", "last", "weighted"]
_THEIRS: dict[Pooling, str] = {"mean": "mean", "first": "cls", "last": "lasttoken", "weighted": "weightedmean"}
_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_MODULES, _PROMPTS, _LIMIT = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
_POOLING, _NORMALIZE = "1_Pooling", "2_Normalize"
# What a merged model takes over from the run's folder, files and folders.
BESIDE = (_MODULES, _PROMPTS, _LIMIT, _POOLING, _NORMALIZE)


@dataclass(frozen=True)
class SentenceLayout:
    """How a model embeds a text.

    Attributes:
        pooling: None where the folder does not say. normalize: whether vectors are scaled to length 1.
        query_prompt, passage_prompt: what texts begin with. max_length: tokens that longer texts are cut to.
    """

    pooling: Pooling | None
    normalize: bool
    query_prompt: str = ""
    passage_prompt: str = ""
    max_length: int | None = None


def read_layout(folder: Path) -> SentenceLayout | None:
    """What a model's folder says; None where it has no ``modules.json``.

    Raises:
        UserError: a file is no JSON, or says something that is not possible here.
    """
    modules = _json(folder / _MODULES)
    if modules is None:
        return None
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise UserError("this is not a list of modules", where=str(folder / _MODULES))
    kinds = [(str(m.get("type", "")).rpartition(".")[2], str(m.get("path", ""))) for m in modules]
    others = [kind for kind, _ in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if others:
        what = f"the model's vectors go through a layer '{others[0]}', which is not supported"
        raise UserError(what, where=str(folder / _MODULES))
    path = next((path for kind, path in kinds if kind == "Pooling"), None)
    prompts = _object(_object(_json(folder / _PROMPTS)).get("prompts"))
    query, passage = str(prompts.get("query") or ""), ""
    for name in ("corpus", "passage", "document"):
        passage = str(prompts.get(name) or passage)
    pooling = None if path is None else _pooling(folder, path, prompted=bool(query or passage))
    limit = _object(_json(folder / _LIMIT)).get("max_seq_length")
    most = limit if isinstance(limit, int) and limit > 0 else None
    return SentenceLayout(pooling, any(kind == "Normalize" for kind, _ in kinds), query, passage, most)


def _pooling(folder: Path, path: str, *, prompted: bool) -> Pooling:
    # The path comes from the folder's file, and must not lead out of it.
    place = (folder / path / "config.json").resolve()
    settings = _object(_json(place) if place.is_relative_to(folder.resolve()) else None)
    on = [key.removeprefix("pooling_mode_") for key, value in settings.items() if value is True]
    modes = [mode.removesuffix("_tokens").removesuffix("_token") for mode in on if mode in _MODES]
    modes = [str(settings["pooling_mode"])] if "pooling_mode" in settings else modes
    known = [ours for ours, theirs in _THEIRS.items() if [theirs] == modes]
    if not known:
        raise UserError(
            f"the model's pooling is not supported: {', '.join(modes) or 'none is named'}", where=str(place)
        )
    if prompted and settings.get("include_prompt") is False:
        raise UserError("the model leaves its prompt out of the pooling, which is not supported", where=str(place))
    return known[0]


def write_layout(folder: Path, layout: SentenceLayout, width: int) -> None:
    """Write the files, each complete or not at all.

    Args:
        width: of the vectors.
    """
    pooling = _THEIRS[layout.pooling or "mean"]
    on = {f"pooling_mode_{mode}": mode.removesuffix("_tokens").removesuffix("_token") == pooling for mode in _MODES}
    kinds = [("Transformer", ""), ("Pooling", _POOLING), *([("Normalize", _NORMALIZE)] if layout.normalize else [])]
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(kinds)
    ]
    prompts = {"query": layout.query_prompt, "document": layout.passage_prompt}
    _write(folder / _POOLING / "config.json", {"word_embedding_dimension": width, **on, "include_prompt": True})
    if layout.normalize:
        _write(folder / _NORMALIZE / "config.json", {})
    _write(folder / _LIMIT, {"max_seq_length": layout.max_length, "do_lower_case": False})
    _write(folder / _PROMPTS, {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"})
    _write(folder / _MODULES, modules)


def write_cross_encoder(folder: Path, max_length: int | None, *, in_prompt: bool, pad_id: int | None) -> None:
    """Write the files by which a reranker is known, a classifier with one output, each complete or not at all.

    Args:
        max_length: tokens that longer texts are cut to; None: as many as the model takes.
        in_prompt: whether the tokenizer's chat template writes query and passage. pad_id: as in the batches.
    """
    kind = {"method": "forward", "method_output_name": "logits"}
    ways = {"message": {**kind, "format": "flat"}, "text": kind} if in_prompt else {"text": kind}
    settings: dict[str, Any] = {"transformer_task": "sequence-classification", "modality_config": ways}
    settings |= {"module_output_name": "scores", "max_seq_length": max_length}
    settings["config_kwargs"] = {"num_labels": 1, **({} if pad_id is None else {"pad_token_id": pad_id})}
    _write(folder / _LIMIT, settings)
    of_model = {"model_type": "CrossEncoder", "prompts": {}, "activation_fn": "torch.nn.modules.activation.Sigmoid"}
    _write(folder / _PROMPTS, {**of_model, "default_prompt_name": None})
    _write(folder / _MODULES, [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}])


def told_use(folder: Path) -> Literal["vectors", "scores"] | None:
    """What a model's folder says that it is for: vectors of texts, or scores of passages; None where it says neither.

    Raises:
        UserError: a file is no JSON.
    """
    if _object(_json(folder / _PROMPTS)).get("model_type") == "CrossEncoder":
        return "scores"
    modules = _json(folder / _MODULES)
    kinds = [str(m.get("type", "")) for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    return "vectors" if any(kind.endswith(".Pooling") for kind in kinds) else None


def layout_files(folder: Path) -> list[Path]:
    """The files of a layout that a folder has."""
    return [file for name in BESIDE for file in (folder / name, folder / name / "config.json") if file.is_file()]


def copy_layout(source: Path, target: Path) -> None:
    """Copy the files of a layout that a folder has."""
    for file in layout_files(source):
        copied = target / file.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copied)


def pooling_named(name: str) -> Pooling:
    """The pooling of this name.

    Raises:
        UserError: there is none.
    """
    if name not in get_args(Pooling):
        raise UserError(f"there is no pooling '{name}'", hint=f"use one of {', '.join(get_args(Pooling))}")
    return name  # type: ignore[return-value]


def _write(file: Path, value: object) -> None:
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _object(value: Any) -> dict[str, Any]:
    """A JSON object; empty where it is something else."""
    return value if isinstance(value, dict) else {}


def _json(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"this is not JSON: {error}", where=str(file)) from error
