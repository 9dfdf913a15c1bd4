"""Arithmetic of matrix products, chosen separately for each type of stored weights.

``dot``: the instruction set's product of the type, such as fp32 fused multiply-add or the bf16 or int8 dot product.
``wide``: bf16 weights are converted to fp32 while they are packed, and multiplied as fp32.
``tiles``: AMX.
``torch``: torch's operators, used if the compiled kernels are slower. Attention, norms and the other operators still
use the compiled kernels.

The results differ in rounding, so a run records the arithmetic that it used. The active library is selected in
``loader.py``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from deltaw.errors import UserError
from deltaw.kernels.variants import ARITHMETICS, VARIABLE

# Types of stored weights, in the order of the kernels' type codes.
WEIGHT_TYPES = ("fp32", "bf16", "int8")
TORCH = "torch"
# Fields of Arithmetic that enable an approximation in training. A run enables one only after verifying it; see
# :mod:`deltaw.training.approximations`.
APPROXIMATIONS = ("int8_gradients", "int8_logits", "summed_classes")
# Preference in the absence of measurements, best first.
_PREFERENCE = ("tiles", "dot", "wide")


@dataclass(frozen=True)
class Arithmetic:
    """Arithmetic that a process computes with.

    Attributes:
        kernels: Name of the kernel variant, or None without compiled kernels.
        fp32: Arithmetic of products with fp32 weights. A name from ARITHMETICS, like the next two.
        bf16: Arithmetic of products with bf16 weights.
        int8: Arithmetic of products with int8 weights.
        int8_gradients: Compute input gradients of layers with frozen bf16 weights as int8 products; see ``in_int8`` of
            :func:`deltaw.kernels.linear.linear_backward`.
        int8_logits: Compute logits of a frozen head as int8 products. Logits of likely classes are recomputed exactly
            if that pays off.
        summed_classes: Sum the gradient of a frozen head's unlikely classes over groups of rows; see
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
        """Names of the enabled approximations."""
        return tuple(name for name in APPROXIMATIONS if getattr(self, name))

    def with_approximations(self, names: Iterable[str]) -> Arithmetic:
        """Return a copy with exactly these approximations enabled."""
        enabled = set(names)
        return replace(self, **{name: name in enabled for name in APPROXIMATIONS})  # type: ignore[arg-type]

    def for_type(self, weight_type: str) -> str:
        """Return the arithmetic of products with weights of the type ``weight_type``."""
        return str(getattr(self, weight_type))

    def replace(self, by_type: Mapping[str, str]) -> Arithmetic:
        """Return a copy with another arithmetic for some weight types."""
        return replace(self, **by_type)  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, str]:
        """Return the fields as JSON-compatible values."""
        labels = {None: "none", True: "yes", False: "no"}
        return {name: labels.get(value, value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Arithmetic:
        """Parse the result of :meth:`as_dict`.

        Raises:
            ValueError: if ``values`` is not a valid arithmetic.
        """
        fields = {name: values.get(name) for name in ("kernels", *WEIGHT_TYPES)}
        if any(fields[s] not in ARITHMETICS for s in WEIGHT_TYPES) or not isinstance(fields["kernels"], str):
            raise ValueError(f"not a valid arithmetic: {dict(values)}")
        kernels = None if fields["kernels"] == "none" else str(fields["kernels"])
        exact = cls(kernels).replace({s: str(fields[s]) for s in WEIGHT_TYPES})
        return exact.with_approximations(name for name in APPROXIMATIONS if values.get(name) == "yes")


def supported_arithmetics(library: ctypes.CDLL, weight_type: str) -> tuple[str, ...]:
    """Return the arithmetics that a library supports for a weight type, its default first."""
    mask = library.dw_arithmetics(WEIGHT_TYPES.index(weight_type))
    return tuple(name for name in _PREFERENCE if mask >> ARITHMETICS.index(name) & 1)


def default_arithmetic(kernels: str, library: ctypes.CDLL, forced: str | None = None) -> Arithmetic:
    """Return a library's default arithmetic for every weight type.

    Args:
        kernels: Name of the kernel variant.
        library: The loaded library of that variant.
        forced: Arithmetic to use for all weight types that support it.

    Raises:
        UserError: if no weight type supports ``forced``.
    """
    supported = {weight_type: (*supported_arithmetics(library, weight_type), TORCH) for weight_type in WEIGHT_TYPES}
    if forced is not None and not any(forced in names for names in supported.values()):
        available = sorted({name for names in supported.values() for name in names})
        message = f"kernels '{kernels}' have no arithmetic '{forced}'"
        raise UserError(message, location=VARIABLE, hint=f"use one of {', '.join(available)}")
    return Arithmetic(kernels).replace({s: forced if forced in names else names[0] for s, names in supported.items()})


def set_arithmetic(library: ctypes.CDLL, arithmetic: Arithmetic) -> None:
    """Set the arithmetic of a library's products.

    Raises:
        ValueError: if the library does not support it.
    """
    for type_code, weight_type in enumerate(WEIGHT_TYPES):
        name = arithmetic.for_type(weight_type)
        if name not in (TORCH, *supported_arithmetics(library, weight_type)):
            raise ValueError(f"kernels '{arithmetic.kernels}' do not compute {weight_type} by '{name}'")
        if name != TORCH:
            library.dw_set_arithmetic(type_code, ARITHMETICS.index(name))
