"""Documentation pages: commands are valid, pages that show how to do something run from start to finish, and generated
parts are current.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from deltaw.cli import COMMANDS, EXAMPLES, group
from deltaw.cli.options import nested_settings
from deltaw.cli.suggestions import RunArgument, SettingsFile
from deltaw.settings.aliases import alias_hint
from deltaw.settings.config import RunConfig, settings

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import pages  # noqa: E402
import settings_page  # noqa: E402

DOCS = sorted((ROOT / "docs").rglob("*.md"))
HAS_COMMANDS = re.compile(r"(?s)```(?:bash|sh)\n(?:[^`]*\n)?deltaw ")
PROSE = [ROOT / "README.md", ROOT / "skills" / "deltaw" / "SKILL.md", *DOCS]
CHECKED = [page for page in PROSE if HAS_COMMANDS.search(page.read_text(encoding="utf-8"))]
# Patterns in the output of a successful page.
EXPECTED_OUTPUT = {"teach-a-format": [r'\{"film": "heat", "verdict": "(fresh|rotten)"\}', r"exact match"]}
EXPECTED_OUTPUT |= {"classify-a-csv": [r"accuracy", r"fresh"], "teach-a-style": [r"drift: general answers"]}
EXPECTED_OUTPUT |= {"little-memory": [r"GB at the peak, .*GB planned", r"little-gguf"]}
EXPECTED_OUTPUT |= {"many-customers": [r'\{\\"film\\": \\"heat\\"', r"(FRESH|ROTTEN): heat", r"<review film='heat'"]}
EXPECTED_OUTPUT |= {"compare-honestly": [r"held-out rows", r"lora"]}
STRUCTURED = [page for page in pages.PAGES if page.stem in EXPECTED_OUTPUT]


@pytest.fixture(scope="session")
def hub_environment() -> Iterator[dict[str, str]]:
    with pages.hub() as environment:
        yield environment


def commands_of(page: Path) -> list[list[str]]:
    """Return the words of each deltaw command of a page, up to a pipe, redirection or comment."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ").replace("$MODEL", pages.PACKAGE)
    lines = [line for line in text.splitlines() if re.match(r"deltaw\s", line)]
    words = [shlex.split(line, comments=True)[1:] for line in lines]
    return [line[: next((n for n, word in enumerate(line) if word in ("|", "<", ">")), None)] for line in words]


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.stem)
def test_page_commands_and_values_are_valid(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (RunArgument, SettingsFile):  # files from earlier commands of the page do not exist
        monkeypatch.setattr(kind, "convert", lambda self, value, param, ctx: value)
    commands = commands_of(page)
    assert commands
    for words in commands:
        verb = group
        context = click.Context(group)
        while isinstance(verb, click.Group):
            command = verb.get_command(context, words[0])
            assert command is not None, words
            verb = command
            words = words[1:]
        parameters = verb.make_context(verb.name, list(words)).params
        required = {"model": "model", "data": "rows.jsonl"}
        given = {k: v for k, v in parameters.items() if v is None or isinstance(v, str)}
        RunConfig.read({**required, **nested_settings(given)})


def test_skill_has_a_description_and_uses_valid_names() -> None:
    text = (ROOT / "skills" / "deltaw" / "SKILL.md").read_text(encoding="utf-8")
    head = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert head["name"] == "deltaw" and 100 < len(head["description"]) <= 1024
    valid = {setting.key for setting in settings()}
    assert set(re.findall(r"`((?:data|train|lora)\.\w+)", text)) <= valid
    inline = [shlex.split(words)[1:] for words in re.findall(r"`(deltaw \w[^`]*)`", text)]
    assert inline
    for words in inline:
        verb = group.get_command(click.Context(group), words[0])
        assert verb is not None, words
        flags = {option for parameter in verb.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= flags, words


def test_structured_goals_start_with_rows_and_have_a_check() -> None:
    assert len(STRUCTURED) == len(EXPECTED_OUTPUT)
    for page in STRUCTURED:
        text = page.read_text(encoding="utf-8")
        heads = re.findall(r"(?m)^## (.*)", text)
        assert "rows" in heads[0], page
        assert any(head.startswith("Check ") for head in heads) and heads[-1] == "What goes wrong", page
        assert "python examples/rows.py " in pages.script_of(text)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.stem)
def test_page_runs_and_shows_its_output(page: Path, tmp_path: Path, hub_environment: dict[str, str]) -> None:
    outputs = pages.run(page, tmp_path, hub_environment)
    text = page.read_text(encoding="utf-8")
    assert pages.comparable(text) == pages.comparable(pages.with_output(text, outputs)), "run tools/pages.py"
    for pattern in EXPECTED_OUTPUT.get(page.stem, ()):
        assert re.search(pattern, "\n".join(outputs)), f"{pattern} is not in\n{outputs}"
    _check_scores(page.stem, tmp_path / "runs")


def _check_scores(goal: str, runs: Path) -> None:
    """Check that the page's adapter reached the documented score."""

    def result(name: str) -> dict:
        return json.loads((runs / name / "run.json").read_text(encoding="utf-8"))["result"]

    if goal == "teach-a-format":
        assert result("format")["score"]["value"] > 0.5
    if goal == "classify-a-csv":
        assert result("reviews")["score"]["interval"][0] > 0.63  # the most frequent class
    if goal == "teach-a-style":
        assert result("style")["drift"]["loss"] < result("style-alone")["drift"]["loss"]


def test_settings_page_is_current() -> None:
    page = settings_page.page()
    assert settings_page.PAGE.read_text(encoding="utf-8") == page, "run tools/settings_page.py"
    assert all(f"| `{setting.key}`" in page for setting in settings())


def test_output_of_blocks_is_selected_and_replaced() -> None:
    page = "```bash\necho a\n```\n<!-- output: loss -->\n```text\nold\n```\nText\n```bash\ntrue\n```\n"
    filled = pages.with_output(page, ["step\nloss 0.25 \n", "loss 3\n"])
    assert filled == page.replace("old\n", "loss 0.25\n")
    assert pages.comparable(filled) == ["loss #"]


def test_tutorial_shows_the_recording() -> None:
    text = pages.TUTORIAL.read_text(encoding="utf-8")
    assert text == pages.with_recording(text), "run tools/pages.py --recorded"
    assert text.count("```console\n$ ") > 8


@pytest.mark.parametrize("path", EXAMPLES)
def test_help_shows_a_valid_example(path: str) -> None:
    command = group
    context = click.Context(group)
    for word in path.split():
        command = command.get_command(context, word)
    lines = {line.strip() for line in command.get_help(click.Context(command)).splitlines()}
    assert {line.strip() for line in EXAMPLES[path].splitlines()} <= lines
    assert EXAMPLES[path].startswith(f"deltaw {path}")
    words = shlex.split(EXAMPLES[path])[1 + len(path.split()) :]
    while isinstance(command, click.Group):
        command = command.get_command(context, words[0])
        words = words[1:]
    flags = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= flags


def test_every_command_has_an_example() -> None:
    assert {path.split()[0] for path in EXAMPLES} == COMMANDS.keys()


def test_names_in_other_tools_are_recognized() -> None:
    """Each name in the table of docs/goals/coming-from.md leads to the setting of its row in an error message."""
    page = (ROOT / "docs" / "goals" / "coming-from.md").read_text(encoding="utf-8")
    spellings = {setting.key: setting.key for setting in settings()}
    known = {alias for method in settings_page.method_registry.entries() for alias in method.aliases}
    checked = 0
    for row in re.findall(r"(?m)^\| `([\w.]+)`[^|]* \|(.*)$", page):
        for name in re.findall(r"`(\w+)`", row[1]):
            checked += 1
            assert name in known or name == row[0].rpartition(".")[2] or row[0] in str(alias_hint(name, spellings)), (
                row[0],
                name,
            )
    assert checked > 50
