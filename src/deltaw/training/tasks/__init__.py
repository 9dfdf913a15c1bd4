"""Training tasks: reading rows, batching, objectives and evaluation."""
