"""Check every kernel variant of an installed wheel that this CPU supports.

Run by the Python in which the wheel is installed. Prints one line per variant and arithmetic. Imports only deltaw and
torch, because it also runs on the machine that built the wheel.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from deltaw.kernels import attention, linear, loader, quantize, rows, variants
from deltaw.kernels.arithmetic import default_arithmetic, supported_arithmetics
from deltaw.kernels.layout import Layout
from deltaw.kernels.processor import processor_flags

assert attention  # importing it defines the operator
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def check(label: str, result: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    error = float((result.double() - exact).norm() / exact.norm())
    if not error < tolerance:
        raise SystemExit(f"{label} is off by {error:.1e}")


def check_type(dtype: torch.dtype) -> None:
    """Compare a product with its update, an int8 product, a norm and attention with float64 results."""
    bound = TOLERANCE[dtype]
    x, weight, grad = (numbers(*shape, dtype=dtype) for shape in ((70, 96), (64, 96), (70, 64)))
    A = numbers(96, 8)
    B = numbers(8, 64)
    product = linear.LinearProduct(weight, lora_A=A, lora_B=B)
    exact = weight.double() + (A.double() @ B.double()).t()
    if not linear.can_multiply(x, product):
        raise SystemExit("the kernels do not support a plain product")
    check("a product", linear.linear(x, product)[0], x.double() @ exact.t(), 2 * bound)
    check("a gradient", linear.linear_backward(grad, product)[0], grad.double() @ exact, 2 * bound)
    signed, scale = quantize.quantize_rows(weight)
    exact, _ = linear.linear_reference(x.double(), linear.LinearProduct(signed, scale=scale.double()))
    check("an int8 product", linear.linear(x, linear.LinearProduct(signed, scale=scale))[0], exact, max(bound, 2e-4))
    norm_options = {"offset": 0.0, "eps": 1e-5, "centered": False}
    gain = numbers(96, dtype=dtype)
    exact, _ = rows.norm_reference(x.double(), gain.double(), None, **norm_options)
    check("a norm", rows.norm(x, gain, None, **norm_options)[0], exact, bound)
    q, k, v = (numbers(70, 2, 32, dtype=dtype) + n for n in range(3))
    out, _ = torch.ops.deltaw.attention(q, k, v, Layout.of_lengths([40, 30]).segments(), 0, True, 0.2, 0.0, None)
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = []
    for part in (slice(0, 40), slice(40, 70)):
        heads = (t[part].double().transpose(0, 1) for t in (q, k, v))
        expected.append(attend(*heads, is_causal=True, scale=0.2).transpose(0, 1))
    check("attention", out, torch.cat(expected), bound)


def main() -> None:
    usable = [variant.name for variant in loader.usable_variants()]
    missing = [v.name for v in variants.allowed(processor_flags()) if not variants.file_of(v).is_file()]
    if missing or not usable:
        raise SystemExit(f"not in the wheel: {', '.join(missing) or 'anything'}")
    if loader.threads_note() is not None:
        raise SystemExit(loader.threads_note())
    for name in usable:
        library = loader.open_variant(name).library
        default = default_arithmetic(name, library)
        for bf16 in supported_arithmetics(library, "bf16"):
            with loader.temporary_arithmetic(replace(default, bf16=bf16)):
                for dtype in TOLERANCE:
                    check_type(dtype)
            print(f"{name}: fp32 {default.fp32}, bf16 {bf16}, int8 {default.int8}")


if __name__ == "__main__":
    main()
