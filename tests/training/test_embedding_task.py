"""The task ``embedding``: a step's gradient in small memory against autograd over the whole batch and against
sentence-transformers, and whole runs with each loss."""

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
from deltaw.runs.fit import fit
from deltaw.settings import RunConfig
from deltaw.training.embedding.losses import loss_of_step
from deltaw.training.embedding.objective import texts_of as texts_in
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.session import read_data
from tests.byte_models import saved, tiny_llama
from tests.conftest import THREADS, laid_over, write_rows
from tests.serving.encoder_models import write_bert
from tests.training import parallel_runs
from tests.training.parallel_runs import needs_gloo, trains_as_one
from tests.training.runs import METHODS, Snapshots, assert_same_run, losses, metrics, often, opened, session_of
from tests.training.test_label_objective import DECODERS, ENCODERS

TOPICS = ("snow", "bread", "river", "engine", "violin", "planet", "garden", "number")


def texts_of(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(TOPICS, 1 + draw.integers(0, 4))) + f" {n}" for n in range(count)]


def triplets(count: int = 32) -> list[dict]:
    """Mixed lengths; two rows have one passage, and two one query."""
    texts = texts_of(3 * count)
    rows = [{"anchor": a, "positive": b, "negative": c} for a, b, c in zip(*[iter(texts)] * 3, strict=True)]
    rows[3]["positive"], rows[5]["anchor"] = rows[1]["positive"], rows[2]["anchor"]
    rows[7]["negative"] = rows[0]["positive"]
    return rows


def pairs(count: int = 32) -> list[dict]:
    return [{"anchor": row["anchor"], "positive": row["positive"]} for row in triplets(count)]


def scored(count: int = 32) -> list[dict]:
    return [row | {"score": round(np.cos(3.0 * n), 2)} for n, row in enumerate(pairs(count))]


def teacher(count: int = 32, several: bool = True) -> list[dict]:
    draw = np.random.default_rng(1)
    scores = draw.uniform(-1, 1, (count, 2)).round(2).tolist()
    return [row | {"score": s if several else s[0]} for row, s in zip(triplets(count), scores, strict=True)]


def classes(count: int = 32) -> list[dict]:
    return [{"text": f"{TOPICS[n % 4]} {text}", "label": TOPICS[n % 4]} for n, text in enumerate(texts_of(count))]


