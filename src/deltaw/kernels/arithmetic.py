"""How products are computed: for each type that weights are stored in, one of four ways.

``dot``: the instruction set's own product of that type, such as a multiply-add of fp32 or the dot product of
bf16 or int8. ``wide``: bf16 weights are widened to fp32 while they are laid out, and multiplied as fp32.
``tiles``: AMX.
``torch``: torch's operators, where the compiled kernels would be slower; attention, norms and the rest stay
compiled. Each rounds differently, so a run writes down which it used.

Knows a library's answers and numbers; not which library is in use (``loader.py``), and nothing of speed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from deltaw.errors import UserError
from deltaw.kernels.variants import ARITHMETICS, VARIABLE

# The types of stored weights, by the kernels' own numbers.
STORED = ("fp32", "bf16", "int8")
TORCH = "torch"
# What may be computed approximately in training, by the field that says whether it is. None of it is on
# unless a run verified it; see :mod:`deltaw.training.approximations`.
APPROXIMATIONS = ("int8_gradients", "int8_logits", "summed_classes")
# What promises most where nothing was measured comes first.
_BY_PROMISE = ("tiles", "dot", "wide")


@dataclass(frozen=True)
class Arithmetic:
    """How a process computes.

    Attributes:
        kernels: the name of the variant; None without compiled kernels.
        fp32, bf16, int8: how products with weights of the type are computed; names of ARITHMETICS.
        int8_gradients: whether the gradients of inputs of layers with frozen bf16 weights come from int8
            products; see ``in_int8`` of :func:`deltaw.kernels.linear.linear_backward`.
        int8_logits: whether logits of a frozen head come from int8 products, those of likely classes computed
            once more where that is worth its while.
        summed_classes: whether a frozen head's gradient is summed over rows where classes are unlikely; see
            :func:`deltaw.kernels.head_gradient.head_gradient_`.
    """

    kernels: str | None = None
    fp32: str = TORCH
    bf16: str = TORCH
    int8: str = TORCH
    int8_gradients: bool = False
    int8_logits: bool = False
    summed_classes: bool = False

    @property
    def approximations(self) -> tuple[str, ...]:
        """Those of APPROXIMATIONS that are on."""
        return tuple(name for name in APPROXIMATIONS if getattr(self, name))

    def approximating(self, names: Iterable[str]) -> Arithmetic:
        """The same with these approximations on, and no others."""
        wanted = set(names)
        return replace(self, **{name: name in wanted for name in APPROXIMATIONS})  # type: ignore[arg-type]

    def of(self, stored: str) -> str:
        """How products with weights stored as ``stored`` are computed."""
        return str(getattr(self, stored))

    def but(self, ways: Mapping[str, str]) -> Arithmetic:
        """The same with other ways for some types."""
        return replace(self, **ways)  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, str]:
        """Plain values, ready for JSON."""
        said = {None: "none", True: "yes", False: "no"}
        return {name: said.get(value, value) for name, value in asdict(self).items()}

    @classmethod
    def read(cls, values: Mapping[str, object]) -> Arithmetic:
        """What :meth:`as_dict` gave.

        Raises:
            ValueError: the values are no arithmetic.
        """
        found = {name: values.get(name) for name in ("kernels", *STORED)}
        if any(found[stored] not in ARITHMETICS for stored in STORED) or not isinstance(found["kernels"], str):
            raise ValueError(f"no arithmetic: {dict(values)}")
        kernels = None if found["kernels"] == "none" else str(found["kernels"])
        exact = cls(kernels).but({s: str(found[s]) for s in STORED})
        return exact.approximating(name for name in APPROXIMATIONS if values.get(name) == "yes")


def offered(library: ctypes.CDLL, stored: str) -> tuple[str, ...]:
    """The ways that a library has of computing products with weights of a type; its first is its default."""
    ways = library.dw_arithmetics(STORED.index(stored))
    return tuple(name for name in _BY_PROMISE if ways >> ARITHMETICS.index(name) & 1)


def default_of(kernels: str, library: ctypes.CDLL, forced: str | None = None) -> Arithmetic:
    """What a library computes with where nothing was measured: ``forced`` for the types that have it, else
    its own default.

    Raises:
        UserError: no type has what is forced.
    """
    ways = {stored: (*offered(library, stored), TORCH) for stored in STORED}
    if forced is not None and not any(forced in of for of in ways.values()):
        known = sorted({way for of in ways.values() for way in of})
        what = f"kernels '{kernels}' have no arithmetic '{forced}'"
        raise UserError(what, where=VARIABLE, hint=f"they have {', '.join(known)}")
    return Arithmetic(kernels).but({s: forced if forced in of else of[0] for s, of in ways.items()})


def tell(library: ctypes.CDLL, arithmetic: Arithmetic) -> None:
    """Have a library compute so from now on.

    Raises:
        ValueError: it cannot.
    """
    for number, stored in enumerate(STORED):
        way = arithmetic.of(stored)
        if way not in (TORCH, *offered(library, stored)):
            raise ValueError(f"kernels '{arithmetic.kernels}' do not compute {stored} by '{way}'")
        if way != TORCH:
            library.dw_set_arithmetic(number, ARITHMETICS.index(way))
