"""Every text setting is either marked as a name of a file or listed as plain text, and all marked ones are visited."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from deltaw.export.hub_card import PublicBase, local_paths, public_settings
from deltaw.settings.config import RunConfig, load_plugins
from deltaw.settings.local_names import _fields, _sections, replace_names

SECRET = "/outside/private place/file"
# Settings whose text is not a local file name.
TEXTS = {"task", "method", "data.date", "data.system", "data.columns", "data.group", "data.classes", "train.time"}
TEXTS |= {"memory", "device", "distill.prompt.text", "embedding.query_prompt", "embedding.passage_prompt"}
TEXTS |= {f"reranking.{name}" for name in ("template", "yes", "no")}
TEXTS |= {f"reward.functions.{name}" for name in ("column", "pattern", "tests", "template", "key_from", "dataset")}
# Names of modules, tokens and initializations.
TEXTS |= {f"lora.{name}" for name in ("target_modules", "exclude_modules", "layers", "init", "bias", "active")}
TEXTS |= {f"lora.{name}" for name in ("target_parameters", "train_modules", "invocation_tokens")}
TEXTS |= {f"lora.{name}" for name in ("rank_pattern", "alpha_pattern", "trainable_token_indices")}
TEXTS |= {"head.modules", "input.modules", "input.tokens", "prompt.text"}


def accepts(annotation: Any, kind: type) -> bool:
    return annotation is kind or any(accepts(part, kind) for part in get_args(annotation))


def filled(section: type) -> dict[str, Any]:
    """Return dumped settings with the same path in all text settings."""
    values: dict[str, Any] = {}
    for name, annotation in _fields(section).items():
        inner = [kind for part in _parts(annotation) for kind in _sections(part)]
        if inner:
            value: Any = filled(inner[0])
            values[name] = [value] if accepts_list(annotation) else value
        elif accepts(annotation, str):
            values[name] = SECRET
    return values


def _parts(annotation: Any) -> list[Any]:
    return [annotation, *(inner for part in get_args(annotation) for inner in _parts(part))]


def accepts_list(annotation: Any) -> bool:
    return any(getattr(part, "__origin__", None) is list for part in _parts(annotation))


def keys_with(value: Any, key: str = "") -> set[str]:
    """Return the keys of all texts that are still the path."""
    if isinstance(value, dict):
        entries = ((f"{key}.{name}".lstrip("."), part) for name, part in value.items())
        return {nested_key for name, part in entries for nested_key in keys_with(part, name)}
    if isinstance(value, list):
        return {nested_key for part in value for nested_key in keys_with(part, key)}
    return {key} if value == SECRET else set()


def test_every_text_setting_is_a_name_or_plain_text():
    load_plugins()
    remaining = keys_with(replace_names(filled(RunConfig), RunConfig, lambda text, kind, key: "changed"))
    assert remaining <= TEXTS, "mark them as LocalPath, Reference or CodeName, or list them among TEXTS"
    names = {"model", "output", "data.train", "reward.functions.schema_", "distill.prompt.file"}
    assert names <= keys_with(filled(RunConfig))


def test_names_in_lists_and_sections_are_replaced():
    data = {"train": ["a", {"from": "b", "columns": {"prompt": "c"}}], "eval": {"held": 5, "more": "d"}}
    visited: list[tuple[str, str, str]] = []
    replace_names({"data": data}, RunConfig, lambda text, kind, key: visited.append((text, kind, key)) or text)
    assert [text for text, _, _ in visited] == ["a", "b", "d"]
    assert {key for _, _, key in visited} == {"data.train", "data.eval"}


@pytest.mark.parametrize("path", ["/home/me/x", "~/x", "../x", r"C:\Users\me\x"])
def test_published_settings_contain_only_the_last_path_component(path):
    functions = [f"{path}.py:polite", {"name": "model", "model": path}, {"name": "json-schema", "schema": path}]
    reward = {"functions": [*functions, "exact"], "environment": f"{path}.py:World"}
    common = {"model": path, "data": {"train": [path, {"from": path, "weight": 2}], "eval": {"a": path}}}
    common |= {"output": path}
    distill = {"prompt": {"file": path}, "teachers": [{"model": path, "adapter": path}]}
    for changes in ({"task": "rl", "reward": reward}, {"task": "distill", "distill": distill}):
        config = RunConfig.read({**common, **changes})
        public = public_settings(config, PublicBase("me/base"))
        assert path not in local_paths(public) and path in local_paths(config)
        text = str(public.model_dump(mode="json"))
        assert path not in text and "Users" not in text and "/home" not in text
    section = RunConfig.read({**common, "task": "rl", "reward": reward})
    names = [function.name for function in public_settings(section, PublicBase("me/base")).reward.functions]
    assert names == ["x.py:polite", "model", "json-schema", "exact"]


def test_sections_are_models_or_dataclasses():
    assert all(issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind) for kind in _sections(RunConfig))


def test_evaluation_set_named_from_does_not_hide_references():
    visited = []
    values = {"data": {"train": ["a.jsonl", {"from": "b.jsonl", "weight": 2}], "eval": {"from": "c", "b": "d"}}}
    changed = replace_names(values, RunConfig, lambda text, kind, key: visited.append(text) or f"/x/{text}")
    assert sorted(visited) == ["a.jsonl", "b.jsonl", "c", "d"]
    assert changed["data"]["train"] == ["/x/a.jsonl", {"from": "/x/b.jsonl", "weight": 2}]
    assert changed["data"]["eval"] == {"from": "/x/c", "b": "/x/d"}
