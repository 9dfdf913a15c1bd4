"""The task ``embedding``: memory-saving gradients compared with references, and complete runs with each loss.

References are autograd over the entire batch, and sentence-transformers.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from deltaw.errors import UserError
from deltaw.hub.sentence_layout import SentenceLayout, write_layout
from deltaw.machine.choices import Choice
from deltaw.runs.checks import check_data_and_run, check_rows
from deltaw.runs.fit import fit
from deltaw.settings.config import RunConfig
from deltaw.tasks.embedding.losses import step_loss
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.session import read_data
from tests.byte_models import save_model, tiny_llama
from tests.conftest import THREADS, deep_merge, refusal, write_rows
from tests.serving.encoder_models import write_bert
from tests.training import parallel_runs
from tests.training.parallel_runs import assert_same_as_one_process, needs_gloo
from tests.training.runs import (
    METHODS,
    Snapshots,
    assert_learns,
    assert_same_run,
    build_session,
    metrics,
    open_on_cpu,
    slow_except,
    stopped_run,
)
from tests.training.test_label_objective import DECODERS, ENCODERS

TOPICS = ("snow", "bread", "river", "engine", "violin", "planet", "garden", "number")


def texts_of(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(TOPICS, 1 + generator.integers(0, 4))) + f" {n}" for n in range(count)]


def triplets(count: int = 16) -> list[dict]:
    """Return rows of mixed lengths. Two rows share a passage and two share a query."""
    texts = texts_of(3 * count)
    rows = [{"anchor": a, "positive": b, "negative": c} for a, b, c in zip(*[iter(texts)] * 3, strict=True)]
    rows[3]["positive"] = rows[1]["positive"]
    rows[5]["anchor"] = rows[2]["anchor"]
    rows[7]["negative"] = rows[0]["positive"]
    return rows


def pairs(count: int = 16) -> list[dict]:
    return [{"anchor": row["anchor"], "positive": row["positive"]} for row in triplets(count)]


def scored_pairs(count: int = 16) -> list[dict]:
    return [row | {"score": round(np.cos(3.0 * n), 2)} for n, row in enumerate(pairs(count))]


def rows_with_teacher_scores(count: int = 16, per_passage: bool = True) -> list[dict]:
    generator = np.random.default_rng(1)
    scores = generator.uniform(-1, 1, (count, 2)).round(2).tolist()
    return [row | {"score": s if per_passage else s[0]} for row, s in zip(triplets(count), scores, strict=True)]


def class_rows(count: int = 16) -> list[dict]:
    return [{"text": f"{TOPICS[n % 4]} {text}", "label": TOPICS[n % 4]} for n, text in enumerate(texts_of(count))]


ROWS = {"infonce": triplets, "cosent": scored_pairs, "angle": scored_pairs, "supcon": class_rows}
ROWS |= {"kl": rows_with_teacher_scores}
ROWS["margin-mse"] = lambda count=16: rows_with_teacher_scores(count, per_passage=False)
POOLING = {"bert": "mean", "llama": "last"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    llama = tiny_llama(initializer_range=0.2)
    return {"bert": write_bert(folder / "bert"), "llama": save_model(llama, folder / "llama")}


@pytest.fixture
def make_config(models, tmp_path):
    def make(family: str | Path, rows: list[dict], output: Path | None = None, **changes) -> dict:
        output = output or tmp_path / "run"
        data = {"train": str(write_rows(output.with_suffix(".jsonl"), rows)), "eval": None}
        defaults = {"model": str(models.get(family, family)), "task": "embedding", "data": data}
        defaults |= {"lora": {"rank": 4, "alpha": 8}, "precision": "fp32", "device": "cpu", "threads": THREADS}
        defaults |= {"train": {"learning_rate": 1e-2, "batch_size": 32, "max_steps": 1, "tokens_per_pass": 128}}
        return deep_merge(defaults, {**changes, "output": str(output)})

    return make


def with_random_adapter(session, scale: float = 0.3):
    """Fill the adapter's B factors with random values and return the session."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in session.trainable_parameters:
        if name.endswith("lora_B"):
            parameter.data.normal_(std=scale, generator=generator)
    return session


def gradients(session) -> torch.Tensor:
    return torch.cat([parameter.grad.double().flatten() for _, parameter in session.trainable_parameters])


