"""Outputs of the frozen lower part of a model, computed once for each row and kept."""
