"""What the facts of a machine mean for training on it: findings, each with what helps.

It knows :class:`deltaw.reports.machine.Facts` and looks at nothing itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from deltaw.errors import nearest
from deltaw.host.choices import SLOW, choose_precision
from deltaw.kernels.arithmetic import STORED, TORCH
from deltaw.kernels.variants import EMULATED_TILES, LEFT_OUT_BY, MEASURED, NONE, OFF, VARIABLE, asked
from deltaw.reports.machine import OPTIONAL, Disk, Facts

Severity = Literal["ok", "note", "warning", "problem"]
# From the mildest to the worst.
SEVERITIES: tuple[Severity, ...] = ("ok", "note", "warning", "problem")
GB = 1e9
# Free bytes below which a disk is low, and below which nothing can be written.
LOW_DISK, FULL_DISK = 5e9, 50e6
# Free memory below which only toys train.
LOW_MEMORY = 1e9
# Swap in use that says that memory was short.
SWAPPED = 512e6
# A product's rate now, as a share of what was remembered, below which something holds the machine back.
HELD_BACK = 0.7
# Running programs per processor from which on they wait for each other.
BUSY = 1.5
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.1}
# deltaw's own variables, and what each changes.
VARIABLES = {
    VARIABLE: "which compiled kernels are used",
    OFF: "0: no compiled kernels",
    MEASURED: "rates of products, as another process measured them",
    LEFT_OUT_BY["int8_gradients"]: "0: gradients are multiplied with bf16 weights in bf16",
    LEFT_OUT_BY["int8_logits"]: "0: no logits in training come from int8 products",
    LEFT_OUT_BY["summed_classes"]: "0: a head's gradient is computed with every class of every row",
    "DELTAW_CACHE": "where models, features and measurements are kept",
    "DELTAW_API_KEY": "a key that requests to deltaw serve must bring",
    "DELTAW_PEER_SECONDS": "how long processes that train together wait for each other",
    "DELTAW_TRACEBACK": "1: an unexpected error shows where it arose",
    "DELTAW_VARIANTS": "which kernels are compiled at installation",
    EMULATED_TILES: "1: for tests of the kernels: arrays stand for the tiles of AMX",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: ok; a note changes nothing or little; a warning costs time or memory; a problem makes
            training impossible.
        topic: a word: kernels, threads, memory, …
        hint: what helps; None where nothing needs to be done.
    """

    severity: Severity
    topic: str
    what: str
    hint: str | None = None

    def as_dict(self) -> dict[str, object]:
        return {"severity": self.severity, "topic": self.topic, "what": self.what, "hint": self.hint}


def diagnose(facts: Facts) -> list[Finding]:
    """All findings, by topic."""
    parts = (_threads, _kernels, _rates, _memory, _disks, _versions, _gpu, _environment)
    return list(itertools.chain.from_iterable(part(facts) for part in parts))


def worst(findings: list[Finding]) -> Severity:
    """The worst severity among the findings."""
    return max((finding.severity for finding in findings), key=SEVERITIES.index, default="ok")


def _threads(facts: Facts) -> Iterator[Finding]:
    threads, why = facts.threads.value, facts.threads.why
    bound = facts.cores if facts.quota is None else min(facts.cores, max(1, int(facts.quota)))
    if why == "OMP_NUM_THREADS" and threads < bound:
        yield Finding(
            "warning",
            "threads",
            f"OMP_NUM_THREADS={threads}: runs compute on {threads} of {bound} cores",
            "unset OMP_NUM_THREADS, or set 'threads' in the settings",
        )
    elif why == "OMP_NUM_THREADS" and threads > bound:
        yield Finding(
            "warning",
            "threads",
            f"OMP_NUM_THREADS={threads}: more threads than the {bound} cores that this process may use, so "
            "that they wait for each other",
            f"unset OMP_NUM_THREADS, or set it to {bound}",
        )
    else:
        yield Finding("ok", "threads", f"{threads} threads ({why})")
    if facts.quota is not None and facts.quota < facts.processors:
        short = facts.quota < 1
        yield Finding(
            "warning" if short else "note",
            "threads",
            f"a control group allows {facts.quota:g} of {facts.processors} processors",
            "give the container or job more processors: a run is throttled" if short else None,
        )
    if facts.processors < facts.machine_processors:
        yield Finding(
            "note",
            "threads",
            f"this process may use {facts.processors} of the machine's {facts.machine_processors} processors",
            "its affinity was set by taskset, a container or a job scheduler",
        )
    if len(facts.openmp) > 1:
        yield Finding(
            "warning",
            "threads",
            f"{len(facts.openmp)} OpenMP libraries are loaded ({', '.join(facts.openmp)}): their threads "
            "compete for the cores",
            "install torch and NumPy from the same source, both with pip or both with conda",
        )
    if facts.load is not None and facts.load > BUSY * facts.processors:
        yield Finding(
            "warning",
            "threads",
            f"other programs keep the machine busy: {facts.load:.1f} are running or waiting on "
            f"{facts.processors} processors",
            "wait for them, or set 'threads' to what they leave",
        )
    governor, driver = facts.governor
    if governor == "powersave" and driver == "acpi-cpufreq":  # with other drivers the name means nothing
        yield Finding(
            "warning",
            "threads",
            "the processor is held at its lowest frequency (governor powersave)",
            "choose the governor schedutil or performance: cpupower frequency-set -g performance",
        )


