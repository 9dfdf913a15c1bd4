"""Differences of Windows and macOS: names, open files, streams, signals, shells and missing modules."""

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
from deltaw.atomic_files import atomic_path, write_text
from deltaw.data.chat_template import with_date
from deltaw.data.template_functions import format_date
from deltaw.errors import UserError, escape_control_characters
from deltaw.hub.packages import _check_inside
from deltaw.lora.files import read_tensors
from deltaw.machine import memory
from deltaw.machine.choices import usable_processors
from deltaw.serving.http.errors import ApiError
from deltaw.serving.http.served import resolve_adapter_folder
from deltaw.serving.http.server import listening_socket
from deltaw.tensor_files import save_tensors
from deltaw.training.features.store import Shape, open_store
from deltaw.training.process import stop_signals
from tests.test_structure import tree_of

pytest_plugins = ["tests.other_systems"]
SOURCE = Path(deltaw.cli.__file__).parents[1]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="open and mapped files are read from /proc")


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make deltaw detect Windows, on any system."""
    monkeypatch.setattr(platforms, "WINDOWS", True)


# The source


@functools.cache
def _calls() -> list[tuple[str, ast.Call, str]]:
    """Return each call in the source as (location, node, function name)."""
    calls = []
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                calls.append((f"{file.relative_to(SOURCE)}, line {node.lineno}", node, name))
    return calls


def test_text_files_are_opened_with_an_encoding():
    """Windows would use a code page by default."""
    missing = []
    for location, call, name in _calls():
        owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        constants = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
        modes = [arg for arg in constants if isinstance(arg, str) and re.fullmatch("[rwaxbt+]+", arg)]
        opens = name == "open" and (not call.args or bool(modes) or not owner) and "b" not in "".join(modes)
        texts = (
            name in ("read_text", "write_text")
            and owner not in ("", "atomic_files", "formatter")
            and "utf-8" not in constants
        )
        if (opens or texts) and "encoding" not in {keyword.arg for keyword in call.keywords}:
            missing.append(location)
    assert missing == []


def test_renames_and_process_checks_use_the_platform_helpers():
    """Renames must wait for locked files on Windows, and ``os.kill(pid, 0)`` would terminate the process there."""
    renames = [(location, ast.unparse(node.func)) for location, node, name in _calls() if name in ("rename", "kill")]
    assert [rename for rename in renames if rename[1].endswith(".rename") or rename[1] == "os.kill"] == []


IMPORT_ALL = """
import ast, contextlib, importlib, pathlib, sys
source, modules, names = pathlib.Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3].split()
files = sorted(source.rglob("*.py"))
for file in files:  # import other packages first, with all names of Linux
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        imports = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        imports += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        for name in imports:
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
def test_every_module_imports_without_posix_names():
    from tests.other_systems import MODULES, NAMES

    names = [f"{module.__name__}.{name}" for module, names in NAMES.items() for name in names]
    command = [sys.executable, "-c", IMPORT_ALL, str(SOURCE), " ".join(MODULES), " ".join(names)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.split()[0]) > 200


# Files


@on_linux
def test_replacing_an_open_file_raises_user_error(like_windows, tmp_path):
    write_text(tmp_path / "run.json", "old")
    with (tmp_path / "run.json").open(), pytest.raises(UserError, match=r"'run.json' cannot be replaced") as error:
        write_text(tmp_path / "run.json", "new")
    assert error.value.hint is not None and "close the program" in error.value.hint
    assert (tmp_path / "run.json").read_text() == "old" and os.listdir(tmp_path) == ["run.json"]
    write_text(tmp_path / "run.json", "new")
    assert (tmp_path / "run.json").read_text() == "new"


