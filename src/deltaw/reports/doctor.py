"""Diagnose a machine for `deltaw doctor`: properties, installed libraries, findings, and their format."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deltaw.cache import root as cache_root
from deltaw.errors import UserError, nearest
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import read_config
from deltaw.kernels import loader, variants
from deltaw.kernels.arithmetic import TORCH, WEIGHT_TYPES
from deltaw.kernels.processor import processor_flags, processor_name
from deltaw.kernels.variants import (
    APPROXIMATION_SWITCHES,
    EMULATED_TILES,
    MEASURED,
    NONE,
    OFF,
    VARIABLE,
    kernel_overrides,
)
from deltaw.machine import choices, product_rates
from deltaw.machine import product_rates as measurements
from deltaw.machine.choices import (
    SLOW_RATE_SHARE,
    Choice,
    choose_precision,
    choose_threads,
    physical_cores,
    read_lines,
    usable_processors,
)
from deltaw.machine.kernel_choice import KernelChoice, choose_kernels
from deltaw.machine.memory import free_memory_bytes, memory_limit_bytes, swap_bytes
from deltaw.machine.product_rates import GENERIC, ProductRates, Sizes, sizes_of
from deltaw.progress import LogFunction, ignore_line
from deltaw.reports.tables import add_row, table
from deltaw.settings import task_registry
from deltaw.tensor_files import TensorFile
from deltaw.version import __version__


@dataclass(frozen=True)
class Package:
    """A package that deltaw depends on.

    Attributes:
        name: Name of the distribution.
        wanted: Required version range, for example ``>=2.6,<3``. Empty if any version is accepted.
        installed: Installed version, or None if the package is not installed.
        extra: Extra that requires the package, or None if it is mandatory.
    """

    name: str
    wanted: str
    installed: str | None
    extra: str | None = None

    @property
    def fits(self) -> bool:
        """True if the installed version is in the required range."""
        if self.installed is None:
            return False
        try:
            return Requirement(f"{self.name}{self.wanted}").specifier.contains(self.installed, prereleases=True)
        except (InvalidRequirement, InvalidVersion):
            return True  # a version that cannot be parsed is not reported as wrong

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "wanted": self.wanted or None, "fits": self.fits}


def version_of(name: str) -> str | None:
    """Return the installed version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages(requirements: list[str] | None = None) -> list[Package]:
    """Return the dependencies of deltaw, each once, without those of the ``dev`` extra.

    Args:
        requirements: Requirement strings in the format of package metadata. None reads deltaw's metadata, and the
            result is empty if deltaw is not installed.
    """
    if requirements is None:
        try:
            requirements = importlib.metadata.requires("deltaw") or []
        except importlib.metadata.PackageNotFoundError:
            return []
    by_name: dict[str, Package] = {}
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        _, separator, rest = str(requirement.marker or "").partition('extra == "')
        extra = rest.partition('"')[0] if separator else None
        if extra == "dev" or (extra is None and requirement.marker is not None and not requirement.marker.evaluate()):
            continue
        package = Package(requirement.name, str(requirement.specifier), version_of(requirement.name), extra)
        if requirement.name not in by_name or by_name[requirement.name].extra is not None:
            by_name[requirement.name] = package
    return list(by_name.values())


_LIBRARY = re.compile(r"/(lib(?:gomp|iomp5|omp)[^/]*\.so[^/]*)$")


def openmp_libraries(root: Path = Path("/")) -> list[str]:
    """Return the sorted file names of the OpenMP libraries loaded in this process.

    More than one library means more than one thread pool. The list is empty if the system has no ``/proc/self/maps``.
    """
    matches = (_LIBRARY.search(line.rstrip()) for line in read_lines(root / "proc/self/maps"))
    return sorted({match[1] for match in matches if match})


