"""Runs the tests of one row for the reward ``unit-tests``, and reports each result to the process that started it.

The code of the completion runs in another process (``unit_tests_child.py``), which has neither the tests nor the pipe
with the results. This process compares what the functions return. It imports nothing of deltaw.
"""

import ast
import asyncio
import builtins
import contextlib
import doctest
import functools
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
import typing
import unittest
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, os.path.dirname(__file__))
from unit_tests_child import SPECIAL, Peer, Remote, confine

del sys.path[0]

MAX_PROCESSES, MAX_FILES, MAX_TOTAL_BYTES = 64, 4096, 1 << 26
# Memory beyond that of the completion, for a test framework.
RUNNER_MEGABYTES = 1024
TESTS = "tests"


class Runner:
    """Runs tests against the names of a completion.

    Args:
        results: Text stream for the results, a line of JSON each.
        peer: Connection to the completion.
        names: Public names of the completion.
        entry_point: Name of the function that ``check(candidate)`` gets.
    """

    def __init__(self, results, peer, names, entry_point):
        self._results, self._peer, self._names = results, peer, names
        self._candidate = names.get(entry_point)
        self._module = None
        self._reset()

    def run(self, source, kind):
        """Run one test, or the tests of a module, and report each that passes with at least one assertion."""
        reason = ""
        try:
            if kind != "statements" or self._module is None:
                self._module = self._new_module()
            self._reset()
            if kind != "doctest":
                self._execute(source)
            if kind != "statements":
                self._reset()
                getattr(self, f"_run_{kind}")(self._module, source)
        except BaseException as error:  # exits and interrupts included
            reason = f"{type(error).__name__}: {error}"
        if reason or kind not in ("module", "pytest"):
            self.report(reason)

    def report(self, reason="", **more):
        """Report a test as failed for a reason, or as passed if there is none."""
        reason = self._peer.lost or reason or self._failure or ("" if self._assertions else "no assertion ran")
        self._results.write(json.dumps(more or {"passed": not reason, "reason": reason[:500]}) + "\n")
        self._results.flush()

    def _reset(self):
        self._assertions, self._failure = 0, ""

    def _count(self):
        self._assertions += 1

    def _fail(self, message=None):
        self._failure = f"AssertionError: {message}"
        return message

    def _new_module(self):
        module = sys.modules[TESTS] = types.ModuleType(TESTS)
        vars(module).update({"candidate": self._candidate, **self._names, "_count_assertion": self._count})
        vars(module)["_failed_assertion"] = self._fail
        return module

    def _execute(self, source):
        """Execute source in the module of the tests. Imported modules that do not exist are the completion."""
        tree = ast.parse(source)
        for node in ast.walk(tree):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                imported, node.level = [node.module], 0
            for name in imported:
                top = name.partition(".")[0]
                if top not in sys.modules and importlib.util.find_spec(top) is None:
                    for part in (top, name):
                        sys.modules[part] = types.ModuleType(part)
                        vars(sys.modules[part]).update(self._names)
        exec(compile(tree, TESTS, "exec"), vars(self._module))

    def _run_doctest(self, module, source):
        test = doctest.DocTestParser().get_doctest(source, vars(module), TESTS, None, 0)
        output = io.StringIO()
        result = doctest.DocTestRunner(verbose=False).run(test, out=output.write)
        self._assertions = sum(bool(example.want) for example in test.examples)
        if result.failed:
            raise AssertionError(output.getvalue())

    def _run_check(self, module, source):
        _call(module.check, self._candidate)

    def _run_module(self, module, source):
        """Run unittest's classes, and the functions and classes that pytest would find, without fixtures."""
        suites: Any = unittest.defaultTestLoader.loadTestsFromModule(module)
        tests = [test for suite in suites for test in suite]
        for name, value in vars(module).items():
            if inspect.isfunction(value) and name.startswith("test"):
                tests.append(unittest.FunctionTestCase(functools.partial(_call, value)))
            elif name.startswith("Test") and isinstance(value, type) and not issubclass(value, unittest.TestCase):
                methods = [method for method in dir(value) if method.startswith("test")]
                tests += [unittest.FunctionTestCase(functools.partial(_call_method, value, name)) for name in methods]
        self.report(total=len(tests))
        for test in tests:
            self._reset()
            result = unittest.TestSuite([test]).run(unittest.TestResult())
            problems = [result.errors, result.failures, result.skipped, result.expectedFailures]
            texts = [text for found in problems for _, text in found] + ["unexpected"] * len(result.unexpectedSuccesses)
            self.report(str(texts[0])[-500:] if texts else "")

    def _run_pytest(self, module, source):
        """Let pytest collect and run a module that exists only in memory."""
        import pytest

        class Module(pytest.Module):
            def _getobj(self):
                return module

        class Plugin:
            @staticmethod
            def pytest_pycollect_makemodule(module_path, parent):
                return Module.from_parent(parent, path=module_path)

            @staticmethod
            def pytest_collection_finish(session):
                self.report(total=len(session.items))

            @staticmethod
            def pytest_runtest_setup(item):
                self._reset()

            @staticmethod
            def pytest_pyfunc_call(pyfuncitem):
                if inspect.iscoroutinefunction(pyfuncitem.obj):
                    _call(pyfuncitem.obj, **{name: pyfuncitem.funcargs[name] for name in pyfuncitem.fixturenames})
                    return True

            @staticmethod
            def pytest_runtest_logreport(report):
                failed[report.nodeid] = failed.get(report.nodeid, "") or (
                    "" if report.passed and not hasattr(report, "wasxfail") else str(report.longrepr or "expected")
                )
                if report.when == "teardown":
                    self.report(failed[report.nodeid])

        failed = {}
        file = Path("test_row.py")
        file.touch()
        words = ["-p", "no:cacheprovider", "--noconftest", "-c", os.devnull, "--rootdir", ".", "--confcutdir", "."]
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        pytest.main([*words, "--capture=sys", "-q", "test_row.py"], plugins=[Plugin])


