"""Child processes of ``gpu_kit.py``: description of the card, model and rows with random values, and compared programs.

The job is a JSON object in the first argument. Results are lines "RESULT {…}", so that a killed process keeps those it
has printed. All sides load the same weights, LoRA factors and rows, so their losses agree step by step.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tests.fake_cuda
RANK = 16
ALPHA = 32
LEARNING_RATE = 1e-4
KINDS = ("equal lengths", "ragged lengths", "shared prefix")
# Number of untimed steps, for compilation and warm-up, and maximum number of timed steps.
WARM = 3
STEPS = 30
PEERS = ("flash-attn", "liger-kernel", "unsloth", "triton", "bitsandbytes")


def main() -> None:
    job = json.loads(sys.argv[1])
    if job["fake"]:
        from tests.fake_cuda import device

        device.install()
        if job.get("side") == "deltaw":
            device.disable_compiled_kernels()
    stage = {"describe": describe, "prepare": prepare, "measure": measure}[job["stage"]]
    stage(job, lambda result: print("RESULT " + json.dumps(result), flush=True))


def describe(job: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Describe the card, and list the model sizes that fit and the sides that can run."""
    import torch
    from machine import machine_lines
    from step_models import MODELS, config_of, parameter_count

    if not torch.cuda.is_available():
        emit({"error": f"no CUDA device was found by torch {torch.__version__} in {sys.executable}"})
        return
    total = torch.cuda.get_device_properties(0).total_memory
    fitting = [
        name for name in MODELS if name.startswith("llama") and _required(parameter_count(config_of(name))) < total
    ]
    sizes = ["tiny"] if job["fake"] else fitting or ["qwen2.5-0.5b"]
    found = {name: _installed(name) for name in ("peft", "flash_attn", "liger_kernel", "unsloth")}
    attention = "flash_attention_2" if found["flash_attn"] else "sdpa"
    sides = {"deltaw": {"side": "deltaw"}}
    peft = {"side": "peft", "attention": attention}
    small = {"bf16_factors": True}
    if found["peft"]:
        sides |= {f"PEFT, {attention}": peft, f"PEFT, {attention}, bf16 factors": peft | small}
    if found["peft"] and found["liger_kernel"]:
        sides[f"PEFT, Liger, {attention}, bf16 factors"] = peft | small | {"liger": True}
    if found["unsloth"]:
        sides["Unsloth"] = {"side": "unsloth"}
    missing = [name for name, is_installed in found.items() if not is_installed]
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    driver = (
        ""
        if job["fake"] or not shutil.which(query[0])
        else subprocess.run(query, capture_output=True, text=True).stdout
    )
    versions = [f"{name} {metadata.version(name)}" for name in PEERS if _installed(name.replace("-", "_"))]
    card = f"{total / 2**30:.0f} GiB; driver: {driver.strip() or 'unknown'}; CUDA {torch.version.cuda}"
    emit(
        {
            "machine": [*machine_lines(), "; ".join([card, *versions])],
            "sizes": sizes,
            "sides": sides,
            "missing": missing,
        }
    )


def _required(parameters: int) -> int:
    """Return the memory of a card on which all sides can train a model in bf16."""
    return 3 * parameters + 4 * 2**30


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# ---- model and rows


