"""Typical mistakes in commands: typing errors, flags of other tools, missing files, swapped arguments.

Each exits with status 2 and one message that names the correct command. Models are not loaded.
"""

from __future__ import annotations

import shlex

import pytest

from deltaw.cli import COMMANDS
from deltaw.errors import UserError
from deltaw.settings import aliases, task_registry
from deltaw.settings.config import RunConfig, settings
from tests.cli.conftest import assert_refused

# Command: text that the error message must contain.
WRONG_COMMANDS = {
    # typing errors
    "trian train.yaml": "'deltaw train'",
    "train trian.yaml": "'train.yaml'",
    "train train.yaml --learnin-rate 1e-4": "'--lr'",
    "train train.yaml —lr 1e-4": "write --lr",
    "train train.yaml --train.epoch 2": "'--train.epochs'",
    "train train.yaml --train fast": "--train.learning_rate",
    "train train.yaml --epochs": "--epochs NUMBER",
    "train train.yaml --force": "--force true|false",
    "train train.yaml --json=yes": "takes no value",
    "train train.yaml lr=1e-4 epochs=3": "--lr 1e-4 --epochs 3",
    "train train.yaml other.yaml": "one SETTINGS",
    "serve runs/mine --prot 80": "'--port'",
    "serve runs/mine --port 99999999": "0<=x<=65535",
    "merge runs/mine --output x --method tise": "'ties'",
    "data chek mine.jsonl": "'deltaw data check'",
    "data": "deltaw data check FILE",
    "eval": "deltaw eval runs/mine",
    "merge runs/mine": "--output",
    "completion": "bash, zsh, fish",
    "train": "train.yaml",
    # names of other tools
    "finetune train.yaml": "'deltaw train'",
    "help train": "deltaw train --help",
    "train --config train.yaml": "SETTINGS, without a flag",
    "train train.yaml --num_train_epochs 3": "'--epochs'",
    "train train.yaml --per-device-train-batch-size 4": "'--batch-size'",
    "train train.yaml --model_name_or_path x": "'--model'",
    "train train.yaml --load_in_4bit": "'--precision' (nf4)",
    "train train.yaml --method qlora": "precision: nf4",
    "train train.yaml --task rm": "sequence-classification",
    "train train.yaml --precision 4bit": "nf4",
    "generate runs/mine --max-tokens 5": "'--max-new-tokens'",
    "generate --model x --adapter-path runs/mine -p x": "RUN, without a flag",
    "generate runs/mine -p x --lr 1": "flag of plan, train",
    "export runs/mine --format ollama --output x": "gguf",
    # missing files
    "eval nothere": "'runs/other'",
    "chat mnie": "'runs/mine'",
    "generate runs/mnie text": "'runs/mine'",
    "export mnie --format peft --output x": "'runs/mine'",
    "runs mnie": "'mine'",
    "train nowhere.yml": "'train.yaml'",
    "serve runs/mine --api-key-file kyes.txt": "'keys.txt'",
    # swapped or misplaced
    "mine.jsonl train": "deltaw train --model MODEL --data mine.jsonl",
    "runs/mine chat": "deltaw chat runs/mine",
    "train.yaml": "deltaw train train.yaml",
    "--lr 1e-4 train train.yaml": "deltaw COMMAND --lr",
    "train mine.jsonl --model m": "deltaw train --model m --data mine.jsonl",
    "train pypi:some-model": "--model pypi:some-model",
    "data mine.jsonl": "deltaw data check mine.jsonl",
    "eval mine.jsonl --data runs/mine": "deltaw eval runs/mine --data mine.jsonl",
    "eval train.yaml": "deltaw eval runs/mine",
    "chat runs/mine hello": "deltaw generate runs/mine hello",
    "generate runs/mine how are you": "deltaw generate runs/mine 'how are you'",
    "generate runs/mine 'how are you' 'and you'": "--prompt TEXT --prompt TEXT",
    "train --data mine.jsonl --data.columns.prompt a": "--data.columns '{prompt: …}'",
    "data check mnie.jsonl": "'mine.jsonl'",
    "merge runs/mine merged --output x": "--output merged",
    "compare train.yaml lora,full": "--methods lora,full",
}
assert len(WRONG_COMMANDS) >= 50


@pytest.fixture
def project_folder(tmp_path, monkeypatch):
    """Create a folder with rows, settings and two runs."""
    monkeypatch.chdir(tmp_path)
    for name in ("other", "mine"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.yaml").write_text(f"model: m\ndata: mine.jsonl\noutput: runs/{name}\n")
    (tmp_path / "runs" / "mine" / "report.html").touch()
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "train.yaml").write_text("model: m\ndata: mine.jsonl\noutput: runs/mine\n")
    (tmp_path / "keys.txt").write_text("key\n")
    return tmp_path


@pytest.mark.parametrize("command", WRONG_COMMANDS)
def test_wrong_command_error_names_correct_one(command, call, project_folder):
    before = sorted(project_folder.rglob("*"))
    result = call(*shlex.split(command))
    assert_refused(result, WRONG_COMMANDS[command])
    assert result.out == "" and result.err.startswith("error: ") and "  hint:  " in result.err
    assert all(len(line) <= 80 for line in result.err.splitlines() if str(project_folder) not in line), result.err
    assert sorted(project_folder.rglob("*")) == before


