"""What Windows and macOS do differently: names, open files, streams, signals, shells, and what is not there."""

from __future__ import annotations

import ast
import datetime
import errno
import functools
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jinja2
import pytest
import torch

import deltaw.cli
from deltaw import platforms
from deltaw.data.chat_template import with_date
from deltaw.data.rendering import dated
from deltaw.durable import replacing, write_text
from deltaw.errors import UserError, escape_control_characters
from deltaw.hub.packages import _check_inside
from deltaw.lora.files import read_tensors
from deltaw.machine import memory
from deltaw.machine.processor import usable_processors
from deltaw.serving.http.errors import ApiError
from deltaw.serving.http.served import folder_below
from deltaw.serving.http.server import listening_socket
from deltaw.tensor_files import save_tensors
from deltaw.training.features.store import Shape, open_store
from deltaw.training.process import stop_signals
from tests.test_structure import tree_of

pytest_plugins = ["tests.other_systems"]
SOURCE = Path(deltaw.cli.__file__).parents[1]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="what is open or mapped is found in /proc")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What deltaw itself asks for, on any system."""
    monkeypatch.setattr(platforms, "WINDOWS", True)


# The source


@functools.cache
def _calls() -> list[tuple[str, ast.Call, str]]:
    """Each call of a method in the source: where, itself, and the method's name."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                found.append((f"{file.relative_to(SOURCE)}, line {node.lineno}", node, name))
    return found


def test_every_text_file_is_opened_with_its_encoding():
    """Windows would take a code page of the user's."""
    missing = []
    for where, call, name in _calls():
        owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        given = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
        modes = [arg for arg in given if isinstance(arg, str) and re.fullmatch("[rwaxbt+]+", arg)]
        opens = name == "open" and (not call.args or bool(modes) or not owner) and "b" not in "".join(modes)
        texts = (
            name in ("read_text", "write_text") and owner not in ("", "durable", "formatter") and "utf-8" not in given
        )
        if (opens or texts) and "encoding" not in {keyword.arg for keyword in call.keywords}:
            missing.append(where)
    assert missing == []


def test_files_are_renamed_and_processes_asked_about_in_one_way():
    """A folder or file that Windows keeps is waited for; ``os.kill(number, 0)`` would end the process there."""
    asked = [(where, ast.unparse(call.func)) for where, call, name in _calls() if name in ("rename", "kill")]
    assert [found for found in asked if found[1].endswith(".rename") or found[1] == "os.kill"] == []


IMPORT_ALL = """
import ast, contextlib, importlib, pathlib, sys
source, modules, names = pathlib.Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3].split()
files = sorted(source.rglob("*.py"))
for file in files:  # other packages first, as Linux has them
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        wanted = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        wanted += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        for name in wanted:
            if name.partition(".")[0] not in ("deltaw", "ray", "trackio", "wandb", "readline"):
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
sys.modules |= dict.fromkeys(modules)
for name in names:
    module, _, attribute = name.partition(".")
    if hasattr(importlib.import_module(module), attribute):
        delattr(sys.modules[module], attribute)
import ctypes, os, platform
os.sep, os.linesep, sys.platform = os.sep, "\\r\\n", "win32"
platform.system = lambda: "Windows"
assert not [name for name in sys.modules if name.partition(".")[0] == "deltaw"]
for file in files:
    parts = file.relative_to(source.parent).with_suffix("").parts
    if parts[-1] != "__main__":
        importlib.import_module(".".join(parts[: -1 if parts[-1] == "__init__" else None]))
from deltaw import platforms
assert platforms.WINDOWS
from deltaw.kernels import loader
print(len(files), loader.library())
"""


