"""The frozen prefix computed once: training with it and without it is the same training."""

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

from deltaw.data.images import LabelMicroBatcher
from deltaw.data.pixels import ImageExample
from deltaw.kernels import loader
from deltaw.lora import LoRAConfig, attach
from deltaw.methods.parameters import train_places
from deltaw.runtime.packed import packed_rows
from deltaw.training.features import store as feature_store
from deltaw.training.features.prefix_cache import cached_prefix
from deltaw.training.loop import train
from deltaw.training.preparation import checkpoint_blocks
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from deltaw.training.tasks.causal_objective import CausalObjective
from deltaw.training.tasks.labels import LabelObjective
from tests.caches import other_text, other_version
from tests.tiny_models import VOCABULARY, causal_model
from tests.training.loops import example
from tests.training.runs import often
from tests.training.test_label_objective import examples_of, model_of

STEM = list(range(20, 32))
SHARED = CausalMicroBatcher(64, True, False, "cpu")
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def causal_rows(count=12):
    """Rows of many lengths; half of them begin alike, and two are equal."""
    draws = [np.random.default_rng(0 if n == 2 else n) for n in range(count)]
    own = [draw.integers(3, VOCABULARY, draw.integers(4, 20)).tolist() for draw in draws]
    rows = [STEM + tokens if n % 2 else tokens for n, tokens in enumerate(own)]
    return [example(n, tokens, len(tokens) - 3) for n, tokens in enumerate(rows)]


LENGTHS = np.random.default_rng(0).integers(3, 20, 12).tolist()


def train_head(model, *modules):
    """Train the named modules whole, as the method head does."""
    prefixes = tuple(f"{m}." for m in modules)
    train_places(model, [n for n, _ in model.named_parameters(remove_duplicate=False) if n.startswith(prefixes)])
    return model


def lora_above(model, block=1):
    attach(model, LoRAConfig(rank=4, alpha=8, layers=f"{block}-", target_modules="all-linear"), seed=0)
    return model


def causal(trained, family="llama"):
    model = causal_model(family)
    return train_head(model, "lm_head") if trained == "head" else lora_above(model)


def run(model, objective, batcher, rows, *, steps=6):
    """Losses of each step of two epochs, and the parameters after the last."""
    found, parameters = [], [p for p in model.parameters() if p.requires_grad]
    how = {"learning_rate": 5e-3, "total_steps": steps, "batch_size": 4}
    train(objective, parameters, rows, batcher, on_step=found.append, **how)
    return [step.loss for step in found], [p.detach().clone() for p in parameters]


@contextlib.contextmanager
def opened(model, rows, folder, **how):
    with packed_rows(model):
        cached, choice = cached_prefix(model, CausalObjective(model), SHARED, rows, folder=folder, **how)
        assert cached is not None, choice
        cached.choice = choice
        yield cached
        cached.close()


def refused(model, folder, **how):
    """Why there is no cache."""
    with packed_rows(model):
        cached, choice = cached_prefix(model, CausalObjective(model), SHARED, causal_rows(), folder=folder, **how)
    assert cached is None
    return choice


def both_ways(model, objective_of, batcher, rows, folder):
    """The same training without and with the cache; the cached one's choice and store."""
    reference = copy.deepcopy(model)
    packed = isinstance(batcher, CausalMicroBatcher) and not batcher.padded
    attention = packed_rows if packed else contextlib.nullcontext
    with attention(model):
        usual = run(model, objective_of(model), batcher, rows)
    with attention(reference):
        cached, choice = cached_prefix(reference, objective_of(reference), batcher, rows, folder=folder)
        assert cached is not None, choice
        found = run(reference, cached.objective, cached, rows)
        cached.close()
    assert usual[0][0] != usual[0][-1]
    np.testing.assert_allclose(found[0], usual[0], rtol=1e-5)
    for expected, parameter in zip(usual[1], found[1], strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-5)
    return cached, choice