def prepare(job: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Write a model with random weights, LoRA factors with B ≠ 0, and rows of random tokens."""
    import torch
    from step_models import config_of, parameter_count
    from transformers import AutoModelForCausalLM, LlamaConfig

    import deltaw

    folder = Path(job["folder"])
    tiny = job["size"] == "tiny"
    if tiny:
        config: Any = LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
    else:
        config = config_of(job["size"])
    if shutil.disk_usage(folder.parent).free < 2.2 * parameter_count(config):
        emit({"error": f"not enough free space in {folder.parent}"})
        return
    config.eos_token_id = config.vocab_size - 1
    config.pad_token_id = config.vocab_size - 2
    config.bos_token_id = None
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    save_tokenizer(config.vocab_size, folder)
    deltaw.attach(model, deltaw.LoRAConfig(rank=RANK, alpha=ALPHA), seed=0)
    with torch.no_grad():
        for name, parameter in deltaw.adapter_parameters(model):
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02)
    deltaw.save_adapter(model, folder / "adapter", base_model=str(folder))
    for kind in KINDS:
        rows = make_rows(kind, config.vocab_size, *((4, 32) if tiny else (16, 512)))
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    emit({"parameters": parameter_count(config)})


def save_tokenizer(vocabulary: int, folder: Path) -> None:
    """Save a tokenizer whose tokens are the numbers 0, 1, … separated by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({str(token): token for token in range(vocabulary)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": str(vocabulary - 1), "pad_token": str(vocabulary - 2)}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def make_rows(kind: str, vocabulary: int, count: int, length: int) -> list[dict[str, str]]:
    """Return rows of at most ``length`` tokens including the end token. With a shared prefix, only the last quarter
    has labels.
    """
    generator = random.Random(0)

    def text(tokens: int) -> str:
        return " ".join(str(generator.randrange(vocabulary - 2)) for _ in range(tokens))

    if kind == "shared prefix":
        prompt = text(length * 3 // 4) + " "
        return [{"prompt": prompt, "completion": text(length // 4 - 1)} for _ in range(count)]
    shortest = length if kind == "equal lengths" else length // 8
    return [{"text": text(shortest + (length - shortest) * n // (count - 1) - 1)} for n in range(count)]


# ---- measurements


def measure(job: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Train with one side on each kind of rows and emit a result per kind."""
    if job["side"] == "unsloth":
        import unsloth  # noqa: F401  # patches transformers, so it must be imported first
    import torch

    model = None if job["side"] == "deltaw" else load_peer(job)
    for kind in KINDS:
        file = Path(job["folder"], f"{kind}.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        reset_memory()
        try:
            result = measure_deltaw(job, file, len(rows)) if model is None else measure_peer(model, job, rows)
        except Exception as error:  # such as insufficient memory; the other kinds may work
            result = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        else:
            seconds = statistics.median(result["seconds"][WARM:])
            memory = {
                "peak_bytes": torch.cuda.max_memory_allocated(),
                "reserved_bytes": torch.cuda.max_memory_reserved(),
            }
            result |= memory | {"rows_per_second": len(rows) / seconds}
        emit({"kind": kind, **result})


def reset_memory() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


class StepRecorder:
    """Records steps until the time is over, then profiles one more step.

    Attributes:
        counts: Launches and synchronizations of the profiled step, or None before it.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.is_fake = job["fake"]
        self.limit = job["seconds"]
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.counts: dict[str, int] | None = None
        self._profile: Any = None

    def add(self, seconds: float, loss: float) -> None:
        if self._profile is not None:
            self.counts = self._count()
            return
        self.seconds.append(seconds)
        self.losses.append(loss)
        timed = self.seconds[WARM:]
        if len(timed) == STEPS or (len(timed) > 1 and sum(timed) > self.limit):
            self._start()

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        if self.is_fake:
            from tests.fake_cuda.device import activity

            self._profile = activity()
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self._profile.start()

    def _count(self) -> dict[str, int]:
        if self.is_fake:
            from tests.fake_cuda.device import activity

            pairs = (
                (getattr(activity(), name), getattr(self._profile, name)) for name in ("launches", "synchronizations")
            )
            launches, synchronizations = ((after - before).total() for after, before in pairs)
        else:
            self._profile.stop()
            events = {event.key: event.count for event in self._profile.key_averages()}
            launches, synchronizations = (
                sum(count for key, count in events.items() if key.startswith("cu") and word in key)
                for word in ("Launch", "Synchronize")
            )
        return {"launches": launches, "synchronizations": synchronizations}

    def result(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "losses": self.losses, **(self.counts or {})}


def measure_deltaw(job: dict[str, Any], rows: Path, batch_size: int) -> dict[str, Any]:
    """Train as ``deltaw train`` does, with the settings that deltaw chooses."""
    import deltaw
    from deltaw.training.callbacks import FunctionCallback

    recorder = StepRecorder(job)
    lines = []
    folder = Path(job["folder"])
    settings = {
        "model": str(folder), "start_from": str(folder / "adapter"), "output": str(folder / "run"),
        "data": {"train": str(rows), "eval": None, "template": "plain"},
        "precision": "bf16", "device": "cuda",
        "train": {
            "max_steps": WARM + STEPS + 1, "batch_size": batch_size, "learning_rate": LEARNING_RATE, "warmup": 0,
            "schedule": "constant", "max_grad_norm": None, "drift": False, "samples": 0,
        },
    }  # fmt: skip
    callback = FunctionCallback(
        on_line=lines.append,
        on_step=lambda step: recorder.add(step.seconds, step.loss),
        should_finish=lambda: recorder.counts is not None,
    )
    result = deltaw.fit(settings, callback=callback, fresh=True)
    notes = [
        note
        for name, module in list(sys.modules.items())
        if name.startswith("deltaw.kernels.") and hasattr(module, "notes")
        for note in module.notes()
    ]
    plan = None if getattr(result.plan, "device", "cpu") == "cpu" else result.plan.peak_resident_bytes
    return recorder.result() | {"planned_bytes": plan, "notes": notes, "lines": list(dict.fromkeys(map(str, lines)))}


def load_peer(job: dict[str, Any]) -> Any:
    """Load the model of PEFT or Unsloth, with trainable LoRA factors."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig.from_pretrained(Path(job["folder"], "adapter"))
    config.inference_mode = False
    if job["side"] == "unsloth":
        from unsloth import FastLanguageModel

        options = {"max_seq_length": 2048, "dtype": torch.bfloat16, "load_in_4bit": False}
        model, _ = FastLanguageModel.from_pretrained(job["folder"], **options)
        options = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0, "use_gradient_checkpointing": False}
        return FastLanguageModel.get_peft_model(model, target_modules=sorted(config.target_modules), **options).train()
    if job.get("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_llama()
        apply_liger_kernel_to_qwen2()
    # Kernels of the hub would need a network.
    options = {"dtype": torch.bfloat16, "attn_implementation": job["attention"], "use_kernels": False}
    model = AutoModelForCausalLM.from_pretrained(job["folder"], **options).to("cuda")
    return get_peft_model(model, config, autocast_adapter_dtype=not job.get("bf16_factors")).train()


def measure_peer(model: Any, job: dict[str, Any], rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Train in the largest microbatches that fit."""
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    folder = Path(job["folder"])
    microbatch = len(rows)
    end = json.loads((folder / "config.json").read_text())["eos_token_id"]
    examples = sorted((example(row, end) for row in rows), key=lambda pair: len(pair[0]))
    flatten = job.get("attention") == "flash_attention_2"
    while True:
        set_peft_model_state_dict(model, load_file(folder / "adapter" / "adapter_model.safetensors"))
        recorder = StepRecorder(job)
        groups = [examples[n : n + microbatch] for n in range(0, len(examples), microbatch)]
        try:
            train_peer(model, [tensors(group, flatten=flatten) for group in groups], recorder)
            return recorder.result() | {"microbatch": microbatch}
        except torch.OutOfMemoryError:
            if microbatch == 1:
                raise
        microbatch //= 2
        model.zero_grad(set_to_none=True)
        reset_memory()


def train_peer(model: Any, batches: Sequence[dict[str, Any]], recorder: StepRecorder) -> None:
    """Train on the same batches in each step until the recorder has all steps."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = {"num_items_in_batch": labels} if len(batches) > 1 else {}
    while recorder.counts is None:
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses = []
        for batch in batches:
            loss = model(**batch, **total, use_cache=False).loss
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = float(torch.stack(losses).sum())  # waits for the device
        recorder.add(time.perf_counter() - start, loss)


def example(row: dict[str, str], end: int) -> tuple[list[int], int]:
    """Return a row's tokens with the end token, and its number of prompt tokens."""
    prompt = row.get("prompt", "")
    text = row.get("text") or row["completion"]
    return [*map(int, (prompt + text).split()), end], len(prompt.split())


def tensors(examples: Sequence[tuple[list[int], int]], *, flatten: bool) -> dict[str, Any]:
    """Return the inputs of a model: padded rows, or one row without padding for FlashAttention."""
    import torch

    length = max(len(tokens) for tokens, _ in examples)
    rows: list[tuple[list[int], list[int], list[int]]] = []
    for tokens, prompt in examples:
        padding = 0 if flatten else length - len(tokens)
        # The first token of a row has no label, because the model shifts labels.
        labels = [-100] * max(1, prompt) + tokens[max(1, prompt) :] + [-100] * padding
        rows.append((tokens + [0] * padding, labels, [1] * len(tokens) + [0] * padding))
    if flatten:
        ids, labels = ([[value for row in rows for value in row[part]]] for part in (0, 1))
        positions = [[n for tokens, _ in examples for n in range(len(tokens))]]
        inputs = {"input_ids": ids, "labels": labels, "position_ids": positions}
    else:
        names = ("input_ids", "labels", "attention_mask")
        inputs = {name: [row[part] for row in rows] for part, name in enumerate(names)}
        if all(map(all, inputs["attention_mask"])):
            del inputs["attention_mask"]
    return {name: torch.tensor(values, device="cuda") for name, values in inputs.items()}


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
