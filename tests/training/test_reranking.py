"""Task ``reranking``: losses, rows and prompts, and complete runs of encoders and decoders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertModel

from deltaw.data.example import LabeledExample
from deltaw.errors import UserError
from deltaw.export.merge import merge_run
from deltaw.export.push import push
from deltaw.hub.loading import load
from deltaw.inference.open_run import open_run
from deltaw.runs.fit import fit
from deltaw.settings.data import DataSettings
from deltaw.tasks.classification.task import predict_rows
from deltaw.tasks.reranking.rows import PairEncoder, as_chat_template, prompt_of
from deltaw.tasks.reranking.settings import RerankingSettings
from deltaw.tasks.reranking.task import evaluate_scores
from deltaw.training.batchers import BatcherOptions
from deltaw.training.task import task_of
from tests.byte_models import byte_tokenizer, save_model, tiny_gpt2, tiny_llama
from tests.conftest import refusal, write_rows
from tests.data.label_models import WORDS, word_tokenizer
from tests.training.parallel_runs import assert_same_as_one_process, needs_gloo
from tests.training.runs import Snapshots, load_eval_rows, losses, metrics, open_on_cpu, slow_except
from tests.training.runs import assert_same_run as assert_equal_run

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPT = "Q: {query}\nP: {passage}\nfits:"


def bert_config(**changes: object) -> BertConfig:
    return BertConfig(vocab_size=20, max_position_embeddings=64, hidden_dropout_prob=0.0, **SHAPE, **changes)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A tiny BERT without a head."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> Path:
    """A tiny BERT with a head of one output."""
    folder = tmp_path_factory.mktemp("scorer")
    torch.manual_seed(1)
    BertForSequenceClassification(bert_config(num_labels=1, initializer_range=0.4)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 9))) for _ in range(count)]


def passage_lists(count: int = 8) -> list[dict]:
    """Return queries with two to five passages and at least two different labels."""
    random = np.random.default_rng(1)
    rows = []
    for number, query in enumerate(texts(count)):
        size = int(random.integers(2, 6))
        labels = [1.0, 0.0, *random.choice([0.0, 0.25, 1.0], size - 2)]
        rows.append({"query": f"it {query}", "passages": texts(size, 50 + number), "labels": labels})
    return rows


def read(folder: Path, path: Path, **settings: object):
    task = task_of("reranking", str(folder), "fp32", section=RerankingSettings(**settings))
    return task, task.read(DataSettings(train=str(path), eval=None), seed=0)


KINDS = ["binary", "pairwise", "listwise", "contrastive"]


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("budget", [40, 10_000])
def test_loss_and_gradients_match_sentence_transformers(kind, budget, scorer, tmp_path):
    reason = "sentence-transformers is not installed"
    cross_encoder = pytest.importorskip("sentence_transformers.cross_encoder", reason=reason)
    rows = passage_lists()
    if kind == "binary":
        graded = ((row["query"], zip(row["passages"], row["labels"], strict=True)) for row in rows)
        rows = [{"query": query, "passage": p, "label": label} for query, pairs in graded for p, label in pairs]
    task, data = read(scorer, write_rows(tmp_path / "rows.jsonl", rows), loss=kind)
    assert task.loss == kind and len(data.train) == len(rows)
    theirs = cross_encoder.CrossEncoder(str(scorer), device="cpu")
    name = {"binary": "BinaryCrossEntropyLoss", "pairwise": "RankNetLoss", "listwise": "ListNetLoss"}[kind]
    queries = [row["query"] for row in rows]
    passages = [row["passage"] if kind == "binary" else row["passages"] for row in rows]
    labels = [torch.tensor(row["label"] if kind == "binary" else row["labels"]) for row in rows]
    labels = torch.stack(labels) if kind == "binary" else labels
    theirs.eval()
    expected = getattr(cross_encoder.losses, name)(theirs)([queries, passages], labels)
    their_parameters = dict(theirs.model.named_parameters())
    gradients = torch.autograd.grad(expected, list(their_parameters.values()), allow_unused=True)
    model = AutoModelForSequenceClassification.from_pretrained(scorer).eval()
    batcher, _ = task.batcher(model, data.train, BatcherOptions("cpu", tokens_per_pass=budget))
    assert (len(batcher.shapes(data.train)) > 3) == (budget == 40)
    objective = task.objective(model)
    with task.model_context(model, batcher):
        loss = sum(objective(batch) for batch in batcher.batches(data.train)) / objective.units(data.train)
        loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    ours = dict(model.named_parameters())
    largest = max(float(gradient.abs().max()) for gradient in gradients if gradient is not None)
    for (parameter, _), gradient in zip(their_parameters.items(), gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(ours[parameter].grad, gradient, rtol=1e-5, atol=1e-5 * max(1, largest))


@pytest.mark.parametrize("kind", KINDS)
def test_group_losses_match_formulas_for_any_microbatch_size(kind, scorer, tmp_path):
    rows = passage_lists()
    task, data = read(scorer, write_rows(tmp_path / "rows.jsonl", rows), loss=kind)
    model = AutoModelForSequenceClassification.from_pretrained(scorer).eval()
    tokenizer = word_tokenizer()
    expected = 0.0
    units = 0
    for row in rows:
        pairs = ([row["query"]] * len(row["passages"]), row["passages"])
        separate = [tokenizer(query, passage, return_tensors="pt") for query, passage in zip(*pairs, strict=True)]
        scores = [float(model(**inputs).logits.detach()) for inputs in separate]
        labels = row["labels"]
        graded = list(zip(scores, row["labels"], strict=True))
        if kind == "binary":
            parts = [np.log1p(np.exp(-s)) * y + np.log1p(np.exp(s)) * (1 - y) for s, y in graded]
        elif kind == "pairwise":
            parts = [np.log2(1 + np.exp(t - s)) for s, y in graded for t, z in graded if y > z]
        else:
            target, likely = (np.exp(v) / np.exp(v).sum() for v in (np.array(labels), np.array(scores)))
            target = target if kind == "listwise" else np.array(labels) / sum(labels)
            parts = [-(target * np.log(likely)).sum()]
        expected += sum(parts)
        units += len(parts)
    objective = task.objective(model)
    assert objective.units(data.train) == units
    for budget in (16, 64, 10_000):
        batcher, _ = task.batcher(model, data.train, BatcherOptions("cpu", tokens_per_pass=budget))
        with torch.no_grad(), task.model_context(model, batcher):
            actual = sum(float(objective(batch)) for batch in batcher.batches(data.train))
        assert actual == pytest.approx(expected, rel=1e-5)


def test_scores_of_other_range_are_scaled_to_unit_interval(scorer, tmp_path):
    totals = []
    for labels, high in ([0.0, 0.5, 1.0], 1.0), ([0.0, 2.5, 5.0], 5.0):
        rows = [{"query": "a", "passage": text, "label": y} for text, y in zip(WORDS[:3], labels, strict=True)]
        task, data = read(scorer, write_rows(tmp_path / "rows.jsonl", rows), score_range=(0.0, high))
        model = AutoModelForSequenceClassification.from_pretrained(scorer).eval()
        objective = task.objective(model)
        batcher, _ = task.batcher(model, data.train, BatcherOptions("cpu"))
        with torch.no_grad(), task.model_context(model, batcher):
            totals.append(sum(float(objective(batch)) for batch in batcher.batches(data.train)))
    assert totals[0] == pytest.approx(totals[1]) and totals[0] > 0


def test_invalid_rows_are_reported(encoder, tmp_path):
    good = {"query": "a film", "passages": ["good", "bad"], "labels": [1, 0]}
    invalid_rows = [
        ({**good, "labels": [1, 2]}, "a score outside of its range"),
        ({**good, "labels": [1]}, "scores that do not fit"),
        ({**good, "passages": ["good", " "]}, "an empty text"),
        ({**good, "passages": ["good"], "labels": [1]}, "a single passage"),
        ({**good, "labels": [1, 1]}, "passages with equal scores"),
        ({**good, "labels": [1, "no"]}, "a score that is no number"),
    ]
    path = write_rows(tmp_path / "rows.jsonl", [good, {**good, "query": "so"}, *(row for row, _ in invalid_rows)])
    task = task_of("reranking", str(encoder), "fp32", section=RerankingSettings(loss="pairwise"))
    data = task.read(DataSettings(train=str(path), eval=None, bad_rows="skip"), seed=0)
    assert len(data.train) == 2 and data.report.bad_rows == {reason: 1 for _, reason in invalid_rows}
    negative = {"anchor": "a film", "positive": "good", "negative": "good"}
    path = write_rows(tmp_path / "own.jsonl", [negative])
    refusal(task.read, DataSettings(train=str(path), eval=None), seed=0, match="own passage")
    for rows in [{"anchor": "a", "positive": "b"}], [{"text": "a", "label": "b"}]:
        path = write_rows(tmp_path / "lacking.jsonl", rows)
        refusal(task.read, DataSettings(train=str(path), eval=None), seed=0, match="do not fit the task reranking")


def test_auto_selects_loss_by_row_format(encoder, tmp_path):
    triplets = [{"anchor": f"{w} film", "positive": "good", "negative_1": "bad", "negative_2": "so"} for w in WORDS]
    pairs = [{"sentence1": w, "sentence2": "good", "score": 0.5} for w in WORDS]
    graded_case = (passage_lists(), "listwise", passage_lists()[0]["labels"])
    pairs_case = (pairs, "binary", [0.5])
    for rows, kind, labels in (triplets, "contrastive", [1, 0, 0]), graded_case, pairs_case:
        task, data = read(encoder, write_rows(tmp_path / "rows.jsonl", rows))
        assert task.loss == kind and [row.label for row in data.train[0].rows] == labels
    text = word_tokenizer().decode(data.train[0].rows[0].tokens)
    assert text == f"[CLS] {WORDS[0]} [SEP] good [SEP]" and data.train[0].rows[0].segments.tolist() == [0, 0, 0, 1, 1]


def test_metrics_cover_all_rows_of_query_and_ties_count_against(scorer, tmp_path):
    labels = {"good": 1.0, "bad": 0.0, "the": 0.0, "very": 0.5}
    rows = [{"query": q, "passage": p, "label": y} for q in ("film", "plot") for p, y in labels.items()]
    task, data = read(scorer, write_rows(tmp_path / "rows.jsonl", rows), loss="binary")
    model = AutoModelForSequenceClassification.from_pretrained(scorer).eval()
    objective = task.objective(model)
    batcher, _ = task.batcher(model, data.train, BatcherOptions("cpu"))
    discount = 1 / np.log2(np.arange(2, 6))
    best = discount[0] + 0.5 * discount[1]
    scores = {"film": [3.0, 1.0, 0.0, 2.0], "plot": [1.0, 1.0, 4.0, 1.0]}

    def predictions(batch):
        order = [rows[row.row - 1] for row in batch.examples]
        return torch.tensor([scores[row["query"]][list(labels).index(row["passage"])] for row in order])

    objective.predictions = predictions
    evaluation = evaluate_scores(objective, data.train, batcher)
    # The ranking of 'plot' is 'the', followed by the tied passages 'bad', 'very' and 'good'.
    worst = (0.5 * discount[2] + discount[3]) / best
    assert evaluation.main == "ndcg@10" and sorted(evaluation.per_row) == pytest.approx([worst, 1.0])
    assert evaluation.metrics["ndcg@10"] == pytest.approx((1 + worst) / 2)
    assert evaluation.metrics["mrr@10"] == pytest.approx((1 + 1 / 3) / 2)
    # In the five pairs of 'plot', 'good' and 'very' tie with 'bad' and each other, and lose against 'the'.
    assert evaluation.metrics["pair_accuracy"] == pytest.approx((1 + 1.5 / 5) / 2)
    assert {"ndcg@10", "mrr@10", "pair_accuracy"} <= set(evaluation.named_intervals())


def test_accuracy_of_single_pairs_is_sign_of_score(scorer, tmp_path):
    rows = [{"query": w, "passage": "film", "label": n % 2} for n, w in enumerate(WORDS)]
    task, data = read(scorer, write_rows(tmp_path / "rows.jsonl", rows))
    model = AutoModelForSequenceClassification.from_pretrained(scorer).eval()
    objective = task.objective(model)
    batcher, _ = task.batcher(model, data.train, BatcherOptions("cpu"))
    with task.model_context(model, batcher):
        evaluation = task.evaluate(objective, data.train, batcher)
    tokenizer = word_tokenizer()
    positive = [float(model(**tokenizer(w, "film", return_tensors="pt")).logits.detach()) > 0 for w in WORDS]
    assert evaluation.metrics["accuracy"] == np.mean([(n % 2 == 1) == sign for n, sign in enumerate(positive)])
    assert evaluation.main == "accuracy" and evaluation.metrics["loss"] > 0 and "ndcg@10" not in evaluation.metrics


@pytest.mark.parametrize("form", slow_except("listwise", names=("binary", "pairwise", "listwise")))
def test_encoder_run_learns_and_can_be_opened(form, encoder, settings, tmp_path):
    pairs = ((word, other) for word in WORDS for other in WORDS[:3] if word != other)
    passages = [(word, [f"so {word}", f"it {other}", "the plot"]) for word, other in pairs]
    rows = [{"query": f"{word} film", "passages": texts, "labels": [1, 0, 0]} for word, texts in passages]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    changes = {"model": str(encoder), "task": "reranking", "reranking": {"loss": form}}
    changes["data"] = {"train": str(path), "eval": 6}
    result = fit(settings(tmp_path / "run", **changes, train={"epochs": 8, "eval_every": 16, "batch_size": 6}))
    evals = [line["eval"] for line in metrics(result.output, "eval")]
    assert evals[-1]["loss"] < evals[0]["loss"] and evals[-1]["ndcg@10"] > 0.9
    run = open_on_cpu(result.output)
    assert run.task.name == "reranking"
    score = run.score(load_eval_rows(run)).evaluation
    assert score.metrics == pytest.approx(result.evaluation.metrics, rel=1e-4)
    layout = {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"}
    assert layout <= set(push(result.output, "me/ranker", base="some/bert", dry_run=True).files)


# Decoders that answer yes or no

ANSWERS = {"yes": "y", "no": "n"}


def answer_score(model, tokenizer, text: str) -> float:
    """Return the logit of answer "y" minus the logit of answer "n" of a language model."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    logits = model(input_ids=ids).logits[0, -1].detach()
    return float(logits[tokenizer("y")["input_ids"][0]] - logits[tokenizer("n")["input_ids"][0]])


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
@pytest.mark.parametrize("prompt", [None, PROMPT])
def test_language_model_score_is_logit_difference_of_answers(kind, prompt, tmp_path):
    changes = {"tie_word_embeddings": kind == "tied llama", "max_position_embeddings": 256}
    causal = tiny_gpt2() if kind == "gpt2" else tiny_llama(**changes)
    folder = save_model(causal, tmp_path / "model")
    if prompt is None and kind == "gpt2":
        (folder / "chat_template.jinja").unlink()
    tokenizer = byte_tokenizer()
    texts = [("a b", "c"), ("red {passage}", "it is {query} ☃")]
    rows = [{"query": query, "passage": passage, "label": 1} for query, passage in texts]
    data_file = write_rows(tmp_path / "rows.jsonl", rows)
    task, data = read(folder, data_file, template=prompt, **ANSWERS)
    loaded = load(str(folder), task="reranking", num_labels=1, precision="fp32", device="cpu", log=print)
    task.initialize_head(loaded.model, loaded.new_modules, ())
    question = "Query: {query}\n\nPassage: {passage}\n\nDoes the passage answer the query? Answer yes or no."
    chat = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    template = prompt or (f"{question}\n" if kind == "gpt2" else chat)
    batcher, _ = task.batcher(loaded.model, data.train, BatcherOptions("cpu"))
    objective = task.objective(loaded.model)
    with torch.no_grad(), task.model_context(loaded.model, batcher):
        batches = list(batcher.batches(data.train))
        scored = (pair for b in batches for pair in zip(b.examples, objective.predictions(b), strict=True))
        actual = {row.row: float(score) for row, score in scored}
    for number, (query, passage) in enumerate(texts, start=1):
        before, between, after = template.replace("{query}", "{passage}").split("{passage}")
        text = before + query + between + passage + after
        assert actual[number] == pytest.approx(answer_score(causal, tokenizer, text), rel=1e-4, abs=1e-4)