@pytest.mark.each_value
@pytest.mark.parametrize("trained", ["head", "upper block"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3", "mixtral", "cohere", "neox"])
@pytest.mark.parametrize("way", ["shared", "flat", "padded"])
def test_a_causal_model_trains_the_same(trained, family, way, tmp_path):
    model = causal(trained, family)
    batcher = CausalMicroBatcher(64, way == "shared", way == "padded", "cpu")
    _, choice = both_ways(model, CausalObjective, batcher, causal_rows(), tmp_path)
    assert choice.value == ("all but the output head" if trained == "head" else "the lower 1 of 2 blocks")


@pytest.mark.parametrize(("family", "trained"), [("bloom", "transformer.h.1"), ("mamba", "backbone.layers.1")])
def test_models_that_run_padded_rows_only_train_the_same(family, trained, tmp_path):
    model = train_head(causal_model(family), trained)
    both_ways(model, CausalObjective, CausalMicroBatcher(64, False, True, "cpu"), causal_rows(), tmp_path)


def test_recomputed_blocks_start_from_the_stored_values_too(tmp_path):
    model = lora_above(causal_model("llama"))
    checkpoint_blocks(model)
    model.disable_input_require_grads()
    both_ways(model, CausalObjective, SHARED, causal_rows(), tmp_path)


HEADS = "bert classifier,roberta classifier,distilbert pre_classifier classifier,llama score,bert-regression classifier"
ABOVE = "bert classifier bert.pooler,bert classifier bert.encoder.layer.1,llama score model.layers.1"


@pytest.mark.parametrize("trained", [*HEADS.split(","), *ABOVE.split(",")])
def test_classifiers_and_a_regression_train_the_same(trained, tmp_path):
    kind, *modules = trained.split()
    family, _, number = kind.partition("-")
    model = train_head(model_of(family, outputs=1 if number else 3, pad=0), *modules)
    task, rows = number or "sequence-classification", examples_of(LENGTHS, number=bool(number))
    batcher = LabelMicroBatcher(64, "cpu", segments=False)
    cached, _ = both_ways(model, lambda m: LabelObjective(m, task), batcher, rows, tmp_path)
    assert cached.store.shape.units == (12 if trained in HEADS else sum(LENGTHS))


@pytest.mark.parametrize("modules", [["classifier"], ["classifier", "vit.layers.1"]])
def test_an_image_classifier_trains_the_same(modules, tmp_path):
    config = transformers.ViTConfig(**SHAPE, num_hidden_layers=2, image_size=16, patch_size=8, num_labels=3)
    model = train_head(transformers.ViTForImageClassification(config).eval(), *modules)
    images = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3)).astype(np.uint8)
    rows = [ImageExample(n, image, n % 3, digest=bytes([n])) for n, image in enumerate(images)]
    pixels = lambda rows: torch.from_numpy(np.stack([r.image for r in rows])).permute(0, 3, 1, 2) / 255  # noqa: E731
    batcher = LabelMicroBatcher(20, "cpu", encoder=SimpleNamespace(encode=pixels), tokens_per_image=5)
    cached, _ = both_ways(model, lambda m: LabelObjective(m, "image-classification"), batcher, rows, tmp_path)
    assert cached.store.shape.units == (12 if len(modules) == 1 else 12 * 5)


def test_bf16_features_keep_their_bits_and_rows_that_are_not_known_go_the_usual_way(tmp_path):
    model, rows = lora_above(causal_model("llama").to(torch.bfloat16)), causal_rows()
    with opened(model, rows[:8], tmp_path) as cached:
        assert cached.store.shape.dtype == "bfloat16"
        losses = [[cached.objective(batch).item() for batch in cached.batches(rows)] for _ in range(2)]
        usual = [cached.objective(batch).item() for batch in SHARED.batches(rows)]
    assert losses[0] == losses[1] == usual


@pytest.mark.parametrize("trained", ["head", "upper block"])
def test_after_an_epoch_the_prefix_does_not_run_and_the_next_run_finds_the_features(trained, tmp_path):
    model, rows, calls = causal(trained), causal_rows(), []
    with opened(model, rows, tmp_path) as cached:
        assert "there already" not in cached.choice.why
        run(model, cached.objective, cached, rows, steps=3)
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
        run(model, cached.objective, cached, rows, steps=6)
        assert not calls
    with opened(model, rows[::-1], tmp_path) as again:  # whatever the order of its rows
        assert again.store.folder == cached.store.folder
        assert again.store.done.all() and "11 of 11 rows there already" in again.choice.why
    values = cached.store.folder / feature_store.VALUES
    (np.fromfile(values, np.float32) * 1.5).tofile(values)
    with opened(model, rows, tmp_path) as again:  # values that are not right any more are forgotten
        assert not again.store.done.any()


