"""Files that are small on disk and large in memory are rejected before they are loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.hostile_files import HOSTILE

_MEASURED = """
import json, os, resource, sys
from pathlib import Path
import pyarrow
from deltaw.data.sources import open_source, read_rows
from deltaw.errors import UserError
from deltaw.machine.memory import peak_resident_bytes, resident_bytes
from tests.data.hostile_files import HOSTILE

def in_child(work):
    receive, send = os.pipe()
    if not os.fork():
        os.write(send, json.dumps(work()).encode()[:4000])
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        answer = pipe.read()
    os.wait()
    return json.loads(answer or "null")

def read(path, max_bytes):
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    try:
        stream = open_source(str(path), max_bytes=max_bytes)
        stream.scan()
        result, location = sum(len(chunk) for chunk in stream.chunks()), None
    except UserError as error:
        result, location = error.message, error.location
    decoder_peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return result, location, peak_resident_bytes() - before, decoder_peak

folder = Path(sys.argv[1])
results = {}
pyarrow.table({"text": ["a"]})  # import modules that would count as memory of each file
for name, (make, *_) in HOSTILE.items():
    in_child(lambda: make(folder / name))
    results[name] = in_child(lambda: read(folder / name, 2**20))
results["by default"] = in_child(lambda: read(folder / "line.jsonl.gz", 16 * 2**20))
print(json.dumps(results))
"""
_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str | int, str | None, int, int]]:
    """Message or number of rows, location, and peak memory of reading each hostile file and of its decoder."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = os.pathsep.join([str(_ROOT), str(_ROOT / "src")])
    command = [sys.executable, "-c", _MEASURED, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a peak is reset through Linux's /proc")
@pytest.mark.parametrize("name", [*HOSTILE, "by default"])
def test_expanding_file_is_rejected_within_little_memory(name: str, measured: dict) -> None:
    """Without a limit, reading these files takes 100 MB to 8 GB."""
    result, location, peak, decoder_peak = measured[name]
    _, expected, expected_location = HOSTILE.get(name, (None, "line 2 has more than the 16,777,216 bytes", "line 2"))
    assert result == expected or (expected in str(result) and expected_location in location)
    assert peak < 80 * 2**20, f"{peak / 2**20:.0f} MiB"
    assert decoder_peak < 640 * 2**20, f"{decoder_peak / 2**20:.0f} MiB"
