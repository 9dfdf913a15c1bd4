"""Packed attention with torch's GPU kernels, each of which must pass a trial before it is used.

Rows without a shared prefix use torch's variable-length attention (FlashAttention) if the type has 16 bits and there is
no soft cap. Other calls use FlexAttention (:mod:`deltaw.kernels.flex_attention`). If no kernel is available, the caller
computes attention in tiles.

A trial runs once per :class:`KernelCase`. It compares the output and the gradients of a small tree with the reference.
It also checks the shared memory and the stack of the compiled kernels. If they exceed the GPU's limits, smaller blocks
are compiled. A failed trial does not affect other cases. :func:`notes` reports it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.kernels.flex_attention import BLOCK, CompiledAttention, compile_failures
from deltaw.kernels.layout import Layout, to_device
from deltaw.kernels.torch_private import compiled_modules, in_dispatch_mode

# Device types for which torch compiles FlexAttention's backward.
DEVICES = ("cuda",)
# Maximum norm of the difference from the reference in a trial, relative to the reference's norm, by input type.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# Segment lengths and parents of the trial trees: shorter than a block, and several blocks. torch compiles the two
# separately. Trials of variable-length attention use the same lengths without parents.
SHORT_TREE = ((50, 20, 11, 9), (-1, 0, 0, -1))
LONG_TREE = ((300, 200, 65, 40), (-1, 0, -1, 2))
# Maximum stack of a GPU thread in bytes. The driver reserves it for all threads that the GPU can run concurrently.
MAX_STACK = 1024
# Part of Triton's message if a kernel needs more resources than the GPU has.
OUT_OF_RESOURCES = "out of resource"
VARLEN = "variable-length attention"
FLEX = "FlexAttention"
# FlexAttention's block sizes in the order of trials: torch's defaults for the GPU, then a backward with smaller blocks
# (head sizes above 128, little shared memory), then the smallest blocks (GPUs before compute capability 8.0).
_BACKWARD_BLOCKS = ("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")
BLOCK_OPTIONS: tuple[dict[str, int], ...] = (
    {},
    {**dict.fromkeys(_BACKWARD_BLOCKS, 32), "bwd_num_stages": 1},
    {**dict.fromkeys((*_BACKWARD_BLOCKS, "fwd_BLOCK_M", "fwd_BLOCK_N"), 16), "num_stages": 1},
)
# Head sizes above this skip torch's defaults in training, because their backward needs more than MAX_STACK.
LARGE_SIZE = 128

# Attends with (heads, T, d) queries, keys and values, a layout and a window.
Attend = Callable[..., Tensor]


class KernelCase(NamedTuple):
    """Properties of a call that select torch's compiled kernels. Calls with equal properties share a trial."""

    kernel: str
    device: torch.device
    dtype: torch.dtype
    heads: tuple[int, int]
    sizes: tuple[int, int]
    scaling: float
    softcap: float | None
    has_window: bool
    tracked: bool
    short: bool

    def __str__(self) -> str:
        length = f"{'fewer than' if self.short else 'at least'} {BLOCK} tokens"
        return f"{self.heads[0]}/{self.heads[1]} heads of size {self.sizes[0]}, {length}"


@dataclasses.dataclass
class KernelTrial:
    """Result of a trial.

    Attributes:
        attend: Implementation, or None if no implementation passed.
        problem: Reason why the first implementation failed, or None.
    """

    attend: Attend | None
    problem: str | None = None


_TRIALS: dict[KernelCase, KernelTrial] = {}
# Result of :func:`_excess` by case (without its length class) and kernel options. Both classes can share a module.
_EXCESS: dict[tuple[KernelCase, str], str | None] = {}