def test_rows_without_their_mark_are_computed_again_after_a_kill(tmp_path):
    model, rows = causal("head"), causal_rows()
    with opened(model, rows, tmp_path) as cached:
        for batch in cached.batches(rows):
            assert not cached.store.done.any()  # vectors are computed where they are asked for
            cached.objective(batch)
        expected = cached.store.read(np.arange(cached.rows.units)).clone()
    # As if killed while the values of these rows were being written.
    lost = [2, 5]
    np.memmap(cached.store.folder / feature_store.DONE, np.uint8, "r+")[lost] = 0
    values = np.memmap(cached.store.folder / feature_store.VALUES, np.float32, "r+").reshape(-1, 32)
    for start, count in zip(cached.rows.starts[lost], cached.rows.counts[lost], strict=True):
        values[start : start + count] = np.nan
    del values
    with opened(model, rows, tmp_path) as again:
        assert np.flatnonzero(~again.store.done).tolist() == lost
        for batch in again.batches(rows):
            again.objective(batch)
        torch.testing.assert_close(again.store.read(np.arange(again.rows.units)), expected)


def test_other_weights_rows_levels_or_ways_to_compute_are_another_store(tmp_path, monkeypatch):
    model, rows, other = causal("upper block"), causal_rows(), causal_model("llama")
    other.model.embed_tokens.weight.data[5, 3] += 1e-3
    arithmetic = dataclasses.replace(loader.arithmetic(), fp32="wide")
    cases = [
        (model, rows, lambda: None),
        (lora_above(other), rows, lambda: None),
        (model, rows[:-1], lambda: None),
        (causal("head"), rows, lambda: None),
        (model, rows, lambda: monkeypatch.setattr(loader, "arithmetic", lambda: arithmetic)),
        (model, rows, lambda: other_version(monkeypatch, "torch")),
        (model, rows, lambda: other_version(monkeypatch, "transformers")),
        (model, rows, lambda: other_text(monkeypatch, tmp_path / "kernels", "kernels/attention.py")),
        (model, rows, lambda: other_text(monkeypatch, tmp_path / "runtime", "runtime/packed.py")),
    ]
    folders = set()
    for trained, chosen, change in cases:
        change()
        with opened(trained, chosen, tmp_path / "stores") as cached:
            folders.add(cached.store.folder)
    assert len(folders) == len(cases)


def test_where_training_reaches_down_there_is_no_cache(tmp_path):
    assert refused(lora_above(causal_model("llama"), block=0), tmp_path).value == "off"


def test_a_block_that_looks_at_more_than_its_input_is_found_out(tmp_path):
    model = lora_above(causal_model("llama"))
    (first, second), seen = model.model.layers, {}
    first.register_forward_pre_hook(lambda m, args: seen.update(it=args[0]))
    first.mlp.register_forward_hook(lambda m, args, out: seen.update(it=out))
    second.register_forward_pre_hook(lambda m, args: (args[0] + seen.pop("it"), *args[1:]))
    assert "resumed there" in refused(model, tmp_path).why


def test_without_room_small_features_stay_in_memory_and_large_ones_are_not_kept(tmp_path, monkeypatch):
    model, rows = lora_above(causal_model("llama")), causal_rows()
    with opened(model, rows, tmp_path, limit=100) as cached:
        assert "in memory" in cached.choice.why
    monkeypatch.setattr("deltaw.training.features.prefix_cache.MEMORY_BYTES", 100)
    assert "KB" in refused(model, tmp_path, limit=100).why


@pytest.mark.parametrize("trained", often("upper block", of=("head", "upper block")))
def test_on_fake_tensors_the_same_steps_run_in_memory(trained, tmp_path):
    rows = causal_rows()
    with FakeTensorMode(), opened(causal(trained), rows, tmp_path) as cached:
        for _ in range(2):
            for batch in cached.batches(rows):
                cached.objective(batch).backward()
    assert not list(tmp_path.iterdir())
