"""The hot operators, each tested against a reference implementation in torch. Knows tensors alone."""
