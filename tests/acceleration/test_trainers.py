"""Accelerated trainers of transformers, TRL and sentence-transformers: equal losses in each step."""

from __future__ import annotations

import importlib
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import deltaw
from tests.acceleration.batches import fill_factors

trl = pytest.importorskip("trl", reason="trl is not installed")

# Versions of TRL without a fused head compute logits, also without gradient.
HAS_FUSED_HEAD = any("fused_lm_head" in file.read_text() for file in Path(trl.__file__).parent.glob("**/*.py"))

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "box",
    "five",
]
# Losses of steps differ by rounding, which the optimizer increases in each step.
TOLERANCE = 1e-4


def sentence(generator: random.Random, low: int, high: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(low, high)))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    names = ["<pad>", "<unk>", "<s>", "</s>", *WORDS]
    words = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def llama(auto: Any = AutoModelForCausalLM, **settings: Any) -> Any:
    """Return a tiny model for a task."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **settings},
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return auto.from_config(config)


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    """Return arguments of a trainer that logs each of three steps."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "seed": 0,
        "bf16": False,
        "gradient_checkpointing": False,
        **settings,
    }


def rows(kind: str) -> Dataset:
    generator = random.Random(0)
    instruction = sentence(generator, 12, 12)
    examples: list[dict[str, Any]] = []
    for _ in range(24):
        prompt = f"{instruction} {sentence(generator, 2, 8)}"
        answers = [" " + sentence(generator, 2, 9) for _ in range(2)]
        match kind:
            case "sft":
                examples.append({"prompt": prompt, "completion": answers[0]})
            case "pairs":
                examples.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
            case "prompts":
                examples.append({"prompt": prompt})
    return Dataset.from_list(examples)


LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def make_trainer(kind: str, tokenizer: PreTrainedTokenizerFast, folder: Path, **settings: Any) -> Any:
    """Return a trainer of a kind with a new model."""
    common = arguments(folder, **settings)
    lora = LoraConfig(**LORA, task_type="CAUSAL_LM")
    shared = {"processing_class": tokenizer, "peft_config": lora}
    match kind:
        case "sft":
            return trl.SFTTrainer(llama(), args=trl.SFTConfig(**common), train_dataset=rows("sft"), **shared)
        case "dpo":
            return trl.DPOTrainer(llama(), args=trl.DPOConfig(**common), train_dataset=rows("pairs"), **shared)
        case "reward":
            shared["peft_config"] = LoraConfig(**LORA, task_type="SEQ_CLS")
            model = llama(AutoModelForSequenceClassification, num_labels=1)
            return trl.RewardTrainer(model, args=trl.RewardConfig(**common), train_dataset=rows("pairs"), **shared)
        case "grpo":
            settings = {**common, "num_generations": 4, "max_completion_length": 8}
            config = trl.GRPOConfig(**settings)
            return trl.GRPOTrainer(llama(), _length, args=config, train_dataset=rows("prompts"), **shared)
        case "causal":
            texts = [tokenizer(row["prompt"] + row["completion"]).input_ids for row in rows("sft")]
            data = [{"input_ids": ids, "labels": [-100] * 5 + ids[5:]} for ids in texts]
            return Trainer(llama(), TrainingArguments(**common), DataCollatorForSeq2Seq(tokenizer), data)
        case _:
            texts = [tokenizer(row["prompt"]).input_ids for row in rows("prompts")]
            data = [{"input_ids": ids, "label": n % 3} for n, ids in enumerate(texts)]
            model = llama(AutoModelForSequenceClassification, num_labels=3)
            return Trainer(model, TrainingArguments(**common), DataCollatorWithPadding(tokenizer), data)


def _length(completions: list[str], **columns: object) -> list[float]:
    return [float(len(completion)) for completion in completions]


