"""Shells complete verbs, flags and choices; fast, since torch is not loaded for it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from deltaw.cli import VERBS, group, main

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
import importlib, sys

for verb in sys.argv[1:]:
    importlib.import_module(f"deltaw.cli.{verb}")
    assert not {"torch", "transformers"} & sys.modules.keys(), verb
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
    without_torch(_DESCRIBED, *VERBS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_calls_deltaw(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", shell])
    assert ended.value.code == 0
    script = capsys.readouterr().out
    assert f"_DELTAW_COMPLETE={shell}_complete" in script and "deltaw" in script


def test_bash_takes_the_script(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["completion", "bash"])
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", "tcsh"])
    assert ended.value.code == 2 and "tcsh" in capsys.readouterr().err
    assert set(VERBS) == set(group.list_commands(None))  # type: ignore[arg-type]
