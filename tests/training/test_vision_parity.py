"""Loss and gradients of rows with images equal those of the complete model in transformers and PEFT."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from deltaw.data.example import Example
from deltaw.hub.mrope import image_grids
from deltaw.hub.vision import text_view
from deltaw.lora import LoRAConfig, attach
from deltaw.lora.complete_names import complete_names
from deltaw.runtime.image_tokens import image_embeddings
from deltaw.runtime.packed import packed_rows
from deltaw.runtime.padded import padded_rows
from deltaw.training.batchers import BatcherOptions, choose_causal_batcher
from deltaw.training.causal_objective import CausalObjective
from tests.hub.test_vision import CAUSAL
from tests.lora.models import copy_to_peft, factor_pairs, ours_as_peft, randomise, relative_error, with_peft
from tests.vision_models import FAMILIES, IMAGE_TOKEN, token_kinds, vision_model

# Rows as text tokens, with "0" and "1" for the two images, and the number of labels at the end.
ROWS = [
    ([1, 7, "0", 11, 23, 42, 5], 2),
    ([1, 7, "0", 11, 30, 31], 3),  # shares its prefix with the row before
    ([1, 7, "1", 11, 23, 42, 5], 2),  # the same text about another image
    (["0", 12, "1", 13, 14, 15], 2),
    ([1, 9, 10, 13], 3),
]


def _image(family: str, seed: int) -> dict[str, Tensor]:
    inputs = dict(FAMILIES[family].inputs())
    inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(seed))
    return inputs


def _joined(family: str, images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the inputs of several images of one row, as processors join them."""
    dim = 1 if family in ("smolvlm", "idefics3") else 0
    return {key: torch.cat([image[key] for image in images], dim if key == "pixel_values" else 0) for key in images[0]}


@pytest.mark.parametrize("family", CAUSAL)
def test_loss_and_gradients_match_peft(family):
    complete = vision_model(family)
    count = FAMILIES[family].tokens
    images = [_image(family, seed) for seed in (3, 4)]
    parts = text_view(copy.deepcopy(complete))
    features = [torch.cat(parts.features(image)) for image in images]
    assert [len(part) for part in features] == [count, count] and not torch.equal(*features)
    attach(parts.view, LoRAConfig(rank=4, alpha=8))
    randomise(parts.view)
    targets = rf"{parts.prefix}\..*\.({'|'.join(_adapted(parts.view))})"
    theirs = with_peft(complete, r=4, lora_alpha=8, target_modules=targets).eval()
    view = _Renamed(parts)
    copy_to_peft(view, theirs)

    expected = torch.zeros(())
    for tokens, labels in ROWS:
        ids = [token for part in tokens for token in ([IMAGE_TOKEN] * count if isinstance(part, str) else [part])]
        used = [images[int(part)] for part in tokens if isinstance(part, str)]
        inputs = _joined(family, used) if used else {}
        row = torch.tensor([ids])
        kinds = token_kinds(complete, row) if used else {}
        logits = theirs(input_ids=row, **kinds, **inputs).logits[0]
        targets = torch.tensor(ids[-labels:])
        expected = expected + torch.nn.functional.cross_entropy(logits[-labels - 1 : -1], targets, reduction="sum")
    expected.backward()

    grids = [grid for image in images for grid in image_grids(complete.config, image)]
    with image_embeddings(parts.view, torch.cat(features), grids) as first_id:
        examples = [_example(number, row, first_id, count) for number, row in enumerate(ROWS, start=1)]
        batcher, _ = choose_causal_batcher(parts.view, examples, BatcherOptions("cpu"))
        assert not batcher.padded
        objective = CausalObjective(parts.view)
        loss = torch.zeros(())
        with padded_rows(parts.view) if batcher.padded else packed_rows(parts.view):
            batches = list(batcher.batches(examples))
            for batch in batches:
                loss = loss + objective(batch)
        loss.backward()
    shares = sum(batch.tokens for batch in batches) < sum(map(len, examples))
    assert batcher.share == shares == (not batcher.padded)
    assert relative_error(loss.detach(), expected.detach()) <= 1e-5
    for name, factor, their_factor in factor_pairs(view, theirs):
        assert relative_error(ours_as_peft(factor.grad), their_factor.grad) <= 2e-5, name


def _example(number: int, row: tuple[list[int | str], int], first_id: int, count: int) -> Example:
    tokens, labels = row
    ids: list[int] = []
    for part in tokens:
        start = first_id + count * int(part)
        ids += range(start, start + count) if isinstance(part, str) else [part]
    is_label = np.arange(len(ids)) >= len(ids) - labels
    return Example(number, np.array(ids, np.int32), is_label, len(ids) - labels, None)


def _adapted(view: torch.nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, module in view.named_modules() if hasattr(module, "lora_A")})


class _Renamed:
    """View whose modules have the names of the complete model."""

    def __init__(self, parts):
        self._parts = parts

    def named_modules(self):
        names = complete_names(self._parts.view)
        return ((names.to_complete(name), module) for name, module in self._parts.view.named_modules())
