"""Skips the tests of this folder unless the fake device is installed. Those marked ``gpu`` also run on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.byte_models import byte_tokenizer, tiny_llama
from tests.fake_cuda import device

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        runs_here = device.is_installed or (item.get_closest_marker("gpu") and torch.cuda.is_available())
        if not runs_here and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="requires the fake CUDA device: make test-cuda"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Return the folder of a small random base model."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
