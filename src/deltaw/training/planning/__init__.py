"""Prediction of a run's memory by a dry run on fake tensors."""