def _kernels(facts: Facts) -> Iterator[Finding]:
    forced = asked()
    chosen = facts.kernels.arithmetic.kernels
    if forced.kernels == NONE:
        yield Finding(
            "warning",
            "kernels",
            f"compiled kernels are switched off ({forced.said})",
            f"unset {VARIABLE} and {OFF}",
        )
        return
    runs = [variant for variant in facts.variants if not variant.lacking]
    if chosen is None:
        problem = next((v.problem for v in runs if v.problem), None)
        yield Finding(
            "warning",
            "kernels",
            f"there are no compiled kernels ({problem or 'none was built'}): training works, and is slower",
            "install a C++ compiler (on Debian and Ubuntu: apt install g++), then: pip install "
            "--force-reinstall --no-deps deltaw, or in a checkout: pip install -e .",
        )
        return
    yield Finding("ok", "kernels", f"compiled kernels: {chosen}")
    if forced.said:
        yield Finding(
            "note", "kernels", f"kernels are forced by {forced.said}", f"unset {VARIABLE} to measure"
        )
    best = runs[0]
    if not best.built:
        yield Finding(
            "note",
            "kernels",
            f"the best kernels for this processor, {best.name}, were not built",
            "a newer compiler may know them: install it, then install deltaw again",
        )
    for variant in runs:
        if variant.problem is not None:
            yield Finding(
                "warning",
                "kernels",
                f"kernels {variant.name} cannot be used: {variant.problem}",
                "install deltaw again to rebuild them",
            )
    for note in facts.notes:
        yield Finding("warning", "kernels", note, "install torch from its own wheels, with OpenMP")


def _rates(facts: Facts) -> Iterator[Finding]:
    choice = facts.kernels
    for stored in STORED:
        rate, way = choice.rate(stored), choice.arithmetic.of(stored)
        by_torch = choice.rates[stored].get(TORCH)
        unit = "GOP/s" if stored == "int8" else "GFLOP/s"
        if way == TORCH:
            shown = f"{rate:.0f} {unit} by the math library"
        else:
            against = "" if by_torch is None else f"; the math library reaches {by_torch:.0f}"
            shown = f"{rate:.0f} {unit} ({way}){against}"
        yield Finding("ok", "rates", f"{stored} products: {shown}")
    fp32, bf16, int8 = (choice.rate(stored) for stored in ("fp32", "bf16", "int8"))
    if bf16 < SLOW * fp32:
        yield Finding(
            "note",
            "rates",
            f"bf16 is emulated: its products reach {bf16 / fp32:.0%} of the rate of fp32",
            "precision: auto takes fp32 here; bf16 still halves the memory of the weights",
        )
    if int8 < SLOW * max(fp32, bf16):
        yield Finding(
            "note",
            "rates",
            f"int8 products reach {int8 / max(fp32, bf16):.0%} of the rate of the fastest precision",
            "precision: int8 saves memory here, not time",
        )
    faster = choice.faster_precision(choose_precision("cpu", rates=_by_precision(facts)).value)
    if faster is not None:
        yield Finding("note", "rates", faster)
    yield from _now(facts)


def _now(facts: Facts) -> Iterator[Finding]:
    """How the rates of this moment compare with those that runs count on."""
    if facts.measured is None:
        return
    shares = {}
    for stored in STORED:
        way = facts.kernels.arithmetic.of(stored)
        name = TORCH if way == TORCH else f"{facts.kernels.arithmetic.kernels}:{way}"
        now = facts.measured.rates.get(stored, {}).get(name)
        if now is not None:
            shares[stored] = now / facts.kernels.rate(stored)
    if shares and min(shares.values()) < HELD_BACK:
        stored = min(shares, key=lambda name: shares[name])
        yield Finding(
            "warning",
            "rates",
            f"{stored} products are at {shares[stored]:.0%} of the rate that was measured here before",
            "other programs, heat or a limit on the processor's time hold the machine back",
        )
    elif facts.measured.disturbed:
        yield Finding(
            "note",
            "rates",
            "other programs disturbed the measurement",
            "measure again while the machine is idle",
        )


def _by_precision(facts: Facts) -> dict[str, float]:
    return {stored: facts.kernels.rate(stored) for stored in STORED}