def notes() -> list[str]:
    """Return messages for the user: each failed trial with its reason, and the number of recompilations."""
    lines = []
    for case, trial in _TRIALS.items():
        if trial.problem is not None:
            lines.append(f"attention of {case}: {_consequence(case, trial)} ({trial.problem})")
    compiled = [trial.attend for trial in _TRIALS.values() if isinstance(trial.attend, CompiledAttention)]
    if recompilations := sum(attend.compilations - 1 for attend in compiled):
        lines.append(f"FlexAttention was recompiled {recompilations} times for inputs that no trial covers")
    return list(dict.fromkeys(lines))


def _consequence(case: KernelCase, trial: KernelTrial) -> str:
    if trial.attend is not None:
        return "smaller blocks in FlexAttention"
    return "FlexAttention also for rows without a shared prefix" if case.kernel == VARLEN else "computed in tiles"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    reference: Callable[..., Tensor],
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor | None:
    """Return causal packed attention computed by one of torch's kernels, or None if no kernel supports the call.

    Returns None for fake tensors and inside dispatch modes, because a dry run must not compile anything. Also returns
    None for a single token, and for a short prefix tree without gradients, which does not justify a compilation.

    Args:
        query: (heads, T, d) queries.
        key: (key heads, T, d) keys.
        value: (key heads, T, d_v) values.
        layout: Layout of the T tokens.
        reference: Reference implementation with the signature of ``packed_attention``.
        scaling: Factor applied to the attention scores.
        window: Sliding-window size or None.
        softcap: Soft cap of the scores or None.
    """
    is_real = query.device.type in DEVICES and type(query) in (Tensor, torch.nn.Parameter)
    if not is_real or query.dtype not in TOLERANCE or layout.length < 2 or in_dispatch_mode():
        return None
    heads = (query.shape[0], key.shape[0])
    sizes = (query.shape[-1], value.shape[-1])
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    flags = window is not None, tracked, layout.length < BLOCK
    has_prefix = (layout.parents >= 0).any()
    is_16_bit = query.dtype in (torch.bfloat16, torch.float16)
    kernels = [VARLEN] if not has_prefix and is_16_bit and softcap is None else []
    if tracked or layout.length >= BLOCK:
        kernels.append(FLEX)
    for kernel in kernels:
        case = KernelCase(kernel, query.device, query.dtype, heads, sizes, scaling, softcap, *flags)
        if case not in _TRIALS:
            _TRIALS[case] = _run_trials(case, reference)
        if (implementation := _TRIALS[case].attend) is not None:
            try:
                return implementation(query, key, value, layout, window)
            except compile_failures() as error:  # a recompilation failed or exceeded torch's limit
                _TRIALS[case] = KernelTrial(None, _failure_message(error))
    return None


def _implementations(case: KernelCase) -> Iterator[Attend]:
    if case.kernel == FLEX:
        for kernel_options in BLOCK_OPTIONS[case.tracked and case.sizes[0] > LARGE_SIZE :]:
            yield CompiledAttention(case.scaling, case.softcap, kernel_options)
        return
    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn  # returns a tuple with some options

    def attend_rows(query: Tensor, key: Tensor, value: Tensor, layout: Layout, window: int | None) -> Tensor:
        if VARLEN not in layout.masks:
            stops = torch.tensor([0, *layout.stops.tolist()], dtype=torch.int32)
            layout.masks[VARLEN] = to_device(stops, layout.device), int((layout.stops - layout.starts).max())
        stops, max_length = layout.masks[VARLEN]
        tensors = (t.transpose(0, 1) for t in (query, key, value))
        keys_before = -1 if window is None else window - 1
        options = {"scale": case.scaling, "window_size": (keys_before, 0), "enable_gqa": case.heads[0] != case.heads[1]}
        return varlen_attn(*tensors, stops, stops, max_length, max_length, **options).transpose(0, 1)

    yield attend_rows


