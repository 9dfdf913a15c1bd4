"""Diagnose a machine for `deltaw doctor`: properties, installed libraries, findings, and their format."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deltaw.errors import nearest
from deltaw.kernels.arithmetic import TORCH, WEIGHT_TYPES
from deltaw.kernels.variants import NONE, OFF, VARIABLE, kernel_overrides
from deltaw.machine.choices import SLOW_RATE_SHARE, choose_precision
from deltaw.machine.kernel_choice import KernelChoice
from deltaw.progress import LogFunction, ignore_line
from deltaw.reports.diagnosis import OPTIONAL, VARIABLES, Diagnosis, gather
from deltaw.reports.tables import add_row, table
from deltaw.version import __version__

# Findings about training on this machine.
Severity = Literal["ok", "note", "warning", "problem"]
# In ascending order of severity.
SEVERITIES: tuple[Severity, ...] = ("ok", "note", "warning", "problem")
GB = 1e9
# Free bytes below which a disk is low, and below which it is full.
LOW_DISK = 5e9
FULL_DISK = 50e6
# Free memory in bytes below which only very small models can be trained.
LOW_MEMORY = 1e9
# Used swap in bytes above which memory is considered insufficient.
SWAPPED = 512e6
# Share of the stored rate of a product below which the machine is considered slowed down.
MIN_RATE_SHARE = 0.7
# Load per CPU above which the machine is considered busy.
BUSY = 1.5
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.1}


@dataclass(frozen=True)
class DoctorFinding:
    """Finding about the machine.

    Attributes:
        severity: "ok"; "note" for little or no effect; "warning" for a cost in time or memory; "problem" if training is
            impossible.
        topic: Short name such as kernels, threads or memory.
        message: Description.
        hint: Suggested action, or None.
    """

    severity: Severity
    topic: str
    message: str
    hint: str | None = None


# Severity, message and hint of a finding.
FindingParts: TypeAlias = tuple[Severity, str, str | None]


def diagnose(diagnosis: Diagnosis) -> list[DoctorFinding]:
    """Return all findings by topic."""
    parts = {
        "threads": _threads,
        "kernels": _kernels,
        "rates": _rates,
        "memory": _memory,
        "disk": _disks,
        "versions": _versions_fit,
        "extras": _extras,
        "gpu": _gpu,
        "environment": _environment_findings,
    }
    found = ((topic, *entry) for topic, find in parts.items() for entry in find(diagnosis))
    return [DoctorFinding(level, topic, text, hint) for topic, level, text, hint in found]


def _threads(diagnosis: Diagnosis) -> Iterator[FindingParts]:
    threads = diagnosis.threads.value
    reason = diagnosis.threads.why
    bound = diagnosis.cores if diagnosis.quota is None else min(diagnosis.cores, max(1, int(diagnosis.quota)))
    if reason == "OMP_NUM_THREADS" and threads < bound:
        message = f"OMP_NUM_THREADS={threads}: runs compute on {threads} of {bound} cores"
        yield ("warning", message, "unset OMP_NUM_THREADS, or set 'threads' in the settings")
    elif reason == "OMP_NUM_THREADS" and threads > bound:
        message = f"OMP_NUM_THREADS={threads}: more threads than usable cores ({bound}), which wait for each other"
        yield ("warning", message, f"unset OMP_NUM_THREADS, or set it to {bound}")
    else:
        yield ("ok", f"{threads} threads ({reason})", None)
    if diagnosis.quota is not None and diagnosis.quota < diagnosis.processors:
        message = f"a control group allows {diagnosis.quota:g} of {diagnosis.processors} processors"
        short: FindingParts = ("warning", message, "give the container or job more processors: runs are throttled")
        yield short if diagnosis.quota < 1 else ("note", message, None)
    if diagnosis.processors < diagnosis.machine_processors:
        message = f"this process may use {diagnosis.processors} of {diagnosis.machine_processors} processors"
        yield ("note", message, "its affinity was set by taskset, a container or a job scheduler")
    if len(diagnosis.openmp) > 1:
        message = f"several OpenMP libraries are loaded ({', '.join(diagnosis.openmp)}); their threads compete"
        yield ("warning", message, "install torch and NumPy from the same source, both with pip or both with conda")
    if diagnosis.load is not None and diagnosis.load > BUSY * diagnosis.processors:
        message = f"the machine is busy: load {diagnosis.load:.1f} on {diagnosis.processors} CPUs"
        yield ("warning", message, "stop other programs, or set 'threads' to a lower number")
    if diagnosis.governor == ("powersave", "acpi-cpufreq"):  # other drivers use this name differently
        message = "the CPU runs at its lowest frequency (governor powersave)"
        yield ("warning", message, "choose another governor: cpupower frequency-set -g performance")


def _kernels(diagnosis: Diagnosis) -> Iterator[FindingParts]:
    forced = kernel_overrides()
    chosen = diagnosis.kernels.arithmetic.kernels
    if forced.kernels == NONE:
        yield ("warning", f"compiled kernels are switched off ({forced.source})", f"unset {VARIABLE} and {OFF}")
        return
    runs = [variant for variant in diagnosis.variants if not variant.missing_features]
    if chosen is None:
        problem = next((v.problem for v in runs if v.problem), "none was built")
        install = "pip install --force-reinstall --no-deps deltaw, or in a checkout: pip install -e ."
        hint = f"install a C++ compiler (on Debian and Ubuntu: apt install g++), then: {install}"
        yield ("warning", f"no compiled kernels ({problem}): training works but is slower", hint)
        return
    yield ("ok", f"compiled kernels: {chosen}", None)
    if not_built := [variant.name for variant in runs[1:] if not variant.built]:
        yield ("ok", f"not built, but supported by this CPU: {', '.join(not_built)}", None)
    if forced.source:
        yield ("note", f"kernels are forced by {forced.source}", f"unset {VARIABLE} to measure")
    if not runs[0].built:
        message = f"the best kernels for this CPU, {runs[0].name}, were not built"
        yield ("note", message, "a newer compiler may support them: install it, then install deltaw again")
    for variant in runs:
        if variant.problem is not None:
            message = f"kernels {variant.name} cannot be used: {variant.problem}"
            yield ("warning", message, "install deltaw again to rebuild them")
    for note in diagnosis.notes:
        yield ("warning", note, "install torch from its own wheels, with OpenMP")


def _rates(diagnosis: Diagnosis) -> Iterator[FindingParts]:
    choice = diagnosis.kernels
    for stored in WEIGHT_TYPES:
        rate = choice.rate(stored)
        product = choice.arithmetic.for_type(stored)
        by_torch = choice.rates[stored].get(TORCH)
        unit = "GOP/s" if stored == "int8" else "GFLOP/s"
        comparison = "" if by_torch is None else f"; the math library reaches {by_torch:.0f}"
        suffix = " by the math library" if product == TORCH else f" ({product}){comparison}"
        yield ("ok", f"{stored} products: {rate:.0f} {unit}{suffix}", None)
    fp32, bf16, int8 = (choice.rate(stored) for stored in ("fp32", "bf16", "int8"))
    if bf16 < SLOW_RATE_SHARE * fp32:
        message = f"bf16 is emulated: its products reach {bf16 / fp32:.0%} of the rate of fp32"
        yield ("note", message, "precision: auto uses fp32 here; bf16 still halves the memory of the weights")
    if int8 < SLOW_RATE_SHARE * max(fp32, bf16):
        message = f"int8 products reach {int8 / max(fp32, bf16):.0%} of the rate of the fastest precision"
        yield ("note", message, "precision: int8 saves memory here, not time")
    faster = choice.faster_precision(_precision(diagnosis))
    if faster is not None:
        yield ("note", faster, None)
    yield from _current_rates(diagnosis)


def _current_rates(diagnosis: Diagnosis) -> Iterator[FindingParts]:
    """Yield findings about the current rates compared with the stored ones."""
    if diagnosis.measured is None:
        return
    shares = {}
    for stored in WEIGHT_TYPES:
        current_rate = diagnosis.measured.rates.get(stored, {}).get(_candidate(diagnosis.kernels, stored))
        if current_rate is not None:
            shares[stored] = current_rate / diagnosis.kernels.rate(stored)
    if shares and min(shares.values()) < MIN_RATE_SHARE:
        stored = min(shares, key=lambda name: shares[name])
        message = f"{stored} products are at {shares[stored]:.0%} of the rate that was measured here before"
        yield ("warning", message, "other programs, thermal throttling or a CPU time limit may slow the machine down")
    elif diagnosis.measured.disturbed:
        yield ("note", "other programs disturbed the measurement", "measure again while the machine is idle")


def _candidate(choice: KernelChoice, stored: str) -> str:
    """Return the kernel or library that computes products with weights of a type."""
    product = choice.arithmetic.for_type(stored)
    return TORCH if product == TORCH else f"{choice.arithmetic.kernels}:{product}"


def _precision(diagnosis: Diagnosis) -> str:
    """Return the default precision of runs."""
    return choose_precision("cpu", rates={stored: diagnosis.kernels.rate(stored) for stored in WEIGHT_TYPES}).value


def _memory(diagnosis: Diagnosis) -> Iterator[FindingParts]:
    limit = diagnosis.memory_limit
    free = diagnosis.free_memory
    message = f"{free / GB:.1f} GB free of {limit.value / GB:.1f} GB ({limit.why})"
    low: FindingParts = ("warning", message, "end other programs, or give the container more memory")
    yield low if free < LOW_MEMORY else ("ok", message, None)
    used, _ = diagnosis.swap
    if used > SWAPPED:
        message = f"{used / GB:.1f} GB are swapped out: runs that do not fit into memory become very slow"
        yield ("warning", message, "end other programs; 'deltaw plan' shows the memory that a run needs")
    if diagnosis.model is None:
        return
    sizes = {name: diagnosis.model.parameters * size / GB for name, size in BYTES.items()}
    fits = sizes[_precision(diagnosis)] * GB < free
    listing = ", ".join(f"{name} {size:.2f} GB" for name, size in sizes.items())
    message = f"weights of {diagnosis.model.reference} ({diagnosis.model.parameters / 1e6:,.0f} million): {listing}"
    hint = "try precision: int8, or a smaller model; 'deltaw plan' shows the memory that a run needs"
    yield ("ok", message, None) if fits else ("warning", message, hint)


def _disks(diagnosis: Diagnosis) -> Iterator[FindingParts]:
    for disk in diagnosis.disks:
        used = "" if disk.held_bytes is None else f", {disk.held_bytes / GB:.2f} GB in it"
        message = f"{disk.purpose}: {disk.free_bytes / GB:.1f} GB free{used} ({disk.path})"
        severity: Severity = "problem" if disk.purpose == "runs" else "warning"
        if not disk.writable:
            variable = {"runs": "'output'", "cache": "DELTAW_CACHE"}.get(disk.purpose, "HF_HUB_CACHE")
            message = f"the {disk.purpose} cannot be written to {disk.path}"
            yield (severity, message, f"set {variable} to another folder")
        elif disk.free_bytes < FULL_DISK:
            yield (severity, message, "the disk is full: free some space")
        elif disk.free_bytes < LOW_DISK:
            yield ("note", message, "checkpoints and cached features take several GB for long runs")
        else:
            yield ("ok", message, None)


def _versions_fit(diagnosis: Diagnosis) -> Iterator[FindingParts]:
    needed = [package for package in diagnosis.packages if package.extra is None]
    if not diagnosis.packages:
        message = "this copy of deltaw is not installed, so the versions of its packages cannot be checked"
        yield ("note", message, "pip install -e . in the checkout")
    unfit = [p for p in diagnosis.packages if not p.fits and (p in needed or p.installed is not None)]
    for package in unfit:
        severity: Severity = "problem" if package in needed else "warning"
        problem = f"{package.installed} does not fit: deltaw needs {package.wanted}"
        message = f"{package.name} {problem if package.installed is not None else 'is missing'}"
        yield (severity, message, f'pip install "{package.name}{package.wanted}"')
    if needed and not unfit:
        yield ("ok", f"all {len(needed)} required packages have compatible versions", None)


def _extras(diagnosis: Diagnosis) -> Iterator[FindingParts]:
    installed = [f"{name} {version}" for name, version in diagnosis.optional.items() if version is not None]
    if installed:
        yield ("ok", f"optional packages: {', '.join(installed)}", None)
    for name, version in diagnosis.optional.items():
        if version is None:
            extra = next((p.extra for p in diagnosis.packages if p.name == name and p.extra), None)
            install = f'"deltaw[{extra}]"' if extra else name
            yield ("ok", f"{name} is not installed", f"for {OPTIONAL[name]}: pip install {install}")


def _gpu(diagnosis: Diagnosis) -> Iterator[FindingParts]:
    for index, gpu in enumerate(diagnosis.gpus):
        major, minor = gpu.capability
        memory = f"{gpu.free / GB:.1f} of {gpu.total / GB:.1f} GB free"
        yield ("ok", f"cuda:{index}: {gpu.name}, {memory}, compute capability {major}.{minor}", None)
        if major < 8:
            yield ("note", f"cuda:{index} has no native bf16: runs use fp32 there", None)
    if diagnosis.gpus and importlib.util.find_spec("triton") is None:
        message = "triton is not installed: attention over shared prefixes is computed in tiles on the GPU"
        yield ("note", message, "install triton, which torch's CUDA builds for Linux include")
    if diagnosis.gpus:
        return
    if diagnosis.nvidia_driver:
        build = "is a build without CUDA" if diagnosis.versions.get("cuda") == "none" else "does not see it"
        message = f"there is an NVIDIA driver, but this torch {build}: runs use the CPU"
        hint = "install the CUDA build of torch (pytorch.org), and check CUDA_VISIBLE_DEVICES and nvidia-smi"
        yield ("warning", message, hint)
    elif diagnosis.mps:
        yield ("note", "Apple's GPU is used only if requested", "set device: mps to try it")
    else:
        yield ("ok", "no GPU: runs use the CPU", None)


def _environment_findings(diagnosis: Diagnosis) -> Iterator[FindingParts]:
    for name in diagnosis.environment:
        if not name.startswith("DELTAW_"):
            continue
        if name in VARIABLES:
            yield ("note", f"{name} is set: {VARIABLES[name]}", None)
            continue
        similar = nearest(name, VARIABLES, 1)
        hint = f"did you mean {similar[0]}?" if similar else f"the variables are {', '.join(VARIABLES)}"
        yield ("warning", f"{name} is set but is not a variable of deltaw", hint)


_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}
_PROCESSOR = ("cores", "processors", "machine_processors", "quota", "load", "openmp")


@dataclass(frozen=True)
class Examination:
    """A diagnosis with its findings."""

    diagnosis: Diagnosis
    findings: list[DoctorFinding]

    @property
    def status(self) -> Severity:
        """Return the highest severity of the findings."""
        return max((finding.severity for finding in self.findings), key=SEVERITIES.index, default="ok")

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        diagnosis = self.diagnosis
        choice = diagnosis.kernels
        current_rates = diagnosis.measured
        threads = {"threads": diagnosis.threads.value, "threads_why": diagnosis.threads.why}
        limit = {"limit_bytes": diagnosis.memory_limit.value, "limit_why": diagnosis.memory_limit.why}
        swap = dict(zip(("swap_used_bytes", "swap_total_bytes"), diagnosis.swap, strict=True))
        cores = {key: getattr(diagnosis, key) for key in _PROCESSOR}
        entries = [{"severity": f.severity, "topic": f.topic, "what": f.message, "hint": f.hint} for f in self.findings]
        return {
            "deltaw": __version__,
            "status": self.status,
            "processor": {"name": diagnosis.processor, **threads, **cores},
            "kernels": {
                "chosen": choice.arithmetic.as_dict(),
                "variants": [asdict(variant) | {"usable": variant.usable} for variant in diagnosis.variants],
                "sizes": asdict(choice.sizes),
                "rates": choice.rates,
                "rates_now": None if current_rates is None else current_rates.rates,
                "disturbed": choice.disturbed or (current_rates is not None and current_rates.disturbed),
            },
            "memory": {**limit, "free_bytes": diagnosis.free_memory, **swap},
            "disks": [asdict(disk) | {"path": str(disk.path)} for disk in diagnosis.disks],
            "packages": [package.as_dict() for package in diagnosis.packages],
            "gpus": [asdict(gpu) for gpu in diagnosis.gpus],
            "model": None if diagnosis.model is None else asdict(diagnosis.model),
            "findings": entries,
            **{name: dict(getattr(diagnosis, name)) for name in ("versions", "cache_bytes", "optional", "environment")},
        }

    def render(self) -> RenderableType:
        """Return a header, the rates and the findings."""
        diagnosis = self.diagnosis
        choice = self.diagnosis.kernels
        versions = self.diagnosis.versions
        program = f"deltaw {__version__}, Python {versions['python']}, torch {versions['torch']}, {versions['system']}"
        machine = f"{diagnosis.processor}: {diagnosis.cores} cores, {diagnosis.processors} processors"
        conditions = f"with {choice.threads} threads, hidden size {choice.sizes.hidden}; * is used"
        head = Text(f"{program}\n{machine}\n")
        unit = Text(f"billion operations per second {conditions}\n")
        return Group(head, self._rates(), unit, self._findings(), Text(f"\n{self._verdict()}"))

    def _rates(self) -> Table:
        """Return a table of products by kernel and type. Those that runs use are marked with a star."""
        choice = self.diagnosis.kernels
        result = table(["products by", *WEIGHT_TYPES], box=None, padding=(0, 1))
        names = dict.fromkeys(name for stored in WEIGHT_TYPES for name in choice.rates[stored])
        for name in sorted(names, key=lambda name: name == TORCH):
            cells = []
            for stored in WEIGHT_TYPES:
                rate = choice.rates[stored].get(name)
                mark = "* " if name == _candidate(choice, stored) else ""
                cells.append("" if rate is None else f"{mark}{rate:,.0f}")
            add_row(result, ["the math library (torch)" if name == TORCH else name, *cells])
        return result

    def _findings(self) -> Table:
        result = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        result.add_column(no_wrap=True)
        result.add_column(no_wrap=True)
        result.add_column(overflow="fold")
        for finding in self.findings:
            text = Text(finding.message)
            if finding.hint:
                text.append(f"\n{finding.hint}", style="dim")
            result.add_row(Text(finding.severity, style=_STYLES[finding.severity]), finding.topic, text)
        return result

    def _verdict(self) -> str:
        count = sum(finding.severity == self.status for finding in self.findings)
        summary = f"{count} {self.status}{'' if count == 1 else 's'}"
        if self.status == "problem":
            return f"{summary}: training is not possible until this is fixed"
        if self.status == "warning":
            return f"training works; {summary} above cost time or memory"
        return "training works at full speed"


def examine(model: str | None = None, output: str = "runs", log: LogFunction = ignore_line) -> Examination:
    """Diagnose this machine. The arguments are those of :func:`gather`."""
    diagnosis = gather(model, output, log=log)
    return Examination(diagnosis, diagnose(diagnosis))