@pytest.mark.slow  # an interpreter that imports torch and everything else
@on_linux
def test_every_module_is_imported_without_what_windows_lacks():
    from tests.other_systems import MODULES, NAMES

    names = [f"{module.__name__}.{name}" for module, names in NAMES.items() for name in names]
    command = [sys.executable, "-c", IMPORT_ALL, str(SOURCE), " ".join(MODULES), " ".join(names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 200


# Files


@on_linux
def test_a_file_that_a_reader_keeps_open_is_not_replaced_and_that_is_said(like_windows, tmp_path):
    write_text(tmp_path / "run.json", "old")
    with (tmp_path / "run.json").open(), pytest.raises(UserError, match=r"'run.json' cannot be replaced") as refused:
        write_text(tmp_path / "run.json", "new")
    assert refused.value.hint is not None and "close the program" in refused.value.hint
    assert (tmp_path / "run.json").read_text() == "old" and os.listdir(tmp_path) == ["run.json"]
    write_text(tmp_path / "run.json", "new")
    assert (tmp_path / "run.json").read_text() == "new"


def test_a_file_that_is_open_for_a_moment_is_waited_for(windows, tmp_path, monkeypatch):
    own, refusals = Path.replace, [PermissionError(errno.EACCES, "open (WinError 32)")] * 3

    def replace(source: Path, target: Path) -> None:
        if refusals:
            raise refusals.pop()
        own(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    write_text(tmp_path / "file", "new")
    assert not refusals and (tmp_path / "file").read_text() == "new"


def test_elsewhere_nothing_is_tried_twice(monkeypatch):
    monkeypatch.setattr(platforms, "WINDOWS", False)
    do = mock.Mock(side_effect=PermissionError)
    with pytest.raises(PermissionError):
        platforms.patiently(do)
    assert do.call_count == 1


def test_text_has_the_same_bytes_on_every_system(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "linesep", "\r\n")
    write_text(tmp_path / "file", "a\nb → c\n")
    assert (tmp_path / "file").read_bytes() == "a\nb → c\n".encode()


@on_linux
def test_what_is_open_stays_and_the_rest_goes(like_windows, tmp_path):
    for name in ("open", "shut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    with (tmp_path / "open" / "file").open():
        assert not platforms.removed(tmp_path / "open") and platforms.removed(tmp_path / "shut")
    assert os.listdir(tmp_path) == ["open"] and platforms.removed(tmp_path / "nothing")


@on_linux
def test_an_adapter_that_was_read_can_be_written_again(like_windows, tmp_path):
    save_tensors(tmp_path / "adapter_model.safetensors", {"a": torch.ones(64, 64)}, {"format": "pt"})
    held, _ = read_tensors(tmp_path)
    save_tensors(tmp_path / "adapter_model.safetensors", {"a": torch.zeros(64, 64)}, {"format": "pt"})
    assert held["a"].min() == 1 and not read_tensors(tmp_path)[0]["a"].any()


@on_linux
def test_features_that_are_closed_can_be_removed(like_windows, tmp_path):
    store = open_store("key", Shape(4, 4, 8, "float32"), folder=tmp_path)
    store.write(*(torch.arange(4).numpy() for _ in "12"), torch.ones(4, 8))
    store.close()
    shutil.rmtree(tmp_path / "key")
    assert store.done.all()


# Names


@pytest.mark.parametrize("name", ["CON", "nul.txt", "com1", "LPT9.log", "run.", "run ", "a:b", "what?", "a|b", "\x07"])
def test_names_that_windows_cannot_have_are_refused(windows, tmp_path, name):
    with (
        pytest.raises(UserError, match=re.escape(f"named '{escape_control_characters(name)}'")),
        replacing(tmp_path / "new" / name),
    ):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["runs/a", "..\\a", "./a", "C:\\runs\\a", "\\\\host\\share\\a", "console", "com10", ".git"]
)
def test_other_names_are_not(windows, name):
    platforms.refuse_names(name)


def test_on_other_systems_all_names_are_names(monkeypatch):
    monkeypatch.setattr(platforms, "WINDOWS", False)
    platforms.refuse_names("aux/a:b?.")


@pytest.mark.parametrize("path", ["a\\..\\b", "C:/a", "a/C:/b", "a/b:stream", "../a", "/a"])
def test_members_of_packages_stay_inside_on_windows_too(path):
    with pytest.raises(UserError, match="does not stay inside"):
        _check_inside(path, "pypi:a==1")


@pytest.mark.parametrize("path", ["//host/share", "\\\\host\\share", "\\/host/share"])
def test_an_adapter_on_another_host_is_not_looked_for(tmp_path, monkeypatch, path):
    monkeypatch.setattr(os.path, "realpath", mock.Mock(side_effect=AssertionError("it asks the host")))
    with pytest.raises(ApiError):
        folder_below(tmp_path, path)


# Shells and streams


@pytest.mark.parametrize(
    "text, quoted",
    {
        "runs\\mine": "runs\\mine",
        "C:/a/b.jsonl": "C:/a/b.jsonl",
        "a b": '"a b"',
        "a&b": '"a&b"',
        "a b\\": '"a b\\\\"',
        'say "hi"': '"say \\"hi\\""',
        "": '""',
    }.items(),
)
def test_commands_are_quoted_for_the_shells_of_windows(windows, text, quoted):
    assert platforms.shell_word(text) == quoted


def test_what_is_piped_is_utf_8_on_windows(windows, monkeypatch, tmp_path):
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    told = "a → b … naïve 漢字 \U0001f600"
    (tmp_path / "in").write_text(told, encoding="utf-8")
    with (tmp_path / "out").open("w", encoding="cp1252") as out, (tmp_path / "in").open(encoding="cp1252") as stdin:
        for name, stream in {"stdout": out, "stderr": out, "stdin": stdin}.items():
            monkeypatch.setattr(sys, name, stream)
        deltaw.cli._print_any_text()
        print(sys.stdin.read(), flush=True)
    assert (tmp_path / "out").read_bytes().decode("utf-8") == told + os.linesep


def test_a_console_of_a_code_page_prints_what_it_can(monkeypatch, tmp_path):
    monkeypatch.setattr(platforms, "WINDOWS", False)
    with (tmp_path / "out").open("w", encoding="cp1252") as out:
        monkeypatch.setattr(sys, "stdout", out)
        deltaw.cli._print_any_text()
        print("a → b", flush=True)
    assert (tmp_path / "out").read_bytes() == b"a \\u2192 b" + os.linesep.encode()


def test_a_pipe_without_a_reader_is_recognized_by_the_error_of_windows(windows, monkeypatch, tmp_path):
    class Gone(io.FileIO):
        def write(self, data):
            raise OSError(errno.EINVAL, "invalid argument")

    class Printed(deltaw.cli._Printed, Gone):
        """A stream whose file refuses."""

    with (tmp_path / "out").open("w") as out:
        assert Printed(out).write(b"text") == 4
        monkeypatch.setattr(platforms, "WINDOWS", False)
        with pytest.raises(OSError, match="invalid argument"):
            Printed(out).write(b"text")


def test_ctrl_break_asks_to_stop_as_ctrl_c_does(monkeypatch):
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR2, raising=False)
    before = signal.getsignal(signal.SIGUSR2)
    with stop_signals() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGUSR2)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGUSR2)
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_second_server_does_not_take_the_port(monkeypatch):
    import socket

    settings = SimpleNamespace(host="127.0.0.1", port=0)
    with mock.patch.object(socket.socket, "setsockopt") as asked, listening_socket(settings):  # type: ignore[arg-type]
        assert asked.call_args.args[1] == socket.SO_REUSEADDR
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", ~socket.SO_REUSEADDR, raising=False)
    with mock.patch.object(socket.socket, "setsockopt") as asked, listening_socket(settings):  # type: ignore[arg-type]
        assert asked.call_args.args[1] == ~socket.SO_REUSEADDR