def _call(function, *args, **kwargs):
    result = function(*args, **kwargs)
    if inspect.iscoroutine(result):
        asyncio.run(result)


def _call_method(kind, name):
    """Call a method of a pytest class between its setup and teardown."""
    instance = kind()
    for hook in ("setup_class", "setup_method", name, "teardown_method", "teardown_class"):
        function = getattr(instance, hook, lambda: None)
        _call(function, *[None for _ in inspect.signature(function).parameters])


def serve_completion(peer, operation, target, name="", /, *values, **kwargs):
    """Serve a request of the completion, which is not trusted: it may use the objects that tests passed to it.

    Functions can be called, and other objects be read with operators. Public attributes exist only for objects of
    classes that the tests define, and of in-memory files.
    """
    if operation == "input":
        return input(target)
    passed = peer.owns(target) and not isinstance(target, unittest.TestCase)
    own = passed and type(target).__module__ in (TESTS, "_io")
    if operation == "special" and name in SPECIAL and (own or (passed and name not in ("__setitem__", "__delitem__"))):
        return getattr(type(target), name)(target, *values, **kwargs)
    if operation in ("getattr", "setattr") and own and not name.startswith("_"):
        return {"getattr": getattr, "setattr": setattr}[operation](target, name, *values)
    raise PermissionError(f"the completion may not use '{name}' of {type(target).__name__}")


def exported(names, sources, entry_point):
    """Return the names of a completion that tests see: none that hide a builtin or a module that the tests use."""
    hidden = set(dir(builtins)) | {name for name in [*sys.stdlib_module_names, "np", "pytest"] if f"{name}." in sources}
    own = [name for name, value in names.items() if isinstance(value, Remote) and name not in typing.__all__]
    for name in own:
        vars(names[name])["_aliases"].add(name)
    kept = {name for name in names if name not in hidden or isinstance(names[name], types.ModuleType)}
    return {name: names[name] for name in kept | {entry_point} & set(names) | set(own if len(own) == 1 else ())}


