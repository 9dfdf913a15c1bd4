"""`deltaw doctor` as a person reads it, and as one object for programs."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from deltaw.cache import root as cache_root
from deltaw.errors import UserError, nearest
from deltaw.host import choices, product_rates
from deltaw.host import product_rates as measurements
from deltaw.host.choices import SLOW, Choice, choose_precision, choose_threads
from deltaw.host.installed import Package, openmp_libraries, packages, version_of
from deltaw.host.kernel_choice import KernelChoice, choose_kernels
from deltaw.host.memory import free_memory_bytes, memory_limit_bytes, swap_bytes
from deltaw.host.processor import physical_cores, processor_name, usable_processors
from deltaw.host.product_rates import GENERIC, Measured, Sizes, sizes_of
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import read_config
from deltaw.kernels import loader, variants
from deltaw.kernels.arithmetic import STORED, TORCH
from deltaw.kernels.processor import processor_flags
from deltaw.kernels.variants import EMULATED_TILES, LEFT_OUT_BY, MEASURED, NONE, OFF, VARIABLE, asked
from deltaw.reports.tables import add_row, table
from deltaw.training.callbacks import Say, silent
from deltaw.version import __version__

# Facts are gathered in a few seconds and without a network. The root of the file system is a parameter, so that a test
# describes a machine in a folder.
_ROOT = Path("/")
# Variables beside deltaw's own that change how fast it is or where it looks.
OTHER_VARIABLES = ("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "CUDA_VISIBLE_DEVICES", "MALLOC_ARENA_MAX")
STEERING = ("OMP_", "MKL_", "KMP_", "GOMP_", "DNNL_", "ONEDNN_", "ATEN_")
# Packages that no part of deltaw needs, and what they are for.
OPTIONAL = {
    "fastapi": "deltaw serve",
    "llguidance": "formats that answers must have",
    "optuna": "deltaw tune",
    "peft": "loading adapters in PEFT's own code",
    "prometheus-client": "deltaw serve",
    "tensorboard": "track: tensorboard",
    "trackio": "track: trackio",
    "uvicorn": "deltaw serve",
    "wandb": "track: wandb",
    "xllamacpp": "K-quants of deltaw export, and comparing with llama.cpp",
}
# Measures rates of products: of these sizes, with so many threads.
Measure = Callable[[Sizes, int], Measured]


@dataclass(frozen=True)
class Kernels:
    """One variant of the compiled kernels, on this machine.

    Attributes:
        lacking: what the processor would need. built: whether there is a file of it.
        problem: why it cannot be loaded, though it is there; None where it can, or was not tried.
    """

    name: str
    lacking: tuple[str, ...]
    built: bool
    problem: str | None = None

    @property
    def usable(self) -> bool:
        return self.built and not self.lacking and self.problem is None


@dataclass(frozen=True)
class Disk:
    """A folder that deltaw writes to. ``path`` may not exist yet."""

    purpose: str
    path: Path
    free: int
    writable: bool
    held: int | None = None


@dataclass(frozen=True)
class Gpu:
    name: str
    total: int
    free: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class ModelFacts:
    """The model that the doctor was asked about."""

    reference: str
    parameters: int
    sizes: Sizes


@dataclass(frozen=True)
class Facts:
    """All that was found.

    Attributes:
        processors: that this process may use; ``machine_processors`` are those of the machine.
        governor: how the processor sets its frequency, with its driver; empty where that is not known.
        kernels: how products would be computed; ``measured`` are rates of this moment, None where they were
            told by the environment.
    """

    processor: str
    machine_processors: int
    processors: int
    cores: int
    quota: float | None
    threads: Choice[int]
    load: float | None
    governor: tuple[str, str]
    openmp: list[str]
    variants: list[Kernels]
    kernels: KernelChoice
    measured: Measured | None
    notes: list[str]
    memory_limit: Choice[int]
    free_memory: int
    swap: tuple[int, int]
    disks: list[Disk]
    packages: list[Package]
    optional: Mapping[str, str | None]
    gpus: list[Gpu]
    nvidia_driver: bool
    mps: bool
    environment: Mapping[str, str]
    versions: Mapping[str, str]
    model: ModelFacts | None = None
    cache: Mapping[str, int] = field(default_factory=dict)


def gather(
    model: str | None = None,
    output: str = "runs",
    *,
    root: Path = _ROOT,
    measure: Measure = product_rates.measure,
    say: Say = silent,
) -> Facts:
    """Look at this machine.

    Args:
        model: whose sizes the products are measured for; None: usual sizes.
        output: the folder that runs are written to.

    Raises:
        UserError: there is no such model, or ``DELTAW_KERNELS`` asks for what cannot run here.
    """
    usable = usable_processors()
    threads = choose_threads(root=root)
    asked = None if model is None else _model(model, say)
    sizes = GENERIC if asked is None else asked.sizes
    variants.check_asked()
    chosen = choose_kernels(sizes, threads.value)
    told = measurements.for_any() is not None
    cache = cache_root()
    cached = {folder.name: held_bytes(folder) for folder in _folders(cache)}
    return Facts(
        processor=processor_name(root),
        machine_processors=os.cpu_count() or len(usable),
        processors=len(usable),
        cores=physical_cores(usable, root),
        quota=choices.processor_quota(root),
        threads=threads,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        governor=_governor(root),
        openmp=openmp_libraries(root),
        variants=_variants(),
        kernels=chosen,
        measured=None if told else measure(sizes, threads.value),
        notes=loader.notes(),
        memory_limit=memory_limit_bytes(root),
        free_memory=free_memory_bytes(root),
        swap=swap_bytes(root),
        disks=[
            _disk("runs", Path(os.path.expanduser(output))),
            _disk("cache", cache, held=sum(cached.values())),
            *_hub_disk(),
        ],
        packages=packages(),
        optional={name: version_of(name) for name in OPTIONAL},
        gpus=_gpus(),
        nvidia_driver=(root / "proc/driver/nvidia/version").exists(),
        mps=torch.backends.mps.is_available(),
        environment=_environment(),
        versions=_versions(),
        model=asked,
        cache=cached,
    )


def held_bytes(folder: Path) -> int:
    """What the files below a folder take on the disk, which is less than their size where they have holes."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                status = os.lstat(os.path.join(place, name))
            except OSError:
                continue  # it went away meanwhile
            total += min(status.st_size, getattr(status, "st_blocks", 1 << 60) * 512)
    return total


