"""Three rotary positions of image tokens (M-RoPE) equal those of transformers."""

from __future__ import annotations

import numpy as np
import torch

from deltaw.data.example import Example
from deltaw.data.packing import pack
from deltaw.decoding.generation import generate
from deltaw.hub.mrope import GridRotary, image_grids
from deltaw.hub.vision import text_view
from deltaw.runtime.image_tokens import image_embeddings, image_position_shifts
from tests.byte_models import byte_tokenizer
from tests.vision_models import IMAGE_TOKEN, token_kinds, vision_model

# Rows of tokens and images. The first two share the first image, and the last one ends with an image.
ROWS = [[5, 6, 7, 8, "0", 9, "1", 10, 11], [5, 6, 7, 8, "0", 9, 12], ["2", 18, "0", 13], [14, 15, 16], [17, "1"]]
GRIDS = torch.tensor([[1, 4, 6], [1, 8, 4], [1, 2, 2]])


class _Recorded(torch.nn.Module):
    """Rotary embedding that records the positions that it reads."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.positions = position_ids
        return x, x


class _Recorder(GridRotary, _Recorded):
    pass


def _model():
    parts = text_view(vision_model("qwen2_vl"))
    grids = image_grids(parts.model.config, {"image_grid_thw": GRIDS})
    assert grids == [(2, 3), (4, 2), (1, 1)]
    return parts, grids


def _ids(row, grids, first_id):
    starts = first_id + np.cumsum([0, *(height * width for height, width in grids)])
    parts = [[part] if isinstance(part, int) else range(starts[int(part)], starts[int(part) + 1]) for part in row]
    return np.concatenate([np.array(part, np.int32) for part in parts])


def _complete_inputs(model, row, ids, first_id):
    tokens = torch.from_numpy(np.where(ids >= first_id, IMAGE_TOKEN, ids).astype(np.int64))[None]
    used = [GRIDS[int(part)] for part in row if isinstance(part, str)]
    inputs = {"input_ids": tokens, **token_kinds(model, tokens)}
    return {**inputs, "image_grid_thw": torch.stack(used)} if used else inputs


def test_packed_positions_equal_those_of_transformers():
    parts, grids = _model()
    with image_embeddings(parts.view, torch.randn(15, 32), grids) as first_id:
        examples = [Example(n, ids, ids < 0, 0, None) for n, ids in enumerate(_ids(r, grids, first_id) for r in ROWS)]
        batch = pack(examples, fill=True, position_shifts=image_position_shifts(parts.view))
        assert batch.tokens == batch.row_tokens - 11  # a shared prefix
        rotary = _Recorder()
        rotary(torch.zeros(1), batch.inputs["position_ids"])
        for row, member in zip(ROWS, batch.members, strict=True):
            inputs = _complete_inputs(parts.model, row, member.example.tokens, first_id)
            expected, _ = parts.model.model.get_rope_index(**inputs)
            assert torch.equal(rotary.positions[:, 0, member.indices], expected[:, 0])


def test_positions_of_text_are_unchanged():
    parts, grids = _model()
    with image_embeddings(parts.view, torch.randn(15, 32), grids):
        examples = [Example(n, np.arange(5 + n), np.zeros(5 + n, bool), 0, None) for n in range(3)]
        positions = pack(examples, position_shifts=image_position_shifts(parts.view)).inputs["position_ids"]
        assert torch.equal(positions, pack(examples).inputs["position_ids"])
    tokens = torch.arange(7)[None]
    assert torch.equal(parts.view(input_ids=tokens).logits, parts.model(input_ids=tokens).logits)
    assert image_position_shifts(text_view(vision_model("llava")).view) is None


def test_rows_generated_together_equal_rows_of_the_complete_model():
    parts, grids = _model()
    pixels = torch.randn(60, 96, generator=torch.Generator().manual_seed(0))
    features = torch.cat(parts.features({"pixel_values": pixels, "image_grid_thw": GRIDS}))
    images = dict(zip("012", pixels.split(GRIDS.prod(1).tolist()), strict=True))
    with image_embeddings(parts.view, features, grids) as first_id:
        rows = [_ids(row, grids, first_id) for row in ROWS]
        actual = generate(parts.view, byte_tokenizer(), rows, max_new_tokens=8, stop_ids=[])
    for row, ids, completion in zip(ROWS, rows, actual, strict=True):
        used = [images[part] for part in row if isinstance(part, str)]
        pictures = {"pixel_values": torch.cat(used)} if used else {}
        for token in completion.tokens.tolist():  # without a cache
            inputs = _complete_inputs(parts.model, row, ids, first_id) | pictures
            assert token == int(parts.model(**inputs).logits[0, -1].argmax())
            ids = np.append(ids, token)