def step(session, rows=None, **settings) -> tuple[float, torch.Tensor, int]:
    """Return loss and gradient of one step, and the number of microbatches."""
    rows = session.data.train if rows is None else rows
    objective = copy.copy(session.objective)
    batcher = session.batcher
    objective.settings = objective.settings.model_copy(update=settings)
    session.model.zero_grad()
    total = 0.0
    count = 0
    with session.running():
        objective.start_step(rows, batcher)
        for batch in batcher.batches(rows):
            loss = objective(batch) / objective.units(rows)
            loss.backward()
            total += float(loss.detach())
            count += 1
    return total, gradients(session), count


def reference_step(session, pooling: str) -> tuple[float, torch.Tensor]:
    """Return the reference loss and gradient: float64, one graph, each text separately in the model's own forward."""
    exact = copy.deepcopy(session.model).double()
    vectors = []
    for text in (text for row in session.data.train for text in row.rows):
        (hidden,) = exact(input_ids=torch.from_numpy(text.tokens).long()[None]).last_hidden_state
        weights = torch.arange(1.0, len(hidden) + 1, dtype=torch.float64)
        pooled = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}
        vectors.append((pooled | {"weighted": weights @ hidden / weights.sum()})[pooling])
    settings = session.objective.settings
    loss = step_loss(torch.stack(vectors), session.data.train, settings, normalize=True)
    exact.zero_grad()
    loss.backward()
    parameters = dict(exact.named_parameters())
    names = {id(parameter): name for name, parameter in session.model.named_parameters()}
    gradients = [parameters[names[id(p)]].grad.flatten() for _, p in session.trainable_parameters]
    return float(loss.detach()), torch.cat(gradients)


def assert_step_matches(session, pooling: str, kept_tokens: int) -> int:
    """Compare a step with the reference and return its number of microbatches."""
    expected_loss, expected = reference_step(session, pooling)
    loss, gradient, count = step(session, kept_tokens=kept_tokens)
    assert loss == pytest.approx(expected_loss, rel=1e-5) and (gradient - expected).norm() <= 1e-5 * expected.norm()
    return count