# Templates


def test_a_day_without_its_zero_is_asked_for_in_one_way(monkeypatch):
    day = mock.Mock(strftime=lambda shape: shape)
    for windows, shape in ((False, "%-d %% %%-d"), (True, "%#d %% %%-d")):
        monkeypatch.setattr(platforms, "WINDOWS", windows)
        assert dated(day, "%-d %% %%-d") == shape
    monkeypatch.setattr(platforms, "WINDOWS", False)
    assert dated(datetime.datetime(2026, 3, 4), "%-d") == "4"


def test_a_format_that_the_system_refuses_is_an_error_of_the_template(monkeypatch):
    day = mock.Mock(strftime=mock.Mock(side_effect=ValueError("Invalid format string")))
    with pytest.raises(jinja2.TemplateError, match="'%Q' cannot be used"):
        dated(day, "%Q")
    monkeypatch.setattr(
        "deltaw.data.chat_template.datetime", SimpleNamespace(datetime=mock.Mock(fromisoformat=lambda _: day))
    )
    with pytest.raises(UserError, match="'%Q' cannot be used"):
        with_date("{{ strftime_now('%Q') }}", "2026-01-31")


# The machine


def test_memory_is_told_without_proc(tmp_path, monkeypatch):
    assert memory.memory_limit_bytes(tmp_path).value > 2**28 and memory.free_memory_bytes(tmp_path) > 0
    usage = mock.Mock(getrusage=lambda _: mock.Mock(ru_maxrss=5000), RUSAGE_SELF=0)
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.peak_resident_bytes(tmp_path) == 5000  # bytes, where Linux tells KiB
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(memory.psutil, "Process", lambda: mock.Mock(memory_info=lambda: mock.Mock(peak_wset=7000)))
    assert memory.peak_resident_bytes(tmp_path) == 7000


def test_processors_are_counted_where_processes_are_not_bound(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    bound = mock.Mock(spec=["cpu_affinity"], cpu_affinity=lambda: [1, 3])
    monkeypatch.setattr("deltaw.machine.processor.psutil.Process", lambda: bound)
    assert usable_processors() == {1, 3}
    monkeypatch.setattr("deltaw.machine.processor.psutil.Process", lambda: mock.Mock(spec=[]))
    assert usable_processors() == set(range(os.cpu_count() or 1))