def test_answer_of_several_tokens_is_rejected(tmp_path):
    folder = save_model(tiny_llama(), tmp_path / "model")
    with pytest.raises(UserError, match="'yes' is 3 tokens"):
        open_run(str(folder), task="reranking", precision="fp32", device="cpu", log=lambda line: None)


def test_language_model_run_starts_from_its_answer_scores(settings, tmp_path):
    folder = save_model(tiny_llama(), tmp_path / "model")
    rows = [{"query": c, "passages": [c * 2, "no"], "labels": [1, 0]} for c in "abcdefgh"]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    changes = {"model": str(folder), "task": "reranking", "reranking": {"template": PROMPT, **ANSWERS}}
    changes["data"] = {"train": str(path), "eval": None}
    result = fit(settings(tmp_path / "run", **changes, train={"epochs": 4, "batch_size": 8, "learning_rate": 1e-3}))
    causal = tiny_llama()
    tokenizer = byte_tokenizer()
    expected = []
    for row in rows:
        texts = [PROMPT.replace("{query}", row["query"]).replace("{passage}", p) for p in row["passages"]]
        scores = torch.tensor([answer_score(causal, tokenizer, text) for text in texts])
        expected.append(-(torch.tensor([1.0, 0.0]).softmax(0) * scores.log_softmax(0)).sum())
    first, *_, last = losses(result.output)
    assert first == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4) and last < first
    run = open_on_cpu(result.output)
    assert prompt_of(run.task.tokenizer) == prompt_of(PairEncoder(run.task.tokenizer)._tokenizer) == PROMPT
    with run.base():  # its head also scores the answers
        base = run.score(run.task.read_file(str(path), run.config.data, None)[0]).evaluation
    assert base.metrics["loss"] == pytest.approx(first, rel=1e-4)