def test_replacing_a_briefly_open_file_is_retried(windows, tmp_path, monkeypatch):
    original = Path.replace
    errors = [PermissionError(errno.EACCES, "open (WinError 32)")] * 3

    def replace(source: Path, target: Path) -> None:
        if errors:
            raise errors.pop()
        original(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    write_text(tmp_path / "file", "new")
    assert not errors and (tmp_path / "file").read_text() == "new"


def test_no_retry_on_other_systems(monkeypatch):
    monkeypatch.setattr(platforms, "WINDOWS", False)
    do = mock.Mock(side_effect=PermissionError)
    with pytest.raises(PermissionError):
        platforms.retry_while_locked(do)
    assert do.call_count == 1


def test_text_bytes_are_equal_on_every_system(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "linesep", "\r\n")
    write_text(tmp_path / "file", "a\nb → c\n")
    assert (tmp_path / "file").read_bytes() == "a\nb → c\n".encode()


@on_linux
def test_remove_path_skips_open_folders(like_windows, tmp_path):
    for name in ("open", "shut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    with (tmp_path / "open" / "file").open():
        assert not platforms.remove_path(tmp_path / "open") and platforms.remove_path(tmp_path / "shut")
    assert os.listdir(tmp_path) == ["open"] and platforms.remove_path(tmp_path / "nothing")


@on_linux
def test_adapter_can_be_rewritten_after_reading(like_windows, tmp_path):
    save_tensors(tmp_path / "adapter_model.safetensors", {"a": torch.ones(64, 64)}, {"format": "pt"})
    tensors, _ = read_tensors(tmp_path)
    save_tensors(tmp_path / "adapter_model.safetensors", {"a": torch.zeros(64, 64)}, {"format": "pt"})
    assert tensors["a"].min() == 1 and not read_tensors(tmp_path)[0]["a"].any()


@on_linux
def test_closed_feature_store_can_be_removed(like_windows, tmp_path):
    store = open_store("key", Shape(4, 4, 8, "float32"), folder=tmp_path)
    store.write(*(torch.arange(4).numpy() for _ in "12"), torch.ones(4, 8))
    store.close()
    shutil.rmtree(tmp_path / "key")
    assert store.done.all()


# Names


@pytest.mark.parametrize("name", ["CON", "nul.txt", "com1", "LPT9.log", "run.", "run ", "a:b", "what?", "a|b", "\x07"])
def test_reserved_windows_names_are_rejected(windows, tmp_path, name):
    with (
        pytest.raises(UserError, match=re.escape(f"named '{escape_control_characters(name)}'")),
        atomic_path(tmp_path / "new" / name),
    ):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["runs/a", "..\\a", "./a", "C:\\runs\\a", "\\\\host\\share\\a", "console", "com10", ".git"]
)
def test_other_windows_names_are_accepted(windows, name):
    platforms.reject_reserved_names(name)


def test_any_name_is_accepted_on_other_systems(monkeypatch):
    monkeypatch.setattr(platforms, "WINDOWS", False)
    platforms.reject_reserved_names("aux/a:b?.")


@pytest.mark.parametrize("path", ["a\\..\\b", "C:/a", "a/C:/b", "a/b:stream", "../a", "/a"])
def test_package_members_outside_the_package_are_rejected(path):
    with pytest.raises(UserError, match="leaves the package"):
        _check_inside(path, "pypi:a==1")


@pytest.mark.parametrize("path", ["//host/share", "\\\\host\\share", "\\/host/share"])
def test_adapter_on_a_network_share_is_rejected_without_access(tmp_path, monkeypatch, path):
    monkeypatch.setattr(os.path, "realpath", mock.Mock(side_effect=AssertionError("it contacts the host")))
    with pytest.raises(ApiError):
        resolve_adapter_folder(tmp_path, path)


# Shells and streams


QUOTED = {"runs\\mine": "runs\\mine", "C:/a/b.jsonl": "C:/a/b.jsonl", "a b": '"a b"', "a&b": '"a&b"', "": '""'}
QUOTED |= {"a b\\": '"a b\\\\"', 'say "hi"': '"say \\"hi\\""'}


@pytest.mark.parametrize("text, quoted", QUOTED.items())
def test_commands_are_quoted_for_windows_shells(windows, text, quoted):
    assert platforms.shell_word(text) == quoted


def test_piped_streams_use_utf_8_on_windows(windows, monkeypatch, tmp_path):
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    text_content = "a → b … naïve 漢字 \U0001f600"
    (tmp_path / "in").write_text(text_content, encoding="utf-8")
    with (tmp_path / "out").open("w", encoding="cp1252") as out, (tmp_path / "in").open(encoding="cp1252") as stdin:
        for name, stream in {"stdout": out, "stderr": out, "stdin": stdin}.items():
            monkeypatch.setattr(sys, name, stream)
        deltaw.cli._configure_streams()
        print(sys.stdin.read(), flush=True)
    assert (tmp_path / "out").read_bytes().decode("utf-8") == text_content + os.linesep


def test_unencodable_characters_are_escaped_on_output(monkeypatch, tmp_path):
    monkeypatch.setattr(platforms, "WINDOWS", False)
    with (tmp_path / "out").open("w", encoding="cp1252") as out:
        monkeypatch.setattr(sys, "stdout", out)
        deltaw.cli._configure_streams()
        print("a → b", flush=True)
    assert (tmp_path / "out").read_bytes() == b"a \\u2192 b" + os.linesep.encode()


def test_broken_pipe_is_recognized_by_the_windows_error(windows, monkeypatch, tmp_path):
    class BrokenPipe(io.FileIO):
        def write(self, data):
            raise OSError(errno.EINVAL, "invalid argument")

    class Output(deltaw.cli._StandardStream, BrokenPipe):
        """A stream whose file rejects writes."""

    with (tmp_path / "out").open("w") as out:
        assert Output(out).write(b"text") == 4
        monkeypatch.setattr(platforms, "WINDOWS", False)
        with pytest.raises(OSError, match="invalid argument"):
            Output(out).write(b"text")


def test_ctrl_break_stops_like_ctrl_c(monkeypatch):
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR2, raising=False)
    before = signal.getsignal(signal.SIGUSR2)
    with stop_signals() as stop_requested:
        assert not stop_requested()
        signal.raise_signal(signal.SIGUSR2)
        assert stop_requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGUSR2)
    assert signal.getsignal(signal.SIGUSR2) == before


