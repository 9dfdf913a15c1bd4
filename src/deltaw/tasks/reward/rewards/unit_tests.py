"""The reward ``unit-tests``: the share of a row's tests that the code of a completion passes.

The tests run in a process with limits (``unit_tests_runner.py``), and the code in a second process
(``unit_tests_child.py``) that can neither access the tests nor report results. :func:`missing_isolation` lists the
protections that the system does not provide.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import doctest
import functools
import importlib.util
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from deltaw.child_process import run_command
from deltaw.tasks.reward.rewards.functions import Completion
from deltaw.tasks.reward.rewards.unit_tests_child import landlock_version
from deltaw.tasks.reward.settings import RewardFunction

_COUNT = ast.Expr(ast.Call(ast.Name("_count_assertion", ast.Load()), [], []))
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class Case(NamedTuple):
    """One test of a row, or a module whose tests pytest collects.

    Attributes:
        source: Python. Each of its assertions is followed by a call of ``_count_assertion``.
        kind: How it is run.
    """

    source: str
    kind: Literal["statements", "doctest", "pytest"]


def cases(tests: Any) -> list[Case]:
    """Return the test cases of a text or a list of texts.

    The cases are the functions and methods ``test…``. Without any, each entry of a list or top-level statement of a
    text that contains assertions is a case, and so is a function ``check(candidate)`` that is not called.

    Raises:
        ValueError: if the tests are not Python, are of another type, contain no assertion, or need pytest, which is not
            installed.
    """
    texts = [tests] if isinstance(tests, str) else tests
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("tests must be a text or a list of texts")
    if isinstance(tests, str) and _is_doctest(tests):
        return [Case(tests, "doctest")]
    try:
        entries = [ast.parse(text).body for text in texts]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests are not Python: {error}") from error
    statements = [node for entry in entries for node in entry]
    methods = [part for node in statements for part in (node.body if isinstance(node, ast.ClassDef) else [node])]
    functions = [node for node in methods if isinstance(node, _Function)]
    if test_functions := [node for node in functions if node.name.startswith("test")]:
        split = _pytest_cases(statements, test_functions)
    else:
        if isinstance(tests, str):
            entries = [[part] for node in statements for part in (node.body if _is_main_guard(node) else [node])]
        names = {node.name for node in functions if node in statements and len(node.args.args) == 1}
        if "check" in names and not any(_calls(node, {"check"}) for node in statements):
            entries.append(ast.parse("check(candidate)").body)
        split = _statement_cases(entries, {node.name for node in functions if _asserts(node)})
    if not split:
        raise ValueError("no assertion runs in the tests")
    return split


def _is_doctest(text: str) -> bool:
    """Return True for ``>>>`` examples with expected output, unless they are in a module with code."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        if not all(isinstance(node, ast.Expr) for node in ast.parse(text).body):
            return False
    with contextlib.suppress(ValueError):
        return any(example.want for example in doctest.DocTestParser().get_examples(text))
    return False


def _pytest_cases(statements: list[ast.stmt], functions: list[ast.FunctionDef | ast.AsyncFunctionDef]) -> list[Case]:
    """Return a module with test functions or methods, without calls that run them, as a case."""
    for function in functions:
        if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(function)):
            raise ValueError(f"the test '{function.name}' is a generator, so no assertion runs")
    if importlib.util.find_spec("pytest") is None:
        raise ValueError("the tests need pytest: pip install 'deltaw[reward]'")
    starts = {"main", *(function.name for function in functions)}
    module = [node for node in statements if not (isinstance(node, ast.Expr) and _calls(node, starts))]
    return [Case(_counted(module), "pytest")] if any(map(_asserts, module)) else []


