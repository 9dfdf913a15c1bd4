"""Splits the tests of a row into test cases, and marks their assertions so that the runner can count them."""

from __future__ import annotations

import ast
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
    """One test of a row, or all tests of a module that pytest runs.

    Attributes:
        source: The module. Each of its assertions is followed by a call of ``_count_assertion``.
        kind: How the module is run.
        name: The function, or "class.method".
    """

    source: str
    kind: Literal["statements", "function", "method", "check", "doctest", "pytest"]
    name: str = ""


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
    if any(re.match(r"\s*>>> ", line) for line in texts[0].split("\n")) if len(texts) == 1 else False:
        found = _doctests(texts[0])
        if found:
            return found
    try:
        entries = [ast.parse(text).body for text in texts]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests are not Python: {error}") from error
    statements = [statement for entry in entries for statement in entry]
    if isinstance(tests, str) or any(isinstance(node, _Function | ast.ClassDef) for node in statements):
        found = _module_cases(statements)
    else:
        found = _statement_cases(entries, set())
    if not found:
        raise ValueError("no assertion runs in the tests")
    return found


def _doctests(text: str) -> list[Case]:
    """Return a text of ``>>>`` examples with expected output as a case; nothing if the text is a module instead."""
    with_code = [node for node in _parse_or_nothing(text) if not isinstance(node, ast.Expr)]
    examples = [] if with_code else doctest.DocTestParser().get_examples(text)
    return [Case(text, "doctest")] if any(example.want for example in examples) else []


def _parse_or_nothing(text: str) -> list[ast.stmt]:
    try:
        return ast.parse(text).body
    except (SyntaxError, ValueError):
        return []


def _module_cases(statements: list[ast.stmt]) -> list[Case]:
    """Return the cases of a module by its functions and classes, or else by its statements."""
    guarded = [part for node in statements if _is_main_guard(node) for part in node.body]
    statements = [node for node in statements if not _is_main_guard(node)]
    functions = [node for node in statements if isinstance(node, _Function)]
    tests = [node for node in functions if node.name.startswith("test") and not _is_fixture(node)]
    methods = list(_methods([node for node in statements if isinstance(node, ast.ClassDef)]))
    for function in [*tests, *(method for _, method in methods)]:
        if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(function)):
            raise ValueError(f"the test '{function.name}' is a generator, so no assertion runs")
    if tests or methods:
        names = {node.name for node in tests}
        source = _counted([node for node in statements if not _starts_tests(node, names)])
        if not source:
            return []
        if _uses_pytest(statements, tests, [method for _, method in methods]):
            if importlib.util.find_spec("pytest") is None:
                raise ValueError("the tests need pytest: pip install 'deltaw[reward]'")
            return [Case(source, "pytest")]
        return [Case(source, "function", node.name) for node in tests] + [
            Case(source, "method", f"{name}.{method.name}") for name, method in methods
        ]
    everything = [*statements, *guarded]
    called = {
        node.func.id
        for part in everything
        for node in ast.walk(part)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    for function in functions:
        if function.name == "check" and len(function.args.args) == 1 and "check" not in called:
            source = _counted(statements)
            return [Case(source, "check", "check")] if source else []
    helpers = {node.name for node in functions if _asserts(node)}
    return _statement_cases([[node] for node in everything], helpers)


def _statement_cases(entries: Sequence[list[ast.stmt]], helpers: set[str]) -> list[Case]:
    """Return a case for each entry with assertions, preceded by entries without. All are run in one module."""
    found: list[Case] = []
    setup: list[ast.stmt] = []
    for entry in entries:
        defines = all(isinstance(node, _Function | ast.ClassDef) for node in entry)
        if not defines and any(_asserts(node) or _calls(node, helpers) for node in entry):
            found.append(Case(_counted([*setup, *entry]), "statements"))
            setup = []
        else:
            setup += entry
    return found


def _methods(classes: list[ast.ClassDef]) -> Sequence[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Return the test methods of unittest's and pytest's classes, with the name of the class."""
    found, collected = [], dict[str, dict[str, Any]]()
    for node in classes:
        bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        own = {part.name: part for part in node.body if isinstance(part, _Function) and part.name.startswith("test")}
        inherited = {name: part for base in bases for name, part in collected.get(base, {}).items()}
        is_test = node.name.startswith("Test") or any(base.endswith("TestCase") or base in collected for base in bases)
        if is_test:
            collected[node.name] = inherited | own
            found += [(node.name, part) for part in collected[node.name].values()]
    return found


def _uses_pytest(statements: list[ast.stmt], functions: Sequence[Any], methods: Sequence[Any]) -> bool:
    """Return True if the tests import pytest or take fixtures."""
    imported = [
        getattr(node, "module", None) or alias.name
        for part in statements
        for node in ast.walk(part)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    takes = [len(node.args.args) - len(node.args.defaults) for node in functions]
    takes += [len(node.args.args) - len(node.args.defaults) - 1 for node in methods if not node.decorator_list]
    return "pytest" in imported or any(count > 0 for count in takes)


class _Counter(ast.NodeTransformer):
    """Adds a call of ``_count_assertion`` behind each assertion."""

    def __init__(self) -> None:
        self.count = 0

    def visit(self, node: ast.AST) -> Any:
        node = self.generic_visit(node)
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
    if isinstance(node, ast.Expr | ast.Return | ast.Assign):
        value = node.value.value if isinstance(node.value, ast.Await) else node.value
        return isinstance(node, ast.Expr) and _is_check(value)
    if isinstance(node, ast.With | ast.AsyncWith):
        return any(_is_check(item.context_expr) for item in node.items)
    if isinstance(node, ast.If):
        return any(map(_fails, [*node.body, *node.orelse]))
    if isinstance(node, ast.Try):
        return any(map(_fails, [*node.body, *node.orelse]))
    return False


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


def _is_fixture(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list)


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _starts_tests(node: ast.stmt, names: set[str]) -> bool:
    """Return True for a statement that runs the tests itself, as ``unittest.main()`` does."""
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and (_name(call.func) in names or _name(call.func) == "main")
