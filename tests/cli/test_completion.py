"""Shells complete verbs, flags and choices; fast, since torch is not loaded for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deltaw.cli import VERBS, group, main


def offered(words: str, number: int) -> list[str]:
    """What bash is offered for word ``number`` of a command; fails if torch was imported for it."""
    code = (
        "import sys\n"
        "from deltaw.cli import main\n"
        "try:\n"
        "    main([])\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    environment = {**os.environ, "_DELTAW_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(number)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.split()


def test_verbs_flags_and_choices_are_offered_without_torch() -> None:
    assert offered("deltaw t", 1) == ["plain,train", "plain,tune"]
    assert offered("deltaw train --lora.r", 2) == [
        "plain,--lora.rank",
        "plain,--lora.rank_pattern",
        "plain,--lora.rslora",
    ]
    assert offered("deltaw train --lora.init o", 3) == ["plain,orthogonal", "plain,olora"]
    assert offered("deltaw train --data.train x", 3) == ["file,x"]
    assert offered("deltaw frobnicate --x", 2) == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_described_without_torch(verb: str) -> None:
    """Its module imports what it needs when it runs."""
    code = f"import sys, deltaw.cli.{verb}; assert not {{'torch', 'transformers'}} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
