"""What `deltaw doctor` looks at: facts of this machine, gathered in a few seconds and without a network.

Numbers and names only; :mod:`deltaw.reports.diagnosis` says what they mean. The root of the file system is a
parameter, so that a test describes a machine in a folder.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from deltaw.cache import root as cache_root
from deltaw.errors import UserError
from deltaw.host import cgroup, measurements, product_rates
from deltaw.host.choices import Choice, choose_threads
from deltaw.host.installed import Package, packages, version_of
from deltaw.host.kernel_choice import KernelChoice, choose_kernels
from deltaw.host.memory import free_memory_bytes, memory_limit_bytes, swap_bytes
from deltaw.host.openmp import openmp_libraries
from deltaw.host.processor import physical_cores, processor_name, usable_processors
from deltaw.host.product_rates import GENERIC, Measured, Sizes, sizes_of
from deltaw.hub.folders import config_folder
from deltaw.hub.loading import read_config
from deltaw.kernels import loader, variants
from deltaw.kernels.processor import processor_flags
from deltaw.training.callbacks import Say, silent

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
        quota=cgroup.processor_quota(root),
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
