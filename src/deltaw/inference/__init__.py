"""Inference with a loaded run, adapter or base model: prompts, scores, vectors and predictions."""
