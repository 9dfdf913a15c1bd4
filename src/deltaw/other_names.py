"""Short names of settings, what other tools call our settings, flags, tasks and verbs, and what a name means.

The names are those of PEFT, TRL, transformers, Axolotl, Unsloth, LLaMA-Factory, torchtune, mlx-lm, vLLM and
OpenAI's API. It knows words only: the caller says which of our names exist where the word was written.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

# Flags that work as they are, beside the setting's own name.
SHORT = {
    "data.train": ("data",),
    "data.max_length": ("max-length",),
    "lora.rank": ("rank",),
    "lora.alpha": ("alpha",),
    "train.learning_rate": ("lr", "learning-rate"),
    "train.epochs": ("epochs",),
    "train.max_steps": ("max-steps",),
    "train.batch_size": ("batch-size",),
    "train.seed": ("seed",),
}
# Words for a task that are understood in its place: the task, and the loss of preferences that they say.
TASKS: dict[str, tuple[str, str | None]] = {
    **dict.fromkeys(("sft", "clm", "causal_lm", "instruction", "text-generation"), ("causal-lm", None)),
    **dict.fromkeys(("classification", "text-classification", "seq_cls"), ("sequence-classification", None)),
    **dict.fromkeys(("gkd", "distillation"), ("distill", None)),
    **dict.fromkeys(("reranker", "rerank", "cross-encoder", "cross_encoder"), ("reranking", None)),
    **{loss: ("preference", loss) for loss in ("dpo", "ipo", "orpo", "simpo", "kto")},
}
# Our verb: other words for it.
_VERBS = {
    "train": "finetune fine-tune fit sft dpo lora",
    "plan": "memory estimate dry-run vram",
    "eval": "evaluate test score benchmark",
    "generate": "run complete predict infer inference sample prompt ask",
    "chat": "talk interactive",
    "serve": "server api webui ui",
    "data check": "check validate lint",
    "data show": "show preview view tokenize",
    "data mine": "hard-negatives mine-hard-negatives negatives mining",
    "tune": "sweep search hpo optimize",
    "runs": "ls list history report",
    "inspect": "info describe",
    "merge": "fuse merge_and_unload",
    "export": "convert quantize gguf",
    "push": "upload publish push_to_hub",
    "deploy": "ollama lmstudio lm-studio",
    "doctor": "env diagnose",
    "init": "new create setup config configure wizard",
}
# Our setting, flag or argument, or a whole answer: other names for it, apart from "lora_" and "use_" before one.
# Behind a colon is what is different.
_NAMES = {
    "run": "adapter adapter_path adapter_name_or_path lora lora_path checkpoint run_dir run_name",
    "settings": "config config_file config_path cfg yaml c f file",
    "file": "config config_file data_file input",
    "model": "base base_model model_name model_name_or_path model_path model_id pretrained_model_name_or_path hf_model",
    "data.train": "dataset datasets dataset_name dataset_path data_path data_files train_file train_data train_dataset "
    "training_data training_file input",
    "data.eval: a file, a number of rows or a share": "eval val validation eval_file eval_data eval_dataset val_file "
    "val_data valid_data validation_file validation_split val_size val_set_size val_batches test_file test_size",
    "data.max_length": "max_seq_length max_seq_len max_sequence_length max_len max_tokens cutoff_len sequence_len "
    "seq_len seq_length model_max_length block_size context_length n_ctx",
    "data.rows": "max_samples max_train_samples num_samples limit",
    "data.columns: names by ours, as in {prompt: question}": "dataset_text_field text_column text_field prompt_column "
    "completion_column label_column",
    "data.labels": "train_on_inputs mask_prompt completion_only_loss assistant_only_loss train_on_responses_only",
    "method": "adapter finetuning_type fine_tune_type train_type peft_method",
    "lora.rank": "r rank lora_dim",
    "lora.alpha": "lora_scale",
    "lora.target_modules": "target target_linear modules targets",
    "lora.layers": "num_layers layers_to_transform",
    "lora.train_modules": "modules_to_save additional_target",
    "train.learning_rate": "learn_rate step_size",
    "train.b_rate": "loraplus_lr_ratio",
    "train.epochs": "num_train_epochs num_epochs n_epochs epoch max_epochs",
    "train.max_steps": "iters num_steps steps max_iters iterations num_train_steps total_steps",
    "train.batch_size: the rows of a whole optimizer step, accumulated over microbatches": "bs "
    "per_device_train_batch_size micro_batch_size global_batch_size train_batch_size per_device_batch_size "
    "gradient_accumulation_steps grad_accum accumulation_steps",
    "train.tokens_per_pass": "per_device_eval_batch_size eval_batch_size",
    "train.schedule": "lr_scheduler lr_scheduler_type scheduler lr_schedule",
    "train.warmup: steps, or below 1 a share of all": "warmup_steps warmup_ratio num_warmup_steps lr_warmup_steps",
    "train.betas": "adam_beta1 adam_beta2",
    "train.max_grad_norm": "grad_clip clip_grad_norm gradient_clipping gradient_clip_val",
    "train.checkpointing": "gradient_checkpointing grad_checkpoint activation_checkpointing",
    "train.sharding": "fsdp deepspeed",
    "train.eval_every": "eval_steps steps_per_eval evals_per_epoch eval_strategy evaluation_strategy",
    "train.checkpoint_every": "save_steps save_every save_strategy saves_per_epoch",
    "train.keep_checkpoints": "save_total_limit",
    "train.early_stopping": "early_stopping_patience patience",
    "train.adapter: best or last": "load_best_model_at_end",
    "train.seed": "random_state random_seed data_seed",
    "preference.loss": "loss_type pref_loss rl",
    "preference.beta": "dpo_beta pref_beta",
    "precision": "dtype torch_dtype compute_type quantization quantization_bit mixed_precision bits",
    "precision: nf4": "load_in_4bit qlora 4bit",
    "precision: int8": "load_in_8bit 8bit",
    "precision: bf16": "bf16 fp16 half",
    "threads": "num_threads num_workers cpus",
    "track": "report_to wandb wandb_project tensorboard logger",
    "output": "output_dir output_path out out_dir save_path save_dir adapter_path run_name o save",
    "resume": "resume_from_checkpoint resume_adapter_file checkpoint continue",
    "max_new_tokens": "max_tokens num_predict n_predict max_length max_completion_tokens",
    "prompt": "text input question message",
    "temperature": "temp",
    "system": "system_prompt",
    "adapter": "lora lora_modules modules adapter_path adapter_name_or_path",
    "api_key": "token key",
    "cache_memory": "gpu_memory_utilization kv_cache_memory",
    "type": "outtype quant quantization quantization_method q",
    "rows are always packed without padding": "packing sample_packing pad_to_sequence_len group_by_length",
    "the optimizer is always AdamW": "optim optimizer adam_epsilon",
    "attention and kernels are chosen by themselves: see 'deltaw doctor'": "flash_attention attn_implementation "
    "flash_attn xformers torch_compile liger_kernel",
    "every step is logged to metrics.jsonl in the run's folder": "logging_steps logging_dir steps_per_report",
    "an adapter is always trained; 'method' says of what kind": "peft lora do_train",
    "nothing is sent to a hub": "push_to_hub hub_model_id",
}
_VALUES = {
    "method qlora": "QLoRA is method: lora with precision: nf4",
    "method dora": "DoRA is method: lora with lora.dora: true",
    "method rslora": "rsLoRA is method: lora with lora.rslora: true",
    "task reward-model reward_model rm": "a reward model is task: sequence-classification with rows of two answers",
    "task grpo dapo rloo gspo cispo dr_grpo rl rlvr": "rewards are task: reward; reward.loss names the loss",
    "precision 4bit q4 int4 4": "4-bit weights are precision: nf4",
    "precision 8bit q8 fp8 8": "8-bit weights are precision: int8",
    "precision fp16 float16 half bfloat16 16": "16-bit weights are precision: bf16",
    "format ollama llama.cpp": "for Ollama and llama.cpp: gguf, or gguf-adapter for the adapter alone",
    "format safetensors hf transformers": "for transformers: 'deltaw merge', or the format peft",
    "data.long_rows truncate": "long_rows: cut truncates them",
    "data.bad_rows drop ignore": "bad_rows: skip leaves them out",
}


def plain(name: str) -> str:
    """A name as names are compared: without the dashes before it, with underscores and in lower case."""
    return name.lstrip("-").replace("-", "_").lower()


def value_hint(key: str, value: object) -> str | None:
    """What somebody means who gives a setting or a flag this value; None where nothing is known."""
    words = {told: about.split() for about, told in _VALUES.items()}
    return next((told for told, (of, *given) in words.items() if of == key and str(value).lower() in given), None)


def meaning(name: str, known: Mapping[str, str]) -> str | None:
    """What another tool's name, or a setting's without its section, stands for; None where nothing is known.

    Args:
        known: what exists there, with the way to write it.
    """
    leaf = plain(name).rpartition(".")[2]
    bare = leaf.removeprefix("lora_").removeprefix("use_")
    for ours, theirs in _NAMES.items():
        key, _, note = ours.partition(": ")
        if {leaf, bare} & set(theirs.split()) and (key in known or " " in key):
            return f"deltaw calls it {known[key]}" + (f" ({note})" if note else "") if key in known else ours
    for key, how in known.items():
        if {leaf, bare} & {plain(key).rpartition(".")[2], *map(plain, SHORT.get(key, ()))}:
            return f"deltaw calls it {how}"
    return None


def hint_for(name: str, known: Mapping[str, str]) -> str | None:
    """What to write instead of an unknown name: by its meaning, else the most similar; None if nothing is."""
    if found := meaning(name, known):
        return found
    spellings = {spelling: how for key, how in known.items() for spelling in _spellings(key)}
    near = difflib.get_close_matches(plain(name), spellings, n=3, cutoff=0.6)
    found_names = list(dict.fromkeys(spellings[spelling] for spelling in near))[:2]
    return f"did you mean {' or '.join(found_names)}?" if found_names else None


def verb_hint(name: str, verbs: Mapping[str, str]) -> str | None:
    """The verb that a word means, or the most similar ones."""
    for ours, theirs in _VERBS.items():
        if name.lower() in theirs.split():
            return f"did you mean 'deltaw {ours}'?"
    near = difflib.get_close_matches(name.lower(), verbs, n=2, cutoff=0.5)
    return "did you mean " + " or ".join(f"'deltaw {verb}'" for verb in near) + "?" if near else None


def _spellings(key: str) -> list[str]:
    """All ways to write a name: whole, without its section, short, and as other tools do."""
    theirs = [name for ours, names in _NAMES.items() if ours.partition(":")[0] == key for name in names.split()]
    return [plain(key), plain(key).rpartition(".")[2], *map(plain, SHORT.get(key, ())), *theirs]
