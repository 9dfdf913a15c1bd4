"""Runs the tests of one row for the reward ``unit-tests``, and reports the results to the parent process.

The code of the completion runs in another process (``unit_tests_child.py``), which has access to neither the tests nor
the results. This process compares the values that the functions return. It does not import deltaw.
"""

import ast
import builtins
import contextlib
import importlib.util
import inspect
import io
import json
import os
import platform
import subprocess
import sys
import threading
import time
import types
import unittest
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil

sys.path.insert(0, os.path.dirname(__file__))
from unit_tests_child import SPECIAL, Peer, confine, take_standard_streams

del sys.path[0]

MAX_PROCESSES = 64
MAX_FILES = 4096
MAX_TOTAL_BYTES = 1 << 26
# Memory beyond that of the completion, for a test framework.
RUNNER_MEGABYTES = 1024
TESTS = "tests"
# Names by which pytest finds functions to call, with the tests as arguments.
RESERVED = "__", "pytest", "setup_", "teardown_", "setUp", "tearDown"
PYTEST_OPTIONS = "-q -p no:cacheprovider --noconftest --rootdir . --confcutdir . --capture=sys test_row.py -c"


class Runner:
    """Runs tests against the names of a completion. It is also a plugin of pytest.

    Args:
        results: Binary stream for the results, one line of JSON each.
        request: Request of the parent process.
    """

    def __init__(self, results: IO[bytes], request: dict[str, Any]) -> None:
        self._results = results
        self._request = request
        self._module = types.ModuleType(TESTS)
        self._assertions = 0
        self._failure = ""
        self.write()  # the process has started

        def failed(error: AssertionError, *args: Any) -> None:
            self._fail(*args[:1])
            AssertionError.__init__(error, *args)

        # A failed assertion of unittest counts even if something catches its exception.
        unittest.TestCase.failureException = type("AssertionFailed", (AssertionError,), {"__init__": failed})

    def run(self, peer: Any) -> None:
        """Run the cases of the request, and report each test that passes with at least one assertion."""
        try:
            names = peer.request("load", self._request["code"])
        except BaseException as error:  # exits included
            self.abort(f"the code does not run: {type(error).__name__}: {error}")
        sources = "\n".join(case["source"] for case in self._request["cases"])
        self._names = visible_names(names, sources, self._request["defined"])
        self._names["candidate"] = names.get(self._request["entry_point"])
        sys.modules[TESTS] = self._module
        vars(self._module).update(self._names, _count_assertion=self._count, _failed_assertion=self._fail)
        for case in self._request["cases"]:
            self.pytest_runtest_logstart()
            try:
                getattr(self, f"_run_{case['kind']}")(case["source"])
            except BaseException as error:
                self._failure = f"{type(error).__name__}: {error}"
            if case["kind"] != "pytest":
                self.report()

    def report(self) -> None:
        """Report the current test."""
        reason = self._failure or ("" if self._assertions else "no assertion ran")
        self.write(passed=not reason, reason=reason[-500:])

    def abort(self, reason: str) -> NoReturn:
        """Report the current test as failed and exit. All later tests fail."""
        self.write(passed=False, reason=reason)
        kill_and_exit(0)

    def write(self, **result: Any) -> None:
        """Write a line of results."""
        self._results.write(json.dumps(result).encode() + b"\n")
        self._results.flush()

    def _count(self) -> None:
        self._assertions += 1

    def _fail(self, message: Any = None) -> Any:
        self._failure = f"AssertionError: {message}"
        return message

    def _run_statements(self, source: str) -> None:
        """Execute source in the module of the tests. Imports of modules that do not exist resolve to the completion."""
        tree = ast.parse(source)
        for node in ast.walk(tree):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                imported = [node.module]
                node.level = 0
            for name in imported:
                top = name.partition(".")[0]
                if top not in sys.modules and importlib.util.find_spec(top) is None:
                    sys.modules[top] = sys.modules[name] = types.ModuleType(name)
                    vars(sys.modules[name]).update(self._names)
        exec(compile(tree, TESTS, "exec"), vars(self._module))

    def _run_doctest(self, source: str) -> None:
        import doctest

        test = doctest.DocTestParser().get_doctest(source, vars(self._module), TESTS, None, 0)
        output = io.StringIO()
        self._assertions = len(test.examples)
        if doctest.DocTestRunner(verbose=False).run(test, out=output.write).failed:
            self._failure = output.getvalue()

    def _run_pytest(self, source: str) -> None:
        """Run pytest on a module that exists only in memory."""
        import pytest

        self._run_statements(source)
        Path("test_row.py").touch()
        pytest.main([*PYTEST_OPTIONS.split(), os.devnull], plugins=[self])

    def pytest_pycollect_makemodule(self, module_path: Path, parent: Any) -> Any:
        """Replace the empty file by the module of the tests."""
        import pytest

        module = pytest.Module.from_parent(parent, path=module_path)
        module.obj = self._module
        return module

    def pytest_collection_finish(self, session: Any) -> None:
        """Report the number of tests."""
        self.write(total=len(session.items))

    def pytest_runtest_logstart(self) -> None:
        """Reset the state before a test."""
        self._assertions = 0
        self._failure = ""

    def pytest_pyfunc_call(self, pyfuncitem: Any) -> None:
        """Run a coroutine function in an event loop."""
        import asyncio

        function = pyfuncitem.obj
        if inspect.iscoroutinefunction(function):
            pyfuncitem.obj = lambda **fixtures: asyncio.run(function(**fixtures))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Report a test after its teardown. Skipped tests and expected failures do not pass."""
        if not report.passed or hasattr(report, "wasxfail"):
            self._failure = self._failure or str(report.longrepr or "expected failure")
        if report.when == "teardown":
            self.report()


def serve_completion(peer: Any, operation: str, target: Any, name: str = "", /, *values: Any, **kwargs: Any) -> Any:
    """Serve a request of the untrusted completion, which may use objects that tests passed to it.

    Functions can be called, and other objects can be read with operators. Public attributes are accessible only for
    objects of classes that the tests define, and for in-memory files.
    """
    passed = peer.owns(target) and not isinstance(target, unittest.TestCase)
    is_defined_by_tests = passed and type(target).__module__ in (TESTS, "_io")
    allowed = SPECIAL if is_defined_by_tests else SPECIAL - {"__setitem__", "__delitem__"}
    if operation == "special" and passed and name in allowed:
        return getattr(type(target), name)(target, *values, **kwargs)
    if operation in ("getattr", "setattr") and is_defined_by_tests and not name.startswith("_"):
        return {"getattr": getattr, "setattr": setattr}[operation](target, name, *values)
    raise PermissionError(f"the completion may not use '{name}' of {type(target).__name__}")


def visible_names(names: dict[str, Any], sources: str, defined: Iterable[str]) -> dict[str, Any]:
    """Return the names visible to tests. Names of builtins and of modules of the tests must be in ``defined``."""
    hidden = set(dir(builtins)) | {name for name in [*sys.stdlib_module_names, "np", "pytest"] if f"{name}." in sources}
    hidden -= set(defined)
    visible = [key for key, value in names.items() if key not in hidden or isinstance(value, types.ModuleType)]
    return {key: names[key] for key in visible if not key.startswith(RESERVED)}


def enforce_limits(seconds: float, megabytes: int, isolated: bool) -> NoReturn:
    """Exit with all descendants after a timeout, or if together they exceed the limits."""
    deadline = time.monotonic() + seconds
    runner = psutil.Process()
    exceeded = False
    while time.monotonic() < deadline and not exceeded:
        time.sleep(0.05)
        sizes = []
        for process in (runner, *runner.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                sizes.append(process.memory_info().rss)  # 0 if it has exited
        files = [] if isolated else list(_file_sizes("."))  # its file system has the limits
        exceeded = sum(map(bool, sizes)) > MAX_PROCESSES or sum(sizes) > megabytes << 20
        exceeded |= len(files) > MAX_FILES or sum(files) > MAX_TOTAL_BYTES
    kill_and_exit(1)


def _file_sizes(folder: str) -> Iterator[int]:
    for parent, folders, names in os.walk(folder):
        for name in folders + names:
            with contextlib.suppress(OSError):
                yield os.lstat(os.path.join(parent, name)).st_size


def kill_and_exit(status: int) -> NoReturn:
    """Kill all descendants, including those in separate sessions, and exit. For process 1 the kernel kills them."""
    while os.getpid() != 1 and (children := psutil.Process().children(recursive=True)):
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(children, timeout=0.1)  # removes them from the list
    os._exit(status)


def isolate(folder: str) -> None:
    """Mount the folder and limit the processes of this PID namespace: by user, except for root, and by namespace."""
    import ctypes
    import resource

    libc = ctypes.CDLL(None)
    options = f"size={MAX_TOTAL_BYTES},nr_inodes={MAX_FILES},mode=700".encode()
    libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options)
    libc.mount(os.fsencode(folder), b"/dev/shm", None, 4096, None)  # MS_BIND
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_NPROC, (4 * MAX_PROCESSES, 4 * MAX_PROCESSES))  # threads count
    if [int(part) for part in platform.release().split(".")[:2]] >= [6, 14]:  # before, the limit is of the machine
        with contextlib.suppress(OSError):
            Path("/proc/sys/kernel/pid_max").write_text("301", encoding="utf-8")  # the smallest that the kernel allows


def main() -> None:
    """Run the request on standard input."""
    reader, results = take_standard_streams()
    request = json.load(reader)
    runner = Runner(results, request)
    folder = os.getcwd()
    megabytes = request["megabytes"]
    isolated = request["isolated"]
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no other process reads this one's memory
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans stay descendants
    if isolated:
        isolate(folder)
    confine(folder, request["cpu_seconds"] + 10, megabytes + RUNNER_MEGABYTES)
    limits = request["wall_seconds"], megabytes + 256, isolated
    threading.Thread(target=enforce_limits, args=limits, daemon=True).start()
    child = os.path.join(os.path.dirname(__file__), "unit_tests_child.py")
    words = [sys.executable, "-I", "-B", "-X", "utf8", child, folder, str(request["cpu_seconds"]), str(megabytes)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        runner.run(Peer(process.stdout, process.stdin, serve_completion, runner.abort, is_untrusted=True))
    finally:
        kill_and_exit(0)


if __name__ == "__main__":
    main()
