"""Jinja's sandbox with an account: whatever makes a rendering long or large is paid for, up to a limit.

The sandbox keeps a template from reading and calling what it must not. It lets one loop, recurse and multiply
texts without end. Here a template is compiled with a payment in each loop, macro and block, and in every
operation, comparison, filter and call whose cost depends on its values. Costs are estimated before the work
is done, and an account that is overdrawn ends the rendering, on every machine at the same place. Values
cannot be changed in the sandbox, so what a container holds is paid for when it is made. Filters and functions
that no chat template needs do not exist.

It knows Jinja; not conversations.
"""

from __future__ import annotations

import functools
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinMethodType
from typing import Any

from jinja2 import nodes, pass_context, pass_eval_context
from jinja2.ext import loopcontrols
from jinja2.nodes import EvalContext
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from deltaw.data.template_language import Attributes, Dictionary, GenerationTag, TemplateLimitError
from deltaw.data.template_payments import COPIED, with_payments

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
_CONSTANT = ("count", "d", "default", "first", "last", "length")  # whose cost does not depend on the value
_NO_METHODS = frozenset(
    ("encode", "expandtabs", "format_map", "from_bytes", "maketrans", "to_bytes", "translate")
)
_COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
    "in": lambda left, right: left in right,
    "notin": lambda left, right: left not in right,
}


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
            name: function if name in _CONSTANT else self._measured(function)
            for name, function in self._own.items()
        }
        self.filters |= {"format": self._format, "int": self._int, "join": self._join}
        self.filters |= {"indent": self._indent, "replace": self._replace, "round": self._round}
        self.filters["tojson"] = self._tojson
        limits: dict[str, Callable[..., Any]] = {
            "step": self._step,
            "made": self._copy,
            "sliced": self._sliced,
            "copied": self._copied,
            "added": self._added,
            "joined": self._joined,
            "minus": self._minus,
            "times": self._times,
            "power": self._power,
            "modulo": self._modulo,
            "read": self._read,
        }
        # Under names that no template can write.
        self.filters |= {f" {name}": function for name, function in limits.items()}
        for name in _COMPARED:
            self.filters[f" {name}"] = functools.partial(self._compared, name)
        tests: dict[str, Any] = {name: functools.partial(self._tested, how) for name, how in _TESTS.items()}
        for name in ("upper", "lower"):
            tests[name] = self._measured(self.tests[name])  # type: ignore[arg-type]
        self.tests |= tests
        kept = {"range": self.globals["range"], "dict": Dictionary(), "namespace": self._namespace}
        self.globals = {**kept, **functions}

    def open_account(self, messages: int, characters: int) -> None:
        """Begin a rendering of so many messages, or other mappings, with so many characters."""
        self._left = STEPS + STEPS_A_MESSAGE * messages + STEPS_A_CHARACTER * characters

    def limited(self, text: str) -> nodes.Template:
        """A template's source with payments in it.

        Raises:
            TemplateSyntaxError: it is no Jinja.
        """
        return with_payments(self.parse(text), self)

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

    def _copy(self, value: Any) -> Any:
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
        return self._one_by_one(items) if hasattr(items, "__next__") else items

    def _one_by_one(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._pay(1)
            yield item

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
        if type(value) is not str:
            value = str(value)
        self._pay(1 + len(value) // COPIED)
        return value

    def _added(self, values: list[Any]) -> Any:
        size = 0
        for value in values:
            if type(value) is not str:
                break
            size += len(value)
        else:
            self._pay(1 + size // COPIED)
            return "".join(values)
        total = values[0]
        for value in values[1:]:
            total = self._copy(total + value)
        return total

    def _joined(self, values: list[Any]) -> str:
        texts = [value if type(value) is str else str(value) for value in values]
        self._pay(1 + sum(map(len, texts)) // COPIED)
        return "".join(texts)

    def _minus(self, pair: list[Any]) -> Any:
        return self._copy(pair[0] - pair[1])

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

    def _tested(self, name: str, left: Any, right: Any) -> Any:
        return self._compared(name, [left, right])

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
            return self._copy(result)

        return measured

    @pass_eval_context
    def _join(self, context: EvalContext, value: Any, d: str = "", attribute: Any = None) -> Any:
        between = len(str(d))

        def paid() -> Iterator[Any]:
            for item in value:
                self._pay(1 + (self._weight(item)[0] + between) // COPIED)
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
        self,
        x: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers has it: not made for HTML, with the options of ``json.dumps``."""
        weight, depth = self._weight(x)
        wide = indent if isinstance(indent, int) else len(indent or "")
        between = sum(len(text) for text in separators or ())
        self._pay((weight + weight // COPIED * (max(wide, 0) * depth + between)) // COPIED)
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def _namespace(self, /, *args: Any, **kwargs: Any) -> Attributes:
        made = Attributes()
        for name, value in self._copy(dict(*args, **kwargs)).items():
            made[name] = value
        return made

    def _pay_replace(self, text: str, old: str, new: str) -> None:
        self._pay(1 + (len(text) + text.count(old) * len(new)) // COPIED)

    def _pay_format(self, form: str, values: tuple[Any, ...], *, braces: bool = False) -> None:
        """Fields with a width of up to :data:`_WIDTH`, each with any of the values.

        Args:
            braces: whether they are those of ``str.format``, not of ``%``.
        """
        if braces:
            bare, wide = form.replace("{{", "").replace("}}", ""), _WIDE_BRACES
        else:
            bare, wide = form.replace("%%", ""), _WIDE_PERCENT
        if wide.search(bare):
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
            return self._copy(super().call(context, obj, *args, **kwargs))
        # A method of Python's own values; the sandbox saw to it when its name was looked up.
        owner, name = obj.__self__, obj.__name__
        if isinstance(owner, str):
            args = self._pay_method(owner, name, args)
        result = context.call(obj, *args, **kwargs)
        return result if name == "get" else self._copy(result)

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
