"""deltaw: LoRA fine-tuning of any PyTorch model."""

from deltaw.version import __version__

__all__ = ["__version__"]
