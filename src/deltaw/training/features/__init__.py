"""Stored outputs of frozen layers and prompts."""