@pytest.mark.each_value
@pytest.mark.parametrize("pooling", ["mean", "first", "last", "weighted"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_step_matches_full_batch(make_config, family, pooling):
    session = with_random_adapter(build_session(make_config(family, triplets(), embedding={"pooling": pooling})))
    assert all(assert_step_matches(session, pooling, kept_tokens) > 3 for kept_tokens in (0, 300, 10**6))


@pytest.mark.each_value
@pytest.mark.parametrize("loss", ROWS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_losses_match_full_batch_for_any_microbatch_size(make_config, family, loss):
    counts = []
    for tokens in (40, 10**5):
        settings = make_config(family, ROWS[loss](), embedding={"loss": loss}, train={"tokens_per_pass": tokens})
        session = with_random_adapter(build_session(settings))
        counts.append(assert_step_matches(session, POOLING[family], kept_tokens=100))
    assert counts[0] > 2 * counts[1]


@pytest.mark.parametrize("family", slow_except("bert", names=("bert", "llama")))
def test_second_forward_repeats_dropout(make_config, family):
    session = with_random_adapter(build_session(make_config(family, triplets(), lora={"dropout": 0.4})))
    step(session)  # initialization in the first step may use random numbers, too
    results = {}
    for kept_tokens in (0, 300, 10**6):
        torch.manual_seed(3)
        loss, gradient, _ = step(session, kept_tokens=kept_tokens)
        results[kept_tokens] = (loss, gradient, torch.get_rng_state())
    for loss, gradient, state in (results[0], results[300]):
        assert loss == results[10**6][0] and torch.equal(state, results[10**6][2])
        assert (gradient - results[10**6][1]).norm() <= 1e-6 * gradient.norm()
    torch.manual_seed(4)
    assert (step(session, kept_tokens=0)[1] - results[0][1]).norm() > 0.1 * results[0][1].norm()


@pytest.mark.parametrize("pooling", slow_except("weighted", names=("mean", "first", "last", "weighted")))
def test_padded_rows_match_full_batch(make_config, monkeypatch, pooling):
    choice = Choice(False, "as requested")
    monkeypatch.setattr("deltaw.training.batchers.can_pack_independent", lambda model: choice)
    session = with_random_adapter(build_session(make_config("bert", triplets(), embedding={"pooling": pooling})))
    assert session.batcher.padded
    assert all(assert_step_matches(session, pooling, kept_tokens) > 3 for kept_tokens in (0, 300))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "distilbert", "qwen3", "gpt2", "gemma3"])
def test_other_model_families_match_full_batch(make_config, tmp_path, family):
    config = {**ENCODERS, **DECODERS}[family]()
    config.update({"vocab_size": 259, "initializer_range": 0.2, "pad_token_id": 1, "max_position_embeddings": 66})
    folder = save_model(AutoModel.from_config(config).eval(), tmp_path / "model")
    session = with_random_adapter(build_session(make_config(folder, triplets())))
    assert assert_step_matches(session, "last" if family in DECODERS else "mean", kept_tokens=300) >= 5


def test_duplicate_texts_are_computed_once(make_config):
    session = build_session(make_config("bert", triplets()))
    texts = [text.tokens.tobytes() for batch in session.batcher.batches(session.data.train) for text in batch.examples]
    assert len(texts) == len(set(texts)) == 3 * 16 - 3


def sentence_transformer_of(session, folder: Path):
    """Return a sentence-transformers model around the session's model with its adapter."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="not installed")
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    theirs = model[0]
    (name,) = [name for name in ("auto_model", "model") if name in dict(theirs.named_children())]
    setattr(theirs, name, session.model)
    return model


PEERS = {
    "MultipleNegativesRankingLoss": (triplets, {}),
    "CachedMultipleNegativesRankingLoss": (triplets, {}),
    "CoSENTLoss": (scored_pairs, {}),
    "MatryoshkaLoss": (triplets, {"dimensions": [32, 16, 8]}),
}


@pytest.mark.each_value
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_full_batch_matches_sentence_transformers(make_config, models, tmp_path, family, name):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason="not installed")
    rows_of, options = PEERS[name]
    # Texts are made unique, because only our loss masks passages that are positive for two rows.
    rows = rows_of()
    rows = [{k: v if k == "score" else f"{v} {n}" for k, v in row.items()} for n, row in enumerate(rows)]
    session = with_random_adapter(build_session(make_config(family, rows, embedding=options)))
    folder = tmp_path / "peer"
    AutoModel.from_pretrained(models[family]).save_pretrained(folder)
    session.task.tokenizer.save_pretrained(folder)
    write_layout(folder, SentenceLayout(POOLING[family], True, max_length=64), 32)
    peer = sentence_transformer_of(session, folder)
    columns = [[row[key] for row in rows] for key in ("anchor", "positive", "negative") if key in rows[0]]
    features = [peer.preprocess(texts) for texts in columns]
    labels = torch.tensor([row.get("score", 0.0) for row in rows])
    kwargs = {"mini_batch_size": 5} if name.startswith("Cached") else {}
    if name == "MatryoshkaLoss":
        inner = losses.MultipleNegativesRankingLoss(peer)
        other = losses.MatryoshkaLoss(peer, inner, matryoshka_dims=options["dimensions"])
    else:
        other = getattr(losses, name)(peer, **kwargs)
    session.model.zero_grad()
    theirs = other(features, labels)
    theirs.backward()
    expected = gradients(session)
    loss, gradient, count = step(session, kept_tokens=300)
    assert count > 5 and expected.norm() > 1e-3 and loss == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.slow), "llama"])
@pytest.mark.slow
def test_memory_grows_with_batch_only_by_its_vectors(make_config, family):
    rows = [{"anchor": f"query {n:04} {'x' * 30}", "positive": f"passage {n:04} {'y' * 28}"} for n in range(96)]

    def planned(size: int, kept_tokens: int) -> int:
        train = {"batch_size": size, "tokens_per_pass": 384}
        embedding = {"kept_tokens": kept_tokens}
        config = RunConfig.read(make_config(family, rows, embedding=embedding, train=train))
        return plan_run(config, *read_data(config)).peak_bytes

    small = planned(24, 0)
    large = planned(96, 0)
    texts = 2 * (96 - 24)
    # 32 fp32 values per text, in three forms (separate, concatenated, normalized), each with a gradient.
    vectors = 6 * texts * 32 * 4
    similarities = 6 * (96**2 - 24**2) * 4
    assert large - small <= vectors + similarities and planned(96, 10**6) - planned(24, 10**6) > 10 * (large - small)


RUN = {"max_steps": None, "epochs": 3, "batch_size": 8, "eval_every": 4, "checkpoint_every": 3, "drift": False}
RUN |= {"checkpoint_minutes": None, "learning_rate": 5e-3}
METRICS = {"infonce": {"ndcg@10", "mrr@10", "recall@1", "recall@10", "accuracy", "passages_searched"}}
METRICS |= {"cosent": {"spearman"}, "angle": {"spearman"}, "supcon": {"accuracy"}, "margin-mse": {"accuracy"}}
METRICS |= {"kl": {"spearman"}}


@pytest.mark.each_value
@pytest.mark.parametrize("loss", ROWS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_run_with_each_loss_learns_and_is_evaluated(make_config, tmp_path, family, loss):
    run = tmp_path / "run"
    result = fit(make_config(family, ROWS[loss](40), embedding={"loss": loss}, data={"eval": 0.2}, train=RUN))
    assert_learns(run, 0.95)
    assert {"loss", *METRICS[loss]} == set(result.evaluation.metrics)
    assert all(np.isfinite(value) for value in result.evaluation.metrics.values())
    low, high = result.evaluation.interval
    assert low <= result.evaluation.metrics[result.evaluation.main] <= high
    assert f"loss: {loss}" in (run / "run.yaml").read_text()


@pytest.mark.each_value
@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "bert"])
@pytest.mark.parametrize("loss", ["infonce", pytest.param("cosent", marks=pytest.mark.slow)])
def test_resumed_run_is_bit_identical(make_config, tmp_path, family, loss):
    changes = {"lora": {"dropout": 0.2}, "data": {"eval": 0.2}, "train": RUN, "embedding": {"kept_tokens": 100}}
    rows = ROWS[loss](40)
    run = tmp_path / "run"
    snapshots = Snapshots(run, tmp_path, ["evaluation 8"])
    fit(make_config(family, rows, run, **changes), callback=snapshots)
    (moment,) = snapshots.copies.values()
    assert fit(make_config(family, rows, moment, **changes)).resumed_from_step in (3, 6)
    assert_same_run(moment, run)


def test_resume_rejects_changed_scores(make_config, tmp_path):
    changes = {"train": RUN, "data": {"eval": 0.2}}
    rows = scored_pairs(40)
    stopped_run(make_config("bert", rows, **changes), 2)
    rows[3]["score"] = -rows[3]["score"] or 0.5
    refusal(fit, make_config("bert", rows, **changes), match="rows")


@pytest.mark.each_value
@pytest.mark.parametrize("method", slow_except("full", "bias", "prompt"))
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.slow
def test_other_methods_train_or_raise(make_config, tmp_path, family, method):
    changes = {"train": RUN | {"learning_rate": 1e-3}, "data": {"eval": 0.2}, **METHODS[method]}
    settings = make_config(family, triplets(40), **changes)
    errors = {"head": "finds no parameters to train", "prompt": "do not support virtual tokens"}
    if method in errors:
        refusal(fit, settings, match=errors[method])
        return
    fit(settings)
    assert_learns(tmp_path / "run")
    assert open_on_cpu(tmp_path / "run").task.name == "embedding"


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("loss", ["infonce", "cosent", "supcon"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_two_processes_match_one(make_config, tmp_path, family, loss):
    changes = {"train": RUN | {"batch_size": 7, "epochs": 2}, "data": {"eval": 0.2}}
    single, several = (make_config(family, ROWS[loss](40), tmp_path / name, **changes) for name in ("one", "several"))
    # A text of two rows is computed once if the same process has both, so token counts differ.
    compare = functools.partial(parallel_runs.assert_same_run, counts=("step", "rows", "label_tokens"))
    assert_same_as_one_process(single, several, compare=compare)
    evaluated = [[line["eval"] for line in metrics(tmp_path / name, "eval")] for name in ("one", "several")]
    assert len(evaluated[0]) > 1
    for ours, theirs in zip(*evaluated, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_killed_run_resumes_with_more_processes_than_rows(make_config, tmp_path, family):
    train = RUN | {"batch_size": 3, "epochs": 1, "max_steps": 6, "checkpoint_every": 1, "eval_every": 3}
    changes = {"train": train, "data": {"eval": 0.2}, "embedding": {"kept_tokens": 40}}
    reference, run = (make_config(family, triplets(40), tmp_path / name, **changes) for name in ("whole", "run"))
    fit(reference)
    parallel_runs.train_until_killed(run, 3)
    parallel_runs.train_all(run, 4)
    assert [line["step"] for line in metrics(tmp_path / "run", "loss")] == [1, 2, 3, 4, 5, 6]
    parallel_runs.assert_same_run(tmp_path / "run", tmp_path / "whole", counts=("step", "rows", "label_tokens"))


def test_negatives_include_other_rows(make_config):
    """The mean of the gradients of two half batches is not the step's gradient."""
    session = with_random_adapter(build_session(make_config("bert", triplets())))
    rows = session.data.train
    full_loss, expected, _ = step(session)
    halves = [step(session, rows[:8]), step(session, rows[8:])]
    mean = sum(gradient for _, gradient, _ in halves) / 2
    assert np.mean([loss for loss, *_ in halves]) < 0.95 * full_loss
    assert (mean - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("family", slow_except("bert", names=("bert", "llama")))
def test_eva_initialization_trains_embeddings(make_config, tmp_path, family):
    changes = {"lora": {"init": "eva"}, "train": RUN, "data": {"eval": 0.2}}
    fit(make_config(family, triplets(40), **changes))
    assert_learns(tmp_path / "run")


@pytest.mark.parametrize("family", slow_except("bert", names=("bert", "llama")))
def test_eval_sets_may_have_other_row_formats(make_config, tmp_path, family):
    sets = {name: str(write_rows(tmp_path / f"{name}.jsonl", ROWS[name](10))) for name in ("cosent", "supcon")}
    result = fit(make_config(family, triplets(24), train=RUN | {"epochs": 1}, data={"eval": {"held": 0.2, **sets}}))
    assert "ndcg@10" in result.evaluation.metrics
    (*_, last) = metrics(tmp_path / "run", "eval")
    kinds = {name: set(values) - {"loss"} for name, values in last["eval"].items()}
    assert (kinds["cosent"], kinds["supcon"]) == ({"spearman"}, {"accuracy"}) and "ndcg@10" in kinds["held"]


def test_incompatible_rows_and_settings_are_rejected_before_training(make_config, tmp_path):
    sizes = (2 + n % 2 for n in range(6))
    rows = [{"query": f"q{n}", "passages": list("abc")[:n], "scores": [1, 0, 0][:n]} for n in sizes]
    refusal(read_data, RunConfig.read(make_config("bert", rows)), match="row 1 has 2 scores, and row 2 3")
    with pytest.raises(UserError, match="vectors have 32 numbers"):
        build_session(make_config("bert", pairs(), embedding={"dimensions": [64, 32]}))
    separate_eval = {"data": {"eval": str(write_rows(tmp_path / "eval.jsonl", scored_pairs(8)))}}
    assert read_data(RunConfig.read(make_config("bert", pairs(), **separate_eval)))[1].held_out
    with pytest.raises(UserError, match="'infonce' does not fit rows with 1 passages and 1 scores"):
        read_data(RunConfig.read(make_config("bert", pairs(), embedding={"loss": "infonce"}, **separate_eval)))


@pytest.mark.parametrize(
    ("rows", "batch_size", "location"),
    [
        (pairs(), 1, "train.batch_size"),
        (pairs()[:1], 8, "train.batch_size"),
        (scored_pairs(), 1, "train.batch_size"),
        (class_rows(), 1, "train.batch_size"),
        ([{**row, "positive": "the same"} for row in pairs()], 8, "data.train"),
        ([{**row, "score": 0.5} for row in scored_pairs()], 8, "data.train"),
    ],
    ids=["pairs", "one row", "scored pairs", "classes", "one passage", "equal scores"],
)
def test_constant_loss_is_rejected_before_loading_model(make_config, rows, batch_size, location):
    config = RunConfig.read(make_config("bert", rows, train={"batch_size": batch_size}))
    error = refusal(fit, config)
    assert error.location == location
    assert "did not move" not in error.message
    refused = check_data_and_run(config, folder=False, dry_run=False)
    assert error.message in refused.findings[0].text


@pytest.mark.parametrize(
    ("rows", "batch_size", "options"),
    [
        (triplets(), 1, {}),
        (pairs(), 2, {"temperature": 0.01}),
        (pairs(), 2, {"similarity": "dot", "temperature": 0.01}),
        (sorted(pairs() * 2, key=str), 2, {}),
        (scored_pairs(), 2, {}),
        (class_rows(), 4, {}),
        (rows_with_teacher_scores(), 1, {}),
    ],
)
def test_rows_with_gradient_are_accepted(make_config, rows, batch_size, options):
    changes = {"data": {"duplicates": "keep"}, "embedding": options, "train": {"batch_size": batch_size}}
    config = RunConfig.read(make_config("bert", rows, **changes))
    task, data = read_data(config)
    check_rows(config, task, data)
