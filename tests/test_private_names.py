"""Names that other libraries keep for themselves stand in one module each, and none of them is needed."""

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

from deltaw import private_names
from deltaw.errors import UserError
from deltaw.kernels import torch_private
from deltaw.lora import LoRALinear
from deltaw.lora.layers import DoRALinear, LoRABiasLinear
from tests.test_structure import tree_of

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "deltaw"
GATHERED = {"kernels/torch_private.py", "hub/transformers_private.py"}
# Python's own, which its documentation describes.
STANDARD = {"_exit", "_getframe", "_replace", "_fields_"}
# Functions whose argument may be the name of an attribute.
BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "attrgetter"}
# Without one of these there is no dry run.
PLANS = ("FakeTensor", "FakeTensorMode", "TorchDispatchMode", "_DisableTorchDispatch", "tree_map_only")
PLANS += ("tree_leaves", "_current_graph_task_id", "_local_scalar_dense")
TABLES, HOOKS, ATTENTION = ("_parameters", "_buffers", "_modules"), ("_forward_hooks",), ("_attn_implementation",)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_of(file: Path) -> set[str]:
    """The private names that a module gathers: its strings that are one, or a path of names with one."""
    tree = tree_of(file)
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    paths = [text.split(".") for text in texts if all(part.isidentifier() for part in text.split("."))]
    private = [parts for parts in paths if any(map(_is_private, parts))]
    return {next(part for part in reversed(parts) if part != "default") for parts in private} - _stored(tree)


def _stored(tree: ast.AST) -> set[str]:
    """Names that a file gives to something: functions, classes, variables, attributes of ``self``."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if getattr(node.value, "id", "") in ("self", "cls") else set()
    return found


NAMES = {name: file for file in sorted(GATHERED) for name in sorted(names_of(PACKAGE / file))}


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those for the type checker alone."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            waiting += ast.iter_child_nodes(node)


def foreign_names(trees: dict[str, ast.Module]) -> list[str]:
    """Private names of other libraries in sources by their paths, each with its place."""
    stored = {path: _stored(tree) for path, tree in trees.items()}
    own = set().union(*stored.values())
    found = []
    for path, tree in trees.items():

        def is_foreign(name: object, of_self: bool = False, path: str = path) -> bool:
            if not isinstance(name, str) or not _is_private(name) or name in STANDARD:
                return False
            return name not in own or (name in NAMES and not (of_self and name in stored[path]))

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
            found += [f"{path}, line {node.lineno}: {n}" for n in names if is_foreign(n, of_self)]
    return found


def test_private_names_of_other_libraries_stand_in_their_modules_alone() -> None:
    trees = {str(f.relative_to(PACKAGE)): tree_of(f) for f in PACKAGE.rglob("*.py")}
    found = foreign_names({path: trees[path] for path in trees.keys() - GATHERED})
    assert not found, "gather them in " + " or ".join(GATHERED) + ":\n" + "\n".join(found)


def test_the_check_finds_what_it_looks_for() -> None:
    text = """
import torch._dynamo
from torch.nn.modules.conv import _ConvNd
if TYPE_CHECKING:
    from library._lib import Kind
class Own(Module):
    def __init__(self):
        self._mine = self._modules = 1
        self._mine, self._modules, other._mine, os._exit
        other._modules
        self._parameters
        getattr(other, "_theirs", None)
        vars(other)["_buffers"]
        torch._C._len_torch_dispatch_stack()
