"""Shells complete verbs, flags and choices; fast, since torch is not loaded for it."""

from __future__ import annotations

import json
import subprocess
import sys

from deltaw.cli import VERBS

_OFFERED = """
import contextlib, io, json, os, sys
from deltaw.cli import main

found = []
for words, number in json.loads(sys.argv[1]):
    os.environ |= {"_DELTAW_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(number)}
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())) as said, contextlib.suppress(SystemExit):
        main([])
    said.seek(0)
    found.append(said.read().split())
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(json.dumps(found))
"""
_DESCRIBED = """
import contextlib, sys
from deltaw.cli import main

for verb in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        main([verb, "--help"])
    assert not {"torch", "transformers", "matplotlib", "optuna", "datasets"} & sys.modules.keys(), verb
"""


def without_torch(code: str, *arguments: str) -> str:
    """What code in an interpreter of its own prints; it fails if torch was imported for it."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_verbs_flags_and_choices_are_offered_without_torch() -> None:
    expected = {
        ("deltaw t", 1): ["plain,train", "plain,tune"],
        ("deltaw train --lora.r", 2): ["plain,--lora.rank", "plain,--lora.rank_pattern", "plain,--lora.rslora"],
        ("deltaw train --lora.init o", 3): ["plain,orthogonal", "plain,olora"],
        ("deltaw train --data.train x", 3): ["file,x"],
        ("deltaw frobnicate --x", 2): [],
    }
    assert json.loads(without_torch(_OFFERED, json.dumps(list(expected)))) == list(expected.values())


def test_verbs_are_described_without_torch() -> None:
    """Their modules import what they need when they run."""
    assert without_torch(_DESCRIBED, *VERBS).count("Usage: ") == len(VERBS)


def test_the_script_of_a_shell_calls_deltaw(call, tmp_path) -> None:
    for shell in ("zsh", "fish", "bash"):
        ended = call("completion", shell)
        assert ended.status == 0 and f"_DELTAW_COMPLETE={shell}_complete" in ended.out and "deltaw" in ended.out
    (tmp_path / "completion.sh").write_text(ended.out)
    assert subprocess.run(["bash", "-n", tmp_path / "completion.sh"], check=False).returncode == 0
