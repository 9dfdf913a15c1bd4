"""The reward ``unit-tests``: the share of a row's tests that the code of a completion passes.

The tests run in a process with limits (``unit_tests_runner.py``), and the code in a second process
(``unit_tests_child.py``) that can neither access the tests nor report results. :func:`missing_isolation` lists the
protections that the system does not provide.
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
from deltaw.training.rewards.base import Completion
from deltaw.training.rewards.unit_test_cases import Case, cases
from deltaw.training.rewards.unit_tests_child import landlock_version
from deltaw.training.rewards.worker import kill_process_tree

_FENCED = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_RUNNER = Path(__file__).with_name("unit_tests_runner.py")
_COLUMN, _ENTRY_POINT = "tests", "entry_point"
_MAX_BYTES = 1 << 20
# Seconds for the runner to stop its processes before it is killed.
_GRACE = 5.0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
_UNSHARE = ("--pid", "--fork", "--mount-proc", "--net", "--ipc", "--uts", "--kill-child")
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_logger = logging.getLogger(__name__)
_warned: set[str] = set()


def unit_tests(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
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
    """Return the last code block that defines something, else the last block, else the entire text.

    Reasoning before ``</think>`` is not part of the text.
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
    """Return a list of actions that the system does not prevent for the tested code, or an empty string."""
    version = landlock_version()
    can_access_files, can_use_network = version < 1, not _namespaces()
    dangers = {"read your files": can_access_files, "write your files": can_access_files}
    dangers |= {"use the network": can_use_network, "signal your processes": can_use_network and version < 6}
    return ", ".join(danger for danger, possible in dangers.items() if possible)


@functools.cache
def _namespaces() -> list[str]:
    """Return the command that runs a program in separate namespaces, or an empty list if not permitted."""
    for user in (["--map-root-user"], []):
        command = ["unshare", *user, *_UNSHARE]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run([*command, "true"], capture_output=True, timeout=30).returncode == 0:
                return command
    return []


def _share(settings: RewardFunction, completion: Completion, tests: list[Case] | None) -> float | None:
    """Return the share of tests that pass. If a test ends the process, it and all later tests fail."""
    if tests is None:
        return None
    code = program(completion.prompt, completion.text)
    names = [name for name in _defined(code) if not name.startswith("_")]
    request: dict[str, Any] = {name: getattr(settings, name) for name in ("cpu_seconds", "wall_seconds", "megabytes")}
    cases = [{"source": case.source, "kind": case.kind} for case in tests]
    request |= {"code": code, "cases": cases, "isolated": bool(_namespaces())}
    request["entry_point"] = completion.columns.get(_ENTRY_POINT) or (names or [""])[-1]
    # A function with the name of a builtin may be the tested one, or replace one that the tests use: both must pass.
    hiding = [name for name in names if name in dir(builtins) and any(name in case.source for case in tests)]
    variants: list[list[str]] = [names] if len(names) == 1 else [[], names] if hiding else [[]]
    return min(_variant_share(request | {"defined": defined}, tests, completion.row) for defined in variants)


def _variant_share(request: dict[str, Any], tests: list[Case], row: int) -> float:
    """Return the share of tests that pass in one run of the code, or 0 if the results are not from the runner."""
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
            kill_process_tree(process)
        output.seek(0)
        lines = output.read(_MAX_BYTES).decode("utf-8", "replace").split("\n")[:-1]
    if not lines:
        raise RuntimeError("the process that runs tests did not start")
    try:
        return [dict(json.loads(line)) for line in lines]
    except (ValueError, TypeError):  # the runner writes JSON only
        return [{"reason": "the results are not valid"}]


def _parsed(code: str) -> list[ast.stmt]:
    """Return the statements of code, or an empty list if it is not valid Python."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.parse(code).body
    return []


def _is_empty(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _defined(code: str) -> list[str]:
    return [node.name for node in _parsed(code) if isinstance(node, _Definition)]