def test_long_passage_is_truncated_and_prompt_end_preserved():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = as_chat_template(PROMPT)
    encode = PairEncoder(tokenizer)
    (short, _), (long, _) = encode([("q", "p"), ("q", "p" * 50)], 30)
    assert tokenizer.decode(short) == "Q: q\nP: p\nfits:"
    assert len(long) == 30 and tokenizer.decode(long) == "Q: q\nP: " + "p" * 16 + "\nfits:"
    refusal(encode, [("q", "p")], 6, match=r"data\.max_length is 6")


@pytest.mark.parametrize("prompt", [PROMPT, 'say "{passage}"\\ {% if %} {{ 1 }} ☃\t{query}{query}'])
def test_prompt_as_chat_template_renders_same_text(prompt):
    tokenizer = byte_tokenizer()
    assert prompt_of(tokenizer) is None  # a general chat template, not a reranking prompt
    tokenizer.chat_template = as_chat_template(prompt)
    assert prompt_of(tokenizer) == prompt
    messages = [{"role": "query", "content": "<a>"}, {"role": "document", "content": "b\n"}]
    expected = prompt.replace("{query}", "<a>").replace("{passage}", "b\n")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_sentence_transformers_loads_adapter_and_merged_model(kind, encoder, settings, tmp_path):
    cross_encoder = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    rows = passage_lists()
    if kind == "decoder":
        rows = [{"query": c, "passages": [c * 2, "no such thing"], "labels": [1, 0]} for c in "abcdefgh"]
    folder = encoder if kind == "encoder" else save_model(tiny_llama(), tmp_path / "model")
    section = {} if kind == "encoder" else {"template": PROMPT, **ANSWERS}
    changes = {"model": str(folder), "task": "reranking", "reranking": section}
    changes["data"] = {"train": str(write_rows(tmp_path / "rows.jsonl", rows)), "eval": None}
    run = fit(settings(tmp_path / "run", **changes, train={"epochs": 2, "batch_size": 4})).output
    merge_run(run, tmp_path / "merged")
    opened_run = open_on_cpu(run)
    pairs = [(row["query"], passage) for row in rows for passage in row["passages"]]
    pairs.append(("a film", " ".join(WORDS * 9)))  # is truncated
    limit = json.loads((run / "sentence_bert_config.json").read_text())["max_seq_length"]
    assert limit == (64 if kind == "encoder" else 128)
    encoded = PairEncoder(opened_run.task.tokenizer)(pairs, limit)
    assert max(len(ids) for ids, _ in encoded) == limit
    examples = [LabeledExample(n, ids, 0.0, segments) for n, (ids, segments) in enumerate(encoded)]
    batcher = opened_run.batcher(examples)
    with opened_run.task.model_context(opened_run.model, batcher):
        scores = predict_rows(opened_run.task.objective(opened_run.model), examples, batcher)
    expected = torch.from_numpy(scores).sigmoid().numpy()
    assert expected.std() > 1e-5
    for saved_as in run, tmp_path / "merged":
        theirs = cross_encoder.CrossEncoder(str(saved_as), device="cpu")
        assert theirs.num_labels == 1
        np.testing.assert_allclose(theirs.predict(pairs), expected, rtol=1e-5, atol=1e-6)
    # The merged model is a base model with a head and a prompt.
    merged = task_of("reranking", str(tmp_path / "merged"), "fp32", section=RerankingSettings())
    assert merged.head_outputs == 1 and prompt_of(merged.tokenizer) == (PROMPT if kind == "decoder" else None)


