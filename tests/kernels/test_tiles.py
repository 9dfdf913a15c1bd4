"""Tests of AMX tile products, emulated with arrays. The sources are recompiled for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltaw.kernels import linear as products
from deltaw.kernels import loader, variants
from deltaw.kernels.processor import processor_flags
from tests.kernels import with_library
from tests.kernels.conftest import assert_close, same_bits
from tests.kernels.test_linear import adapted, inputs, numbers

VARIANTS = "none"

pytestmark = pytest.mark.slow
# The emulation requires the CPU features of amx except the tiles.
BASE = next(v for v in variants.all_variants() if v.name == "avx512_bf16")
AMX = next(v for v in variants.all_variants() if v.name == "amx")
BF16 = 1
INT8 = 2
DOT = 0
TILES = 2
SUITE = ("test_linear.py", "test_attention.py", "test_rows.py")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the emulation and return its shared library."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    if BASE.lacking(processor_flags()):
        pytest.skip(f"this processor does not run {BASE.name}")
    folder = tmp_path_factory.mktemp("tiles")
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", folder],
        cwd=Path(__file__).parents[2],
        env={**os.environ, variants.EMULATED_TILES: "1", "DELTAW_VARIANTS": "amx"},
        check=True,
    )
    return folder / "deltaw/kernels" / AMX.emulated().file


@pytest.fixture
def in_tiles(emulated: Path):
    """Use the kernels of the emulation."""
    with loader.temporary_arithmetic():
        loader.activate(with_library.load_kernels(emulated))
        yield loader.kernels()


def test_kernel_tests_pass_with_tiles(emulated: Path):
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.kernels.with_library", *(folder / name for name in SUITE)],
        cwd=folder.parents[1], env={**os.environ, with_library.VARIABLE: str(emulated)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-3000:]


def test_tiles_are_selectable_and_the_default(in_tiles):
    assert [in_tiles.dw_arithmetics(kind) >> TILES & 1 for kind in (0, BF16, INT8)] == [0, 1, 1]
    x = numbers(40, 200).bfloat16()
    gradients = []
    for arithmetic in (None, DOT, TILES):
        if arithmetic is not None:
            in_tiles.dw_set_arithmetic(BF16, arithmetic)
        # xᵀ·x in fp32, computed as the gradient of a factor. Only unrounded sums reveal another order of summation.
        gradients.append(products.factors_backward(x, x.new_zeros(40, 48), x, x[:, :48].contiguous(), 1.0)[0])
    by_default, by_dot, by_tiles = gradients
    assert torch.equal(by_default, by_tiles) and not torch.equal(by_default, by_dot)


# Sums of int8 products are exact in any order.
@pytest.mark.parametrize("rows", [1, 15, 16, 33, 63, 101])
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 32), (132, 20), (576, 100), (3200, 36)])
def test_int8_products_are_bit_identical_to_dot_products(in_tiles, threads, rows, n_in, n_out):
    x = numbers(rows, n_in).float()
    grad = numbers(rows, n_out, seed=1).float()
    scale = torch.rand(n_out, generator=torch.Generator().manual_seed(2)) + 0.5
    weight = (numbers(n_out, n_in, seed=3) * 40).clamp(-127, 127).to(torch.int8)
    results = []
    for arithmetic in (DOT, TILES, TILES):
        in_tiles.dw_set_arithmetic(INT8, arithmetic)
        product = products.LinearProduct(weight, scale=scale)
        results.append((products.linear(x, product)[0], products.linear_backward(grad, product)[0]))
    assert same_bits(*results)


@pytest.mark.parametrize("size", [(1, 4, 4), (70, 64, 132), (45, 160, 36), (200, 1600, 68)])
@pytest.mark.parametrize("rank", [2, 16, 34])
def test_products_are_bit_identical_for_any_batch_and_thread_count(in_tiles, size, rank):
    rows, n_in, n_out = size
    t = inputs(rows, n_in, n_out, rank, torch.bfloat16)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        y, h = products.linear(t["x"], adapted(t), t["added"])
        dx, grad_h = products.linear_backward(t["grad"], adapted(t), t["x"])
        results.append((y, h, dx, grad_h, *products.factors_backward(t["x"], h, t["grad"], grad_h, 0.5)))
    assert same_bits(*results)
    # A single row is bit-identical to the same row in a batch.
    single_row, _ = products.linear(t["x"][-1:], adapted(t), t["added"][-1:])
    assert torch.equal(single_row, results[0][0][-1:])
    exact = t["x"].double() @ t["weight"].double().t() + t["bias"].double() + t["added"].double()
    assert_close(results[0][0], exact + 0.5 * results[0][1].double() @ t["lora_B"].double(), torch.bfloat16)


@pytest.mark.skipif(not variants.file_of(AMX).is_file(), reason="the variant amx was not built")
@pytest.mark.skipif("amx_tile" in processor_flags(), reason="this processor has tiles")
@pytest.mark.skipif(bool(BASE.lacking(processor_flags())), reason=f"this processor does not run {BASE.name}")
def test_tiles_raise_if_system_does_not_permit_them():
    library = loader.load(variants.file_of(AMX))
    assert library.dw_ready() != 0
    for kind in (BF16, INT8):
        assert library.dw_arithmetics(kind) and not library.dw_arithmetics(kind) >> TILES & 1
        with pytest.raises(RuntimeError):
            library.dw_set_arithmetic(kind, TILES)
