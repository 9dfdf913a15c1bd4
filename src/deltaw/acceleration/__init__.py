"""Acceleration of models and trainers in scripts for transformers, PEFT, TRL or sentence-transformers."""
