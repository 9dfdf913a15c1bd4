"""Splits the tests of a row into test cases, and marks their assertions so that the runner can count them."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib.util
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

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
