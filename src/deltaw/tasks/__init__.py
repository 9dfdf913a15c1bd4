"""Training tasks: one package per task, with its settings, rows, objective, losses and evaluation.

Importing this package registers the built-in tasks without importing their implementations.
"""

from __future__ import annotations

from functools import partial

from deltaw.settings import row_kinds
from deltaw.settings.task_registry import TaskEntry, register
from deltaw.tasks.distill.settings import DistillSettings
from deltaw.tasks.embedding.settings import EmbeddingSettings
from deltaw.tasks.preference.settings import PreferenceSettings
from deltaw.tasks.reranking.settings import RerankingSettings
from deltaw.tasks.reward.settings import RewardSettings

_CLASSES = "AutoModelForSequenceClassification"
_PROMPTED = (*row_kinds.PROMPTED_FORMATS, row_kinds.PROMPTS)


_text_task = partial(TaskEntry, auto_model="AutoModelForCausalLM", capability="generate text", peft_type="CAUSAL_LM")
_label_task = partial(
    TaskEntry,
    implementation="deltaw.tasks.classification.task:LabelTask",
    new_head=True,
    starter="deltaw.tasks.classification.rows:LabelStarter",
    inference="deltaw.tasks.classification.inference:LabelInference",
)


def _aliases(*names: str) -> dict[str, dict[str, str]]:
    return {name: {} for name in names}


for _entry in (
    _text_task(
        "causal-lm",
        "deltaw.tasks.language.task:CausalTask",
        row_kinds=(*row_kinds.PROMPTED_FORMATS, row_kinds.PLAIN_TEXT),
        aliases=_aliases("sft", "clm", "causal_lm", "instruction", "text-generation"),
        pipeline="text-generation",
        goal="generate text",
        supports_sharding=True,
        trains_on_answers=True,
    ),
    _text_task(
        "preference",
        "deltaw.tasks.preference.task:PreferenceTask",
        settings=PreferenceSettings,
        description="preference loss, for task: preference",
        row_kinds=(row_kinds.ANSWER_PAIRS, row_kinds.SINGLE_ANSWERS),
        aliases={loss: {"loss": loss} for loss in ("dpo", "ipo", "orpo", "simpo", "kto")},
        pipeline="text-generation",
        goal="prefer one of two answers",
        starter="deltaw.tasks.preference.rows:PreferenceStarter",
        scores_against_base=True,
    ),
    _text_task(
        "rl",
        "deltaw.tasks.reward.task:RewardTask",
        settings=RewardSettings,
        section="reward",
        description="rewards of the model's own completions, for task: rl",
        row_kinds=_PROMPTED,
        aliases=_aliases("reward", "grpo"),
        supports_range_test=False,
        goal="maximize reward functions",
        starter="deltaw.tasks.reward.task:RewardStarter",
        inference="deltaw.tasks.reward.inference:RewardInference",
    ),
    _text_task(
        "distill",
        "deltaw.tasks.distill.task:DistillTask",
        settings=DistillSettings,
        description="teachers and distillation loss, for task: distill",
        row_kinds=_PROMPTED,
        aliases=_aliases("gkd", "distillation"),
        supports_range_test=False,
        goal="imitate a teacher",
        starter="deltaw.tasks.distill.rows:DistillStarter",
    ),
    _label_task(
        "sequence-classification",
        auto_model=_CLASSES,
        capability="classify text",
        peft_type="SEQ_CLS",
        row_kinds=(*row_kinds.LABELED_ROWS, row_kinds.ANSWER_PAIRS),
        aliases=_aliases("classification", "text-classification", "seq_cls"),
        pipeline="text-classification",
        serves="classes",
    ),
    _label_task(
        "regression",
        auto_model=_CLASSES,
        capability="score text",
        config={"problem_type": "regression"},
        row_kinds=row_kinds.LABELED_ROWS,
        serves="numbers",
    ),
    _label_task(
        "image-classification",
        auto_model="AutoModelForImageClassification",
        capability="classify images",
        row_kinds=(row_kinds.LABELED_IMAGES,),
        pipeline="image-classification",
    ),
    TaskEntry(
        "embedding",
        "deltaw.tasks.embedding.task:EmbeddingTask",
        "AutoModel",
        "embed text",
        peft_type="FEATURE_EXTRACTION",
        settings=EmbeddingSettings,
        description="text embeddings and their loss, for task: embedding",
        row_kinds=(row_kinds.PASSAGE_SEARCH, row_kinds.SCORED_PAIRS, row_kinds.TEXT_CLASSES, row_kinds.GRADED_PASSAGES),
        layout_use="vectors",
        starter="deltaw.tasks.embedding.rows:EmbeddingStarter",
        inference="deltaw.tasks.embedding.inference:EmbeddingInference",
        serves="vectors",
    ),
    TaskEntry(
        "reranking",
        "deltaw.tasks.reranking.task:RerankingTask",
        _CLASSES,
        "score passages",
        new_head=True,
        outputs=1,
        config={"num_labels": 1},
        peft_type="SEQ_CLS",
        settings=RerankingSettings,
        description="passage scores and their loss, for task: reranking",
        row_kinds=(row_kinds.GRADED_PASSAGES,),
        aliases=_aliases("reranker", "rerank", "cross-encoder", "cross_encoder"),
        pipeline="text-ranking",
        starter="deltaw.tasks.reranking.rows:RerankStarter",
        inference="deltaw.tasks.reranking.inference:RerankingInference",
        serves="scores",
    ),
    TaskEntry("features", None, "AutoModel", "compute features"),
):
    register(_entry)
