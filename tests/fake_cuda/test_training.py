"""Runs with ``device: cuda`` equal those on the CPU, in all tasks and methods, on the fake device or a GPU.

The CPU runs use compiled kernels, fused blocks and prefix trees, so the tests also compare the implementations.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import deltaw
from deltaw.training.callbacks import Callback
from tests.cli.conftest import call  # noqa: F401
from tests.conftest import COLORS, deep_merge, write_rows
from tests.fake_cuda import device
from tests.serving.encoder_models import write_bert
from tests.training.runs import METHODS, adapter, assert_same_run, metrics, slow_except, stopped_run
from tests.vision_models import png, save_vision_model

pytestmark = pytest.mark.gpu
# A GPU rounds differently, and AdamW enlarges differences of small gradients.
TOLERANCE = dict.fromkeys(("rel", "abs"), 1e-5 if device.is_installed else 1e-3)
ADAPTER_TOLERANCE = {"rtol": 1e-3, "atol": 1e-4 if device.is_installed else 1e-2}
# Compared values of each step.
COMPARED = ("loss", "gradient_norm", "margin", "reward")
# Steps until a run has verified that its parameters change.
WARM = 3


class SynchronizationCounter(Callback):
    """Counts synchronizations of the host up to each step. Only the fake device counts them."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step(self, step) -> None:
        self.counts.append(device.activity().synchronizations.total() if device.is_installed else 0)

    @property
    def per_step(self) -> float:
        """Synchronizations per step, without the first steps."""
        counts = self.counts[WARM - 1 :]
        return (counts[-1] - counts[0]) / (len(counts) - 1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """Files of rows by task, and an encoder."""
    folder = tmp_path_factory.mktemp("inputs")
    words = [f"{color} {n}" for n, color in enumerate(COLORS)]
    rows = {
        "causal-lm": [{"prompt": f"paint it {c}", "completion": c[0]} for c in COLORS],
        "preference": [{"prompt": f"paint it {c}", "chosen": c[0], "rejected": c[1:3]} for c in COLORS],
        "rl": [{"prompt": f"say {n}"} for n in range(8)],
        "distill": [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(10)],
        "embedding": [{"anchor": word, "positive": word[::-1]} for word in words],
        "reranking": [{"query": w, "passages": [w[::-1], "no", "dots"], "labels": [1, 0, 0]} for w in words],
        "sequence-classification": [{"text": word, "label": str(n % 2)} for n, word in enumerate(words)],
    }
    files = {task: str(write_rows(folder / f"{task}.jsonl", values)) for task, values in rows.items()}
    reward = (
        "def early(completions, **_):\n    return [sum(c < 'n' for c in t) / max(1, len(t)) for t in completions]\n"
    )
    (folder / "rewards.py").write_text(reward)
    return {**files, "bert": str(write_bert(folder / "bert")), "reward": f"{folder / 'rewards.py'}:early"}


@pytest.fixture
def run_on(settings, inputs, tmp_path):
    """Train on a device and return the result."""

    def run(
        device: str, task: str = "causal-lm", callback: Callback | None = None, **changes
    ) -> deltaw.runs.fit.Result:
        config = settings(tmp_path / device, task=task, device=device, data={"train": inputs[task], "eval": 3})
        config = deep_merge(config, {"train": {"max_steps": 5, "eval_every": 100}})
        return deltaw.fit(deep_merge(config, changes), callback=callback)

    return run


def assert_equal_runs(cpu: Path, cuda: Path) -> None:
    """Check that losses, metrics and adapters of two runs are equal up to rounding."""
    for expected, actual in zip(metrics(cpu), metrics(cuda), strict=True):
        values = [{key: line[key] for key in COMPARED if key in line} for line in (expected, actual)]
        assert values[1] == pytest.approx(values[0], **TOLERANCE)
    expected = adapter(cpu)
    actual = adapter(cuda)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, **ADAPTER_TOLERANCE, msg=lambda text, name=name: name + text)


TASKS: dict[str, dict] = {
    "causal-lm": {},
    "rl": {"reward": {"group": 4, "max_new_tokens": 6, "loss": "grpo"}},
    "preference": {"preference": {"loss": "dpo"}},
    "distill": {"distill": {"prompt": "in rhymes", "max_new_tokens": 4}, "train": {"drift": False}},
    "embedding": {},
    "reranking": {"model": "bert"},
    "sequence-classification": {"model": "bert"},
}


