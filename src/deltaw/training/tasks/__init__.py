"""What a model is trained to do: how rows are read, what their loss is, how they are batched."""
