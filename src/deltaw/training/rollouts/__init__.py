"""Completions that the model writes itself: drawn, rewarded, and learned from."""