def _model(reference: str, say: Say) -> ModelFacts:
    folder = config_folder(reference, "bf16", False, say=say)
    config = read_config(folder, "causal-lm", None, False)
    parameters = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - the file is no dictionary
                    shape = weights.get_slice(name).get_shape()
                    parameters += int(torch.Size(shape).numel())
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"the weights are damaged: {error}", where=str(file), hint="fetch or copy the model again"
            ) from error
    return ModelFacts(reference, parameters, sizes_of(config))


def _variants() -> list[Kernels]:
    flags = processor_flags()
    switched_off = variants.asked().kernels == variants.NONE
    found = []
    for variant in variants.for_machine():
        lacking = tuple(variant.lacking(flags))
        built = variants.file_of(variant).is_file()
        problem = None
        if built and not lacking and not switched_off:
            try:
                loader.open_variant(variant.name)
            except (OSError, AttributeError, RuntimeError, UserError) as error:
                problem = error.what if isinstance(error, UserError) else str(error)
        found.append(Kernels(variant.name, lacking, built, problem))
    return found


def _disk(purpose: str, path: Path, held: int | None = None) -> Disk:
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    writable = there.is_dir() and os.access(there, os.W_OK) and bool(there.stat().st_mode & 0o222)
    return Disk(purpose, path, shutil.disk_usage(there).free, writable, held)