"""
    lines = {found.partition(" line ")[2] for found in foreign_names({"a.py": ast.parse(text)})}
    expected = {"2: _dynamo", "3: _ConvNd", "10: _modules", "11: _parameters", "12: _theirs", "13: _buffers"}
    assert lines == expected | {"14: _C", "14: _len_torch_dispatch_stack"}


@pytest.fixture
def told(tmp_path: Path, settings: Callable[..., dict]) -> Callable[..., list[dict]]:
    """What a training, a plan and a text come to by a method without some names, list by list."""

    def run(lists: list[list[str]], method: str = "lora") -> list[dict]:
        made = settings(tmp_path, method=method, train={"max_steps": 1, "batch_size": 4})
        command = [sys.executable, "-m", "tests.private_run", str(tmp_path), json.dumps([(made, n) for n in lists])]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
        assert done.returncode == 0, done.stderr
        answers = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(len(lists))]
        faults = {" ".join(names): a["fault"] for names, a in zip(lists, answers, strict=True) if "fault" in a}
        assert not faults, "\n".join(f"without {names}:\n{fault}" for names, fault in faults.items())
        return answers

    return run


def _check(lists: list[list[str]], expected: dict, answers: list[dict]) -> None:
    """The same losses and texts, in more time; or a refusal that says what is missing."""
    for names, answer in zip(lists, answers, strict=True):
        if not set(names).isdisjoint(TABLES):
            assert "an adapter needs the tables of nn.Module, which torch" in answer["loss"]
            continue
        assert answer["loss"] == pytest.approx(expected["loss"], rel=1e-5), names
        assert answer["text"] == expected["text"], names
        if not set(names).isdisjoint(PLANS):
            assert f"has no {names[0]}, which dry runs need" in answer["plan"]
        else:  # plain blocks keep more than fused ones
            assert answer["plan"] >= expected["plan"], names


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="deltaw is imported anew in forked processes")


@pytest.mark.slow
@needs_fork
def test_it_trains_plans_and_writes_without_any_of_them(told) -> None:
    others = [n for n in NAMES if n not in (*PLANS, *TABLES, *ATTENTION) and "_hooks" not in n]
    lists = [others, [*PLANS, *HOOKS, *ATTENTION], [*TABLES]]
    expected, *answers = told([[], *lists])
    _check(lists, expected, answers)


@needs_fork
@pytest.mark.slow
def test_it_trains_plans_and_writes_without_each_of_them(told) -> None:
    lists = [[name] for name in NAMES]
    expected, *answers = told([[], *lists])
    _check(lists, expected, answers)


@needs_fork
@pytest.mark.slow
def test_a_method_that_replaces_no_module_needs_no_tables(told) -> None:
    whole, without = told([[], [*TABLES]], "bias")
    assert without["text"] == whole["text"]
    assert without["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def _without(monkeypatch: pytest.MonkeyPatch, *names: str) -> ModuleType:
    """A second ``torch_private``, of a torch that does not have these names."""
    own = private_names.look_up

    def look_up(owner: object, path: str) -> object:
        return None if set(names) & set(path.split(".")) else own(owner, path)

    monkeypatch.setattr(private_names, "look_up", look_up)
    spec = importlib.util.spec_from_file_location("torch_private_without", torch_private.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_is_missing_in_this_version_of_torch() -> None:
    gone = [
        node.args[1].value
        for node in ast.walk(ast.parse(Path(torch_private.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node).startswith("look_up(torch,")
        if private_names.look_up(torch, node.args[1].value) is None
    ]
    assert gone in ([], ["_dynamo.exc.TorchDynamoException"])  # the compiler is imported when it is asked for


def test_kernels_are_called_through_the_dispatcher_if_watchers_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not torch_private.watched() and not torch_private.in_dispatch_mode()
    assert _without(monkeypatch, "_len_torch_dispatch_stack").watched()
    assert _without(monkeypatch, "_is_profiler_enabled").watched()


@pytest.mark.parametrize("kind", [LoRALinear, LoRABiasLinear, DoRALinear])
def test_adapted_layers_are_compiled_whole(kind: type) -> None:
    """What is looked up must be something that torch.compile sees through."""
    layer = kind.from_linear(nn.Linear(8, 8), 2)
    x = torch.randn(3, 8)
    assert torch.allclose(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_softmax_and_views_have_the_same_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    other = _without(monkeypatch, "_softmax_backward_data", "_unsafe_view", "_is_view", "_version")
    output = torch.softmax(torch.randn(3, 5, dtype=torch.float64), -1)
    grad = torch.randn(3, 5, dtype=torch.float64)
    expected = torch_private.softmax_backward(grad, output, -1, torch.float64)
    assert torch.allclose(other.softmax_backward(grad, output, -1, torch.float64), expected)
    for module in (torch_private, other):
        x = torch.arange(6.0, requires_grad=True)
        y = module.unrecorded_view(x * 1, (2, 3))
        assert torch.relu_(y) is y  # what a plain view out of a Function would not allow
        y.sum().backward()
        assert y.shape == (2, 3) and x.grad is not None
    x = torch.ones(2)
    assert torch_private.version_of(x) == torch_private.version_of(x)
    assert other.version_of(x) != other.version_of(x)
    assert torch_private.is_view(x.view(1, 2)) and not torch_private.is_view(x) and other.is_view(x)


def test_a_modules_own_parts_are_found_by_public_names_too(monkeypatch: pytest.MonkeyPatch) -> None:
    other = _without(monkeypatch, "_parameters")
    module = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3))
    module[0].register_parameter("again", module[0].weight)
    for one in module.modules():
        for table in ("own_parameters", "own_buffers", "own_modules"):
            theirs, found = getattr(torch_private, table)(one), getattr(other, table)(one)
            assert found.keys() == theirs.keys() and all(found[name] is theirs[name] for name in found)
    copies = {"with_tensors": (module[0], {}), "share_parameters": (module[0], {})}
    for refused, given in {"adopt": (nn.Linear, module[0]), **copies}.items():
        with pytest.raises(UserError, match=r"needs the tables of nn\.Module"):
            getattr(other, refused)(*given)


def test_a_copy_with_other_tensors_leaves_the_module_as_it_is() -> None:
    module = nn.BatchNorm1d(3)
    weight = nn.Parameter(torch.zeros(3))
    made = torch_private.with_tensors(module, {"weight": weight})
    assert made.weight is weight and module.weight is not weight
    assert made.running_mean is module.running_mean and "bias" not in dict(made.named_parameters())


def test_hooks_are_seen_and_taken_away_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    other = _without(monkeypatch, "_backward_hooks")
    module = nn.Linear(2, 2)
    assert not torch_private.are_hooked([vars(module)]) and other.are_hooked([vars(module)])
    handles = [module.register_forward_pre_hook(print), module.register_forward_hook(print, always_call=True)]
    assert torch_private.are_hooked([vars(module)])
    torch_private.remove_forward_hooks(module, [handle.id for handle in handles])
    assert not torch_private.are_hooked([vars(module)])


def test_a_convolution_with_a_forward_of_its_own_is_told_without_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.Conv1d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input

    for module in (torch_private, _without(monkeypatch, "_conv_forward")):
        assert module.convolves_as(nn.Conv1d, nn.Conv1d) and not module.convolves_as(Other, nn.Conv1d)


def test_tensors_of_a_size_alone_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"train.sharding: base needs Tensor._make_wrapper_subclass"):
        _without(monkeypatch, "_make_wrapper_subclass").sized_tensor(object, torch.Size([1]), torch.float32)
