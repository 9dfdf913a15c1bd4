"""JSON schema of the settings file, generated from the settings classes.

Editors use it to complete and validate YAML files. It accepts the same shorthands as the loader: null for a default,
`data: rows.jsonl` for `data: {train: rows.jsonl}`, and PEFT's names in the `lora` section. It does not cover checks
that need a file or a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

from pydantic.json_schema import GenerateJsonSchema

from deltaw.settings import method_registry
from deltaw.settings.config import STAGES, RunConfig, load_plugins
from deltaw.settings.stages import NAME, VALID_NAME

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, object]
_NULL: Schema = {"type": "null"}


class _Plain(GenerateJsonSchema):
    """Schema generator without titles, which would repeat the keys."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False


def run_schema() -> Schema:
    """Return the schema of a settings file for all registered methods and tasks."""
    load_plugins()
    schema = RunConfig.model_json_schema(schema_generator=_Plain, mode="validation")
    sections = {name: _section(section) for name, section in schema.pop("$defs", {}).items()}
    required = schema["required"]
    items = schema["properties"].items()
    properties = {name: _described(entry, sections, may_be_null=name not in required) for name, entry in items}
    properties["data"] = _data_or_rows(properties["data"])
    for method in method_registry.entries():
        if method.aliases:
            _add_aliases(properties[method.name], method.aliases)
    return {
        "$schema": DIALECT,
        "title": "Settings of a deltaw run",
        "description": "Settings file of `deltaw train`, `plan`, `compare` and `tune`.",
        "type": "object",
        "additionalProperties": False,
        "anyOf": [{"required": required}, {"required": [STAGES]}],
        "properties": {**properties, STAGES: _stages(properties)},
    }


def _stages(properties: Mapping[str, object]) -> Schema:
    """Return the schema of the stages of a chain."""
    name: Schema = {"type": "string", "pattern": f"^{VALID_NAME}$", "description": "name of the stage and its folder"}
    own = {NAME: name, **{key: {"$ref": f"#/properties/{key}"} for key in properties if key != "output"}}
    stage: Schema = {"type": "object", "additionalProperties": False, "required": [NAME], "properties": own}
    description = "runs that are trained one after the other; `deltaw train` and `plan` only"
    return {"type": "array", "minItems": 1, "items": stage, "description": description}


def schema_text() -> str:
    """Return the schema as formatted JSON."""
    return json.dumps(run_schema(), indent=2, ensure_ascii=False) + "\n"


def allowed_values(key: str) -> list[str]:
    """Return the literal values of a setting, as they are written, for shell completion."""
    return _values(_kinds_at(key, run_schema()))


_TYPES = {"integer": "N", "number": "NUMBER", "string": "TEXT", "array": "LIST", "object": "MAP"}


def value_types(keys: Iterable[str]) -> dict[str, str]:
    """Return the choices and types of each setting for display, for example ``auto|NUMBER``."""
    schema = run_schema()
    types = {}
    for key in keys:
        schemas = _kinds_at(key, schema)
        names = [_TYPES[k["type"]] for k in schemas if k.get("type") in _TYPES and not {"enum", "const"} & k.keys()]
        types[key] = "|".join(dict.fromkeys([*_values(schemas), *names]))
    return types


def _kinds_at(key: str, node: object) -> list[Mapping]:
    for name in key.split("."):
        node = next((s["properties"][name] for s in _kinds(node) if name in s.get("properties", {})), {})
    return list(_kinds(node))


def _values(schemas: Iterable[Mapping]) -> list[str]:
    values: list[str] = []
    for schema in schemas:
        if schema.get("type") == "boolean":
            values += ["true", "false"]
        values += map(str, schema.get("enum", [schema["const"]] if "const" in schema else []))
    return list(dict.fromkeys(values))


def _kinds(schema: object) -> Iterator[Mapping]:
    """Yield a schema, and recursively the alternatives of its ``anyOf``."""
    if isinstance(schema, Mapping):
        yield schema
        for kind in schema.get("anyOf", ()):
            yield from _kinds(kind)


def _section(section: Schema) -> Schema:
    """Return the schema of a section without its class docstring. The setting has a separate description."""
    return {key: value for key, value in section.items() if key not in ("title", "description")}


def _described(entry: Schema, sections: Mapping[str, Schema], *, may_be_null: bool) -> Schema:
    """Return the schema of a key, with section references inlined. If ``may_be_null``, null means the default."""
    schema = dict(entry)
    if "anyOf" in schema:  # explicit alternatives replace the inferred type
        schema = {key: value for key, value in schema.items() if key not in ("type", "items")}
    reference = schema.pop("$ref", None)
    if reference is not None:
        section = sections[str(reference).rpartition("/")[2]]
        properties = section["properties"]
        required = section.get("required", [])
        assert isinstance(properties, dict) and isinstance(required, list)
        schema |= section
        schema["properties"] = {key: _described(leaf, sections, may_be_null=False) for key, leaf in properties.items()}
        if may_be_null:
            schema["type"] = ["object", "null"]
        return schema
    items = schema.get("items")
    if isinstance(items, dict) and "$ref" in items:  # a list of sections, each of which can be abbreviated to its name
        schema["items"] = {"anyOf": [{"type": "string"}, _described(items, sections, may_be_null=False)]}
    return _nullable(schema) if may_be_null else schema


def _nullable(entry: Schema) -> Schema:
    """Return the schema with null as an additional alternative."""
    if any(kind.get("type") == "null" for kind in _kinds(entry)):
        return entry
    if "anyOf" in entry:
        alternatives = entry["anyOf"]
        assert isinstance(alternatives, list)
        return {**entry, "anyOf": [*alternatives, _NULL]}
    annotations: Schema = {key: entry.pop(key) for key in ("description", "default") if key in entry}
    return {"anyOf": [entry, _NULL], **annotations}


def _data_or_rows(section: Schema) -> Schema:
    """Return the schema of the data section, which can also be the value of ``data.train``."""
    properties = section["properties"]
    assert isinstance(properties, dict)
    annotations: Schema = {key: section.pop(key) for key in ("description", "default") if key in section}
    train = {key: value for key, value in properties["train"].items() if key != "description"}
    return {"anyOf": [*train.get("anyOf", [train]), section], **annotations}


def _add_aliases(section: Schema, aliases: Mapping[str, str]) -> None:
    """Add PEFT's names of a method's settings, and allow null for each setting."""
    properties = section["properties"]
    assert isinstance(properties, dict)
    for name, leaf in properties.items():
        properties[name] = _nullable(dict(leaf))
    for alias, setting in aliases.items():
        leaf = {"anyOf": [properties[setting], {"type": "boolean"}]} if setting == "init" else properties[setting]
        properties[alias] = {**leaf, "description": f"PEFT name of {setting}"}
