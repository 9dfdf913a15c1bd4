"""Methods and tasks of installed packages are discovered by entry points, in this process and in others."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoConfig

from deltaw.cli import crash_report
from deltaw.errors import UserError
from deltaw.experiments.jobs import WorkerProcess
from deltaw.runs.folder import settings_text
from deltaw.settings import method_registry, task_registry
from deltaw.settings.config import RunConfig
from deltaw.settings.method_registry import MethodEntry
from deltaw.settings.registry import BrokenPackageWarning, Registry, import_object
from deltaw.settings.task_registry import TaskEntry
from deltaw.training.session import default_rate_of
from tests.methods.toy_method import Norms, NormsSettings

ROOT = Path(__file__).parent.parent
# Classes are named by strings, so that the command line can describe them without torch.
METHOD = """
from dataclasses import dataclass, field
from deltaw.settings.method_registry import MethodEntry
@dataclass(frozen=True)
class Section:
    above: int = field(default=0, metadata={"description": "the lowest block whose norms are trained"})
ENTRY = MethodEntry("norms", "tests.methods.toy_method:Norms", Section, "the norms of the blocks")
"""
TASK = """
from deltaw.settings.task_registry import TaskEntry
ENTRY = TaskEntry("toy-preference", "tests.training.toy_task:PreferenceTask", "AutoModelForCausalLM", "generate text")
"""


def install(folder: Path, code: str, group: str, line: str) -> None:
    """Create an installed package with one module and one entry point."""
    (folder / "toy_plugin.py").write_text(code)
    info = folder / "toy_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{line}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path of this process and of child processes."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    paths = [str(folder), str(ROOT / "src"), str(ROOT)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    yield folder
    sys.modules.pop("toy_plugin", None)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def new_registry() -> Registry[MethodEntry]:
    """Return a registry that has not looked for packages yet, as in a new process."""
    return Registry("method", MethodEntry, "deltaw.methods")


def test_registry_discovers_packages_on_first_use(site):
    install(site, METHOD, "deltaw.methods", "norms = toy_plugin:ENTRY")
    registry = new_registry()
    notifications = []
    registry.listen(lambda: notifications.append([entry.name for entry in registry.registered()]))
    assert notifications == [[]] and "toy_plugin" not in sys.modules
    assert registry.names() == ("norms",) and notifications == [[], ["norms"]]
    assert registry.entry_of("norms") is registry.entries()[0] and len(notifications) == 2


def test_package_that_registers_itself_is_not_duplicated(site):
    code = METHOD + "import registry_of_test\nregistry_of_test.registry.register(ENTRY)\n"
    install(site, code, "deltaw.methods", "norms = toy_plugin:ENTRY")
    (site / "registry_of_test.py").write_text("")
    import registry_of_test

    registry_of_test.registry = registry = new_registry()
    try:
        assert registry.names() == ("norms",)
    finally:
        del sys.modules["registry_of_test"]


SECTION = """
from dataclasses import dataclass
from typing import Any
from deltaw.settings.method_registry import MethodEntry
@dataclass(frozen=True)
class Section:
    value: {field}
ENTRY = MethodEntry("bad", "x:Y", Section)
"""
# Fields of a section without valid defaults.
FIELDS = ("int", "'Missing' = None", "Any = object()")
TWICE = "from deltaw.settings.method_registry import MethodEntry\nENTRY = MethodEntry('lora', 'x:Y')"
BROKEN = [
    ("raise OSError('no such library')", "toy_plugin", "OSError: no such library"),
    ("", "toy_plugin", "AttributeError"),
    ("", "no_such_module_of_mine", "ModuleNotFoundError"),
    ("ENTRY = 3", "toy_plugin", "it is a int, not a MethodEntry"),
    (TWICE, "toy_plugin", "the method 'lora' is already registered"),
]


@pytest.mark.parametrize(("code", "module", "message"), BROKEN)
def test_broken_package_is_reported_and_affects_only_its_entry(site, code, module, message):
    line = f"bad = {module}:ENTRY"
    install(site, code, "deltaw.methods", line)
    registry = new_registry()
    registry.register(MethodEntry("lora", "deltaw.methods.lora:LoRA"))
    with pytest.warns(BrokenPackageWarning, match="method 'bad' of package 'toy-plugin' cannot be loaded"):
        assert registry.names() == ("lora",)
    assert registry.entry_of("lora").name == "lora" and registry.broken("lora") is None
    for _ in range(2):
        with pytest.raises(UserError, match="method 'bad' of package 'toy-plugin' cannot be loaded") as error:
            registry.entry_of("bad")
        assert message in error.value.message and line in str(error.value.location)


def test_cli_warns_of_the_broken_package_and_works_without_it(site, tmp_path):
    install(site, "raise OSError('no such library')", "deltaw.tasks", "bad = toy_plugin:ENTRY")
    result = python("-m", "deltaw", "train", "--help")
    assert result.returncode == 0 and "the task 'bad' of package 'toy-plugin'" in result.stderr
    settings = tmp_path / "train.yaml"
    settings.write_text("model: m\ndata: d.jsonl\ntask: bad\n")
    result = python("-m", "deltaw", "train", str(settings))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: the task 'bad' of package 'toy-plugin' cannot be loaded" in " ".join(result.stderr.split())
    assert python("-m", "deltaw", "--help").returncode == 0


def test_flags_and_workers_support_the_method_of_a_package(site, settings, tmp_path):
    install(site, METHOD, "deltaw.methods", "norms = toy_plugin:ENTRY")
    result = python("-m", "deltaw", "train", "--help-all")
    assert result.returncode == 0 and "--norms.above" in result.stdout
    config = settings(tmp_path / "run", method="norms", norms={"above": 1})
    with WorkerProcess(tmp_path / "log.txt") as child:
        answer = child.ask("usual", config=config)
    expected = default_rate_of(Norms(), AutoConfig.from_pretrained(config["model"])).value
    assert answer["usual_rate"] == pytest.approx(expected)


def test_package_task_is_selectable_and_settings_import_is_lazy(site):
    install(site, TASK, "deltaw.tasks", "toy-preference = toy_plugin:ENTRY")
    code = """
