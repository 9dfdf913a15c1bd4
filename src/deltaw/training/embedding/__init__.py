"""Vectors of texts: pooling, losses of a whole step, and how its gradient is had in small memory."""
