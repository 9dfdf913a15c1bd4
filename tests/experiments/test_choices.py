"""The processes of an experiment choose kernels and precision alike."""

from __future__ import annotations

from deltaw.experiments.jobs import Child
from deltaw.machine import kernel_choice, product_rates
from deltaw.machine import product_rates as measurements
from deltaw.settings import RunConfig


def test_a_worker_uses_what_its_parent_knows_and_tells_what_it_used(settings, tmp_path, monkeypatch):
    monkeypatch.delenv("DELTAW_MEASURED")
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measurements, "_used", {})
    monkeypatch.setattr(measurements, "_learned", {})
    candidates = product_rates.candidates()
    rates = {candidate.stored: {} for candidate in candidates}
    for candidate in candidates:
        rates[candidate.stored][candidate.name] = 123.0
    key = kernel_choice._key(product_rates.GENERIC, 1, candidates)
    measurements.keep(key, {"rates": rates, "disturbed": True}, lasting=False)
    config = RunConfig.read(settings(tmp_path / "run", precision="auto"))
    with Child(tmp_path / "worker.log") as child:
        child.ask("usual", config=config.model_dump(mode="json"))
    assert measurements._learned == measurements.used(), "it measured nothing itself"
    assert not (tmp_path / "cache" / "remembered" / measurements.KIND).exists()