def history(trainer: Any) -> list[dict[str, float]]:
    """Train, and return the logged values of each step without times."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        trainer.train()
    timed = ("runtime", "per_second", "step_time", "total_flos", "train_loss")
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in steps]


def assert_equal(computed: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(expected) == 3
    for step, reference in zip(computed, expected, strict=True):
        assert step.keys() == reference.keys()
        for name, value in reference.items():
            assert step[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), name


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward", "grpo", "causal", "classification"])
def test_trainer_logs_the_same_values(kind, tokenizer, tmp_path):
    expected = history(make_trainer(kind, tokenizer, tmp_path))
    trainer = make_trainer(kind, tokenizer, tmp_path)
    report = deltaw.accelerate(trainer)
    if kind == "grpo":  # samples of transformers have other random numbers
        vars(trainer.model.get_base_model()).pop("generate")
    assert_equal(history(trainer), expected)
    assert "blocks" in report.parts and not report.refused
    of_generation = ("cache", "keys and values")
    assert not [reason for reason in report.fallbacks if not any(word in reason for word in of_generation)]


@pytest.mark.parametrize(
    "settings",
    [
        {"padding_free": True, "max_length": None},
        {"packing": True, "max_length": 64},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"loss_type": "dft"},
        {"assistant_only_loss": False, "completion_only_loss": False},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5},
    ],
    ids=str,
)
def test_options_of_sft_are_kept(settings, tokenizer, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = history(make_trainer("sft", tokenizer, tmp_path, **settings))
        trainer = make_trainer("sft", tokenizer, tmp_path, **settings)
        deltaw.accelerate(trainer)
        assert_equal(history(trainer), expected)


def test_own_loss_is_left_alone_and_label_smoothing_reads_logits(tokenizer, tmp_path):
    class OwnLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **options):
            outputs = model(**inputs)
            loss = outputs.logits.float().logsumexp(-1).mean()
            return (loss, outputs) if return_outputs else loss

    def make(kind: type[Trainer], **settings: Any) -> Trainer:
        base = make_trainer("causal", tokenizer, tmp_path)
        options = TrainingArguments(**arguments(tmp_path, **settings))
        return kind(llama(), options, base.data_collator, base.train_dataset)

    for kind, settings in ((OwnLoss, {}), (Trainer, {"label_smoothing_factor": 0.1})):
        expected = history(make(kind, **settings))
        trainer = make(kind, **settings)
        report = deltaw.accelerate(trainer)
        assert_equal(history(trainer), expected)
        assert ("trainer" in report.refused) is (kind is OwnLoss)
        assert ("backbone" in report.parts) is (kind is Trainer)


def test_checkpoint_of_an_accelerated_trainer_resumes_without_acceleration(tokenizer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    expected = history(make_trainer("sft", tokenizer, tmp_path / "plain"))
    trainer = make_trainer("sft", tokenizer, tmp_path / "run", **settings)
    deltaw.accelerate(trainer)
    assert_equal(history(trainer), expected)
    resumed = make_trainer("sft", tokenizer, tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    last = [entry for entry in resumed.state.log_history if "loss" in entry][-1]
    assert last["loss"] == pytest.approx(expected[-1]["loss"], rel=TOLERANCE)


def test_evaluation_of_a_trainer_is_equal(tokenizer, tmp_path):
    trainer = make_trainer("causal", tokenizer, tmp_path)
    trainer.compute_metrics = lambda prediction: {"mean": float(prediction.predictions[:, :4].mean())}
    expected = trainer.evaluate(trainer.train_dataset)
    deltaw.accelerate(trainer)
    computed = trainer.evaluate(trainer.train_dataset)
    for name in ("eval_loss", "eval_mean"):
        assert computed[name] == pytest.approx(expected[name], rel=TOLERANCE)


@pytest.mark.skipif(not HAS_FUSED_HEAD, reason="this version of TRL has no fused head")
def test_entropy_without_gradient_fails_instead_of_training_without_it(tokenizer, tmp_path):
    trainer = make_trainer("sft", tokenizer, tmp_path)
    deltaw.accelerate(trainer)
    trainer.model.train()
    fill_factors(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    outputs = trainer.model(**batch, use_cache=False, fused_lm_head=True)
    with pytest.raises(RuntimeError, match="entropy"):
        (outputs.log_probs.sum() + outputs.entropy.sum()).backward()


def test_reference_model_is_accelerated_and_restored(tokenizer, tmp_path):
    common = arguments(tmp_path)
    shared = {"processing_class": tokenizer, "train_dataset": rows("pairs")}
    trainer = trl.DPOTrainer(llama(), llama(), args=trl.DPOConfig(**common), **shared)
    deltaw.accelerate(trainer)
    assert "forward" in vars(trainer.ref_model.model)
    deltaw.restore(trainer)
    assert "forward" not in vars(trainer.ref_model.model) and "forward" not in vars(trainer.model.model)


def sentence_trainer(kind: str, folder: Path, dropout: float) -> Any:
    """Return a trainer of sentence-transformers for a BERT model, for embeddings or as a cross-encoder."""
    reason = "sentence-transformers is not installed"
    library = pytest.importorskip("sentence_transformers", reason=reason)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    BertModel(BertConfig(vocab_size=20, **sizes, **rates)).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    generator = random.Random(0)
    pairs = [{"anchor": sentence(generator, 2, 20), "positive": sentence(generator, 2, 20)} for _ in range(24)]
    settings = arguments(folder / "run", learning_rate=1e-4)
    del settings["gradient_checkpointing"]
    if kind == "embedding":
        model = library.SentenceTransformer(str(folder), device="cpu")
        options = library.SentenceTransformerTrainingArguments(**settings)
        loss = importlib.import_module("sentence_transformers.losses").MultipleNegativesRankingLoss(model)
        data = Dataset.from_list(pairs)
        return library.SentenceTransformerTrainer(model=model, args=options, train_dataset=data, loss=loss)
    cross_encoder = importlib.import_module("sentence_transformers.cross_encoder")
    model = library.CrossEncoder(str(folder), num_labels=1, device="cpu")
    options = cross_encoder.CrossEncoderTrainingArguments(**settings)
    loss = importlib.import_module("sentence_transformers.cross_encoder.losses").BinaryCrossEntropyLoss(model)
    data = Dataset.from_list([{**pair, "label": float(n % 2)} for n, pair in enumerate(pairs)])
    return cross_encoder.CrossEncoderTrainer(model=model, args=options, train_dataset=data, loss=loss)


@pytest.mark.parametrize("kind", ["embedding", "cross-encoder"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_sentence_transformers_log_the_same_loss(kind, dropout, tmp_path):
    expected = history(sentence_trainer(kind, tmp_path, dropout))
    trainer = sentence_trainer(kind, tmp_path, dropout)
    report = deltaw.accelerate(trainer)
    computed = history(trainer)
    assert not report.fallbacks
    if dropout == 0.0:
        assert_equal(computed, expected)
    else:  # other random numbers
        assert computed != expected and computed[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.2)
