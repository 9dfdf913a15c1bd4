"""The same tiny model and tokenizer as in the tests of ``runtime``."""

from tests.runtime.conftest import llama_folder, tokenizer

__all__ = ["llama_folder", "tokenizer"]
