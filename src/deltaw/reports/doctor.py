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
from huggingface_hub.constants import HF_HUB_CACHE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deltaw.cache import root as cache_root
from deltaw.errors import UserError, nearest
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import read_config
from deltaw.kernels import loader, variants
from deltaw.kernels.arithmetic import STORED, TORCH
from deltaw.kernels.processor import processor_flags
from deltaw.kernels.variants import EMULATED_TILES, LEFT_OUT_BY, MEASURED, NONE, OFF, VARIABLE, asked
from deltaw.machine import choices, product_rates
from deltaw.machine import product_rates as measurements
from deltaw.machine.choices import SLOW, Choice, choose_precision, choose_threads
from deltaw.machine.installed import Package, openmp_libraries, packages, version_of
from deltaw.machine.kernel_choice import KernelChoice, choose_kernels
from deltaw.machine.memory import free_memory_bytes, memory_limit_bytes, swap_bytes
from deltaw.machine.processor import physical_cores, processor_name, usable_processors
from deltaw.machine.product_rates import GENERIC, Measured, Sizes, sizes_of
from deltaw.reports.tables import add_row, table
from deltaw.tensor_files import TensorFile
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
    "faiss-cpu": "deltaw data mine, in more than a million passages",
    "fastapi": "deltaw serve",
    "llguidance": "formats that answers must have",
    "lm-eval": "deltaw eval --tasks",
    "mcp": "deltaw mcp",
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
    cache_bytes: Mapping[str, int] = field(default_factory=dict)


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
    cache, hub = cache_root(), Path(HF_HUB_CACHE)
    _, folders, _ = next(os.walk(cache), ("", [], []))  # nothing if it is not there, or cannot be read
    cached = {name: held_bytes(cache / name) for name in sorted(folders)}

    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    of_torch = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}

    def matters(variable: str) -> bool:
        return variable.startswith(("DELTAW_", *STEERING)) or variable in OTHER_VARIABLES

    disks = [_disk("runs", Path(os.path.expanduser(output))), _disk("cache", cache, sum(cached.values()))]
    if hub.is_dir():
        disks.append(_disk("hub cache", hub, held_bytes(hub)))
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
        disks=disks,
        packages=packages(),
        optional={name: version_of(name) for name in OPTIONAL},
        gpus=[_gpu_of(index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)],
        nvidia_driver=(root / "proc/driver/nvidia/version").exists(),
        mps=torch.backends.mps.is_available(),
        environment={name: value for name, value in sorted(os.environ.items()) if matters(name)},
        versions={"python": platform.python_version(), "system": system, **of_torch},
        model=asked,
        cache_bytes=cached,
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
            weights = TensorFile(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            hint = "fetch or copy the model again"
            raise UserError(f"the weights are damaged: {error}", where=str(file), hint=hint) from error
        parameters += sum(weights.described(name).numel() for name in weights)
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
    "DELTAW_TARGET": "the system and processor that kernels are compiled for",
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


def _threads(facts: Facts) -> Iterator[Said]:
    threads, why = facts.threads.value, facts.threads.why
    bound = facts.cores if facts.quota is None else min(facts.cores, max(1, int(facts.quota)))
    if why == "OMP_NUM_THREADS" and threads < bound:
        what = f"OMP_NUM_THREADS={threads}: runs compute on {threads} of {bound} cores"
        yield ("warning", what, "unset OMP_NUM_THREADS, or set 'threads' in the settings")
    elif why == "OMP_NUM_THREADS" and threads > bound:
        what = f"OMP_NUM_THREADS={threads}: more threads than usable cores ({bound}), which wait for each other"
        yield ("warning", what, f"unset OMP_NUM_THREADS, or set it to {bound}")
    else:
        yield ("ok", f"{threads} threads ({why})", None)
    if facts.quota is not None and facts.quota < facts.processors:
        what = f"a control group allows {facts.quota:g} of {facts.processors} processors"
        short: Said = ("warning", what, "give the container or job more processors: a run is throttled")
        yield short if facts.quota < 1 else ("note", what, None)
    if facts.processors < facts.machine_processors:
        what = f"this process may use {facts.processors} of the machine's {facts.machine_processors} processors"
        yield ("note", what, "its affinity was set by taskset, a container or a job scheduler")
    if len(facts.openmp) > 1:
        what = f"several OpenMP libraries are loaded ({', '.join(facts.openmp)}), whose threads compete for the cores"
        yield ("warning", what, "install torch and NumPy from the same source, both with pip or both with conda")
    if facts.load is not None and facts.load > BUSY * facts.processors:
        what = f"the machine is busy: {facts.load:.1f} are running or waiting on {facts.processors} processors"
        yield ("warning", what, "wait for them, or set 'threads' to what they leave")
    if facts.governor == ("powersave", "acpi-cpufreq"):  # with other drivers the name means nothing
        what = "the processor is held at its lowest frequency (governor powersave)"
        yield ("warning", what, "choose another governor: cpupower frequency-set -g performance")


def _kernels(facts: Facts) -> Iterator[Said]:
    forced = asked()
    chosen = facts.kernels.arithmetic.kernels
    if forced.kernels == NONE:
        yield ("warning", f"compiled kernels are switched off ({forced.said})", f"unset {VARIABLE} and {OFF}")
        return
    runs = [variant for variant in facts.variants if not variant.lacking]
    if chosen is None:
        problem = next((v.problem for v in runs if v.problem), "none was built")
        again = "pip install --force-reinstall --no-deps deltaw, or in a checkout: pip install -e ."
        hint = f"install a C++ compiler (on Debian and Ubuntu: apt install g++), then: {again}"
        yield ("warning", f"there are no compiled kernels ({problem}): training works, and is slower", hint)
        return
    yield ("ok", f"compiled kernels: {chosen}", None)
    if left_out := [variant.name for variant in runs[1:] if not variant.built]:
        yield ("ok", f"not built, though this processor runs them too: {', '.join(left_out)}", None)
    if forced.said:
        yield ("note", f"kernels are forced by {forced.said}", f"unset {VARIABLE} to measure")
    if not runs[0].built:
        what = f"the best kernels for this processor, {runs[0].name}, were not built"
        yield ("note", what, "a newer compiler may know them: install it, then install deltaw again")
    for variant in runs:
        if variant.problem is not None:
            what = f"kernels {variant.name} cannot be used: {variant.problem}"
            yield ("warning", what, "install deltaw again to rebuild them")
    for note in facts.notes:
        yield ("warning", note, "install torch from its own wheels, with OpenMP")


def _rates(facts: Facts) -> Iterator[Said]:
    choice = facts.kernels
    for stored in STORED:
        rate, way = choice.rate(stored), choice.arithmetic.of(stored)
        by_torch = choice.rates[stored].get(TORCH)
        unit = "GOP/s" if stored == "int8" else "GFLOP/s"
        against = "" if by_torch is None else f"; the math library reaches {by_torch:.0f}"
        by = " by the math library" if way == TORCH else f" ({way}){against}"
        yield ("ok", f"{stored} products: {rate:.0f} {unit}{by}", None)
    fp32, bf16, int8 = (choice.rate(stored) for stored in ("fp32", "bf16", "int8"))
    if bf16 < SLOW * fp32:
        what = f"bf16 is emulated: its products reach {bf16 / fp32:.0%} of the rate of fp32"
        yield ("note", what, "precision: auto takes fp32 here; bf16 still halves the memory of the weights")
    if int8 < SLOW * max(fp32, bf16):
        what = f"int8 products reach {int8 / max(fp32, bf16):.0%} of the rate of the fastest precision"
        yield ("note", what, "precision: int8 saves memory here, not time")
    faster = choice.faster_precision(_precision(facts))
    if faster is not None:
        yield ("note", faster, None)
    yield from _now(facts)


def _now(facts: Facts) -> Iterator[Said]:
    """How the rates of this moment compare with those that runs count on."""
    if facts.measured is None:
        return
    shares = {}
    for stored in STORED:
        now = facts.measured.rates.get(stored, {}).get(_used(facts.kernels, stored))
        if now is not None:
            shares[stored] = now / facts.kernels.rate(stored)
    if shares and min(shares.values()) < HELD_BACK:
        stored = min(shares, key=lambda name: shares[name])
        what = f"{stored} products are at {shares[stored]:.0%} of the rate that was measured here before"
        yield ("warning", what, "other programs, heat or a limit on the processor's time hold the machine back")
    elif facts.measured.disturbed:
        yield ("note", "other programs disturbed the measurement", "measure again while the machine is idle")


def _used(choice: KernelChoice, stored: str) -> str:
    """The candidate by which products with weights of a type are computed."""
    way = choice.arithmetic.of(stored)
    return TORCH if way == TORCH else f"{choice.arithmetic.kernels}:{way}"


def _precision(facts: Facts) -> str:
    """The precision of runs by default."""
    return choose_precision("cpu", rates={stored: facts.kernels.rate(stored) for stored in STORED}).value


def _memory(facts: Facts) -> Iterator[Said]:
    limit, free = facts.memory_limit, facts.free_memory
    what = f"{free / GB:.1f} GB free of {limit.value / GB:.1f} GB ({limit.why})"
    low: Said = ("warning", what, "end other programs, or give the container more memory")
    yield low if free < LOW_MEMORY else ("ok", what, None)
    used, _ = facts.swap
    if used > SWAPPED:
        what = f"{used / GB:.1f} GB are swapped out: a run that does not fit into memory crawls"
        yield ("warning", what, "end other programs; 'deltaw plan' says what a run needs")
    if facts.model is None:
        return
    sizes = {name: facts.model.parameters * size / GB for name, size in BYTES.items()}
    fits = sizes[_precision(facts)] * GB < free
    shown = ", ".join(f"{name} {size:.2f} GB" for name, size in sizes.items())
    what = f"the weights of {facts.model.reference} ({facts.model.parameters / 1e6:,.0f} million) take: {shown}"
    hint = "try precision: int8, or a smaller model; 'deltaw plan' says what a run needs"
    yield ("ok", what, None) if fits else ("warning", what, hint)


def _disks(facts: Facts) -> Iterator[Said]:
    for disk in facts.disks:
        held = "" if disk.held_bytes is None else f", {disk.held_bytes / GB:.2f} GB in it"
        what = f"{disk.purpose}: {disk.free_bytes / GB:.1f} GB free{held} ({disk.path})"
        severity: Severity = "problem" if disk.purpose == "runs" else "warning"
        if not disk.writable:
            variable = {"runs": "'output'", "cache": "DELTAW_CACHE"}.get(disk.purpose, "HF_HUB_CACHE")
            what = f"the {disk.purpose} cannot be written to {disk.path}"
            yield (severity, what, f"set {variable} to another folder")
        elif disk.free_bytes < FULL_DISK:
            yield (severity, what, "the disk is full: free some space")
        elif disk.free_bytes < LOW_DISK:
            yield ("note", what, "checkpoints and kept features take several GB for long runs")
        else:
            yield ("ok", what, None)


def _versions_fit(facts: Facts) -> Iterator[Said]:
    needed = [package for package in facts.packages if package.extra is None]
    if not facts.packages:
        what = "this copy of deltaw is not installed, so the versions of its packages cannot be checked"
        yield ("note", what, "pip install -e . in the checkout")
    unfit = [p for p in facts.packages if not p.fits and (p in needed or p.installed is not None)]
    for package in unfit:
        severity: Severity = "problem" if package in needed else "warning"
        wrong = f"{package.installed} does not fit: deltaw needs {package.wanted}"
        what = f"{package.name} {wrong if package.installed is not None else 'is missing'}"
        yield (severity, what, f'pip install "{package.name}{package.wanted}"')
    if needed and not unfit:
        yield ("ok", f"all {len(needed)} packages that deltaw needs fit", None)


def _extras(facts: Facts) -> Iterator[Said]:
    there = [f"{name} {version}" for name, version in facts.optional.items() if version is not None]
    if there:
        yield ("ok", f"optional packages: {', '.join(there)}", None)
    for name, version in facts.optional.items():
        if version is None:
            extra = next((p.extra for p in facts.packages if p.name == name and p.extra), None)
            install = f'"deltaw[{extra}]"' if extra else name
            yield ("ok", f"{name} is not installed", f"for {OPTIONAL[name]}: pip install {install}")


def _gpu(facts: Facts) -> Iterator[Said]:
    for index, gpu in enumerate(facts.gpus):
        major, minor = gpu.capability
        memory = f"{gpu.free / GB:.1f} of {gpu.total / GB:.1f} GB free"
        yield ("ok", f"cuda:{index}: {gpu.name}, {memory}, compute capability {major}.{minor}", None)
        if major < 8:
            yield ("note", f"cuda:{index} has no native bf16: runs use fp32 there", None)
    if facts.gpus:
        return
    if facts.nvidia_driver:
        build = "is a build without CUDA" if facts.versions.get("cuda") == "none" else "does not see it"
        what = f"there is an NVIDIA driver, but this torch {build}: runs use the processor"
        hint = "install the CUDA build of torch (pytorch.org), and check CUDA_VISIBLE_DEVICES and nvidia-smi"
        yield ("warning", what, hint)
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
_PROCESSOR = ("cores", "processors", "machine_processors", "quota", "load", "openmp")


@dataclass(frozen=True)
class Examination:
    """A machine, and what is to be said about it."""

    facts: Facts
    findings: list[Finding]

    @property
    def status(self) -> Severity:
        """The worst of the findings."""
        return max((finding.severity for finding in self.findings), key=SEVERITIES.index, default="ok")

    def as_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        facts = self.facts
        choice, now = facts.kernels, facts.measured
        threads = {"threads": facts.threads.value, "threads_why": facts.threads.why}
        limit = {"limit_bytes": facts.memory_limit.value, "limit_why": facts.memory_limit.why}
        swap = dict(zip(("swap_used_bytes", "swap_total_bytes"), facts.swap, strict=True))
        return {
            "deltaw": __version__,
            "status": self.status,
            "processor": {"name": facts.processor, **threads, **{name: getattr(facts, name) for name in _PROCESSOR}},
            "kernels": {
                "chosen": choice.arithmetic.as_dict(),
                "variants": [asdict(variant) | {"usable": variant.usable} for variant in facts.variants],
                "sizes": asdict(choice.sizes),
                "rates": choice.rates,
                "rates_now": None if now is None else now.rates,
                "disturbed": choice.disturbed or (now is not None and now.disturbed),
            },
            "memory": {**limit, "free_bytes": facts.free_memory, **swap},
            "disks": [asdict(disk) | {"path": str(disk.path)} for disk in facts.disks],
            "packages": [package.as_dict() for package in facts.packages],
            "gpus": [asdict(gpu) for gpu in facts.gpus],
            "model": None if facts.model is None else asdict(facts.model),
            "findings": [asdict(finding) for finding in self.findings],
            **{name: dict(getattr(facts, name)) for name in ("versions", "cache_bytes", "optional", "environment")},
        }

    def render(self) -> RenderableType:
        """A heading, the rates, and the findings."""
        facts, choice, versions = self.facts, self.facts.kernels, self.facts.versions
        program = f"deltaw {__version__}, Python {versions['python']}, torch {versions['torch']}, {versions['system']}"
        machine = f"{facts.processor}: {facts.cores} cores, {facts.processors} processors"
        how = f"with {choice.threads} threads, hidden size {choice.sizes.hidden}; * is used"
        head, unit = Text(f"{program}\n{machine}\n"), Text(f"billion operations a second {how}\n")
        return Group(head, self._rates(), unit, self._findings(), Text(f"\n{self._verdict()}"))

    def _rates(self) -> Table:
        """Products by kernels and arithmetic, what runs use marked by a star."""
        choice = self.facts.kernels
        made = table(["products by", *STORED], box=None, padding=(0, 1))
        names = dict.fromkeys(name for stored in STORED for name in choice.rates[stored])
        for name in sorted(names, key=lambda name: name == TORCH):
            cells = []
            for stored in STORED:
                rate = choice.rates[stored].get(name)
                mark = "* " if name == _used(choice, stored) else ""
                cells.append("" if rate is None else f"{mark}{rate:,.0f}")
            add_row(made, ["the math library (torch)" if name == TORCH else name, *cells])
        return made

    def _findings(self) -> Table:
        made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        made.add_column(no_wrap=True)
        made.add_column(no_wrap=True)
        made.add_column(overflow="fold")
        for finding in self.findings:
            said = Text(finding.what)
            if finding.hint:
                said.append(f"\n{finding.hint}", style="dim")
            made.add_row(Text(finding.severity, style=_STYLES[finding.severity]), finding.topic, said)
        return made

    def _verdict(self) -> str:
        count = sum(finding.severity == self.status for finding in self.findings)
        counted = f"{count} {self.status}{'' if count == 1 else 's'}"
        if self.status == "problem":
            return f"{counted}: training is not possible before that is solved"
        if self.status == "warning":
            return f"training works; {counted} above cost time or memory"
        return "training works, and nothing holds it back"


def examine(model: str | None = None, output: str = "runs", say: Say = silent) -> Examination:
    """Look at this machine, and say what it means for training; see :func:`deltaw.reports.doctor.gather`."""
    facts = gather(model, output, say=say)
    return Examination(facts, diagnose(facts))
