"""Shell completion of verbs, flags and choices does not import torch."""

from __future__ import annotations

import json
import subprocess
import sys

from deltaw.cli import COMMANDS

_COMPLETE_CODE = """
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
_HELP_CODE = """
import contextlib, sys
from deltaw.cli import main

for verb in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        main([verb, "--help"])
    assert not {"torch", "transformers", "optuna", "datasets"} & sys.modules.keys(), verb
"""


def run_without_torch(code: str, *arguments: str) -> str:
    """Run code in a new interpreter and return its output. The code asserts that torch was not imported."""
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_verbs_flags_and_choices_complete_without_torch() -> None:
    expected = {
        ("deltaw t", 1): ["plain,train", "plain,tune"],
        ("deltaw train --lora.r", 2): ["plain,--lora.rank", "plain,--lora.rank_pattern", "plain,--lora.rslora"],
        ("deltaw train --lora.init o", 3): ["plain,orthogonal", "plain,olora"],
        ("deltaw train --data.train x", 3): ["file,x"],
        ("deltaw frobnicate --x", 2): [],
    }
    assert json.loads(run_without_torch(_COMPLETE_CODE, json.dumps(list(expected)))) == list(expected.values())


def test_help_of_every_verb_does_not_import_torch() -> None:
    assert run_without_torch(_HELP_CODE, *COMMANDS).count("Usage: ") == len(COMMANDS)


def test_shell_scripts_call_deltaw(call, tmp_path) -> None:
    for shell in ("zsh", "fish", "bash"):
        result = call("completion", shell)
        assert result.status == 0 and f"_DELTAW_COMPLETE={shell}_complete" in result.out and "deltaw" in result.out
    (tmp_path / "completion.sh").write_text(result.out)
    assert subprocess.run(["bash", "-n", tmp_path / "completion.sh"], check=False).returncode == 0
