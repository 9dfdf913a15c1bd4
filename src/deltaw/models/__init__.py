"""A reference becomes a model: folder, ``.gguf`` file, package or hub id; and text comes out of it."""
