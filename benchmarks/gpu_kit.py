"""Benchmark of LoRA steps on a borrowed NVIDIA GPU: tests, deltaw and other programs in ten minutes, without network.

    python benchmarks/gpu_kit.py pack [--wheels] [--python 3.12]    # here: build/gpu-kit.tar.gz
    tar xf gpu-kit.tar.gz && gpu-kit/run.sh [--minutes 10]          # on the machine with the GPU and torch for CUDA
    python benchmarks/gpu_kit.py run                                # the same in a checkout

The device tests run first. Then each side trains models with random weights, in the sizes that fit the card, on rows of
equal lengths, of ragged lengths and with a shared prefix. Sides run in separate processes, in alternating order. The
other sides are PEFT with FlashAttention 2 (or torch's SDPA), PEFT with Liger, and Unsloth, if they are installed. They
use the largest microbatches that fit. All sides start from the same weights and LoRA factors, and losses are compared.

Results are written after every stage. Stages that exceed the time limit are skipped and listed. Copy results.json to
docs/figures/gpu.json and run benchmarks/figures.py --insert.

--fake runs a tiny model on the simulated device of tests/fake_cuda. This tests the benchmark itself. Its figures do not
describe a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figure_tables import loss_difference
from figures import commit

ROOT = Path(__file__).resolve().parent.parent
# Share of the time limit for the tests.
TEST_SHARE = 0.25
# Packages that the kit installs beside deltaw, if they are packed.
PACKED = ("peft", "pytest", "hypothesis", "liger-kernel")
# Packages that a CUDA build of torch installs. They are packed only on request.
CUDA_PACKAGES = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
MAX_ROUNDS = 3
# Largest difference of losses in nats per token that bf16 explains.
MAX_LOSS_DIFFERENCE = 0.01
RUN = """#!/usr/bin/env bash
# Usage: [PYTHON=python of an environment with torch for CUDA] ./run.sh [--minutes 10]. Uses no network.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
if ! test -e venv/installed; then
  "$python" -m venv --clear --system-site-packages venv
  # Packages of another virtual environment are not system packages.
  outer=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
  echo "$outer" > "$(echo venv/lib/python*/site-packages)/outer.pth"
  pip="venv/bin/python -m pip install --quiet --no-index --find-links wheels"
  $pip --force-reinstall --no-deps wheels/deltaw-*.whl
  $pip REQUIREMENTS
  touch venv/installed
fi
exec venv/bin/python benchmarks/gpu_kit.py run "$@"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack", help="write an archive for the machine with the GPU")
    packing.add_argument("--wheels", action="store_true", help="include the dependencies; needs network")
    packing.add_argument("--with-torch", action="store_true", help="include torch for CUDA, which takes gigabytes")
    packing.add_argument("--python", default=f"3.{sys.version_info.minor}", help="version of Python on that machine")
    packing.add_argument("--wheel", type=Path, help="wheel of deltaw; default: the newest in dist, or build one")
    packing.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-kit")
    packing.set_defaults(command=pack)
    running = commands.add_parser("run", help="test and measure")
    running.add_argument("--minutes", type=float, default=10.0)
    running.add_argument("--fake", action="store_true", help="simulated device and tiny model")
    running.add_argument("--no-tests", action="store_true")
    running.add_argument("--output", type=Path, default=Path("results.json"))
    running.add_argument("--models", type=Path, default=None, help="keep the models in this folder")
    running.set_defaults(command=run)
    args = parser.parse_args()
    args.command(args)


# ---- packing


