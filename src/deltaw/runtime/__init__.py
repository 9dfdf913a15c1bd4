"""Running a model's blocks: packed and padded batches, fused blocks, virtual tokens, int8 weights."""
