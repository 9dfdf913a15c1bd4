"""Conversations through a chat template as transformers renders them, with limits on time, memory and length.

A chat template is a program that comes with a model or an adapter, so nothing is known of what it does; see
:mod:`deltaw.data.rendering`. It knows conversations as plain values, no tokens.
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


# What a chat template may use besides Jinja's own language, as transformers gives it, and how it is ended.
#
# It knows Jinja; not conversations, nor what anything costs.


class TemplateLimitError(UserError):
    """A chat template does more than a rendering may cost."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the chat template was ended: {what}",
            where="the chat template",
            hint="do without it (data.template: plain), or name one of your own in data.chat_template",
        )


class Attributes(Namespace):
    """What ``namespace()`` gives: as in transformers, without names that begin with an underscore; and
    without another one inside, so that its size is that of its values."""

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
    """``{% generation %}``, which marks the assistant's text: its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("content"), [], [], body).set_lineno(line)

    def content(self, caller: Callable[[], str]) -> str:
        return caller()


# Where a template pays for what it does: its source, with filters of our own put around what costs.
#
# Each body that may be entered more than once begins with ``step``. Sums, products, comparisons and literals
# become filters that estimate the cost and then compute the same. Names of the filters begin with a space, so
# that no template can call them. It knows Jinja's syntax tree; what a step costs is
# :mod:`deltaw.data.rendering`'s.


COPIED = 8
"""Characters that are copied in the time of a step."""

_SHORT = 64  # characters of a constant, and elements of a list of such, that cost no more than a step
_OF_CALLS = ("varargs", "kwargs")  # what a macro was called with besides its parameters


class _Payments(NodeTransformer):
    """Puts the payments into a template's source, which are filters of ``environment``."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._captured = False  # whether what is written becomes a value of the template's

    def visit_For(self, node: nodes.For) -> nodes.Node:
        looked = None if node.test is None else self._step([node.test], node.lineno)
        self._body(node, captured=self._captured or node.recursive)
        if looked is not None and node.test is not None:
            node.test = self._placed(nodes.And(looked, node.test), node.lineno)
        return node

    def _body(self, node: Any, captured: bool = True) -> nodes.Node:
        steps = self._step(node.body, node.lineno)
        before, self._captured = self._captured, captured
        self.generic_visit(node)
        self._captured = before
        node.body.insert(0, nodes.ExprStmt(steps).set_lineno(node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_AssignBlock = visit_FilterBlock = visit_Block = _body

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        if self._captured:
            node.nodes = [
                part if isinstance(part, nodes.TemplateData) else self._limit("copied", part) for part in node.nodes
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

    visit_Sub = functools.partialmethod(_pair, "minus")
    visit_Mul = functools.partialmethod(_pair, "times")
    visit_Pow = functools.partialmethod(_pair, "power")
    visit_Mod = functools.partialmethod(_pair, "modulo")

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
        return self._placed(nodes.Filter(value, f" {name}", [], [], None, None), value.lineno)

    def _placed(self, node: Any, line: int) -> Any:
        return node.set_lineno(line).set_environment(self._environment)


def _is_short(node: nodes.Node) -> bool:
    """Whether a value is written in the template and short."""
    if isinstance(node, nodes.Const):
        return not isinstance(node.value, str) or len(node.value) <= _SHORT
    if isinstance(node, nodes.List | nodes.Tuple):
        return len(node.items) <= _SHORT and all(isinstance(item, nodes.Const) for item in node.items)
    return isinstance(node, nodes.Dict) and not node.items


# Jinja's sandbox with an account: whatever makes a rendering long or large is paid for, up to a limit.
#
# The sandbox keeps a template from reading and calling what it must not. It lets one loop, recurse and multiply
# texts without end. Here a template is compiled with a payment in each loop, macro and block, and in every
# operation, comparison, filter and call whose cost depends on its values. Costs are estimated before the work
# is done, and an account that is overdrawn ends the rendering, on every machine at the same place. Values
# cannot be changed in the sandbox, so what a container holds is paid for when it is made. Filters and functions
# that no chat template needs do not exist.
#
# It knows Jinja; not conversations.


STEPS, STEPS_A_MESSAGE, STEPS_A_CHARACTER = 1 << 22, 1 << 14, 16
"""What a rendering may cost: in any case, and more for each message (or other mapping) and each character
that goes in. A step is an operation, an element of a list, a :data:`COPIED`-th of a character that is copied,
a :data:`_READ`-th of one that is compared."""

_READ = 1024
_BITS = 4096  # of a whole number
_WIDTH = 9999  # the widest field that a format may ask for
# A field that is wider, or of a width that is computed: of ``%``, and of ``str.format``.
_WIDE_PERCENT = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*(?:\d{5}|\*)")
_WIDE_BRACES = re.compile(r"\{[^{}]*(?:\d{5}|\{)")
_TOO_MUCH = "it takes more steps than a conversation of this length may"
_FILTERS = """
    abs attr capitalize count d default dictsort e escape first float forceescape format indent int items join
    last length list lower map max min reject rejectattr replace reverse round safe select selectattr sort
    string title trim truncate unique upper wordcount
"""
# What is put into templates in place of what they say; each is a method of the environment.
_PAYMENTS = ("step", "made", "sliced", "copied", "added", "joined", "minus", "times", "power", "modulo", "read")
_CONSTANT = ("count", "d", "default", "first", "last", "length")  # whose cost does not depend on the value
_NO_METHODS = frozenset(("encode", "expandtabs", "format_map", "from_bytes", "maketrans", "to_bytes", "translate"))
_COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "gt")
} | {"lteq": operator.le, "gteq": operator.ge}
_COMPARED |= {"in": lambda left, right: left in right, "notin": lambda left, right: left not in right}


_SIZED = (str, list, tuple, dict)
_SAFE = (str, int, float, bool, Attributes, LoopContext)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox as transformers sets it up, with an account that renderings pay from.

    Args:
        functions: what templates may call besides what the sandbox gives.
    """

    def __init__(self, **functions: Callable[..., Any]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
        self.open_account(0, 0)
        self._own = {name: self.filters[name] for name in _FILTERS.split()}
        self.filters = {
            name: function if name in _CONSTANT else self._measured(function) for name, function in self._own.items()
        }
        own = ("format", "int", "join", "indent", "replace", "round", "tojson")
        self.filters |= {name: getattr(self, f"_{name}") for name in own}
        # Under names that no template can write.
        self.filters |= {f" {name}": getattr(self, f"_{name}") for name in _PAYMENTS}
        for name in _COMPARED:
            self.filters[f" {name}"] = functools.partial(self._compared, name)
        tests: dict[str, Any] = {
            name: lambda left, right, how=how: self._compared(how, [left, right]) for name, how in _TESTS.items()
        }
        of_case: dict[str, Any] = {name: self.tests[name] for name in ("upper", "lower")}
        self.tests |= tests | {name: self._measured(test) for name, test in of_case.items()}
        kept = {"range": self.globals["range"], "dict": Dictionary(), "namespace": self._namespace}
        self.globals = {**kept, **functions}

    def open_account(self, messages: int, characters: int) -> None:
        """Begin a rendering of so many messages, or other mappings, with so many characters."""
        self._left = STEPS + STEPS_A_MESSAGE * messages + STEPS_A_CHARACTER * characters

    def limited(self, text: str) -> nodes.Template:
        """A template's source with payments in it.

        Raises:
            TemplateSyntaxError: it is no Jinja, or uses what cannot be paid for.
        """
        return cast("nodes.Template", _Payments(self).visit(self.parse(text)))

    # The account

    def _pay(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise TemplateLimitError(_TOO_MUCH)

    def _weight(self, value: Any) -> tuple[int, int]:
        """About how many characters a value takes when it is written out, and how deep its containers go."""
        if type(value) is str:
            return len(value), 0
        total, depth, most = 0, 0, self._left * COPIED
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
                if total > most:
                    raise TemplateLimitError(_TOO_MUCH)
            level, depth = inner, depth + 1
        return total, depth

    def _made(self, value: Any) -> Any:
        """Pay for a value that was made."""
        kind = type(value)
        if kind is str:
            self._pay(1 + len(value) // COPIED)
        elif kind is int:
            self._refuse_bits(value.bit_length())
        elif kind is not bool and isinstance(value, _SIZED):
            self._pay(1 + self._weight(value)[0] // COPIED)
        return value

    def _counted(self, items: Any) -> Any:
        """Items that are paid for: at once where they are there, else one by one."""
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

    # What is put into templates in place of what they say

    @pass_context  # so that it is not done while the template is compiled
    def _step(self, context: Context, steps: int) -> bool:
        self._pay(steps)
        return True

    def _sliced(self, value: Any) -> Any:
        """Pay for a part of a value, whose elements are there already."""
        if hasattr(value, "__len__"):
            self._pay(1 + len(value) // COPIED)
        return value

    def _copied(self, value: Any) -> Any:
        """Pay for a value as the text that it is written as."""
        return self._joined([value])

    def _added(self, values: list[Any]) -> Any:
        if all(type(value) is str for value in values):
            return self._joined(values)
        total = values[0]
        for value in values[1:]:
            total = self._made(total + value)
        return total

    def _joined(self, values: list[Any]) -> str:
        texts = [value if type(value) is str else str(value) for value in values]
        self._pay(1 + sum(map(len, texts)) // COPIED)
        return "".join(texts)

    def _minus(self, pair: list[Any]) -> Any:
        return self._made(pair[0] - pair[1])

    def _times(self, pair: list[Any]) -> Any:
        for value, count in (pair, pair[::-1]):
            if isinstance(value, str | list | tuple) and isinstance(count, int):
                self._pay(self._weight(value)[0] * max(count, 0) // COPIED)
        self._refuse_bits(sum(value.bit_length() for value in pair if isinstance(value, int)))
        return pair[0] * pair[1]

    def _power(self, pair: list[Any]) -> Any:
        if all(isinstance(value, int) for value in pair):
            self._refuse_bits(pair[0].bit_length() * pair[1])
        return pair[0] ** pair[1]

    def _modulo(self, pair: list[Any]) -> Any:
        if isinstance(pair[0], str):
            self._pay_format(pair[0], pair[1] if isinstance(pair[1], tuple) else (pair[1],))
        return pair[0] % pair[1]

    def _refuse_bits(self, bits: int) -> None:
        if bits > _BITS:
            raise TemplateLimitError("it computes with very long numbers")

    def _compared(self, name: str, pair: list[Any]) -> Any:
        left, right = pair
        if name in ("in", "notin"):
            if isinstance(right, str):
                self._pay(1 + len(right) // _READ)
            elif isinstance(right, list | tuple):
                self._pay(1 + len(right) * (1 + self._size(left)))
            else:
                right = self._counted(right)
        elif isinstance(left, _SIZED) and isinstance(right, _SIZED):
            self._pay(1 + min(self._size(left), self._size(right)))
        return _COMPARED[name](left, right)

    def _read(self, value: Any) -> Any:
        self._pay(1 + self._size(value))
        return value

    def _size(self, value: Any) -> int:
        """Steps that reading all of a value takes."""
        if isinstance(value, str):
            return len(value) // _READ
        return self._weight(value)[0] // COPIED if isinstance(value, list | tuple | dict) else 0

    # Filters and functions

    def _measured(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose cost grows as its values do."""
        place = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            value = args[place]
            counted = self._counted(value)
            if counted is not value:
                args = (*args[:place], counted, *args[place + 1 :])
            result = function(*args, **kwargs)
            if type(result) is str and type(value) is str and len(result) <= len(value):
                return result  # paid for with the text that it was made of
            return self._made(result)

        return measured

    @pass_eval_context
    def _join(self, context: EvalContext, value: Any, d: str = "", attribute: Any = None) -> Any:
        def paid() -> Iterator[Any]:
            for item in value:
                self._pay(1 + (self._weight(item)[0] + len(str(d))) // COPIED)
                yield item

        return self._own["join"](context, paid(), d, attribute)

    @pass_eval_context
    def _replace(self, context: EvalContext, s: Any, old: Any, new: Any, count: int | None = None) -> Any:
        text = s if isinstance(s, str) else str(s)
        self._pay_replace(text, str(old), str(new))
        return self._own["replace"](context, text, old, new, count)

    def _indent(self, s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> Any:
        wide = width if isinstance(width, int) else len(str(width))
        self._pay((len(s) + (s.count("\n") + 2) * max(wide, 0)) // COPIED)
        return self._own["indent"](s, width, first, blank)

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        self._pay_format(str(value), (*args, *kwargs.values()))
        return self._own["format"](value, *args, **kwargs)

    def _int(self, value: Any, default: int = 0, base: int = 10) -> Any:
        if isinstance(value, str) and len(value) > _BITS:
            raise TemplateLimitError("it computes with very long numbers")
        return self._own["int"](value, default, base)

    def _round(self, value: Any, precision: int = 0, method: Any = "common") -> Any:
        self._refuse_bits(abs(precision) * 4)
        return self._own["round"](value, precision, method)

    def _tojson(
        self, x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """As transformers has it: not made for HTML, with the options of ``json.dumps``."""
        weight, depth = self._weight(x)
        wide = indent if isinstance(indent, int) else len(indent or "")
        between = sum(len(text) for text in separators or ())
        self._pay((weight + weight // COPIED * (max(wide, 0) * depth + between)) // COPIED)
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def _namespace(self, /, *args: Any, **kwargs: Any) -> Attributes:
        made = Attributes()
        for name, value in self._made(dict(*args, **kwargs)).items():
            made[name] = value
        return made

    def _pay_replace(self, text: str, old: str, new: str) -> None:
        self._pay(1 + (len(text) + text.count(old) * len(new)) // COPIED)

    def _pay_format(self, form: str, values: tuple[Any, ...], *, braces: bool = False) -> None:
        """Fields with a width of up to :data:`_WIDTH`, each with any of the values.

        Args:
            braces: whether they are those of ``str.format``, not of ``%``.
        """
        bare = form.replace("{{", "").replace("}}", "") if braces else form.replace("%%", "")
        if (_WIDE_BRACES if braces else _WIDE_PERCENT).search(bare):
            raise TemplateLimitError("it asks for a very wide field, or for one of a computed width")
        fields = bare.count("{" if braces else "%")
        self._pay(1 + (len(form) + fields * (_WIDTH + self._weight(values)[0])) // COPIED)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As the sandbox has it, which for common values comes to the underscore alone; and no method whose
        cost is not known."""
        if attr in _NO_METHODS:
            return False
        return not attr.startswith("_") if type(obj) in _SAFE else super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls; methods of texts are estimated before."""
        if type(obj) is not BuiltinMethodType:
            if getattr(obj, "__name__", "") == "format" and hasattr(obj, "__wrapped__"):
                self._pay_format(obj.__wrapped__.__self__, (*args, *kwargs.values()), braces=True)
            self._pay(1)
            return self._made(super().call(context, obj, *args, **kwargs))
        # A method of Python's own values; the sandbox saw to it when its name was looked up.
        owner, name = obj.__self__, obj.__name__
        if isinstance(owner, str):
            args = self._pay_method(owner, name, args)
        result = context.call(obj, *args, **kwargs)
        return result if name == "get" else self._made(result)

    def _pay_method(self, text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, once the call of a text's method with them is paid for."""
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


# Jinja's names of comparing tests.
_TESTS = {
    **dict.fromkeys(("eq", "equalto", "=="), "eq"),
    **dict.fromkeys(("ne", "!="), "ne"),
    **dict.fromkeys(("lt", "lessthan", "<"), "lt"),
    **dict.fromkeys(("le", "<="), "lteq"),
    **dict.fromkeys(("gt", "greaterthan", ">"), "gt"),
    **dict.fromkeys(("ge", ">="), "gteq"),
    "in": "in",
}


LONGEST_TEMPLATE = 1 << 18
"""Characters of a template; those of published models have up to thirty thousand."""
OUTPUT, OUTPUT_A_CHARACTER = 1 << 20, 8
"""Characters that a rendering may have, and how many more for each character that goes in."""
FAULTS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError, MemoryError),
)
"""What templates raise on conversations that they are not made for, besides a :class:`TemplateLimitError`."""

_LONGEST_DATE = 1000  # characters of a date's format


def rendered(
    template: str,
    messages: Sequence[Mapping[str, object]],
    *,
    generation: bool,
    tools: Sequence[Mapping[str, object]] = (),
    variables: Mapping[str, object],
) -> str:
    """A conversation as text.

    Args:
        template: Jinja, as transformers takes it.
        generation: whether to go on through what opens the assistant's turn.
        variables: what else the template may use: the special tokens by their names.

    Raises:
        TemplateLimitError: the template costs more than a rendering may.
        Exception: one of :data:`FAULTS`.
    """
    found = _compiled(template)
    if isinstance(found, Exception):
        raise found.with_traceback(None)  # else it would grow each time
    environment, program, lock = found
    size = [0, 0]
    given = {key: _plain(value, size) for key, value in variables.items()}
    given["messages"] = [_with_reasoning(_plain(message, size)) for message in messages]
    given["tools"] = [_plain(tool, size) for tool in tools] or None
    given |= {"documents": None, "add_generation_prompt": generation}
    most = OUTPUT + OUTPUT_A_CHARACTER * size[1]
    pieces: list[str] = []
    with lock:
        environment.open_account(*size)
        for piece in program.generate(given):
            most -= len(piece)
            if most < 0:
                raise TemplateLimitError("it writes more than a conversation of this length may become")
            pieces.append(piece)
    return "".join(pieces)


def rendered_by(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, object]], *, generation: bool
) -> str:
    """A conversation as a tokenizer's ``apply_chat_template`` renders it.

    Raises:
        Exception: as :func:`rendered`, or a ValueError where no template is the tokenizer's default.
    """
    template = tokenizer.get_chat_template()
    return rendered(template, messages, generation=generation, variables=tokenizer.special_tokens_map)


@functools.lru_cache(maxsize=64)
def _compiled(text: str) -> tuple[LimitedEnvironment, jinja2.Template, threading.Lock] | Exception:
    """The template with its environment, whose one account is locked; or why it is none."""
    try:
        if len(text) > LONGEST_TEMPLATE:
            raise TemplateLimitError(f"it has {len(text):,} characters, and {LONGEST_TEMPLATE:,} are the most")
        environment = LimitedEnvironment(raise_exception=_raise, strftime_now=_now)
        return environment, environment.from_string(environment.limited(text)), threading.Lock()
    except (jinja2.TemplateError, TemplateLimitError) as error:
        return error
    except (*FAULTS, SyntaxError) as error:  # what Python makes of Jinja's translation
        return jinja2.TemplateSyntaxError(f"it cannot be compiled ({type(error).__name__}: {error})", 1)


def _plain(value: Any, size: list[int]) -> Any:
    """A value as a template may see it, as in transformers: of JSON's kinds alone.

    Args:
        size: mappings and characters are added to it.
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
        made = [_plain(item, size) for item in value]
        return made if isinstance(value, list) else tuple(made)
    if isinstance(value, np.generic):
        return _plain(value.item(), size)
    for number in (int, float):
        if isinstance(value, number):
            return number(value)
    return f"<{type(value).__name__}>"


def _with_reasoning(message: Any) -> Any:
    """The message with its reasoning under all names that templates read, where transformers does that."""
    if not isinstance(message, dict):
        raise TypeError(f"a message of a conversation is a dictionary, not {message!r}")
    told = next((message[key] for key in REASONING if message.get(key) is not None), None)
    if told is None or not _fills_reasoning():
        return message
    return {"thinking": told, **message, "reasoning_content": told}


@functools.cache
def _fills_reasoning() -> bool:
    """Whether this version of transformers does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    asked: Any = [[{"role": "assistant", "thinking": "yes"}]]
    seen: Any = render_jinja_template(asked, chat_template="{{ messages[0].reasoning_content }}")
    return str(seen[0][0]) == "yes"


def _raise(message: str) -> None:
    """``raise_exception`` in a template."""
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    """``strftime_now`` in a template."""
    if len(format) > _LONGEST_DATE:
        raise TemplateLimitError("it asks for a very long date")
    return dated(datetime.datetime.now(), format)


def dated(moment: datetime.datetime, format: str) -> str:
    """``strftime``; a number without its zeros is written ``%-d``, on Windows too.

    Raises:
        jinja2.TemplateError: the system cannot use the format.
    """
    try:
        if platforms.WINDOWS:
            format = re.sub("%%|%-", lambda found: found[0].replace("-", "#"), format)
        return moment.strftime(format)
    except ValueError as error:
        raise jinja2.TemplateError(f"its date format '{format}' cannot be used: {error}") from error
