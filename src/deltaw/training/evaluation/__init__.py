"""Evaluation of models on unseen examples."""
