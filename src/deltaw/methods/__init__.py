"""The ways to train few parameters: one file each, one small protocol (``base``)."""