def settings_of(call, monkeypatch, *arguments):
    """Return the settings that the arguments of ``train`` produce."""
    from deltaw.runs import fit as fit_module

    captured = {}
    monkeypatch.setattr(fit_module, "fit", lambda config, **_: captured.update(config=config) or exit(7))
    call("train", *arguments, status=7)
    return captured["config"]


def test_short_flags_and_aliases_set_settings(call, project_folder, monkeypatch):
    short_flags = "--lr 1e-3 --epochs 3 --batch-size 4 --max-length 99 --max-steps 5 --seed 6 --rank 7 --alpha 8"
    long_flags = "--learning-rate 1e-3 --train.epochs 3 --batch_size 4 --data.max-length 99 --max_steps 5"
    long_flags += " --train.seed 6"
    for text in (short_flags, f"{long_flags} --lora.r 7 --lora.lora-alpha 8"):
        config = settings_of(call, monkeypatch, "train.yaml", *text.split())
        train = config.train
        assert (train.learning_rate, train.epochs, train.batch_size, train.max_steps) == (1e-3, 3, 4, 5)
        assert (train.seed, config.data.max_length, config.lora.rank, config.lora.alpha) == (6, 99, 7, 8)
    assert settings_of(call, monkeypatch, "train.yaml", "--task", "orpo").preference.loss == "orpo"


def test_task_aliases_are_resolved():
    for word, (entry, implied) in task_registry.aliases().items():
        task = entry.name
        loss = implied.get("loss")
        sections = {"distill": {"distill": {"prompt": "be brief"}}, "rl": {"reward": {"functions": ["exact"]}}}
        config = RunConfig.read({"model": "m", "data": "d", "task": word, **sections.get(task, {})})
        assert config.task == task and (loss is None or config.preference.loss == loss)
    values = {"model": "m", "data": "d", "task": "dpo", "preference": {"beta": 0.3}}
    assert RunConfig.read(values).preference.model_dump().items() >= {"beta": 0.3, "loss": "dpo"}.items()
    with pytest.raises(UserError, match="contradict"):
        RunConfig.read({**values, "preference": {"loss": "kto"}})


FOREIGN_KEYS = {
    "num_train_epochs: 3": "deltaw calls it train.epochs, written train: {epochs: …}",
    "train: {num_train_epochs: 3}": "deltaw calls it train.epochs",
    "learning-rate: 1e-4": "deltaw calls it train.learning_rate",
    "lora_alpha: 16": "deltaw calls it lora.alpha",
    "gradient_accumulation_steps: 8": "deltaw calls it train.batch_size",
    "adapter: qlora": "deltaw calls it method",
    "train.epochs: 3": "in a file it is written train: {epochs: …}",
    "packing: true": "rows are always packed",
    "base_model: x": "deltaw calls it model",
}


def test_foreign_settings_keys_get_suggestion(call, project_folder):
    for line, answer in FOREIGN_KEYS.items():
        (project_folder / "train.yaml").write_text(f"model: m\ndata: mine.jsonl\n{line}\n")
        assert_refused(call("train", "train.yaml"), "unknown key", answer)
    (project_folder / "rows.json").write_text("[{}]")
    assert_refused(call("train", "rows.json"), "these are rows", "--data rows.json")


def test_aliases_refer_to_existing_settings_and_commands():
    valid_keys = {setting.key for setting in settings()}
    assert set(aliases.SHORT) <= valid_keys
    dotted = {name.partition(":")[0] for name in aliases._NAMES if "." in name.partition(":")[0]}
    assert {key for key in dotted if " " not in key} <= valid_keys
    assert {name.split()[0] for name in aliases._COMMANDS} <= set(COMMANDS)


def test_deltaw_without_arguments_shows_first_steps(call):
    result = call(status=0)
    assert len(result.out.splitlines()) <= 12 and result.err == ""
    positions = [result.out.index(f"deltaw {verb}") for verb in ("init", "plan", "train", "eval", "chat")]
    assert positions == sorted(positions)


def test_help_shows_common_flags_and_mentions_help_all(call):
    for verb in ("train", "plan", "compare", "tune", ("data", "show")):
        path = [verb] if isinstance(verb, str) else list(verb)
        result = call(*path, "--help", status=0)
        names = ("--model TEXT", "--data ", "--epochs NUMBER", "--lr auto|search|NUMBER", "--rank N", "--output TEXT")
        assert all(name in result.out for name in names) and "[train.epochs; default: 1.0]" in result.out
        assert "--train.betas" not in result.out and f"deltaw {' '.join(path)} --help-all" in result.out
        assert max(map(len, result.out.splitlines())) <= 80 and len(result.out.splitlines()) < 100
        full_help = call(*path, "--help-all", status=0).out
        assert max(map(len, full_help.splitlines())) <= 80
        sections = [full_help.index(f"\n{name} (") for name in ("data", "lora", "train", "preference")]
        assert sections == sorted(sections) and "--train.schedule constant|linear|cosine" in full_help
    result = call("serve", "--help", status=0)
    assert "--port" in result.out and "--max-depth" not in result.out
    assert "Limits:" in call("serve", "--help-all", status=0).out


def test_run_is_found_by_name_in_runs_folder(call, project_folder):
    assert "runs/mine" in call("eval", "mine").err  # contains no adapter
    assert_refused(call("eval", "mine"), "no adapter")
