"""Write docs/settings.md, the reference of all settings, from the settings schema.

python tools/settings_page.py            # write the page
python tools/settings_page.py --check    # exit with status 1 if the page is outdated
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deltaw.settings import method_registry, task_registry
from deltaw.settings.aliases import SHORT
from deltaw.settings.config import RunConfig, Setting, settings
from deltaw.settings.schema import run_schema, value_types

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
INTRODUCTION = (
    "# Settings\n\nAll settings of a YAML settings file. Each setting is also a flag: `train.epochs: 3` in the file is "
    "`--train.epochs 3` on the command line. Flags override the file. `deltaw train --help-all` prints the same list, "
    "and an editor completes it with [the JSON schema](schema.md).\n\n"
    "A file with `stages` "
    "[trains several runs in order](goals/continue-training.md#train-several-stages-with-one-file).\n\n"
    "This page is generated from the schema by `tools/settings_page.py`. `null` means “not set”. `TEXT|LIST` accepts "
    "a text or a list.\n"
)
# The unit of a setting is the noun after "number of" in its description, or one of these words in its name.
UNIT = re.compile(r"number of ((?:\w+ )?\w+s)\b")
UNIT_NAMES = {"bytes": "bytes", "minutes": "minutes", "seconds": "seconds", "max_length": "tokens", "epochs": "epochs"}
UNIT_NAMES |= {"max_steps": "steps", "batch_size": "rows"}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def page() -> str:
    """Return the text of the page."""
    listed = list(settings())
    types, schema = value_types([setting.key for setting in listed]), run_schema()
    sections: dict[str, list[Setting]] = {}
    for setting in listed:
        sections.setdefault(setting.key.rpartition(".")[0], []).append(setting)
    lines = [INTRODUCTION]
    for name in ("", *(name for name in sections if name)):
        lines += [f"## {name or 'general'}", ""]
        if name:
            lines += [f"{purpose(name)}.", ""]
        lines += ["| setting | values | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(row(setting, types[setting.key], schema))} |" for setting in sections[name]]
        lines.append("")
    return "\n".join(lines)


def row(setting: Setting, kind: str, schema: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return the cells of a setting: names, values with bounds and unit, default and description."""
    name = f"`{setting.key}`"
    short = [f"`--{flag}`" for flag in SHORT.get(setting.key, ())]
    values = ", ".join([kind.replace("|", r"\|"), *bounds(setting.key, schema)])
    default = "required" if setting.default is ... else f"`{json_value(setting.default)}`"
    meaning = cell(setting.description)
    unit_text = unit(setting)
    values = f"{values} {unit_text}" if unit_text and not {"N", "NUMBER"}.isdisjoint(kind.split("|")) else values
    sentences = [f"{meaning[:1].upper()}{meaning[1:]}.", cell(setting.when)]
    return ", ".join([name, *short]), values, default, " ".join(filter(None, sentences))


def cell(text: str) -> str:
    """Return a text with the characters escaped that Markdown tables and HTML interpret."""
    return text.replace("|", r"\|").replace("<", "&lt;")


def unit(setting: Setting) -> str:
    """Return the unit of a number, or an empty text if it has none."""
    leaf = setting.key.rpartition(".")[2]
    named = next((word for name, word in UNIT_NAMES.items() if leaf.endswith(name)), "")
    found = UNIT.search(setting.description)
    return f"({named or (found[1] if found else '')})" if named or found else ""


def bounds(key: str, schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield the bounds of a number, for example ``≥ 1``."""
    node: Any = schema
    for name in key.split("."):
        node = next((kind["properties"][name] for kind in kinds(node) if name in kind.get("properties", {})), {})
    for kind in kinds(node):
        for word, sign in BOUNDS.items():
            if word in kind and abs(kind[word]) < 2**53:
                yield f"{sign} {kind[word]:g}"


def kinds(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a schema and its alternatives."""
    if isinstance(schema, Mapping):
        yield schema
        for alternative in schema.get("anyOf", ()):
            yield from kinds(alternative)


def json_value(value: object) -> str:
    """Return a default as it is written in YAML."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(json_value, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def purpose(section: str) -> str:
    """Return the purpose of a section, with the methods or tasks to which it applies."""
    description = str(RunConfig.model_fields[section].description).partition(";")[0].partition(", for task")[0]
    tasks = [f"`{entry.name}`" for entry in task_registry.entries() if entry.section_name == section]
    is_method = section in (entry.name for entry in method_registry.entries())
    applies = f" (method `{section}`)" if is_method else f" (task {', '.join(tasks)})" if tasks else ""
    return description[:1].upper() + description[1:] + applies


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv[1:]:
        sys.exit(PAGE.read_text(encoding="utf-8") != text and f"{PAGE} is outdated: run {sys.argv[0]}")
    PAGE.write_text(text, encoding="utf-8")
