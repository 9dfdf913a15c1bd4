"""A trained vision tower: loss, gradients and files equal those of transformers and PEFT on the complete model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from deltaw.data.example import Example
from deltaw.data.row_images import RowImage
from deltaw.hub.loading import load
from deltaw.lora import LoRAConfig, adapter_parameters, attach, save_adapter
from deltaw.lora.attachment import require_attachment
from deltaw.lora.complete_names import complete_names
from deltaw.lora.fingerprint import base_fingerprint
from deltaw.methods.base import INPUT_LAYER, VISION_TOWER
from deltaw.runtime.packed import packed_rows
from deltaw.runtime.recognition import blocks_of
from deltaw.runtime.widened import widened
from deltaw.training.batchers import BatcherOptions, choose_causal_batcher
from deltaw.training.causal_objective import CausalObjective
from deltaw.training.features.images import RowImages
from tests.lora.models import perturb, relative_error
from tests.vision_models import IMAGE_TOKEN, png, save_vision_model

PICTURES = [png((200, 30, 30)), png((30, 30, 200))]
# Tokens before and after an image, the image, and the number of labels at the end.
ROWS = [([1, 7], 0, [11, 23, 42, 5], 2), ([1, 7], 0, [11, 30, 31], 3), ([1, 7], 1, [11, 23, 42, 5], 2)]
TEXT = [1, 9, 10, 13]
LAYERS = ["q_proj", "v_proj", "fc1", "down_proj"]


class _Model:
    """A saved model with images, whose text view computes its vision tower.

    Args:
        trained: Trained parts, see :meth:`RowImages.attach`.
        precision: Precision of the text view and its vision tower.
        settings: Settings of the adapter.
    """

    def __init__(
        self, family: str, folder: Path, trained: list[str], *, precision: str = "fp32", **settings: object
    ) -> None:
        self.folder = save_vision_model(family, folder / "model")
        config, tokenizer = (auto.from_pretrained(self.folder) for auto in (AutoConfig, AutoTokenizer))
        self.images = RowImages(self.folder, config, tokenizer, precision)
        self.ids = [list(self.images.place(RowImage(picture, "row 1")).ids) for picture in PICTURES]
        options = {"precision": precision, "device": "cpu", "log": lambda line: None}
        self.view = load(str(self.folder), task="causal-lm", **options).model
        self.base = base_fingerprint(self.view)
        self.images.attach(self.view, trained, is_new=True)
        attach(self.view, LoRAConfig(rank=4, alpha=8, **settings), seed=0)
        perturb(self.view)
        save_adapter(self.view, folder / "adapter", base_model="base")
        complete = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32)
        self.theirs = PeftModel.from_pretrained(complete, folder / "adapter", is_trainable=True).eval()

    def our_loss(self) -> Tensor:
        rows = [([*before, *self.ids[image], *after], labels) for before, image, after, labels in ROWS] + [(TEXT, 3)]
        examples = [
            Example(n, np.array(ids, np.int32), np.arange(len(ids)) >= len(ids) - labels, labels, None)
            for n, (ids, labels) in enumerate(rows, start=1)
        ]
        batcher, _ = choose_causal_batcher(self.view, examples, BatcherOptions("cpu"))
        with packed_rows(self.view):
            return sum(map(CausalObjective(self.view), batcher.batches(examples)), torch.zeros(()))

    def their_loss(self) -> Tensor:
        total = torch.zeros(())
        for before, image, after, labels in [*ROWS, ([], None, TEXT, 3)]:
            inputs = {}
            count = 0
            if image is not None:
                inputs = self.images._processor.encode(RowImage(PICTURES[image], "").decoded())[1]
                count = 1
            ids = [*before, *[IMAGE_TOKEN] * (count and len(self.ids[image])), *after]
            inputs.pop("attention_mask", None)
            logits = self.theirs(input_ids=torch.tensor([ids]), **inputs).logits[0]
            wanted = torch.tensor(ids[-labels:])
            total = total + nn.functional.cross_entropy(logits[-labels - 1 : -1], wanted, reduction="sum")
        return total

    def check_gradients(self) -> set[str]:
        """Compare loss and gradients. Return the names of the trained parameters in the complete model."""
        ours = self.our_loss()
        theirs = self.their_loss()
        ours.backward()
        theirs.backward()
        assert relative_error(ours.detach(), theirs.detach()) <= 1e-5
        expected = {_plain(name): p.grad for name, p in self.theirs.named_parameters() if p.requires_grad}
        mapping = complete_names(self.view)
        actual = {mapping.to_complete(name): p.grad for name, p in adapter_parameters(self.view)}
        assert actual.keys() == expected.keys()
        for name, grad in actual.items():
            if grad is None:  # the image features do not depend on the last part of some towers
                assert expected[name] is None, name
                continue
            is_factor = name.endswith(("lora_A", "lora_B"))
            assert relative_error(grad.t() if is_factor else grad, expected[name]) <= 2e-5, name
        return {*actual}


def _plain(name: str) -> str:
    """Return deltaw's name of a parameter of PEFT."""
    for part in ("base_model.model.", "modules_to_save.default.", ".default.weight"):
        name = name.replace(part, "")
    return name


@pytest.mark.parametrize("family", ["llava", "idefics3", "llava_next", "llava_onevision"])
def test_gradients_of_tower_match_peft(family, tmp_path):
    model = _Model(family, tmp_path, [VISION_TOWER], target_modules=LAYERS)
    names = model.check_gradients()
    assert any("vision" in name and "fc1" in name for name in names) and any("down_proj" in name for name in names)
    assert blocks_of(model.view)[0] == "model.layers"
    assert require_attachment(model.view).fingerprint == model.base


@pytest.mark.parametrize("family", ["llava", "idefics3", "llava_onevision"])
def test_gradients_of_tower_with_trained_connector_match_peft(family, tmp_path):
    connector = {"idefics3": "proj"}.get(family, "multi_modal_projector")
    settings = {"target_modules": LAYERS, "train_modules": [connector]}
    names = _Model(family, tmp_path, [VISION_TOWER, connector], **settings).check_gradients()
    assert any(f".{connector}." in name for name in names) and any("vision" in name for name in names)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_gradients_of_connector_with_line_breaks_match_peft(family, tmp_path):
    settings = {"target_modules": ["q_proj"], "train_modules": ["multi_modal_projector"]}
    names = _Model(family, tmp_path, [INPUT_LAYER], **settings).check_gradients()
    assert any("linear_1" in name for name in names) and not any("vision_tower" in name for name in names)


@pytest.mark.parametrize("part", [VISION_TOWER, INPUT_LAYER])
def test_bf16_model_with_images_computes_in_fp32(part, tmp_path):
    settings = {"target_modules": ["q_proj", "down_proj"], "train_modules": ["multi_modal_projector"]}
    model = _Model("llava", tmp_path, [part, "multi_modal_projector"], precision="bf16", **settings)
    with widened(model.view):
        loss = model.our_loss()
        loss.backward()
    assert relative_error(loss.detach(), model.their_loss().detach()) <= 1e-2
    assert all(p.grad is not None for name, p in adapter_parameters(model.view) if "projector" in name)
