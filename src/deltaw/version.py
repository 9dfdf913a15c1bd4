"""Version of deltaw."""

__version__ = "0.1.0"
