"""Check that the device tests notice the removal of any single device transfer.

    python -m tests.fake_cuda.mutations [--sample 20]

A transfer is a call such as ``x.to(device)``, ``to_device(x, device)`` or ``torch.zeros(n, device=device)`` in
``src/deltaw``. Transfers are removed one at a time, and the tests that reach the transfer run in a forked process.
Prints the transfers that can be removed without a failure.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fake_cuda.device import install

ROOT = Path(__file__).parents[2]
TESTS = [str(ROOT / "tests/training/test_device.py"), str(ROOT / "tests/fake_cuda/test_training.py")]
HOOK = "__device_transfer__"

# A site is the location and the code of a transfer.
sites: set[str] = set()
reached: set[str] = set()
removed: str | None = None


def transfer(site: str, original: Callable[[], Any], without: Callable[[], Any]) -> Any:
    reached.add(site)
    return without() if site == removed else original()


class TransferFinder(ast.NodeTransformer):
    """Replaces each transfer by a call of :func:`transfer`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def visit_Call(self, node: ast.Call) -> ast.AST:
        code = ast.unparse(node)
        line = node.lineno
        self.generic_visit(node)
        without = without_transfer(node)
        in_lambda = not any(isinstance(part, (ast.NamedExpr, ast.Yield, ast.Await)) for part in ast.walk(node))
        if without is None or not in_lambda or "super()" in code:
            return node
        site = f"{self.path}:{line}: {code}"
        sites.add(site)
        no_arguments = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        versions = [ast.Lambda(no_arguments, version) for version in (node, without)]
        return ast.Call(ast.Name(HOOK, ast.Load()), [ast.Constant(site), *versions], [])


def without_transfer(node: ast.Call) -> ast.expr | None:
    """Return the expression without the transfer to a device, or None if it contains none."""
    function = node.func
    if isinstance(function, ast.Name) and function.id == "to_device":
        return copy.deepcopy(node.args[0])
    if not isinstance(function, ast.Attribute):
        return None
    result = copy.deepcopy(node)
    result.keywords = [k for k in result.keywords if k.arg not in ("device", "non_blocking")]
    if function.attr == "to":
        result.args = [argument for argument in result.args if "device" not in ast.unparse(argument)]
        if len(result.args) == len(node.args) and not any(k.arg == "device" for k in node.keywords):
            return None
        assert isinstance(result.func, ast.Attribute)
        return result if result.args or result.keywords else result.func.value
    creates = function.attr.startswith("new_") or ast.unparse(function.value) == "torch"
    return result if creates and len(result.keywords) < len(node.keywords) else None


class Loader(importlib.machinery.SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:  # type: ignore[override]
        tree = TransferFinder(str(Path(path).relative_to(ROOT))).visit(ast.parse(data))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimize)

    def get_data(self, path: str) -> bytes:
        if path.endswith(".pyc"):
            raise OSError("bytecode is not used")
        return super().get_data(path)

    def set_data(self, *args: Any, **kwargs: Any) -> None:
        pass

    def exec_module(self, module: Any) -> None:
        setattr(module, HOOK, transfer)
        super().exec_module(module)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name.startswith("deltaw.") else None
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            spec.loader = Loader(name, spec.origin)
        return spec


class ReachedRecorder:
    """Records the sites that each test reaches, and its duration."""

    def __init__(self) -> None:
        self.tests: dict[str, tuple[float, list[str]]] = {}

    def pytest_runtest_logstart(self) -> None:
        reached.clear()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            self.tests[report.nodeid] = (report.duration, sorted(reached))


def run_forked(work: Callable[[], int], show: bool = False) -> int:
    """Run ``work`` in a forked process, by default without output, and return its exit status."""
    sys.stdout.flush()
    if (process := os.fork()) == 0:
        if not show:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
        os._exit(work())
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run_tests(*arguments: str, plugins: list[object] | None = None) -> int:
    import pytest

    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *arguments], plugins=plugins))


def remove(site: str, tests: list[str]) -> int:
    global removed
    removed = site
    return run_tests(*tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="number of transfers to remove, chosen at random")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    install()
    sys.meta_path.insert(0, Finder())
    import pytest

    from deltaw.kernels import gpu_attention
    from tests.fake_cuda import test_training  # noqa: F401  # imports what the tests need, before processes are forked

    gpu_attention.DEVICES = ()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reached.json"

        def record() -> int:
            recorder = ReachedRecorder()
            status = run_tests(*TESTS, plugins=[recorder])
            file.write_text(json.dumps([recorder.tests, sorted(sites)]))
            return status

        if run_forked(record, show=True) != pytest.ExitCode.OK:
            sys.exit("the tests fail without a change")
        tests, names = json.loads(file.read_text())
    reached_by: dict[str, list[str]] = {}
    for name, (_, reached_sites) in sorted(tests.items(), key=lambda item: item[1][0]):
        for site in reached_sites:
            reached_by.setdefault(site, []).append(name)
    chosen = sorted(reached_by)
    if options.sample is not None:
        chosen = sorted(random.Random(options.seed).sample(chosen, min(options.sample, len(chosen))))
    print(f"{len(names)} transfers, {len(reached_by)} reached by tests, removing {len(chosen)}", flush=True)
    for site in sorted(set(names) - set(reached_by)):
        print("not reached:", site)
    survivors = 0
    for site in chosen:
        survived = run_forked(lambda site=site: remove(site, reached_by[site])) == pytest.ExitCode.OK
        survivors += survived
        print("survived:" if survived else "noticed:", site, flush=True)
    print(f"{survivors} of {len(chosen)} removed transfers fail no test")


if __name__ == "__main__":
    main()
