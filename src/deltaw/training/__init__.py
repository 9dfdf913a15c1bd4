"""Training an adapter: the loop and its state, losses, microbatches, callbacks. It prints nothing."""
