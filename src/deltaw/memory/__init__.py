"""What a run needs of memory: predicted by running it on fake tensors, and measured."""