def pack(args: argparse.Namespace) -> None:
    """Write a folder and an archive with scripts, tests, wheels and ``run.sh``."""
    shutil.rmtree(args.output, ignore_errors=True)
    wheels = args.output / "wheels"
    wheels.mkdir(parents=True)
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "benchmarks", "tests", "pyproject.toml"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        target = args.output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    built = sorted((ROOT / "dist").glob("deltaw-*linux*x86_64.whl"), key=os.path.getmtime)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    if wheel := args.wheel or (built[-1] if built else None):
        shutil.copy2(wheel, wheels)
    else:
        subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(ROOT)], check=True)
    requirements = "--no-deps deltaw"
    if args.wheels:
        requirements = " ".join(("deltaw", *PACKED))
        download(next(wheels.iterdir()), wheels, args.python, with_torch=args.with_torch)
    script = args.output / "run.sh"
    script.write_text(RUN.replace("REQUIREMENTS", requirements))
    script.chmod(0o755)
    (args.output / "commit").write_text(commit())
    shutil.make_archive(str(args.output), "gztar", args.output.parent, args.output.name)
    print(f"{args.output}.tar.gz: {Path(f'{args.output}.tar.gz').stat().st_size / 1e6:.0f} MB")


def download(wheel: Path, folder: Path, python: str, *, with_torch: bool) -> None:
    """Download the dependencies of a wheel for Linux on x86-64."""
    tags = ("manylinux_2_28", "manylinux_2_27", "manylinux2014", "manylinux1", "linux")
    target = ["--only-binary=:all:", "--python-version", python, *(f"--platform={tag}_x86_64" for tag in tags)]
    pip = [sys.executable, "-m", "pip"]
    resolve = [*pip, "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-", "--target", str(folder)]
    command = [*resolve, *target, str(wheel), *PACKED]
    resolved = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    packages = [package["metadata"] for package in json.loads(resolved.stdout)["install"]]
    chosen = [
        f"{package['name']}=={package['version']}"
        for package in packages
        if package["name"] != "deltaw" and (with_torch or not CUDA_PACKAGES.fullmatch(package["name"]))
    ]
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "-d", str(folder), *target, *chosen], check=True)


# ---- running


