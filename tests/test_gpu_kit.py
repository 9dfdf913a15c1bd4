"""The GPU kit: packing, time limits, and a run on the simulated device.

``tests/fake_cuda/test_gpu_kit.py`` tests the measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.fake_cuda.build import is_cpu_build

ROOT = Path(__file__).parent.parent
SIDES = {"deltaw": {"side": "deltaw"}, "PEFT": {"side": "peft"}}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kit is for Linux")
in_checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the kit is packed from a checkout")


@pytest.fixture
def scripts(monkeypatch):
    """The modules of the kit."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import figures
    import gpu_kit

    yield argparse.Namespace(gpu_kit=gpu_kit, figures=figures)
    for name in ("figures", "gpu_kit"):
        sys.modules.pop(name, None)


@pytest.fixture
def kit(scripts, tmp_path):
    args = argparse.Namespace(minutes=1.0, fake=True, output=tmp_path / "results.json")
    return scripts.gpu_kit.Kit(args, tmp_path)


def result(rows_per_second: float, losses: list[float]) -> dict:
    return {"kind": "equal lengths", "rows_per_second": rows_per_second, "peak_bytes": 1, "losses": losses}


@in_checkout
def test_archive_contains_scripts_tests_and_wheel(scripts, tmp_path):
    wheel = tmp_path / "deltaw-1-py3-none-linux_x86_64.whl"
    wheel.write_text("")
    output = tmp_path / "kit"
    scripts.gpu_kit.pack(argparse.Namespace(output=output, wheel=wheel, wheels=False))
    with tarfile.open(f"{output}.tar.gz") as archive:
        names = set(archive.getnames())
    required = ("run.sh", "commit", "benchmarks/gpu_sides.py", "tests/fake_cuda/device.cpp", f"wheels/{wheel.name}")
    assert names >= {f"kit/{name}" for name in required}
    assert os.access(output / "run.sh", os.X_OK)
    subprocess.run(["bash", "-n", str(output / "run.sh")], check=True)


def test_sides_alternate_and_unusable_sides_run_once(kit, monkeypatch):
    calls = []

    def child(**job):
        calls.append((job["stage"], job["size"], job.get("side")))
        if job["stage"] == "prepare":
            return [{}], "no space" if job["size"] == "large" else ""
        return [result(1, [3.0])], "killed" if job["side"] == "peft" and len(calls) > 4 else ""

    monkeypatch.setattr(kit, "child", child)
    kit.measure(["small", "large"], SIDES)
    sides = [side for stage, size, side in calls if stage == "measure" and size == "small"]
    assert sides == ["deltaw", "peft", "peft", "deltaw", "deltaw"]
    assert not any(stage == "measure" and size == "large" for stage, size, _ in calls)
    stored = json.loads(kit.args.output.read_text())
    assert stored["simulated"] and stored["skipped"] == ["large (no space)", "small, PEFT, round 2 (killed)"]
    assert len(stored["results"]["small"]["equal lengths"]["deltaw"]) == 3


def test_killed_process_keeps_its_results_and_later_stages_are_listed(kit, monkeypatch, tmp_path):
    (tmp_path / "gpu_sides.py").write_text("import time\nprint('RESULT {\"kind\": 1}', flush=True)\ntime.sleep(60)\n")
    monkeypatch.setattr(sys.modules["gpu_kit"], "__file__", str(tmp_path / "gpu_kit.py"))
    kit.deadline -= 59
    assert kit.child(stage="measure") == ([{"kind": 1}], "no time left")
    monkeypatch.setattr(kit, "child", lambda **job: pytest.fail("there is no time for this"))
    monkeypatch.setattr(kit, "prepare", lambda size: True)
    kit.measure(["tiny"], {"deltaw": {}})
    assert kit.record["skipped"] == [f"tiny, deltaw, round {n}" for n in (1, 2, 3)]


def test_different_losses_are_reported(kit, capsys):
    kit.add("tiny", "deltaw", [{**result(10, [3.0, 2.0]), "notes": ["in tiles"]}])
    for _ in range(2):
        kit.add("tiny", "PEFT", [result(5, [3.0, 2.5])])
    kit.add("tiny", "PEFT, bf16 factors", [result(5, [3.0, 2.5])])
    assert kit.record["notes"] == ["in tiles", "The losses of PEFT differ by 0.500 (tiny, equal lengths)."]
    assert all(line.startswith("SIMULATED ") for line in capsys.readouterr().out.splitlines())


def test_page_shows_results_of_gpus_only(scripts, kit, monkeypatch, tmp_path):
    figures = scripts.figures
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    assert figures.table("gpu").startswith("There are no results")
    kit.add("tiny", "deltaw", [{**result(10, [3.0, 2.0]), "planned_bytes": 2e9, "launches": 7}])
    kit.add("tiny", "PEFT", [result(5, [3.0, 2.001])])
    kit.skip("tiny, PEFT, round 2")
    kit.save()
    kit.args.output.rename(file)
    with pytest.raises(ValueError, match="simulated device"):
        figures.table("gpu")
    file.write_text(json.dumps(kit.record | {"simulated": False}))
    text = figures.table("gpu")
    assert "| tiny, equal lengths, deltaw | 10.00 | 2.00 | 0.00 GB | 2.00 GB |  | 7 |" in text
    assert "| tiny, equal lengths, PEFT | 5.00 | 1.00 | 0.00 GB |  | 0.0010 |" in text
    assert "- skipped: tiny, PEFT, round 2\n" in text


@in_checkout
@pytest.mark.slow
@pytest.mark.skipif(not is_cpu_build(), reason="the fake device requires torch's CPU build")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler was found")
def test_packed_kit_runs_on_simulated_device(tmp_path):
    pytest.importorskip("peft")
    environment = {key: text for key, text in os.environ.items() if key != "PYTHONPATH"}
    environment["PYTHON"] = sys.executable
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    source = tmp_path / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*pip, str(source)], check=True, env={**environment, "CXX": "false"})  # without kernels
    (wheel,) = tmp_path.glob("*.whl")
    script = ROOT / "benchmarks" / "gpu_kit.py"
    output = tmp_path / "kit"
    packing = [sys.executable, str(script), "pack", "--wheel", str(wheel), "--output", str(output)]
    subprocess.run(packing, check=True, env={**environment, "PYTHONPATH": str(ROOT / "src")})
    command = [str(output / "run.sh"), "--fake", "--minutes", "12", "--output", str(tmp_path / "results.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("SIMULATED ") for line in done.stdout.splitlines())
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["simulated"] and "GPU tests: " in "".join(record["notes"])
    assert set(record["results"]["tiny"]) == {"equal lengths", "ragged lengths", "shared prefix"}
    for sides in record["results"]["tiny"].values():
        assert {"deltaw", "PEFT, sdpa", "PEFT, sdpa, bf16 factors"} <= set(sides)
        assert all("error" not in run for name in ("deltaw", "PEFT, sdpa") for run in sides[name])
    assert not [note for note in record["notes"] if "losses" in note]