def _memory(facts: Facts) -> Iterator[Finding]:
    limit, free = facts.memory_limit, facts.free_memory
    low = free < LOW_MEMORY
    yield Finding(
        "warning" if low else "ok",
        "memory",
        f"{free / GB:.1f} GB free of {limit.value / GB:.1f} GB ({limit.why})",
        "end other programs, or give the container more memory" if low else None,
    )
    used, _ = facts.swap
    if used > SWAPPED:
        yield Finding(
            "warning",
            "memory",
            f"{used / GB:.1f} GB are swapped out: a run that does not fit into memory crawls",
            "end other programs; 'deltaw plan' says what a run needs",
        )
    if facts.model is None:
        return
    precision = choose_precision("cpu", rates=_by_precision(facts)).value
    sizes = {name: facts.model.parameters * size / GB for name, size in BYTES.items()}
    fits = sizes[precision] * GB < free
    shown = ", ".join(f"{name} {size:.2f} GB" for name, size in sizes.items())
    yield Finding(
        "ok" if fits else "warning",
        "memory",
        f"the weights of {facts.model.reference} ({facts.model.parameters / 1e6:,.0f} million) take: {shown}",
        None if fits else "try precision: int8, or a smaller model; 'deltaw plan' says what a run needs",
    )


def _disks(facts: Facts) -> Iterator[Finding]:
    for disk in facts.disks:
        held = "" if disk.held is None else f", {disk.held / GB:.2f} GB in it"
        what = f"{disk.purpose}: {disk.free / GB:.1f} GB free{held} ({disk.path})"
        if not disk.writable:
            yield _not_writable(disk)
        elif disk.free < FULL_DISK:
            severity: Severity = "problem" if disk.purpose == "runs" else "warning"
            yield Finding(severity, "disk", what, "the disk is full: free some space")
        elif disk.free < LOW_DISK:
            yield Finding("note", "disk", what, "checkpoints and kept features take several GB for long runs")
        else:
            yield Finding("ok", "disk", what)


def _not_writable(disk: Disk) -> Finding:
    if disk.purpose == "runs":
        return Finding(
            "problem", "disk", f"runs cannot be written to {disk.path}", "set 'output' to another folder"
        )
    variable = "DELTAW_CACHE" if disk.purpose == "cache" else "HF_HUB_CACHE"
    return Finding(
        "warning",
        "disk",
        f"the {disk.purpose} {disk.path} cannot be written to: what could be kept is made again each time",
        f"set {variable} to another folder",
    )


def _versions(facts: Facts) -> Iterator[Finding]:
    needed = [package for package in facts.packages if package.extra is None]
    if not facts.packages:
        yield Finding(
            "note",
            "versions",
            "this copy of deltaw is not installed, so that the versions of its packages cannot be checked",
            "pip install -e . in the checkout",
        )
    wrong = [package for package in facts.packages if package.installed is not None and not package.fits]
    missing = [package for package in needed if package.installed is None]
    for package in wrong:
        severity: Severity = "problem" if package.extra is None else "warning"
        yield Finding(
            severity,
            "versions",
            f"{package.name} {package.installed} does not fit: deltaw needs {package.wanted}",
            f"pip install '{package.name}{package.wanted}'",
        )
    for package in missing:
        yield Finding(
            "problem",
            "versions",
            f"{package.name} is missing",
            f"pip install '{package.name}{package.wanted}'",
        )
    if needed and not wrong and not missing:
        yield Finding("ok", "versions", f"all {len(needed)} packages that deltaw needs fit")
    there = [f"{name} {version}" for name, version in facts.optional.items() if version is not None]
    if there:
        yield Finding("ok", "extras", f"optional packages: {', '.join(there)}")
    for name, version in facts.optional.items():
        if version is None:
            extra = next((p.extra for p in facts.packages if p.name == name and p.extra), None)
            install = f"'deltaw[{extra}]'" if extra else name
            yield Finding(
                "ok", "extras", f"{name} is not installed", f"for {OPTIONAL[name]}: pip install {install}"
            )


def _gpu(facts: Facts) -> Iterator[Finding]:
    for index, gpu in enumerate(facts.gpus):
        major, minor = gpu.capability
        yield Finding(
            "ok",
            "gpu",
            f"cuda:{index}: {gpu.name}, {gpu.free / GB:.1f} of {gpu.total / GB:.1f} GB free, "
            f"compute capability {major}.{minor}",
        )
        if major < 8:
            yield Finding("note", "gpu", f"cuda:{index} has no native bf16: runs use fp32 there")
    if facts.gpus:
        return
    if facts.nvidia_driver:
        build = "is a build without CUDA" if facts.versions.get("cuda") == "none" else "does not see it"
        yield Finding(
            "warning",
            "gpu",
            f"there is an NVIDIA driver, but this torch {build}: runs use the processor",
            "install the CUDA build of torch (pytorch.org), and check CUDA_VISIBLE_DEVICES and nvidia-smi",
        )
    elif facts.mps:
        yield Finding("note", "gpu", "Apple's GPU is used only when asked for", "set device: mps to try it")
    else:
        yield Finding("ok", "gpu", "no GPU: runs use the processor")


def _environment(facts: Facts) -> Iterator[Finding]:
    for name in facts.environment:
        if not name.startswith("DELTAW_"):
            continue
        if name in VARIABLES:
            yield Finding("note", "environment", f"{name} is set: {VARIABLES[name]}")
            continue
        near = nearest(name, VARIABLES, 1)
        hint = f"did you mean {near[0]}?" if near else f"the variables are {', '.join(VARIABLES)}"
        yield Finding("warning", "environment", f"{name} is set, and deltaw has no such variable", hint)
