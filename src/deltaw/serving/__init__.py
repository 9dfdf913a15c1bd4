"""From a trained adapter to its use: a decoding engine, many adapters on one base, the OpenAI API."""
