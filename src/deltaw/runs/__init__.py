"""A run from its settings to its folder, and the folder as one object that all others read."""