import importlib.metadata as metadata
from unittest.mock import patch
with patch.object(metadata, "entry_points", wraps=metadata.entry_points) as lookup:
    import deltaw.settings.config, deltaw.settings.task_registry
print([call for call in lookup.mock_calls if "deltaw" in str(call)])
config = deltaw.settings.config.RunConfig.read({"model": "m", "data": "d", "task": "toy-preference"})
print(config.task, deltaw.settings.task_registry.names()[-1])
"""
    result = python("-c", code)
    assert result.stdout.split() == ["[]", "toy-preference", "toy-preference"], result.stderr


def test_settings_of_an_unused_package_are_not_saved(settings, tmp_path):
    config = RunConfig.read(settings(tmp_path / "run"))
    entry = MethodEntry("norms", Norms, NormsSettings)
    method_registry.load_plugins()
    method_registry.register(entry)
    try:
        assert not method_registry.is_built_in("norms") and method_registry.is_built_in("lora")
        unused = RunConfig.read(config.model_dump(mode="json"))
        used = RunConfig.read({**config.model_dump(mode="json"), "method": "norms"})
        assert "\nnorms:" not in settings_text(unused, {})
        assert "\nnorms:" in settings_text(used, {})
        assert "\nlora:" in settings_text(unused, {})
    finally:
        method_registry.unregister("norms")


def test_section_that_a_used_and_an_unused_entry_share_is_saved(settings, tmp_path):
    sections = {entry.name: entry for entry in task_registry.entries() if entry.settings is not None}
    rewarded = sections["rl"]
    own = dataclasses.replace(rewarded, name="my-rewards", section=rewarded.section_name, aliases={})
    task_registry.register(own)
    try:
        for task in ("rl", "my-rewards"):
            values = {"task": task, "reward": {"functions": ["exact"]}}
            config = RunConfig.read({**settings(tmp_path / "run"), **values})
            assert f"\n{rewarded.section_name}:" in settings_text(config, {})
    finally:
        task_registry.unregister("my-rewards")


@pytest.mark.parametrize("field", [FIELDS[0], *(pytest.param(f, marks=pytest.mark.slow) for f in FIELDS[1:])])
def test_section_without_valid_defaults_is_refused_and_affects_no_other_run(site, settings, tmp_path, field):
    install(site, SECTION.format(field=field), "deltaw.methods", "bad = toy_plugin:ENTRY")
    code = (
        "import sys, json, deltaw; from deltaw.runs.resuming import dump_settings\n"
        "config = deltaw.settings.config.RunConfig.read(json.loads(sys.argv[1])); dump_settings(config)\n"
        "print(config.method)"
    )
    result = python("-c", code, json.dumps(settings(tmp_path / "run")))
    assert result.stdout.strip() == "lora", result.stderr
    assert "the section 'bad' has no valid defaults" in result.stderr


@pytest.mark.parametrize("name", ["a.b", "x\n", "dpo", "causal-lm"])
def test_taken_or_unusable_name_of_a_task_is_refused(name):
    with pytest.raises(ValueError, match=r"cannot name a task|already"):
        task_registry.register(TaskEntry(name, "x:Y", "AutoModel", "do it"))
    with pytest.raises(ValueError, match="'sft' is already the name or an alias"):
        task_registry.register(TaskEntry("own", "x:Y", "AutoModel", "do it", aliases={"sft": {}}))
    with pytest.raises(ValueError, match="'section' is already a setting"):
        method_registry.register(MethodEntry("section", "x:Y", NormsSettings))
    RunConfig.read({"model": "m", "data": "d"})
    assert task_registry.name_of("sft") == "causal-lm"


def test_missing_package_is_named_in_hints(settings, tmp_path):
    for values in ({"method": "gain"}, {"task": "rhythm"}, {"zzz": {"level": 3}}):
        with pytest.raises(UserError) as error:
            RunConfig.read({**settings(tmp_path / "run"), **values})
        assert "package provides" in str(error.value.hint), values


def test_errors_in_other_code_name_its_line(tmp_path):
    file = tmp_path / "own_reward.py"
    file.write_text("def score(row):\n    return {}['lenght']\n")
    namespace: dict[str, object] = {}
    exec(compile(file.read_text(), str(file), "exec"), namespace)
    with pytest.raises(KeyError) as caught:
        import_object(namespace["score"])({})
    _, message = crash_report.describe(caught.value, traceback=False)
    assert "bug in deltaw" in message  # deltaw did not call it
    with pytest.raises(KeyError) as caught:
        read_by_deltaw(namespace["score"])
    _, message = crash_report.describe(caught.value, traceback=False)
    message = " ".join(message.split())
    assert "own_reward.py, line 2" in message and "bug in deltaw" not in message


def read_by_deltaw(function):
    """Call a function from deltaw's code."""
    registry = Registry("toy", MethodEntry, "deltaw.toys", check=function)
    registry.register(MethodEntry("toy", Norms))
