"""What lies outside is refused before anything is written, with and without the extension."""

from __future__ import annotations

import pytest
import torch

from deltaw.kernels import class_gradient as head
from deltaw.kernels import linear as products
from deltaw.kernels.rows import cross_entropy_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [-1, 40, 2**40])
def test_a_target_outside_of_the_classes_is_refused(dtype, target):
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = logits.clone()
    with pytest.raises(IndexError, match=f"target {target} is out of bounds for 40 classes"):
        cross_entropy_(
            logits, torch.tensor([0, target, 39]), torch.ones(3), scale=1.0, softcap=0.0, grad=True
        )
    assert torch.equal(logits, before)


def test_a_class_gradient_refuses_targets_outside():
    grad = torch.zeros(2, 40, dtype=torch.bfloat16)
    weight = torch.randn(40, 16).bfloat16()
    with pytest.raises(IndexError, match="target 40 is out of bounds"):
        head.class_gradient_(grad, torch.tensor([1, 40]), weight, products.scales_of_rows(weight))