@pytest.mark.parametrize("task", TASKS)
def test_task_equals_cpu(task, run_on, inputs):
    changes = dict(TASKS[task])
    if changes.get("model") == "bert":
        changes["model"] = inputs["bert"]
    if task == "rl":
        changes["reward"] = {**changes["reward"], "functions": [inputs["reward"]]}
    counter = SynchronizationCounter()
    cpu = run_on("cpu", task, **changes)
    cuda = run_on("cuda", task, counter, **changes)
    assert_equal_runs(cpu.output, cuda.output)
    assert cuda.evaluation.metrics == pytest.approx(cpu.evaluation.metrics, **TOLERANCE, nan_ok=True)
    # Preferences also read the metrics of a step, and transformers' encoders read their mask.
    limit = 2 if task == "preference" or "model" in changes else 1
    assert task == "rl" or counter.per_step <= limit  # sampling reads each token


def test_unpaired_preferences_equal_cpu(run_on, tmp_path):
    rows = [{"prompt": f"paint it {c}", "completion": c, "label": n % 2 == 0} for n, c in enumerate(COLORS)]
    data = {"train": str(write_rows(tmp_path / "answers.jsonl", rows)), "eval": 4}
    cpu, cuda = (run_on(device, "preference", data=data, preference={"loss": "kto"}) for device in ("cpu", "cuda"))
    assert_equal_runs(cpu.output, cuda.output)
    assert cuda.evaluation.metrics == pytest.approx(cpu.evaluation.metrics, **TOLERANCE)


def test_image_rows_equal_cpu(run_on, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache" / "packages"))  # the model is verified on the device
    model = save_vision_model("llava", tmp_path / "model")
    rows = []
    for n in range(6):
        (tmp_path / f"{n}.png").write_bytes(png((40 * n, 80, 20)))
        rows.append({"image": f"{n}.png", "prompt": "Color?", "completion": COLORS[n]})
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "eval": 2}
    cuda, cpu = (run_on(device, model=str(model), data=data, train={"drift": False}) for device in ("cuda", "cpu"))
    assert_equal_runs(cpu.output, cuda.output)


@pytest.mark.parametrize("method", slow_except("head", "input", "prompt", "dora", names=[*METHODS, "dora"]))
def test_method_equals_cpu(method, run_on):
    changes = {"lora": {"dora": True}} if method == "dora" else METHODS[method]
    counter = SynchronizationCounter()
    cpu = run_on("cpu", **changes)
    cuda = run_on("cuda", callback=counter, **changes)
    assert_equal_runs(cpu.output, cuda.output)
    assert counter.per_step <= 1


def test_resumed_run_is_bit_identical(settings, tmp_path):
    def config(name: str) -> dict:
        train = {"max_steps": 5, "checkpoint_every": 1}
        return settings(tmp_path / name, device="cuda", train=train, lora={"dropout": 0.2})

    whole = deltaw.fit(config("whole")).output
    part = stopped_run(config("part"), 3)
    torch.cuda.manual_seed(99)  # the random state must come from the checkpoint
    torch.manual_seed(99)
    assert deltaw.fit(resume=part).resumed_from_step == 3
    assert_same_run(part, whole)


def test_commands_on_device_equal_cpu(call, finished_run):  # noqa: F811
    results: dict[str, list[dict]] = {"cpu": [], "cuda": []}
    for name, outputs in results.items():
        options = ("--device", name, "--precision", "fp32", "--json")
        generate = ("generate", finished_run, "--max-new-tokens", 8, "--prompt", "paint it", "--prompt", "so")
        for command in (generate, (*generate, "--temperature", 0.7, "--seed", 3), ("eval", finished_run)):
            outputs.append(json.loads(call(*command, *options, status=0).out))
    assert results["cuda"][:2] == results["cpu"][:2] and results["cpu"][0] != results["cpu"][1]
    assert results["cuda"][2]["eval"] == pytest.approx(results["cpu"][2]["eval"], **TOLERANCE)