def _statement_cases(entries: Sequence[list[ast.stmt]], helpers: set[str]) -> list[Case]:
    """Return a case for each entry with assertions, preceded by entries without. All are run in one module."""
    grouped: list[Case] = []
    setup: list[ast.stmt] = []
    for entry in entries:
        setup += entry
        defines = all(isinstance(node, _Function | ast.ClassDef) for node in entry)
        if not defines and any(_asserts(node) or _calls(node, helpers) for node in entry):
            grouped.append(Case(_counted(setup), "statements"))
            setup = []
    return grouped


class _Counter(ast.NodeTransformer):
    """Adds a call of ``_count_assertion`` behind each assertion, and one of ``_failed_assertion`` to each message.

    Python evaluates the message if an assertion fails, even if something catches the AssertionError.
    """

    def visit(self, node: ast.AST) -> Any:
        node = self.generic_visit(node)
        if isinstance(node, ast.Assert):
            node.msg = ast.Call(ast.Name("_failed_assertion", ast.Load()), [node.msg] if node.msg else [], [])
        return [node, _COUNT] if _is_assertion(node) else node


def _counted(statements: list[ast.stmt]) -> str:
    """Return the source of statements with their assertions counted."""
    return ast.unparse(_Counter().visit(ast.parse(ast.unparse(ast.Module(statements, [])))))


def _asserts(node: ast.AST) -> bool:
    return any(map(_is_assertion, ast.walk(node)))


def _is_assertion(node: ast.AST) -> bool:
    """Return True for a statement that checks something when it runs: constants have no effect."""
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant)
    if isinstance(node, ast.Expr):
        return _is_check(node.value.value if isinstance(node.value, ast.Await) else node.value)
    if isinstance(node, ast.With | ast.AsyncWith):
        return any(_is_check(item.context_expr) for item in node.items)
    return isinstance(node, ast.If | ast.Try) and any(map(_fails, [*node.body, *node.orelse]))


def _is_check(node: ast.AST) -> bool:
    """Return True for a call such as ``self.assertEqual``, ``numpy.testing.assert_allclose`` or ``pytest.raises``."""
    return isinstance(node, ast.Call) and bool(re.match(r"assert|_?raises$|warns$", _name(node.func)))


def _fails(node: ast.AST) -> bool:
    """Return True for a statement that fails a test whenever it runs."""
    if isinstance(node, ast.Assert):
        return isinstance(node.test, ast.Constant) and not node.test.value
    if isinstance(node, ast.Raise):
        return node.exc is not None
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _name(node.value.func) == "fail"


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _calls(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(part, ast.Call) and _name(part.func) in names for part in ast.walk(node))


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


_FENCED = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_RUNNER = Path(__file__).with_name("unit_tests_runner.py")
_COLUMN = "tests"
_ENTRY_POINT = "entry_point"
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
    code = code_of(completion)
    prefix = code_of(prompt)
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
    can_access_files = version < 1
    can_use_network = not _namespaces()
    dangers = {"read your files": can_access_files, "write your files": can_access_files}
    dangers |= {"use the network": can_use_network, "signal your processes": can_use_network and version < 6}
    return ", ".join(danger for danger, possible in dangers.items() if possible)


@functools.cache
def _namespaces() -> list[str]:
    """Return the command that runs a program in separate namespaces, or an empty list if not permitted."""
    for user in (["--map-root-user"], []):
        command = ["unshare", *user, *_UNSHARE]
        with contextlib.suppress(OSError):
            if run_command([*command, "true"], timeout=30).status == 0:
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
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, **_ENVIRONMENT}
        environment |= {key: os.environ[key] for key in ("SYSTEMROOT",) if key in os.environ}  # Windows needs it
        command = [*_namespaces(), sys.executable, "-I", "-B", "-X", "utf8", os.fspath(_RUNNER)]
        limits: dict[str, Any] = {"timeout": seconds, "max_bytes": _MAX_BYTES}
        result = run_command(command, stdin_bytes=request, environment=environment, folder=Path(folder), **limits)
    lines = result.output.split("\n")[:-1]
    if not lines:
        raise RuntimeError(f"the process that runs tests did not start: {result.messages[-300:]}")
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
