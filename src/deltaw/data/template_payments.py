"""Where a template pays for what it does: its source, with filters of our own put around what costs.

Each body that may be entered more than once begins with ``step``. Sums, products, comparisons and literals
become filters that estimate the cost and then compute the same. Names of the filters begin with a space, so
that no template can call them. It knows Jinja's syntax tree; what a step costs is
:mod:`deltaw.data.template_limits`'s.
"""

from __future__ import annotations

from typing import Any, cast

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.visitor import NodeTransformer

COPIED = 8
"""Characters that are copied in the time of a step."""

_SHORT = 64  # characters of a constant, and elements of a list of such, that cost no more than a step
_OF_CALLS = ("varargs", "kwargs")  # what a macro was called with besides its parameters


def with_payments(tree: nodes.Template, environment: Environment) -> nodes.Template:
    """A template's source with the payments in it, which are filters of ``environment``.

    Raises:
        TemplateSyntaxError: it uses what cannot be paid for.
    """
    return cast("nodes.Template", _Payments(environment).visit(tree))


class _Payments(NodeTransformer):
    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._captured = False  # whether what is written becomes a value of the template's

    def visit_For(self, node: nodes.For) -> nodes.Node:
        steps = self._step(node.body, node.lineno)
        looked = None if node.test is None else self._step([node.test], node.lineno)
        before, self._captured = self._captured, self._captured or node.recursive
        self.generic_visit(node)
        self._captured = before
        node.body.insert(0, nodes.ExprStmt(steps).set_lineno(node.lineno))
        if looked is not None and node.test is not None:
            node.test = self._placed(nodes.And(looked, node.test), node.lineno)
        return node

    def _body(self, node: Any) -> nodes.Node:
        steps = self._step(node.body, node.lineno)
        before, self._captured = self._captured, True
        self.generic_visit(node)
        self._captured = before
        node.body.insert(0, nodes.ExprStmt(steps).set_lineno(node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_AssignBlock = visit_FilterBlock = visit_Block = _body

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        if self._captured:
            node.nodes = [
                part if isinstance(part, nodes.TemplateData) else self._limit("copied", part)
                for part in node.nodes
            ]
        return node

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        if self._captured and node.ctx == "load" and node.name in _OF_CALLS:
            raise TemplateSyntaxError(f"'{node.name}' is not there in a chat template", node.lineno)
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        line, left, terms = node.lineno, node.left, [self.visit(node.right)]
        while isinstance(left, nodes.Add):
            terms.append(self.visit(left.right))
            left = left.left
        return self._of("added", [self.visit(left), *terms[::-1]], line)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return self._of("joined", [self.visit(part) for part in node.nodes], node.lineno)

    def _pair(self, name: str, node: nodes.BinExpr) -> nodes.Node:
        return self._of(name, [self.visit(node.left), self.visit(node.right)], node.lineno)

    def visit_Sub(self, node: nodes.Sub) -> nodes.Node:
        return self._pair("minus", node)

    def visit_Mul(self, node: nodes.Mul) -> nodes.Node:
        return self._pair("times", node)

    def visit_Pow(self, node: nodes.Pow) -> nodes.Node:
        return self._pair("power", node)

    def visit_Mod(self, node: nodes.Mod) -> nodes.Node:
        return self._pair("modulo", node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        if len(node.ops) == 1:
            left, op, right = node.expr, node.ops[0].op, node.ops[0].expr
            if not _is_short(right) and not (_is_short(left) and op not in ("in", "notin")):
                return self._of(op, [self.visit(left), self.visit(right)], node.lineno)
            return self.generic_visit(node)
        self.generic_visit(node)
        node.expr = self._limit("read", node.expr)
        for operand in node.ops:
            operand.expr = self._limit("read", operand.expr)
        return node

    def _literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or _is_short(node):
            return node
        return self._limit("made", node)

    visit_List = visit_Tuple = visit_Dict = _literal

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._limit("sliced", node) if isinstance(node.arg, nodes.Slice) else node

    def _step(self, body: list[Any], line: int) -> nodes.Expr:
        """A payment for what a body does once, besides what is paid for in it."""
        parts = [*body, *(inner for part in body for inner in part.find_all(nodes.Node))]
        text = sum(len(part.data) for part in parts if isinstance(part, nodes.TemplateData))
        return self._limit("step", self._placed(nodes.Const(1 + len(parts) + text // COPIED), line))

    def _of(self, name: str, values: list[nodes.Expr], line: int) -> nodes.Expr:
        return self._limit(name, self._placed(nodes.List(values), line))

    def _limit(self, name: str, value: nodes.Expr) -> nodes.Expr:
        made = nodes.Filter(value, f" {name}", [], [], None, None)
        return self._placed(made, value.lineno)

    def _placed(self, node: Any, line: int) -> Any:
        return node.set_lineno(line).set_environment(self._environment)


def _is_short(node: nodes.Node) -> bool:
    """Whether a value is written in the template and short."""
    if isinstance(node, nodes.Const):
        return not isinstance(node.value, str) or len(node.value) <= _SHORT
    if isinstance(node, nodes.List | nodes.Tuple):
        return len(node.items) <= _SHORT and all(isinstance(item, nodes.Const) for item in node.items)
    return isinstance(node, nodes.Dict) and not node.items