ROWS = {"infonce": triplets, "cosent": scored, "angle": scored, "supcon": classes, "kl": teacher}
ROWS["margin-mse"] = lambda count=32: teacher(count, several=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    llama = tiny_llama(initializer_range=0.2)
    return {"bert": write_bert(folder / "bert"), "llama": saved(llama, folder / "llama")}


@pytest.fixture
def made(models, tmp_path):
    def of(family: str | Path, rows: list[dict], output: Path | None = None, **changes) -> dict:
        output = output or tmp_path / "run"
        file = write_rows(output.with_suffix(".jsonl"), rows)
        plain = {
            "model": str(models.get(family, family)),
            "task": "embedding",
            "data": {"train": str(file), "eval": None},
        }
        plain |= {"lora": {"rank": 4, "alpha": 8}, "precision": "fp32", "device": "cpu", "threads": THREADS}
        plain |= {"train": {"learning_rate": 1e-2, "batch_size": 32, "max_steps": 1, "tokens_per_pass": 128}}
        return laid_over(plain, {**changes, "output": str(output)})

    return of


def moved(session, scale: float = 0.3):
    """The session, whose adapter is not as it begins."""
    draw = torch.Generator().manual_seed(1)
    for name, parameter in session.trained:
        if name.endswith("lora_B"):
            parameter.data.normal_(std=scale, generator=draw)
    return session


def gradients(session) -> torch.Tensor:
    return torch.cat([parameter.grad.double().flatten() for _, parameter in session.trained])


def step(session, rows=None, **settings) -> tuple[float, torch.Tensor, int]:
    """The loss of one step, what is trained has as its gradient, and the number of microbatches."""
    rows = session.data.train if rows is None else rows
    objective, batcher = copy.copy(session.objective), session.batcher
    objective.settings = objective.settings.model_copy(update=settings)
    session.model.zero_grad()
    total, count = 0.0, 0
    with session.running():
        objective.begin(rows, batcher)
        for batch in batcher.batches(rows):
            loss = objective(batch) / objective.units(rows)
            loss.backward()
            total, count = total + float(loss.detach()), count + 1
    return total, gradients(session), count


def whole(session, pooling: str) -> tuple[float, torch.Tensor]:
    """The same, in float64 and one graph, each text alone in the model's own forward."""
    exact = copy.deepcopy(session.model).double()
    vectors = []
    for text in (text for row in session.data.train for text in row.rows):
        (hidden,) = exact(input_ids=torch.from_numpy(text.tokens).long()[None]).last_hidden_state
        weights = torch.arange(1.0, len(hidden) + 1, dtype=torch.float64)
        vectors.append(
            {
                "mean": lambda hidden=hidden: hidden.mean(0),
                "first": lambda hidden=hidden: hidden[0],
                "last": lambda hidden=hidden: hidden[-1],
                "weighted": lambda hidden=hidden, weights=weights: weights @ hidden / weights.sum(),
            }[pooling]()
        )
    settings = session.objective.settings
    loss = loss_of_step(torch.stack(vectors), session.data.train, settings, normalize=True)
    exact.zero_grad()
    loss.backward()
    known = dict(exact.named_parameters())
    names = {id(parameter): name for name, parameter in session.model.named_parameters()}
    return float(loss.detach()), torch.cat([known[names[id(p)]].grad.flatten() for _, p in session.trained])


@pytest.mark.each_value
@pytest.mark.parametrize("pooling", ["mean", "first", "last", "weighted"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_step_has_the_gradient_and_the_loss_of_the_whole_batch(made, family, pooling):
    session = moved(session_of(made(family, triplets(), embedding={"pooling": pooling})))
    expected_loss, expected = whole(session, pooling)
    for kept in (0, 300, 10**6):
        loss, found, count = step(session, kept_tokens=kept)
        assert count > 5
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.each_value
@pytest.mark.parametrize("loss", ROWS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_loss_has_the_gradient_of_the_whole_batch_however_it_is_cut(made, family, loss):
    counts = []
    for tokens in (40, 10**5):
        settings = made(family, ROWS[loss](), embedding={"loss": loss}, train={"tokens_per_pass": tokens})
        session = moved(session_of(settings))
        expected_loss, expected = whole(session, {"bert": "mean", "llama": "last"}[family])
        found_loss, found, count = step(session, kept_tokens=100)
        counts.append(count)
        assert found_loss == pytest.approx(expected_loss, rel=1e-5)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert counts[0] > 2 * counts[1]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_second_forward_draws_the_dropout_of_the_first(made, family):
    session = moved(session_of(made(family, triplets(), lora={"dropout": 0.4})))
    step(session)  # what is settled at the first step may draw, too
    found = {}
    for kept in (0, 300, 10**6):
        torch.manual_seed(3)
        loss, gradient, _ = step(session, kept_tokens=kept)
        found[kept] = (loss, gradient, torch.get_rng_state())
    for loss, gradient, state in (found[0], found[300]):
        assert loss == found[10**6][0] and torch.equal(state, found[10**6][2])
        assert (gradient - found[10**6][1]).norm() <= 1e-6 * gradient.norm()
    torch.manual_seed(4)
    assert (step(session, kept_tokens=0)[1] - found[0][1]).norm() > 0.1 * found[0][1].norm()


@pytest.mark.parametrize("pooling", ["mean", "first", "last", "weighted"])
def test_padded_rows_have_the_gradient_of_the_whole_batch_too(made, monkeypatch, pooling):
    monkeypatch.setattr("deltaw.training.tasks.causal_batcher.can_pack_apart", lambda model: Choice(False, "as asked"))
    session = moved(session_of(made("bert", triplets(), embedding={"pooling": pooling})))
    assert session.batcher.padded
    expected_loss, expected = whole(session, pooling)
    for kept in (0, 300):
        loss, found, count = step(session, kept_tokens=kept)
        assert count > 5 and loss == pytest.approx(expected_loss, rel=1e-5)
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "distilbert", "qwen3", "gpt2", "gemma3"])
def test_models_of_other_families_have_the_gradient_of_the_whole_batch(made, tmp_path, family):
    config = {**ENCODERS, **DECODERS}[family]()
    config.update({"vocab_size": 259, "initializer_range": 0.2, "pad_token_id": 1, "max_position_embeddings": 66})
    folder = saved(AutoModel.from_config(config).eval(), tmp_path / "model")
    session = moved(session_of(made(folder, triplets())))
    expected_loss, expected = whole(session, "last" if family in DECODERS else "mean")
    loss, found, count = step(session, kept_tokens=300)
    assert count > 5 and loss == pytest.approx(expected_loss, rel=1e-5)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_microbatch_holds_each_text_once(made):
    session = session_of(made("bert", triplets()))
    seen = [text.tokens.tobytes() for batch in session.batcher.batches(session.data.train) for text in texts_in(batch)]
    assert len(seen) == len(set(seen)) == 3 * 32 - 3


def peers(session, folder: Path):
    """sentence-transformers' model around the session's, with its adapter."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="not installed")
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    theirs = model[0]
    (name,) = [name for name in ("auto_model", "model") if name in dict(theirs.named_children())]
    setattr(theirs, name, session.model)
    return model


PEERS = {
    "MultipleNegativesRankingLoss": (triplets, {}),
    "CachedMultipleNegativesRankingLoss": (triplets, {}),
    "CoSENTLoss": (scored, {}),
    "MatryoshkaLoss": (triplets, {"dimensions": [32, 16, 8]}),
}


@pytest.mark.each_value
@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_losses_and_gradients_are_those_of_sentence_transformers_whole_batch(made, models, tmp_path, family, name):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason="not installed")
    rows_of, more = PEERS[name]
    # Neither side leaves out what is right for two rows.
    rows = [
        {key: f"{text} {n}" if key != "score" else text for key, text in row.items()} for n, row in enumerate(rows_of())
    ]
    session = moved(session_of(made(family, rows, embedding=more)))
    folder = tmp_path / "peer"
    AutoModel.from_pretrained(models[family]).save_pretrained(folder)
    session.task.tokenizer.save_pretrained(folder)
    write_layout(folder, SentenceLayout({"bert": "mean", "llama": "last"}[family], True, max_length=64), 32)
    peer = peers(session, folder)
    columns = [[row[key] for row in rows] for key in ("anchor", "positive", "negative") if key in rows[0]]
    features = [peer.preprocess(texts) for texts in columns]
    labels = torch.tensor([row.get("score", 0.0) for row in rows])
    how = {"mini_batch_size": 5} if name.startswith("Cached") else {}
    if name == "MatryoshkaLoss":
        inner = losses.MultipleNegativesRankingLoss(peer)
        other = losses.MatryoshkaLoss(peer, inner, matryoshka_dims=more["dimensions"])
    else:
        other = getattr(losses, name)(peer, **how)
    session.model.zero_grad()
    theirs = other(features, labels)
    theirs.backward()
    expected = gradients(session)
    loss, found, count = step(session, kept_tokens=300)
    assert count > 5 and expected.norm() > 1e-3
    assert loss == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def planned_bytes(settings: dict) -> int:
    config = RunConfig.read(settings)
    task, data = read_data(config)
    return plan_run(config, task, data).peak_bytes


@pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.slow), "llama"])
def test_memory_does_not_grow_with_the_batch_beyond_its_vectors(made, tmp_path, family):
    rows = [{"anchor": f"query {n:04} {'x' * 30}", "positive": f"passage {n:04} {'y' * 28}"} for n in range(256)]

    def planned(size: int, kept: int) -> int:
        train = {"batch_size": size, "tokens_per_pass": 512}
        return planned_bytes(
            made(family, rows, tmp_path / f"{size}-{kept}", embedding={"kept_tokens": kept}, train=train)
        )

    small, large = planned(64, 0), planned(256, 0)
    texts = 2 * (256 - 64)
    # A vector of 32 numbers a text in fp32: as it was made, in one tensor, scaled to length 1, and a gradient of each.
    vectors = 6 * texts * 32 * 4
    similarities = 6 * (256**2 - 64**2) * 4
    assert large - small <= vectors + similarities
    assert planned(256, 10**6) - planned(64, 10**6) > 10 * (large - small)


RUN = {"max_steps": None, "epochs": 6, "batch_size": 8, "eval_every": 4, "checkpoint_every": 3, "drift": False}
RUN |= {"checkpoint_minutes": None, "learning_rate": 5e-3}
METRICS = {
    "infonce": {"ndcg@10", "mrr@10", "recall@1", "recall@10", "accuracy", "passages_searched"},
    "cosent": {"spearman"},
    "angle": {"spearman"},
    "supcon": {"accuracy"},
    "margin-mse": {"accuracy"},
    "kl": {"spearman"},
}


@pytest.mark.each_value
@pytest.mark.parametrize("loss", ROWS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_run_with_each_loss_learns_and_is_evaluated(made, tmp_path, family, loss):
    run = tmp_path / "run"
    result = fit(made(family, ROWS[loss](40), embedding={"loss": loss}, data={"eval": 0.2}, train=RUN))
    told = losses(run)
    assert np.mean(told[-4:]) < 0.9 * np.mean(told[:4])
    assert {"loss", *METRICS[loss]} == set(result.evaluation.metrics)
    assert all(np.isfinite(value) for value in result.evaluation.metrics.values())
    low, high = result.evaluation.interval
    assert low <= result.evaluation.metrics[result.evaluation.main] <= high
    assert f"loss: {loss}" in (run / "run.yaml").read_text()


@pytest.mark.each_value
@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "bert"])
@pytest.mark.parametrize("loss", ["infonce", pytest.param("cosent", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_bit(made, tmp_path, family, loss):
    changes = {"lora": {"dropout": 0.2}, "data": {"eval": 0.2}, "train": RUN, "embedding": {"kept_tokens": 100}}
    rows = ROWS[loss](40)
    whole_run = made(family, rows, tmp_path / "whole", **changes)
    fit(whole_run)
    run = tmp_path / "run"
    taken = Snapshots(run, tmp_path, ["step 7", "evaluation 8"])
    fit(made(family, rows, run, **changes), callback=taken)
    assert_same_run(run, tmp_path / "whole")
    for moment in taken.taken.values():
        settings = made(family, rows, moment, **changes)
        assert fit(settings).resumed_from_step in (3, 6)
        assert_same_run(moment, tmp_path / "whole")


def test_a_run_whose_scores_changed_is_not_resumed(made, tmp_path):
    changes = {"train": RUN, "data": {"eval": 0.2}}
    run = tmp_path / "run"
    taken = Snapshots(run, tmp_path, ["step 7"])
    fit(made("bert", scored(40), run, **changes), callback=taken)
    rows = scored(40)
    rows[3]["score"] = -rows[3]["score"] or 0.5
    with pytest.raises(UserError, match="rows"):
        fit(made("bert", rows, taken.taken["step 7"], **changes))


@pytest.mark.parametrize("method", often("full", "bias", "prompt"))
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_other_methods_train_embeddings_or_say_why_not(made, tmp_path, family, method):
    changes = {"train": RUN | {"learning_rate": 1e-3}, "data": {"eval": 0.2}, **METHODS[method]}
    settings = made(family, triplets(40), **changes)
    if method in ("head", "prompt"):
        with pytest.raises(UserError, match={"head": "nothing to train", "prompt": "no virtual tokens"}[method]):
            fit(settings)
        return
    fit(settings)
    told = losses(tmp_path / "run")
    assert np.mean(told[-4:]) < np.mean(told[:4])
    run = opened(tmp_path / "run")
    assert run.task.name == "embedding"


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("loss", ["infonce", "cosent", "supcon"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_two_processes_train_as_one(made, tmp_path, family, loss):
    changes = {"train": RUN | {"batch_size": 7, "epochs": 2}, "data": {"eval": 0.2}}
    one, several = (made(family, ROWS[loss](40), tmp_path / name, **changes) for name in ("one", "several"))
    # A text that two rows have is computed once where one process has both.
    same = functools.partial(parallel_runs.assert_same_run, counts=("step", "rows", "label_tokens"))
    trains_as_one(one, several, same=same)
    evaluated = [[line["eval"] for line in metrics(tmp_path / name, "eval")] for name in ("one", "several")]
    assert len(evaluated[0]) > 1
    for ours, theirs in zip(*evaluated, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_run_whose_process_was_killed_goes_on_with_more_than_a_step_has_rows(made, tmp_path, family):
    train = RUN | {"batch_size": 3, "epochs": 1, "max_steps": 6, "checkpoint_every": 1, "eval_every": 3}
    changes = {"train": train, "data": {"eval": 0.2}, "embedding": {"kept_tokens": 40}}
    whole_run, run = (made(family, triplets(40), tmp_path / name, **changes) for name in ("whole", "run"))
    fit(whole_run)
    parallel_runs.train_until_one_dies(run, 3)
    parallel_runs.train_all(run, 4)
    assert [line["step"] for line in metrics(tmp_path / "run", "loss")] == [1, 2, 3, 4, 5, 6]
    parallel_runs.assert_same_run(tmp_path / "run", tmp_path / "whole", counts=("step", "rows", "label_tokens"))


def test_negatives_of_other_rows_count(made):
    """What each of two processes would have of its own rows alone is not the step's gradient."""
    session = moved(session_of(made("bert", triplets())))
    rows = session.data.train
    whole_loss, expected, _ = step(session)
    halves = [step(session, rows[:16]), step(session, rows[16:])]
    mean = sum(gradient for _, gradient, _ in halves) / 2
    assert np.mean([loss for loss, *_ in halves]) < 0.95 * whole_loss
    assert (mean - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_factors_may_begin_by_what_the_rows_bring(made, tmp_path, family):
    changes = {"lora": {"init": "eva"}, "train": RUN, "data": {"eval": 0.2}}
    fit(made(family, triplets(40), **changes))
    told = losses(tmp_path / "run")
    assert np.mean(told[-4:]) < np.mean(told[:4])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_held_out_rows_may_be_of_another_kind(made, tmp_path, family):
    sets = {name: str(write_rows(tmp_path / f"{name}.jsonl", ROWS[name](10))) for name in ("cosent", "supcon")}
    result = fit(made(family, triplets(40), train=RUN, data={"eval": {"held": 0.2, **sets}}))
    assert "ndcg@10" in result.evaluation.metrics
    (*_, last) = metrics(tmp_path / "run", "eval")
    kinds = {name: set(found) - {"loss"} for name, found in last["eval"].items()}
    assert (kinds["cosent"], kinds["supcon"]) == ({"spearman"}, {"accuracy"}) and "ndcg@10" in kinds["held"]


def test_what_the_loss_cannot_have_is_refused_before_training(made, tmp_path):
    rows = [
        {"query": f"q{n}", "passages": list("abc")[: 2 + n % 2], "scores": [1, 0, 0][: 2 + n % 2]} for n in range(6)
    ]
    with pytest.raises(UserError, match="row 1 has 2 scores, and row 2 3"):
        read_data(RunConfig.read(made("bert", rows)))
    with pytest.raises(UserError, match="vectors have 32 numbers"):
        session_of(made("bert", pairs(), embedding={"dimensions": [64, 32]}))
    apart = {"data": {"eval": str(write_rows(tmp_path / "eval.jsonl", scored(8)))}}
    assert read_data(RunConfig.read(made("bert", pairs(), **apart)))[1].held_out
    with pytest.raises(UserError, match="'infonce' does not fit rows with 1 passages and 1 scores"):
        read_data(RunConfig.read(made("bert", pairs(), embedding={"loss": "infonce"}, **apart)))