def _hub_disk() -> list[Disk]:
    """The hub's cache, if there is one yet."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    return [_disk("hub cache", folder, held_bytes(folder))] if folder.is_dir() else []


def _folders(cache: Path) -> list[Path]:
    try:
        return sorted(entry for entry in cache.iterdir() if entry.is_dir())
    except OSError:
        return []


def _gpus() -> list[Gpu]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = torch.cuda.get_device_capability(index)
        found.append(Gpu(torch.cuda.get_device_name(index), total, free, capability))
    return found


def _governor(root: Path) -> tuple[str, str]:
    folder = root / "sys/devices/system/cpu/cpu0/cpufreq"
    words = []
    for name in ("scaling_governor", "scaling_driver"):
        try:
            words.append((folder / name).read_text(encoding="utf-8").strip())
        except OSError:
            words.append("")
    return words[0], words[1]


def _environment() -> dict[str, str]:
    """The variables that are set and that change something, by name."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("DELTAW_", *STEERING)) or name in OTHER_VARIABLES
    }


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
    }


# What the facts of a machine mean for training on it: findings, each with what helps.
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


# A finding without its topic.
Said: TypeAlias = tuple[Severity, str, str | None]


def diagnose(facts: Facts) -> list[Finding]:
    """All findings, by topic."""
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
    return [
        Finding(severity, topic, what, hint) for topic, part in parts.items() for severity, what, hint in part(facts)
    ]


def worst(findings: list[Finding]) -> Severity:
    """The worst severity among the findings."""
    return max((finding.severity for finding in findings), key=SEVERITIES.index, default="ok")


def _threads(facts: Facts) -> Iterator[Said]:
    threads, why = facts.threads.value, facts.threads.why
    bound = facts.cores if facts.quota is None else min(facts.cores, max(1, int(facts.quota)))
    if why == "OMP_NUM_THREADS" and threads < bound:
        yield (
            "warning",
            f"OMP_NUM_THREADS={threads}: runs compute on {threads} of {bound} cores",
            "unset OMP_NUM_THREADS, or set 'threads' in the settings",
        )
    elif why == "OMP_NUM_THREADS" and threads > bound:
        yield (
            "warning",
            f"OMP_NUM_THREADS={threads}: more threads than the {bound} cores that this process may use, so "
            "that they wait for each other",
            f"unset OMP_NUM_THREADS, or set it to {bound}",
        )
    else:
        yield ("ok", f"{threads} threads ({why})", None)
    if facts.quota is not None and facts.quota < facts.processors:
        short = facts.quota < 1
        yield (
            "warning" if short else "note",
            f"a control group allows {facts.quota:g} of {facts.processors} processors",
            "give the container or job more processors: a run is throttled" if short else None,
        )
    if facts.processors < facts.machine_processors:
        yield (
            "note",
            f"this process may use {facts.processors} of the machine's {facts.machine_processors} processors",
            "its affinity was set by taskset, a container or a job scheduler",
        )
    if len(facts.openmp) > 1:
        yield (
            "warning",
            f"{len(facts.openmp)} OpenMP libraries are loaded ({', '.join(facts.openmp)}): their threads "
            "compete for the cores",
            "install torch and NumPy from the same source, both with pip or both with conda",
        )
    if facts.load is not None and facts.load > BUSY * facts.processors:
        yield (
            "warning",
            f"other programs keep the machine busy: {facts.load:.1f} are running or waiting on "
            f"{facts.processors} processors",
            "wait for them, or set 'threads' to what they leave",
        )
    governor, driver = facts.governor
    if governor == "powersave" and driver == "acpi-cpufreq":  # with other drivers the name means nothing
        yield (
            "warning",
            "the processor is held at its lowest frequency (governor powersave)",
            "choose the governor schedutil or performance: cpupower frequency-set -g performance",
        )


