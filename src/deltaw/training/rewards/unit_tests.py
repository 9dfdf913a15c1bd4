"""The reward ``unit-tests``: the share of a row's tests that a completion's code passes.

The tests run in a process with limits (``unit_tests_runner.py``), and the code in another one
(``unit_tests_child.py``), so that it has neither the tests nor a way to report results. :func:`missing_isolation` says
what the system does not prevent.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from deltaw.task_settings import RewardFunction
from deltaw.training.rewards.base import Scored
from deltaw.training.rewards.unit_test_cases import Case, cases
from deltaw.training.rewards.unit_tests_child import landlock_version
from deltaw.training.rewards.worker import end

_FENCED = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_RUNNER = Path(__file__).with_name("unit_tests_runner.py")
_COLUMN, _ENTRY_POINT = "tests", "entry_point"
_MAX_BYTES = 1 << 20
# Seconds in which the runner ends its processes by itself, before it is killed.
_GRACE = 5.0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
_UNSHARE = ("--pid", "--fork", "--mount-proc", "--net", "--ipc", "--uts", "--kill-child")
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_logger = logging.getLogger(__name__)
_warned: set[str] = set()


def unit_tests(settings: RewardFunction, completions: Sequence[Scored]) -> list[float | None]:
    """Return the share of a row's tests that pass, or 1 if all do and 0 otherwise; None for a row without tests.

    Raises:
        ValueError: if the tests of a row are invalid, or none of their assertions can run.
    """
    if (missing := missing_isolation()) and missing not in _warned:
        _logger.warning("unit-tests: the code under test can %s: docs/reward.md", missing)
        _warned.add(missing)
    columns = [settings.tests or completion.columns.get(settings.column or _COLUMN) for completion in completions]
    suites = [None if tests is None else cases(tests) for tests in columns]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shares = list(pool.map(partial(_share, settings), completions, suites))
    return [share if share is None or not settings.all_tests else float(share == 1) for share in shares]


def code_of(text: str) -> str:
    """Return the last block of code of a text that defines something, or its last block, or all of it without blocks.

    What a model thinks aloud before ``</think>`` is not part of the text.
    """
    text = text.rpartition("</think>")[2]
    blocks = _FENCED.findall(text)
    return next((block for block in reversed(blocks) if _defined(block)), blocks[-1] if blocks else text)


def program(prompt: str, completion: str) -> str:
    """Return the code to test. If the prompt ends with a function without a body, the completion may be the body."""
    code, prefix = code_of(completion), code_of(prompt)
    stub = _parsed(prefix)
    last = stub[-1] if stub else None
    if not isinstance(last, ast.FunctionDef | ast.AsyncFunctionDef) or not all(map(_is_empty, last.body)):
        return code
    if _defined(code):
        return ast.unparse(ast.Module(stub[:-1], [])) + "\n" + code
    for source in (f"{prefix.rstrip()}\n{code}", f"{prefix.rstrip()}\n    {code.lstrip()}"):
        body = _parsed(source)
        if len(body) >= len(stub) and len(getattr(body[len(stub) - 1], "body", ())) > len(last.body):
            return source
    return code


def missing_isolation() -> str:
    """Return what the tested code can do on this machine for lack of isolation; empty if nothing."""
    version = landlock_version()
    dangers = {
        "read your files": version < 1,
        "write your files": version < 1,
        "use the network": not _namespaces(),
        "signal your processes": not _namespaces() and version < 6,
    }
    return ", ".join(danger for danger, possible in dangers.items() if possible)


@functools.cache
def _namespaces() -> list[str]:
    """Return the command that runs a program in namespaces of its own; empty if the system does not allow that."""
    for user in (["--map-root-user"], []):
        command = ["unshare", *user, *_UNSHARE]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run([*command, "true"], capture_output=True, timeout=30).returncode == 0:
                return command
    return []


def _share(settings: RewardFunction, completion: Scored, tests: list[Case] | None) -> float | None:
    """Return the share of tests that pass. Tests after one that ends the process fail."""
    if tests is None:
        return None
    code = program(completion.prompt, completion.text)
    names = [name for name in _defined(code) if not name.startswith("_")]
    request: dict[str, Any] = {name: getattr(settings, name) for name in ("cpu_seconds", "wall_seconds", "megabytes")}
    request |= {
        "code": code,
        "cases": [{"source": case.source, "kind": case.kind} for case in tests],
        "isolated": bool(_namespaces()),
    }
    request["entry_point"] = completion.columns.get(_ENTRY_POINT) or (names or [""])[-1]
    # A function that is named like a builtin may be the one to test, or replace one that the tests use: both must pass.
    hiding = [name for name in names if name in dir(builtins) and any(name in case.source for case in tests)]
    variants: list[list[str]] = [names] if len(names) == 1 else [[], names] if hiding else [[]]
    return min(_variant_share(request | {"defined": defined}, tests, completion.row) for defined in variants)


def _variant_share(request: dict[str, Any], tests: list[Case], row: int) -> float:
    """Return the share of tests that pass in one run of the code; 0 if the results are not those of the runner."""
    results = _results(json.dumps(request).encode(), request["wall_seconds"] + _GRACE)
    for result in results:
        if result.get("reason"):
            _logger.info("row %s: a test failed: %s", row, result["reason"])
    total = sum(case.kind != "pytest" for case in tests) + sum(result.get("total", 0) for result in results)
    passed = sum(result.get("passed") is True for result in results)
    return passed / total if 0 < passed <= total else 0.0


def _results(request: bytes, seconds: float) -> list[dict[str, Any]]:
    """Return the lines that the runner reports until it exits or ``seconds`` have passed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as output:
        environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, **_ENVIRONMENT}
        environment |= {key: os.environ[key] for key in ("SYSTEMROOT",) if key in os.environ}  # Windows needs it
        command = [*_namespaces(), sys.executable, "-I", "-B", "-X", "utf8", os.fspath(_RUNNER)]
        options: Any = {"cwd": folder, "env": environment, "start_new_session": os.name != "nt"}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, **options)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(request, timeout=seconds)
        finally:
            end(process)
        output.seek(0)
        lines = output.read(_MAX_BYTES).decode("utf-8", "replace").split("\n")[:-1]
    if not lines:
        raise RuntimeError("the process that runs tests did not start")
    try:
        return [dict(json.loads(line)) for line in lines]
    except (ValueError, TypeError):  # the runner writes JSON only
        return [{"reason": "the results are not valid"}]


def _parsed(code: str) -> list[ast.stmt]:
    """Return the statements of code; empty if it is not Python."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.parse(code).body
    return []


def _is_empty(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _defined(code: str) -> list[str]:
    return [node.name for node in _parsed(code) if isinstance(node, _Definition)]
