"""Regression: labels of any scale train alike, and every output is in the units of the labels."""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForSequenceClassification

from deltaw.data.bad_rows import BadRowError
from deltaw.export.merge import merge_run
from deltaw.inference.open_run import open_run
from deltaw.runs.fit import fit
from deltaw.tasks.classification.regression_head import LabelUnits, RegressionHead
from deltaw.tasks.classification.rows import regression_label
from tests.conftest import refusal, write_rows
from tests.serving.encoder_models import write_bert
from tests.training.runs import METHODS, load_eval_rows, open_on_cpu, slow_except


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("base") / "bert")


def value_of(number: int) -> float:
    """Return a number that a model can learn from the text of the row."""
    return (number % 7 - 3) / 2


@pytest.fixture
def train(settings, tmp_path, bert):
    """Return a function that trains on labels computed from standardized ones."""

    def run(label, name="run", model=bert, **changes):
        rows = [{"text": "ab" * (1 + n % 7) + "c" * (n % 2), "label": label(value_of(n))} for n in range(24)]
        data = {"train": str(write_rows(tmp_path / f"{name}.jsonl", rows)), "eval": 4}
        changes = {"method": "lora", "lora": {"rank": 2}, "precision": "fp32", **changes}
        changes["train"] = {"batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, **changes.pop("train", {})}
        return fit(settings(tmp_path / name, model=str(model), task="regression", data=data, **changes))

    return run


def outputs_of(run, examples):
    """Return the model's own outputs for unpadded rows, in fp64."""
    with torch.no_grad():
        tokens = [torch.from_numpy(row.tokens.astype("int64"))[None] for row in examples]
        return np.concatenate([run(input_ids=ids).logits.double().numpy() for ids in tokens])


def test_relative_error_does_not_depend_on_scale_and_mean(train):
    units = [(0.9, 0.0), (906.0, 0.0), (9000.0, 45000.0), (0.001, -3.0)]
    errors = []
    for scale, mean in units:
        result = train(lambda z, scale=scale, mean=mean: mean + scale * z, name=f"scale{scale}")
        errors.append(result.evaluation.metrics["rmse"] / scale)
    assert errors == pytest.approx([errors[0]] * len(units), rel=2e-2)
    assert errors[0] < 1.2


@pytest.mark.each_value
@pytest.mark.parametrize("method", slow_except("lora", "head", "random"))
def test_saved_adapter_of_each_method_predicts_prices(method, train):
    result = train(lambda z: 45000 + 9000 * z, **METHODS[method])
    run = open_on_cpu(result.output)
    evaluation = run.score(load_eval_rows(run)).evaluation
    assert evaluation.metrics["rmse"] == pytest.approx(result.evaluation.metrics["rmse"], rel=1e-4)
    assert evaluation.predictions.mean() == pytest.approx(45000, rel=0.5)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_targets_of_other_scales_in_merged_model_and_peft(kind, train, bert, model_folder, tmp_path):
    model = bert if kind == "encoder" else model_folder
    result = train(lambda z: [0.9 * z, 45000 - 9000 * z], model=model)
    metrics = result.evaluation.metrics
    assert metrics["rmse_2"] > 1000 * metrics["rmse_1"]
    expected = (metrics["mse_1"] / 0.9**2 + metrics["mse_2"] / 9000**2) / 2
    assert metrics["relative_mse"] == pytest.approx(expected, rel=0.3)
    run = open_on_cpu(result.output)
    rows = load_eval_rows(run)
    evaluation = run.score(rows).evaluation
    assert evaluation.metrics["relative_mse"] == pytest.approx(metrics["relative_mse"], rel=1e-4)
    predictions = evaluation.predictions
    merge_run(result.output, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    np.testing.assert_allclose(outputs_of(merged, rows), predictions, rtol=1e-3, atol=1e-3)
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2, dtype=torch.float32).eval()
    np.testing.assert_allclose(outputs_of(PeftModel.from_pretrained(base, result.output), rows), predictions, rtol=1e-3)


def test_merged_run_and_its_server_return_units_of_labels_in_bf16(train, bert, tmp_path):
    pytest.importorskip("httpx", reason="the server tests require httpx (extra 'dev')")
    from deltaw.serving.http.opening import OpenOptions, open_any
    from deltaw.serving.http.settings import Limits, ServerSettings
    from tests.serving.http.server_thread import run_server

    embedder = shutil.copytree(bert, tmp_path / "embedder")  # its files for embeddings must not decide how it is served
    pooling = [{"idx": 0, "name": "0", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (embedder / "modules.json").write_text(json.dumps(pooling))
    result = train(lambda z: 45000 + 10 * z, model=embedder, precision="bf16")
    assert result.evaluation.metrics["rmse"] < 20  # numbers of bf16 near 45,000 have a distance of 256
    merge_run(result.output, tmp_path / "merged")
    for folder in (result.output, tmp_path / "merged"):
        options = OpenOptions(name="price", precision="bf16", device="cpu")
        served = open_any(str(folder), {}, options, Limits(prompt=60), log=lambda line: None)
        settings = ServerSettings(port=0, limits=Limits(prompt=60))
        with contextlib.closing(served), run_server(served, settings) as server:
            response = server.post("/v1/predict", json={"model": "price", "input": ["abab", "ababc"]}).json()
        predictions = [row["prediction"] for row in response["data"]]
        assert predictions == pytest.approx([45000, 45000], abs=40) and predictions[0] != predictions[1]


def test_resumed_run_equals_uninterrupted_run(train):
    tensors = []
    for steps in (3, 6):
        result = train(lambda z: 45000 + 9000 * z, train={"max_steps": steps, "schedule": "constant"})
        if steps == 3:
            result = fit({"train": {"max_steps": 6}}, resume=result.output)
        with safe_open(result.output / "adapter_model.safetensors", "pt") as file:
            tensors.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            assert json.loads(file.metadata()["deltaw.labels"])["mean"] == pytest.approx([45000], rel=0.2)
        result.output.rename(result.output.with_name(f"steps{steps}"))
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1])


@pytest.mark.parametrize(("scale", "mean"), [(9000, 46000), (0.9, 3.0)], ids=["same quantity", "another quantity"])
def test_run_starts_from_adapter_with_other_labels(train, scale, mean):
    first = train(lambda z: 45000 + 9000 * z)
    second = train(lambda z: mean + scale * z, name="second", start_from=str(first.output))
    assert second.evaluation.metrics["rmse"] < 1.5 * scale


def test_head_is_equal_after_standardizing_and_in_saved_form():
    torch.manual_seed(0)
    linear = nn.Linear(5, 2)
    rows = torch.randn(3, 5)
    expected = linear(rows)
    state = {name: value.clone() for name, value in linear.state_dict().items()}
    head = RegressionHead.convert(linear)
    head.standardize(LabelUnits((3.0, -40.0), (0.5, 100.0)))
    torch.testing.assert_close(head(rows), expected)
    standardized = head.weight.clone()
    with head.saved_form():
        torch.testing.assert_close(dict(head.state_dict()), state)
    assert torch.equal(head.weight, standardized)


def test_labels_of_several_targets_are_lists_of_finite_numbers():
    assert regression_label([1, "2.5"], "label", "row 1") == (1.0, 2.5)
    assert regression_label("[1, 2]", "label", "row 1") == (1.0, 2.0)
    assert regression_label([3], "label", "row 1") == 3.0
    for wrong in ([], [1, None], [1, [2]], [1, float("nan")], 1e39, "[1, 2"):
        with pytest.raises(BadRowError, match="finite number"):
            regression_label(wrong, "label", "row 1")


def test_constant_target_and_rows_with_other_targets_are_rejected(train):
    refusal(train, lambda z: [z, 7.0], match="the number 7 as target 2")
    refusal(train, lambda z: [z, 1.0] if z < 1 else z, match="1 numbers as label, and the first row has 2")


def test_merged_model_loads_with_units(train, tmp_path):
    result = train(lambda z: 45000 + 10 * z, precision="bf16")
    rows = load_eval_rows(open_on_cpu(result.output))
    merge_run(result.output, tmp_path / "merged")
    merged = open_run(
        str(tmp_path / "merged"), task="regression", precision="bf16", device="cpu", log=lambda line: None
    )
    assert merged.score(rows).evaluation.predictions == pytest.approx(result.evaluation.predictions, abs=1.0)
