"""Execution of model blocks: packed and padded batches, fused blocks, virtual tokens and int8 weights."""
