"""Splits the tests of a row into test cases, and marks their assertions so that the runner can count them."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

_COUNT = ast.Expr(ast.Call(ast.Name("_count_assertion", ast.Load()), [], []))
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Case:
    """One test of a row, or a module whose tests the runner collects (``module``, ``pytest``).

    Attributes:
        source: Python. Each of its assertions is followed by a call of ``_count_assertion``.
        kind: How it is run.
    """

    source: str
    kind: Literal["statements", "check", "doctest", "module", "pytest"]

    @property
    def is_collection(self) -> bool:
        """True if the runner reports the number of tests."""
        return self.kind in ("module", "pytest")


def cases(tests: Any) -> list[Case]:
    """Return the test cases of a text or a list of texts.

    Each entry of a list is a case, unless an entry defines functions: then the list is read like one text. The cases of
    a text are its functions ``test…``, its methods ``test…``, its function ``check(candidate)``, or its top-level
    statements that contain assertions.

    Raises:
        ValueError: if the tests are not Python, are of another type, contain no assertion, or need pytest, which is not
            installed.
    """
    texts = [tests] if isinstance(tests, str) else tests
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("tests must be a text or a list of texts")
    if isinstance(tests, str) and (doctests := _doctests(tests)):
        return doctests
    try:
        entries = [ast.parse(text).body for text in texts]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests are not Python: {error}") from error
    statements = [statement for entry in entries for statement in entry]
    if isinstance(tests, str) or any(isinstance(node, _Function | ast.ClassDef) for node in statements):
        split = _module_cases(statements)
    else:
        split = _statement_cases(entries, set())
    if not split:
        raise ValueError("no assertion runs in the tests")
    return split


def _doctests(text: str) -> list[Case]:
    """Return ``>>>`` examples with expected output as a case; nothing if the text is a module with code."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        if not all(isinstance(node, ast.Expr) for node in ast.parse(text).body):
            return []
    with contextlib.suppress(ValueError):
        if any(example.want for example in doctest.DocTestParser().get_examples(text)):
            return [Case(text, "doctest")]
    return []


def _module_cases(statements: list[ast.stmt]) -> list[Case]:
    """Return the cases of a module: its test functions and methods, its function ``check``, or its statements."""
    guards = [node for node in statements if isinstance(node, ast.If) and _is_main_guard(node)]
    guarded = [part for node in guards for part in node.body]
    statements = [node for node in statements if not _is_main_guard(node)]
    nodes = [node for part in statements for node in ast.walk(part)]
    tests = [node for node in nodes if isinstance(node, _Function) and node.name.startswith("test")]
    helpers = {node.name for node in statements if isinstance(node, _Function) and _asserts(node)}
    check = next((node for node in statements if isinstance(node, _Function) and node.name == "check"), None)
    if tests:
        for test in tests:
            if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(test)):
                raise ValueError(f"the test '{test.name}' is a generator, so no assertion runs")
        names = {test.name for test in tests}
        source = _counted([node for node in statements if not _starts_tests(node, names)])
        kind: Literal["check", "module", "pytest"] = "pytest" if _uses_pytest(nodes, tests) else "module"
        if kind == "pytest" and importlib.util.find_spec("pytest") is None:
            raise ValueError("the tests need pytest: pip install 'deltaw[reward]'")
    elif check and len(check.args.args) == 1 and not any(_calls(node, {"check"}) for node in [*statements, *guarded]):
        source, kind = _counted(statements), "check"
    else:
        return _statement_cases([[node] for node in [*statements, *guarded]], helpers)
    return [Case(source, kind)] if source else []


def _statement_cases(entries: Sequence[list[ast.stmt]], helpers: set[str]) -> list[Case]:
    """Return a case for each entry with assertions, preceded by entries without. All are run in one module."""
    grouped: list[Case] = []
    setup: list[ast.stmt] = []
    for entry in entries:
        defines = all(isinstance(node, _Function | ast.ClassDef) for node in entry)
        if not defines and any(_asserts(node) or _calls(node, helpers) for node in entry):
            grouped.append(Case(_counted([*setup, *entry]), "statements"))
            setup = []
        else:
            setup += entry
    return grouped


def _uses_pytest(nodes: list[ast.AST], tests: list[ast.FunctionDef | ast.AsyncFunctionDef]) -> bool:
    """Return True if the module imports pytest, or its tests take fixtures."""
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
    for test in tests:
        required = [argument.arg for argument in test.args.args if argument.arg not in ("self", "cls")]
        if len(required) > len(test.args.defaults) and not test.decorator_list:
            return True
    return "pytest" in names


class _Counter(ast.NodeTransformer):
    """Adds a call of ``_count_assertion`` behind each assertion, and one of ``_failed_assertion`` to each message.

    Python evaluates the message if an assertion fails, even if something catches the AssertionError.
    """

    def __init__(self) -> None:
        self.count = 0

    def visit(self, node: ast.AST) -> Any:
        node = self.generic_visit(node)
        if isinstance(node, ast.Assert):
            node.msg = ast.Call(ast.Name("_failed_assertion", ast.Load()), [node.msg] if node.msg else [], [])
        if not _is_assertion(node):
            return node
        self.count += 1
        return [node, _COUNT]


def _counted(statements: list[ast.stmt]) -> str:
    """Return the source of statements with their assertions counted; empty if there are none."""
    counter = _Counter()
    module = counter.visit(ast.parse(ast.unparse(ast.Module(statements, []))))
    return ast.unparse(module) if counter.count else ""


def _asserts(node: ast.AST) -> bool:
    return any(map(_is_assertion, ast.walk(node)))


def _is_assertion(node: ast.AST) -> bool:
    """Return True for a statement that checks something when it runs: constants check nothing."""
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


def _starts_tests(node: ast.stmt, names: set[str]) -> bool:
    """Return True for a statement that runs the tests itself, as ``unittest.main()`` does."""
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and (_name(call.func) in names or _name(call.func) == "main")
