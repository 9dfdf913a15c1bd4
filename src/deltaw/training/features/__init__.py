"""Outputs of a model's frozen lower layers, computed once for each row and kept."""
