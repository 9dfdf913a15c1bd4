"""Fine-tuning on questions about images: rows per second, held-out loss and peak memory, compared with TRL.

    python benchmarks/vision.py MODEL TRAIN.jsonl TEST.jsonl [--rows 960] [--batch-sizes 16 32] [--repeats 3]

MODEL is a folder of a vision-language model with a ChatML template and the image token <image>, for example the output
of `deltaw merge runs/vision`. Rows have the columns image, prompt and completion. Both sides train LoRA of rank 16 on
the language model for one epoch, in their own processes, which alternate. deltaw's time includes the features of the
images, but not the first decoding while the rows are read. deltaw measures the held-out loss of each adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import print_machine
from sft_side import ALPHA, LEARNING_RATE, RANK, run_side, trl_arguments

from deltaw.machine.choices import choose_threads

SIDES = ("deltaw", "trl bf16", "trl fp32")
# Renders content parts like the template of the assembled model renders texts.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def deltaw_side(job: dict) -> dict:
    import deltaw
    from deltaw.training.features.images import RowImages

    compute = RowImages.compute
    image_seconds = [0.0]

    def timed(images: RowImages, *arguments: object) -> None:
        start = time.perf_counter()
        compute(images, *arguments)
        image_seconds[0] += time.perf_counter() - start

    RowImages.compute = timed
    config = {
        "model": job["model"],
        "data": {"train": job["rows"], "eval": None, "cache": False},
        "train": {"batch_size": job["batch_size"], "learning_rate": LEARNING_RATE, "warmup": 0, "drift": False},
        "lora": {"rank": RANK, "alpha": ALPHA},
        "output": job["output"],
    }
    deltaw.fit(config)
    result = json.loads((Path(job["output"]) / "run.json").read_text())["result"]
    seconds = result["seconds"] + image_seconds[0]
    planned = result["planned_memory_bytes"]
    return {"seconds": seconds, "image_seconds": image_seconds[0], "loss": result["train_loss"], "planned": planned}


def trl_side(job: dict) -> dict:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from datasets import Dataset, Image
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(job["threads"])
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[job["precision"]]
    model = AutoModelForImageTextToText.from_pretrained(job["model"], dtype=dtype)
    processor = AutoProcessor.from_pretrained(job["model"])
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATE
    lines = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    folder = Path(job["rows"]).parent
    parts = {
        "images": [[str(folder / line["image"])] for line in lines],
        "prompt": [[_turn("user", {"type": "image"}, _text(line["prompt"]))] for line in lines],
        "completion": [[_turn("assistant", _text(line["completion"]))] for line in lines],
    }
    rows = Dataset.from_dict(parts).cast_column("images", [Image()])
    settings = SFTConfig(**trl_arguments(job))
    targets = r".*(language_model|text_model).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=rows, processing_class=processor, peft_config=adapter
    )
    result = trainer.train()
    trainer.model.save_pretrained(job["output"])
    return {"seconds": result.metrics["train_runtime"], "loss": result.training_loss}


def _turn(role: str, *content: dict) -> dict:
    return {"role": role, "content": list(content)}


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train", type=Path, nargs="?")
    parser.add_argument("test", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=960)
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.train is None:  # a job of run_side
        measure_side(json.loads(Path(args.model).read_text()))
        return
    threads = choose_threads().value
    results = dict[str, list[dict]]()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        train, test = (
            shortened(file, count, work) for file, count in ((args.train, args.rows), (args.test, args.held_out))
        )
        job = {"model": args.model, "rows": str(train), "threads": threads}
        for repeat in range(args.repeats):
            for batch_size in args.batch_sizes:
                for name in args.sides:
                    output = str(work / f"{name}-{batch_size}-{repeat}".replace(" ", "-"))
                    precision = name.partition(" ")[2]
                    side = job | {"side": name, "batch_size": batch_size, "output": output, "precision": precision}
                    cache = f"{output}-cache"  # without stored features
                    result = run_side("vision.py", side, work, DELTAW_CACHE=cache)
                    result["held_out_loss"] = held_out_loss(output, args.model, test)
                    results.setdefault(f"{name}, {batch_size} rows a step", []).append(result)
                    print(f"{name} {batch_size}: {json.dumps(result)}", flush=True)
    print("| side | rows/s | peak | held-out loss |\n| --- | ---: | ---: | ---: |")
    for name, runs in results.items():
        rate, peak, loss = (statistics.median(r[k] for r in runs) for k in ("rate", "peak_bytes", "held_out_loss"))
        print(f"| {name} | {rate:.2f} | {peak / 1e6:,.0f} MB | {loss:.4f} |")
    print_machine(threads)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def shortened(file: Path, count: int, folder: Path) -> Path:
    """Write the first rows of a file, with absolute paths of their images, and return the new file."""
    rows = [json.loads(line) for line in file.read_text().splitlines()[:count]]
    lines = [json.dumps({**row, "image": str((file.parent / row["image"]).resolve())}) for row in rows]
    (folder / file.name).write_text("\n".join(lines) + "\n")
    return folder / file.name


def held_out_loss(adapter: str, model: str, test: Path) -> float:
    command = [sys.executable, "-m", "deltaw", "eval", adapter, "--model", model, "--data", str(test)]
    output = subprocess.run([*command, "--no-drift", "--json"], capture_output=True, text=True, check=True).stdout
    return json.loads(output)["eval"]["loss"]


def measure_side(job: dict) -> None:
    """Run a side in this process and print its results as JSON."""
    from deltaw.machine.memory import peak_resident_bytes

    count = len(Path(job["rows"]).read_text().splitlines())
    measured = deltaw_side(job) if job["side"] == "deltaw" else trl_side(job)
    measured |= {"rate": count / measured["seconds"], "peak_bytes": peak_resident_bytes()}
    print("RESULT " + json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
