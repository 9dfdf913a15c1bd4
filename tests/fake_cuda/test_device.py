"""The fake device applies the rules of a GPU: devices of operands, synchronization, memory and random numbers."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.fake_cuda.device import configured, recorded

MIB = 2**20


@pytest.fixture(autouse=True)
def _empty_device():
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_device(*shape: int, **options) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", **options)


DEVICE_MISMATCHES = {
    "elementwise": lambda x, c: x + c,
    "matmul": lambda x, c: x @ c,
    "linear": lambda x, c: F.linear(x, c),
    "cat": lambda x, c: torch.cat([x, c]),
    "out argument": lambda x, c: torch.mul(x, x, out=c),
    "embedding of host indices": lambda x, c: F.embedding(torch.zeros(2, dtype=torch.int64), x),
    "host scalar as index": lambda x, c: torch.index_select(x, 0, torch.tensor(0)),
    "host scalar in a matmul": lambda x, c: torch.cat([x[0], torch.tensor([1.0])]),
    "host scalar as target": lambda x, c: torch.tensor(1.0).add_(x[0, 0]),
    "host rows by device indices": lambda x, c: c[torch.zeros(2, dtype=torch.int64, device="cuda")],
    "host condition": lambda x, c: torch.where(c > 0, x, x),
    "host mask": lambda x, c: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], c),
    "host generator": lambda x, c: torch.rand(2, device="cuda", generator=torch.Generator()),
    "foreach": lambda x, c: torch._foreach_add([x], [c]),
}


@pytest.mark.parametrize("name", DEVICE_MISMATCHES)
def test_mixed_devices_raise(name):
    with pytest.raises(RuntimeError, match=r"device|on cpu"):
        DEVICE_MISMATCHES[name](on_device(3, 3), torch.randn(3, 3))


def test_host_scalars_are_allowed_in_elementwise_operators():
    x = on_device(3)
    scalar = torch.tensor(2.0)
    for result in (x * scalar, scalar * x, x.clone().mul_(scalar), torch.where(x > 9, scalar, x * 2)):
        assert result.device.type == "cuda" and torch.equal(result.cpu(), x.cpu() * 2)
    assert x.masked_fill(x == x, scalar).tolist() == [2, 2, 2]
    assert x[torch.tensor([1])].device.type == "cuda"  # indices are copied


SYNCHRONIZATIONS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat": lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device="cuda").clone()),
    "copy to the host": lambda x: x.cpu(),
    "copy of pageable memory": lambda x: torch.ones(4).to("cuda", non_blocking=True),
    "new tensor of numbers": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "host indices": lambda x: x[torch.tensor([1])],
    "device": lambda x: torch.cuda.synchronize(),
    "event": lambda x: torch.cuda.current_stream().record_event().synchronize(),
}


@pytest.mark.parametrize("name", SYNCHRONIZATIONS)
def test_synchronizations_are_counted_and_can_raise(name):
    x = on_device(4)
    with recorded() as activity:
        SYNCHRONIZATIONS[name](x)
    assert activity.synchronizations.total() == 1
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        SYNCHRONIZATIONS[name](x)


def test_asynchronous_work_does_not_synchronize():
    x = on_device(4)
    host = torch.ones(4).pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    y = host.to("cuda", non_blocking=True)
    x[1:] = 3
    torch.full((3,), 2.0, device="cuda").add_(x[:3]).clone()
    result = x.repeat_interleave(torch.ones_like(x).long(), output_size=4) + y.index_select(0, x.argsort())
    result.to("cpu", non_blocking=True)  # into pinned memory


def test_launches_and_copies_are_counted():
    x = on_device(4)
    pinned = torch.ones(4).pin_memory()
    with recorded() as activity:
        (x * 2).exp_()
        x.copy_(pinned, non_blocking=True)
        x.copy_(torch.ones(4))
        x.sum().item()
    assert activity.launches == {"aten::mul": 1, "aten::exp": 1, "aten::sum": 1}
    assert activity.copies == {"host_to_device": 2, "pageable": 1, "device_to_host": 1}


def test_allocator_rounds_as_on_cuda():
    """The figures follow from the rules of torch's caching allocator."""
    small = [torch.empty(n, dtype=torch.uint8, device="cuda") for n in (1, 512, 513)]
    assert torch.cuda.memory_allocated() == 512 + 512 + 1024 and torch.cuda.memory_reserved() == 2 * MIB
    large = torch.empty(3 * MIB + 1, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_allocated() == 2048 + 3 * MIB + 512 and torch.cuda.memory_reserved() == 22 * MIB
    huge = torch.empty(11 * MIB, dtype=torch.uint8, device="cuda")  # fits in the large segment
    assert torch.cuda.memory_reserved() == 22 * MIB
    huge_segment = torch.empty(11 * MIB + 1, dtype=torch.uint8, device="cuda")
    # The rest of a large segment is split off only if it exceeds 1 MiB.
    assert torch.cuda.memory_reserved() == 34 * MIB
    assert torch.cuda.memory_allocated() == 2048 + (3 + 11 + 12) * MIB + 512
    before = torch.cuda.memory_allocated()
    del small, large, huge, huge_segment
    assert torch.cuda.memory_allocated() == 0 and torch.cuda.max_memory_allocated() == before
    assert torch.cuda.memory_reserved() == torch.cuda.max_memory_reserved() == 34 * MIB
    free, total = torch.cuda.mem_get_info()
    assert total - free == 34 * MIB
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 0


def test_peak_equals_hand_computed_peak():
    x = on_device(256, 1024)  # 1 MiB
    torch.cuda.reset_peak_memory_stats()
    y = (x * 2) @ on_device(1024, 512)  # 1 MiB and 2 MiB are freed after 0.5 MiB was added
    assert torch.cuda.max_memory_allocated() == 4.5 * MIB and torch.cuda.memory_allocated() == 1.5 * MIB
    weight = on_device(512, 256, requires_grad=True)  # 0.5 MiB
    torch.cuda.reset_peak_memory_stats()
    loss = (y @ weight).square().sum()  # 0.25 MiB for the square's input, the same for its output, 512 B for the loss
    assert torch.cuda.max_memory_allocated() == 2.5 * MIB + 512 and torch.cuda.memory_allocated() == 2.25 * MIB + 512
    assert loss.requires_grad


def test_out_of_memory_raises_after_the_cache_was_released():
    with configured(total_memory=64 * MIB):
        del (cached := [on_device(8 * MIB // 4) for _ in range(4)])[:]
        assert torch.cuda.memory_reserved() == 40 * MIB and not cached
        kept = torch.empty(60 * MIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.cuda.OutOfMemoryError, match=r"Tried to allocate 5242880 bytes"):
            torch.empty(5 * MIB, dtype=torch.uint8, device="cuda")
        assert kept.numel() == 60 * MIB and torch.cuda.get_device_properties(0).total_memory == 64 * MIB


def test_device_properties():
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert torch.cuda.get_device_name(0) == "fake CUDA" and torch.cuda.is_bf16_supported()
    with configured(capability=(7, 5)):
        assert torch.cuda.get_device_capability() == (7, 5)
        assert not torch.cuda.is_bf16_supported(including_emulation=False)


def test_random_numbers_follow_from_the_state_of_the_device():
    states = torch.get_rng_state(), torch.cuda.get_rng_state_all()
    first = F.dropout(on_device(64))
    host = torch.rand(1)
    torch.cuda.set_rng_state_all(states[1])
    assert torch.equal(F.dropout(on_device(64)), first) and not torch.equal(on_device(64), on_device(64))
    torch.set_rng_state(states[0])
    assert torch.equal(torch.rand(1), host)  # the device does not use the host's generator
    generators = [torch.Generator("cuda").manual_seed(3) for _ in range(2)]
    for draw in (torch.rand, torch.randn, lambda n, **options: torch.randperm(n, **options)):
        assert torch.equal(*(draw(8, device="cuda", generator=generator) for generator in generators))


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_matches_cpu(heads, masked):
    tensors = [torch.randn(2, h, 9, 16) for h in (4, heads, heads)]
    mask = (torch.rand(2, 1, 9, 9) > 0.3) | torch.eye(9, dtype=torch.bool) if masked else None
    results = []
    for device in ("cpu", "cuda"):
        inputs = [t.to(device).requires_grad_() for t in tensors]
        moved = None if mask is None else mask.to(device)
        out = F.scaled_dot_product_attention(*inputs, moved, is_causal=not masked, enable_gqa=heads != 4)
        results.append([out, *torch.autograd.grad(out.sin().sum(), inputs)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_mixed_precision_step_with_checkpointing_matches_cpu():
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8)
    weights = []
    for device in ("cpu", "cuda"):
        model = torch.nn.Linear(8, 8, device=device)
        model.load_state_dict(layer.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        scaler = torch.amp.GradScaler(device)
        for _ in range(2):
            with torch.autocast(device, dtype=torch.float16):
                out = checkpoint(model, x.to(device), use_reentrant=False)
            assert out.dtype == torch.float16
            scaler.scale(torch.softmax(out, -1, dtype=torch.float32).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(model.weight.detach().cpu())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    assert not torch.equal(weights[0], layer.weight)


def test_saved_tensors_are_loaded_onto_the_device(tmp_path):
    x = on_device(3)
    torch.save(x, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt").device.type == "cuda"
    assert torch.equal(torch.load(tmp_path / "x.pt", map_location="cpu"), x.cpu())
    assert torch.equal(copy.deepcopy(x), x)