def _kernels(facts: Facts) -> Iterator[Said]:
    forced = asked()
    chosen = facts.kernels.arithmetic.kernels
    if forced.kernels == NONE:
        yield ("warning", f"compiled kernels are switched off ({forced.said})", f"unset {VARIABLE} and {OFF}")
        return
    runs = [variant for variant in facts.variants if not variant.lacking]
    if chosen is None:
        problem = next((v.problem for v in runs if v.problem), None)
        yield (
            "warning",
            f"there are no compiled kernels ({problem or 'none was built'}): training works, and is slower",
            "install a C++ compiler (on Debian and Ubuntu: apt install g++), then: pip install "
            "--force-reinstall --no-deps deltaw, or in a checkout: pip install -e .",
        )
        return
    yield ("ok", f"compiled kernels: {chosen}", None)
    if left_out := [variant.name for variant in runs[1:] if not variant.built]:
        yield ("ok", f"not built, though this processor runs them too: {', '.join(left_out)}", None)
    if forced.said:
        yield ("note", f"kernels are forced by {forced.said}", f"unset {VARIABLE} to measure")
    best = runs[0]
    if not best.built:
        yield (
            "note",
            f"the best kernels for this processor, {best.name}, were not built",
            "a newer compiler may know them: install it, then install deltaw again",
        )
    for variant in runs:
        if variant.problem is not None:
            yield (
                "warning",
                f"kernels {variant.name} cannot be used: {variant.problem}",
                "install deltaw again to rebuild them",
            )
    for note in facts.notes:
        yield ("warning", note, "install torch from its own wheels, with OpenMP")


def _rates(facts: Facts) -> Iterator[Said]:
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
        yield ("ok", f"{stored} products: {shown}", None)
    fp32, bf16, int8 = (choice.rate(stored) for stored in ("fp32", "bf16", "int8"))
    if bf16 < SLOW * fp32:
        yield (
            "note",
            f"bf16 is emulated: its products reach {bf16 / fp32:.0%} of the rate of fp32",
            "precision: auto takes fp32 here; bf16 still halves the memory of the weights",
        )
    if int8 < SLOW * max(fp32, bf16):
        yield (
            "note",
            f"int8 products reach {int8 / max(fp32, bf16):.0%} of the rate of the fastest precision",
            "precision: int8 saves memory here, not time",
        )
    faster = choice.faster_precision(choose_precision("cpu", rates=_by_precision(facts)).value)
    if faster is not None:
        yield ("note", faster, None)
    yield from _now(facts)


def _now(facts: Facts) -> Iterator[Said]:
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
        yield (
            "warning",
            f"{stored} products are at {shares[stored]:.0%} of the rate that was measured here before",
            "other programs, heat or a limit on the processor's time hold the machine back",
        )
    elif facts.measured.disturbed:
        yield ("note", "other programs disturbed the measurement", "measure again while the machine is idle")


def _by_precision(facts: Facts) -> dict[str, float]:
    return {stored: facts.kernels.rate(stored) for stored in STORED}


def _memory(facts: Facts) -> Iterator[Said]:
    limit, free = facts.memory_limit, facts.free_memory
    low = free < LOW_MEMORY
    yield (
        "warning" if low else "ok",
        f"{free / GB:.1f} GB free of {limit.value / GB:.1f} GB ({limit.why})",
        "end other programs, or give the container more memory" if low else None,
    )
    used, _ = facts.swap
    if used > SWAPPED:
        yield (
            "warning",
            f"{used / GB:.1f} GB are swapped out: a run that does not fit into memory crawls",
            "end other programs; 'deltaw plan' says what a run needs",
        )
    if facts.model is None:
        return
    precision = choose_precision("cpu", rates=_by_precision(facts)).value
    sizes = {name: facts.model.parameters * size / GB for name, size in BYTES.items()}
    fits = sizes[precision] * GB < free
    shown = ", ".join(f"{name} {size:.2f} GB" for name, size in sizes.items())
    yield (
        "ok" if fits else "warning",
        f"the weights of {facts.model.reference} ({facts.model.parameters / 1e6:,.0f} million) take: {shown}",
        None if fits else "try precision: int8, or a smaller model; 'deltaw plan' says what a run needs",
    )


def _disks(facts: Facts) -> Iterator[Said]:
    for disk in facts.disks:
        held = "" if disk.held is None else f", {disk.held / GB:.2f} GB in it"
        what = f"{disk.purpose}: {disk.free / GB:.1f} GB free{held} ({disk.path})"
        if not disk.writable:
            yield _not_writable(disk)
        elif disk.free < FULL_DISK:
            severity: Severity = "problem" if disk.purpose == "runs" else "warning"
            yield (severity, what, "the disk is full: free some space")
        elif disk.free < LOW_DISK:
            yield ("note", what, "checkpoints and kept features take several GB for long runs")
        else:
            yield ("ok", what, None)