# Collecting the properties takes seconds and needs no network. The root of the file system is a parameter, so tests can
# describe a machine in a folder.
_ROOT = Path("/")
# Environment variables of other programs that affect the speed or the folders of deltaw.
OTHER_VARIABLES = ("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "CUDA_VISIBLE_DEVICES", "MALLOC_ARENA_MAX")
LIBRARY_PREFIXES = ("OMP_", "MKL_", "KMP_", "GOMP_", "DNNL_", "ONEDNN_", "ATEN_")
# Optional packages and their purposes.
OPTIONAL = {
    "faiss-cpu": "deltaw data mine, in more than a million passages",
    "fastapi": "deltaw serve",
    "httpx": "deltaw studio",
    "llguidance": "constrained generation",
    "lm-eval": "deltaw eval --benchmarks",
    "mcp": "deltaw mcp",
    "optuna": "deltaw tune",
    "peft": "loading adapters in PEFT's own code",
    "prometheus-client": "deltaw serve",
    "python-calamine": "deltaw studio",
    "tensorboard": "track: tensorboard",
    "trackio": "track: trackio",
    "uvicorn": "deltaw serve",
    "wandb": "track: wandb",
    "xllamacpp": "K-quants of deltaw export, and comparing with llama.cpp",
}
# Measures the rates of matrix products of the given sizes with a number of threads.
Measure = Callable[[Sizes, int], ProductRates]


@dataclass(frozen=True)
class Kernels:
    """A variant of the compiled kernels on this machine.

    Attributes:
        name: Name of the variant.
        lacking: CPU features that are missing.
        built: True if its library exists.
        problem: Reason why it cannot be loaded, or None if it can or was not tried.
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
    """Folder that deltaw writes to. ``path`` may not exist yet."""

    purpose: str
    path: Path
    free_bytes: int
    writable: bool
    held_bytes: int | None = None


@dataclass(frozen=True)
class Gpu:
    name: str
    total: int
    free: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class ModelSizes:
    """The model that was passed to the command."""

    reference: str
    parameters: int
    sizes: Sizes


@dataclass(frozen=True)
class Diagnosis:
    """Properties of the machine and the installation.

    Attributes:
        processors: Number of CPUs that this process may use.
        machine_processors: Number of CPUs of the machine.
        governor: Frequency governor and its driver, empty if unknown.
        kernels: Kernels that runs would use.
        measured: Current rates of products, or None if the environment defines them.
        cache_bytes: Size of each folder in the cache.
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
    measured: ProductRates | None
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
    model: ModelSizes | None = None
    cache_bytes: Mapping[str, int] = field(default_factory=dict)


def gather(
    model: str | None = None,
    output: str = "runs",
    *,
    root: Path = _ROOT,
    measure: Measure = product_rates.measure,
    log: LogFunction = ignore_line,
) -> Diagnosis:
    """Collect the properties of this machine.

    Args:
        model: Model whose sizes are used to measure products, or None for typical sizes.
        output: Folder of runs.
        root: Root of the file system.
        measure: Measures the rates of products.
        log: Receives progress lines.

    Raises:
        UserError: If the model does not exist, or ``DELTAW_KERNELS`` requests kernels that cannot run here.
    """
    usable = usable_processors()
    threads = choose_threads(root=root)
    model_summary = None if model is None else _model(model, log)
    sizes = GENERIC if model_summary is None else model_summary.sizes
    variants.check_overrides()
    chosen = choose_kernels(sizes, threads.value)
    has_forced_rates = measurements.forced_rates() is not None
    cache, hub = cache_root(), Path(HF_HUB_CACHE)
    _, folders, _ = next(os.walk(cache), ("", [], []))  # empty if it does not exist or cannot be read
    cache_bytes = {name: folder_bytes(cache / name) for name in sorted(folders)}

    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    torch_versions = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}

    def matters(variable: str) -> bool:
        return variable.startswith(("DELTAW_", *LIBRARY_PREFIXES)) or variable in OTHER_VARIABLES

    disks = [_disk("runs", Path(os.path.expanduser(output))), _disk("cache", cache, sum(cache_bytes.values()))]
    if hub.is_dir():
        disks.append(_disk("hub cache", hub, folder_bytes(hub)))
    return Diagnosis(
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
        measured=None if has_forced_rates else measure(sizes, threads.value),
        notes=loader.notes(),
        memory_limit=memory_limit_bytes(root),
        free_memory=free_memory_bytes(root),
        swap=swap_bytes(root),
        disks=disks,
        packages=packages(),
        optional={name: version_of(name) for name in OPTIONAL},
        gpus=[_gpu_of(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)],
        nvidia_driver=(root / "proc/driver/nvidia/version").exists(),
        mps=torch.backends.mps.is_available(),
        environment={n: HIDDEN_VALUE if n in SECRETS else v for n, v in sorted(os.environ.items()) if matters(n)},
        versions={"python": platform.python_version(), "system": system, **torch_versions},
        model=model_summary,
        cache_bytes=cache_bytes,
    )


def folder_bytes(folder: Path) -> int:
    """Return the disk usage of the files below a folder, which is less than their size for sparse files."""
    total = 0
    for directory, _, files in os.walk(folder):
        for name in files:
            try:
                status = os.lstat(os.path.join(directory, name))
            except OSError:
                continue  # deleted in the meantime
            total += min(status.st_size, getattr(status, "st_blocks", 1 << 60) * 512)
    return total


