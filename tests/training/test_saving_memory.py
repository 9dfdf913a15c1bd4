"""What a run writes and measures beside its training takes next to no memory: a plan counts none for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.processes import start

_MEASURED = """
import json, sys
import torch
from torch import nn
import deltaw
from deltaw.machine.memory import peak_resident_bytes, resident_bytes
from deltaw.reports.page.learned import what_was_learned
from deltaw.training.guarantee import TrainedCheck

def added(call):
    before = resident_bytes()
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    call()
    return peak_resident_bytes() - before

folder, size = sys.argv[1], int(sys.argv[2])

def model_of(size):
    layers = nn.ModuleList(nn.ModuleDict({"wide": nn.Linear(size, size, bias=False)}) for _ in range(2))
    return nn.ModuleDict({"layers": layers, "head": nn.Linear(size, size, bias=False)})

def case(what, size, to):
    model = model_of(size)
    if what == "check":
        parameters = dict(model.named_parameters())
        for p in parameters.values():
            p.grad = torch.randn_like(p)
        return TrainedCheck(list(parameters), list(parameters.values())).before_update, None
    init = {"init": "olora"} if what == "olora" else {}
    rank = min(256, size // 2)
    modules = ["head"] if what == "module" else []
    deltaw.attach(model, deltaw.LoRAConfig(rank=rank, target_modules=["wide"], train_modules=modules, **init))
    return lambda: deltaw.save_adapter(model, to), lambda: what_was_learned(to)

from pathlib import Path
found = {}
for what in ("factors", "olora", "module", "check"):
    for n in (64, size):  # what is imported late is imported with the small one
        to = Path(folder) / what / str(n)
        found[what] = [added(call) for call in case(what, n, to) if call is not None]
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a peak is reset through Linux's /proc")
def test_what_is_written_is_not_copied(tmp_path: Path) -> None:
    """Four factors of 2 MB (OLoRA writes twice that), a module or gradients of 16 MB: never is more than one
    layer's factors copied, and singular values take a few times that."""
    process = start("-c", _MEASURED, tmp_path, 2048)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    for what, (written, *learned) in json.loads(out).items():
        assert written < {"olora": 10e6}.get(what, 5e6), f"{what}: {written / 1e6:.1f} MB"
        assert all(number < 48e6 for number in learned), f"{what}: {learned[0] / 1e6:.1f} MB"
        assert what == "check" or (tmp_path / what / "2048" / "adapter_model.safetensors").stat().st_size >= 8e6
