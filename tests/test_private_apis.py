"""Private names of other libraries are used in dedicated modules only, and deltaw works without them."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from deltaw import errors as private_apis
from deltaw.errors import UserError
from deltaw.kernels import torch_modules, torch_private
from deltaw.lora import LoRALinear
from deltaw.lora.layers import DoRALinear, LoRABiasLinear
from tests.test_structure import tree_of

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "deltaw"
PRIVATE_MODULES = {"kernels/torch_private.py", "kernels/torch_modules.py", "hub/transformers_private.py"}
# Documented names of the Python standard library.
STANDARD = {"_exit", "_getframe", "_make", "_replace", "_fields_"}
# Functions that take the name of an attribute.
BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "attrgetter"}
# Names required for dry runs.
PLANS = ("FakeTensor", "FakeTensorMode", "TorchDispatchMode", "_DisableTorchDispatch", "tree_map_only")
PLANS += ("tree_leaves", "_current_graph_task_id", "_local_scalar_dense")
TABLES = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_hooks",)
ATTENTION = ("_attn_implementation",)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_of(file: Path) -> set[str]:
    """Return the private names that a module looks up: strings that are a private name, or a dotted path with one."""
    tree = tree_of(file)
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    paths = [text.split(".") for text in texts if all(part.isidentifier() for part in text.split("."))]
    private = [parts for parts in paths if any(map(_is_private, parts))]
    return {next(part for part in reversed(parts) if part != "default") for parts in private} - _defined_names(tree)


def _defined_names(tree: ast.AST) -> set[str]:
    """Return the names that a file defines: functions, classes, variables and attributes of ``self``."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if getattr(node.value, "id", "") in ("self", "cls") else set()
    return names


NAMES = {name: file for file in sorted(PRIVATE_MODULES) for name in sorted(names_of(PACKAGE / file))}


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Iterate over all nodes except those under ``TYPE_CHECKING``."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            stack += ast.iter_child_nodes(node)


def foreign_names(trees: dict[str, ast.Module]) -> list[str]:
    """Return private names of other libraries in the sources, with their locations."""
    stored = {path: _defined_names(tree) for path, tree in trees.items()}
    defined = set().union(*stored.values())
    locations = []
    for path, tree in trees.items():

        def is_foreign(name: object, of_self: bool = False, path: str = path) -> bool:
            if not isinstance(name, str) or not _is_private(name) or name in STANDARD:
                return False
            return name not in defined or (name in NAMES and not (of_self and name in stored[path]))

        for node in _runtime_nodes(tree):
            names: list[object] = []
            of_self = getattr(getattr(node, "value", None), "id", "") == "self"
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            elif isinstance(node, ast.ImportFrom) and not (node.module or "deltaw").startswith("deltaw"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in BY_NAME:
                names = [a.value for a in node.args if isinstance(a, ast.Constant)]
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                names = [name for name in [node.slice.value] if name in NAMES]
            locations += [f"{path}, line {node.lineno}: {n}" for n in names if is_foreign(n, of_self)]
    return locations


def test_private_names_are_used_in_dedicated_modules_only() -> None:
    trees = {str(f.relative_to(PACKAGE)): tree_of(f) for f in PACKAGE.rglob("*.py")}
    locations = foreign_names({path: trees[path] for path in trees.keys() - PRIVATE_MODULES})
    assert not locations, "move them to " + " or ".join(PRIVATE_MODULES) + ":\n" + "\n".join(locations)


def test_private_name_check_detects_violations() -> None:
    text = """
import torch._dynamo
from torch.nn.modules.conv import _ConvNd
if TYPE_CHECKING:
    from library._lib import Kind
class Custom(Module):
    def __init__(self):
        self._mine = self._modules = 1
        self._mine, self._modules, other._mine, os._exit
        other._modules
        self._parameters
        getattr(other, "_theirs", None)
        vars(other)["_buffers"]
        torch._C._len_torch_dispatch_stack()
"""
    lines = {name.partition(" line ")[2] for name in foreign_names({"a.py": ast.parse(text)})}
    expected = {"2: _dynamo", "3: _ConvNd", "10: _modules", "11: _parameters", "12: _theirs", "13: _buffers"}
    assert lines == expected | {"14: _C", "14: _len_torch_dispatch_stack"}


@pytest.fixture
def run_without_names(tmp_path: Path, settings: Callable[..., dict]) -> Callable[..., list[dict]]:
    """Return the results of training, planning and generating for each list of missing names."""

    def run(lists: list[list[str]], method: str = "lora") -> list[dict]:
        config = settings(tmp_path, method=method, train={"max_steps": 1, "batch_size": 4})
        command = [sys.executable, "-m", "tests.private_run", str(tmp_path), json.dumps([(config, n) for n in lists])]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
        process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
        assert process.returncode == 0, process.stderr
        answers = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(len(lists))]
        faults = {" ".join(names): a["fault"] for names, a in zip(lists, answers, strict=True) if "fault" in a}
        assert not faults, "\n".join(f"without {names}:\n{fault}" for names, fault in faults.items())
        return answers

    return run