def test_second_server_cannot_bind_the_port(monkeypatch):
    import socket

    settings = SimpleNamespace(host="127.0.0.1", port=0)
    with mock.patch.object(socket.socket, "setsockopt") as setsockopt, listening_socket(settings):  # type: ignore[arg-type]
        assert setsockopt.call_args.args[1] == socket.SO_REUSEADDR
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", ~socket.SO_REUSEADDR, raising=False)
    with mock.patch.object(socket.socket, "setsockopt") as setsockopt, listening_socket(settings):  # type: ignore[arg-type]
        assert setsockopt.call_args.args[1] == ~socket.SO_REUSEADDR


# Templates


def test_day_without_zero_padding_is_portable(monkeypatch):
    day = mock.Mock(strftime=lambda shape: shape)
    for windows, shape in ((False, "%-d %% %%-d"), (True, "%#d %% %%-d")):
        monkeypatch.setattr(platforms, "WINDOWS", windows)
        assert format_date(day, "%-d %% %%-d") == shape
    monkeypatch.setattr(platforms, "WINDOWS", False)
    assert format_date(datetime.datetime(2026, 3, 4), "%-d") == "4"


def test_unsupported_date_format_is_a_template_error(monkeypatch):
    day = mock.Mock(strftime=mock.Mock(side_effect=ValueError("Invalid format string")))
    with pytest.raises(jinja2.TemplateError, match="'%Q' cannot be used"):
        format_date(day, "%Q")
    fake = SimpleNamespace(datetime=mock.Mock(fromisoformat=lambda _: day))
    monkeypatch.setattr("deltaw.data.chat_template.datetime", fake)
    with pytest.raises(UserError, match="'%Q' cannot be used"):
        with_date("{{ strftime_now('%Q') }}", "2026-01-31")


# The machine


def test_memory_is_measured_without_proc(tmp_path, monkeypatch):
    assert memory.memory_limit_bytes(tmp_path).value > 2**28 and memory.free_memory_bytes(tmp_path) > 0
    usage = mock.Mock(getrusage=lambda _: mock.Mock(ru_maxrss=5000), RUSAGE_SELF=0)
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.peak_resident_bytes(tmp_path) == 5000  # in bytes, unlike KiB on Linux
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(memory.psutil, "Process", lambda: mock.Mock(memory_info=lambda: mock.Mock(peak_wset=7000)))
    assert memory.peak_resident_bytes(tmp_path) == 7000


def test_processors_are_counted_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    bound = mock.Mock(spec=["cpu_affinity"], cpu_affinity=lambda: [1, 3])
    monkeypatch.setattr("deltaw.machine.choices.psutil.Process", lambda: bound)
    assert usable_processors() == {1, 3}
    monkeypatch.setattr("deltaw.machine.choices.psutil.Process", lambda: mock.Mock(spec=[]))
    assert usable_processors() == set(range(os.cpu_count() or 1))
