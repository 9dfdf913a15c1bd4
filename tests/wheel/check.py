"""Run by a Python that has an installed wheel: each variant that this processor allows is there and right.

Prints a line for each variant and arithmetic. Imports nothing but deltaw and torch: it also runs where a
wheel is tested on the machine that built it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from deltaw.kernels import attention, linear, loader, quantize, rows, variants
from deltaw.kernels.arithmetic import default_of, offered
from deltaw.kernels.layout import Layout
from deltaw.kernels.processor import processor_flags

assert attention  # importing it defines the operator
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def check(what: str, found: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    error = float((found.double() - exact).norm() / exact.norm())
    if not error < tolerance:
        raise SystemExit(f"{what} is off by {error:.1e}")


def check_type(dtype: torch.dtype) -> None:
    """A product with its update, an int8 product, a norm and attention against float64."""
    bound = TOLERANCE[dtype]
    x, weight, grad = (numbers(*shape, dtype=dtype) for shape in ((70, 96), (64, 96), (70, 64)))
    A, B = numbers(96, 8), numbers(8, 64)
    of, exact = linear.Product(weight, lora_A=A, lora_B=B), weight.double() + (A.double() @ B.double()).t()
    if not linear.can_multiply(x, of):
        raise SystemExit("the kernels do not take a plain product")
    check("a product", linear.linear(x, of)[0], x.double() @ exact.t(), 2 * bound)
    check("a gradient", linear.linear_backward(grad, of)[0], grad.double() @ exact, 2 * bound)
    signed, scale = quantize.quantized_rows(weight)
    exact, _ = linear.linear_reference(x.double(), linear.Product(signed, scale=scale.double()))
    check("an int8 product", linear.linear(x, linear.Product(signed, scale=scale))[0], exact, max(bound, 2e-4))
    how, gain = {"offset": 0.0, "eps": 1e-5, "centered": False}, numbers(96, dtype=dtype)
    exact, _ = rows.norm_reference(x.double(), gain.double(), None, **how)
    check("a norm", rows.norm(x, gain, None, **how)[0], exact, bound)
    q, k, v = (numbers(70, 2, 32, dtype=dtype) + n for n in range(3))
    out, _ = torch.ops.deltaw.attention(q, k, v, Layout.of_lengths([40, 30]).segments(), 0, True, 0.2, 0.0, None)
    attend, apart = torch.nn.functional.scaled_dot_product_attention, []
    for part in (slice(0, 40), slice(40, 70)):
        heads = (t[part].double().transpose(0, 1) for t in (q, k, v))
        apart.append(attend(*heads, is_causal=True, scale=0.2).transpose(0, 1))
    check("attention", out, torch.cat(apart), bound)


def main() -> None:
    here = [variant.name for variant in loader.usable()]
    missing = [v.name for v in variants.allowed(processor_flags()) if not variants.file_of(v).is_file()]
    if missing or not here:
        raise SystemExit(f"not in the wheel: {', '.join(missing) or 'anything'}")
    if loader.threads_note() is not None:
        raise SystemExit(loader.threads_note())
    for name in here:
        library = loader.open_variant(name).library
        usual = default_of(name, library)
        for way in offered(library, "bf16"):
            with loader.computing(replace(usual, bf16=way)):
                for dtype in TOLERANCE:
                    check_type(dtype)
            print(f"{name}: fp32 {usual.fp32}, bf16 {way}, int8 {usual.int8}")


if __name__ == "__main__":
    main()
