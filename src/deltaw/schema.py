"""The JSON schema of a run's settings file, made from the one definition of the settings.

Editors complete and check a YAML file by it. It describes what a person writes: null for a default, `data:
rows.jsonl` for `data: {train: rows.jsonl}`, PEFT's names in the `lora` section. What only reading a file or a
model can tell, it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

from pydantic.json_schema import GenerateJsonSchema

from deltaw.lora.config import PEFT_NAMES
from deltaw.settings import RunConfig, load_plugins

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, object]
_NULL: Schema = {"type": "null"}


class _Plain(GenerateJsonSchema):
    """Without titles: a key is its own title."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False


def run_schema() -> Schema:
    """The schema of a settings file, with the methods and tasks that are registered now."""
    load_plugins()
    made = RunConfig.model_json_schema(schema_generator=_Plain, mode="validation")
    parts = {name: _section(part) for name, part in made.pop("$defs", {}).items()}
    required = made["required"]
    listed = made["properties"].items()
    properties = {name: _described(entry, parts, may_be_null=name not in required) for name, entry in listed}
    properties["data"] = _or_rows_alone(properties["data"])
    _add_pefts_names(properties["lora"])
    return {
        "$schema": DIALECT,
        "title": "Settings of a deltaw run",
        "description": "What `deltaw train`, `plan`, `compare` and `tune` read.",
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": properties,
    }


def schema_text() -> str:
    """The schema as the text of a file."""
    return json.dumps(run_schema(), indent=2, ensure_ascii=False) + "\n"


def values_of(key: str) -> list[str]:
    """The values that a setting can have besides numbers and free text, as they are written; for completing
    a command."""
    return _values(_kinds_at(key, run_schema()))


_TYPES = {"integer": "N", "number": "NUMBER", "string": "TEXT", "array": "LIST", "object": "MAP"}


def kinds_of(keys: Iterable[str]) -> dict[str, str]:
    """What each of these settings can be, for a person: its choices and types, such as ``auto|NUMBER``."""
    schema, found = run_schema(), {}
    for key in keys:
        kinds = _kinds_at(key, schema)
        free = [_TYPES[k["type"]] for k in kinds if k.get("type") in _TYPES and not {"enum", "const"} & k.keys()]
        found[key] = "|".join(dict.fromkeys([*_values(kinds), *free]))
    return found


def _kinds_at(key: str, place: object) -> list[Mapping]:
    for part in key.split("."):
        place = next((s["properties"][part] for s in _kinds(place) if part in s.get("properties", {})), {})
    return list(_kinds(place))


def _values(kinds: Iterable[Mapping]) -> list[str]:
    found: list[str] = []
    for kind in kinds:
        if kind.get("type") == "boolean":
            found += ["true", "false"]
        found += map(str, kind.get("enum", [kind["const"]] if "const" in kind else []))
    return list(dict.fromkeys(found))


def _kinds(schema: object) -> Iterator[Mapping]:
    """A schema, or each of those that it is any of."""
    if isinstance(schema, Mapping):
        yield schema
        for kind in schema.get("anyOf", ()):
            yield from _kinds(kind)


def _section(part: Schema) -> Schema:
    """A section's own schema. What its class is for, is said where it is used."""
    return {key: value for key, value in part.items() if key not in ("title", "description")}


def _described(entry: Schema, parts: Mapping[str, Schema], *, may_be_null: bool) -> Schema:
    """A key's schema, a section in place of the reference to it; null stands for the default."""
    own = dict(entry)
    if "anyOf" in own:  # a setting that is declared with kinds of its own has no other type
        own = {key: value for key, value in own.items() if key not in ("type", "items")}
    reference = own.pop("$ref", None)
    if reference is not None:
        section = parts[str(reference).rpartition("/")[2]]
        leaves = section["properties"]
        required = section.get("required", [])
        assert isinstance(leaves, dict) and isinstance(required, list)
        own |= section
        own["properties"] = {name: _described(leaf, parts, may_be_null=False) for name, leaf in leaves.items()}
        if may_be_null:
            own["type"] = ["object", "null"]
        return own
    items = own.get("items")
    if isinstance(items, dict) and "$ref" in items:  # sections in a list, each of which may be its name alone
        own["items"] = {"anyOf": [{"type": "string"}, _described(items, parts, may_be_null=False)]}
    return _nullable(own) if may_be_null else own


def _nullable(entry: Schema) -> Schema:
    """The same schema, or null."""
    if any(kind.get("type") == "null" for kind in _kinds(entry)):
        return entry
    if "anyOf" in entry:
        kinds = entry["anyOf"]
        assert isinstance(kinds, list)
        return {**entry, "anyOf": [*kinds, _NULL]}
    about: Schema = {key: entry.pop(key) for key in ("description", "default") if key in entry}
    return {"anyOf": [entry, _NULL], **about}


def _or_rows_alone(section: Schema) -> Schema:
    """The data section, or what ``data.train`` may be in its place."""
    leaves = section["properties"]
    assert isinstance(leaves, dict)
    about: Schema = {key: section.pop(key) for key in ("description", "default") if key in section}
    alone = {key: value for key, value in leaves["train"].items() if key != "description"}
    return {"anyOf": [*alone.get("anyOf", [alone]), section], **about}


def _add_pefts_names(section: Schema) -> None:
    """LoRA's settings under PEFT's names too, and null for each."""
    leaves = section["properties"]
    assert isinstance(leaves, dict)
    for name, leaf in leaves.items():
        leaves[name] = _nullable(dict(leaf))
    for theirs, ours in PEFT_NAMES.items():
        leaf = {"anyOf": [leaves[ours], {"type": "boolean"}]} if ours == "init" else leaves[ours]
        leaves[theirs] = {**leaf, "description": f"PEFT's name of {ours}"}
