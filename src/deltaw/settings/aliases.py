"""Aliases of settings, flags, tasks and commands: short flags, names from other tools, and hints for common values.

Other tools are PEFT, TRL, transformers, Axolotl, Unsloth, LLaMA-Factory, torchtune, mlx-lm, vLLM and OpenAI's API.
Callers pass the canonical names that are valid in their context.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

# Short flags that are accepted in addition to the full name of the setting.
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
    "start_from": ("start-from",),
}
# Command: aliases that are suggested as that command.
_COMMANDS = {
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
# Setting, flag or argument, or a complete sentence: names in other tools, without the prefixes "lora_" and "use_".
# The text after the colon is appended to the hint as a note.
_NAMES = {
    "run": "adapter adapter_path adapter_name_or_path lora lora_path checkpoint run_dir run_name",
    "settings": "config config_file config_path cfg yaml c f file",
    "file": "config config_file data_file input",
    "model": "base base_model model_name model_name_or_path model_path model_id pretrained_model_name_or_path hf_model",
    "data.train": "dataset datasets dataset_name dataset_path data_path data_files train_file train_data train_dataset "
    "training_data training_file input",
    "data.eval: a file, a row count or a fraction": "eval val validation eval_file eval_data eval_dataset val_file "
    "val_data valid_data validation_file validation_split val_size val_set_size val_batches test_file test_size",
    "data.max_length": "max_seq_length max_seq_len max_sequence_length max_len max_tokens cutoff_len sequence_len "
    "seq_len seq_length model_max_length block_size context_length n_ctx",
    "data.rows": "max_samples max_train_samples num_samples limit",
    "data.columns: deltaw's names mapped to yours, as in {prompt: question}": "dataset_text_field text_column "
    "text_field prompt_column completion_column label_column",
    "data.labels": "train_on_inputs train_on_prompt mask_prompt completion_only_loss assistant_only_loss "
    "train_on_responses_only",
    "method": "adapter finetuning_type fine_tune_type train_type peft_method",
    "lora.rank": "r rank lora_dim",
    "lora.alpha": "lora_scale",
    "lora.target_modules": "target target_linear modules targets",
    "lora.layers": "num_layers layers_to_transform",
    "lora.rslora": "peft_use_rslora",
    "lora.dora": "peft_use_dora",
    "lora.train_modules": "modules_to_save additional_target",
    "train.learning_rate": "learn_rate step_size",
    "train.epochs": "num_train_epochs num_epochs n_epochs epoch max_epochs",
    "train.max_steps": "iters num_steps steps max_iters iterations num_train_steps total_steps",
    "train.batch_size: rows per optimizer step, accumulated over microbatches": "bs "
    "per_device_train_batch_size micro_batch_size global_batch_size train_batch_size per_device_batch_size "
    "gradient_accumulation_steps grad_accum accumulation_steps",
    "train.tokens_per_pass": "per_device_eval_batch_size eval_batch_size",
    "train.schedule": "lr_scheduler lr_scheduler_type scheduler lr_schedule",
    "train.warmup: steps, or below 1 a fraction of all": "warmup_steps warmup_ratio num_warmup_steps lr_warmup_steps",
    "train.betas": "adam_beta1 adam_beta2",
    "train.max_grad_norm": "grad_clip clip_grad_norm gradient_clipping gradient_clip_val",
    "train.checkpointing": "gradient_checkpointing grad_checkpoint activation_checkpointing",
    "train.sharding": "fsdp deepspeed",
    "train.eval_every": "eval_steps steps_per_eval evals_per_epoch eval_strategy evaluation_strategy",
    "train.checkpoint_every": "save_steps save_every save_strategy saves_per_epoch",
    "train.keep_checkpoints": "save_total_limit",
    "train.early_stopping": "early_stopping_patience patience",
    "train.saved_adapter: best or last": "load_best_model_at_end",
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
    "attention and kernels are selected automatically: see 'deltaw doctor'": "flash_attention attn_implementation "
    "flash_attn xformers torch_compile liger_kernel",
    "every step is logged to metrics.jsonl in the run's folder": "logging_steps logging_dir steps_per_report",
    "deltaw always trains an adapter; set its type with 'method'": "peft lora do_train",
    "training does not upload to a hub: use 'deltaw push'": "push_to_hub hub_model_id",
}
_VALUES = {
    "method qlora": "QLoRA is method: lora with precision: nf4",
    "method dora": "DoRA is method: lora with lora.dora: true",
    "method rslora": "rsLoRA is method: lora with lora.rslora: true",
    "task reward-model reward_model rm": "a reward model is task: sequence-classification with rows of two answers",
    "task dapo rloo gspo cispo dr_grpo rlvr": "use task: rl; reward.loss names the loss",
    "precision 4bit q4 int4 4": "4-bit weights are precision: nf4",
    "precision 8bit q8 fp8 8": "8-bit weights are precision: int8",
    "precision half bfloat16 16": "16-bit weights are precision: bf16",
    "precision float16": "fp16 weights are precision: fp16, for GPUs without bf16",
    "format ollama llama.cpp": "for Ollama and llama.cpp: gguf, or gguf-adapter for only the adapter",
    "format safetensors hf transformers": "for transformers: 'deltaw merge', or the format peft",
    "data.long_rows truncate": "long_rows: cut truncates them",
    "data.bad_rows drop ignore": "bad_rows: skip drops them",
}


def normalize(name: str) -> str:
    """Return a name in canonical form for comparison: lower case, underscores, no leading dashes."""
    return name.lstrip("-").replace("-", "_").lower()


def value_hint(key: str, value: object) -> str | None:
    """Return a hint for a value that is valid in another tool, or None."""
    hints = {hint: pattern.split() for pattern, hint in _VALUES.items()}
    return next((hint for hint, (name, *values) in hints.items() if name == key and str(value).lower() in values), None)


def alias_hint(name: str, spellings: Mapping[str, str]) -> str | None:
    """Return a hint that maps a name to the canonical name, or None if the name is unknown.

    Args:
        name: Name from another tool, or a setting without its section.
        spellings: Canonical names that are valid in this context, mapped to their spelling.
    """
    leaf = normalize(name).rpartition(".")[2]
    bare = leaf.removeprefix("lora_").removeprefix("use_")
    for entry, alternatives in _NAMES.items():
        key, _, note = entry.partition(": ")
        if {leaf, bare} & set(alternatives.split()) and (key in spellings or " " in key):
            return f"deltaw calls it {spellings[key]}" + (f" ({note})" if note else "") if key in spellings else entry
    for key, spelling in spellings.items():
        if {leaf, bare} & {normalize(key).rpartition(".")[2], *map(normalize, SHORT.get(key, ()))}:
            return f"deltaw calls it {spelling}"
    return None


def unknown_name_hint(name: str, names: Mapping[str, str]) -> str | None:
    """Return a hint for an unknown name: its canonical name or the most similar names, or None."""
    if hint := alias_hint(name, names):
        return hint
    spellings = {spelling: name_to_write for key, name_to_write in names.items() for spelling in _spellings(key)}
    matches = difflib.get_close_matches(normalize(name), spellings, n=3, cutoff=0.6)
    suggestions = list(dict.fromkeys(spellings[spelling] for spelling in matches))[:2]
    return f"did you mean {' or '.join(suggestions)}?" if suggestions else None


def command_hint(name: str, commands: Mapping[str, str]) -> str | None:
    """Return a hint for an unknown command: the command that an alias refers to, or the most similar ones."""
    for command, words in _COMMANDS.items():
        if name.lower() in words.split():
            return f"did you mean 'deltaw {command}'?"
    matches = difflib.get_close_matches(name.lower(), commands, n=2, cutoff=0.5)
    return "did you mean " + " or ".join(f"'deltaw {match}'" for match in matches) + "?" if matches else None


def _spellings(key: str) -> list[str]:
    """Return all normalized spellings of a name: with and without section, short flags, and names in other tools."""
    alternatives = [name for entry, names in _NAMES.items() if entry.partition(":")[0] == key for name in names.split()]
    return [normalize(key), normalize(key).rpartition(".")[2], *map(normalize, SHORT.get(key, ())), *alternatives]