class Kit:
    """Runs the stages within the time limit, and writes the record after each stage."""

    def __init__(self, args: argparse.Namespace, models: Path) -> None:
        self.args = args
        self.models = models
        self.deadline = time.monotonic() + 60 * args.minutes
        packed = ROOT / "commit"
        self.record: dict[str, Any] = {
            "command": f"benchmarks/gpu_kit.py run --minutes {args.minutes:g}{' --fake' if args.fake else ''}",
            "simulated": args.fake,
            "commit": packed.read_text() if packed.exists() else commit(),
            "date": str(datetime.date.today()),
            "machine": [],
            "notes": [],
            "skipped": [],
            "results": {},
        }

    @property
    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def save(self) -> None:
        """Write the results atomically."""
        temporary = self.args.output.with_suffix(".partial")
        temporary.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.args.output)

    def log(self, line: str) -> None:
        print(f"{'SIMULATED ' if self.args.fake else ''}{line}", flush=True)

    def skip(self, stage: str) -> None:
        self.log(f"skipped: {stage}")
        self.record["skipped"].append(stage)

    def child(self, **job: Any) -> tuple[list[dict[str, Any]], str]:
        """Run a job in a process and return its results, and the reason if it failed."""
        job = {"fake": self.args.fake, "seconds": self.args.minutes / 2, **job}
        script = str(Path(__file__).with_name("gpu_sides.py"))
        status, output, errors = self.execute([sys.executable, script, json.dumps(job)])
        results = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("RESULT ")]
        if isinstance(status, int) and status != 0:
            status = (errors.strip().splitlines() or [f"exit status {status}"])[-1][-300:]
        return results, status or ""

    def execute(self, command: Sequence[str], seconds: float | None = None) -> tuple[int | str, str, str]:
        """Run a command and return its status and output. It is killed after the time limit ("no time left")."""
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
        )
        status: int | str = "no time left"
        try:
            output, errors = process.communicate(timeout=max(1.0, self.remaining if seconds is None else seconds))
            status = process.returncode
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        return status, output, errors

    def test(self) -> None:
        """Run the tests marked ``gpu`` and record their summary."""
        files = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
        command = [sys.executable, "-m", "pytest", "-p", "tests.fake_cuda.plugin", "-m", "gpu and not slow", "-rf"]
        status, output, errors = self.execute([*command, "--tb=line", *files], TEST_SHARE * self.remaining)
        lines = [line for line in (output or errors).strip().splitlines() if line]
        summary = lines[-1] if lines and isinstance(status, int) else str(status)
        self.record["notes"].append(f"GPU tests: {summary}.")
        self.record["failed_tests"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        self.log(self.record["notes"][-1])
        self.save()

    def measure(self, sizes: Sequence[str], sides: dict[str, dict[str, Any]]) -> None:
        """Measure all sides in several rounds, in alternating order, until the time limit."""
        durations: dict[str, float] = {}  # of the slowest process, by size
        unusable: set[tuple[str, str]] = set()
        for number in range(MAX_ROUNDS):
            for size in sizes:
                if number == 0 and not self.prepare(size):
                    unusable.update((size, side) for side in sides)
                for side in list(sides)[:: -1 if number % 2 else 1]:
                    stage = f"{size}, {side}, round {number + 1}"
                    if (size, side) in unusable:
                        continue
                    if self.remaining < durations.get(size, 0):
                        self.skip(stage)
                        continue
                    start = time.monotonic()
                    results, problem = self.child(
                        stage="measure", size=size, folder=str(self.models / size), **sides[side]
                    )
                    durations[size] = max(durations.get(size, 0), time.monotonic() - start)
                    self.add(size, side, results)
                    if problem:
                        self.skip(f"{stage} ({problem})")
                        unusable.add((size, side))
                    self.save()

    def prepare(self, size: str) -> bool:
        results, problem = self.child(stage="prepare", size=size, folder=str(self.models / size))
        if problem := problem or results[0].get("error", ""):
            self.skip(f"{size} ({problem})")
        self.save()
        return not problem

    def add(self, size: str, side: str, results: Sequence[dict[str, Any]]) -> None:
        """Add the results of a process, and log them."""
        for result in results:
            kind = result.pop("kind")
            by_side = self.record["results"].setdefault(size, {}).setdefault(kind, {})
            by_side.setdefault(side, []).append(result)
            if "error" in result:
                self.log(f"{size}, {kind}, {side}: {result['error']}")
                continue
            speed = result["rows_per_second"]
            peak = result["peak_bytes"]
            self.log(f"{size:14} {kind:14} {side:40} {speed:8.2f} rows/s, peak {peak / 1e9:6.2f} GB")
            notes = list(result.get("notes", ()))  # such as the reason for attention in tiles
            # Later losses differ with bf16 factors, because small updates are rounded away.
            losses = result["losses"][:1] if "bf16 factors" in side else result["losses"]
            difference = loss_difference(by_side.get("deltaw", []), [{"losses": losses}])
            if difference is not None and not difference < MAX_LOSS_DIFFERENCE:
                notes.append(f"The losses of {side} differ by {difference:.3f} ({size}, {kind}).")
            for note in notes:
                if note not in self.record["notes"]:
                    self.record["notes"].append(note)
                    self.log(note)


def run(args: argparse.Namespace) -> None:
    """Run all stages."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "UNSLOTH_DISABLE_STATISTICS": "1"}
    args.output = args.output.resolve()
    with tempfile.TemporaryDirectory(prefix="deltaw-gpu-") as scratch:
        kit = Kit(args, args.models or Path(scratch))
        results, problem = kit.child(stage="describe")
        if problem := problem or results[0].get("error", ""):
            sys.exit(f"error: {problem}")
        description = results[0]
        kit.record["machine"] = description["machine"]
        if description["missing"]:
            kit.record["notes"].append(f"Not installed: {', '.join(description['missing'])}.")
        for line in (*description["machine"], *kit.record["notes"]):
            kit.log(line)
        kit.save()
        if not args.no_tests:
            kit.test()
        kit.measure(description["sizes"], description["sides"])
    kit.log(f"results: {args.output}")


if __name__ == "__main__":
    main()
