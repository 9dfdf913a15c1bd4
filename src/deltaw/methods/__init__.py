"""The ways to train few parameters: one file each, one small protocol."""

from deltaw.methods.base import Method
from deltaw.methods.lora import LoRA

__all__ = ["LoRA", "Method"]
