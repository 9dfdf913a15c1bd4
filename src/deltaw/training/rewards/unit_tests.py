"""The reward ``unit-tests``: a completion's code, run with tests in a process with limits.

The limits are of processor time, memory, the size of files and of time waited; the process gets none of the environment
and an empty folder, which is removed, and it is killed with what it started. That bounds accidents. It is no sandbox:
the code can read files that the user can read, and reach the network.
"""

from __future__ import annotations

import ast
import json
import os
import re
import secrets
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
from deltaw.training.rewards.worker import end

_FENCED = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_CHILD = Path(__file__).with_name("unit_tests_child.py")
_COLUMN = "tests"
# What is read of the process's answer, a short line for each test.
_MOST_BYTES = 1 << 20


def unit_tests(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """The share of a row's tests that pass, or 1 where all do; None for a row without tests.

    Raises:
        ValueError: a row's tests are not Python, or neither a text nor a list of texts.
    """
    wanted = [settings.tests or one.columns.get(settings.column or _COLUMN) for one in given]
    asked = [
        (code_of(one.text), [] if tests is None else cases(tests)) for one, tests in zip(given, wanted, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = list(pool.map(partial(_passed, settings), asked))
    shares = [None if not tests else count / len(tests) for count, (_, tests) in zip(passed, asked, strict=True)]
    return [share if share is None or not settings.all_tests else float(share == 1) for share in shares]


def code_of(text: str) -> str:
    """A completion's last block of code, or all of it where it has none."""
    blocks = _FENCED.findall(text)
    return blocks[-1] if blocks else text


def cases(tests: Any) -> list[str]:
    """Tests as texts that each pass or fail: the entries of a list; of one text its functions ``test_…``, else its
    ``assert`` statements, else it as a whole.

    Raises:
        ValueError: it is not Python, or of another type.
    """
    if isinstance(tests, list) and all(isinstance(test, str) for test in tests):
        return tests
    if not isinstance(tests, str):
        raise ValueError("tests must be a text or a list of texts")
    try:
        body = ast.parse(tests).body
    except SyntaxError as error:
        raise ValueError(f"the tests are not Python: {error}") from error
    functions = [part.name for part in body if isinstance(part, ast.FunctionDef) and part.name.startswith("test_")]
    if functions:
        return [f"{tests}\n{name}()" for name in functions]
    found: list[str] = []
    before: list[ast.stmt] = []
    for part in body:
        if isinstance(part, ast.Assert):
            found.append(ast.unparse(ast.Module([*before, part], [])))
        else:
            before.append(part)
    return found or [tests]


def _passed(settings: RewardFunction, asked: tuple[str, list[str]]) -> int:
    """How many tests pass; those that come after one that ends the process do not."""
    code, tests = asked
    if not tests:
        return 0
    token = secrets.token_hex(16)  # what the code prints is not taken for a test that passed
    limits = {name: getattr(settings, name) for name in ("cpu_seconds", "wall_seconds", "megabytes")}
    request = json.dumps({"code": code, "tests": tests, "token": token, **limits}).encode()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as answer:
        environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        environment |= {key: os.environ[key] for key in ("SYSTEMROOT",) if key in os.environ}  # Windows needs it
        words = [sys.executable, "-I", "-B", "-X", "utf8", os.fspath(_CHILD)]
        how: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": answer, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(words, cwd=folder, env=environment, start_new_session=os.name != "nt", **how)
        try:
            process.communicate(request, timeout=settings.wall_seconds)
        except subprocess.TimeoutExpired:
            return _counted(answer, token)
        finally:
            end(process)
        return _counted(answer, token)


def _counted(answer: Any, token: str) -> int:
    answer.seek(0)
    lines = answer.read(_MOST_BYTES).decode("ascii", "replace").splitlines()
    return len({line for line in lines if line.startswith(token)})
