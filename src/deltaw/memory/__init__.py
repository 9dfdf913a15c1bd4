"""Predict the memory of a run with a dry run on fake tensors, and measure it."""
