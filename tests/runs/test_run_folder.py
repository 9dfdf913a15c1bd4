"""Settings in a run folder round-trip, and existing files are never lost."""

from __future__ import annotations

import os

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.runs.folder import METRICS, RunFolder, check_output, settings_text
from deltaw.settings.config import SETTINGS, RunConfig
from tests.conftest import refusal

texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=20)


LORA = {
    "alpha": st.floats(1e-6, 1e6),
    "target_modules": st.sampled_from(["all-linear", ["q_proj", "v_proj"], r".*\.mlp\..*"]),
    "layers": st.sampled_from([None, "0-3", [1, 2]]),
}
TRAIN = {
    "learning_rate": st.floats(1e-12, 1.0),
    "tokens_per_pass": st.sampled_from(["auto", 1, 4096]),
    "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    "max_grad_norm": st.sampled_from([None, 0.5]),
}


@settings(max_examples=12)
@given(texts, texts, st.fixed_dictionaries(LORA), st.fixed_dictionaries(TRAIN))
def test_settings_file_round_trip(model, output, lora, train):
    data = {"train": "rows: #1.jsonl", "eval": 0.1, "columns": {"prompt": "question"}}
    config = RunConfig.read({"model": model, "data": data, "lora": lora, "train": train, "output": output})
    choices = {"train.tokens_per_pass": (64, "why: # not"), "device": ("cpu", "none"), "lora.rank": (1, "x")}
    assert RunConfig.read(yaml.safe_load(settings_text(config, choices))) == config


def test_choices_are_comments_in_settings_file():
    config = RunConfig.read({"model": "m", "data": "d"})
    kernels = ("avx2, bf16 products wide", "140 GFLOP/s; torch 90")
    choices = {"train.tokens_per_pass": (64, "fits"), "device": ("cpu", "asked"), "kernels": kernels}
    lines = settings_text(config, choices).splitlines()
    assert "  tokens_per_pass: auto  # 64: fits" in lines and "device: auto  # cpu: asked" in lines
    assert lines[-1] == "# kernels: avx2, bf16 products wide: 140 GFLOP/s; torch 90"


def test_earlier_runs_are_renamed(tmp_path):
    path = tmp_path / "run"
    for number in range(3):
        folder = RunFolder(path)
        folder.write_metrics({"step": number})
        folder.close()
        assert folder.moved == (None if number == 0 else tmp_path / f"run.{number}")
    lines = {p.name: (p / METRICS).read_text() for p in tmp_path.iterdir()}
    assert lines == {name: f'{{"step": {n}}}\n' for n, name in enumerate(("run.1", "run.2", "run"))}


def test_check_output_creates_nothing_and_empty_folder_is_used(tmp_path):
    check_output(tmp_path / "new" / "run")
    assert not any(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    assert RunFolder(tmp_path / "run").moved is None


def test_unrelated_folder_is_rejected_unchanged(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for function in (check_output, RunFolder):
        exc_info = refusal(function, tmp_path, match=r"thesis\.tex")
        assert exc_info.location == str(tmp_path) and exc_info.hint
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_unwritable_path_is_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    paths = [tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("long" * 100) / "run"]
    if os.path.isdir("/proc"):
        paths.append("/proc/run")
    for path in paths:
        exc_info = refusal(RunFolder, path, match="cannot write")
        assert exc_info.location == str(path) and exc_info.hint
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_working_directory_is_not_renamed(tmp_path, monkeypatch):
    (tmp_path / SETTINGS).write_text("")
    (tmp_path / "below").mkdir()
    for path, folder in ((".", tmp_path), ("..", tmp_path / "below"), (str(tmp_path), tmp_path / "below")):
        monkeypatch.chdir(folder)
        refusal(RunFolder, path, match=r"cannot be renamed|cannot rename")
    assert (tmp_path / SETTINGS).exists()


def test_read_only_folder_is_rejected_even_for_root(tmp_path):
    (tmp_path / "kept").mkdir(mode=0o555)
    for path in ("kept", "kept/run"):
        refusal(check_output, tmp_path / path, match="read-only")
    assert list((tmp_path / "kept").iterdir()) == []
