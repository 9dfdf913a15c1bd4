"""Large frozen weights are moved to large memory pages during training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltaw.kernels import huge_pages, loader
from deltaw.runtime import weights_in_huge_pages
from deltaw.runtime.weights_in_huge_pages import move_to_huge_pages
from tests.mapped_files import resident_bytes

SIZE = 1024  # a square fp32 weight of this size has 4 MiB


@pytest.fixture(autouse=True)
def require_huge_pages() -> None:
    if not huge_pages.huge_page_bytes():
        pytest.skip("the system gives no huge pages")
    if loader.unavailable_reason():
        pytest.skip(f"no compiled kernels: {loader.unavailable_reason()}")


class Model(nn.Module):
    """An embedding, a small layer, large frozen and trained layers, and a head that may be tied to the embedding."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.rows = nn.Embedding(SIZE, SIZE)
        self.small = nn.Linear(8, 8)
        self.middle = nn.Linear(SIZE, SIZE)
        self.head = nn.Linear(SIZE, SIZE, bias=False)
        self.trained = nn.Linear(SIZE, SIZE)
        if tied:
            self.head.weight = self.rows.weight
        self.requires_grad_(False)
        self.trained.requires_grad_(True)

    def get_input_embeddings(self) -> nn.Module:
        return self.rows


def _mapped_model(file: Path, tied: bool = False) -> Model:
    """Return a model whose weights are memory-mapped from a file."""
    save_file(Model().state_dict(), file)
    model = Model(tied)
    model.load_state_dict(load_file(file), assign=True)
    if tied:
        model.head.weight = model.rows.weight
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("trained."))
    return model


def _addresses(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("tied", [False, True])
def test_large_frozen_weights_move_without_changing_values(tied: bool, tmp_path: Path) -> None:
    model = _mapped_model(tmp_path / "weights.safetensors", tied)
    parameters = dict(model.named_parameters())
    before = _addresses(model)
    values = {name: parameter.clone() for name, parameter in parameters.items()}
    moved = {"middle.weight", "head.weight", "rows.weight"} if tied else {"middle.weight", "head.weight"}
    assert move_to_huge_pages(model) == 2 * 4 * SIZE * SIZE
    after = _addresses(model)
    assert {name for name in after if after[name] != before[name]} == moved
    assert not tied or model.head.weight is model.rows.weight
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and torch.equal(parameter, values[name])
        assert parameter.requires_grad == name.startswith("trained.")


def _large_bytes(tensor: Tensor) -> int:
    """Return the bytes of huge pages in the mapping that contains a tensor."""
    for part in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", part)
        if span and int(span[1], 16) <= tensor.data_ptr() < int(span[2], 16):
            return 1024 * int(re.search(r"AnonHugePages:\s+(\d+) kB", part)[1])  # type: ignore[index]
    return 0


def test_moved_weight_is_in_huge_pages(tmp_path: Path) -> None:
    model = _mapped_model(tmp_path / "weights.safetensors")
    assert move_to_huge_pages(model)
    if not _large_bytes(model.middle.weight):
        pytest.skip("the system has no huge page left")
    assert _large_bytes(model.middle.weight) == _large_bytes(model.head.weight) == 4 * SIZE * SIZE


def test_pages_of_mapped_file_are_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"weight": torch.arange(8 * SIZE * SIZE).view(-1, SIZE).float()}, file)
    model = nn.Linear(SIZE, 8 * SIZE, bias=False)
    model.weight = nn.Parameter(load_file(file)["weight"], requires_grad=False)
    assert float(model.weight[-1, -1]) == 8 * SIZE * SIZE - 1
    assert model.weight.sum() > 0 and resident_bytes(file) > 30 << 20
    monkeypatch.setattr(weights_in_huge_pages, "MOVE_CHUNK_BYTES", 1 << 20)
    other = model.weight.detach()  # prevents the file from being unmapped
    assert move_to_huge_pages(model) == 32 << 20
    assert resident_bytes(file) < 2 << 20
    assert torch.equal(model.weight, other)


def test_weights_do_not_move_if_allocated_or_memory_is_low(tmp_path, monkeypatch):
    allocated = Model()
    mapped = _mapped_model(tmp_path / "weights.safetensors")
    for model, free in ((allocated, weights_in_huge_pages.free_memory_bytes()), (mapped, 12 * SIZE * SIZE)):
        monkeypatch.setattr(weights_in_huge_pages, "free_memory_bytes", lambda free=free: free)
        before = _addresses(model)
        assert move_to_huge_pages(model) == 0 and _addresses(model) == before
