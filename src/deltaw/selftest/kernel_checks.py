"""Checks of the compiled kernels: how they were built, their threads, and their results."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaw.errors import UserError
from deltaw.kernels import loader, variants
from deltaw.kernels.arithmetic import Arithmetic, default_arithmetic, supported_arithmetics
from deltaw.kernels.processor import processor_flags
from deltaw.kernels.variants import Variant
from deltaw.machine.choices import choose_threads
from deltaw.selftest.check import Check
from deltaw.selftest.kernel_call import Inputs, KernelCall, difference
from deltaw.selftest.model_cases import model_cases
from deltaw.selftest.other_cases import other_cases
from deltaw.selftest.product_cases import product_cases


@dataclass(frozen=True)
class Build:
    """How a variant was built: digest of the sources, or "unknown", and version of the compiler."""

    sources: str
    compiler: str


def build_of(library: ctypes.CDLL) -> Build:
    """Return how a library was built."""
    text = ctypes.create_string_buffer(500)
    library.dw_build_info(ctypes.addressof(text), len(text))
    sources, _, compiler = text.value.decode(errors="replace").partition(" ")
    return Build(sources, compiler if compiler[:1].isalpha() else f"GCC {compiler}")


def usable_variants() -> Iterator[tuple[Variant, ctypes.CDLL | None, str | None]]:
    """Yield the built variants that this CPU supports, with the library, or the reason why it cannot be used."""
    for variant in variants.allowed(processor_flags()):
        if not variants.file_of(variant).is_file():
            continue
        try:
            yield variant, loader.open_variant(variant.name).library, None
        except (OSError, AttributeError, RuntimeError) as error:
            yield variant, None, str(error)
        except UserError as error:
            yield variant, None, error.message


def check_builds() -> list[Check]:
    """Check that the kernels can be loaded and were built from the sources that are installed."""
    source_digest = variants.source_digest()
    checks = []
    builds: dict[str, Build] = {}
    for variant, library, problem in usable_variants():
        name = f"build of {variant.name}"
        if library is None:
            checks.append(Check(name, problem))
            continue
        build = builds[variant.name] = build_of(library)
        first = next(iter(builds.values()))
        if source_digest is not None and build.sources != source_digest:
            checks.append(Check(name, f"stale: built from sources {build.sources}, but these are {source_digest}"))
        elif build.sources != first.sources:
            checks.append(Check(name, f"stale: built from sources {build.sources}, others from {first.sources}"))
        else:
            checks.append(Check(name, note=f"sources {build.sources}, compiler {build.compiler}"))
    if not checks:
        checks.append(Check("kernels", loader.unavailable_reason() or "no compiled kernels were built"))
    return checks


def check_threads(expected: int) -> list[Check]:
    """Check that runs use the expected number of threads, and that kernels run on it."""
    chosen = choose_threads()
    problem = None if chosen.value == expected else f"runs use {chosen.value} threads ({chosen.why}), not {expected}"
    checks = [Check("threads of runs", problem, str(chosen.value))]
    before = torch.get_num_threads()
    torch.set_num_threads(expected)
    try:
        for variant, library, _ in usable_variants():
            if library is None:
                continue
            count = library.dw_count_threads()
            problem = None if count == expected else f"kernels run on {count} threads, but this machine has {expected}"
            checks.append(Check(f"threads of {variant.name}", problem, f"{count}"))
    finally:
        torch.set_num_threads(before)
    return checks


def check_results(threads: int) -> Iterator[Check]:
    """Compare the results of each kernel with its reference, for each variant and each kind of product.

    Each call is repeated with one thread, which must give the same result.

    Args:
        threads: Number of threads.
    """
    cases = [*product_cases(), *other_cases(), *model_cases()]
    expected: dict[tuple[str, torch.dtype], list[Tensor]] = {}
    with loader.temporary_arithmetic(Arithmetic()):
        for case in cases:
            for dtype in case.types:
                expected[case.name, dtype] = list(case.compute(Inputs(dtype, case.is_exact)))
    before = torch.get_num_threads()
    try:
        for variant, library, _ in usable_variants():
            if library is None:
                continue
            for arithmetic in _arithmetics(variant.name, library):
                with loader.temporary_arithmetic(arithmetic):
                    yield _check_cases(arithmetic, cases, expected, threads)
    finally:
        torch.set_num_threads(before)


def _arithmetics(name: str, library: ctypes.CDLL) -> list[Arithmetic]:
    """Return the default arithmetic of a variant, and one for each other kind of bf16 and int8 product."""
    default = default_arithmetic(name, library)
    found = [default]
    for weight_type in ("bf16", "int8"):
        for product in supported_arithmetics(library, weight_type):
            found.append(replace(default, **{weight_type: product}))  # type: ignore[arg-type]
    return list(dict.fromkeys(found))


def _check_cases(
    arithmetic: Arithmetic, cases: list[KernelCall], expected: dict[tuple[str, torch.dtype], list[Tensor]], threads: int
) -> Check:
    problems = []
    closest = 0.0
    calls = 0
    for case in cases:
        for dtype in case.types:
            calls += 1
            torch.set_num_threads(threads)
            results = list(case.compute(Inputs(dtype, is_exact=False)))
            torch.set_num_threads(1)
            single = list(case.compute(Inputs(dtype, is_exact=False)))
            ratio, place = difference(results, expected[case.name, dtype], dtype)
            closest = max(closest, ratio / case.slack)
            type_name = str(dtype).removeprefix("torch.")
            if ratio > case.slack:
                problems.append(f"{case.name} ({type_name}): {place}")
            elif difference(single, results, dtype)[0] > case.slack:
                problems.append(f"{case.name} ({type_name}): one thread gives another result than {threads}")
    name = f"results of {arithmetic.kernels} (bf16 {arithmetic.bf16}, int8 {arithmetic.int8})"
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        return Check(name, "; ".join(problems[:3]) + more)
    return Check(name, note=f"{calls} calls, differences up to {closest:.0%} of the tolerance")
