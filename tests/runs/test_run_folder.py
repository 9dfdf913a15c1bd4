"""A run's folder: what it says reads back, and nothing that lay there before is lost or touched."""

from __future__ import annotations

import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.errors import UserError
from deltaw.runs.folder import METRICS, SETTINGS, RunFolder, check_output, settings_text
from deltaw.settings import RunConfig

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
def test_the_settings_read_back_as_the_same_configuration(model, output, lora, train):
    data = {"train": "rows: #1.jsonl", "eval": 0.1, "columns": {"prompt": "question"}}
    config = RunConfig.read({"model": model, "data": data, "lora": lora, "train": train, "output": output})
    chosen = {"train.tokens_per_pass": (64, "why: # not"), "device": ("cpu", "none"), "lora.rank": (1, "x")}
    assert RunConfig.read(yaml.safe_load(settings_text(config, chosen))) == config


def test_what_the_run_chose_stands_behind_the_setting_or_at_the_end():
    config = RunConfig.read({"model": "m", "data": "d"})
    kernels = ("avx2, bf16 products wide", "140 GFLOP/s; torch 90")
    chosen = {"train.tokens_per_pass": (64, "fits"), "device": ("cpu", "asked"), "kernels": kernels}
    lines = settings_text(config, chosen).splitlines()
    assert "  tokens_per_pass: auto  # 64: fits" in lines and "device: auto  # cpu: asked" in lines
    assert lines[-1] == "# kernels: avx2, bf16 products wide: 140 GFLOP/s; torch 90"


def test_an_earlier_run_is_moved_aside_each_time(tmp_path):
    path = tmp_path / "run"
    for number in range(3):
        folder = RunFolder(path)
        folder.write_metrics({"step": number})
        folder.close()
        assert folder.moved == (None if number == 0 else tmp_path / f"run.{number}")
    lines = {p.name: (p / METRICS).read_text() for p in tmp_path.iterdir()}
    assert lines == {name: f'{{"step": {n}}}\n' for n, name in enumerate(("run.1", "run.2", "run"))}


def test_an_empty_folder_is_taken_as_it_is_and_checking_the_output_leaves_no_trace(tmp_path):
    check_output(tmp_path / "new" / "run")
    assert not any(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    assert RunFolder(tmp_path / "run").moved is None


def test_a_folder_of_someone_else_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for refuse in (check_output, RunFolder):
        with pytest.raises(UserError, match=r"thesis\.tex") as refused:
            refuse(tmp_path)
        assert refused.value.where == str(tmp_path) and refused.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    places = [tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("long" * 100) / "run"]
    if os.path.isdir("/proc"):
        places.append("/proc/run")
    for place in places:
        with pytest.raises(UserError, match="cannot write") as refused:
            RunFolder(place)
        assert refused.value.where == str(place) and refused.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_working_folder_is_not_moved_aside(tmp_path, monkeypatch):
    (tmp_path / SETTINGS).write_text("")
    (tmp_path / "below").mkdir()
    for place, folder in ((".", tmp_path), ("..", tmp_path / "below"), (str(tmp_path), tmp_path / "below")):
        monkeypatch.chdir(folder)
        with pytest.raises(UserError, match=r"cannot be renamed|cannot rename"):
            RunFolder(place)
    assert (tmp_path / SETTINGS).exists()


def test_a_folder_marked_read_only_is_refused_even_for_an_administrator(tmp_path):
    (tmp_path / "kept").mkdir(mode=0o555)
    for place in ("kept", "kept/run"):
        with pytest.raises(UserError, match="read-only"):
            check_output(tmp_path / place)
    assert list((tmp_path / "kept").iterdir()) == []