def watch(deadline, megabytes, isolated):
    """End this process and its descendants at the deadline, or if they exceed the limits together."""
    own = psutil.Process()
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if isolated and len(psutil.pids()) > MAX_PROCESSES:
            break
        sizes = []
        for process in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                sizes.append(process.memory_info().rss)  # 0 if it has ended
        files = [] if isolated else list(_file_sizes("."))  # its file system has the limits
        if sum(map(bool, sizes)) > MAX_PROCESSES or sum(sizes) > megabytes << 20:
            break
        if len(files) > MAX_FILES or sum(files) > MAX_TOTAL_BYTES:
            break
    end(1)


def _file_sizes(folder):
    for parent, folders, names in os.walk(folder):
        for name in folders + names:
            with contextlib.suppress(OSError):
                yield os.lstat(os.path.join(parent, name)).st_size


def _limit_processes():
    """Limit the processes of this PID namespace: by user, which does not hold for root, and by namespace."""
    import resource

    resource.setrlimit(resource.RLIMIT_NPROC, (4 * MAX_PROCESSES, 4 * MAX_PROCESSES))  # threads count
    if [int(part) for part in platform.release().split(".")[:2]] >= [6, 14]:  # before, the limit is of the machine
        with contextlib.suppress(OSError):
            Path("/proc/sys/kernel/pid_max").write_text("301")  # the smallest that the kernel allows


def end(status):
    """Kill all descendants, also those in sessions of their own, and exit. The kernel does it for process 1."""
    children = [psutil.Process()] if os.getpid() != 1 else []
    while children:
        children = [child for child in psutil.Process().children(recursive=True) if _is_running(child)]
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
    os._exit(status)


def _is_running(process):
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def main():
    """Run the request on standard input."""
    request = json.load(sys.stdin.buffer)
    results, nowhere = os.fdopen(os.dup(1), "w"), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    results.write("{}\n")  # the process has started
    results.flush()
    folder, megabytes, seconds = os.getcwd(), request["megabytes"], request["cpu_seconds"]
    if sys.platform.startswith("linux"):
        import ctypes

        libc = ctypes.CDLL(None)
        libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no other process reads this one's memory
        libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans stay descendants
        if request["isolated"]:
            options = f"size={MAX_TOTAL_BYTES},nr_inodes={MAX_FILES},mode=700".encode()
            libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options)
            libc.mount(os.fsencode(folder), b"/dev/shm", None, 4096, None)  # MS_BIND
            os.chdir(folder)
            _limit_processes()
    confine(folder, seconds + 10, megabytes + RUNNER_MEGABYTES)
    threading.Thread(
        target=watch,
        args=(time.monotonic() + request["wall_seconds"], megabytes + 256, request["isolated"]),
        daemon=True,
    ).start()
    child = os.path.join(os.path.dirname(__file__), "unit_tests_child.py")
    words = [sys.executable, "-I", "-B", "-X", "utf8", child, folder, str(seconds), str(megabytes)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, **pipes)
    peer = Peer(process.stdout, process.stdin, serve_completion, guards=True)
    cases, entry_point = request["cases"], request["entry_point"]
    runner = Runner(results, peer, {}, "")
    try:
        names = peer.request("load", request["code"])
        sources = "\n".join(case["source"] for case in cases)
        runner = Runner(results, peer, exported(names, sources, entry_point), entry_point)
    except BaseException as error:
        for _ in cases:
            runner.report(f"the code does not run: {type(error).__name__}: {error}")
        end(0)
    for case in cases:
        runner.run(**case)
    end(0)


if __name__ == "__main__":
    main()
