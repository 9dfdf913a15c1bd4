"""Text embeddings: pooling, losses over a step, and memory-efficient gradients."""