def _check(lists: list[list[str]], expected: dict, answers: list[dict]) -> None:
    """Check that losses and completions are equal and plans not smaller, or that the error names the missing API."""
    for names, answer in zip(lists, answers, strict=True):
        if not set(names).isdisjoint(TABLES):
            assert "an adapter needs the tables of nn.Module, which torch" in answer["loss"]
            continue
        assert answer["loss"] == pytest.approx(expected["loss"], rel=1e-5), names
        assert answer["text"] == expected["text"], names
        if not set(names).isdisjoint(PLANS):
            assert f"has no {names[0]}, which dry runs need" in answer["plan"]
        else:  # plain blocks store more activations than fused ones
            assert answer["plan"] >= expected["plan"], names


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.mark.slow
@needs_fork
def test_train_plan_and_generate_work_without_all_names(run_without_names) -> None:
    others = [n for n in NAMES if n not in (*PLANS, *TABLES, *ATTENTION) and "_hooks" not in n]
    lists = [others, [*PLANS, *HOOKS, *ATTENTION], [*TABLES]]
    expected, *answers = run_without_names([[], *lists])
    _check(lists, expected, answers)


def _without(monkeypatch: pytest.MonkeyPatch, *names: str, of: ModuleType = torch_private) -> ModuleType:
    """Load a second copy of a module with private names as if torch lacked these names."""
    original = private_apis.look_up

    def look_up(owner: object, path: str) -> object:
        return None if set(names) & set(path.split(".")) else original(owner, path)

    monkeypatch.setattr(private_apis, "look_up", look_up)
    spec = importlib.util.spec_from_file_location("private_names_without", of.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_names_exist_in_this_torch_version() -> None:
    missing = [
        node.args[1].value
        for module in (torch_private, torch_modules)
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node).startswith("look_up(torch,")
        if private_apis.look_up(torch, node.args[1].value) is None
    ]
    compiler = {"_dynamo.exc.TorchDynamoException", "_inductor.codecache.PyCodeCache.modules"}  # imported lazily
    assert set(missing) <= compiler


def test_kernels_use_the_dispatcher_if_observers_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not torch_private.is_observed() and not torch_private.in_dispatch_mode()
    assert _without(monkeypatch, "_len_torch_dispatch_stack").is_observed()
    assert _without(monkeypatch, "_is_profiler_enabled").is_observed()


@pytest.mark.parametrize("kind", [LoRALinear, LoRABiasLinear, DoRALinear])
def test_adapted_layers_compile_as_full_graphs(kind: type) -> None:
    """The lookups must be traceable by torch.compile."""
    layer = kind.from_linear(nn.Linear(8, 8), 2)
    x = torch.randn(3, 8)
    assert torch.allclose(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_softmax_and_view_fallbacks_match_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    other = _without(monkeypatch, "_softmax_backward_data", "_unsafe_view", "_is_view", "_version")
    output = torch.softmax(torch.randn(3, 5, dtype=torch.float64), -1)
    grad = torch.randn(3, 5, dtype=torch.float64)
    expected = torch_private.softmax_backward(grad, output, -1, torch.float64)
    assert torch.allclose(other.softmax_backward(grad, output, -1, torch.float64), expected)
    for module in (torch_private, other):
        x = torch.arange(6.0, requires_grad=True)
        y = module.unrecorded_view(x * 1, (2, 3))
        assert torch.relu_(y) is y  # a plain view from a Function would not allow this
        y.sum().backward()
        assert y.shape == (2, 3) and x.grad is not None
    x = torch.ones(2)
    assert torch_private.version_of(x) == torch_private.version_of(x)
    assert other.version_of(x) != other.version_of(x)
    assert torch_private.is_view(x.view(1, 2)) and not torch_private.is_view(x) and other.is_view(x)


def test_module_tables_match_public_apis(monkeypatch: pytest.MonkeyPatch) -> None:
    other = _without(monkeypatch, "_parameters", of=torch_modules)
    module = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3))
    module[0].register_parameter("again", module[0].weight)
    for submodule in module.modules():
        for table in ("direct_parameters", "direct_buffers", "direct_modules"):
            private = getattr(torch_modules, table)(submodule)
            fallback = getattr(other, table)(submodule)
            assert fallback.keys() == private.keys() and all(fallback[name] is private[name] for name in fallback)
    copies = {"with_tensors": (module[0], {}), "share_parameters": (module[0], {})}
    for function, args in {"cast_module": (nn.Linear, module[0]), **copies}.items():
        with pytest.raises(UserError, match=r"needs the tables of nn\.Module"):
            getattr(other, function)(*args)


def test_copy_with_other_tensors_does_not_change_the_module() -> None:
    module = nn.BatchNorm1d(3)
    weight = nn.Parameter(torch.zeros(3))
    copy = torch_modules.with_tensors(module, {"weight": weight})
    assert copy.weight is weight and module.weight is not weight
    assert copy.running_mean is module.running_mean and "bias" not in dict(copy.named_parameters())


def test_hooks_are_detected_and_removed_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    other = _without(monkeypatch, "_backward_hooks", of=torch_modules)
    module = nn.Linear(2, 2)
    assert not torch_modules.are_hooked([vars(module)]) and other.are_hooked([vars(module)])
    handles = [module.register_forward_pre_hook(print), module.register_forward_hook(print, always_call=True)]
    assert torch_modules.are_hooked([vars(module)])
    torch_modules.remove_forward_hooks(module, [handle.id for handle in handles])
    assert not torch_modules.are_hooked([vars(module)])


def test_overridden_convolution_forward_is_detected_without_private_names(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.Conv1d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input

    for module in (torch_modules, _without(monkeypatch, "_conv_forward", of=torch_modules)):
        assert module.convolves_as(nn.Conv1d, nn.Conv1d) and not module.convolves_as(Other, nn.Conv1d)


def test_missing_wrapper_subclass_raises_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"train.sharding: base needs Tensor._make_wrapper_subclass"):
        _without(monkeypatch, "_make_wrapper_subclass").sized_tensor(
            object, torch.Size([1]), torch.float32, feature="train.sharding: base"
        )