def _model(reference: str, log: LogFunction) -> ModelSizes:
    folder = config_folder(reference, "bf16", False, log=log)
    config = read_config(folder, task_registry.default_task(), None, False)
    parameters = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            weights = TensorFile(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            hint = "fetch or copy the model again"
            raise UserError(f"the weights are damaged: {error}", location=str(file), hint=hint) from error
        parameters += sum(weights.meta_tensor(name).numel() for name in weights)
    return ModelSizes(reference, parameters, sizes_of(config))


def _variants() -> list[Kernels]:
    flags = processor_flags()
    switched_off = variants.kernel_overrides().kernels == variants.NONE
    results = []
    for variant in variants.for_machine():
        lacking = tuple(variant.lacking(flags))
        built = variants.file_of(variant).is_file()
        problem = None
        if built and not lacking and not switched_off:
            try:
                loader.open_variant(variant.name)
            except (OSError, AttributeError, RuntimeError, UserError) as error:
                problem = error.message if isinstance(error, UserError) else str(error)
        results.append(Kernels(variant.name, lacking, built, problem))
    return results


def _disk(purpose: str, path: Path, held_bytes: int | None = None) -> Disk:
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    writable = existing.is_dir() and os.access(existing, os.W_OK) and bool(existing.stat().st_mode & 0o222)
    return Disk(purpose, path, shutil.disk_usage(existing).free, writable, held_bytes)


def _gpu_of(index: int) -> Gpu:
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(torch.cuda.get_device_name(index), total, free, torch.cuda.get_device_capability(index))


def _governor(root: Path) -> tuple[str, str]:
    folder = root / "sys/devices/system/cpu/cpu0/cpufreq"
    try:
        governor, driver = (folder / f"scaling_{name}" for name in ("governor", "driver"))
        return governor.read_text(encoding="utf-8").strip(), driver.read_text(encoding="utf-8").strip()
    except OSError:
        return "", ""


# Findings about training on this machine.
Severity = Literal["ok", "note", "warning", "problem"]
# In ascending order of severity.
SEVERITIES: tuple[Severity, ...] = ("ok", "note", "warning", "problem")
GB = 1e9
# Free bytes below which a disk is low, and below which it is full.
LOW_DISK, FULL_DISK = 5e9, 50e6
# Free memory in bytes below which only very small models can be trained.
LOW_MEMORY = 1e9
# Used swap in bytes above which memory is considered insufficient.
SWAPPED = 512e6
# Share of the stored rate of a product below which the machine is considered slowed down.
MIN_RATE_SHARE = 0.7
# Load per CPU above which the machine is considered busy.
BUSY = 1.5
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.1}
# deltaw's environment variables and their effects.
VARIABLES = {
    VARIABLE: "which compiled kernels are used",
    OFF: "0: no compiled kernels",
    MEASURED: "rates of products, measured by another process",
    APPROXIMATION_SWITCHES["int8_gradients"]: "0: gradients are multiplied with bf16 weights in bf16",
    APPROXIMATION_SWITCHES["int8_logits"]: "0: training does not compute logits with int8 products",
    APPROXIMATION_SWITCHES["summed_classes"]: "0: a head's gradient is computed with every class of every row",
    "DELTAW_CACHE": "cache folder for models, features and measurements",
    "DELTAW_ALLOWED_FOLDERS": "folders that rows may read images from; set by deltaw mcp and deltaw studio",
    "DELTAW_API_KEY": "API key that requests to deltaw serve must send",
    "DELTAW_PEER_SECONDS": "timeout of processes that train together, in seconds",
    "DELTAW_TRACEBACK": "1: unexpected errors print a traceback",
    "DELTAW_TARGET": "the system and CPU that kernels are compiled for",
    "DELTAW_VARIANTS": "which kernels are compiled at installation",
    EMULATED_TILES: "1: emulates AMX tiles with arrays, for tests of the kernels",
}


# Variables whose values are not printed.
SECRETS, HIDDEN_VALUE = {"DELTAW_API_KEY"}, "(hidden)"


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
    threads, reason = diagnosis.threads.value, diagnosis.threads.why
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
    runs = [variant for variant in diagnosis.variants if not variant.lacking]
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
        rate, product = choice.rate(stored), choice.arithmetic.for_type(stored)
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
    limit, free = diagnosis.memory_limit, diagnosis.free_memory
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
        choice, current_rates = diagnosis.kernels, diagnosis.measured
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
        diagnosis, choice, versions = self.diagnosis, self.diagnosis.kernels, self.diagnosis.versions
        program = f"deltaw {__version__}, Python {versions['python']}, torch {versions['torch']}, {versions['system']}"
        machine = f"{diagnosis.processor}: {diagnosis.cores} cores, {diagnosis.processors} processors"
        conditions = f"with {choice.threads} threads, hidden size {choice.sizes.hidden}; * is used"
        head, unit = Text(f"{program}\n{machine}\n"), Text(f"billion operations per second {conditions}\n")
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