def _run_trials(case: KernelCase, reference: Callable[..., Tensor]) -> KernelTrial:
    """Return the first implementation that computes the reference's results within the GPU's resources."""
    problems: list[str] = []
    # Disable the caller's hooks for saved tensors: checkpointing would count the trial's tensors.
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t), torch.set_grad_enabled(case.tracked):
        try:
            for implementation in _implementations(case):
                before = set(map(id, compiled_modules()))
                difference = _difference(implementation, case, reference)
                modules = [module for module in compiled_modules() if id(module) not in before]
                problem = _excess(modules, case, implementation) if difference is None else difference
                if problem is None:
                    return KernelTrial(implementation, problems[0] if problems else None)
                problems.append(problem)
                if difference is not None and OUT_OF_RESOURCES not in difference:
                    break  # smaller blocks would fail too
        except Exception as error:  # this version of torch does not have the kernel
            problems.append(_failure_message(error))
    return KernelTrial(None, problems[0])


def _difference(implementation: Attend, case: KernelCase, reference: Callable[..., Tensor]) -> str | None:
    """Run a trial tree and return how its results differ from the reference, or None if they agree."""
    lengths, parents = SHORT_TREE if case.short else LONG_TREE
    layout = Layout.of_lengths(lengths, parents if case.kernel == FLEX else None)
    layout.device = case.device
    generator = torch.Generator(device=case.device).manual_seed(0)
    shapes = zip((*case.heads, case.heads[1]), (case.sizes[0], *case.sizes), strict=True)
    leaves = [torch.randn(n, layout.length, size, generator=generator, device=case.device) for n, size in shapes]
    window = layout.length // 6 if case.has_window else None
    options = {"scaling": case.scaling, "window": window, "softcap": case.softcap}
    try:
        rounded = [t.to(case.dtype) for t in leaves]
        actual = _with_gradients(lambda *inputs: implementation(*inputs, layout, window), rounded)
    except Exception as error:  # compilers raise many types; the next implementation is tried
        return _failure_message(error)
    expected = _with_gradients(lambda *inputs: reference(*inputs, layout, **options), leaves)
    differences = [float((a.float() - b).norm() / b.norm()) for a, b in zip(actual, expected, strict=True)]
    if all(difference <= TOLERANCE[case.dtype] for difference in differences):  # False for NaN
        return None
    return f"results differ from the reference, relative differences {', '.join(f'{d:.1e}' for d in differences)}"


def _with_gradients(attention: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and, if gradients are enabled, the inputs' gradients for a linear output gradient."""
    if not torch.is_grad_enabled():
        return [attention(*inputs)]
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = attention(*leaves)
    output_gradient = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, output_gradient)]


def _excess(modules: list[Any], case: KernelCase, implementation: Attend) -> str | None:
    """Return how the Triton kernels of newly compiled modules exceed the GPU's resources, or None if they fit.

    If nothing was compiled, the code of the other length class runs, and its result is returned.
    """
    key = case._replace(short=False), str(getattr(implementation, "kernel_options", None))
    if modules or key not in _EXCESS:
        _EXCESS[key] = _excess_of_kernels(modules, case.device)
    return _EXCESS[key]


def _excess_of_kernels(modules: list[Any], device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    limit = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    for kernel in [value for module in modules for value in vars(module).values() if hasattr(value, "launchers")]:
        for launcher in kernel.launchers:
            shared = getattr(launcher, "shared", None) or 0
            stack = 4 * (getattr(launcher, "n_spills", None) or 0)
            if limit is not None and shared > limit:
                return f"a kernel needs {shared / 1024:.0f} KB of shared memory, and the GPU has {limit / 1024:.0f} KB"
            if stack > MAX_STACK:
                return f"a kernel needs {stack:,} bytes of stack per thread, more than {MAX_STACK:,}"
    return None


def _failure_message(error: Exception) -> str:
    """Return the exception's type and one line of its message: the line about resources, or else the first one."""
    lines = str(error).splitlines() or [""]
    line = next((line for line in lines if OUT_OF_RESOURCES in line), lines[0])
    return f"{type(error).__name__}: {line[:140]}"
