"""A reference becomes files and a model: folders, hubs, GGUF files, packages; tokenizers; loading."""
