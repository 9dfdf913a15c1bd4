"""The chat page: base and adapters side by side, token by token, in one document."""
