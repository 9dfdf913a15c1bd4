"""What a model is trained to do: how rows are read, batched, turned into a loss, and evaluated."""
