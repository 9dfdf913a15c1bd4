"""Saving and measuring a run adds almost no memory to its training, so a plan does not count it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.processes import start

_PROGRAM = """
import json, sys
import torch
from torch import nn
import deltaw
from deltaw.machine.memory import peak_resident_bytes, resident_bytes
from deltaw.reports.page.learned import measure_adapter
from deltaw.training.loop import TrainedCheck

def added(call):
    before = resident_bytes()
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    call()
    return peak_resident_bytes() - before

folder, size = sys.argv[1], int(sys.argv[2])

def model_of(size):
    layers = nn.ModuleList(nn.ModuleDict({"wide": nn.Linear(size, size, bias=False)}) for _ in range(2))
    return nn.ModuleDict({"layers": layers, "head": nn.Linear(size, size, bias=False)})

def case(name, size, to):
    model = model_of(size)
    if name == "check":
        parameters = dict(model.named_parameters())
        for p in parameters.values():
            p.grad = torch.randn_like(p)
        return TrainedCheck(list(parameters), list(parameters.values())).before_update, None
    init = {"init": "olora"} if name == "olora" else {}
    rank = min(256, size // 2)
    modules = ["head"] if name == "module" else []
    deltaw.attach(model, deltaw.LoRAConfig(rank=rank, target_modules=["wide"], train_modules=modules, **init))
    return lambda: deltaw.save_adapter(model, to), lambda: measure_adapter(to)

from pathlib import Path
peaks = {}
for name in ("factors", "olora", "module", "check"):
    for n in (64, size):  # the small size triggers late imports
        to = Path(folder) / name / str(n)
        peaks[name] = [added(call) for call in case(name, n, to) if call is not None]
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resets the peak through Linux's /proc")
def test_saving_and_checking_does_not_copy_tensors(tmp_path: Path) -> None:
    """Saving copies no more than the factors of one layer. Computing singular values takes a small multiple of that.

    The data are four factors of 2 MB (twice that for OLoRA), and a module or gradients of 16 MB.
    """
    process = start("-c", _PROGRAM, tmp_path, 2048)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    for case, (saving, *measuring) in json.loads(output).items():
        assert saving < {"olora": 10e6}.get(case, 5e6), f"{case}: {saving / 1e6:.1f} MB"
        assert all(number < 48e6 for number in measuring), f"{case}: {measuring[0] / 1e6:.1f} MB"
        assert case == "check" or (tmp_path / case / "2048" / "adapter_model.safetensors").stat().st_size >= 8e6
