"""What a run needs of memory: predicted by running it on tensors without values, and measured on real ones."""
