"""Chat template rendering as in transformers, with limits on time, memory and output length.

Chat templates are untrusted programs of a model or an adapter.
"""

from __future__ import annotations

import datetime
import functools
import json
import operator
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import BuiltinMethodType
from typing import TYPE_CHECKING, Any, cast

import jinja2
import numpy as np
from jinja2 import Environment, TemplateSyntaxError, nodes, pass_context, pass_eval_context
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from deltaw import platforms
from deltaw.data.messages import REASONING
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Extensions of Jinja that transformers provides to chat templates.


class TemplateLimitError(UserError):
    """A chat template exceeds the limits of a rendering."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the chat template was stopped: {reason}",
            location="the chat template",
            hint="set data.template: plain, or name another template in data.chat_template",
        )


class Attributes(Namespace):
    """Result of ``namespace()`` in a template, without nested namespaces, so that its size is that of its values.

    As in transformers, names with a leading underscore are rejected.
    """

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}")
        if isinstance(value, Namespace):
            raise TemplateLimitError("it puts a namespace into another")
        super().__setitem__(name, value)


class Dictionary:
    """``dict`` in a template."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class GenerationTag(Extension):
    """``{% generation %}``, which marks the assistant's text. Its content is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

    def content(self, caller: Callable[[], str]) -> str:
        return caller()


# Instrumentation of a template's syntax tree with cost accounting.
#
# Each body that can run repeatedly starts with the filter ``step``. Sums, products, comparisons and literals become
# filters that charge an estimated cost and then compute the same value. Filter names start with a space, so that
# templates cannot call them.

COPIED = 8
"""Number of copied characters that cost one step."""

_SHORT = 64  # maximum size of a constant, or of a list of constants, that costs one step
_OF_CALLS = ("varargs", "kwargs")  # additional arguments of a macro call


class _RenderBudget(NodeTransformer):
    """Inserts charges, which are filters of ``environment``, into a template's syntax tree."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._captured = False  # True if the output becomes a value in the template

    def visit_For(self, node: nodes.For) -> nodes.Node:
        step = None if node.test is None else self._step([node.test], node.lineno)
        self._body(node, captured=self._captured or node.recursive)
        if step is not None and node.test is not None:
            node.test = self._at_line(nodes.And(step, node.test), node.lineno)
        return node

    def _body(self, node: Any, captured: bool = True) -> nodes.Node:
        steps = self._step(node.body, node.lineno)
        previous, self._captured = self._captured, captured
        self.generic_visit(node)
        self._captured = previous
        node.body.insert(0, nodes.ExprStmt(steps).set_lineno(node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_AssignBlock = visit_FilterBlock = visit_Block = _body

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        if self._captured:
            node.nodes = [p if isinstance(p, nodes.TemplateData) else self._limit("copied", p) for p in node.nodes]
        return node

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        if self._captured and node.ctx == "load" and node.name in _OF_CALLS:
            raise TemplateSyntaxError(f"'{node.name}' is not available in a chat template", node.lineno)
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        line, operand, terms = node.lineno, node.left, [self.visit(node.right)]
        while isinstance(operand, nodes.Add):
            terms.append(self.visit(operand.right))
            operand = operand.left
        return self._of("added", [self.visit(operand), *terms[::-1]], line)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return self._of("joined", [self.visit(part) for part in node.nodes], node.lineno)

    def _pair(self, name: str, node: nodes.BinExpr) -> nodes.Node:
        return self._of(name, [self.visit(node.left), self.visit(node.right)], node.lineno)

    visit_Sub = functools.partialmethod(_pair, "minus")
    visit_Mul = functools.partialmethod(_pair, "times")
    visit_Pow = functools.partialmethod(_pair, "power")
    visit_Mod = functools.partialmethod(_pair, "modulo")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        if len(node.ops) == 1:
            first, op, right = node.expr, node.ops[0].op, node.ops[0].expr
            if not _is_short(right) and not (_is_short(first) and op not in ("in", "notin")):
                return self._of(op, [self.visit(first), self.visit(right)], node.lineno)
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
        return self._limit("charge_value", node)

    visit_List = visit_Tuple = visit_Dict = _literal

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._limit("sliced", node) if isinstance(node.arg, nodes.Slice) else node

    def _step(self, body: list[Any], line: int) -> nodes.Expr:
        """Return the charge for one run of a body, excluding the charges inside it."""
        parts = [*body, *(inner for part in body for inner in part.find_all(nodes.Node))]
        text = sum(len(part.data) for part in parts if isinstance(part, nodes.TemplateData))
        return self._limit("step", self._at_line(nodes.Const(1 + len(parts) + text // COPIED), line))

    def _of(self, name: str, values: list[nodes.Expr], line: int) -> nodes.Expr:
        return self._limit(name, self._at_line(nodes.List(values), line))

    def _limit(self, name: str, value: nodes.Expr) -> nodes.Expr:
        return self._at_line(nodes.Filter(value, f" {name}", [], [], None, None), value.lineno)

    def _at_line(self, node: Any, line: int) -> Any:
        return node.set_lineno(line).set_environment(self._environment)


def _is_short(node: nodes.Node) -> bool:
    """Return True if a value is a short literal."""
    if isinstance(node, nodes.Const):
        return not isinstance(node.value, str) or len(node.value) <= _SHORT
    if isinstance(node, nodes.List | nodes.Tuple):
        return len(node.items) <= _SHORT and all(isinstance(item, nodes.Const) for item in node.items)
    return isinstance(node, nodes.Dict) and not node.items


# Jinja's sandbox with a step budget.
#
# The sandbox restricts the values and functions that a template can access, but does not limit loops, recursion and
# text sizes. Each loop, macro and block, and each operation, comparison, filter and call whose cost depends on its
# values is therefore charged to a budget before it runs. Rendering stops when the budget is exceeded, deterministically
# on every machine. Values are immutable in the sandbox, so that a container is charged once, when it is created.
# Filters and functions that chat templates do not need are removed.

STEPS, STEPS_PER_MESSAGE, STEPS_PER_CHARACTER = 1 << 22, 1 << 14, 16
"""Budget of a rendering: a constant, plus amounts per message (or other mapping) and per input character. A step is
an operation, a list element, :data:`COPIED` copied characters or :data:`_READ` compared characters."""

_READ = 1024
_BITS = 4096  # maximum size of an integer
_WIDTH = 9999  # maximum width of a format field
# Wider fields, and fields of computed width, for ``%`` and for ``str.format``.
_WIDE_PERCENT = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*(?:\d{5}|\*)")
_WIDE_BRACES = re.compile(r"\{[^{}]*(?:\d{5}|\{)")
_TOO_MANY_STEPS = "it exceeds the step limit for a conversation of this length"
_FILTERS = """
    abs attr capitalize count d default dictsort e escape first float forceescape format indent int items join
    last length list lower map max min reject rejectattr replace reverse round safe select selectattr sort
    string title trim truncate unique upper wordcount
"""
# Filters that instrumented templates call. Each is a method of the environment.
_CHARGES = ("step", "charge_value", "sliced", "copied", "added", "joined", "minus", "times", "power", "modulo", "read")
_CONSTANT = ("count", "d", "default", "first", "last", "length")  # filters with constant cost
_NO_METHODS = frozenset(("encode", "expandtabs", "format_map", "from_bytes", "maketrans", "to_bytes", "translate"))
_COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "gt")
} | {"lteq": operator.le, "gteq": operator.ge}
_COMPARED |= {"in": lambda left, right: left in right, "notin": lambda left, right: left not in right}


_SIZED = (str, list, tuple, dict)
_SAFE = (str, int, float, bool, Attributes, LoopContext)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, configured as in transformers, with a step budget for each rendering.

    Args:
        functions: Additional functions for templates.
    """

    def __init__(self, **functions: Callable[..., Any]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self.start_budget(0, 0)
        self._builtin_filters = {name: self.filters[name] for name in _FILTERS.split()}
        charged = {name: self._with_charge(self.filters[name]) for name in _FILTERS.split() if name not in _CONSTANT}
        self.filters = self._builtin_filters | charged
        replaced = ("format", "int", "join", "indent", "replace", "round", "tojson")
        self.filters |= {name: getattr(self, f"_{name}") for name in replaced}
        # Names with a leading space cannot be written in a template.
        self.filters |= {f" {name}": getattr(self, f"_{name}") for name in _CHARGES}
        for name in _COMPARED:
            self.filters[f" {name}"] = functools.partial(self._compared, name)
        tests: dict[str, Any] = {
            name: lambda left, right, operation=operation: self._compared(operation, [left, right])
            for name, operation in _TESTS.items()
        }
        of_case: dict[str, Any] = {name: self.tests[name] for name in ("upper", "lower")}
        self.tests |= tests | {name: self._with_charge(test) for name, test in of_case.items()}
        defaults = {"range": self.globals["range"], "dict": Dictionary(), "namespace": self._namespace}
        self.globals = {**defaults, **functions}

    def start_budget(self, messages: int, characters: int) -> None:
        """Start a rendering with this number of messages (or other mappings) and characters in its input."""
        self._remaining = STEPS + STEPS_PER_MESSAGE * messages + STEPS_PER_CHARACTER * characters

    def instrument(self, text: str) -> nodes.Template:
        """Parse a template and insert charges.

        Raises:
            TemplateSyntaxError: if it is not a Jinja template, or uses an unsupported feature.
        """
        return cast("nodes.Template", _RenderBudget(self).visit(self.parse(text)))

    # The budget

    def _pay(self, steps: int) -> None:
        self._remaining -= steps
        if self._remaining < 0:
            raise TemplateLimitError(_TOO_MANY_STEPS)

    def _weight(self, value: Any) -> tuple[int, int]:
        """Return the approximate number of characters of a value's text, and the nesting depth of its containers."""
        if type(value) is str:
            return len(value), 0
        total, depth, limit = 0, 0, self._remaining * COPIED
        level = [value]
        while level:
            inner: list[Any] = []
            for item in level:
                if isinstance(item, str):
                    total += len(item)
                elif isinstance(item, dict):
                    total += 2 * COPIED * len(item)
                    inner += item.values()
                    total += sum(len(key) for key in item if isinstance(key, str))
                elif isinstance(item, list | tuple):
                    total += COPIED * len(item)
                    inner += item
                elif isinstance(item, Namespace):
                    raise TemplateLimitError("it puts a namespace into a list")
                if total > limit:
                    raise TemplateLimitError(_TOO_MANY_STEPS)
            level, depth = inner, depth + 1
        return total, depth

    def _charge_value(self, value: Any) -> Any:
        """Charge for the creation of a value."""
        kind = type(value)
        if kind is str:
            self._pay(1 + len(value) // COPIED)
        elif kind is int:
            self._check_bits(value.bit_length())
        elif kind is not bool and isinstance(value, _SIZED):
            self._pay(1 + self._weight(value)[0] // COPIED)
        return value

    def _counted(self, items: Any) -> Any:
        """Charge for iterating over items: at once if they have a length, else one by one."""
        if isinstance(items, str):
            self._pay(1 + len(items) // COPIED)
            return items
        if hasattr(items, "__len__"):
            self._pay(1 + len(items))
            return items
        return map(self._passed, items) if hasattr(items, "__next__") else items

    def _passed(self, item: Any) -> Any:
        self._pay(1)
        return item

    # Filters of instrumented templates

    @pass_context  # prevents constant folding when the template is compiled
    def _step(self, context: Context, steps: int) -> bool:
        self._pay(steps)
        return True

    def _sliced(self, value: Any) -> Any:
        """Charge for a slice of existing elements."""
        if hasattr(value, "__len__"):
            self._pay(1 + len(value) // COPIED)
        return value

    def _copied(self, value: Any) -> Any:
        """Charge for writing a value as text."""
        return self._joined([value])

    def _added(self, values: list[Any]) -> Any:
        if all(type(value) is str for value in values):
            return self._joined(values)
        total = values[0]
        for value in values[1:]:
            total = self._charge_value(total + value)
        return total

    def _joined(self, values: list[Any]) -> str:
        texts = [value if type(value) is str else str(value) for value in values]
        self._pay(1 + sum(map(len, texts)) // COPIED)
        return "".join(texts)

    def _minus(self, pair: list[Any]) -> Any:
        return self._charge_value(pair[0] - pair[1])

    def _times(self, pair: list[Any]) -> Any:
        for value, count in (pair, pair[::-1]):
            if isinstance(value, str | list | tuple) and isinstance(count, int):
                self._pay(self._weight(value)[0] * max(count, 0) // COPIED)
        self._check_bits(sum(value.bit_length() for value in pair if isinstance(value, int)))
        return pair[0] * pair[1]

    def _power(self, pair: list[Any]) -> Any:
        if all(isinstance(value, int) for value in pair):
            self._check_bits(pair[0].bit_length() * pair[1])
        return pair[0] ** pair[1]

    def _modulo(self, pair: list[Any]) -> Any:
        if isinstance(pair[0], str):
            self._pay_format(pair[0], pair[1] if isinstance(pair[1], tuple) else (pair[1],))
        return pair[0] % pair[1]

    def _check_bits(self, bits: int) -> None:
        if bits > _BITS:
            raise TemplateLimitError("it computes with very long numbers")

    def _compared(self, name: str, pair: list[Any]) -> Any:
        first, second = pair
        if name in ("in", "notin"):
            if isinstance(second, str):
                self._pay(1 + len(second) // _READ)
            elif isinstance(second, list | tuple):
                self._pay(1 + len(second) * (1 + self._size(first)))
            else:
                second = self._counted(second)
        elif isinstance(first, _SIZED) and isinstance(second, _SIZED):
            self._pay(1 + min(self._size(first), self._size(second)))
        return _COMPARED[name](first, second)

    def _read(self, value: Any) -> Any:
        self._pay(1 + self._size(value))
        return value

    def _size(self, value: Any) -> int:
        """Return the number of steps for reading an entire value."""
        if isinstance(value, str):
            return len(value) // _READ
        return self._weight(value)[0] // COPIED if isinstance(value, list | tuple | dict) else 0

    # Filters and functions

    def _with_charge(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter to charge by the size of its input."""
        position = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            value = args[position]
            counted = self._counted(value)
            if counted is not value:
                args = (*args[:position], counted, *args[position + 1 :])
            result = function(*args, **kwargs)
            if type(result) is str and type(value) is str and len(result) <= len(value):
                return result  # charged with the input
            return self._charge_value(result)

        return measured

    @pass_eval_context
    def _join(self, context: EvalContext, value: Any, d: str = "", attribute: Any = None) -> Any:
        def paid() -> Iterator[Any]:
            for item in value:
                self._pay(1 + (self._weight(item)[0] + len(str(d))) // COPIED)
                yield item

        return self._builtin_filters["join"](context, paid(), d, attribute)

    @pass_eval_context
    def _replace(self, context: EvalContext, s: Any, old: Any, new: Any, count: int | None = None) -> Any:
        text = s if isinstance(s, str) else str(s)
        self._pay_replace(text, str(old), str(new))
        return self._builtin_filters["replace"](context, text, old, new, count)

    def _indent(self, s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> Any:
        wide = width if isinstance(width, int) else len(str(width))
        self._pay((len(s) + (s.count("\n") + 2) * max(wide, 0)) // COPIED)
        return self._builtin_filters["indent"](s, width, first, blank)

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        self._pay_format(str(value), (*args, *kwargs.values()))
        return self._builtin_filters["format"](value, *args, **kwargs)

    def _int(self, value: Any, default: int = 0, base: int = 10) -> Any:
        if isinstance(value, str) and len(value) > _BITS:
            raise TemplateLimitError("it computes with very long numbers")
        return self._builtin_filters["int"](value, default, base)

    def _round(self, value: Any, precision: int = 0, method: Any = "common") -> Any:
        self._check_bits(abs(precision) * 4)
        return self._builtin_filters["round"](value, precision, method)

    def _tojson(
        self, x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """Serialize as in transformers: without HTML escapes, with the options of ``json.dumps``."""
        weight, depth = self._weight(x)
        wide = indent if isinstance(indent, int) else len(indent or "")
        between = sum(len(text) for text in separators or ())
        self._pay((weight + weight // COPIED * (max(wide, 0) * depth + between)) // COPIED)
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def _namespace(self, /, *args: Any, **kwargs: Any) -> Attributes:
        namespace = Attributes()
        for name, value in self._charge_value(dict(*args, **kwargs)).items():
            namespace[name] = value
        return namespace

    def _pay_replace(self, text: str, old: str, new: str) -> None:
        self._pay(1 + (len(text) + text.count(old) * len(new)) // COPIED)

    def _pay_format(self, form: str, values: tuple[Any, ...], *, braces: bool = False) -> None:
        """Charge for formatting, assuming the maximum field width (:data:`_WIDTH`) and any value in each field.

        Args:
            braces: True for ``str.format``, False for ``%``.
        """
        bare = form.replace("{{", "").replace("}}", "") if braces else form.replace("%%", "")
        if (_WIDE_BRACES if braces else _WIDE_PERCENT).search(bare):
            raise TemplateLimitError("it uses a very wide format field, or one of a computed width")
        fields = bare.count("{" if braces else "%")
        self._pay(1 + (len(form) + fields * (_WIDTH + self._weight(values)[0])) // COPIED)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Apply the sandbox's rule, with a shortcut for common types, and reject methods of unknown cost."""
        if attr in _NO_METHODS:
            return False
        return not attr.startswith("_") if type(obj) in _SAFE else super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method, charging string methods in advance."""
        if type(obj) is not BuiltinMethodType:
            if getattr(obj, "__name__", "") == "format" and hasattr(obj, "__wrapped__"):
                self._pay_format(obj.__wrapped__.__self__, (*args, *kwargs.values()), braces=True)
            self._pay(1)
            return self._charge_value(super().call(context, obj, *args, **kwargs))
        # A method of a built-in type, which the sandbox checked when the attribute was looked up.
        owner, name = obj.__self__, obj.__name__
        if isinstance(owner, str):
            args = self._pay_method(owner, name, args)
        result = context.call(obj, *args, **kwargs)
        return result if name == "get" else self._charge_value(result)

    def _pay_method(self, text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Charge for the call of a string method and return its arguments."""
        if name == "replace" and len(args) >= 2 and all(isinstance(part, str) for part in args[:2]):
            self._pay_replace(text, args[0], args[1])
        elif name == "join" and args:
            parts = list(self._counted(args[0]))
            self._pay(sum(len(part) + len(text) for part in parts if isinstance(part, str)) // COPIED)
            return (parts, *args[1:])
        elif name in ("split", "rsplit", "splitlines"):
            between = args[0] if args and isinstance(args[0], str) and args[0] else None
            self._pay(1 + (len(text) // 4 if between is None else COPIED * text.count(between)))
        elif name in ("center", "ljust", "rjust", "zfill") and args and isinstance(args[0], int):
            self._pay((len(text) + max(args[0], 0)) // COPIED)
        else:
            self._pay(1 + len(text) // _READ)
        return args


# Jinja's names of comparison tests.
_TESTS = {
    **dict.fromkeys(("eq", "equalto", "=="), "eq"),
    **dict.fromkeys(("ne", "!="), "ne"),
    **dict.fromkeys(("lt", "lessthan", "<"), "lt"),
    **dict.fromkeys(("le", "<="), "lteq"),
    **dict.fromkeys(("gt", "greaterthan", ">"), "gt"),
    **dict.fromkeys(("ge", ">="), "gteq"),
    "in": "in",
}


MAX_TEMPLATE_CHARS = 1 << 18
"""Maximum number of characters of a template. Published templates have up to 30,000."""
OUTPUT, OUTPUT_PER_CHARACTER = 1 << 20, 8
"""Maximum number of output characters: a constant, plus an amount per input character."""
_PYTHON_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)
FAULTS = (jinja2.TemplateError, *_PYTHON_FAULTS)
"""Errors that templates raise for unsupported conversations, in addition to :class:`TemplateLimitError`."""

_MAX_DATE_FORMAT = 1000  # characters


def render_conversation(
    template: str,
    messages: Sequence[Mapping[str, object]],
    *,
    generation: bool,
    tools: Sequence[Mapping[str, object]] = (),
    variables: Mapping[str, object],
) -> str:
    """Render a conversation. Thread-safe.

    Args:
        template: Jinja template, as in transformers.
        generation: Append the prefix of the assistant's turn (``add_generation_prompt``).
        tools: Function definitions.
        variables: Additional variables, for example the special tokens by name.

    Raises:
        TemplateLimitError: if the template exceeds a limit.
        Exception: one of :data:`FAULTS`.
    """
    compiled = _compiled(template)
    if isinstance(compiled, Exception):
        raise compiled.with_traceback(None)  # a cached error would otherwise accumulate tracebacks
    environment, program, lock = compiled
    size = [0, 0]
    context = {key: _plain(value, size) for key, value in variables.items()}
    context["messages"] = [_with_reasoning(_plain(message, size)) for message in messages]
    context["tools"] = [_plain(tool, size) for tool in tools] or None
    context |= {"documents": None, "add_generation_prompt": generation}
    remaining = OUTPUT + OUTPUT_PER_CHARACTER * size[1]
    pieces: list[str] = []
    with lock:
        environment.start_budget(*size)
        for piece in program.generate(context):
            remaining -= len(piece)
            if remaining < 0:
                raise TemplateLimitError("its output exceeds the limit for a conversation of this length")
            pieces.append(piece)
    return "".join(pieces)


def render_with_tokenizer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, object]], *, generation: bool
) -> str:
    """Render a conversation with the tokenizer's default template, as ``apply_chat_template`` does.

    Raises:
        Exception: see :func:`render_conversation`. ValueError if the tokenizer has several templates and no default.
    """
    template = tokenizer.get_chat_template()
    return render_conversation(template, messages, generation=generation, variables=tokenizer.special_tokens_map)


@functools.lru_cache(maxsize=64)
def _compiled(text: str) -> tuple[LimitedEnvironment, jinja2.Template, threading.Lock] | Exception:
    """Return the compiled template with its environment and the lock of its budget, or the error."""
    try:
        if len(text) > MAX_TEMPLATE_CHARS:
            raise TemplateLimitError(f"it has {len(text):,} characters, more than the limit of {MAX_TEMPLATE_CHARS:,}")
        environment = LimitedEnvironment(raise_exception=_raise, strftime_now=_now)
        return environment, environment.from_string(environment.instrument(text)), threading.Lock()
    except (jinja2.TemplateError, TemplateLimitError) as error:
        return error
    except (*FAULTS, SyntaxError) as error:  # from compiling the generated Python code
        return jinja2.TemplateSyntaxError(f"it cannot be compiled ({type(error).__name__}: {error})", 1)


def _plain(value: Any, size: list[int]) -> Any:
    """Convert a value to JSON types, as transformers does.

    Args:
        size: Number of mappings and number of characters, both increased by those of the value.
    """
    if value is None or type(value) in (int, float, bool):
        return value
    if isinstance(value, str):
        size[1] += len(value)
        return str.__str__(value)
    if isinstance(value, Mapping):
        size[0] += 1
        return {_plain(key, size): _plain(item, size) for key, item in value.items()}
    if isinstance(value, list | tuple):
        size[1] += len(value)
        items = [_plain(item, size) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic):
        return _plain(value.item(), size)
    for number in (int, float):
        if isinstance(value, number):
            return number(value)
    return f"<{type(value).__name__}>"


def _with_reasoning(message: Any) -> Any:
    """Return the message with its reasoning under all keys that templates read, if transformers does the same."""
    if not isinstance(message, dict):
        raise TypeError(f"a message of a conversation is a dictionary, not {message!r}")
    text = next((message[key] for key in REASONING if message.get(key) is not None), None)
    if text is None or not _fills_reasoning():
        return message
    return {"thinking": text, **message, "reasoning_content": text}


@functools.cache
def _fills_reasoning() -> bool:
    """Return True if this version of transformers sets ``reasoning_content``."""
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation: Any = [[{"role": "assistant", "thinking": "yes"}]]
    result: Any = render_jinja_template(conversation, chat_template="{{ messages[0].reasoning_content }}")
    return str(result[0][0]) == "yes"


def _raise(message: str) -> None:
    """``raise_exception`` in a template."""
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    """``strftime_now`` in a template."""
    if len(format) > _MAX_DATE_FORMAT:
        raise TemplateLimitError("its date format is too long")
    return format_date(datetime.datetime.now(), format)


def format_date(moment: datetime.datetime, format: str) -> str:
    """Format a date with ``strftime``. ``%-d`` and similar codes also work on Windows.

    Raises:
        jinja2.TemplateError: if the platform does not support the format.
    """
    try:
        if platforms.WINDOWS:
            format = re.sub("%%|%-", lambda match: match[0].replace("-", "#"), format)
        return moment.strftime(format)
    except ValueError as error:
        raise jinja2.TemplateError(f"its date format '{format}' cannot be used: {error}") from error