def _not_writable(disk: Disk) -> Said:
    if disk.purpose == "runs":
        return ("problem", f"runs cannot be written to {disk.path}", "set 'output' to another folder")
    variable = "DELTAW_CACHE" if disk.purpose == "cache" else "HF_HUB_CACHE"
    return (
        "warning",
        f"the {disk.purpose} {disk.path} cannot be written to: what could be kept is made again each time",
        f"set {variable} to another folder",
    )


def _versions_fit(facts: Facts) -> Iterator[Said]:
    needed = [package for package in facts.packages if package.extra is None]
    if not facts.packages:
        yield (
            "note",
            "this copy of deltaw is not installed, so that the versions of its packages cannot be checked",
            "pip install -e . in the checkout",
        )
    wrong = [package for package in facts.packages if package.installed is not None and not package.fits]
    missing = [package for package in needed if package.installed is None]
    for package in wrong:
        severity: Severity = "problem" if package.extra is None else "warning"
        yield (
            severity,
            f"{package.name} {package.installed} does not fit: deltaw needs {package.wanted}",
            f"pip install '{package.name}{package.wanted}'",
        )
    for package in missing:
        yield ("problem", f"{package.name} is missing", f"pip install '{package.name}{package.wanted}'")
    if needed and not wrong and not missing:
        yield ("ok", f"all {len(needed)} packages that deltaw needs fit", None)


def _extras(facts: Facts) -> Iterator[Said]:
    there = [f"{name} {version}" for name, version in facts.optional.items() if version is not None]
    if there:
        yield ("ok", f"optional packages: {', '.join(there)}", None)
    for name, version in facts.optional.items():
        if version is None:
            extra = next((p.extra for p in facts.packages if p.name == name and p.extra), None)
            install = f"'deltaw[{extra}]'" if extra else name
            yield ("ok", f"{name} is not installed", f"for {OPTIONAL[name]}: pip install {install}")


def _gpu(facts: Facts) -> Iterator[Said]:
    for index, gpu in enumerate(facts.gpus):
        major, minor = gpu.capability
        yield (
            "ok",
            f"cuda:{index}: {gpu.name}, {gpu.free / GB:.1f} of {gpu.total / GB:.1f} GB free, "
            f"compute capability {major}.{minor}",
            None,
        )
        if major < 8:
            yield ("note", f"cuda:{index} has no native bf16: runs use fp32 there", None)
    if facts.gpus:
        return
    if facts.nvidia_driver:
        build = "is a build without CUDA" if facts.versions.get("cuda") == "none" else "does not see it"
        yield (
            "warning",
            f"there is an NVIDIA driver, but this torch {build}: runs use the processor",
            "install the CUDA build of torch (pytorch.org), and check CUDA_VISIBLE_DEVICES and nvidia-smi",
        )
    elif facts.mps:
        yield ("note", "Apple's GPU is used only when asked for", "set device: mps to try it")
    else:
        yield ("ok", "no GPU: runs use the processor", None)


def _environment_findings(facts: Facts) -> Iterator[Said]:
    for name in facts.environment:
        if not name.startswith("DELTAW_"):
            continue
        if name in VARIABLES:
            yield ("note", f"{name} is set: {VARIABLES[name]}", None)
            continue
        near = nearest(name, VARIABLES, 1)
        hint = f"did you mean {near[0]}?" if near else f"the variables are {', '.join(VARIABLES)}"
        yield ("warning", f"{name} is set, and deltaw has no such variable", hint)


