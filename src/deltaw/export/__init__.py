"""Export of adapters for other programs: merged models, GGUF files and portable adapters."""