def run_of(scorer: Path, kind: str, folder: Path, settings, dropout: float = 0.0, **train: object) -> dict:
    """Return settings of a run on lists of passages and write its rows next to its folder."""
    rows, eval_rows = (write_rows(folder.parent / f"{n}.jsonl", passage_lists(n)) for n in (11, 5))
    changes = {"model": str(scorer), "task": "reranking", "reranking": {"loss": kind}, "lora": {"dropout": dropout}}
    changes["data"] = {"train": str(rows), "eval": str(eval_rows)}
    return settings(folder, **changes, train={"batch_size": 5, "epochs": 2, "eval_every": 2, **train})


@pytest.mark.parametrize("kind", slow_except("contrastive", names=("listwise", "contrastive")))
def test_resumed_run_is_bit_identical(kind, scorer, settings, tmp_path):
    def make_config(folder: Path) -> dict:
        return run_of(scorer, kind, folder, settings, dropout=0.2, checkpoint_every=2)

    snapshots = Snapshots(tmp_path / "run", tmp_path, ["evaluation 4"])
    result = fit(make_config(tmp_path / "run"), callback=snapshots)
    (copy,) = snapshots.copies.values()
    assert fit(make_config(copy)).resumed_from_step in (2, 4)
    assert_equal_run(copy, result.output)
    summary = json.loads((result.output / "run.json").read_text())
    assert any(entry["command"].startswith("deltaw serve") for entry in summary["commands"])


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairwise", "listwise"])
def test_two_processes_match_one(kind, scorer, settings, tmp_path):
    single, several = (run_of(scorer, kind, tmp_path / n, settings, checkpoint_every=1) for n in ("one", "several"))
    assert_same_as_one_process(single, several, 2)
