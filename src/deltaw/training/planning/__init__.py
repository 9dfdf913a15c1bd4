"""What a run will cost, before it starts: a dry run on fake tensors."""
