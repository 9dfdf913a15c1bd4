"""The cached frozen prefix does not change training."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from deltaw.data.pixels import ImageExample
from deltaw.kernels import loader
from deltaw.lora import LoRAConfig, attach
from deltaw.methods.parameters import make_trainable
from deltaw.runtime.packed import packed_rows
from deltaw.tasks.classification.objective import LabelObjective
from deltaw.training.batchers import CausalMicroBatcher, ImageMicroBatcher, LabelMicroBatcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.features import store as feature_store
from deltaw.training.features.prefix_cache import cached_prefix
from deltaw.training.features.shared_store import Sharing
from deltaw.training.features.store import StoreLocation
from deltaw.training.feed import Feed
from deltaw.training.loop import train
from deltaw.training.preparation import checkpoint_blocks
from tests.caches import fake_version, modify_source
from tests.tiny_models import VOCABULARY, causal_model
from tests.training.loops import example
from tests.training.runs import slow_except
from tests.training.test_label_objective import examples_of, model_of

STEM = list(range(20, 32))
SHARED = CausalMicroBatcher(64, True, False, "cpu")
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def causal_rows(count=12):
    """Return rows of various lengths. Half of them share a beginning, and two are equal."""
    generators = [np.random.default_rng(0 if n == 2 else n) for n in range(count)]
    endings = [generator.integers(3, VOCABULARY, generator.integers(4, 20)).tolist() for generator in generators]
    rows = [STEM + tokens if n % 2 else tokens for n, tokens in enumerate(endings)]
    return [example(n, tokens, len(tokens) - 3) for n, tokens in enumerate(rows)]


LENGTHS = np.random.default_rng(0).integers(3, 20, 12).tolist()


def train_head(model, *modules):
    """Make all parameters of the named modules trainable, as the method head does."""
    prefixes = tuple(f"{m}." for m in modules)
    make_trainable(model, [n for n, _ in model.named_parameters(remove_duplicate=False) if n.startswith(prefixes)])
    return model


def lora_above(model, block=1):
    attach(model, LoRAConfig(rank=4, alpha=8, layers=f"{block}-", target_modules="all-linear"), seed=0)
    return model


def build_causal_model(trained, family="llama"):
    model = causal_model(family)
    return train_head(model, "lm_head") if trained == "head" else lora_above(model)


def run(model, objective, batcher, rows, *, steps=6):
    """Train and return the loss of each step and the final parameters."""
    reports = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {"learning_rate": 5e-3, "total_steps": steps, "batch_size": 4}
    train(objective, parameters, rows, batcher, on_step=reports.append, **options)
    return [step.loss for step in reports], [p.detach().clone() for p in parameters]


@contextlib.contextmanager
def open_cache(model, rows, folder, **options):
    with packed_rows(model):
        feed = Feed(CausalObjective(model), SHARED)
        cached, choice = cached_prefix(model, feed, rows, StoreLocation(folder, **options), Sharing())
        assert cached is not None, choice
        cached.choice = choice
        yield cached
        cached.close()


def reason_without_cache(model, folder, **options):
    """Return the reason for the missing cache."""
    with packed_rows(model):
        feed = Feed(CausalObjective(model), SHARED)
        cached, choice = cached_prefix(model, feed, causal_rows(), StoreLocation(folder, **options), Sharing())
    assert cached is None
    return choice


def train_both_ways(model, objective_of, batcher, rows, folder):
    """Train without and with the cache, compare, and return the cached prefix and the choice."""
    reference = copy.deepcopy(model)
    packed = isinstance(batcher, CausalMicroBatcher) and not batcher.padded
    attention = packed_rows if packed else contextlib.nullcontext
    with attention(model):
        uncached_result = run(model, objective_of(model), batcher, rows)
    with attention(reference):
        feed = Feed(objective_of(reference), batcher)
        cached, choice = cached_prefix(reference, feed, rows, StoreLocation(folder), Sharing())
        assert cached is not None, choice
        cached_result = run(reference, cached.objective, cached, rows)
        cached.close()
    assert uncached_result[0][0] != uncached_result[0][-1]
    np.testing.assert_allclose(cached_result[0], uncached_result[0], rtol=1e-5)
    for expected, parameter in zip(uncached_result[1], cached_result[1], strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-5)
    return cached, choice


@pytest.mark.each_value
@pytest.mark.parametrize("trained", ["head", "upper block"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3", "mixtral", "cohere", "neox"])
@pytest.mark.parametrize("layout", ["shared", "flat", "padded"])
def test_cached_causal_model_trains_identically(trained, family, layout, tmp_path):
    model = build_causal_model(trained, family)
    batcher = CausalMicroBatcher(64, layout == "shared", layout == "padded", "cpu")
    _, choice = train_both_ways(model, CausalObjective, batcher, causal_rows(), tmp_path)
    assert choice.value == ("all but the output head" if trained == "head" else "the lower 1 of 2 blocks")


@pytest.mark.parametrize(("family", "trained"), [("bloom", "transformer.h.1"), ("mamba", "backbone.layers.1")])
def test_models_without_packing_train_identically(family, trained, tmp_path):
    model = train_head(causal_model(family), trained)
    train_both_ways(model, CausalObjective, CausalMicroBatcher(64, False, True, "cpu"), causal_rows(), tmp_path)


def test_activation_checkpointing_uses_stored_values(tmp_path):
    model = lora_above(causal_model("llama"))
    checkpoint_blocks(model)
    model.disable_input_require_grads()
    train_both_ways(model, CausalObjective, SHARED, causal_rows(), tmp_path)


HEADS = "bert classifier,roberta classifier,distilbert pre_classifier classifier,llama score,bert-regression classifier"
ABOVE = "bert classifier bert.pooler,bert classifier bert.encoder.layer.1,llama score model.layers.1"


@pytest.mark.parametrize("trained", [*HEADS.split(","), *ABOVE.split(",")])
def test_classifiers_and_regression_train_identically(trained, tmp_path):
    kind, *modules = trained.split()
    family, _, number = kind.partition("-")
    model = train_head(model_of(family, outputs=1 if number else 3, pad=0), *modules)
    task = number or "sequence-classification"
    rows = examples_of(LENGTHS, number=bool(number))
    batcher = LabelMicroBatcher(64)
    cached, _ = train_both_ways(model, lambda m: LabelObjective(m, task), batcher, rows, tmp_path)
    assert cached.store.shape.units == (12 if trained in HEADS else sum(LENGTHS))


@pytest.mark.parametrize("modules", [["classifier"], ["classifier", "vit.layers.1"]])
def test_image_classifier_trains_identically(modules, tmp_path):
    config = transformers.ViTConfig(**SHAPE, num_hidden_layers=2, image_size=16, patch_size=8, num_labels=3)
    model = train_head(transformers.ViTForImageClassification(config).eval(), *modules)
    images = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3)).astype(np.uint8)
    rows = [ImageExample(n, image, n % 3, digest=bytes([n])) for n, image in enumerate(images)]
    pixels = lambda rows: torch.from_numpy(np.stack([r.image for r in rows])).permute(0, 3, 1, 2) / 255  # noqa: E731
    batcher = ImageMicroBatcher(20, encoder=SimpleNamespace(encode=pixels), tokens_per_image=5)
    cached, _ = train_both_ways(model, lambda m: LabelObjective(m, "image-classification"), batcher, rows, tmp_path)
    assert cached.store.shape.units == (12 if len(modules) == 1 else 12 * 5)


def test_bf16_features_are_exact_and_unknown_rows_are_not_cached(tmp_path):
    model = lora_above(causal_model("llama").to(torch.bfloat16))
    rows = causal_rows()
    with open_cache(model, rows[:8], tmp_path) as cached:
        assert cached.store.shape.dtype == "bfloat16"
        losses = [[cached.objective(batch).item() for batch in cached.batches(rows)] for _ in range(2)]
        expected = [cached.objective(batch).item() for batch in SHARED.batches(rows)]
    assert losses[0] == losses[1] == expected


@pytest.mark.parametrize("trained", ["head", "upper block"])
def test_later_epochs_and_runs_reuse_features(trained, tmp_path):
    model = build_causal_model(trained)
    rows = causal_rows()
    calls = []
    with open_cache(model, rows, tmp_path) as cached:
        assert "already stored" not in cached.choice.why
        run(model, cached.objective, cached, rows, steps=3)
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
        run(model, cached.objective, cached, rows, steps=6)
        assert not calls
    with open_cache(model, rows[::-1], tmp_path) as reopened:  # independent of the order of rows
        assert reopened.store.folder == cached.store.folder
        assert reopened.store.done.all() and "11 of 11 rows already stored" in reopened.choice.why
    values = cached.store.folder / feature_store.VALUES
    (np.fromfile(values, np.float32) * 1.5).tofile(values)
    with open_cache(model, rows, tmp_path) as reopened:  # corrupt values are discarded
        assert not reopened.store.done.any()


def test_unmarked_rows_are_recomputed_after_a_kill(tmp_path):
    model = build_causal_model("head")
    rows = causal_rows()
    with open_cache(model, rows, tmp_path) as cached:
        for batch in cached.batches(rows):
            assert not cached.store.done.any()  # vectors are computed on first use
            cached.objective(batch)
        expected = cached.store.read(np.arange(cached.rows.units)).clone()
    # Simulates a kill while the values of these rows were written.
    lost = [2, 5]
    np.memmap(cached.store.folder / feature_store.DONE, np.uint8, "r+")[lost] = 0
    values = np.memmap(cached.store.folder / feature_store.VALUES, np.float32, "r+").reshape(-1, 32)
    for start, count in zip(cached.rows.starts[lost], cached.rows.counts[lost], strict=True):
        values[start : start + count] = np.nan
    del values
    with open_cache(model, rows, tmp_path) as reopened:
        assert np.flatnonzero(~reopened.store.done).tolist() == lost
        for batch in reopened.batches(rows):
            reopened.objective(batch)
        torch.testing.assert_close(reopened.store.read(np.arange(reopened.rows.units)), expected)


def test_store_depends_on_weights_rows_depth_and_arithmetic(tmp_path, monkeypatch):
    model = build_causal_model("upper block")
    rows = causal_rows()
    other = causal_model("llama")
    other.model.embed_tokens.weight.data[5, 3] += 1e-3
    arithmetic = dataclasses.replace(loader.arithmetic(), fp32="wide")
    cases = [
        (model, rows, lambda: None),
        (lora_above(other), rows, lambda: None),
        (model, rows[:-1], lambda: None),
        (build_causal_model("head"), rows, lambda: None),
        (model, rows, lambda: monkeypatch.setattr(loader, "arithmetic", lambda: arithmetic)),
        (model, rows, lambda: fake_version(monkeypatch, "torch")),
        (model, rows, lambda: fake_version(monkeypatch, "transformers")),
        (model, rows, lambda: modify_source(monkeypatch, tmp_path / "kernels", "kernels/attention.py")),
        (model, rows, lambda: modify_source(monkeypatch, tmp_path / "runtime", "runtime/packed.py")),
    ]
    folders = set()
    for trained, selected_rows, change in cases:
        change()
        with open_cache(trained, selected_rows, tmp_path / "stores") as cached:
            folders.add(cached.store.folder)
    assert len(folders) == len(cases)


def test_trained_first_block_disables_the_cache(tmp_path):
    assert reason_without_cache(lora_above(causal_model("llama"), block=0), tmp_path).value == "off"


def test_block_with_hidden_inputs_disables_the_cache(tmp_path):
    model = lora_above(causal_model("llama"))
    first, second = model.model.layers
    captured = {}
    first.register_forward_pre_hook(lambda m, args: captured.update(it=args[0]))
    first.mlp.register_forward_hook(lambda m, args, out: captured.update(it=out))
    second.register_forward_pre_hook(lambda m, args: (args[0] + captured.pop("it"), *args[1:]))
    assert "resumed there" in reason_without_cache(model, tmp_path).why


def test_without_disk_space_only_small_features_are_cached(tmp_path, monkeypatch):
    model = lora_above(causal_model("llama"))
    rows = causal_rows()
    with open_cache(model, rows, tmp_path, limit=100) as cached:
        assert "in memory" in cached.choice.why
    monkeypatch.setattr("deltaw.training.features.prefix_cache.MEMORY_BYTES", 100)
    assert "KB" in reason_without_cache(model, tmp_path, limit=100).why


@pytest.mark.parametrize("trained", slow_except("upper block", names=("head", "upper block")))
def test_fake_tensors_use_no_files(trained, tmp_path):
    rows = causal_rows()
    with FakeTensorMode(), open_cache(build_causal_model(trained), rows, tmp_path) as cached:
        for _ in range(2):
            for batch in cached.batches(rows):
                cached.objective(batch).backward()
    assert not list(tmp_path.iterdir())
