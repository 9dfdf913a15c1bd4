"""Inference with trained adapters: decoding engine, multi-adapter serving and the OpenAI API."""
