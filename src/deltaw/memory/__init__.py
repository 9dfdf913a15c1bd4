"""What a run needs of memory: predicted by running it without values, and measured."""
