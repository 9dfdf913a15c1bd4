"""Monitoring of a run: evaluations, best score, generated answers, warnings and time budget."""
