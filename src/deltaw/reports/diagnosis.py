"""Properties of the machine and the installation that affect training.

Collecting them takes seconds and needs no network. The root of the file system is a parameter, so tests can describe a
machine in a folder.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from deltaw.cache.keys import root as cache_root
from deltaw.errors import UserError
from deltaw.hub.empty_models import read_config
from deltaw.hub.folders import config_folder
from deltaw.kernels import loader, variants
from deltaw.kernels.processor import processor_flags, processor_name
from deltaw.kernels.variants import APPROXIMATION_SWITCHES, EMULATED_TILES, MEASURED, OFF, VARIABLE
from deltaw.machine import container_limits, product_rates
from deltaw.machine import product_rates as measurements
from deltaw.machine.choices import Choice, choose_threads, physical_cores, usable_processors
from deltaw.machine.kernel_choice import KernelChoice, choose_kernels
from deltaw.machine.memory import free_memory_bytes, memory_limit_bytes, swap_bytes
from deltaw.machine.product_rates import GENERIC, ProductRates, Sizes, sizes_of
from deltaw.progress import LogFunction, ignore_line
from deltaw.reports.installed_packages import Package, openmp_libraries, packages, version_of
from deltaw.settings import task_registry
from deltaw.tensor_files import TensorFile

# Root of the file system. It is a parameter of the functions, so that tests can describe a machine in a folder.
_ROOT = Path("/")
# Environment variables of other programs that affect the speed or the folders of deltaw.
OTHER_VARIABLES = (
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "CUDA_VISIBLE_DEVICES",
    "MALLOC_ARENA_MAX",
    "OLLAMA_MODELS",
)
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
        missing_features: CPU features that are missing.
        built: True if its library exists.
        problem: Reason why it cannot be loaded, or None if it can or was not tried.
    """

    name: str
    missing_features: tuple[str, ...]
    built: bool
    problem: str | None = None

    @property
    def usable(self) -> bool:
        return self.built and not self.missing_features and self.problem is None


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
    cache = cache_root()
    hub = Path(HF_HUB_CACHE)
    _, folders, _ = next(os.walk(cache), ("", [], []))  # empty if it does not exist or cannot be read
    cache_bytes = {name: folder_bytes(cache / name) for name in sorted(folders)}

    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    torch_versions = {"torch": torch.__version__, "cuda": torch.version.cuda or "none"}

    def is_relevant(variable: str) -> bool:
        return variable.startswith(("DELTAW_", *LIBRARY_PREFIXES)) or variable in OTHER_VARIABLES

    disks = [_disk("runs", Path(os.path.expanduser(output))), _disk("cache", cache, sum(cache_bytes.values()))]
    if hub.is_dir():
        disks.append(_disk("hub cache", hub, folder_bytes(hub)))
    return Diagnosis(
        processor=processor_name(root),
        machine_processors=os.cpu_count() or len(usable),
        processors=len(usable),
        cores=physical_cores(usable, root),
        quota=container_limits.processor_quota(root),
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
        environment={n: HIDDEN_VALUE if n in SECRETS else v for n, v in sorted(os.environ.items()) if is_relevant(n)},
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
        missing_features = tuple(variant.lacking(flags))
        built = variants.file_of(variant).is_file()
        problem = None
        if built and not missing_features and not switched_off:
            try:
                loader.open_variant(variant.name)
            except (OSError, AttributeError, RuntimeError, UserError) as error:
                problem = error.message if isinstance(error, UserError) else str(error)
        results.append(Kernels(variant.name, missing_features, built, problem))
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
    "DELTAW_ACCELERATE": "0: deltaw.accelerate changes nothing",
    "DELTAW_TARGET": "the system and CPU that kernels are compiled for",
    "DELTAW_VARIANTS": "which kernels are compiled at installation",
    EMULATED_TILES: "1: emulates AMX tiles with arrays, for tests of the kernels",
}

# Variables with values that are not printed.
SECRETS = {"DELTAW_API_KEY"}
HIDDEN_VALUE = "(hidden)"