_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True)
class Examination:
    """A machine, and what is to be said about it."""

    facts: Facts
    findings: list[Finding]

    @property
    def status(self) -> Severity:
        """The worst of the findings."""
        return worst(self.findings)

    def as_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        facts = self.facts
        choice, now = facts.kernels, facts.measured
        return {
            "deltaw": __version__,
            "versions": dict(facts.versions),
            "status": self.status,
            "processor": {
                "name": facts.processor,
                "cores": facts.cores,
                "processors": facts.processors,
                "machine_processors": facts.machine_processors,
                "quota": facts.quota,
                "threads": facts.threads.value,
                "threads_why": facts.threads.why,
                "load": facts.load,
                "openmp": facts.openmp,
            },
            "kernels": {
                "chosen": choice.arithmetic.as_dict(),
                "variants": [
                    {**asdict(variant), "lacking": list(variant.lacking), "usable": variant.usable}
                    for variant in facts.variants
                ],
                "sizes": asdict(choice.sizes),
                "rates": choice.rates,
                "rates_now": None if now is None else now.rates,
                "disturbed": choice.disturbed or (now is not None and now.disturbed),
            },
            "memory": {
                "limit_bytes": facts.memory_limit.value,
                "limit_why": facts.memory_limit.why,
                "free_bytes": facts.free_memory,
                "swap_used_bytes": facts.swap[0],
                "swap_total_bytes": facts.swap[1],
            },
            "disks": [
                {
                    "purpose": disk.purpose,
                    "path": str(disk.path),
                    "free_bytes": disk.free,
                    "writable": disk.writable,
                    "held_bytes": disk.held,
                }
                for disk in facts.disks
            ],
            "cache_bytes": dict(facts.cache),
            "packages": [package.as_dict() for package in facts.packages],
            "optional": dict(facts.optional),
            "gpus": [asdict(gpu) | {"capability": list(gpu.capability)} for gpu in facts.gpus],
            "environment": dict(facts.environment),
            "model": None if facts.model is None else asdict(facts.model),
            "findings": [finding.as_dict() for finding in self.findings],
        }

    def render(self) -> RenderableType:
        """A heading, the rates, and the findings."""
        facts = self.facts
        versions = facts.versions
        parts: list[RenderableType] = [
            Text(f"deltaw {__version__}, Python {versions['python']}, torch {versions['torch']}, {versions['system']}"),
            Text(f"{facts.processor}: {facts.cores} cores, {facts.processors} processors"),
            Text(),
            self._rates(),
            Text(
                f"billion operations a second with {facts.kernels.threads} threads, hidden size "
                f"{facts.kernels.sizes.hidden}; * is used"
            ),
            Text(),
            self._findings(),
            Text(),
            Text(self._verdict()),
        ]
        return Group(*parts)

    def _rates(self) -> Table:
        """Products by kernels and arithmetic, what runs use marked by a star."""
        choice = self.facts.kernels
        made = table(["products by", *STORED], box=None, padding=(0, 1))
        names = dict.fromkeys(name for stored in STORED for name in choice.rates[stored])
        for name in [*(n for n in names if n != TORCH), *(n for n in names if n == TORCH)]:
            cells = []
            for stored in STORED:
                rate = choice.rates[stored].get(name)
                way = choice.arithmetic.of(stored)
                used = name == (TORCH if way == TORCH else f"{choice.arithmetic.kernels}:{way}")
                cells.append("" if rate is None else f"{'* ' if used else ''}{rate:,.0f}")
            add_row(made, ["the math library (torch)" if name == TORCH else name, *cells])
        return made

    def _findings(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in self.findings:
            said = Text(finding.what)
            if finding.hint:
                said.append(f"\n{finding.hint}", style="dim")
            table.add_row(Text(finding.severity, style=_STYLES[finding.severity]), finding.topic, said)
        return table

    def _verdict(self) -> str:
        counts = dict.fromkeys(SEVERITIES, 0)
        for finding in self.findings:
            counts[finding.severity] += 1
        if counts["problem"]:
            return f"{_counted(counts['problem'], 'problem')}: training is not possible before that is solved"
        if counts["warning"]:
            return f"training works; {_counted(counts['warning'], 'warning')} above cost time or memory"
        return "training works, and nothing holds it back"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def examine(model: str | None = None, output: str = "runs", say: Say = silent) -> Examination:
    """Look at this machine, and say what it means for training; see :func:`deltaw.reports.doctor.gather`."""
    facts = gather(model, output, say=say)
    return Examination(facts, diagnose(facts))
