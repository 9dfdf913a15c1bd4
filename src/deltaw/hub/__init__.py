"""Model loading: resolves references to folders, hubs, GGUF files and packages, and loads models and tokenizers."""
