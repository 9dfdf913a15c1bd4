"""Acceleration of models and trainers in a script of one's own: :func:`accelerate` and :func:`restore`."""
