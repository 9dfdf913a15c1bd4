"""Training of adapters: loop, state, losses, microbatches and callbacks."""
