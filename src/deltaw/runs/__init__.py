"""Runs: training from settings to a run folder, resuming, checkpoints, and reading run folders."""
