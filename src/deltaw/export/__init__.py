"""An adapter in the forms that other programs load: merged into its base, as GGUF, as a portable adapter."""
