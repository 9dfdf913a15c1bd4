"""Methods and tasks of installed packages: found by entry points, in this process and in others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoConfig

from deltaw.errors import UserError
from deltaw.experiments.jobs import Child
from deltaw.methods.registry import MethodEntry
from deltaw.registry import Registry
from deltaw.training.session import usual_rate_of
from tests.methods.toy_method import Norms

ROOT = Path(__file__).parent.parent
# Classes by text, so that the command line needs no torch to describe them.
METHOD = """
from dataclasses import dataclass, field
from deltaw.methods.registry import MethodEntry
@dataclass(frozen=True)
class Section:
    above: int = field(default=0, metadata={"description": "the lowest block whose norms are trained"})
ENTRY = MethodEntry("norms", "tests.methods.toy_method:Norms", Section, "the norms of the blocks")
"""
TASK = """
from deltaw.tasks import TaskEntry
ENTRY = TaskEntry("toy-preference", "tests.training.toy_task:PreferenceTask", "AutoModelForCausalLM", "generate text")
"""


def install(folder: Path, code: str, group: str, line: str) -> None:
    """A package with one module and one entry point, as an installer leaves it."""
    (folder / "toy_plugin.py").write_text(code)
    info = folder / "toy_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{line}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path, here and in child processes."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    paths = [str(folder), str(ROOT / "src"), str(ROOT)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    yield folder
    sys.modules.pop("toy_plugin", None)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def methods_here() -> Registry[MethodEntry]:
    """A registry that has not looked for packages yet, as of a new process."""
    return Registry("method", MethodEntry, "deltaw.methods")


def test_a_registry_looks_for_packages_when_it_is_first_asked(site):
    install(site, METHOD, "deltaw.methods", "norms = toy_plugin:ENTRY")
    found = methods_here()
    seen = []
    found.listen(lambda: seen.append([entry.name for entry in found.registered()]))
    assert seen == [[]] and "toy_plugin" not in sys.modules
    assert found.names() == ("norms",) and seen == [[], ["norms"]]
    assert found.entry_of("norms") is found.entries()[0] and len(seen) == 2


def test_a_package_that_registers_its_entry_itself_is_no_second_one(site):
    code = METHOD + "import registry_of_test\nregistry_of_test.found.register(ENTRY)\n"
    install(site, code, "deltaw.methods", "norms = toy_plugin:ENTRY")
    (site / "registry_of_test.py").write_text("")
    import registry_of_test

    registry_of_test.found = found = methods_here()
    try:
        assert found.names() == ("norms",)
    finally:
        del sys.modules["registry_of_test"]


TWICE = "from deltaw.methods.registry import MethodEntry\nENTRY = MethodEntry('lora', 'x:Y')"
BROKEN = [
    ("raise OSError('no such library')", "toy_plugin", "OSError: no such library"),
    ("", "toy_plugin", "AttributeError"),
    ("", "no_such_module_of_mine", "ModuleNotFoundError"),
    ("ENTRY = 3", "toy_plugin", "it is a int, not a MethodEntry"),
    (TWICE, "toy_plugin", "there is a method 'lora' already"),
]


@pytest.mark.parametrize(("code", "module", "says"), BROKEN)
def test_a_package_that_does_not_work_is_named_each_time(site, code, module, says):
    line = f"bad = {module}:ENTRY"
    install(site, code, "deltaw.methods", line)
    found = methods_here()
    found.register(MethodEntry("lora", "deltaw.methods.lora:LoRA"))
    for ask in (found.entries, found.names, lambda: found.entry_of("lora")):
        with pytest.raises(UserError, match="method 'bad' of package 'toy-plugin' cannot be loaded") as told:
            ask()
        assert says in told.value.what and line in str(told.value.where)
    assert [entry.name for entry in found.registered()] == ["lora"]


def test_the_command_line_says_which_package_is_broken(site):
    install(site, "raise OSError('no such library')", "deltaw.tasks", "bad = toy_plugin:ENTRY")
    done = python("-m", "deltaw", "train", "--help")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the task 'bad' of package 'toy-plugin'" in done.stderr
    assert python("-m", "deltaw", "--help").returncode == 0


def test_flags_and_workers_know_the_method_of_a_package(site, settings, tmp_path):
    install(site, METHOD, "deltaw.methods", "norms = toy_plugin:ENTRY")
    done = python("-m", "deltaw", "train", "--help-all")
    assert done.returncode == 0 and "--norms.above" in done.stdout
    config = settings(tmp_path / "run", method="norms", norms={"above": 1})
    with Child(tmp_path / "log.txt") as child:
        answer = child.ask("usual", config=config)
    expected = usual_rate_of(Norms(), AutoConfig.from_pretrained(config["model"])).value
    assert answer["usual_rate"] == pytest.approx(expected)


def test_a_task_of_a_package_can_be_chosen_and_importing_the_settings_looks_for_no_package(site):
    install(site, TASK, "deltaw.tasks", "toy-preference = toy_plugin:ENTRY")
    code = """
import importlib.metadata as metadata
from unittest.mock import patch
with patch.object(metadata, "entry_points", wraps=metadata.entry_points) as looked:
    import deltaw.settings, deltaw.tasks
print([asked for asked in looked.mock_calls if "deltaw" in str(asked)])
config = deltaw.settings.RunConfig.read({"model": "m", "data": "d", "task": "toy-preference"})
print(config.task, deltaw.tasks.names()[-1])
"""
    done = python("-c", code)
    assert done.stdout.split() == ["[]", "toy-preference", "toy-preference"], done.stderr
