"""The few hot pieces, each with a plain torch twin that it is tested against. Knows tensors alone."""
